"""Publish: a result to the loggers, to the console and to files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_nettrim.callbacks.checkpoints import verify_file
from lightning_nettrim.callbacks.compare import sibling
from lightning_nettrim.callbacks.folder import release
from lightning_nettrim.callbacks.package import is_a
from lightning_nettrim.journal import clear, write_whole
from lightning_nettrim.method import chosen
from lightning_nettrim.report import TrimResult, as_json, comparison, write_histograms, write_text, write_trials


def publish(
    trainer: pl.Trainer,
    result: TrimResult,
    metrics: Mapping[str, Mapping[str, float]],
    arguments: Mapping[str, Any],
    folder: Path | None,
) -> None:
    """Scalars and tables to the loggers, the table to the console, the checkpoint and the report to files."""
    sides = (metrics.get("dense", {}), metrics.get("pruned", {}))
    compared = comparison(*sides) if all(sides) else ""
    scalars = {f"nettrim/{r.name}/{key}": value for r in result.reports for key, value in r.scalars().items()}
    totals = {f"nettrim/total/{key}": value for key, value in result.total().items() if value is not None}
    for logger in trainer.loggers:
        logger.log_metrics(scalars | totals, trainer.global_step)
        if is_a(logger, "TensorBoardLogger"):
            write_text(logger.experiment, result, compared, trainer.global_step)  # type: ignore[attr-defined]
            write_trials(logger.experiment, result, str(arguments["monitor"]))  # type: ignore[attr-defined]
        logger.save()
    trainer.print("\n".join(["", result.table(), *([""] if compared else []), compared]).rstrip())
    if folder is None:
        return
    trainer.save_checkpoint(folder / "pruned.ckpt", weights_only=False)
    if trainer.is_global_zero:
        verify_file(folder / "pruned.ckpt", result.masks)
        text = json.dumps(_report(result, metrics, arguments), indent=2, allow_nan=False)
        write_whole(folder / "report.json", f"{text}\n".encode())
        clear(folder / "layers", result.reused)
        (folder / "dense.ckpt").unlink(missing_ok=True)
        release(folder)
        _upload(trainer, folder)
    trainer.print(f"\nNetTrim: wrote {folder / 'pruned.ckpt'} and report.json beside it")


def _upload(trainer: pl.Trainer, folder: Path) -> None:
    """The files of a run as artifacts of the loggers that keep such."""
    for logger in trainer.loggers:
        own: Any = logger
        try:
            if is_a(logger, "MLFlowLogger"):
                own.experiment.log_artifacts(own.run_id, str(folder), folder.name)
            elif is_a(logger, "WandbLogger"):
                own.experiment.log_artifact(str(folder), name=f"{folder.name}-{own.version}", type="model")
        except Exception as error:  # whatever a service that cannot be reached makes its client raise
            rank_zero_warn(f"NetTrim: {type(logger).__name__} did not take {folder} as an artifact: {error}")


def publish_histograms(trainer: pl.Trainer, dense: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> None:
    """The weights before and after, as TensorBoard histograms of the sibling runs."""
    for logger, (name, weights) in product(trainer.loggers, (("dense", dense), ("pruned", pruned))):
        run = sibling(trainer, logger, name)
        if is_a(run, "TensorBoardLogger"):
            write_histograms(run.experiment, weights, trainer.global_step)
            run.finalize("success")


def warn_of_dense(trainer: pl.Trainer, folder: Path | None) -> None:
    """Say that the network at hand is the dense one, and how to get at the pruned one."""
    assert trainer.state.fn is not None
    call = f"trainer.{trainer.state.fn.value}"
    rank_zero_warn(
        "NetTrim: this is the dense network, not the pruned one"
        + (f": {call}() has loaded {trainer.ckpt_path}" if trainer.ckpt_path else "")
        + f". For the pruned network call {call}(model) right after the fit"
        + (f", or {call}(model, ckpt_path={str(folder / 'pruned.ckpt')!r})." if folder else ".")
    )


def show_plan(trainer: pl.Trainer, plan: str, folder: Path | None) -> None:
    """Print what would be pruned and what would not, and write it as YAML."""
    trainer.print(f"NetTrim would prune (dry_run, nothing was changed):\n{plan}")
    if trainer.is_global_zero and folder is not None:
        write_whole(folder / "plan.yaml", plan.encode())


def _report(
    result: TrimResult, metrics: Mapping[str, Mapping[str, float]], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    solver = chosen(arguments["solver"], arguments["epsilon"])
    settings = asdict(solver) if is_dataclass(solver) and not isinstance(solver, type) else {}
    named = {"class_path": f"{type(solver).__module__}.{type(solver).__qualname__}", "init_args": settings}
    arguments = {**arguments, "solver": named}
    packages = ("lightning_nettrim", "torch", "lightning")
    return as_json(result, metrics, arguments, {name: version(name) for name in packages})
