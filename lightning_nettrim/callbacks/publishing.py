"""Publishing of a result: to the loggers, to the console and to files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_nettrim.callbacks.checkpoints import remove, verify_file
from lightning_nettrim.callbacks.lightning_package import is_a
from lightning_nettrim.callbacks.run_folder import release
from lightning_nettrim.callbacks.validation import sibling
from lightning_nettrim.compaction import CompactionReport, save_without_channels
from lightning_nettrim.pruning.config import PruningConfig
from lightning_nettrim.pruning.report_json import to_json
from lightning_nettrim.pruning.results import PruningResult, comparison
from lightning_nettrim.runtime.files import write_atomically
from lightning_nettrim.runtime.resume import remove_entries
from lightning_nettrim.runtime.sharded import full

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PACKAGES = ("lightning_nettrim", "torch", "lightning")
"""Packages whose versions are in the report."""


def publish(
    trainer: pl.Trainer,
    result: PruningResult,
    metrics: Mapping[str, Mapping[str, float]],
    config: PruningConfig,
    arguments: Mapping[str, Any],
    folder: Path | None,
    report_compaction: Callable[[pl.LightningModule], CompactionReport] | None = None,
) -> None:
    """Write scalars and tables to the loggers, the table to the console, the checkpoint and the report to files.

    Args:
        trainer: of the pruned network.
        result: of pruning.
        metrics: of the ``dense``, the ``pruned`` and, if there is one, the ``finetuned`` network.
        config: the options of pruning.
        arguments: further arguments of the callback, for the report.
        folder: of the files; ``None`` writes none.
        report_compaction: measures what the network without its unread units saves; ``None`` for other patterns.
    """
    compared = comparison(metrics) if len(metrics) > 1 and all(metrics.values()) else ""
    scalars = {f"nettrim/{r.name}/{key}": value for r in result.reports for key, value in r.scalars().items()}
    totals = {f"nettrim/total/{key}": value for key, value in result.total().items() if value is not None}
    for logger in trainer.loggers:
        logger.log_metrics(scalars | totals, trainer.global_step)
        if is_a(logger, "TensorBoardLogger"):
            _write_text(logger.experiment, result, compared, trainer.global_step)  # type: ignore[attr-defined]
            _write_trials(logger.experiment, result, str(arguments["monitor"]))  # type: ignore[attr-defined]
        logger.save()
    trainer.print("\n".join(["", result.table(), *([""] if compared else []), compared]).rstrip())
    compaction = None
    if report_compaction is not None and trainer.is_global_zero:
        compaction = _publish_compaction(trainer, report_compaction)
    if folder is None:
        return
    trainer.save_checkpoint(folder / "pruned.ckpt", weights_only=False)
    if trainer.is_global_zero:
        verify_file(folder / "pruned.ckpt", result.masks)
        content = to_json(
            result, metrics, _arguments(config) | dict(arguments), {name: version(name) for name in PACKAGES}
        )
        write_atomically(folder / "report.json", f"{json.dumps(content, indent=2, allow_nan=False)}\n".encode())
        if compaction is not None:
            save_without_channels(trainer.lightning_module, compaction.removed, folder / "compact.safetensors")
        remove_entries(folder / "layers", result.reused)
        remove(folder / "dense.ckpt")
        release(folder)
        _upload(trainer, folder)
    beside = "report.json" if compaction is None else "report.json and compact.safetensors"
    trainer.print(f"\nNetTrim: wrote {folder / 'pruned.ckpt'} and {beside} beside it")


def _publish_compaction(
    trainer: pl.Trainer, report: Callable[[pl.LightningModule], CompactionReport]
) -> CompactionReport | None:
    """Print and log what the network without its unread units saves; warn and return ``None`` if that fails."""
    try:
        found = report(trainer.lightning_module)
    except Exception as error:  # of any kind, from the forward pass of another module
        rank_zero_warn(f"NetTrim: the pruned network was not made compact: {type(error).__name__}: {error}")
        return None
    trainer.print(f"\n{found.table()}")
    scalars = {
        f"nettrim/{side}/{name.replace(' ', '_')}": value
        for side, size in (("all_units", found.before), ("compact", found.after))
        for name, value in size.numbers().items()
    }
    for logger in trainer.loggers:
        logger.log_metrics(scalars, trainer.global_step)
    return found


def _upload(trainer: pl.Trainer, folder: Path) -> None:
    """Upload the files of a run to the loggers that store artifacts."""
    for logger in trainer.loggers:
        own: Any = logger
        try:
            if is_a(logger, "MLFlowLogger"):
                own.experiment.log_artifacts(own.run_id, str(folder), folder.name)
            elif is_a(logger, "WandbLogger"):
                own.experiment.log_artifact(str(folder), name=f"{folder.name}-{own.version}", type="model")
        except Exception as error:  # of any kind, if the service cannot be reached
            rank_zero_warn(f"NetTrim: {type(logger).__name__} has not stored {folder} as an artifact: {error}")


def publish_histograms(trainer: pl.Trainer, weights_of: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write weights as TensorBoard histograms of the sibling runs.

    Args:
        trainer: in a ``fit`` or a ``validate``.
        weights_of: ``{sibling run: {parameter name: weight}}``.
    """
    for logger, (name, weights) in product(trainer.loggers, weights_of.items()):
        run = sibling(trainer, logger, name)
        if is_a(run, "TensorBoardLogger"):
            _write_histograms(run.experiment, weights, trainer.global_step)
            run.finalize("success")


def warn_of_dense(trainer: pl.Trainer, folder: Path | None) -> None:
    """Warn that this is the dense network, and say how to use the pruned one."""
    assert trainer.state.fn is not None
    call = f"trainer.{trainer.state.fn.value}"
    rank_zero_warn(
        "NetTrim: this is the dense network, not the pruned one"
        + (f": {call}() has loaded {trainer.ckpt_path}" if trainer.ckpt_path else "")
        + f". For the pruned network call {call}(model) right after the fit"
        + (f", or {call}(model, ckpt_path={str(folder / 'pruned.ckpt')!r})." if folder else ".")
    )


def show_plan(trainer: pl.Trainer, plan: str, folder: Path | None) -> None:
    """Print which layers would be pruned, and write the plan as YAML."""
    trainer.print(f"NetTrim would prune (dry_run, nothing was changed):\n{plan}")
    if trainer.is_global_zero and folder is not None:
        write_atomically(folder / "plan.yaml", plan.encode())


def _arguments(config: PruningConfig) -> dict[str, Any]:
    """The options as primitives, the solver as its class path with arguments."""
    arguments = {field.name: getattr(config, field.name) for field in fields(config)}
    arguments["solver"] = config.solver_for(config.epsilon)
    return {name: _class_path(value) if is_dataclass(value) else value for name, value in arguments.items()}


def _class_path(value: Any) -> dict[str, Any]:
    kind = type(value)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": asdict(value)}


def _write_text(writer: SummaryWriter, result: PruningResult, metrics: str, step: int) -> None:
    """The tables, as TensorBoard text under ``nettrim/table``."""
    blocks = [block for block in (metrics, result.table()) if block]
    writer.add_text("nettrim/table", "\n\n".join("    " + b.replace("\n", "\n    ") for b in blocks), step)


def _write_trials(writer: SummaryWriter, result: PruningResult, monitor: str) -> None:
    """The curve of the metric against the sparsity, with steps of 0.01 %."""
    for trial in sorted(result.trials, key=lambda trial: trial.sparsity):
        writer.add_scalar(f"nettrim/trials/{monitor}", trial.metric, round(1e4 * trial.sparsity))


def _write_histograms(writer: SummaryWriter, weights: Mapping[str, Tensor], step: int) -> None:
    """One histogram per parameter under ``nettrim/<parameter>``, with a slash before its last part."""
    for name, weight in weights.items():
        tag = name.replace(".weight", "/weight").replace(".bias", "/bias")
        writer.add_histogram(f"nettrim/{tag}", full(weight), step)
