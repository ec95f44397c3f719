"""Trim: record, solve and swap, for any torch module; Lightning is not needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lightning_nettrim.journal import Journal
from lightning_nettrim.layers import refuse_unusable
from lightning_nettrim.memory import GIB
from lightning_nettrim.plan import Options, as_text, check_arguments
from lightning_nettrim.prepare import Choice, Source, prepare, rows_limit
from lightning_nettrim.rehearse import Rehearsal
from lightning_nettrim.replay import Forward, call
from lightning_nettrim.report import LayerReport, Trial, TrimResult
from lightning_nettrim.solvers import Solver
from lightning_nettrim.tolerance import DENSEST, SPARSEST, sparsest
from lightning_nettrim.trained import Settings


def trim(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    epsilon: float | None = None,
    sparsity: float | None = None,
    max_drop: float | None = None,
    metric: Callable[[], float] | None = None,
    mode: Literal["max", "min"] = "max",
    relative: bool = False,
    pattern: str = "unstructured",
    allocate: Literal["uniform", "epsilon", "global", "magnitude"] = "global",
    importance: Literal["outgoing", "equal"] = "outgoing",
    scheme: Literal["cascade", "parallel"] = "cascade",
    solver: Solver | None = None,
    refit: bool = True,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    per_layer: Options | None = None,
    num_samples: int = 8192,
    max_rows: int | None = None,
    seed: int = 0,
    penalize_bias: bool = False,
    recalibrate_batchnorm: bool = True,
    max_memory: float | None = None,
    offload: Literal["device", "cpu", "disk"] = "cpu",
    on_failure: Literal["magnitude", "dense"] = "magnitude",
    folder: str | Path | None = None,
    resume_from: Sequence[str | Path] = (),
    plan: str | Path | None = None,
    dry_run: bool = False,
    on_layer: Callable[[LayerReport], None] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
    on_progress: Callable[[str, float], None] | None = None,
    distributed: bool = False,
    forward: Forward = call,
) -> TrimResult:
    """Prune a trained model in place, without retraining it.

    Each layer gets sparse weights that answer as the trained layer did, after its ReLU, on a sample of what it sees.
    Whatever interrupts this, an error or Ctrl-C, leaves every layer as it was trained.

    Args:
        model: a trained module; its parameters are changed in place, nothing else about it is.
        batches: an iterable of batches, read once: a tensor is passed as ``model(x)``, a tuple ``(input, target, …)``
            as ``model(*args)``, with as many elements as ``forward`` requires, a dict as ``model(**dict)``, with the
            entries that ``forward`` names. Tokens that a mask among the arguments of a module calls padding
            (``attention_mask``, ``src_key_padding_mask`` and the like) are left out.
        epsilon: largest change of a layer's response, relative: 0.05 is 5 % of ‖Y‖. The zeros follow from it.
        sparsity: fraction of zeros, exact to the weight. The change follows from it.
        max_drop: how far the metric may fall (``mode="min"``: rise): the sparsest network within it is found by trials.
            Where none is within, the model stays as it was trained.
        metric: of the model as it is when called, for ``max_drop``.
        mode: whether a larger or a smaller metric is better.
        relative: ``max_drop`` is a fraction of the trained model's metric.
        pattern: of the zeros: ``unstructured``, ``per_neuron``, ``n:m``, ``neuron`` or ``rxc``; see `Pattern`.
        allocate: how the zeros are spread over the layers without a budget of their own: ``uniform``, the same sparsity
            in each; ``global``, where they change the network's output least, by each layer's own effect, by magnitude
            or halfway, whichever does best in a quick rehearsal; ``epsilon``, to one relative response error;
            ``magnitude``, where the smallest weights of all are. The total is exact for single weights.
        importance: what a neuron's error counts in `Cardinality`: ``outgoing``, as the next layer's weights read it, or
            ``equal``.
        scheme: ``"cascade"`` solves layer after layer on the pruned network's signals, so that a layer makes up for the
            ones before it; ``"parallel"`` solves every layer on the trained network's signals.
        solver: the method; ``None`` is `Cardinality` at a sparsity and `ADMM`, the convex program, at an epsilon.
        refit: refit the weights on their support.
        targets: layers to prune: names, globs, ``re:`` patterns or class names; ``None`` is every layer that can be.
        ignore: layers to leave alone, by the same keys.
        per_layer: ``{key: {"epsilon" | "sparsity" | "pattern" | "refit": value}}``, in place of the common ones, and
            ``min_sparsity`` and ``max_sparsity``, bounds for ``allocate``.
        num_samples: inputs (images, sequences) to calibrate on at most; a uniform sample of the whole pass.
        max_rows: rows per layer (tokens, patches) at most; a uniform sample; ``None`` is ``num_samples``, but at least
            8192.
        seed: of that sample.
        penalize_bias: let biases be pruned like weights, the paper's way.
        recalibrate_batchnorm: re-estimate the running statistics of every BatchNorm behind a pruned layer. One that a
            layer was solved behind gets a scale and a shift with them by which it answers as solved for.
        max_memory: GiB beyond what is in use at the beginning, of the model's device (on the CPU, of the process), by
            which the rows of a layer and the layers recorded at a time are chosen; ``None`` is half of what is free.
        offload: where calibration inputs and trained responses wait: ``"device"``, ``"cpu"``, in the host's memory, or
            ``"disk"``, in temporary files. What exceeds a quarter of ``max_memory`` goes to disk in any case.
        on_failure: where a layer's solve fails (NaN, infeasible, or an answer outside its epsilon): ``"magnitude"``,
            prune it by magnitude and refit, or ``"dense"``, leave it as it is.
        folder: where each finished layer is written as it is finished, and found again by the next call with the same
            model, batches and arguments; ``None`` is nowhere.
        resume_from: other such folders, which are read only.
        plan: file of a plan that a dry run wrote, perhaps edited; in place of budgets and of layer choices.
        dry_run: choose the budgets only; the result has nothing but a ``plan``, the model stays as it is.
        on_layer: called with the report of each layer as it is finished; its ``discrepancy`` is still NaN.
        on_trial: called after each trial of ``max_drop``.
        on_progress: called with what is being done and which fraction of that is.
        distributed: all processes of torch's default group call this with the same trained model and arguments, each
            with batches of its own. They stay there, ``num_samples`` of each; all get the same network, to the bit.
        forward: called with the model and a batch, where a batch is to be passed in another way; whatever runs in it
            is recorded.

    Returns:
        The reports, masks and totals.

    Raises:
        ValueError: for arguments, models and batches that cannot be used; the model is untouched.
        RuntimeError: if another process has failed, has ended or has other weights; the model is untouched.

    References:
        Aghasi, Abdi, Romberg, "Fast Convex Pruning of Deep Neural Networks", SIAM J. Math. Data Sci. 2020.
    """
    start = time.perf_counter()
    common = check_arguments(
        epsilon=epsilon, sparsity=sparsity, max_drop=max_drop, mode=mode, pattern=pattern, allocate=allocate,
        importance=importance, scheme=scheme, solver=solver, refit=refit, per_layer=per_layer, num_samples=num_samples,
        max_rows=max_rows, penalize_bias=penalize_bias, plan=plan, max_memory=max_memory, offload=offload,
        on_failure=on_failure,
    )  # fmt: skip
    if (max_drop is None) != (metric is None):
        raise ValueError("expected max_drop and metric together, got one of them: give both")
    if dry_run and max_drop is not None:
        raise ValueError("dry_run: expected an epsilon or a sparsity, got max_drop: only its trials make its plan")
    refuse_unusable(model)
    rows = rows_limit(num_samples, max_rows)
    settings = Settings(scheme, solver, rows, seed, penalize_bias, importance, recalibrate_batchnorm, on_failure)
    source = Source(batches, num_samples, forward, distributed)
    choice = Choice(common, targets, ignore, per_layer).by_plan(model, plan)
    store = None if folder is None else partial(Journal, Path(folder), [Path(other) for other in resume_from])
    pruner = prepare(model, source, choice, settings, max_memory, offload, store)
    meter, journal = pruner.meter, pruner.journal
    assert meter is not None
    rehearsal = Rehearsal(pruner, on_progress)
    with pruner.saved():
        if metric is None:
            chosen = rehearsal.budgets(allocate, sparsity)
            result = TrimResult.of_plan(pruner.todo.skipped) if dry_run else pruner.prune(chosen, on_layer, on_progress)
            result = replace(result, plan=as_text(pruner.todo, chosen))
        else:
            result = _sparsest(
                rehearsal, metric, float(max_drop or 0), mode, relative, allocate, on_layer, on_trial, on_progress
            )
        pruner.settings.ranks.check_same(dict(chain(model.named_parameters(), model.named_buffers())))
    meter.lap()
    if journal is not None and journal.used:
        note = f"{journal.used} results are those of a run that was cut short"
        result = replace(result, notes=(*result.notes, note), reused=tuple(journal.reused))
    return replace(result, seconds=time.perf_counter() - start, peak_memory=meter.peak / GIB)


def _sparsest(
    rehearsal: Rehearsal,
    metric: Callable[[], float],
    max_drop: float,
    mode: str,
    relative: bool,
    allocate: str,
    on_layer: Callable[[LayerReport], None] | None,
    on_trial: Callable[[Trial], None] | None,
    on_progress: Callable[[str, float], None] | None,
) -> TrimResult:
    """The sparsest network within the drop, in place; the trained one if there is none."""
    pruner, mean = rehearsal.pruner, rehearsal.pruner.settings.ranks.mean
    dense = mean(metric())
    room = max_drop * (abs(dense) if relative else 1.0) + 1e-9 * max(abs(dense), 1.0)
    best: tuple[float, TrimResult, dict[str, Any]] | None = None

    def allowed(value: float) -> bool:
        return value >= dense - room if mode == "max" else value <= dense + room

    def evaluate(sparsity: float) -> float:
        nonlocal best
        chosen = rehearsal.budgets(allocate, sparsity)
        label = f"{sparsity:.4f}@"
        result = replace(pruner.prune(chosen, progress=on_progress, label=label), plan=as_text(pruner.todo, chosen))
        value = mean(metric())
        if allowed(value) and (best is None or sparsity > best[0]):
            best = sparsity, result, pruner.snapshot()
        if on_trial is not None:
            on_trial(Trial(sparsity, value, allowed(value)))
        return value

    sizes, bounds = rehearsal.room()
    if not sizes:
        raise ValueError("max_drop: expected a layer without a budget of its own, got none: take some budgets away")
    least, most = (sum(bound[i] for bound in bounds.values()) / sum(sizes.values()) for i in (0, 1))
    trials = tuple(sparsest(evaluate, allowed, ends=(max(least, SPARSEST), min(most, DENSEST))))
    if best is None:
        result = pruner.prune({name: replace(b, sparsity=0.0) for name, b in pruner.todo.budgets.items()})
    else:
        result = best[1]
        pruner.restore(best[2])
    if on_layer is not None:
        for report in result.reports:
            on_layer(report)
    return replace(result, trials=(Trial(0.0, dense, True), *trials))
