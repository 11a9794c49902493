"""`PretrainedLanguageModeling`: next-token prediction with a model of transformers."""
# Shape suffixes: B sequences, S tokens of a sequence.

from __future__ import annotations

from functools import partial
from typing import Any, final

from torch import Tensor

from routerzoo.data.text import TextMetric
from routerzoo.tasks.language_modeling import Continuation, NextTokenPrediction, text_metrics
from routerzoo.tasks.pretrained import PretrainedTask


@final
class PretrainedLanguageModeling(NextTokenPrediction, PretrainedTask):
    """Language modeling with a model of transformers. The loss, and what is reported, are those of `LanguageModeling`.

    Needs the extra `routerzoo[hf]`. A dense model is upcycled; of a released Mixture of Experts the routers are kept
    or replaced. `net.model` is the model, which `save_pretrained` and `routerzoo.hf.to_transformers` take.

    Args:
        metric: what is reported beside the loss; by default `ppl`. From the command line it is the data's.
        predict_tokens: tokens that `predict` samples after a prompt.
        temperature: sampling temperature of `predict`; 0 takes the most likely token.
        top_p: `predict` samples from the most likely tokens that hold this share of the probability.
        arguments: those of `PretrainedTask`.

    Raises:
        UserError: an extra that is not installed; a model, a router or data that do not fit each other.
    """

    def __init__(
        self,
        source: str | dict[str, Any],
        *,
        metric: TextMetric | None = None,
        predict_tokens: int = 200,
        temperature: float = 0.8,
        top_p: float = 0.95,
        **arguments: Any,
    ) -> None:
        self.metric = metric or "ppl"
        super().__init__(source, evaluation_metrics=partial(text_metrics, self.metric), **arguments)
        self.predict_tokens, self.temperature, self.top_p = predict_tokens, temperature, top_p

    def build_net(self, source: str | dict[str, Any], max_length: int, **options: Any) -> Any:
        """Return a causal language model."""
        from transformers import AutoModelForCausalLM

        from routerzoo.hf.language_model import LanguageModel
        from routerzoo.hf.text_model import build_text_model

        return LanguageModel(build_text_model(source, AutoModelForCausalLM, **options), max_length)

    def predict_step(self, batch: Tensor, batch_idx: int) -> list[Continuation]:
        """Sample a continuation of each prompt. The same seed gives the same text."""
        with self.override_top_k():
            sampled_BS = self.net.generate(batch, self.predict_tokens, self.temperature, self.top_p, batch_idx)
        return [Continuation(p.tolist(), s.tolist()) for p, s in zip(batch, sampled_BS, strict=True)]
