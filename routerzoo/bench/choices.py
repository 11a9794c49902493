"""`RouterChoice`: a router as the benchmark is told it, by name or class path, with arguments."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from routerzoo.bench.controls import CONTROLS
from routerzoo.errors import UserError
from routerzoo.registry import UnknownRouterError, did_you_mean, list_routers, router_arguments, router_class
from routerzoo.router import LossWeight, Router
from routerzoo.routing import LayerSpec

KEYS = ("class_path", "init_args", "label", "loss_weights")


@dataclass(frozen=True)
class RouterChoice:
    """A router of the benchmark.

    Args:
        class_path: name of a router or a control, or the path of a class.
        init_args: its arguments beside the spec; the task's k is added where it takes one.
        label: what tables call it; by default the class's name.
        loss_weights: coefficients of auxiliary losses by name; by default those that its source publishes.
    """

    class_path: str
    init_args: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    loss_weights: Mapping[str, float | LossWeight] | None = None

    def __post_init__(self) -> None:
        if not self.label:
            object.__setattr__(self, "label", self.class_path.rpartition(".")[2])

    @property
    def cls(self) -> type[Router]:
        """The class.

        Raises:
            UserError: there is none, or it is no router.
        """
        if self.class_path in CONTROLS:
            return CONTROLS[self.class_path]
        module_name, _, name = self.class_path.rpartition(".")
        if name == "py":
            raise UserError(
                f"{self.class_path} is a file, but a router is named by its class: "
                f"{Path(self.class_path).stem}.MyRouter, from the file's folder or with that on PYTHONPATH"
            )
        if not module_name:
            try:
                return router_class(name)
            except UnknownRouterError as error:
                raise UserError(str(error)) from None
        try:
            cls = getattr(importlib.import_module(module_name), name)
        except Exception as error:  # a module that the user names may fail in any way
            raise UserError(f"cannot import {self.class_path}: {type(error).__name__}: {error}") from error
        if not (inspect.isclass(cls) and issubclass(cls, Router)):
            raise UserError(f"{self.class_path} is no subclass of routerzoo.Router")
        return cls

    def arguments(self, top_k: int) -> dict[str, Any]:
        """Return the arguments that the router is built with in a task of this k."""
        given = dict(self.init_args)
        if "top_k" in router_arguments(self.cls):
            given.setdefault("top_k", top_k)
        return given

    def build(self, spec: LayerSpec, top_k: int) -> Router:
        """Build the router."""
        return self.cls(spec, **self.arguments(top_k))

    def declared_k(self, top_k: int) -> int | None:
        """Return the k that it routes with; None where it takes none and chooses by itself."""
        return self.arguments(top_k).get("top_k")

    def text(self) -> str:
        """Return what tells it from other routers of its label."""
        told = [self.class_path, dict(self.init_args)]
        return json.dumps(
            told if self.loss_weights is None else [*told, dict(self.loss_weights)], sort_keys=True, default=str
        )


def read_choice(text: str) -> RouterChoice:
    """Read a router from the command line: a name, a class path, or `{class_path: ..., init_args: ..., label: ...}`.

    Raises:
        UserError: it is none of these, has arguments that the router does not take, or there is no such router.
    """
    content: Any = text
    if text.lstrip().startswith("{"):
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"cannot read the router {text!r}: {' '.join(str(error).split())}") from None
    if isinstance(content, str):
        choice = RouterChoice(content)
    else:
        if unknown := [key for key in content if key not in KEYS]:
            raise UserError(f"a router has no {unknown[0]!r}; it has {', '.join(KEYS)}")
        given, weights = content.get("init_args") or {}, content.get("loss_weights")
        if not (isinstance(content.get("class_path"), str) and isinstance(given, dict) and _are_weights(weights)):
            raise UserError(f"a router has a class_path, init_args by name and loss_weights by name, got {text!r}")
        choice = RouterChoice(content["class_path"], given, str(content.get("label") or ""), weights)
    known = router_arguments(choice.cls)
    for key in choice.init_args:
        if key not in known:
            raise UserError(
                f"{choice.class_path} has no argument {key!r}{did_you_mean(key, known)} It takes: {', '.join(known)}."
            )
    return choice


def _are_weights(weights: Any) -> bool:
    return weights is None or (isinstance(weights, dict) and all(isinstance(w, int | float) for w in weights.values()))


def read_choices(texts: list[str]) -> list[RouterChoice]:
    """Read routers; `all` stands for every registered one.

    Raises:
        UserError: one cannot be read, or two have the same label.
    """
    choices: list[RouterChoice] = []
    for text in texts:
        choices += [RouterChoice(name) for name in list_routers()] if text == "all" else [read_choice(text)]
    labels = [choice.label for choice in choices]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise UserError(f"two routers are called {twice[0]!r}: give one a label, {{class_path: ..., label: ...}}")
    if reserved := sorted(set(labels) & CONTROLS.keys()):
        raise UserError(f"{reserved[0]!r} is a control, which every task has: leave it out")
    return choices
