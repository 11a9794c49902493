"""A causal language model of transformers, called as a `Decoder` is."""
# Shape suffixes: B sequences, S tokens of a sequence, V vocabulary.

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from routerzoo.errors import UserError
from routerzoo.hf.text_model import TextModel
from routerzoo.moe.layer import moe_layers
from routerzoo.routing import RoutingContext


class LanguageModel(TextModel):
    """A causal language model of transformers behind the interface of `routerzoo.models.decoder.Decoder`."""

    def forward(
        self,
        ids_BS: Tensor,
        *,
        padding_mask_BS: Tensor | None = None,
        task_ids_B: Tensor | None = None,
        step: int | None = None,
        total_steps: int | None = None,
        process_group: ProcessGroup | None = None,
        sequence_ids_BS: Tensor | None = None,
        attend_across: bool = True,
    ) -> tuple[Tensor, RoutingContext]:
        """Return next-token logits `[B, S, V]`, and the context with the routing of every MoE layer.

        Args:
            ids_BS: token ids.
            padding_mask_BS: True where a token is padding; experts skip it.
            task_ids_B: ignored: no model of transformers tells tasks apart.
            step: optimizer steps taken, where known.
            total_steps: optimizer steps that the run will take, where known.
            process_group: processes that train on parts of this batch; see `RoutingContext`.
            sequence_ids_BS: the document of each token, where a row is packed from several, counted over the batch.
                Routers see it, and positions from the beginning of each.
            attend_across: whether attention crosses the boundaries of documents.

        Raises:
            UserError: documents to be kept apart, by a model whose layers do not all attend to whole sequences.
        """
        known: dict[str, Any] = {"step": step, "total_steps": total_steps, "process_group": process_group}
        given: dict[str, Any] = {"use_cache": False}
        if sequence_ids_BS is not None:
            positions_BS = _positions(sequence_ids_BS)
            known |= {"sequence_ids": sequence_ids_BS, "positions": positions_BS}
            if not attend_across:
                self._check_attention()
                given |= {"attention_mask": self._apart(sequence_ids_BS, padding_mask_BS), "position_ids": positions_BS}
        return self._run(ids_BS, padding_mask_BS, known, **given)

    def _apart(self, sequence_ids_BS: Tensor, padding_mask_BS: Tensor | None) -> Tensor:
        """Return what is added to attention's scores, `[B, 1, S, S]`, so that documents do not see each other."""
        seen_BSS = (sequence_ids_BS.unsqueeze(2) == sequence_ids_BS.unsqueeze(1)).tril()
        if padding_mask_BS is not None:  # padding sees itself, since a softmax of nothing is no number
            seen_BSS = seen_BSS & (
                ~padding_mask_BS.unsqueeze(1) | torch.eye(seen_BSS.shape[-1], device=seen_BSS.device).bool()
            )
        dtype = self.base.dtype
        mask_BSS = torch.zeros(seen_BSS.shape, dtype=dtype, device=seen_BSS.device)
        return mask_BSS.masked_fill(~seen_BSS, torch.finfo(dtype).min).unsqueeze(1)

    def _check_attention(self) -> None:
        config = self.base.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        window = getattr(config, "sliding_window", None)
        if window is not None and window >= self.max_length:
            kinds -= {"sliding_attention"}
        if kinds - {"full_attention"} or not hasattr(config, "rope_parameters") or config.model_type == "jamba":
            raise UserError(
                f"{type(self.base).__name__} cannot keep documents apart, since not all of its layers are rotary "
                "attention over whole sequences: set data.documents to marked or joined"
            )

    @torch.no_grad()
    def generate(self, ids_BS: Tensor, tokens: int, temperature: float, top_p: float, seed: int) -> Tensor:
        """Return sampled tokens after each prompt, `[B, S]`, as far as the model has positions; after the end, padding.

        Args:
            ids_BS: the prompts, of one length.
            tokens: most tokens to sample.
            temperature: divides the logits; 0 takes the most likely token.
            top_p: samples from the most likely tokens that hold this share of the probability.
            seed: of the random numbers.
        """
        config = self.base.config.get_text_config()
        end = config.eos_token_id
        longest = getattr(config, "max_position_embeddings", None)
        tokens = tokens if longest is None else min(tokens, longest - ids_BS.shape[1])
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        # With the default cache, a router that looks back would refuse.
        tokenwise = all(layer.router.properties.tokenwise for layer in moe_layers(self))
        with torch.random.fork_rng(devices=[ids_BS.device] if ids_BS.is_cuda else []):
            torch.manual_seed(seed)
            out_BS: Tensor = self.model.generate(
                input_ids=ids_BS,
                attention_mask=torch.ones_like(ids_BS),
                max_new_tokens=tokens,
                use_cache=tokenwise,
                pad_token_id=end[0] if isinstance(end, list) else end,
                **(sampling if temperature > 0 else {"do_sample": False}),
            )
        return out_BS[:, ids_BS.shape[1] :]


def _positions(sequence_ids_BS: Tensor) -> Tensor:
    """Return the place of each token in its document."""
    places_BS = torch.arange(sequence_ids_BS.shape[1], device=sequence_ids_BS.device).expand_as(sequence_ids_BS)
    begins_BS = F.pad(sequence_ids_BS.diff(dim=1) != 0, (1, 0), value=True)
    return places_BS - (places_BS * begins_BS).cummax(dim=1).values
