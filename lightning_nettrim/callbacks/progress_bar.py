"""Progress: a bar for what is being done, with the time that is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from tqdm import tqdm

from lightning_nettrim.callbacks.lightning_package import is_a


class ProgressBar:
    """A bar that is called with what is being done and which fraction of it is; a new one for each thing.

    Args:
        shown: whether there is anything to be seen.
    """

    def __init__(self, shown: bool) -> None:
        self._shown, self._doing = shown, ""
        self._bar: tqdm | None = None

    def __call__(self, doing: str, fraction: float) -> None:
        """Move the bar."""
        if not self._shown:
            return
        if self._bar is None or doing != self._doing:
            self.close()
            line = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
            self._doing, self._bar = doing, tqdm(desc=f"NetTrim, {doing}", total=1.0, bar_format=line, leave=False)
        self._bar.update(fraction - self._bar.n)

    def clear(self) -> None:
        """Make room for a line; the next move draws the bar again."""
        if self._bar is not None:
            self._bar.clear()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextmanager
def shown_progress(trainer: pl.Trainer) -> Iterator[ProgressBar]:
    """A `with` in which a bar can be moved; it is shown where the trainer shows such bars, on the first process.

    Where the trainer's bar is rich's, which redraws the whole terminal, there are the lines of the layers alone.
    """
    bar = ProgressBar(is_a(trainer.progress_bar_callback, "TQDMProgressBar") and trainer.is_global_zero)
    try:
        yield bar
    finally:
        bar.close()
