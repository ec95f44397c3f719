"""Progress of a run: the current activity and the finished fraction of the current phase."""

from __future__ import annotations

from collections.abc import Callable


class Progress:
    """The current activity of a run, reported to a function.

    Args:
        report: called with the name of a phase and its finished fraction in [0, 1]; ``None`` reports nothing.

    Attributes:
        activity: description of what is currently done, for messages.
    """

    def __init__(self, report: Callable[[str, float], None] | None = None) -> None:
        self._report = report
        self.activity = "starting"

    def report(self, phase: str, fraction: float) -> None:
        """Report the finished fraction of a phase."""
        if self._report is not None:
            self._report(phase, fraction)
