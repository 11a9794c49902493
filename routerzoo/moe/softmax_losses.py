"""The balance loss and the z-loss of softmax scores in three kernels: on a GPU a small model waits for launches."""
# Shape suffixes: T tokens, E experts, K choices per token.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from routerzoo.functional.transforms import in_transform
from routerzoo.moe.low_memory import HAS_TRITON, on_device_of
from routerzoo.routing import Routing, RoutingContext

_KNOWN = "_softmax_losses"  # no field: a routing that is moved or copied leaves it behind


def softmax_losses(routing: Routing, context: RoutingContext) -> tuple[Tensor, Tensor] | None:
    """Return a routing's balance loss and z-loss, computed together once; None where they are computed one by one.

    So they are on a CPU, over several processes, and of scores other than the softmax of the logits.
    """
    known: tuple[Tensor, Tensor] | None = vars(routing).get(_KNOWN)
    if known is not None and torch.is_grad_enabled() and not known[0].requires_grad:
        known = None  # made where there were no gradients
    if known is None and _applies(routing, context):
        balance, z, _, _ = _losses(routing.logits_TE, routing.experts_TK, context.padding_mask)
        known = vars(routing)[_KNOWN] = balance, z
    return known


def _applies(routing: Routing, context: RoutingContext) -> bool:
    logits_TE, experts_TK = routing.logits_TE, routing.experts_TK
    if logits_TE is None or experts_TK is None or not _on_gpu(logits_TE) or logits_TE.dtype != torch.float32:
        return False
    plain = routing.score_fn == "softmax" and routing.balance_probs_TE is None and routing.clean_logits_TE is None
    return plain and context.process_group is None and not routing.balances_by_score and experts_TK.numel() > 0


def _on_gpu(logits_TE: Tensor) -> bool:
    if logits_TE.device.type != "cuda" or not HAS_TRITON or torch.compiler.is_exporting():
        return False
    return not in_transform()


@custom_op("routerzoo::softmax_losses", mutates_args=())
def _losses(
    logits_TE: Tensor, experts_TK: Tensor, padding_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from routerzoo.moe import kernel_calls  # Triton takes long to import, and is not everywhere

    with on_device_of(logits_TE):
        mask = None if padding_mask is None else padding_mask.contiguous()
        return kernel_calls.softmax_losses(logits_TE.contiguous(), experts_TK.contiguous(), mask)


@_losses.register_fake
def _(logits_TE: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_experts = logits_TE.shape
    balance, z = logits_TE.new_empty(()), logits_TE.new_empty(())
    return balance, z, logits_TE.new_empty(num_tokens), logits_TE.new_empty(2 * num_experts + 2)


@custom_op("routerzoo::softmax_losses_backward", mutates_args=())
def _losses_backward(
    grad_balance: Tensor | None,
    grad_z: Tensor | None,
    logits_TE: Tensor,
    padding_mask: Tensor | None,
    log_partition_T: Tensor,
    sums: Tensor,
) -> Tensor:
    from routerzoo.moe import kernel_calls

    with on_device_of(logits_TE):
        mask = None if padding_mask is None else padding_mask.contiguous()
        return kernel_calls.softmax_losses_backward(
            grad_balance, grad_z, logits_TE.contiguous(), mask, log_partition_T, sums
        )


@_losses_backward.register_fake
def _(grad_balance: Any, grad_z: Any, logits_TE: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(logits_TE, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: tuple[Tensor, ...]) -> None:
    logits_TE, _, padding_mask = inputs
    _, _, log_partition_T, sums = output
    ctx.save_for_backward(logits_TE, padding_mask, log_partition_T, sums)
    ctx.mark_non_differentiable(log_partition_T, sums)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_balance: Tensor | None, grad_z: Tensor | None, *_: Any
) -> tuple[Tensor | None, None, None]:
    if grad_balance is None and grad_z is None:
        return None, None, None
    if torch.is_grad_enabled():  # somebody differentiates the gradient
        return _differentiable(grad_balance, grad_z, *ctx.saved_tensors), None, None
    return _losses_backward(grad_balance, grad_z, *ctx.saved_tensors), None, None


def _differentiable(
    grad_balance: Tensor | None,
    grad_z: Tensor | None,
    logits_TE: Tensor,
    padding_mask: Tensor | None,
    log_partition_T: Tensor,
    sums: Tensor,
) -> Tensor:
    num_experts = logits_TE.shape[1]
    chosen_E, tokens = sums[num_experts : 2 * num_experts], sums[2 * num_experts + 1].clamp_min(1)
    softmax_TE, grad_TE = logits_TE.softmax(-1), torch.zeros_like(logits_TE)
    if grad_balance is not None:
        factor_E = chosen_E * (grad_balance * num_experts / (tokens * chosen_E.sum().clamp_min(1)))
        grad_TE = grad_TE + softmax_TE * (factor_E - (softmax_TE * factor_E).sum(-1, keepdim=True))
    if grad_z is not None:
        grad_TE = grad_TE + softmax_TE * logits_TE.logsumexp(-1, keepdim=True) * (2 * grad_z / tokens)
    return grad_TE if padding_mask is None else torch.where(padding_mask.unsqueeze(1), 0.0, grad_TE)


_losses.register_autograd(_backward, setup_context=_setup)
