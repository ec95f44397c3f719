"""Further epochs of the user's own training loop, on the pruned network."""

from __future__ import annotations

import math
from contextlib import ExitStack
from itertools import zip_longest
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_nettrim.callbacks.checkpoints import averaged_models
from lightning_nettrim.callbacks.lightning_package import is_a

FINISHED = ("StochasticWeightAveraging", "ModelPruning")
"""Callbacks that have done their work when training ends; in further epochs they would replace weights."""

LOWEST_RATE = 0.1
"""Fraction of the highest learning rate of the training that fine-tuning uses at least."""

Rates = list[list[float]]
"""The learning rate of each parameter group of each optimizer."""


class FineTuning:
    """The epochs after pruning: limits of the loop, learning rates, and what is needed to resume them.

    The fit loop of the Trainer is run once more, so that every hook, callback and logger takes part. Exactly
    ``epochs`` epochs are run: they are the loop's minimum, too, so that nothing that has ended the training, such as
    early stopping or a time limit, ends them. The state of the optimizers is kept. Schedulers stand still, as many
    have come to their end, and the learning rates are constant.

    Args:
        epochs: number of epochs; 0 trains nothing.
        lr: learning rate of all parameters; ``None`` is that at the end of the training, but at least a tenth of the
            highest one.
        enforce: whether zeros stay zero, which these epochs need.

    Raises:
        MisconfigurationException: naming the option.
    """

    def __init__(self, epochs: int, lr: float | None, enforce: bool) -> None:
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
            raise MisconfigurationException(f"NetTrim: finetune_epochs: expected an integer >= 0, got {epochs!r}")
        if lr is not None and (isinstance(lr, bool) or not isinstance(lr, float | int) or not 0 < lr < math.inf):
            raise MisconfigurationException(f"NetTrim: finetune_lr: expected a number > 0 or None, got {lr!r}")
        if lr is not None and not epochs:
            raise MisconfigurationException(f"NetTrim: finetune_lr={lr:g}: expected finetune_epochs with it, got 0")
        if epochs and not enforce:
            raise MisconfigurationException(
                f"NetTrim: finetune_epochs={epochs}: expected enforce=True with it, which keeps the zeros, got False"
            )
        self.epochs, self.lr = epochs, lr
        self._highest: Rates = []
        self._begun: dict[str, Any] | None = None
        self._trainer: pl.Trainer | None = None  # of a fit in progress
        self._changes = ExitStack()

    @property
    def begun(self) -> bool:
        """Whether a pruned network is to be trained, or trained further."""
        return self._begun is not None

    @property
    def results(self) -> dict[str, Any]:
        """The results of pruning that were given when these epochs began."""
        assert self._begun is not None
        return self._begun["results"]

    def forget(self) -> None:
        """Forget the state of a fit, and restore what was changed in the Trainer."""
        self.restore()
        self._highest, self._begun = [], None

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"highest_rates": self._highest, "begun": self._begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of a checkpoint, which some strategies load before and others after ``on_fit_start``."""
        self._highest, self._begun = state["highest_rates"], state["begun"] if self.epochs else None
        if self._trainer is not None:
            self._extend(self._trainer)

    def attach(self, trainer: pl.Trainer) -> None:
        """Extend the limits of a fit that resumes these epochs, before Lightning compares them with the checkpoint."""
        self._trainer = trainer
        self._extend(trainer)

    def observe(self, trainer: pl.Trainer) -> None:
        """Keep the highest learning rates of the training, before each of its steps."""
        if self.epochs and not self.begun:
            self._highest = _larger(rates(trainer), self._highest)

    def begin(self, trainer: pl.Trainer, results: dict[str, Any]) -> None:
        """Begin after pruning.

        Args:
            trainer: at the end of the training.
            results: of pruning, which a resumed fit needs.
        """
        self._begun = {"first_epoch": _finished_epochs(trainer), "rates": rates(trainer), "results": results}
        for average in averaged_models(trainer):
            average.n_averaged.zero_()  # averages are those of these epochs

    def run(self, trainer: pl.Trainer) -> None:
        """Run the epochs, with ``on_train_start`` and ``on_train_end`` of everything that takes part."""
        self._extend(trainer)
        self._set_aside(trainer)
        loop: Any = trainer.fit_loop
        loop.restarting = loop._resuming_from_checkpoint = False  # they are set if it was resumed after its last batch
        loop.run()

    def start(self, trainer: pl.Trainer) -> None:
        """In ``on_train_start``: set the learning rates and suspend the schedulers."""
        assert self._begun is not None
        self._set_aside(trainer)
        for config in trainer.lr_scheduler_configs:
            self._change(config, "scheduler", Suspended(config.scheduler))
        set_rates(trainer, self._rates())
        first, last = _finished_epochs(trainer), self._begun["first_epoch"] + self.epochs - 1
        rank_zero_info(
            f"NetTrim: fine-tuning the pruned network, epochs {first} to {last}, learning rate {self._shown_rates()}"
        )

    def end(self, trainer: pl.Trainer) -> None:
        """Restore limits, learning rates, schedulers and callbacks."""
        assert self._begun is not None
        set_rates(trainer, self._begun["rates"])
        self.restore()
        self._begun = None

    def restore(self) -> None:
        """Restore what was changed in the Trainer."""
        self._changes.close()
        self._trainer = None

    def line(self) -> str:
        """One line for the report."""
        return (
            f"fine-tuned for {self.epochs} epochs, learning rate {self._shown_rates()}: the errors are those of the"
            " pruned network before them"
        )

    def _rates(self) -> Rates:
        """The learning rates of these epochs."""
        assert self._begun is not None
        if self.lr is not None:
            return [[float(self.lr)] * len(groups) for groups in self._begun["rates"]]
        lowest = [[LOWEST_RATE * rate for rate in groups] for groups in self._highest]
        return _larger(self._begun["rates"], lowest)

    def _shown_rates(self) -> str:
        return ", ".join(sorted({f"{rate:g}" for groups in self._rates() for rate in groups}))

    def _extend(self, trainer: pl.Trainer) -> None:
        if self._begun is None:
            return
        loop, last = trainer.fit_loop, self._begun["first_epoch"] + self.epochs
        self._change(loop, "max_epochs", last)
        self._change(loop, "min_epochs", last)
        self._change(loop.epoch_loop, "max_steps", -1)
        self._change(trainer, "should_stop", False)

    def _set_aside(self, trainer: pl.Trainer) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if any(is_a(each, *FINISHED) for each in callbacks):
            self._change(trainer, "callbacks", [each for each in callbacks if not is_a(each, *FINISHED)])

    def _change(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute until `restore`."""
        self._changes.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)


def _finished_epochs(trainer: pl.Trainer) -> int:
    """The number of epochs that the fit loop compares with its limit."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return progress.processed


class Suspended:
    """A scheduler that can be read and saved, and does nothing when it is stepped."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    step_update = step  # of timm's schedulers

    def __getattr__(self, name: str) -> Any:
        """An attribute of the scheduler."""
        return getattr(self._scheduler, name)


def _larger(values: Rates, others: Rates) -> Rates:
    """The larger one of each pair of rates; a parameter group that the others do not have keeps its rate."""
    none: list[float] = []
    return [
        [max(pair) for pair in zip_longest(groups, own[: len(groups)], fillvalue=0.0)]
        for groups, own in zip_longest(values, others[: len(values)], fillvalue=none)
    ]


def rates(trainer: pl.Trainer) -> Rates:
    """The learning rates of all parameter groups."""
    return [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in trainer.optimizers]


def set_rates(trainer: pl.Trainer, values: Rates) -> None:
    """Set the learning rates of parameter groups, in place where they are tensors; added groups keep theirs."""
    for optimizer, own in zip(trainer.optimizers, values, strict=True):
        for group, value in zip(optimizer.param_groups, own, strict=False):
            if isinstance(group["lr"], Tensor):
                with torch.no_grad():
                    group["lr"].fill_(value)
            else:
                group["lr"] = value
