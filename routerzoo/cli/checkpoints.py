"""What a checkpoint and the command that uses it have in common."""

from __future__ import annotations

import functools
import glob
import importlib
from pathlib import Path
from typing import Any

from routerzoo.errors import UserError

# The data decides these sizes of the model.
LINKED = ("vocab_size", "metric", "max_length", "num_tasks", "num_classes", "image_size", "patch_size", "in_channels")
# What may differ between a checkpoint and the command that uses it. All else decides what its numbers mean. A class of
# another package adds its own, as a class attribute of the name below.
FREE_ARGUMENTS = "free_arguments"
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


def refuse_another_model(path: Path, saved: dict[str, Any], asked: Any) -> None:
    """Refuse a checkpoint of another model than the command describes.

    Args:
        path: of the checkpoint.
        saved: what it holds.
        asked: the command's `model`.

    Raises:
        UserError: they differ in what matters; it says where.
    """
    hparams = dict(saved.get("hyper_parameters", {}))
    hparams.pop("_instantiator", None)
    saved_class = str(hparams.pop("_class_path", asked["class_path"]))
    module, _, name = str(asked["class_path"]).rpartition(".")
    model_class = getattr(importlib.import_module(module), name)
    clashes = _differences("", {"class_path": saved_class}, {"class_path": asked["class_path"]})
    if not clashes:
        arguments = _plain(asked.get("init_args") or {})  # a namespace would list nested values, leaf by leaf
        free = {*FREE, *LINKED, *getattr(model_class, FREE_ARGUMENTS, ())}
        known = {key: value for key, value in arguments.items() if key not in free}
        for key, default in (("router", "LinearRouter"), ("experts", "MLPExperts")):
            for chosen in (known, hparams):
                if key in chosen and chosen[key] is None:
                    chosen[key] = {"class_path": default}
        clashes = _differences("", {key: hparams[key] for key in known if key in hparams}, known)
    if clashes:
        hint = ""
        if any("top_k" in clash for clash in clashes):
            hint = " To evaluate at another k, set model.eval_top_k."
        elif module.partition(".")[0] != "routerzoo":
            hint = f" What may differ is listed in {name}.{FREE_ARGUMENTS}."
        raise UserError(
            f"{path} is the checkpoint of another model: {'; '.join(clashes)}. "
            f"Leave these options out, or train anew.{hint}"
        )


def init_arg(config: Any, name: str) -> Any:
    """Return an argument of the model that a command describes, None where it has none."""
    return ((config.get("model") or {}).get("init_args") or {}).get(name)


def router_name(config: Any) -> str:
    """Return the router that a command describes, or `dense`."""
    if init_arg(config, "moe_blocks") in ("none", []):
        return "dense"
    router = init_arg(config, "router")
    if isinstance(router, str):
        return router  # keep, of a released model
    return str(router["class_path"]).rpartition(".")[2] if router else "LinearRouter"


def run_name(config: Any) -> str:
    """Return what runs of the data and the router of a command are called."""
    data = config.get("data") or {}
    dataset = (data.get("init_args") or {}).get("dataset") or str(data.get("class_path", "run")).rpartition(".")[2]
    names = dataset if isinstance(dataset, list) else [dataset]
    return f"{'+'.join(_corpus_name(str(name)) for name in names)}-{router_name(config)}"


def _corpus_name(dataset: str) -> str:
    """Return a part of a folder's name: of a pattern of paths, what stands before it."""
    path = Path(dataset)
    while glob.has_magic(str(path)):
        path = path.parent
    return path.stem.replace(":", "-") or "data"


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
