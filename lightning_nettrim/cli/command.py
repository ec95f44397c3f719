"""What a subcommand of ``nettrim`` is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import lightning.pytorch as pl


class Command(ABC):
    """A subcommand of ``nettrim``, which is given the Trainer, the model and the data of the configuration.

    A subclass overrides `run` with further parameters, which become options; their types and their help texts are taken
    from the signature and the docstring.

    Attributes:
        name: on the command line.
    """

    name: ClassVar[str]

    @abstractmethod
    def run(
        self, trainer: pl.Trainer, model: pl.LightningModule, datamodule: pl.LightningDataModule | None, **options: Any
    ) -> None:
        """Run the subcommand; the first line of this docstring is its description in the help.

        Args:
            trainer: as configured, with its callbacks.
            model: as configured.
            datamodule: as configured; ``None`` without one.
            **options: the options of the subcommand.
        """
