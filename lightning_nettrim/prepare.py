"""Prepare: the pruner of a trained model and its calibration set, and a quick check that it can work."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lightning_nettrim.journal import Journal
from lightning_nettrim.layers import prunable
from lightning_nettrim.memory import FRACTION, GIB, Meter, beside, free
from lightning_nettrim.plan import Budget, Options, choose, coverage, read
from lightning_nettrim.prune import Pruner
from lightning_nettrim.ranks import ALONE, Group, Ranks
from lightning_nettrim.replay import Forward, call
from lightning_nettrim.sample import hold
from lightning_nettrim.shelf import Shelf
from lightning_nettrim.trained import Settings

log = logging.getLogger(__name__)

ROWS = 8192
"""Rows of a layer, if nothing is said and there are no more inputs than that."""

CHECKED_INPUTS, CHECKED_ROWS = 64, 256
"""Inputs and rows of a layer in a check."""


def rows_limit(num_samples: int, max_rows: int | None) -> int:
    """Rows of a layer at most: ``max_rows``, else as many as inputs, but at least ROWS."""
    return max(num_samples, ROWS) if max_rows is None else max_rows


@dataclass(frozen=True, eq=False)
class Source:
    """Where calibration inputs come from.

    Attributes:
        batches: read once.
        num_samples: inputs at most.
        forward: runs a batch through a model.
        distributed: whether each process of torch's default group has batches of its own.
    """

    batches: Iterable[Any]
    num_samples: int
    forward: Forward = call
    distributed: bool = False


@dataclass(frozen=True)
class Choice:
    """Which layers are to be pruned and how far, as `choose` takes it."""

    common: Budget
    targets: Sequence[str] | None = None
    ignore: Sequence[str] | None = None
    per_layer: Options | None = None

    def by_plan(self, model: nn.Module, plan: str | Path | None) -> Choice:
        """The same, or what the file of a plan says in its place.

        Raises:
            ValueError: for a file that holds no plan of this model, and for other choices beside it.
        """
        if plan is None:
            return self
        if not self.targets == self.ignore == self.per_layer is None:
            raise ValueError("plan: expected no targets, ignore or per_layer beside it, got some: edit the plan")
        options = read(plan, prunable(model)[0])
        return replace(self, targets=list(options), per_layer=options)


def prepare(
    model: nn.Module,
    source: Source,
    choice: Choice,
    settings: Settings,
    max_memory: float | None = None,
    offload: str = "cpu",
    journal: Callable[[Ranks], Journal] | None = None,
) -> Pruner:
    """Sample the inputs, see how they flow through the model, and record what its layers answer.

    Args:
        model: trained.
        source: of calibration inputs.
        choice: of layers.
        settings: how to prune; the processes that take part are put in.
        max_memory: GiB; ``None`` is half of what is free.
        offload: where inputs and responses wait.
        journal: the store of finished layers, of some processes.

    Raises:
        ValueError: for models and batches that cannot be used.
        RuntimeError: if another process has failed, has ended or has other weights.
    """
    device = next(model.parameters()).device
    limit, meter = free(device) * FRACTION if max_memory is None else max_memory * GIB, Meter(device)
    on_device = offload == "device" or device.type == "cpu"
    shelf = Shelf(offload, limit / 4 if on_device else math.inf)
    ranks = Group.of(model) if source.distributed else ALONE
    ranks.check_same(dict(model.named_parameters()))
    ranks.share(model.buffers())
    with ranks.together():
        held = hold(model, source.batches, source.num_samples, settings.seed, shelf, source.forward)
    meter.lap()  # what the holding took for a while is not there any more
    todo = choose(model, held, choice.common, choice.targets, choice.ignore, choice.per_layer, ranks)
    waits = shelf.room - shelf.size if on_device else 0.0
    rows = {name: min(count, settings.max_rows) for name, count in todo.rows.items()}
    held_too = beside(todo.layers, rows, waits, settings.scheme == "parallel")
    room = min(ranks.gather(limit - meter.lap() - held_too))
    settings = replace(settings, ranks=ranks)
    pruner = Pruner(model, todo, held, settings, room, shelf, journal and journal(ranks), meter)
    if warning := coverage(todo):
        log.warning("NetTrim: %s", warning)
        pruner.notes.append(warning)
    return pruner


def precheck(model: nn.Module, source: Source, choice: Choice, settings: Settings) -> None:
    """Record a batch and solve for the smallest layer, so that what cannot work fails now; nothing is changed.

    Raises:
        ValueError: for models and batches that cannot be used.
        RuntimeError: if another process has failed, has ended or has other weights.
    """
    source = replace(source, num_samples=CHECKED_INPUTS)
    pruner = prepare(model, source, choice, replace(settings, max_rows=CHECKED_ROWS))
    budgets = pruner.todo.budgets
    name = min(budgets, key=lambda name: pruner.todo.layers[name].parameter.numel())
    budget = replace(budgets[name], sparsity=0.5) if budgets[name].sparsity == 0 else budgets[name]
    pruner.attempt(name, budget)
