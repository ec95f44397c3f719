"""Whatever goes wrong: every layer is as trained or wholly pruned, hooks are gone, and a message says what happened."""

from __future__ import annotations

import errno
import signal
from functools import partial

import pytest
import torch
from test_nettrim import Data, Net, half, make_trainer, same, samples, state, train_data, val_data
from torch.utils.data import DataLoader

from lightning_nettrim import Cardinality, Magnitude, NetTrim
from lightning_nettrim.calibration import batchnorm
from lightning_nettrim.calibration.activations import Activations
from lightning_nettrim.calibration.reference import ReferenceOutputs
from lightning_nettrim.callbacks import nettrim, publishing, run_folder
from lightning_nettrim.callbacks.calibration_data import calibration_batches
from lightning_nettrim.callbacks.steps import Loaded
from lightning_nettrim.layers import masking
from lightning_nettrim.layers.folding import FoldedLayer
from lightning_nettrim.pruning.pruner import Pruner
from lightning_nettrim.pruning.rehearsal import Rehearsal
from lightning_nettrim.runtime.offload import TensorStore
from lightning_nettrim.runtime.resume import ResumeStore

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]

LAYERS = ("fc1", "fc2", "fc3")


class Remembering(NetTrim):
    """Notes the weights that the training ended with, and lets things fail from then on."""

    def on_train_end(self, trainer, pl_module):
        self.trained = state(pl_module)
        self.arm()
        super().on_train_end(trainer, pl_module)


def breaking(owner, name, error, at=1):
    """Makes a function raise at one of its calls and at all later ones."""

    def patch(monkeypatch, _):
        function, calls = getattr(owner, name), []

        def broken(*args, **kwargs):
            calls.append(name)
            if len(calls) >= at:
                raise error
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, broken)

    return patch


def loader(fails):
    """A calibration that fails at its third batch."""

    def patch(monkeypatch, _):
        def batches(*args):
            for i, batch in enumerate(calibration_batches(*args)):
                yield fails(batch) if i == 2 else batch

        monkeypatch.setattr(nettrim, "calibration_batches", batches)

    return patch


def raising(error):
    def fails(batch):
        raise error

    return fails


def halfway(monkeypatch, _):
    """Ctrl-C while a layer's parameters are swapped in: its weight is new, its bias is not."""
    swap, calls = masking.assign, []

    def partly(model, values):
        calls.append(1)
        first = dict(list(values.items())[:1])
        swap(model, first)
        if len(calls) == 3:
            raise KeyboardInterrupt
        swap(model, values)

    monkeypatch.setattr(masking, "assign", partly)


def in_the_way(monkeypatch, folder):
    """A file where the folder of the results is to be."""
    monkeypatch.setattr(run_folder, "root", lambda trainer: folder / "file" / "nettrim")
    (folder / "file").write_text("in the way")


OUT = torch.OutOfMemoryError("out of memory")
FULL = OSError(errno.ENOSPC, "No space left on device")
FAILURES = {
    "a batch of NaN": loader(lambda loaded: Loaded([torch.full_like(loaded.batch[0], torch.nan), loaded.batch[1]])),
    "a loader that raises": loader(raising(RuntimeError("broken loader"))),
    "Ctrl-C in the loader": loader(raising(KeyboardInterrupt())),
    "out of memory holding inputs": breaking(TensorStore, "put", OUT, 3),
    "out of memory recording responses": breaking(ReferenceOutputs, "record", OUT),
    "out of memory recording a layer": breaking(Activations, "record", OUT, 4),
    "out of memory measuring curves": breaking(Rehearsal, "_curve", OUT),
    "out of memory posing": breaking(Pruner, "pose", OUT, 12),
    "out of memory solving": breaking(Cardinality, "solve", OUT, 2),
    "out of memory unfolding": breaking(FoldedLayer, "to_parameters", OUT, 3),
    "out of memory measuring": breaking(ReferenceOutputs, "distances", OUT),
    "a full disk for layers": breaking(ResumeStore, "write", FULL, 10**9),
    "a full disk for the report": breaking(publishing, "write_atomically", FULL),
    "a folder that cannot be written": in_the_way,
    "Ctrl-C recording": breaking(Activations, "record", KeyboardInterrupt(), 5),
    "Ctrl-C solving": breaking(Cardinality, "solve", KeyboardInterrupt(), 30),
    "Ctrl-C swapping": halfway,
    "Ctrl-C re-estimating": breaking(batchnorm, "reestimate_preserving_output", KeyboardInterrupt()),
    "Ctrl-C measuring": breaking(ReferenceOutputs, "distances", KeyboardInterrupt()),
    "Ctrl-C writing a layer": breaking(ResumeStore, "write", KeyboardInterrupt(), 2),
    "Ctrl-C publishing": breaking(nettrim, "publish", KeyboardInterrupt()),
    "Ctrl-C in the pruned validation": breaking(nettrim, "validation", KeyboardInterrupt(), 2),
    "Ctrl-C in the dense validation": breaking(nettrim, "validation", KeyboardInterrupt()),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_network_is_never_half_pruned(failure, tmp_path, monkeypatch, caplog, capsys):
    model, callback = Net(), Remembering(sparsity=0.5)
    trainer = make_trainer(tmp_path, callback)
    handler, told = signal.getsignal(signal.SIGINT), ""
    with monkeypatch.context() as patch:
        callback.arm = partial(FAILURES[failure], patch, tmp_path)
        try:
            trainer.fit(model, datamodule=Data())
        except (Exception, SystemExit) as error:
            told = repr(error)
        finally:
            signal.signal(signal.SIGINT, handler)
    trained, now = callback.trained, state(model)
    for layer in LAYERS:
        dense = all(torch.equal(now[key], trained[key]) for key in (f"{layer}.weight", f"{layer}.bias"))
        masks = {} if callback.result is None else callback.result.masks
        whole = f"{layer}.weight" in masks and masking.satisfied(model, {f"{layer}.weight": masks[f"{layer}.weight"]})
        assert dense or whole
    assert same(now, trained) == (callback.result is None)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert told or caplog.text or "No space" in capsys.readouterr().out or callback.result is not None
    if told and callback.result is None and "validation" not in failure:
        known = ("NaN" in told, "memory" in told, "loader" in failure, "Not a directory" in told)
        assert "trained weights again" in caplog.text or any(known)
    assert not list(tmp_path.rglob("*.partial"))
    again, other = half(), Net() if callback.result is not None else model.train()
    make_trainer(tmp_path / "again", again).fit(other, train_data(), val_data())
    assert again.result is not None


@pytest.mark.parametrize("change", ["none", "corrupted", "weights", "settings"])
def test_layers_of_an_earlier_run_are_used_where_they_fit(change, tmp_path, monkeypatch, caplog):
    def run(path, data=1, **options):
        torch.manual_seed(0)
        model, callback = Net(), NetTrim(**({"sparsity": 0.5, "solver": Magnitude(), "allocate": "uniform"} | options))
        trainer = make_trainer(path, callback, max_epochs=1)
        trainer.fit(model, DataLoader(samples(96, data), batch_size=16), val_data())
        return model, callback

    with monkeypatch.context() as patch:
        patch.setattr(nettrim, "publish", lambda *args: raising(RuntimeError("cut short"))(args))
        with pytest.raises(RuntimeError, match="cut short"):
            run(tmp_path)
    files = sorted(tmp_path.rglob("layers/*.safetensors"))
    assert [file.name for file in files] == [f"{name}.safetensors" for name in LAYERS]
    if change == "corrupted":
        files[1].write_bytes(files[1].read_bytes()[:100])
    options = {"weights": {"data": 7}, "settings": {"seed": 3}}.get(change, {})
    whole, _ = run(tmp_path / "elsewhere", **options)
    caplog.clear()
    again, callback = run(tmp_path, **options)
    assert same(state(again), state(whole))
    expected = {"none": "3 results", "corrupted": "2 results"}.get(change)
    notes = (f"{expected} are those of a run that was cut short",) if expected else ()
    assert callback.result.notes == notes
    if change == "corrupted":
        assert "cannot be read" in caplog.text
    left = {"none": 0, "corrupted": 1}.get(change, 3)  # that fit no other run
    assert len(list(tmp_path.rglob("layers/*"))) == left
    assert not list(tmp_path.rglob("running"))
