"""What is finished is on disk, whole or not there, and a run that was cut short goes on to the same network."""

from __future__ import annotations

import copy
import errno
import multiprocessing
import pickle
import signal
import time

import pytest
import torch
from torch import nn

from lightning_nettrim import trim
from lightning_nettrim.pruning.pruner import Pruner
from lightning_nettrim.runtime.fingerprint import fingerprint
from lightning_nettrim.runtime.memory import GIB
from lightning_nettrim.runtime.resume import ResumeStore


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 4),
    ).eval()  # fmt: skip


X = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
OPTIONS = {"sparsity": 0.6, "num_samples": 200, "max_rows": 200}


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def pruned(folder=None, model=None, x=X, **options):
    model = network() if model is None else model
    return model, trim(model, x.split(50), folder=folder, **(OPTIONS | options))


class Killed(BaseException):
    pass


def interrupted(folder, at, patch, **options):
    """A run that ends when so many layers are finished."""
    finished, write = [], ResumeStore.write

    def writing(self, name, *rest):
        write(self, name, *rest)
        finished.append(name)
        if len(finished) == at:
            raise Killed

    with patch.context() as p:
        p.setattr(ResumeStore, "write", writing)
        model = network()
        with pytest.raises(Killed):
            pruned(folder, model, **options)
    assert same(model, network())
    return finished


@pytest.mark.parametrize("at", [1, 3, 4, 6, 7, 8, 9])
@pytest.mark.parametrize("options", [{}, {"scheme": "parallel"}], ids=str)
def test_a_run_goes_on_to_the_same_network_to_the_bit(tmp_path, monkeypatch, at, options):
    whole, result = pruned(**options)
    interrupted(tmp_path, at, monkeypatch, **options)
    with monkeypatch.context() as patch:
        asked, write = [], ResumeStore.write
        patch.setattr(ResumeStore, "write", lambda self, name, *rest: (asked.append(name), write(self, name, *rest)))
        again, resumed = pruned(tmp_path, **options)
    assert same(again, whole)
    assert resumed.notes == (f"{at} results are those of a run that was cut short",)
    assert [r.relative_error for r in resumed.reports] == [r.relative_error for r in result.reports]
    assert resumed.end_to_end_bound == result.end_to_end_bound
    assert len(asked) == 9 - at  # three curves, three rehearsals, three layers


OTHERS = {
    "slope": (lambda: nn.LeakyReLU(0.01), lambda: nn.LeakyReLU(0.5)),
    "function": (nn.GELU, nn.Tanh),
    "bound": (lambda: nn.Hardtanh(-1, 1), lambda: nn.Hardtanh(-1, 2)),
}


@pytest.mark.parametrize(("one", "other"), OTHERS.values(), ids=OTHERS.keys())
def test_layers_of_a_network_that_computes_something_else_are_not_used(tmp_path, one, other):
    def built(activation):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(8, 20), activation(), nn.Linear(20, 4))

    pruned(tmp_path, built(one), allocate="uniform")
    fresh, result = pruned(None, built(other), allocate="uniform")
    again, beside = pruned(tmp_path, built(other), allocate="uniform")
    assert same(again, fresh)
    assert beside.notes == ()
    assert [row.relative_error for row in beside.reports] == [row.relative_error for row in result.reports]


def test_a_close_call_of_memory_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_nettrim.trained.rows_within", lambda _, rows, room: rows if room > GIB else 100)
    monkeypatch.setattr("lightning_nettrim.memory.Meter.lap", lambda self: 0)
    whole, result = pruned(max_memory=1.02)
    interrupted(tmp_path, 5, monkeypatch, max_memory=1.02)
    again, resumed = pruned(tmp_path, max_memory=0.98)
    assert same(again, whole)
    assert resumed.notes == ("5 results are those of a run that was cut short",)
    for folder in (None, tmp_path):
        other, result = pruned(folder, max_memory=0.5)
        assert not same(other, whole)
        assert result.notes == tuple(f"{name}: 100 of 200 rows fit into max_memory" for name in ("1", "5", "7"))


def test_trials_of_a_search_go_on_too(tmp_path, monkeypatch):
    @torch.no_grad()
    def search(folder):
        model, reference = network(), network()(X)
        asked, answer = [], Pruner._answer
        with monkeypatch.context() as patch:
            patch.setattr(Pruner, "_answer", lambda self, *rest: (asked.append(rest[0]), answer(self, *rest))[1])
            trim(
                model, [X], max_drop=0.2, metric=lambda: -float((model(X) - reference).norm() / reference.norm()),
                num_samples=200, max_rows=200, folder=folder, allocate="uniform",
            )  # fmt: skip
        return model, len(asked)

    whole, layers = search(None)
    write, written = ResumeStore.write, []

    def writing(self, *rest):
        write(self, *rest)
        written.append(rest[0])
        if len(written) == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ResumeStore, "write", writing)
        with pytest.raises(Killed):
            search(tmp_path)
    again, left = search(tmp_path)
    assert same(again, whole)
    assert left == layers - 5


@pytest.mark.parametrize("change", ["weights", "data", "settings", "budget"])
def test_entries_of_another_run_are_not_used(tmp_path, caplog, change):
    pruned(tmp_path)
    caplog.clear()
    model, x, options = network(), X, {}
    if change == "weights":
        with torch.no_grad():
            model[1].weight[0, 0, 0] += 1e-3
    elif change == "data":
        x = X.clone()
        x[17, 3] += 1e-3
    elif change == "settings":
        options = {"importance": "equal"}
    else:
        options = {"per_layer": {"7": {"sparsity": 0.5}}}
    expected, _ = pruned(None, copy.deepcopy(model), x, **options)
    got, result = pruned(tmp_path, model, x, **options)
    assert same(got, expected)
    assert "with another network, other data or other settings: it is computed again" in caplog.text
    if change != "budget":
        assert result.notes == ()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "pickle", "folder"])
def test_a_damaged_entry_is_computed_again(tmp_path, caplog, damage):
    whole, _ = pruned(tmp_path)
    path = tmp_path / "5.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[-5] ^= 1
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "pickle":
        path.write_bytes(pickle.dumps({"5.weight": [0.0]}))
    else:
        path.unlink()
        path.mkdir()
    again, result = pruned(tmp_path)
    assert same(again, whole)
    assert "5.safetensors cannot be read" in caplog.text
    assert result.notes == ("8 results are those of a run that was cut short",)


@pytest.mark.parametrize("trouble", ["full", "unwritable"])
def test_a_run_goes_on_where_nothing_can_be_written(tmp_path, monkeypatch, caplog, trouble):
    whole, _ = pruned()
    if trouble == "full":

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        folder = tmp_path / "layers"
    else:
        folder = tmp_path / "file" / "layers"
        folder.parent.write_text("in the way")
    again, _ = pruned(folder)
    assert same(again, whole)
    assert caplog.text.count("cannot be written") == 1
    assert not list(tmp_path.rglob("*.partial"))


def test_an_earlier_folder_is_read_and_left_alone(tmp_path, monkeypatch):
    interrupted(tmp_path / "first", 8, monkeypatch)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "first").iterdir())
    again, result = pruned(tmp_path / "second", resume_from=[tmp_path / "first"])
    assert result.notes == ("8 results are those of a run that was cut short",)
    assert same(again, pruned()[0])
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "first").iterdir()) == before


def test_a_digest_tells_contents_apart():
    values = [
        torch.ones(2, 3), torch.ones(3, 2), torch.ones(6), torch.ones(2, 3).double(), [torch.ones(2, 3)],
        {"a": torch.ones(2, 3)}, {"b": torch.ones(2, 3)}, "1", 1, 1.0, None, [], [[]], torch.ones(()), torch.ones(0),
        torch.ones(3).bfloat16(), torch.ones(3, dtype=torch.bool),
    ]  # fmt: skip
    assert len({fingerprint(value) for value in values}) == len(values)
    assert fingerprint(torch.ones(3, 2)) == fingerprint(
        torch.ones(2, 3).mT.clone(memory_format=torch.contiguous_format)
    )
    assert fingerprint("ab", "c") != fingerprint("a", "bc")


def job(folder, out):
    """What a process of its own does, from the command to its network on disk."""
    torch.set_num_threads(1)
    model, _ = pruned(folder)
    torch.save(model.state_dict(), out)


@pytest.mark.slow
def test_killed_at_ten_moments_it_ends_with_the_same_network(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_nettrim", "pytest"])

    def started(*arguments):
        process = context.Process(target=job, args=arguments)
        process.start()
        return process

    def finished(*arguments):
        begin, process = time.perf_counter(), started(*arguments)
        process.join()
        assert process.exitcode == 0
        return time.perf_counter() - begin, torch.load(arguments[1], weights_only=True)

    finished(None, tmp_path / "first.pt")
    seconds, whole = finished(None, tmp_path / "whole.pt")
    generator, killed = torch.Generator().manual_seed(0), 0
    for i in range(30):
        folder, out = tmp_path / str(i), tmp_path / f"{i}.pt"
        process = started(folder, out)
        time.sleep(float(torch.rand(1, generator=generator)) * seconds)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL  # and not finished before
        found = finished(folder, out)[1]
        assert all(torch.equal(found[key], whole[key]) for key in whole)
        if killed == 10:
            return
    pytest.fail(f"killed {killed} times only")
