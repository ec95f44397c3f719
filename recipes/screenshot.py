"""A screenshot of a run in TensorBoard, by headless Chromium: ``python -m recipes.screenshot RUN PICTURE``."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

CHROMIUM = (
    "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=60000",
)  # fmt: skip


def screenshot(run: Path, picture: Path, tags: str, size: str = "1300,520", port: int = 6126) -> None:
    """Start TensorBoard on the local host and take a screenshot of the scalars of a run.

    Args:
        run: folder of the run, which contains ``dense`` and ``pruned``.
        picture: PNG file to write.
        tags: regular expression of the tags to show.
        size: width and height in pixels.
        port: port of the server.
    """
    address = f"http://127.0.0.1:{port}/"
    serve = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run), "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(serve, stderr=subprocess.DEVNULL)
    try:
        for _ in range(60):
            try:
                urlopen(address + "data/runs").close()
                break
            except URLError:
                time.sleep(0.5)
        time.sleep(5)  # TensorBoard loads the event files after the server has started
        with tempfile.TemporaryDirectory() as profile:
            options = [f"--user-data-dir={profile}", f"--window-size={size}", f"--screenshot={picture.resolve()}"]
            page = f"{address}?darkMode=false#scalars&tagFilter={tags}"
            subprocess.run([*CHROMIUM, *options, page], check=True, capture_output=True)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--tags", default="val_")
    arguments = parser.parse_args()
    screenshot(arguments.run, arguments.picture, arguments.tags)
