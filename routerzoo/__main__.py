"""`python -m routerzoo`: the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

OVERVIEW = """usage: python -m routerzoo COMMAND [OPTIONS]

Mixture-of-Experts routers, compared, used and invented.

commands:
  fit        train:                              python -m routerzoo fit --config configs/language/HyperRouter.yaml
  validate   evaluate on the validation split:   python -m routerzoo validate --ckpt_path last
  test       evaluate on the test split:         python -m routerzoo test --ckpt_path best
  predict    continue text, or classify images:  python -m routerzoo predict --ckpt_path best
  look       show the routing of text or images: python -m routerzoo look --ckpt_path best
  routers    list routers, sizes and papers:     python -m routerzoo routers
  sweep      run a grid, and go on with it:      python -m routerzoo sweep --config configs/sweeps/quick.yaml
  report     say what came of a sweep:           python -m routerzoo report sweeps/quick
  plan       memory, FLOPs, traffic of a run:    python -m routerzoo plan --config ... --processes 64 --strategy sharded
  check      check what routers declare:         python -m routerzoo check HyperRouter

python -m routerzoo COMMAND --help lists a command's options;
python -m routerzoo fit --model LanguageModeling --model.router.help HyperRouter explains a router's.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; import no more than it needs."""
    owns_process = args is None
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(OVERVIEW, end="")
    elif args[0] == "--version":
        from importlib.metadata import version

        print(version("routerzoo"))
    elif args[0] == "routers":
        from routerzoo.cli.routers import main as list_routers

        list_routers(args[1:])
    elif args[0] == "check":
        from routerzoo.cli.check import main as check

        check(args[1:])
    elif args[0] == "plan":
        from routerzoo.cli.plan import main as plan

        plan(args[1:])
    elif args[0] == "sweep":
        from routerzoo.cli.sweep import main as sweep

        sweep(args[1:])
    elif args[0] == "look":
        from routerzoo.cli.look import main as look

        look(args[1:])
    elif args[0] == "report":
        from routerzoo.cli.report import main as report

        report(args[1:])
    else:
        if owns_process and os.environ.get("ROUTERZOO_TUNE_CPU", "1") != "0":
            from routerzoo.tune_cpu import tune_cpu

            tune_cpu()
        from routerzoo.cli.main import main as run

        run(args)


if __name__ == "__main__":
    main()
