"""The folder of a run: each run has its own, and unfinished ones are found again if nobody works in them."""

import socket
import subprocess
import sys

from trainers import LIGHTNING_WARNINGS, MetricsNet, half, make_trainer

from lightning_nettrim.callbacks import run_folder

pytestmark = LIGHTNING_WARNINGS


def test_runs_without_a_logger_have_folders_of_their_own(tmp_path):
    folders = []
    for _ in range(3):
        make_trainer(tmp_path, callback := half()).fit(MetricsNet())
        folders.append(callback.folder)
    assert [each.name for each in folders] == ["nettrim", "nettrim_1", "nettrim_2"]
    assert all({path.name for path in each.iterdir()} == {"pruned.ckpt", "report.json"} for each in folders)


def test_layers_of_a_run_that_is_still_running_are_not_found(tmp_path):
    def found_beside(process):
        """A folder that a process has claimed, and the interrupted runs that another run finds."""
        trainer = make_trainer(tmp_path)
        trainer.strategy.connect(MetricsNet())
        claimed = run_folder.claim(trainer)
        (claimed / "layers").mkdir()
        if process is not None:
            (claimed / "running").write_text(f"{socket.gethostname()} {process}")
        return claimed, [path.parent for path in run_folder.interrupted(trainer, run_folder.claim(trainer))]

    own, found = found_beside(None)
    assert found == [own]
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        running, found = found_beside(other.pid)
        assert running not in found
    finally:
        other.communicate(b"\n")
    assert running in [path.parent for path in run_folder.interrupted(make_trainer(tmp_path), own)]
