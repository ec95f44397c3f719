"""The examples of the documentation run."""

import re
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if path.exists()]


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


def run(path):
    """Run the Python blocks of a page in order, as one module."""
    module = types.ModuleType(path.stem)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    for block in blocks(path, "python"):
        exec(compile(block, str(path), "exec"), module.__dict__)
    return module


def test_the_examples_of_extending_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = run(ROOT / "docs/extending.md")
    contract = module.TestRandomSupport()
    tests = [getattr(contract, name) for name in dir(contract) if name.startswith("test_")]
    assert len(tests) > 5
    for test in tests:
        test()
    assert module.CountWeights.name == "count"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md", "docs/units.md"])
def test_other_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = run(ROOT / page)
    if page == "README.md":
        assert module.net_trim.result.sparsity == pytest.approx(0.8, abs=1e-3)
        metrics = module.net_trim.metrics
        assert metrics["pruned"]["val_acc"] > metrics["dense"]["val_acc"] - 0.02


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
