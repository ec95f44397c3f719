"""Tensors are stored on their device, in host memory or on disk."""

from __future__ import annotations

import gc

import pytest
import torch

from lightning_nettrim.runtime.offload import TensorStore


@pytest.mark.parametrize(("offload", "capacity"), [("disk", float("inf")), ("cpu", 1000.0)])
def test_tensors_on_disk_are_loaded_unchanged_and_their_files_are_removed(tmp_path, monkeypatch, offload, capacity):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = TensorStore(offload, capacity)
    tensors = [torch.randn(100, 3), torch.arange(100), torch.ones(100, dtype=torch.bool), torch.ones(2).bfloat16()]
    stored = store.put(tensors)
    assert store.size == 0
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert all(torch.equal(a, b) for a, b in zip(stored.load(), tensors, strict=True))
    del stored
    gc.collect()
    assert not list(tmp_path.rglob("*.safetensors"))
    del store
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("offload", ["device", "cpu"])
def test_tensors_in_memory_are_not_copied(offload):
    tensor = torch.randn(3, requires_grad=True)
    (loaded,) = TensorStore(offload).put([tensor]).load()
    assert loaded.data_ptr() == tensor.data_ptr()
    assert not loaded.requires_grad


def test_the_size_is_that_of_the_tensors_that_are_kept_in_memory():
    store = TensorStore("cpu", 1000)
    stored = [store.put([torch.ones(100)]) for _ in range(2)]
    assert store.size == 800
    stored.pop()
    gc.collect()
    assert store.size == 400


def test_tensors_that_exceed_the_capacity_are_written_to_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = TensorStore("cpu", 1000)
    stored = [store.put([torch.full((100,), float(i))]) for i in range(4)]
    assert store.size == 800
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    assert [float(s.load()[0][0]) for s in stored] == [0, 1, 2, 3]


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_freed_memory_is_released_from_time_to_time(monkeypatch, offload):
    released = []
    monkeypatch.setattr("lightning_nettrim.runtime.offload.RELEASE_EVERY", 4000)
    monkeypatch.setattr(
        "lightning_nettrim.runtime.offload.release_freed_memory", lambda: released.append(len(stored) + len(loaded))
    )
    store, stored, loaded = TensorStore(offload), [], []
    for _ in range(10):
        stored.append(store.put([torch.ones(200)]))
    assert released == [5]
    released.clear()
    for item in stored:
        loaded += item.load()
    assert released == ([] if offload == "cpu" else [10, 15])  # a file is a little longer than its tensors
    assert all(torch.equal(t, torch.ones(200)) for t in loaded)


def test_other_targets_are_refused():
    with pytest.raises(ValueError, match="offload: expected 'device' or 'cpu' or 'disk', got 'gpu'"):
        TensorStore("gpu")
