"""The command line: `fit`, `validate`, `test` and `predict` by LightningCLI, for any task, data, router and experts."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import register_type
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

import routerzoo.data
import routerzoo.tasks
from routerzoo.callbacks import RoutingMonitor, StopOnNonFiniteLoss
from routerzoo.checkpoints.sharded import is_folder
from routerzoo.checkpoints.single import WholeCheckpoints, read_outline
from routerzoo.cli.parser_errors import explain
from routerzoo.errors import UserError, in_a_sentence
from routerzoo.runs import folder as runs
from routerzoo.runs.atomic import atomic_write
from routerzoo.runs.checkpoint import TERMINATED, RunCheckpoint
from routerzoo.runs.loggers import AppendingCSVLogger
from routerzoo.runs.predictions import PredictionWriter
from routerzoo.runs.progress_file import ProgressFile
from routerzoo.runs.report import RunReport
from routerzoo.runs.routing_pictures import RoutingPictures
from routerzoo.tasks import class_paths
from routerzoo.tasks.base import MoETask

# Callbacks have devices as defaults, which a run's config has to name.
register_type(torch.device, fail_already_registered=False)

PROGRESS_VARIABLE = "ROUTERZOO_PROGRESS_FILE"
"""A run whose environment has this writes how far it is into that file."""
TRUST, TRUST_VARIABLE = "--trust", "ROUTERZOO_TRUST"
"""The option, or the environment variable, that lets configs name any package's classes. No config can set it."""
# The data decides these sizes of the model.
LINKED = ("vocab_size", "metric", "max_length", "num_tasks", "num_classes", "image_size", "in_channels")
# What may differ between a checkpoint and the command that uses it. All else decides what its numbers mean.
FREE = frozenset(
    {
        *(
            "optimizer",
            "lr_scheduler",
            "loss_weights",
            "eval_top_k",
            "initial_logit_std",
            "dropout",
            "consistency",
            "label_smoothing",
            "backend",
        ),
        *("activation_checkpointing", "predict_tokens", "temperature", "top_p", "pretrained"),
    }
)


class Parser(LightningArgumentParser):
    """Parser that takes no abbreviated options, and whose errors are one sentence with a way out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # With abbreviations, `--trainer.max_epoch 3` would be taken for `max_epochs` in silence.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Exit with the reason, without the usage lines that would bury it."""
        if not self.exit_on_error:
            # The trial parse of a nested class, which must raise for the outer parser to see.
            super().error(message, ex)
        self.exit(2, f"error: {explain(str(message))}\n")


class RouterZooCLI(LightningCLI):
    """LightningCLI with run folders, and with its traps closed.

    - A checkpoint's hyper-parameters never override the command: where they differ in what matters, it is refused.
    - `--ckpt_path last` that finds nothing is an error, and a resumed run says from which step.
    - A value for something that the data decides is refused unless it is the data's.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.run_dir: Path | None = None
        self._given_links: dict[str, Any] = {}
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=None,
            parser_class=Parser,
            trainer_defaults={"num_sanity_val_steps": -1, "log_every_n_steps": 10, "enable_model_summary": False},
            args=list(args),
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments alone."""
        # Lightning warns of arguments beside those of the process, even where they are the same. The process's must be
        # back before training: other ranks are started with them.
        argv, sys.argv = sys.argv, sys.argv[:1]
        try:
            super().parse_arguments(parser, args)
        finally:
            sys.argv = argv

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what concerns the run, and let the data decide the model's sizes."""
        parser.add_argument(
            "--run_dir", type=str, default=None, help="Folder of the run (default: runs/<data>-<router>/<next number>)."
        )
        parser.add_argument(
            "--checkpoint_every", type=int, default=500, help="Steps between two checkpoints called last."
        )
        for name in LINKED:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # Lightning's table of results would list every routing metric; `RunReport` shows the task's.
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand in ("validate", "test"):
            kwargs["verbose"] = False
        if subcommand == "predict":
            kwargs["return_predictions"] = False
        return kwargs

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the checkpoint's hyper-parameters override the command, router included, in silence
        # (https://github.com/Lightning-AI/pytorch-lightning/pull/21116 and issues since).
        config = self.config[self.config["subcommand"]]
        self._given_links = {name: value for name in LINKED if (value := _init_arg(config, name)) is not None}
        checkpoint = config.get("ckpt_path")
        name = self._run_name(config)
        if checkpoint in ("last", "best"):
            folder = Path(config["run_dir"]) if config["run_dir"] else runs.latest_run(checkpoint, name)
            path = folder / runs.CHECKPOINTS / f"{checkpoint}.ckpt"
            if not path.is_file() and not is_folder(path):
                raise UserError(f"no checkpoint to continue from: {path} does not exist")
            config["ckpt_path"] = str(path)
        elif checkpoint:
            path = Path(checkpoint)
            if not is_folder(path) and not path.exists():
                raise UserError(f"the checkpoint {path} does not exist")
        if config.get("ckpt_path"):
            self.run_dir = Path(config["run_dir"]) if config["run_dir"] else runs.run_of(Path(config["ckpt_path"]))
            self._check_checkpoint(path, config)
        else:
            self.run_dir = Path(config["run_dir"]) if config["run_dir"] else runs.new_run(name)

    def _run_name(self, config: Any) -> str:
        router = _init_arg(config, "router")
        router_name = str(router["class_path"]).rpartition(".")[2] if router else "LinearRouter"
        if _init_arg(config, "moe_blocks") in ("none", []):
            router_name = "dense"
        data = config.get("data") or {}
        dataset = (data.get("init_args") or {}).get("dataset") or str(data.get("class_path", "run")).rpartition(".")[2]
        names = dataset if isinstance(dataset, list) else [dataset]
        return f"{'+'.join(Path(str(name)).stem for name in names)}-{router_name}"

    def _check_checkpoint(self, path: Path, config: Any) -> None:
        """Refuse a checkpoint of another model than the command describes, and say where a run goes on."""
        saved = read_outline(path)
        asked = config["model"]
        hparams = dict(saved.get("hyper_parameters", {}))
        hparams.pop("_instantiator", None)
        saved_class = str(hparams.pop("_class_path", asked["class_path"]))
        clashes = _differences("", {"class_path": saved_class}, {"class_path": asked["class_path"]})
        if not clashes:
            arguments = _plain(asked.get("init_args") or {})  # a namespace would list nested values, leaf by leaf
            known = {key: value for key, value in arguments.items() if key not in (*FREE, *LINKED)}
            for key, default in (("router", "LinearRouter"), ("experts", "MLPExperts")):
                for chosen in (known, hparams):
                    if key in chosen and chosen[key] is None:
                        chosen[key] = {"class_path": default}
            clashes = _differences("", {key: hparams[key] for key in known if key in hparams}, known)
        if clashes:
            hint = ""
            if any("top_k" in clash for clash in clashes):
                hint = " To evaluate at another k, set model.eval_top_k."
            raise UserError(
                f"{path} is the checkpoint of another model: {'; '.join(clashes)}. "
                f"Leave these options out, or train anew.{hint}"
            )
        if self.config["subcommand"] == "fit":
            step, epoch = saved["global_step"], saved["epoch"]
            limit = config["trainer"]["max_steps"]
            finished = " It had reached trainer.max_steps: raise that to train on." if 0 <= limit <= step else ""
            Console(soft_wrap=True, highlight=False).print(f"resuming {path} at step {step}, epoch {epoch}.{finished}")

    def instantiate_classes(self) -> None:
        """Instantiate, then refuse values that the data decides otherwise."""
        try:
            super().instantiate_classes()
        except (ValueError, MisconfigurationException) as error:
            # A value that a class refuses when it is built; its message says which and why.
            raise UserError(explain(str(error))) from error
        for name, given in self._given_links.items():
            decided = getattr(self.datamodule, name, None)
            if decided is not None and decided != given:
                raise UserError(
                    f"model.{name} is {given!r}, but the data decides it: {type(self.datamodule).__name__} has "
                    f"{decided!r}. Leave it out"
                )
        _quiet_needless_warnings(self.datamodule)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the run's folder, loggers and callbacks."""
        config = self.config_init[self.subcommand] if self.subcommand else self.config_init
        folder = self.run_dir
        assert folder is not None  # `_parse_ckpt_path` chose one
        fitting = self.subcommand == "fit"
        given: Any = config["trainer"]
        if given["strategy"] == "sharded":
            import routerzoo.distributed.strategy  # noqa: F401  (registers the name; takes a second)
        if given["logger"] in (None, True):
            kwargs["logger"] = [
                AppendingCSVLogger(folder, name="", version="logs"),
                TensorBoardLogger(folder, name="", version="logs", default_hp_metric=False),
            ]
        if given["default_root_dir"] is None:
            kwargs["default_root_dir"] = str(folder)
        plugins = given["plugins"] if isinstance(given["plugins"], list) else [given["plugins"]]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*(plugin for plugin in plugins if plugin is not None), WholeCheckpoints()]
        callbacks = list(given["callbacks"] or [])
        kinds = tuple(type(callback) for callback in callbacks)
        added: list[Callback] = []
        if not issubclass(RoutingMonitor, kinds):
            added.append(RoutingMonitor())
        if not issubclass(PredictionWriter, kinds):
            added.append(PredictionWriter(str(folder)))
        if fitting and not issubclass(StopOnNonFiniteLoss, kinds):
            added.append(StopOnNonFiniteLoss())
        if not issubclass(RoutingPictures, kinds):
            added.append(RoutingPictures())
        if PROGRESS_VARIABLE in os.environ:
            added.append(ProgressFile(os.environ[PROGRESS_VARIABLE]))
        if not given["fast_dev_run"]:
            # Evaluation has no use for them, but a checkpoint's callbacks are expected whenever it is read.
            if given["enable_checkpointing"] in (None, True):
                added += self._checkpoints(folder, config["checkpoint_every"])
            if fitting:
                added.append(_RunFolder(folder, self._config_text()))
            if fitting and given["logger"] is not False:
                added.append(LearningRateMonitor("step"))
        trainer = super().instantiate_trainer(**{**kwargs, "callbacks": [*callbacks, *added]})
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RoutingMonitor):
                callback.folder = folder
        if not issubclass(RunReport, kinds):
            # Behind the progress bar, which Lightning puts last: the report comes when the bar has gone.
            trainer.callbacks.append(RunReport(str(folder)))  # type: ignore[attr-defined]
        return trainer

    def _checkpoints(self, folder: Path, every_n_steps: int) -> list[Callback]:
        checkpoints = str(folder / runs.CHECKPOINTS)
        saved: list[Callback] = [RunCheckpoint(checkpoints, "last", every_n_train_steps=every_n_steps)]
        if isinstance(self.model, MoETask):
            name = self.model.headline_metric
            mode = "max" if self.model.headline_higher_is_better else "min"
            saved.append(RunCheckpoint(checkpoints, "best", monitor=f"val/{name}", mode=mode))
        return saved

    def _config_text(self) -> str:
        config = self.config[self.subcommand].clone() if self.subcommand else self.config.clone()
        # A run of the same config is a run of its own.
        config["ckpt_path"] = config["run_dir"] = None
        parser = self.parser if self.subcommand is None else self._parser(self.subcommand)
        return str(parser.dump(config, skip_link_targets=True, skip_check=True))


class _RunFolder(Callback):
    """Writes the config when training starts, and keeps the log of a resumed run free of steps that come again."""

    def __init__(self, folder: Path, config: str) -> None:
        self.folder, self.config = folder, config

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(self.folder / runs.CONFIG, self.config)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > 0:
            for logger in trainer.loggers:
                if isinstance(logger, AppendingCSVLogger):
                    logger.forget_after(trainer.global_step)


def _init_arg(config: Any, name: str) -> Any:
    return ((config.get("model") or {}).get("init_args") or {}).get(name)


def _differences(prefix: str, saved: Any, asked: Any) -> list[str]:
    """Describe where two configs differ, key by key."""
    saved, asked = _plain(saved), _plain(asked)
    if isinstance(saved, dict) and isinstance(asked, dict):
        if saved.get("class_path", "") != asked.get("class_path", ""):
            return [
                f"it has {prefix or 'model '}{saved.get('class_path')}, the command asks for {asked.get('class_path')}"
            ]
        found = []
        for key in sorted(saved.keys() & asked.keys()):
            found += _differences(f"{prefix}{key} " if key != "init_args" else prefix, saved[key], asked[key])
        return found
    if saved == asked:
        return []
    return [f"it has {prefix}{_named(saved)}, the command asks for {_named(asked)}"]


def _named(value: Any) -> str:
    return str(value["class_path"]) if isinstance(value, dict) and "class_path" in value else repr(value)


def _plain(value: Any) -> Any:
    """Turn what names a class, or a function that builds one, into a dict with the class's name alone.

    A class may have several paths.
    """
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, functools.partial):  # in a checkpoint that was made in Python
        value = {"class_path": value.func.__name__, "init_args": value.keywords}
    elif isinstance(value, type):
        value = {"class_path": value.__name__}
    if isinstance(value, dict):
        return {k: str(v).rpartition(".")[2] if k == "class_path" else v for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _quiet_needless_warnings(datamodule: Any) -> None:
    """Silence what Lightning says of its own code, or against the facts; nothing else."""
    # Lightning's own use of torch (https://github.com/Lightning-AI/pytorch-lightning/issues/21326).
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
    # It is not sharded: tasks refuse to average what is.
    warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback with a model")
    # The saved config of a run that was averaged names the callback, which an evaluation of its checkpoint needs not.
    warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback, but (load|sav)ing")
    # Ours returns keys and values that are views, and changes nothing in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    published = getattr(datamodule, "published", None)
    if isinstance(datamodule, routerzoo.data.TextData) or published is not None:
        # These samples are slices of memory; processes to load them would cost more than they bring.
        warnings.filterwarnings("ignore", message=r"The '\w+_dataloader' does not have many workers")


def _no_advertisements(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("💡 Tip")


def _with_saved_config(args: list[str]) -> list[str]:
    """Use the config of the checkpoint's run where the command gives neither config nor model."""
    given = [arg.partition("=")[0] for arg in args]
    if not args or {"--config", "-c", "--model", "--help", "-h", "--print_config"} & set(given):
        return args
    places = [place for place, name in enumerate(given) if name == "--ckpt_path"]
    if not places:
        return args
    place = places[-1]
    value = args[place].partition("=")[2] if "=" in args[place] else (args[place + 1] if place + 1 < len(args) else "")
    if value in ("last", "best"):
        folders = [arg.partition("=")[2] or args[i + 1] for i, arg in enumerate(args[:-1]) if given[i] == "--run_dir"]
        folder = Path(folders[-1]) if folders else runs.latest_run(value)
        args = [*args, "--ckpt_path", str(folder / runs.CHECKPOINTS / f"{value}.ckpt")]
    else:
        folder = runs.run_of(Path(value))
    config = folder / runs.CONFIG
    if not config.is_file():
        raise UserError(f"no config for the checkpoint: {config} does not exist; give --config")
    return [args[0], "--config", str(config), *args[1:]]


def main(args: Sequence[str] | None = None, cli: Callable[[list[str]], object] = RouterZooCLI) -> None:
    """Run a command.

    Args:
        args: the command and its options; by default the process's.
        cli: parses them and runs the command.
    """
    class_paths.load_plugins()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisements)
    # Lightning 2.6 calls what jsonargparse 5 will remove, hence the upper bound of its version.
    warnings.filterwarnings("ignore", message=r"(?s).*(JsonargparseDeprecationWarning|removed in v5)")
    given = list(sys.argv[1:] if args is None else args)
    options = [arg for arg in given if arg != TRUST]
    trust = options != given or os.environ.get(TRUST_VARIABLE, "0") != "0"
    with in_a_sentence(), class_paths.known_classes_only(class_paths.packages_named(options), trust=trust):
        try:
            cli(_with_saved_config(options))
        except SIGTERMException:
            print("stopped by SIGTERM; the same command with --ckpt_path last goes on", file=sys.stderr)
            sys.exit(TERMINATED)
        except MisconfigurationException as error:
            raise UserError(str(error)) from None
