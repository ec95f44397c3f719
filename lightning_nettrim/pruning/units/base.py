"""What a selection of units is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from lightning_nettrim.calibration.batch import CalibrationBatch
    from lightning_nettrim.pruning.session import CalibrationSession
    from lightning_nettrim.pruning.units.groups import UnitGroup


@dataclass(frozen=True, eq=False)
class KeptUnits:
    """The units of one group that are kept, and how the layers that read them get their weights.

    Attributes:
        mask: ``(size,)`` bool.
        scales: ``(size,)`` factors of the weights that read each unit, in place of a solve; ``None`` solves for them.
        synthetic: ``{module: radius}`` of the modules that compute the units on random inputs up to this norm while the
            layers that read them are recorded; none with the calibration inputs.
    """

    mask: Tensor
    scales: Tensor | None = None
    synthetic: Mapping[str, float] = field(default_factory=dict)


class MeasuredUnits(ABC):
    """The units of all groups of a trained network, as a `UnitSelection` has measured them."""

    @abstractmethod
    def loss(self, group: str, count: int) -> float:
        """The loss if only so many units of a group are kept; comparable between groups."""

    @abstractmethod
    def select(self, kept: Mapping[str, int]) -> dict[str, KeptUnits]:
        """The units that are kept, ``{group: units}``, for given numbers of them; the model must be the trained one."""

    def sizes(self) -> dict[str, int]:
        """The number of units of each group, if the selection determines it."""
        raise NotImplementedError


@dataclass(frozen=True)
class UnitSelection(ABC):
    """A method that chooses which units of a network are kept.

    A frozen dataclass of numbers, so that YAML can define it.
    """

    @property
    def sets_sizes(self) -> bool:
        """Whether it determines how many units are kept, so that no budget is given."""
        return False

    @property
    def uses_synthetic_inputs(self) -> bool:
        """Whether layers are solved on random inputs instead of calibration inputs."""
        return False

    @abstractmethod
    def measure(
        self, session: CalibrationSession, batch: CalibrationBatch, groups: Mapping[str, UnitGroup]
    ) -> MeasuredUnits:
        """Measure the units of the trained network.

        Args:
            session: the trained model with its calibration data.
            batch: a small batch, in which every layer runs.
            groups: the groups of units.

        Raises:
            ValueError: for groups whose units cannot be measured.
        """
