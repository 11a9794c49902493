"""`python -m routerzoo`: the commands."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence

OVERVIEW = """usage: python -m routerzoo COMMAND [OPTIONS]

Mixture-of-Experts routers, compared, used and invented.

commands:
  fit        train:                              python -m routerzoo fit --config language/HyperRouter
  validate   evaluate on the validation split:   python -m routerzoo validate --ckpt_path last
  test       evaluate on the test split:         python -m routerzoo test --ckpt_path best
  predict    continue text, or classify images:  python -m routerzoo predict --ckpt_path best
  look       show the routing of text or images: python -m routerzoo look --ckpt_path best
  audit      judge the routing of a model:       python -m routerzoo audit runs/... --min-load 0.05
  tokenize   train a tokenizer, encode a corpus: python -m routerzoo tokenize 'corpus/*.jsonl' --tokenizer bpe-8192
  configs    list the configs that are packaged: python -m routerzoo configs
  routers    list routers, sizes and papers:     python -m routerzoo routers
  sweep      run a grid, and go on with it:      python -m routerzoo sweep --config sweeps/quick
  report     say what came of a sweep:           python -m routerzoo report sweeps/quick
  plan       memory, FLOPs, traffic of a run:    python -m routerzoo plan --config ... --processes 64 --strategy sharded
  bench      compare routers on exact tasks:     python -m routerzoo bench --quick
  check      check what routers declare:         python -m routerzoo check HyperRouter

python -m routerzoo COMMAND --help lists a command's options;
python -m routerzoo fit --model LanguageModeling --model.router.help HyperRouter explains a router's.
Configs can name classes of torch, Lightning, timm, routerzoo and installed plugins; --trust lets them name any.
"""


# Those of their own; the others are LightningCLI's.
COMMANDS = ("bench", "routers", "configs", "check", "plan", "sweep", "look", "audit", "report", "tokenize")


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; import no more than it needs."""
    from routerzoo.errors import in_a_sentence

    owns_process = args is None
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(OVERVIEW, end="")
    elif args[0] == "--version":
        from importlib.metadata import version

        print(version("routerzoo"))
    elif args[0] in COMMANDS:
        with in_a_sentence():
            importlib.import_module(f"routerzoo.cli.{args[0]}").main(args[1:])
    elif args[0] in ("fit", "validate", "test", "predict"):
        if owns_process and os.environ.get("ROUTERZOO_TUNE_CPU", "1") != "0":
            from routerzoo.tune_cpu import tune_cpu

            tune_cpu()
        from routerzoo.cli.main import main as run

        run(args)
    else:
        known = re.findall(r"^  (\w+) ", OVERVIEW, re.MULTILINE)
        near = difflib.get_close_matches(args[0], known, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else "."
        sys.exit(f"error: there is no command {args[0]!r}{meant} Commands: {', '.join(known)}")


if __name__ == "__main__":
    main()
