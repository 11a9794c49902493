"""`python -m routerzoo routers`: every router with its declared properties, parameter counts and paper."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from routerzoo.registry import broken_plugins, create_router, list_routers, router_class, router_package
from routerzoo.routing import LayerSpec

EXAMPLE = LayerSpec(d_model=256, num_experts=16, vocab_size=256, num_positions=256)


def router_table() -> list[dict[str, str]]:
    """Return a row per router.

    The numbers are for a layer of 16 experts and width 256, with 256 token ids, and the router's default arguments.
    """
    rows = []
    for name in list_routers():
        cls = router_class(name)
        router = create_router(name, EXAMPLE)
        learned = sum(parameter.numel() for parameter in router.parameters())
        frozen = sum(buffer.numel() for buffer in router.buffers())
        rows.append(
            {
                "router": name,
                "package": router_package(name),
                "learned": f"{learned:,}",
                "frozen": f"{frozen:,}",
                "top_k": str(router.top_k),
                "causal": _mark(router.causal),
                "batch independent": _mark(router.batch_independent),
                "requires": ", ".join(sorted(router.requires)) or "-",
                "losses": ", ".join(f"{n} {w:g}" for n, w in cls.default_loss_weights.items()) or "-",
                "source": ("inspired by " if cls.inspired_by else "") + cls.paper,
            }
        )
    return rows


def main(args: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m routerzoo routers",
        description="List every router, installed plugins' included. Numbers are for 16 experts and width 256.",
        allow_abbrev=False,
    )
    parser.add_argument("--names", action="store_true", help="print the names alone, one a line")
    options = parser.parse_args(args)
    if options.names:
        print("\n".join(list_routers()))
        return
    rows = router_table()
    table = Table(show_lines=True)
    for column in rows[0]:
        table.add_column(column, justify="right" if column in ("learned", "frozen", "top_k") else "left")
    for row in rows:
        table.add_row(*row.values())
    console = Console()
    # A pipe has no width of its own; wrapped to 80 columns the table would be unreadable.
    console.print(table, width=console.width if console.is_terminal else 180)
    for plugin in broken_plugins():
        console.print(f"broken plugin: {plugin}", style="red", markup=False, soft_wrap=True)


def _mark(value: bool) -> str:
    return "yes" if value else "no"
