"""`python -m routerzoo routers`: every router with its declared properties, parameter counts and paper."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from routerzoo.cli.arguments import CommandParser
from routerzoo.registry import (
    UnknownRouterError,
    broken_plugins,
    create_router,
    list_routers,
    router_arguments,
    router_class,
    router_package,
)
from routerzoo.router import LossWeight, Router
from routerzoo.routing import LayerSpec

EXAMPLE = LayerSpec(d_model=256, num_experts=16, layer=0, vocab_size=256, num_positions=256, num_tasks=2)


NARROW = 120
"""In a terminal of fewer columns the table leaves out what routers declare."""


def router_table(names: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Return a row per router.

    The numbers are for a layer of 16 experts and width 256, with 256 token ids, and the router's default arguments.

    Args:
        names: of the routers; by default all.

    Raises:
        UnknownRouterError: there is no router of that name.
    """
    rows = []
    for name in list_routers() if names is None else names:
        cls = router_class(name)
        router = create_router(name, EXAMPLE)
        learned = sum(parameter.numel() for parameter in router.parameters())
        frozen = sum(buffer.numel() for buffer in router.buffers() if buffer.ndim > 0)  # k is no weight
        rows.append(
            {
                "router": name if router_package(name) == "routerzoo" else f"{name}\n({router_package(name)})",
                "learned": f"{learned:,}",
                "frozen": f"{frozen:,}",
                "k": str(router.top_k),
                "declares": _declared(router),
                "source": ("inspired by " if cls.inspired_by else "") + cls.paper,
            }
        )
    return rows


def main(args: Sequence[str]) -> None:
    """Print the table, or what is known of some routers."""
    parser = CommandParser(
        prog="python -m routerzoo routers",
        description="List every router, installed plugins' included. Numbers are for 16 experts and width 256.",
    )
    parser.add_argument("routers", nargs="*", metavar="ROUTER", help="show all that is known of these routers alone")
    parser.add_argument("--names", action="store_true", help="print the names alone, one a line")
    options = parser.parse_args(args)
    if options.names:
        print("\n".join(list_routers()))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)  # a pipe has no width of its own; at 80 columns the table would be unreadable
    if options.routers:
        try:
            rows = router_table(options.routers)
        except UnknownRouterError as error:
            parser.exit(2, f"error: {error}\n")
        for name, row in zip(options.routers, rows, strict=True):
            _show(console, name, row)
        return
    rows = router_table()
    if narrow := console.width < NARROW:
        rows = [{column: value for column, value in row.items() if column != "declares"} for row in rows]
    table = Table(show_lines=not narrow)
    for column in rows[0]:
        number = column in ("learned", "frozen", "k")
        table.add_column(column, justify="right" if number else "left", no_wrap=number or column == "router")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    if narrow:
        console.print("python -m routerzoo routers NAME shows the declared properties and the arguments of one")
    for plugin in broken_plugins():
        console.print(f"broken plugin: {plugin}", style="red", markup=False, soft_wrap=True)


def _show(console: Console, name: str, row: dict[str, str]) -> None:
    """Print a router's row, and its arguments, one below the other."""
    cls = router_class(name)
    summary = (inspect.getdoc(cls) or "").partition("\n")[0]
    console.print(f"[bold]{name}[/bold] ({router_package(name)}): {escape(summary)}", soft_wrap=True)
    facts = {**row, "declares": row["declares"].replace("; ", "\n"), "arguments": ", ".join(router_arguments(cls))}
    for label, value in facts.items():
        if label != "router":
            first, *rest = value.splitlines() or ["-"]
            console.print(f"  {label:10}{first}", markup=False, soft_wrap=True)
            for line in rest:
                console.print(f"  {'':10}{line}", markup=False, soft_wrap=True)
    console.print(
        f"  explain   python -m routerzoo fit --model LanguageModeling --model.router.help {name}\n", markup=False
    )


def _declared(router: Router) -> str:
    training, evaluation = router.train().properties, router.eval().properties
    parts = []
    for name in ("causal", "batch_independent"):
        words, both = name.replace("_", " "), (getattr(training, name), getattr(evaluation, name))
        forms = {(True, True): words, (False, False): f"not {words}", (True, False): f"in evaluation not {words}"}
        parts.append(forms.get(both, f"{words} in evaluation only"))
    parts.append(f"{'' if evaluation.tokenwise else 'not '}tokenwise")
    if not training.trainable:
        parts.append("does not learn")
    elif not training.trains_at_top_1:
        parts.append("does not learn at k = 1")
    if evaluation.normalized:
        parts.append("weights sum to 1")
    if not evaluation.nonnegative:
        parts.append("weights of both signs")
    if not evaluation.compiles:
        parts.append("does not compile")
    if router.needs_updates:
        parts.append("updated once per optimizer step")
    if router.requires:
        parts.append(f"requires {', '.join(sorted(router.requires))}")
    if router.default_loss_weights:
        losses = (f"{name} {_coefficient(weight)}" for name, weight in router.default_loss_weights.items())
        parts.append(f"losses {', '.join(losses)}")
    return "; ".join(parts)


def _coefficient(weight: float | LossWeight) -> str:
    if not isinstance(weight, LossWeight):
        return f"{weight:g}"
    return f"{weight.value:g}" + ("" if weight.over_layers == "sum" else f" ({weight.over_layers} over layers)")
