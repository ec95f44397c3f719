"""Around the loop over layers: resuming an interrupted run, retries for lack of memory, progress, reports."""

from __future__ import annotations

import copy
import errno
import signal
import time

import pytest
import torch
from damaged_files import DAMAGES, damage
from networks import (
    conv1d_inputs,
    conv1d_network,
    count_hooks,
    equal_states,
    mlp,
    mlp_batches,
    outputs,
)
from processes import CONTEXT
from torch import nn

from lightning_nettrim import ADMM, CalibrationSource, Cardinality, PruningConfig, prune_model, trim
from lightning_nettrim.calibration.activations import Activations
from lightning_nettrim.calibration.reference import ReferenceOutputs
from lightning_nettrim.pruning import layer
from lightning_nettrim.pruning.allocation import curves
from lightning_nettrim.runtime.memory import GIB, MemoryMeter
from lightning_nettrim.runtime.resume import ResumeStore

QUICK = ADMM(rtol=1e-2, atol=1e-2)

# --- resuming: the entries of `conv1d_network` are three error curves, the effects of its layers, and three layers

X = conv1d_inputs()
OPTIONS = {"sparsity": 0.6, "num_samples": 200, "max_rows": 200}
ENTRIES = 7


class Interruption(BaseException):
    """Ends a run."""


class InterruptingStore(ResumeStore):
    """Ends the run after a number of entries; 0 never."""

    def __init__(self, folder, entries=0):
        super().__init__(folder)
        self.written, self._entries = [], entries

    def write(self, name, *rest):
        super().write(name, *rest)
        self.written.append(name)
        if len(self.written) == self._entries:
            raise Interruption


def pruned(folder=None, model=None, x=X, **options):
    """A network and the result of `trim`."""
    model = conv1d_network() if model is None else model
    return model, trim(model, x.split(100), folder=folder, **(OPTIONS | options))


def stored(folder, entries=0, model=None, **options):
    """As `pruned`, but the entries are not removed at the end; also the names of those that were written."""
    model, store = conv1d_network() if model is None else model, InterruptingStore(folder, entries)
    config = PruningConfig(**(OPTIONS | options))
    result = prune_model(model, CalibrationSource(X.split(100)), config, resume=lambda processes: store)
    return model, result, store.written


def interrupt(folder, entries, **options):
    """A run that ends after a number of entries."""
    model = conv1d_network()
    with pytest.raises(Interruption):
        stored(folder, entries, model, **options)
    assert equal_states(model, conv1d_network())
    assert len(list(folder.iterdir())) == entries


@pytest.fixture(scope="module")
def uninterrupted():
    """A function that returns the network and the result for some options; it computes them once."""
    results = {}

    def get(**options):
        key = str(options)
        if key not in results:
            results[key] = pruned(**options)
        return results[key]

    return get


def note(count):
    return (f"{count} results are those of an interrupted run",)


@pytest.mark.parametrize("entries", [1, 3, 4, 5, 6, ENTRIES])
@pytest.mark.parametrize("options", [{}, {"scheme": "parallel"}], ids=str)
def test_an_interrupted_run_is_resumed_to_the_same_network_to_the_bit(tmp_path, uninterrupted, entries, options):
    whole, result = uninterrupted(**options)
    interrupt(tmp_path, entries, **options)
    again, resumed, written = stored(tmp_path, **options)
    assert equal_states(again, whole)
    assert resumed.notes == note(entries)
    assert [r.local_error for r in resumed.reports] == [r.local_error for r in result.reports]
    assert resumed.end_to_end_error == result.end_to_end_error
    assert resumed.end_to_end_bound == result.end_to_end_bound
    assert len(written) == ENTRIES - entries


@pytest.mark.parametrize("allocate", ["global", "uniform"])
def test_a_finished_run_leaves_no_entries_and_a_second_one_resumes_nothing(tmp_path, allocate):
    folder = tmp_path / "layers"
    first, result = pruned(folder, allocate=allocate)
    assert not list(tmp_path.rglob("*"))
    second, again = pruned(folder, allocate=allocate)
    assert equal_states(first, second)
    for one in (result, again):
        assert one.notes == ()
        assert one.reused == ()
        assert "interrupted" not in one.table()
    assert not list(tmp_path.rglob("*"))


def test_a_dry_run_leaves_no_entries_either(tmp_path):
    folder = tmp_path / "layers"
    pruned(folder, dry_run=True)
    assert not list(tmp_path.rglob("*"))
    assert pruned(folder)[1].notes == ()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_is_interrupted_at_the_second_layer_is_resumed(tmp_path, uninterrupted, error, caplog):
    whole, result = uninterrupted()
    reports, model, folder = [], conv1d_network(), tmp_path / "layers"

    def interrupting(report):
        reports.append(report.name)
        if len(reports) == 2:
            raise error("planned")

    with pytest.raises(error, match="planned"):
        pruned(folder, model, on_layer=interrupting)
    assert equal_states(model, conv1d_network())
    assert f"finished layers are in {folder}, for the next run" in caplog.text
    assert len(list(folder.iterdir())) == ENTRIES - 1
    again, resumed = pruned(folder)
    assert equal_states(again, whole)
    assert resumed.notes == note(ENTRIES - 1)
    assert resumed.reused == ()  # these are files of other folders
    assert [r.local_error for r in resumed.reports] == [r.local_error for r in result.reports]
    assert resumed.end_to_end_error == result.end_to_end_error
    assert resumed.end_to_end_bound == result.end_to_end_bound
    assert not list(tmp_path.rglob("*"))


OTHERS = {
    "slope": (lambda: nn.LeakyReLU(0.01), lambda: nn.LeakyReLU(0.5)),
    "function": (nn.GELU, nn.Tanh),
    "bound": (lambda: nn.Hardtanh(-1, 1), lambda: nn.Hardtanh(-1, 2)),
}


@pytest.mark.parametrize(("one", "other"), OTHERS.values(), ids=OTHERS.keys())
def test_layers_of_a_network_that_computes_something_else_are_not_used(tmp_path, one, other):
    def network(activation):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(16, 40), activation(), nn.Linear(40, 16))

    _, _, written = stored(tmp_path, model=network(one), allocate="uniform")
    assert written == ["0", "2"]
    fresh, result = pruned(None, network(other), allocate="uniform")
    again, second = pruned(tmp_path, network(other), allocate="uniform")
    assert equal_states(again, fresh)
    assert second.notes == ()
    assert [row.local_error for row in second.reports] == [row.local_error for row in result.reports]


def test_rows_that_barely_fit_into_memory_are_determined_once(tmp_path, monkeypatch):
    def max_rows_within(layer, rows, available):
        return rows if available > GIB else 100

    monkeypatch.setattr("lightning_nettrim.pruning.session_setup.max_rows_within", max_rows_within)
    monkeypatch.setattr(MemoryMeter, "read_peak", lambda self: 0)
    whole, result = pruned(max_memory=1.02)
    interrupt(tmp_path, 5, max_memory=1.02)
    again, resumed, _ = stored(tmp_path, max_memory=0.98)
    assert equal_states(again, whole)
    assert resumed.notes == note(5)
    for folder in (None, tmp_path):
        other, result = pruned(folder, max_memory=0.5)
        assert not equal_states(other, whole)
        assert result.notes == tuple(f"{name}: 100 of 200 rows fit into max_memory" for name in ("1", "5", "7"))


def test_trials_of_a_search_are_resumed_too(tmp_path):
    @torch.no_grad()
    def search(folder, entries=0):
        model, reference = conv1d_network(), conv1d_network()(X)
        store = InterruptingStore(folder, entries)
        config = PruningConfig(max_drop=0.2, num_samples=200, max_rows=200, allocate="uniform")
        prune_model(
            model, CalibrationSource([X]), config, resume=lambda processes: store,
            metric=lambda: -float((model(X) - reference).norm() / reference.norm()),
        )  # fmt: skip
        return model, len(store.written)

    whole, layers = search(tmp_path / "whole")
    with pytest.raises(Interruption):
        search(tmp_path / "interrupted", 5)
    again, left = search(tmp_path / "interrupted")
    assert equal_states(again, whole)
    assert left == layers - 5


@pytest.mark.parametrize("change", ["weights", "data", "options", "budget"])
def test_entries_of_another_run_are_not_used(tmp_path, caplog, change):
    interrupt(tmp_path, ENTRIES)
    caplog.clear()
    model, x, options = conv1d_network(), X, {}
    if change == "weights":
        with torch.no_grad():
            model[1].weight[0, 0, 0] += 1e-3
    elif change == "data":
        x = X.clone()
        x[17, 3] += 1e-3
    elif change == "options":
        options = {"importance": "equal"}
    else:
        options = {"per_layer": {"7": {"sparsity": 0.5}}}
    expected, _ = pruned(None, copy.deepcopy(model), x, **options)
    again, result = pruned(tmp_path, model, x, **options)
    assert equal_states(again, expected)
    assert "with another network, other data or other settings: it is computed again" in caplog.text
    if change != "budget":
        assert result.notes == ()


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_entry_is_computed_again(tmp_path, uninterrupted, caplog, how):
    interrupt(tmp_path, ENTRIES)
    path = tmp_path / "5.safetensors"
    damage(path, how)
    again, result = pruned(tmp_path)
    assert equal_states(again, uninterrupted()[0])
    assert "5.safetensors cannot be read" in caplog.text
    assert result.notes == note(ENTRIES - 1)


@pytest.mark.parametrize("cause", ["full", "unwritable"])
def test_a_run_continues_if_nothing_can_be_written(tmp_path, uninterrupted, monkeypatch, caplog, cause):
    if cause == "full":

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        folder = tmp_path / "layers"
    else:
        folder = tmp_path / "file" / "layers"
        folder.parent.write_text("a file where a folder is needed")
    again, _ = pruned(folder)
    assert equal_states(again, uninterrupted()[0])
    assert caplog.text.count("cannot be written") == 1
    assert not list(tmp_path.rglob("*.partial"))


def test_entries_of_another_folder_are_read_and_not_changed(tmp_path, uninterrupted):
    first, second = tmp_path / "first", tmp_path / "second"
    interrupt(first, ENTRIES - 1)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in first.iterdir())

    def interrupting(report):
        raise Interruption

    with pytest.raises(Interruption):
        pruned(second, resume_from=[first], on_layer=interrupting)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in first.iterdir()) == before
    again, result = pruned(second, resume_from=[first])
    assert result.notes == note(ENTRIES - 1)
    assert sorted(path.name for path in result.reused) == [name for name, _ in before]
    assert equal_states(again, uninterrupted()[0])
    assert sorted((p.name, p.stat().st_mtime_ns) for p in first.iterdir()) == before
    assert not second.exists()


def prune_and_save(folder, path):
    """Prune in a process of its own and save the network."""
    torch.set_num_threads(1)
    model, _ = pruned(folder)
    torch.save(model.state_dict(), path)


@pytest.mark.slow
def test_a_run_that_is_killed_at_ten_moments_ends_with_the_same_network(tmp_path):
    def started(*arguments):
        process = CONTEXT.Process(target=prune_and_save, args=arguments)
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
        folder, path = tmp_path / str(i), tmp_path / f"{i}.pt"
        process = started(folder, path)
        time.sleep(float(torch.rand(1, generator=generator)) * seconds)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL  # and not finished before
        found = finished(folder, path)[1]
        assert all(torch.equal(found[key], whole[key]) for key in whole)
        if killed == 10:
            return
    pytest.fail(f"killed {killed} times only")


# --- retries for lack of memory

INPUTS = conv1d_inputs(600)
MEMORY_OPTIONS = {"sparsity": 0.6, "num_samples": 600, "max_rows": 600}


def fail(patch, owners, name, times, error):
    """Let the first calls of a public function, in all modules or classes that have it, raise an error."""
    failures = []
    for owner in owners:
        function = getattr(owner, name)

        def failing(*args, function=function, **kwargs):
            if len(failures) < times:
                failures.append(1)
                raise error
            return function(*args, **kwargs)

        patch.setattr(owner, name, failing)


STAGES = {
    "record the reference": ([ReferenceOutputs], "record"),
    "record a layer": ([Activations], "record"),
    "make the problem": ([layer, curves], "layer_problem"),
    "measure the network": ([ReferenceOutputs], "distances"),
    "solve": ([Cardinality], "solve"),
}
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_out_of_memory_is_retried_with_less(stage, error, allocate, monkeypatch, caplog):
    fail(monkeypatch, *STAGES[stage], 2, error)
    model = conv1d_network()
    result = trim(model, INPUTS.split(100), allocate=allocate, **MEMORY_OPTIONS)
    assert result.sparsity == pytest.approx(0.6, abs=1e-3)
    assert "out of memory while" in caplog.text
    assert any("out of memory while" in note for note in result.notes)
    assert count_hooks(model) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_out_of_memory_in_every_attempt_leaves_the_network_dense(stage, monkeypatch):
    fail(monkeypatch, *STAGES[stage], 10**9, ERRORS[0])
    model = conv1d_network()
    with pytest.raises(torch.OutOfMemoryError):
        trim(model, INPUTS.split(100), **MEMORY_OPTIONS)
    assert equal_states(model, conv1d_network())
    assert count_hooks(model) == 0


# --- progress and reports


def test_each_layer_is_reported_and_the_table_has_all():
    reported = []
    result = trim(mlp(), mlp_batches(), sparsity=0.5, allocate="uniform", solver=QUICK, on_layer=reported.append)
    assert [report.name for report in reported] == ["0", "2", "4"]
    for early, report in zip(reported, result.reports, strict=True):
        assert early.end_to_end_error != early.end_to_end_error  # NaN until all layers are finished
        assert early.local_error == report.local_error
        (line,) = [line for line in str(result).splitlines() if line.startswith(f"{report.name} ")]
        assert f"{report.sparsity:.2%}" in line
        assert report.status in line
    assert f"sparsity of the pruned layers {result.sparsity:.2%}" in str(result)


@pytest.mark.parametrize("allocate", ["uniform", "epsilon"])
def test_the_finished_fraction_of_each_phase_increases(allocate):
    phases = {}
    trim(
        mlp(), mlp_batches(), sparsity=0.5, allocate=allocate, solver=QUICK,
        on_progress=lambda phase, fraction: phases.setdefault(phase, []).append(fraction),
    )  # fmt: skip
    assert list(phases) == (["measuring error curves"] if allocate == "epsilon" else []) + ["pruning"]
    for fractions in phases.values():
        assert fractions[0] == 0
        assert len(fractions) == 3
        assert fractions == sorted(set(fractions))
        assert fractions[-1] < 1


def test_the_activity_is_the_layer_that_is_being_solved(caplog):
    def interrupting(report):
        if report.name == "2":
            raise RuntimeError("planned")

    with pytest.raises(RuntimeError, match="planned"):
        trim(mlp(), mlp_batches(), sparsity=0.5, allocate="uniform", solver=QUICK, on_layer=interrupting)
    assert "RuntimeError while solving 2: all of 0, 2, 4 have their trained weights again" in caplog.text


def test_a_callback_can_use_the_model_between_layers():
    model, changes = mlp(), []
    dense = outputs(mlp(), mlp_batches())
    trim(
        model, mlp_batches(), sparsity=0.5, allocate="uniform", solver=QUICK,
        on_layer=lambda report: changes.append(float((outputs(model, mlp_batches()) - dense).norm())),
    )  # fmt: skip
    assert changes[0] == 0  # the first layer is assigned after its report
    assert changes[1] > 0
    assert changes[2] != changes[1]
