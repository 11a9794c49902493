"""Imports run one way, from the command line down to pure functions; imports inside functions count too."""

import ast
from pathlib import Path

import pytest

import routerzoo

FOLDER = Path(routerzoo.__file__).parent
LAYERS = [
    "errors",
    "distributed",
    "distributed.collectives",
    "functional",
    "routing",
    "router",
    "registry",
    "routers",
    "distributed.expert_parallel",
    "moe",
    "optim",
    "costs",
    "tune_cpu",
    "models",
    "distributed.fsdp",
    "runs.atomic",
    "checkpoints",
    "distributed.strategy",
    "metrics",
    "hf",
    "data",
    "callbacks",
    "tasks",
    "look",
    "audit",
    "runs",
    "cli.arguments",
    "cli.parser_errors",
    "cli.configs",
    "cli.checkpoints",
    "cli.main",
    "sweep",
    "report",
    "bench",
    "testing",
    "cli",
    "__main__",
]
"""From the bottom up. A module belongs to the longest name that it begins with."""
CIRCLE = ("registry", "routers")
"""The decorator's: routers register themselves, and the registry loads those that come with the library."""
ROOT_MODULES = {"routing", "router", "registry", "errors", "optim", "costs", "tune_cpu"}
MODULES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FOLDER.rglob("*.py")
    if path != FOLDER / "__init__.py"
}


def layer_of(module):
    names = [name for name in LAYERS if module == name or module.startswith(f"{name}.")]
    return max(names, key=len) if names else None


def imports(path):
    """Yield the full name of all that a file imports; what only a type checker reads is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (name.value for name in node.args[:1] if isinstance(name, ast.Constant))
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "routerzoo" and node.attr != "__version__":
            yield f"routerzoo.{node.attr}"


def own_imports(path):
    """Yield the modules of this library that a file imports, without the library's name."""
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first != "routerzoo" or not rest:
            continue
        while rest and rest not in MODULES:  # a class or a function of the module
            rest = rest.rpartition(".")[0]
        yield rest


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    mine = layer_of(module)
    assert mine is not None, f"{module} is in no layer: add it to LAYERS"
    for other in own_imports(MODULES[module]):
        assert other, f"{module} imports the package itself, which imports everything"
        theirs = layer_of(other)
        if (mine, theirs) != CIRCLE:
            assert LAYERS.index(theirs) <= LAYERS.index(mine), f"{module} imports {other}, which is above it"


def test_there_is_no_other_circle():
    graph = {module: set(own_imports(path)) - {module} for module, path in MODULES.items()}
    graph["registry"].discard("routers")

    def visit(module, above):
        assert module not in above, f"a circle: {' -> '.join([*above, module])}"
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, [*above, module])
            done.add(module)

    done = set()
    for module in graph:
        visit(module, [])


@pytest.mark.parametrize("layer", LAYERS[: LAYERS.index("models") + 1])
def test_the_library_below_the_tasks_knows_no_lightning(layer):
    for module, path in MODULES.items():
        if layer_of(module) == layer:
            assert not [name for name in imports(path) if name.partition(".")[0] == "lightning"], module


def test_the_layer_knows_no_router_by_name():
    names = set(routerzoo.list_routers())
    found = set()
    for module, path in MODULES.items():
        if layer_of(module) != "moe":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found |= {(module, name) for name in names if name in node.value}
            elif isinstance(node, (ast.Name, ast.Attribute, ast.alias)):
                word = {ast.Name: "id", ast.Attribute: "attr", ast.alias: "name"}[type(node)]
                found |= {(module, name) for name in names if getattr(node, word).endswith(name)}
    # The default, as a string.
    assert found <= {("moe.layer", "LinearRouter")}


def test_seven_modules_lie_at_the_root():
    assert {path.stem for path in FOLDER.glob("*.py")} == ROOT_MODULES | {"__init__", "__main__"}
