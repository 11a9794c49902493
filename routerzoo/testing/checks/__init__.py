"""The conformance checks, one function each. A docstring says what holds, why, and how to fix a router."""

from collections.abc import Callable

from routerzoo.testing.cases import Cases
from routerzoo.testing.checks import adaptation, declarations, gradients, independence, numerics, outputs, state

CHECKS: dict[str, Callable[[Cases], None]] = {
    check.__name__: check
    for check in (
        declarations.declaration,
        outputs.output,
        outputs.weights,
        outputs.choices,
        declarations.requirements,
        declarations.top_k,
        outputs.selection,
        independence.deterministic,
        independence.isolated,
        independence.causal,
        independence.batch_independent,
        independence.tokenwise,
        independence.padding,
        numerics.float32_scores,
        numerics.default_dtype,
        numerics.assigned_bfloat16,
        numerics.extremes,
        numerics.nan,
        numerics.compiles,
        state.state_dict,
        state.reset_parameters,
        state.copies,
        state.resume,
        adaptation.stateless,
        adaptation.accumulation,
        adaptation.processes,
        adaptation.frozen,
        adaptation.freeze,
        gradients.gradients,
        gradients.gradient_at_top_1,
        gradients.recomputation,
    )
}
"""The checks by name, in the order in which `check_router` runs them."""

__all__ = ["CHECKS"]
