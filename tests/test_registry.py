import subprocess
import sys
import textwrap
import threading
from importlib.metadata import EntryPoint

import pytest

import routerzoo
from routerzoo import LayerSpec, Router, registry

SIX = ["HashRouter", "HyperRouter", "LinearRouter", "RandomFrozenRouter", "StableMoERouter", "XMoERouter"]


def test_the_six_are_known():
    assert set(SIX) <= set(routerzoo.list_routers())


def test_create_router_takes_a_spec_or_sizes():
    assert routerzoo.create_router("LinearRouter", d_model=8, num_experts=4, top_k=3).top_k == 3
    assert routerzoo.create_router("LinearRouter", LayerSpec(8, 4)).spec.d_model == 8
    with pytest.raises(TypeError, match="needs num_experts, or a LayerSpec"):
        routerzoo.create_router("LinearRouter", d_model=8)


def test_an_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(KeyError, match=r"router 'HyperRoute'; did you mean 'HyperRouter'\? Known routers: .*XMoE"):
        routerzoo.create_router("HyperRoute", d_model=8, num_experts=4)


def test_an_unknown_argument_lists_the_known_and_the_nearest():
    with pytest.raises(TypeError, match="no argument 'topk'; did you mean 'top_k'\\? It takes: top_k, hidden_dim"):
        routerzoo.create_router("HyperRouter", d_model=8, num_experts=4, topk=2)


def test_registering_refuses_what_is_no_concrete_router(monkeypatch):
    monkeypatch.setattr(registry._registry, "routers", dict(registry._registry.routers))
    with pytest.raises(TypeError, match=r"is not a subclass of routerzoo\.Router"):
        routerzoo.register_router(int)
    with pytest.raises(TypeError, match="Router is abstract: it does not implement route"):
        routerzoo.register_router(Router)
    with pytest.raises(ValueError, match=r"a router called LinearRouter exists already: routerzoo\.routers\.linear"):
        routerzoo.register_router(type("LinearRouter", (Router,), {"route": lambda self, x, context: None}))


def test_an_unregistered_class_does_not_take_a_name_in_configs():
    class LinearRouter(Router):
        def route(self, x_TD, context):
            raise NotImplementedError

    # jsonargparse finds the classes that a short name may mean so.
    assert LinearRouter not in Router.__subclasses__()
    assert routerzoo.LinearRouter in routerzoo.LogitRouter.__subclasses__()


def test_a_router_cannot_require_what_no_context_has():
    with pytest.raises(TypeError, match="requires names colour"):
        type("Colourful", (Router,), {"requires": frozenset({"colour"})})


PLUGIN = """
from routerzoo import LinearRouter, Router, Routing, LayerSpec
from routerzoo.functional.topk import topk_softmax
import torch
from torch import nn

class TinyRouter(Router):
    \"\"\"A plugin's router.

    Args:
        spec: sizes of the layer.
        top_k: experts per token.
        scale: scale of the gate.
    \"\"\"
    paper = "Nobody 2026"

    def __init__(self, spec: LayerSpec, *, top_k: int = 2, scale: float = 1.0) -> None:
        super().__init__(spec, top_k=top_k)
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * scale)

    def route(self, x_TD, context):
        logits_TE = x_TD @ self.weight.T
        weights_TK, experts_TK = topk_softmax(logits_TE, self.top_k)
        return Routing(experts_TK, weights_TK, logits_TE)

class Another(TinyRouter):
    pass

not_a_router = 3
"""


def install(folder, name, module, points):
    """Lay a package out as an installer would."""
    (folder / f"{module}.py").write_text(PLUGIN)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "\n".join(f"{key} = {value}" for key, value in points.items())
    (info / "entry_points.txt").write_text(f"[routerzoo.routers]\n{lines}\n")


@pytest.fixture
def plugins(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    install(folder, "tiny-plugin", "tiny_plugin", {"TinyRouter": "tiny_plugin:TinyRouter"})
    install(
        folder,
        "broken-plugin",
        "broken_plugin",
        {
            "Missing": "broken_plugin_that_is_missing:Missing",
            "NotARouter": "broken_plugin:not_a_router",
            "HashRouter": "broken_plugin:TinyRouter",
            "Misnamed": "broken_plugin:Another",
        },
    )
    return folder


def python(code, plugins, *args):
    code = f"import sys; sys.path.insert(0, {str(plugins)!r})\n" + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=300, check=False)


def test_installed_plugins_are_found_and_broken_ones_reported(plugins):
    done = python("from routerzoo.__main__ import main; main(['routers'])", plugins)
    assert done.returncode == 0, done.stderr
    assert "TinyRouter" in done.stdout
    assert "tiny-plugin" in done.stdout
    assert "Nobody 2026" in done.stdout
    for name in SIX:
        assert name in done.stdout
    assert "Missing of package broken-plugin: cannot be imported (ModuleNotFoundError" in done.stdout
    assert "NotARouter of package broken-plugin: 3 is not a subclass of routerzoo.Router" in done.stdout
    assert "HashRouter of package broken-plugin: the name HashRouter exists already, from routerzoo" in done.stdout
    assert "Misnamed of package broken-plugin: the entry point gives a class called Another" in done.stdout
    assert done.stderr.count("routerzoo ignores the plugin") == 4


@pytest.mark.full
def test_a_package_may_have_several_routers_in_submodules(plugins):
    package = plugins / "pair_plugin"
    package.mkdir()
    for name in ("One", "Two"):
        source = PLUGIN.replace("import LinearRouter", "import register_router").replace("LinearRouter, ", "")
        source = source.replace("class TinyRouter", f"@register_router\nclass {name}Router").partition("class Another")[
            0
        ]
        (package / f"{name.lower()}.py").write_text(source)
    (package / "__init__.py").write_text("from .one import OneRouter\nfrom .two import TwoRouter\n")
    install(plugins, "pair", "pair_files", {"OneRouter": "pair_plugin:OneRouter", "TwoRouter": "pair_plugin:TwoRouter"})
    code = "import warnings; warnings.simplefilter('ignore'); from routerzoo import registry as r; r.list_routers(); "
    code += "print([r.router_package(n) for n in ('OneRouter', 'TwoRouter')], len(r.broken_plugins()))"
    for imported_before in ("", "import pair_plugin; "):
        done = python(imported_before + code, plugins)
        assert done.stdout == "['pair', 'pair'] 4\n", done.stderr


@pytest.mark.full
def test_a_plugin_trains_from_the_command_line_and_in_yaml(plugins, tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(
        """
        model:
          class_path: LanguageModeling
          init_args:
            d_model: 16
            num_blocks: 1
            num_heads: 2
            num_experts: 4
            router: {class_path: TinyRouter, init_args: {scale: 0.5}}
        data: {class_path: TextData, init_args: {sequence_length: 16, batch_size: 2}}
        trainer: {accelerator: cpu, max_steps: 1, limit_val_batches: 1, enable_progress_bar: false}
        """
    )
    code = "from routerzoo.__main__ import main; main(sys.argv[1:])"
    done = python(code, plugins, "fit", "--config", str(config), "--model.router.top_k", "3")
    assert done.returncode == 0, done.stderr
    assert "TinyRouter · 1 MoE layers of 4 MLPExperts, top 3" in done.stdout


@pytest.mark.full
def test_plugins_can_be_left_out(plugins, monkeypatch):
    monkeypatch.setenv("ROUTERZOO_DISABLE_PLUGINS", "1")
    done = python("import routerzoo; print(routerzoo.list_routers())", plugins)
    assert "TinyRouter" not in done.stdout
    assert not done.stderr


def test_importing_routerzoo_does_not_import_lightning():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, routerzoo; print('lightning' in sys.modules, 'timm' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "False"]


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """Return a function that loads one plugin of the given source, beside the built-in routers."""

    def load(source):
        (tmp_path / "odd_plugin.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        fresh = registry._Registry()
        fresh.routers, fresh.builtin_loaded = dict(registry._registry.routers), True
        monkeypatch.setattr(registry, "_registry", fresh)
        point = EntryPoint("OddRouter", "odd_plugin:OddRouter", registry.ENTRY_POINT_GROUP)
        monkeypatch.setattr(registry, "entry_points", lambda group: [point])
        try:
            registry.load_plugins()
        finally:
            sys.modules.pop("odd_plugin", None)
        return [str(plugin) for plugin in registry.broken_plugins()]

    return load


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
        ("raise BaseException('no')", "BaseException: no"),
        ("def f():\n    f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("OddRouter = None", "None is not a subclass of routerzoo.Router"),
    ],
)
def test_no_plugin_ends_the_command(alone, source, reason):
    with pytest.warns(UserWarning, match="routerzoo ignores the plugin OddRouter of package odd_plugin: "):
        (broken,) = alone(source)
    assert reason in broken
    assert set(SIX) <= set(routerzoo.list_routers())


def test_ctrl_c_ends_the_command_even_while_a_plugin_is_imported(alone):
    with pytest.raises(KeyboardInterrupt):
        alone("raise KeyboardInterrupt")


def test_a_plugin_that_keeps_the_command_waiting_is_named(alone, monkeypatch, capsys):
    monkeypatch.setattr(registry, "SLOW_SECONDS", 0.05)
    source = PLUGIN.partition("class Another")[0].replace("TinyRouter", "OddRouter")
    threads = threading.active_count()
    assert alone("import time\ntime.sleep(0.3)\n" + source) == []
    assert "still importing the plugin OddRouter of package odd_plugin after 0.05 s" in capsys.readouterr().err
    assert threading.active_count() == threads  # a sweep forks next
    assert "OddRouter" in routerzoo.list_routers()
