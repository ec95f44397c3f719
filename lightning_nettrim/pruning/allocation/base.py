"""What an allocation is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_nettrim.pruning.budget import Budget

if TYPE_CHECKING:
    from lightning_nettrim.pruning.session import CalibrationSession


@dataclass(frozen=True)
class Allocation(ABC):
    """A strategy that distributes a common sparsity over the layers that share it.

    A frozen dataclass of numbers, so that YAML can define it.
    """

    @abstractmethod
    def allocate(self, session: CalibrationSession, sparsity: float) -> dict[str, Budget]:
        """The budget of every layer of the plan.

        `CalibrationSession.shared_sizes` are the layers that share the sparsity, `CalibrationSession.kept_bounds` their
        limits, and `CalibrationSession.budgets_keeping` turns numbers of kept weights into budgets. The model must have
        its trained weights when this returns.

        Args:
            session: the trained model with its calibration data.
            sparsity: fraction of zeros of the layers that share it, together.

        Raises:
            ValueError: if the limits of the layers leave no such budgets.
        """
