"""Notes and cached results of a run."""

from __future__ import annotations

import torch

from lightning_nettrim.runtime.progress import Progress
from lightning_nettrim.runtime.resume import ResumeStore
from lightning_nettrim.runtime.run_context import RunContext


def test_a_note_is_logged_and_kept(caplog):
    run = RunContext()
    run.note("half the rows")
    assert run.notes == ["half the rows"]
    assert "NetTrim: half the rows" in caplog.text
    assert RunContext().notes == []


def test_a_result_is_computed_once_for_each_name_and_cause():
    calls, run = [], RunContext()

    def compute():
        calls.append(1)
        return {"weight": torch.full((2,), float(len(calls)))}, len(calls)

    for _ in range(2):
        tensors, count = run.cached("curve", "a", compute)
        assert tensors["weight"].tolist() == [1.0, 1.0]
        assert count == 1
    assert run.cached("curve", "b", compute)[1] == 2
    assert run.cached("other", "a", compute)[1] == 3
    assert RunContext().cached("curve", "a", compute)[1] == 4


def test_a_result_is_read_from_the_folder_of_an_interrupted_run(tmp_path):
    def fail():
        raise AssertionError("computed again")

    written = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([[3]])}, [1, {"b": 2.5}]
    RunContext(resume=ResumeStore(tmp_path)).cached("curve", "a", lambda: written)
    resumed = RunContext(resume=ResumeStore(tmp_path))
    tensors, values = resumed.cached("curve", "a", fail)
    assert values == written[1]
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"b": [1.0, 2.0], "a": [[3]]}
    assert resumed.resume.used == 1


def test_progress_is_reported_to_a_function():
    reports = []
    progress = Progress(lambda phase, fraction: reports.append((phase, fraction)))
    assert progress.activity == "starting"
    progress.report("pruning", 0.5)
    assert reports == [("pruning", 0.5)]
    Progress().report("pruning", 0.5)
