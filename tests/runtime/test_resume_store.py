"""The results of an interrupted run on disk."""

from __future__ import annotations

import errno
from dataclasses import dataclass

import pytest
import torch
from damaged_files import DAMAGES, damage

from lightning_nettrim.runtime.distributed import ProcessGroup
from lightning_nettrim.runtime.resume import ResumeStore, remove_entries

TENSORS = {"fc.weight": torch.randn(3, 4), "fc.mask": torch.ones(3, dtype=torch.bool), "half": torch.ones(2).half()}
METADATA = {"error": 0.1, "names": ["a", "b"], "nothing": None}


@dataclass(frozen=True)
class WithOther(ProcessGroup):
    """One of two processes; the other one has always found an entry, or never."""

    count: int = 2
    other: bool = True

    def gather(self, value):
        return [value, not self.other]  # of ``any(not found)``


def equal(entry):
    tensors, metadata = entry
    same = all(
        torch.equal(tensors[name], value) and tensors[name].dtype == value.dtype for name, value in TENSORS.items()
    )
    return list(tensors) == sorted(TENSORS) and same and metadata == METADATA


def test_an_entry_is_read_back_by_its_name_and_cause(tmp_path):
    ResumeStore(tmp_path / "run").write("block.fc", "key", TENSORS, METADATA)
    store = ResumeStore(tmp_path / "run")
    assert equal(store.read("block.fc", "key"))
    assert store.used == 1
    assert store.reused == []
    assert store.read("block", "key") is None
    assert store.read("block.fc", "another cause") is None
    assert store.used == 1


def test_entries_of_the_same_run_do_not_count_as_used(tmp_path):
    store = ResumeStore(tmp_path)
    store.write("fc", "key", TENSORS, METADATA)
    assert equal(store.read("fc", "key"))
    assert store.used == 0


def test_a_later_entry_replaces_an_earlier_one(tmp_path):
    store = ResumeStore(tmp_path)
    store.write("fc", "key", {}, 1)
    store.write("fc", "key", {}, 2)
    assert store.read("fc", "key") == ({}, 2)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["", "a/b", "curve@block.fc-1", "ü"])
def test_any_name_is_a_file_name(tmp_path, name):
    store = ResumeStore(tmp_path)
    store.write(name, "key", {}, name)
    assert store.read(name, "key") == ({}, name)
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".safetensors"


def test_an_entry_with_another_cause_is_reported(tmp_path, caplog):
    ResumeStore(tmp_path).write("fc", "key", {}, 1)
    assert ResumeStore(tmp_path).read("fc", "other") is None
    assert "with another network, other data or other settings: it is computed again" in caplog.text


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_entry_is_not_read(tmp_path, caplog, how):
    ResumeStore(tmp_path).write("5", "key", TENSORS, METADATA)
    (path,) = tmp_path.iterdir()
    damage(path, how)
    assert ResumeStore(tmp_path).read("5", "key") is None
    assert "5.safetensors cannot be read" in caplog.text


@pytest.mark.parametrize("cause", ["full", "blocked"])
def test_a_run_continues_if_nothing_can_be_written(tmp_path, monkeypatch, caplog, cause):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "folder"
    if cause == "full":
        monkeypatch.setattr("os.fsync", full)
    else:
        folder.write_text("a file instead of a folder")
    store = ResumeStore(folder)
    for name in ("a", "b"):
        store.write(name, "key", TENSORS, METADATA)
        assert store.read(name, "key") is None
    assert caplog.text.count("cannot be written") == 1
    assert not list(tmp_path.rglob("*.partial"))


def test_entries_of_other_folders_are_read_and_not_changed(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    ResumeStore(first).write("fc", "key", TENSORS, METADATA)
    before = [(path.name, path.stat().st_mtime_ns) for path in first.iterdir()]
    store = ResumeStore(second, [first, second])
    assert equal(store.read("fc", "key"))
    assert store.reused == [first / "fc.safetensors"]
    store.write("fc", "key", {}, 1)
    assert store.read("fc", "key") == ({}, 1)
    assert [(path.name, path.stat().st_mtime_ns) for path in first.iterdir()] == before


def test_an_entry_is_read_by_all_processes_or_by_none(tmp_path):
    ResumeStore(tmp_path).write("fc", "key", {}, 1)
    assert ResumeStore(tmp_path, processes=WithOther()).read("fc", "key") == ({}, 1)
    assert ResumeStore(tmp_path, processes=WithOther(other=False)).read("fc", "key") is None


def test_only_process_0_writes(tmp_path):
    ResumeStore(tmp_path, processes=ProcessGroup(2, 1)).write("fc", "key", {}, 1)
    assert not list(tmp_path.iterdir())


def test_the_entries_of_a_finished_run_are_removed(tmp_path):
    run, earlier, other = tmp_path / "run", tmp_path / "earlier", tmp_path / "other"
    for folder in (run, earlier, other):
        ResumeStore(folder).write("fc", "key", {}, 1)
    (run / "fc.safetensors.0123.partial").touch()
    (other / "notes.txt").touch()
    remove_entries(run, [earlier / "fc.safetensors", other / "fc.safetensors"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["notes.txt", "other"]
    remove_entries(run)
