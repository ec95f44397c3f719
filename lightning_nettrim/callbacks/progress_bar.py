"""Progress bar of pruning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from tqdm import tqdm

from lightning_nettrim.callbacks.lightning_package import is_a


class ProgressBar:
    """A bar for the finished fraction of a phase, with a new bar for each phase.

    Args:
        shown: whether a bar is shown.
    """

    def __init__(self, shown: bool) -> None:
        self._shown, self._phase = shown, ""
        self._bar: tqdm | None = None

    def __call__(self, phase: str, fraction: float) -> None:
        """Set the finished fraction of a phase."""
        if not self._shown:
            return
        if self._bar is None or phase != self._phase:
            self.close()
            line = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
            self._phase, self._bar = phase, tqdm(desc=f"NetTrim, {phase}", total=1.0, bar_format=line, leave=False)
        self._bar.update(fraction - self._bar.n)

    def clear(self) -> None:
        """Clear the bar for a line of text; the next update draws it again."""
        if self._bar is not None:
            self._bar.clear()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextmanager
def shown_progress(trainer: pl.Trainer) -> Iterator[ProgressBar]:
    """A `with` that yields a progress bar, shown on the first process if the Trainer shows tqdm bars.

    The Trainer's rich bar redraws the whole terminal, so that no second bar can be shown beside it.
    """
    bar = ProgressBar(is_a(trainer.progress_bar_callback, "TQDMProgressBar") and trainer.is_global_zero)
    try:
        yield bar
    finally:
        bar.close()
