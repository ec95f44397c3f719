"""The command line: LightningCLI, with the folder it is run in importable."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec


def main(args: list[str] | None = None) -> None:
    """Run ``nettrim fit|validate|test|predict``; models and data are named by class path, in YAML or as options.

    Args:
        args: in place of the process's own arguments.

    Raises:
        SystemExit: with a hint, where the extra ``cli`` is not installed.
    """
    if find_spec("jsonargparse") is None:
        raise SystemExit("nettrim needs jsonargparse: pip install 'lightning_nettrim[cli]'")
    from lightning.pytorch.cli import LightningCLI

    sys.path.insert(0, os.getcwd())
    LightningCLI(args=args, seed_everything_default=0)
