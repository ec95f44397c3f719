"""A picture of a run as TensorBoard shows it, by headless Chromium: ``python -m recipes.screenshot RUN PICTURE``."""

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
    """Serve ``run`` on this machine alone and photograph the page of its scalars.

    Args:
        run: a run's folder, with ``dense`` and ``pruned`` in it.
        picture: PNG file to write.
        tags: regular expression of the tags to show.
        size: width and height in pixels.
        port: of the server.
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
        time.sleep(5)  # TensorBoard reads the event files after it has begun to serve
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
