"""The command line: `fit`, `validate`, `test` and `predict` by LightningCLI, for any task, data, router and experts."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock
from jsonargparse.typing import register_type
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.enums import StrEnum
from rich.console import Console

import routerzoo.data
import routerzoo.tasks
from routerzoo.callbacks import RoutingMonitor, StopOnNonFiniteLoss
from routerzoo.checkpoints.single import WholeCheckpoints, expect_checkpoint, read_outline, refuse_incomplete
from routerzoo.cli.arguments import TRUST, TRUST_VARIABLE, option_names
from routerzoo.cli.checkpoints import LINKED, init_arg, refuse_another_model, router_name, run_name
from routerzoo.cli.configs import with_config_files
from routerzoo.cli.parser_errors import explain, explain_bare_help, refused_by_libraries, refused_class
from routerzoo.errors import UserError, in_a_sentence
from routerzoo.moe.experts import Experts
from routerzoo.router import Router
from routerzoo.runs import folder as runs
from routerzoo.runs.atomic import atomic_write, is_writable
from routerzoo.runs.checkpoint import RunCheckpoint, StopSignal
from routerzoo.runs.final_validation import FinalValidation
from routerzoo.runs.loggers import AppendingCSVLogger
from routerzoo.runs.predictions import PredictionWriter
from routerzoo.runs.progress_file import ProgressFile
from routerzoo.runs.report import RunReport
from routerzoo.runs.routing_pictures import RoutingPictures
from routerzoo.tasks import class_paths
from routerzoo.tasks.base import MoETask

# Callbacks have devices, and members of Lightning's enumerations of strings, as defaults, which a config has to name.
register_type(torch.device, fail_already_registered=False)
yaml.SafeDumper.add_multi_representer(StrEnum, lambda dumper, member: dumper.represent_str(member.value))

TRAINER_DEFAULTS = {"num_sanity_val_steps": -1, "log_every_n_steps": 10, "enable_model_summary": False}
PROGRESS_VARIABLE = "ROUTERZOO_PROGRESS_FILE"
"""A run whose environment has this writes how far it is into that file."""


class Parser(LightningArgumentParser):
    """Parser that takes no abbreviated options, and whose errors are one sentence with a way out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # With abbreviations, `--trainer.max_epoch 3` would be taken for `max_epochs` in silence.
        shown = {"prog": "python -m routerzoo", "usage": "%(prog)s [OPTIONS]"}
        super().__init__(*args, **{"allow_abbrev": False, **shown, **kwargs})

    def add_class_arguments(self, class_type: Any, *args: Any, skip: Any = None, **kwargs: Any) -> Any:
        """Add a class's arguments, without those that the layer gives it."""
        built_by_a_layer = isinstance(class_type, type) and issubclass(class_type, (Router, Experts))
        if built_by_a_layer and not any(isinstance(argument, int) for argument in skip or ()):
            skip = {*(skip or ()), "spec"}
        return super().add_class_arguments(class_type, *args, skip=skip, **kwargs)

    def format_help(self, *args: Any) -> Any:
        """Return the help, which starts with one line of usage instead of a line for each option."""
        self.prog = self.prog.replace(" [OPTIONS]", "").replace(" [options]", "")
        for action in self._actions:
            if action.dest == "ckpt_path":  # Lightning's names of checkpoints are others
                action.help = "last or best, of the latest run or of --run_dir, or the path of a checkpoint."
                self.epilog = f"{TRUST} lets configs name classes of any package; no config can set it."
        return super().format_help(*args)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Exit with the reason, without the usage lines that would bury it."""
        if not self.exit_on_error:
            # The trial parse of a nested class, which must raise for the outer parser to see.
            super().error(message, ex)
        self.exit(2, f"error: {explain(str(message), option_names(self))}\n")


class RouterZooCLI(LightningCLI):
    """LightningCLI with run folders, and with its traps closed.

    - A checkpoint's hyper-parameters never override the command: where they differ in what matters, it is refused.
    - `--ckpt_path last` that finds nothing is an error, and a resumed run says from which step.
    - A run has a folder of its own. It is never overwritten, and goes again where nothing was trained.
    - Ctrl-C and SIGTERM leave a checkpoint, and the command that resumes from it.
    - A value for something that the data decides is refused unless it is the data's.
    - A callback that is named again, as the saved config of a resumed run has it already, is there once.

    Args:
        args: the command and its options, as strings or as nested mappings.
        run: run the command. Otherwise `args` are the options of `fit` alone, and `model`, `datamodule` and `trainer`
            are built for the caller to use.
    """

    def __init__(self, args: Sequence[str] | Mapping[str, Any], run: bool = True) -> None:
        self.run_dir: Path | None = None
        self.trainer: Trainer | None = None  # type: ignore[assignment]
        self._run_folder: _RunFolder | None = None
        self._lock: FileLock | None = None
        self._resumed_step: int | None = None
        self._run_name = ""
        self._given_links: dict[str, Any] = {}
        try:
            self._start(dict(args) if isinstance(args, Mapping) else list(args), run)
        except BaseException as error:
            self._end(error)
            raise
        finally:
            if run and self._lock is not None:
                self._lock.release()

    def _start(self, args: list[str] | dict[str, Any], run: bool) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=None,
            parser_class=Parser,
            trainer_defaults=dict(TRAINER_DEFAULTS),
            args=args,
            run=run,
        )

    @property
    def _command(self) -> tuple[str, Any]:
        """The command and its options; those of `fit` where none is to be run."""
        name = self.config.get("subcommand")
        return ("fit", self.config) if name is None else (name, self.config[name])

    def _end(self, error: BaseException) -> None:
        """Leave no folder of a run that has trained nothing, and say how to resume one that was stopped.

        Raises:
            SystemExit: a signal has ended the run.
        """
        ended, folder = self._run_folder, self.run_dir
        if isinstance(error, OSError) and error.filename is None and folder is not None:
            error.filename = str(folder)  # a full disk has no name for what it is full of
        if isinstance(error, KeyboardInterrupt) or (ended is not None and ended.interrupted):
            number = int(signal.SIGINT)
        else:
            number = error.number if isinstance(error, StopSignal) else 0
        sentence = f"stopped by {signal.Signals(number).name}" if number else ""
        if ended is not None and ended.claimed and (self.trainer is None or not self.trainer.global_step):
            runs.discard(ended.folder, ended.is_new)
            removed = f"removed {ended.folder}, where nothing was trained"
            sentence = f"{sentence}; {removed}" if sentence else removed
        elif number and folder is not None and (step := self._saved_step()):
            trust = f" {TRUST}" if class_paths.goes_beyond_known() else ""
            command = f"python -m routerzoo fit --run_dir {shlex.quote(str(folder))} --ckpt_path last{trust}"
            sentence = f"{sentence}; step {step} is saved. Resume with: {command}"
        if sentence and is_first_process():
            print(sentence, file=sys.stderr)
        if number:
            raise SystemExit(128 + number) from None

    def _saved_step(self) -> int:
        """Return the step of the latest checkpoint of the training, 0 if there is none."""
        callbacks = [] if self.trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]
        latest = (c for c in callbacks if isinstance(c, RunCheckpoint) and c.monitor is None)
        resumed = self._resumed_step if self._command[0] == "fit" else None
        return max((callback.saved_step for callback in latest), default=0) or resumed or 0

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
            "--overwrite",
            action="store_true",
            help="Replace the run in --run_dir: fit deletes its config, checkpoints, logs, results and pictures.",
        )
        parser.add_argument(
            "--checkpoint_every",
            type=int,
            default=500,
            help="Steps between two checkpoints called last, beside those after validations and once a minute.",
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

    def _set_seed(self) -> None:
        seed = self._command[1]["seed_everything"]
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything must be between 0 and {2**32 - 1}, got {seed}")
        super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the checkpoint's hyper-parameters override the command, router included, in silence
        # (https://github.com/Lightning-AI/pytorch-lightning/pull/21116 and issues since).
        command, config = self._command
        self._given_links = {name: value for name in LINKED if (value := init_arg(config, name)) is not None}
        self._run_name = run_name(config)
        checkpoint, run_dir = config.get("ckpt_path"), Path(config["run_dir"]) if config["run_dir"] else None
        if not checkpoint:
            self.run_dir = run_dir
            return
        if checkpoint in ("last", "best"):
            run_dir = run_dir or runs.latest_run(checkpoint, self._run_name)
            path = run_dir / runs.CHECKPOINTS / f"{checkpoint}.ckpt"
            if not runs.has_checkpoint(run_dir, checkpoint):
                raise UserError(f"no checkpoint to continue from: {path} does not exist")
            config["ckpt_path"] = str(path)
        else:
            path = Path(checkpoint)
            expect_checkpoint(path)
        fitting = command == "fit"
        if run_dir is None and (not fitting or path.parent.name == runs.CHECKPOINTS):
            run_dir = runs.run_of(path)  # a file that lies elsewhere starts a run of its own
        self.run_dir = run_dir
        saved = read_outline(path)
        refuse_incomplete(path, saved, resumes=fitting)
        refuse_another_model(path, saved, config["model"])
        step = saved["global_step"]
        finished = ""
        if fitting and 0 <= config["trainer"]["max_steps"] <= step:
            finished = " It had reached trainer.max_steps: raise that to train on."
        if run_dir is not None and runs.run_of(path).resolve() == run_dir.resolve():
            self._resumed_step = step
        if is_first_process():
            what = "resuming" if fitting else f"{command} of"
            Console(soft_wrap=True, highlight=False).print(
                f"{what} {path} at step {step}, epoch {saved['epoch']}: {router_name(config)}.{finished}"
            )

    def instantiate_classes(self) -> None:
        """Instantiate, then refuse values that the data decides otherwise."""
        try:
            super().instantiate_classes()
        except (ValueError, MisconfigurationException) as error:
            # A value that a class refuses when it is built; its message says which and why.
            raise UserError(refused_class(error) or explain(str(error))) from error
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
        command, named = self._command
        fitting = command == "fit"
        given: Any = config["trainer"]
        callbacks = last_of_each(given["callbacks"], named["trainer"]["callbacks"])
        refuse_tuners(callbacks)
        if (accumulated := given["accumulate_grad_batches"]) < 1:
            raise UserError(f"trainer.accumulate_grad_batches must be at least 1, got {accumulated}")
        kept = self._run_folder = self._claim_folder(config, dry=bool(given["fast_dev_run"]))
        folder = self.run_dir = kept.folder
        if given["strategy"] == "sharded":
            import routerzoo.distributed.strategy  # noqa: F401  (registers the name; takes a second)
        barebones = bool(given["barebones"])
        if barebones:  # Lightning refuses whatever is not None
            kwargs |= {name: None for name, default in TRAINER_DEFAULTS.items() if given[name] == default}
        elif given["logger"] in (None, True):
            kwargs["logger"] = [
                AppendingCSVLogger(folder, name="", version="logs"),
                # What a resumed run logs again replaces what it had logged.
                TensorBoardLogger(
                    folder, name="", version="logs", default_hp_metric=False, purge_step=self._resumed_step
                ),
            ]
        if given["default_root_dir"] is None:
            kwargs["default_root_dir"] = str(folder)
        plugins = given["plugins"] if isinstance(given["plugins"], list) else [given["plugins"]]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*(plugin for plugin in plugins if plugin is not None), WholeCheckpoints()]
        kinds = tuple(type(callback) for callback in callbacks)
        added: list[Callback] = [kept]
        if not issubclass(RoutingMonitor, kinds):
            added.append(RoutingMonitor())
        if not issubclass(PredictionWriter, kinds):
            added.append(PredictionWriter(str(folder)))
        if fitting and not issubclass(StopOnNonFiniteLoss, kinds):
            added.append(StopOnNonFiniteLoss())
        if fitting and not given["fast_dev_run"]:
            added.append(FinalValidation())
        if not issubclass(RoutingPictures, kinds):
            added.append(RoutingPictures())
        if PROGRESS_VARIABLE in os.environ:
            added.append(ProgressFile(os.environ[PROGRESS_VARIABLE]))
        if not given["fast_dev_run"]:
            # Evaluation has no use for them, but a checkpoint's callbacks are expected whenever it is read.
            if given["enable_checkpointing"] in (None, True) and not barebones:
                added += self._checkpoints(folder, config["checkpoint_every"])
            constant = isinstance(self.model, MoETask) and self.model.lr_scheduler is None
            if fitting and given["logger"] is not False and not barebones and not constant:
                added.append(LearningRateMonitor("step"))
        trainer = super().instantiate_trainer(**{**kwargs, "callbacks": [*callbacks, *added]})
        if not issubclass(RunReport, kinds):
            # Behind the progress bar, which Lightning puts last: the report comes when the bar has gone.
            trainer.callbacks.append(RunReport(str(folder)))  # type: ignore[attr-defined]
        return trainer

    def _claim_folder(self, config: Any, dry: bool) -> _RunFolder:
        """Create the folder of a new run, or take that of the run that is resumed or evaluated."""
        text, fitting = self._config_text(), self._command[0] == "fit"
        if dry or not is_first_process():
            # Nothing is written there, or else the first process says where.
            return _RunFolder(self.run_dir or runs.DEFAULT_ROOT / self._run_name, text)
        if fitting and self.run_dir is not None and self.run_dir.is_dir():
            self._lock = runs.lock(self.run_dir)
        if self.run_dir is not None and self._resumed_step is not None:
            if fitting or is_writable(self.run_dir):
                return _RunFolder(self.run_dir, text, writes=fitting)
            folder, is_new = runs.claim(None, self._run_name)
            print(f"{self.run_dir} cannot be written to: what this command writes goes to {folder}")
            return _RunFolder(folder, text, claimed=True, is_new=is_new)
        if not fitting and self.run_dir is not None and self.run_dir.is_dir():
            if any((self.run_dir / name).exists() for name in (runs.CONFIG, runs.CHECKPOINTS)):
                raise UserError(
                    f"{self.run_dir} holds a run, which the command does not evaluate: evaluate it with --ckpt_path "
                    "best, or choose another --run_dir"
                )
            return _RunFolder(self.run_dir, text)  # of other evaluations
        if fitting and config["overwrite"] and self.run_dir is not None:
            runs.clear(self.run_dir)
        folder, is_new = runs.claim(self.run_dir, self._run_name)
        kept = self._run_folder = _RunFolder(folder, text, claimed=True, is_new=is_new)
        if fitting:
            self._lock = self._lock or runs.lock(folder)
            runs.write_config(folder, text)
        return kept

    def _checkpoints(self, folder: Path, every_n_steps: int) -> list[Callback]:
        checkpoints = str(folder / runs.CHECKPOINTS)
        saved: list[Callback] = [RunCheckpoint(checkpoints, "last", every_n_train_steps=every_n_steps)]
        if isinstance(self.model, MoETask):
            name = self.model.headline_metric
            mode = "max" if self.model.headline_higher_is_better else "min"
            saved.append(RunCheckpoint(checkpoints, "best", monitor=f"val/{name}", mode=mode))
        return saved

    def _config_text(self) -> str:
        config = self._command[1].clone()
        # A run of the same config is a run of its own.
        config["run_dir"], config["overwrite"] = None, False
        if "ckpt_path" in config:
            config["ckpt_path"] = None
        parser = self.parser if self.subcommand is None else self._parser(self.subcommand)
        return str(parser.dump(config, skip_link_targets=True, skip_check=True, skip_none=False))


class _RunFolder(Callback):
    """The folder of a run, on all processes, and its config and log where the run is resumed.

    Args:
        folder: of the run, as the first process has it; the others learn it.
        config: of the run.
        claimed: it is a new run's.
        is_new: the folder did not exist before.
        writes: the config replaces that of the run.
    """

    def __init__(
        self, folder: Path, config: str, *, claimed: bool = False, is_new: bool = False, writes: bool = False
    ) -> None:
        self.folder, self.config = folder, config
        self.claimed, self.is_new, self.writes = claimed, is_new, writes
        self.interrupted = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder = trainer.strategy.broadcast(self.folder)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, (RoutingMonitor, PredictionWriter, RunReport)):
                callback.folder = self.folder

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.writes:  # not before: the resume may be refused
            atomic_write(self.folder / runs.CONFIG, self.config)
        if trainer.global_step > 0:
            for logger in trainer.loggers:
                if isinstance(logger, AppendingCSVLogger):
                    logger.forget_after(trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning exits with 1 where it is interrupted.
        self.interrupted = isinstance(exception, KeyboardInterrupt)


def last_of_each(callbacks: Any, named: Any) -> list[Callback]:
    """Return the callbacks; of those that are the same, or have the same state, the last.

    Args:
        callbacks: one, several, or none.
        named: the options that they were built from, likewise.
    """
    built, options = (value if isinstance(value, list) else [value] for value in (callbacks, named))
    kept: dict[str, Callback] = {}
    for callback, option in zip(built, options, strict=True):
        if callback is None:
            continue
        key = callback.state_key if is_overridden("state_dict", callback) else str(option)
        if key in kept:
            print(f"{type(callback).__name__} is named twice: the last one counts")
        kept[key] = callback
    return list(kept.values())


def refuse_tuners(callbacks: Sequence[Callback]) -> None:
    """Refuse callbacks that change a size or a rate behind the config's back.

    Raises:
        UserError: there is one.
    """
    for callback in callbacks:
        if isinstance(callback, BatchSizeFinder):
            raise UserError(
                "BatchSizeFinder trains with another batch size than the run's config says: leave it out, and set "
                "data.batch_size; python -m routerzoo plan tells what a batch needs"
            )
        if isinstance(callback, LearningRateFinder):
            raise UserError(
                "LearningRateFinder finds no learning rate here, which is the optimizer's: leave it out, and compare "
                "values of model.optimizer.init_args.lr in a sweep"
            )


def is_first_process() -> bool:
    """Whether this is the first process of the run, or the only one, before processes know each other."""
    return getattr(rank_zero_only, "rank", 0) == 0 and os.environ.get("NODE_RANK", "0") == "0"


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
    if isinstance(datamodule, (routerzoo.data.TextData, routerzoo.data.ImageData, routerzoo.data.LabelledText)):
        # Theirs repeat no sample, see `EvenBatches`.
        warnings.filterwarnings("ignore", message="Using `DistributedSampler` with the dataloaders")
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
    if not value:
        return args
    if value in ("last", "best"):
        folders = [arg.partition("=")[2] or args[i + 1] for i, arg in enumerate(args[:-1]) if given[i] == "--run_dir"]
        folder = Path(folders[-1]) if folders else runs.latest_run(value)
        args = [*args, "--ckpt_path", str(folder / runs.CHECKPOINTS / f"{value}.ckpt")]
    else:
        expect_checkpoint(Path(value))
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
            explain_bare_help(options)
            cli(with_config_files(_with_saved_config(options)))
        except KeyboardInterrupt:
            raise SystemExit(128 + signal.SIGINT) from None
        except Exception as error:
            if isinstance(error, (UserError, OSError)) or (told := refused_by_libraries(error)) is None:
                raise
            raise UserError(told) from None
