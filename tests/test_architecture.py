"""The house: imports go one way, and only the top floors know Lightning."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_nettrim"
FLOORS = [
    {"digest"},
    {"pattern", "sums", "rectifier", "ranks"},
    {"problem"},
    {"prox"},
    {"solvers"},
    {"mask", "allocate"},
    {"layers", "shelf", "journal", "structure"},
    {"memory", "replay", "padding", "usage"},
    {"sample", "flow"},
    {"capture", "fold", "norms"},
    {"report"},
    {"plan", "tolerance"},
    {"signals", "pose", "outcome"},
    {"method", "responses"},
    {"trained"},
    {"prune"},
    {"rehearse", "prepare"},
    {"trim"},
    {"callbacks"},
    {"cli", "pytorch_lightning"},
]
ABOVE_ALL = {"__init__", "__main__"}


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=[str(p.relative_to(PACKAGE)) for p in MODULES])
def test_imports_come_from_the_floors_below(path):
    name = room(path)
    if name in ABOVE_ALL:
        return
    floor = next(i for i, rooms in enumerate(FLOORS) if name in rooms)
    allowed = set().union(*FLOORS[:floor], {name})
    for target in imports(path):
        parts = target.split(".")
        if parts[0] == "lightning_nettrim":
            assert parts[1] in allowed, f"{path.name} imports {target}"
        if parts[0] in ("lightning", "pytorch_lightning"):
            assert name in ("callbacks", "cli", "pytorch_lightning"), f"{path.name} imports {target}"


def test_every_room_is_on_a_floor():
    assert {room(path) for path in MODULES} == set().union(*FLOORS, ABOVE_ALL)


def test_core_needs_only_torch_lightning_with_what_that_needs_and_safetensors():
    standard = set(sys.stdlib_module_names)
    outside = {name.split(".")[0] for path in MODULES for name in imports(path)}
    outside -= {"pytorch_lightning"}  # of the module of that name alone, which nothing imports
    assert outside - standard == {"torch", "lightning", "lightning_nettrim", "yaml", "tqdm", "safetensors"}
