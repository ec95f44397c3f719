"""Publish: a result to the loggers, to the console and to files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_nettrim.callbacks.compare import sibling
from lightning_nettrim.journal import Journal, write_whole
from lightning_nettrim.method import chosen
from lightning_nettrim.report import TrimResult, as_json, comparison, write_histograms, write_text, write_trials


def folder(trainer: pl.Trainer) -> Path | None:
    """``<log_dir>/nettrim``; None where a trainer is not meant to write anything."""
    if trainer.fast_dev_run or trainer.barebones or trainer.log_dir is None:  # type: ignore[attr-defined]
        return None
    return Path(trainer.log_dir) / "nettrim"


def finished_layers(trainer: pl.Trainer) -> dict[str, Any]:
    """Where `trim` writes each layer as it is finished, and where runs beside this one did; nothing where it must not.

    A logger that numbers its runs gives a new folder to the one that is to go on.
    """
    if (where := folder(trainer)) is None:
        return {}
    earlier = sorted(where.parent.parent.glob("version_*/nettrim/layers"), key=os.path.getmtime, reverse=True)
    return {"folder": where / "layers", "resume_from": earlier}


def publish(
    trainer: pl.Trainer,
    result: TrimResult,
    metrics: Mapping[str, Mapping[str, float]],
    arguments: Mapping[str, Any],
    save: bool,
) -> None:
    """Scalars and tables to the loggers, the table to the console, the checkpoint and the report to files."""
    sides = (metrics.get("dense", {}), metrics.get("pruned", {}))
    compared = comparison(*sides) if all(sides) else ""
    scalars = {f"nettrim/{r.name}/{key}": value for r in result.reports for key, value in r.scalars().items()}
    totals = {f"nettrim/total/{key}": value for key, value in result.total().items() if value is not None}
    for logger in trainer.loggers:
        logger.log_metrics(scalars | totals, trainer.global_step)
        if isinstance(logger, TensorBoardLogger):
            write_text(logger.experiment, result, compared, trainer.global_step)
            write_trials(logger.experiment, result, str(arguments["monitor"]))
        logger.save()
    trainer.print("\n".join(["", result.table(), *([""] if compared else []), compared]).rstrip())
    if save and (where := folder(trainer)) is not None:
        trainer.save_checkpoint(where / "pruned.ckpt")
        if trainer.is_global_zero:
            text = json.dumps(_report(result, metrics, arguments), indent=2, allow_nan=False)
            write_whole(where / "report.json", f"{text}\n".encode())
            Journal(where / "layers").clear()
        trainer.print(f"\nNetTrim: wrote {where / 'pruned.ckpt'} and report.json beside it")


def publish_histograms(trainer: pl.Trainer, dense: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> None:
    """The weights before and after, as TensorBoard histograms of the sibling runs."""
    for logger, (name, weights) in product(trainer.loggers, (("dense", dense), ("pruned", pruned))):
        run = sibling(logger, name)
        if isinstance(run, TensorBoardLogger):
            write_histograms(run.experiment, weights, trainer.global_step)
            run.finalize("success")


def warn_of_dense(trainer: pl.Trainer) -> None:
    """Say that the network at hand is the dense one, and how to get at the pruned one."""
    assert trainer.state.fn is not None
    call, where = f"trainer.{trainer.state.fn.value}", folder(trainer)
    rank_zero_warn(
        "NetTrim: this is the dense network, not the pruned one"
        + (f": {call}() has loaded {trainer.ckpt_path}" if trainer.ckpt_path else "")
        + f". For the pruned network call {call}(model) right after the fit"
        + (f", or {call}(model, ckpt_path={str(where / 'pruned.ckpt')!r})." if where else ".")
    )


def show_plan(trainer: pl.Trainer, plan: str, save: bool) -> None:
    """Print what would be pruned and what would not, and write it as YAML."""
    trainer.print(f"NetTrim would prune (dry_run, nothing was changed):\n{plan}")
    where = folder(trainer)  # which all processes have to ask for
    if save and trainer.is_global_zero and where is not None:
        write_whole(where / "plan.yaml", plan.encode())


def _report(
    result: TrimResult, metrics: Mapping[str, Mapping[str, float]], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    solver = chosen(arguments["solver"], arguments["epsilon"])
    settings = asdict(solver) if is_dataclass(solver) and not isinstance(solver, type) else {}
    named = {"class_path": f"{type(solver).__module__}.{type(solver).__qualname__}", "init_args": settings}
    arguments = {**arguments, "solver": named}
    packages = ("lightning_nettrim", "torch", "lightning")
    return as_json(result, metrics, arguments, {name: version(name) for name in packages})
