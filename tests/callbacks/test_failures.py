"""Failures during and after pruning: no layer is half pruned, hooks are removed, and training is not lost."""

from __future__ import annotations

import errno
import importlib
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from trainers import (
    LAYERS,
    LIGHTNING_WARNINGS,
    Data,
    EndHooks,
    MetricsNet,
    Net,
    Watch,
    copy_state,
    equal_states,
    half,
    has_hooks,
    load_state,
    make_trainer,
    pruned_by_half,
    samples,
    train_data,
    val_data,
)

from lightning_nettrim import Cardinality, Magnitude, NetTrim, Solver
from lightning_nettrim.calibration import batchnorm
from lightning_nettrim.calibration.activations import Activations
from lightning_nettrim.calibration.reference import ReferenceOutputs
from lightning_nettrim.callbacks import nettrim, publishing, run_folder, trainer_pruning
from lightning_nettrim.callbacks.calibration_data import calibration_batches
from lightning_nettrim.callbacks.steps import LoadedBatch
from lightning_nettrim.layers import masking
from lightning_nettrim.layers.folding import FoldedLayer
from lightning_nettrim.pruning import layer as pruning_layer
from lightning_nettrim.pruning.allocation import curves
from lightning_nettrim.runtime import resume
from lightning_nettrim.runtime.offload import TensorStore
from lightning_nettrim.runtime.resume import ResumeStore

pytestmark = LIGHTNING_WARNINGS


# --- no layer is half pruned


class InjectsFault(NetTrim):
    """Records the trained weights and then injects a fault, at the end of training."""

    inject = None

    def on_train_end(self, trainer, pl_module):
        self.trained = copy_state(pl_module)
        self.inject()
        super().on_train_end(trainer, pl_module)


def raises(owner, name, error, at=1):
    """A fault: a function raises at one of its calls and at all later ones."""

    def inject(monkeypatch, _, occurred):
        function, calls = getattr(owner, name), []

        def failing(*args, **kwargs):
            calls.append(name)
            if len(calls) >= at:
                occurred.append(name)
                raise error
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, failing)

    return inject


def third_batch(change):
    """A fault: the third calibration batch is changed."""

    def inject(monkeypatch, _, occurred):
        def batches(*args):
            for i, batch in enumerate(calibration_batches(*args)):
                if i == 2:
                    occurred.append(i)
                yield change(batch) if i == 2 else batch

        monkeypatch.setattr(trainer_pruning, "calibration_batches", batches)

    return inject


def raising(error):
    """A function that raises."""

    def function(*args, **kwargs):
        raise error

    return function


def interrupt_assignment(monkeypatch, _, occurred):
    """Ctrl-C while the parameters of a layer are assigned: its weight is new, its bias is not."""
    assign, pruned = masking.assign, []

    def partly(model, values):
        for name, value in values.items():
            assign(model, {name: value})
            if bool((value == 0).any()):
                pruned.append(name)
                if len(pruned) == 2:  # of the second layer of the result
                    occurred.append(name)
                    raise KeyboardInterrupt

    monkeypatch.setattr(masking, "assign", partly)


def block_folder(monkeypatch, folder, occurred):
    """A file where the folder of the results is to be."""
    occurred.append(folder)
    monkeypatch.setattr(run_folder, "root", lambda trainer: folder / "file" / "nettrim")
    (folder / "file").write_text("not a folder")


OUT_OF_MEMORY = torch.OutOfMemoryError("out of memory")
FULL = OSError(errno.ENOSPC, "No space left on device")
FAULTS = {
    "a batch of NaN": third_batch(
        lambda loaded: LoadedBatch([torch.full_like(loaded.batch[0], torch.nan), loaded.batch[1]])
    ),
    "a loader that raises": third_batch(raising(RuntimeError("broken loader"))),
    "Ctrl-C in the loader": third_batch(raising(KeyboardInterrupt())),
    "out of memory storing inputs": raises(TensorStore, "put", OUT_OF_MEMORY, 3),
    "out of memory recording responses": raises(ReferenceOutputs, "record", OUT_OF_MEMORY),
    "out of memory recording a layer": raises(Activations, "record", OUT_OF_MEMORY, 4),
    "out of memory measuring curves": raises(curves, "layer_problem", OUT_OF_MEMORY),
    "out of memory making a problem": raises(pruning_layer, "layer_problem", OUT_OF_MEMORY, 2),
    "out of memory solving": raises(Cardinality, "solve", OUT_OF_MEMORY, 2),
    "out of memory unfolding": raises(FoldedLayer, "to_parameters", OUT_OF_MEMORY, 3),
    "out of memory measuring": raises(ReferenceOutputs, "distances", OUT_OF_MEMORY),
    "a full disk for layers": raises(resume, "write_atomically", FULL),
    "a full disk for the report": raises(publishing, "write_atomically", FULL),
    "a folder that cannot be written": block_folder,
    "Ctrl-C recording": raises(Activations, "record", KeyboardInterrupt(), 5),
    "Ctrl-C solving": raises(Cardinality, "solve", KeyboardInterrupt(), 5 * len(LAYERS) + 2),
    "Ctrl-C assigning": interrupt_assignment,
    "Ctrl-C re-estimating": raises(batchnorm, "reestimate_preserving_output", KeyboardInterrupt()),
    "Ctrl-C measuring": raises(ReferenceOutputs, "distances", KeyboardInterrupt()),
    "Ctrl-C writing a layer": raises(ResumeStore, "write", KeyboardInterrupt(), 2),
    "Ctrl-C publishing": raises(nettrim, "publish", KeyboardInterrupt()),
    "Ctrl-C in the pruned validation": raises(nettrim, "run_validation", KeyboardInterrupt(), 2),
    "Ctrl-C in the dense validation": raises(nettrim, "run_validation", KeyboardInterrupt()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_network_is_never_half_pruned(fault, tmp_path, monkeypatch, caplog, capsys):
    model, callback = Net(), InjectsFault(sparsity=0.5, solver=Cardinality(max_steps=8))
    trainer = make_trainer(tmp_path, callback, max_epochs=1)
    handler, error, occurred = signal.getsignal(signal.SIGINT), "", []
    with monkeypatch.context() as patch:
        callback.inject = partial(FAULTS[fault], patch, tmp_path, occurred)
        try:
            trainer.fit(model, datamodule=Data())
        except (Exception, SystemExit) as raised:
            error = repr(raised)
        finally:
            signal.signal(signal.SIGINT, handler)
    assert occurred
    trained, now = callback.trained, copy_state(model)
    for layer in LAYERS:
        dense = all(torch.equal(now[key], trained[key]) for key in (f"{layer}.weight", f"{layer}.bias"))
        masks = {} if callback.result is None else callback.result.masks
        whole = f"{layer}.weight" in masks and masking.satisfied(model, {f"{layer}.weight": masks[f"{layer}.weight"]})
        assert dense or whole
    assert equal_states(now, trained) == (callback.result is None)
    assert not has_hooks(model)
    assert error or caplog.text or "No space" in capsys.readouterr().out or callback.result is not None
    if error and callback.result is None and "validation" not in fault:
        known = ("NaN" in error, "memory" in error, "loader" in fault, "Not a directory" in error)
        assert "trained weights again" in caplog.text or any(known)
    if fault == "a full disk for layers":
        assert "cannot be resumed" in caplog.text
        assert callback.result is not None
    assert not list(tmp_path.rglob("*.partial"))
    again, other = half(), Net() if callback.result is not None else model.train()
    make_trainer(tmp_path / "again", again, max_epochs=1).fit(other, train_data(), val_data())
    assert again.result is not None


@dataclass(frozen=True)
class FailsAtSecondLayer(Solver):
    """Prunes all layers by magnitude except the second, of 16 inputs and a bias, where it raises."""

    interrupt: bool = False

    def solve(self, problem):
        if problem.X.shape[-1] != 17:
            return Magnitude().solve(problem)
        raise KeyboardInterrupt if self.interrupt else RuntimeError("broken")


@pytest.mark.filterwarnings("ignore:.*while solving")
@pytest.mark.parametrize("interrupt", [True, False])
@pytest.mark.parametrize("fit", [True, False])
def test_a_failed_solve_restores_everything(tmp_path, dense_checkpoint, interrupt, fit):
    watch, callback, model = Watch(), half(solver=FailsAtSecondLayer(interrupt)), Net()
    trainer = make_trainer(tmp_path, watch, callback, logger=CSVLogger(tmp_path))
    callbacks, loggers = list(trainer.callbacks), list(trainer.loggers)
    handler = signal.getsignal(signal.SIGINT)
    start = trainer.fit if fit else partial(trainer.validate, ckpt_path=dense_checkpoint)
    try:
        with pytest.raises(SystemExit if interrupt else RuntimeError):
            start(model, datamodule=Data())
    finally:
        signal.signal(signal.SIGINT, handler)
    trained = watch.trained if fit else load_state(dense_checkpoint)
    assert equal_states(copy_state(model), trained)
    assert not has_hooks(model)
    assert trainer.callbacks == callbacks
    assert trainer.loggers == loggers
    assert callback.result is None
    assert callback.masks == {}
    folder = Path(trainer.log_dir) / "nettrim"
    written = sorted(path.name for path in folder.iterdir() if path.name != "running")
    assert written == (["dense.ckpt", "layers"] if fit else ["layers"])
    if fit:
        assert equal_states(load_state(folder / "dense.ckpt"), trained)
    make_trainer(tmp_path, half()).fit(model.train(), train_data(), val_data())
    assert pruned_by_half(model)


# --- training is not lost

POINTS = {
    "claiming the folder": ("callbacks.run_folder", "claim"),
    "choosing batches": ("callbacks.trainer_pruning", "calibration_batches"),
    "sampling": ("pruning.session_setup", "sample_inputs"),
    "planning": ("pruning.session_setup", "make_plan"),
    "tracing": ("pruning.plan", "trace_forward"),
    "recording": ("calibration.activations", "record"),
    "making a problem": ("pruning.layer", "layer_problem"),
    "solving": ("pruning.solving", "solve"),
    "refitting": ("pruning.solving", "refit"),
    "checking a solution": ("pruning.solving", "solve_failure"),
    "checking a response": ("pruning.solving", "response_failure"),
    "measuring a layer": ("pruning.layer", "local_error"),
    "allocating": ("pruning.api", "allocate_budgets"),
    "writing the plan": ("pruning.api", "plan_to_yaml"),
    "assigning": ("layers.masking", "assign"),
    "measuring sparsity": ("layers.masking", "sparsity"),
    "validating": ("callbacks.nettrim", "run_validation"),
    "histograms": ("callbacks.nettrim", "publish_histograms"),
    "publishing": ("callbacks.nettrim", "publish"),
    "comparing": ("callbacks.publishing", "comparison"),
    "verifying": ("callbacks.publishing", "verify_file"),
    "writing the report": ("callbacks.publishing", "to_json"),
    "fingerprints": ("pruning.session_setup", "fingerprint"),
}
"""Module and name of functions that fail."""

ONLY_WITH_SAVE = ("claim", "verify_file", "to_json", "fingerprint")
"""Functions that are not called with ``save=False``."""


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize(("module", "name"), POINTS.values(), ids=POINTS.keys())
@pytest.mark.filterwarnings("ignore:.*while solving")
def test_a_failure_after_training_loses_only_the_pruning(tmp_path, monkeypatch, caplog, module, name, save):
    source = importlib.import_module(f"lightning_nettrim.{module}")
    function = getattr(source, name)

    class FailAfterTraining(Callback):
        """Makes a function fail once training has ended."""

        def on_train_end(self, trainer, pl_module):
            monkeypatch.setattr(source, name, raising(OSError("planned")))

    hooks, saver = EndHooks(), ModelCheckpoint(tmp_path / "user", save_last=True, monitor="val_loss")
    callback, model = half(solver=Cardinality(max_steps=4), refit=True, save=save), MetricsNet()
    trainer = make_trainer(
        tmp_path, callback, FailAfterTraining(), hooks, saver, max_epochs=1, enable_checkpointing=True
    )
    if not save and name in ONLY_WITH_SAVE:
        trainer.fit(model)
        assert callback.result is not None
        return
    with pytest.raises(OSError, match="planned"):
        trainer.fit(model)
    monkeypatch.setattr(source, name, function)
    assert hooks.calls == ["train_end", "fit_end", "teardown"]
    assert model.ended == ["train", "fit"]
    assert (tmp_path / "user/last.ckpt").exists()
    assert "pruning failed (OSError: planned)" in caplog.text
    files = [*tmp_path.glob("nettrim*/dense.ckpt")]
    if name != "claim" and (save or callback.result is None):
        (file,) = files
        assert all(torch.equal(value, hooks.trained[key]) for key, value in load_state(file).items())
    if callback.result is None:
        assert all(torch.equal(model.state_dict()[key], value) for key, value in hooks.trained.items())
    assert not has_hooks(model)
    make_trainer(tmp_path, again := half(), max_epochs=1).fit(MetricsNet())
    assert again.result.sparsity == 0.5


# --- interrupted runs are resumed


@pytest.mark.parametrize("change", ["none", "corrupted", "weights", "settings"])
def test_layers_of_an_interrupted_run_are_used_if_they_fit(change, tmp_path, monkeypatch, caplog):
    def run(path, data=1, **options):
        torch.manual_seed(0)
        model, callback = Net(), NetTrim(**({"sparsity": 0.5, "solver": Magnitude(), "allocate": "uniform"} | options))
        trainer = make_trainer(path, callback, max_epochs=1)
        trainer.fit(model, DataLoader(samples(96, data), batch_size=16), val_data())
        return model, callback

    with monkeypatch.context() as patch:
        patch.setattr(nettrim, "publish", raising(RuntimeError("interrupted")))
        with pytest.raises(RuntimeError, match="interrupted"):
            run(tmp_path)
    files = sorted(tmp_path.rglob("layers/*.safetensors"))
    assert [file.name for file in files] == [f"{name}.safetensors" for name in LAYERS]
    if change == "corrupted":
        files[1].write_bytes(files[1].read_bytes()[:100])
    options = {"weights": {"data": 7}, "settings": {"seed": 3}}.get(change, {})
    whole, _ = run(tmp_path / "elsewhere", **options)
    caplog.clear()
    again, callback = run(tmp_path, **options)
    assert equal_states(copy_state(again), copy_state(whole))
    expected = {"none": "3 results", "corrupted": "2 results"}.get(change)
    notes = (f"{expected} are those of an interrupted run",) if expected else ()
    assert callback.result.notes == notes
    if change == "corrupted":
        assert "cannot be read" in caplog.text
    left = {"none": 0, "corrupted": 1}.get(change, 3)  # files that no run can use
    assert len(list(tmp_path.rglob("layers/*"))) == left
    assert not list(tmp_path.rglob("running"))
