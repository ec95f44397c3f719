"""The command line ``nettrim``: LightningCLI, with the subcommands of this package."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from lightning_nettrim.cli.command import Command

__all__ = ["Command", "main"]


def main(args: list[str] | None = None, commands: Sequence[type[Command]] = ()) -> None:
    """Run ``nettrim fit|validate|test|predict`` or another subcommand, configured in YAML or by options.

    Models and data are given by class path; the current folder is importable.

    Args:
        args: arguments of the command line; ``None`` is those of the process.
        commands: further subcommands.

    Raises:
        SystemExit: if the extra ``cli`` is not installed.
    """
    if find_spec("jsonargparse") is None:
        raise SystemExit("nettrim needs jsonargparse: pip install 'lightning_nettrim[cli]'")
    from lightning_nettrim.cli.lightning_cli import NetTrimCLI

    sys.path.insert(0, os.getcwd())
    NetTrimCLI.run(args, commands)
