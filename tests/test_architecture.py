"""Imports go one way through eight layers, and each layer knows only what it should."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_nettrim"
LAYERS = ["runtime", "core", "solvers", "layers", "calibration", "pruning", "compaction", "export", "callbacks", "cli"]
KNOWS_NOTHING_OF = {"layers": "solvers", "calibration": "solvers"}
ABOVE_ALL = {"__init__", "__main__", "pytorch_lightning", "testing"}
OPTIONAL = {
    "cli/__init__.py: lightning_nettrim.cli.lightning_cli",
    "pruning/units/latency.py: torch.utils.benchmark",  # its import logs a message
    "pruning/units/graph.py: torch_pruning",
}
MODULES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
FILES = {
    f"lightning_nettrim.{name}".removesuffix(".py").replace("/", ".").removesuffix(".__init__"): name
    for name in MODULES
}


def imports(path, top_level_only=False):
    """Names of imported modules; those under ``if TYPE_CHECKING`` are excluded."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {id(node) for test in tree.body if isinstance(test, ast.If) for node in ast.walk(test)}
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in guarded:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and id(node) not in guarded:
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & set(FILES) or {str(node.module)}


@pytest.mark.parametrize("name", MODULES)
def test_a_layer_imports_only_from_those_before_it(name):
    layer = name.split("/")[0].removesuffix(".py")
    if layer in ABOVE_ALL:
        return
    for target in imports(MODULES[name]):
        package, _, rest = target.partition(".")
        if package == "lightning_nettrim":
            other = rest.split(".")[0]
            assert LAYERS.index(other) <= LAYERS.index(layer), f"{name} imports {target}"
            assert other != KNOWS_NOTHING_OF.get(layer), f"{name} imports {target}"
        if package in ("lightning", "pytorch_lightning"):
            assert layer in ("callbacks", "cli"), f"{name} imports {target}"


def test_modules_import_each_other_in_no_cycle():
    graph = {name: {FILES[t] for t in imports(path) if t in FILES} for name, path in MODULES.items()}
    while leaves := {name for name, targets in graph.items() if not targets & set(graph)}:
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    assert not graph


@pytest.mark.parametrize("name", MODULES)
def test_only_optional_packages_are_imported_inside_functions(name):
    inside = set(imports(MODULES[name])) - set(imports(MODULES[name], top_level_only=True))
    assert {f"{name}: {target}" for target in inside} <= OPTIONAL


def test_the_core_needs_only_declared_packages():
    found = {target.split(".")[0] for path in MODULES.values() for target in imports(path)}
    found -= {"pytorch_lightning", "jsonargparse", "torch_pruning"}  # of the extras
    assert found - set(sys.stdlib_module_names) == {
        "torch",
        "lightning",
        "lightning_nettrim",
        "yaml",
        "tqdm",
        "safetensors",
    }
