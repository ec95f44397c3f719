"""NetTrim: prune what was trained, when training ends or before a validation."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from itertools import islice, product
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_nettrim import mask
from lightning_nettrim.callbacks.calibration import calibration_batches
from lightning_nettrim.callbacks.compare import restart, sibling, validation
from lightning_nettrim.layers import per_layer_options, prunable, refuse_unusable
from lightning_nettrim.plan import check_arguments, plan
from lightning_nettrim.report import LayerReport, TrimResult, as_json, comparison, write_histograms, write_text
from lightning_nettrim.sample import hold
from lightning_nettrim.solvers import ADMM, Solver
from lightning_nettrim.trim import trim


class NetTrim(Callback):
    """Prunes the trained network without retraining it, and shows it beside the dense one.

    After ``fit``, on the training device, every Linear layer gets the sparsest weights that answer as the trained layer
    did, after its ReLU. A ``validate`` of a network that is not pruned yet prunes it first, so that a checkpoint can be
    pruned without training. The result is `callback.result`, and ``<log_dir>/nettrim/`` holds ``pruned.ckpt``, an
    ordinary Lightning checkpoint with the same keys, and ``report.json``.

    Args:
        epsilon: largest change of a layer's response, relative: 0.05 is 5 % of its norm. Give this or ``sparsity``.
        sparsity: fraction of zeros in each layer, exact to the weight. Give this or ``epsilon``.
        scheme: ``cascade`` solves layer after layer on the pruned network's signals, ``parallel`` on the trained ones.
        solver: the method; ADMM, the convex program, if not given.
        refit: refit the weights on their support, which removes the shrinkage of the l1 norm.
        targets: layers to prune: names, globs, ``re:`` patterns or class names; every Linear if not given.
        ignore: layers to leave alone, by the same keys.
        per_layer: options by the same keys in place of the common ones, e.g. ``{fc3: {sparsity: 0.6}}``; the options
            are ``epsilon``, ``sparsity`` and ``refit``.
        num_samples: inputs, and rows per layer, to calibrate on at most; a uniform sample of one pass.
        seed: of that sample.
        penalize_bias: let biases be pruned like weights, the paper's way.
        calibration: the data to calibrate on, ``train`` or ``val``.
        compare: validate the dense and the pruned network into two sibling runs of the logger.
        save: write ``pruned.ckpt`` and ``report.json``.
        enforce: keep zeros exactly zero in a later ``fit`` of the pruned network; it is not pruned again then.
        dry_run: print what would be pruned, write it as ``nettrim/plan.yaml``, and leave the network as it is.
        allow_untested_strategy: run under other strategies than a single device, at your own risk.

    Raises:
        MisconfigurationException: naming the argument, what was expected and what was given.

    References:
        Aghasi, Abdi, Romberg, "Fast Convex Pruning of Deep Neural Networks", SIAM J. Math. Data Sci. 2020.
    """

    def __init__(
        self,
        epsilon: float | None = None,
        sparsity: float | None = None,
        scheme: Literal["cascade", "parallel"] = "cascade",
        solver: Solver | None = None,
        refit: bool = True,
        targets: list[str] | None = None,
        ignore: list[str] | None = None,
        per_layer: dict[str, dict[str, float | bool]] | None = None,
        num_samples: int = 8192,
        seed: int = 0,
        penalize_bias: bool = False,
        calibration: Literal["train", "val"] = "train",
        compare: bool = True,
        save: bool = True,
        enforce: bool = True,
        dry_run: bool = False,
        allow_untested_strategy: bool = False,
    ) -> None:
        try:
            self._common = check_arguments(epsilon, sparsity, scheme, num_samples, per_layer, refit)
        except ValueError as error:
            raise MisconfigurationException(f"NetTrim: {error}") from error
        if calibration not in ("train", "val"):
            raise MisconfigurationException(f"NetTrim: calibration: expected 'train' or 'val', got {calibration!r}")
        self._trim_arguments: dict[str, Any] = {
            "epsilon": epsilon,
            "sparsity": sparsity,
            "scheme": scheme,
            "solver": ADMM() if solver is None else solver,
            "refit": refit,
            "targets": targets,
            "ignore": ignore,
            "per_layer": per_layer,
            "num_samples": num_samples,
            "seed": seed,
            "penalize_bias": penalize_bias,
        }
        self.calibration = calibration
        self.compare = compare
        self.save = save
        self.enforce = enforce
        self.dry_run = dry_run
        self.allow_untested_strategy = allow_untested_strategy
        self.masks: dict[str, Tensor] = {}
        self.result: TrimResult | None = None
        self.metrics: dict[str, dict[str, float]] = {}
        self._keeping = False  # zeros are enforced in this fit
        self._awaiting = False  # the pruned network is being validated by the user's own validation
        self._finished = False  # this object has pruned a network at the end of a fit

    @property
    def state_key(self) -> str:
        """One NetTrim a trainer, whatever its arguments: a resumed fit with other ones still finds its masks."""
        return self._generate_state_key()

    def state_dict(self) -> dict[str, Any]:
        """The masks, by parameter name."""
        return {"masks": dict(self.masks)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the masks of a checkpoint."""
        self.masks = dict(state_dict["masks"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work before any time is spent."""
        if sum(isinstance(callback, NetTrim) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise MisconfigurationException("expected one NetTrim in a Trainer, got several: merge them by per_layer")
        single = isinstance(trainer.strategy, SingleDeviceStrategy)
        if not single and not self.allow_untested_strategy:
            raise MisconfigurationException(
                f"NetTrim: expected a strategy on a single device, got {type(trainer.strategy).__name__}: train"
                " with it, then prune with `Trainer(devices=1).validate(model, ckpt_path=...)`; or set"
                " allow_untested_strategy"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a network or data that cannot be used, before training rather than after it."""
        self._check(pl_module)
        if self.calibration == "val" and not trainer.enable_validation:
            raise MisconfigurationException("NetTrim: calibration='val' expected validation data, got none")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the zeros if this network was pruned before, else forget about any other network."""
        self._keeping = self.enforce and bool(self.masks) and mask.obeys(pl_module, self.masks)
        if self._keeping:
            self.masks = {name: kept.to(pl_module.device) for name, kept in self.masks.items()}
            rank_zero_info(f"NetTrim: keeping the zeros of {len(self.masks)} pruned parameters during this fit")
        else:
            self._forget()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Put back the zeros that the optimizer has moved."""
        if self._keeping:
            mask.enforce(pl_module, self.masks)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune, with the dense and the pruned network validated side by side."""
        if self._keeping:
            return
        if self.dry_run:
            self._show_plan(trainer, pl_module)
            return
        self.metrics = {"dense": validation(trainer, "dense")} if self.compare else {}
        self._prune(trainer, pl_module)
        if self.compare:
            self.metrics["pruned"] = validation(trainer, "pruned")
        self._publish(trainer, pl_module)
        self._finished = True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune a network that a plain ``validate`` brings unpruned."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.VALIDATING:
            return
        if trainer.ckpt_path is not None and self._warn_of_dense(trainer, pl_module):
            return
        if self.masks and mask.obeys(pl_module, self.masks):
            return
        self._check(pl_module)
        if self.dry_run:
            self._show_plan(trainer, pl_module)
        else:
            self._forget()
            self.metrics = {"dense": validation(trainer, "dense")} if self.compare else {}
            self._prune(trainer, pl_module)
            self._awaiting = True
        restart(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish what the plain ``validate`` of the freshly pruned network has measured."""
        if self._awaiting:
            self._awaiting = False
            self.metrics["pruned"] = {key: float(value) for key, value in trainer.callback_metrics.items()}
            self._publish(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the dense network is about to be tested by mistake."""
        self._warn_of_dense(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the dense network is about to predict by mistake."""
        self._warn_of_dense(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Forget what was under way; `trim` itself has put back the trained weights of a solve that was cut short."""
        self._keeping = self._awaiting = False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing is under way any more."""
        self._keeping = self._awaiting = False

    def _forget(self) -> None:
        self.masks, self.result, self.metrics, self._finished = {}, None, {}, False

    def _check(self, pl_module: pl.LightningModule) -> None:
        """Raise for a network that cannot be pruned and for keys that match nothing in it."""
        if pl_module._compiler_ctx is not None:
            raise MisconfigurationException(
                f"NetTrim: expected an eager module, got a compiled {type(pl_module).__name__}, through which hooks do"
                " not fire: prune first and compile afterwards"
            )
        arguments = self._trim_arguments
        try:
            refuse_unusable(pl_module)
            layers, _ = prunable(pl_module, arguments["targets"], arguments["ignore"])
            per_layer_options(arguments["per_layer"], layers)
        except ValueError as error:
            raise MisconfigurationException(f"NetTrim: {error}") from error

    def _warn_of_dense(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether the network pruned by the last fit has been replaced by a dense one; warns if so."""
        if not self._finished or self.result is None or mask.obeys(pl_module, self.result.masks):
            return False
        self.masks = self.result.masks
        assert trainer.state.fn is not None
        call, where = f"trainer.{trainer.state.fn.value}", self._folder(trainer)
        rank_zero_warn(
            "NetTrim: this is the dense network, not the pruned one"
            + (f": {call}() has loaded {trainer.ckpt_path}" if trainer.ckpt_path else "")
            + f". For the pruned network call {call}(model) right after the fit"
            + (f", or {call}(model, ckpt_path={str(where / 'pruned.ckpt')!r})." if where else ".")
        )
        return True

    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Solve and swap on calibration batches, one line per layer, histograms before and after."""

        def tell(report: LayerReport) -> None:
            trainer.print(f"NetTrim: {report.line()}")

        before = {name: parameter.detach().clone() for name, parameter in pl_module.named_parameters()}
        self.result = trim(pl_module, self._batches(trainer, pl_module), **self._trim_arguments, on_layer=tell)
        self.masks = self.result.masks
        after = {name: parameter.detach() for name, parameter in pl_module.named_parameters()}
        weights = {"dense": {key: before[key] for key in self.masks}, "pruned": {key: after[key] for key in self.masks}}
        for logger, name in product(trainer.loggers, weights):
            run = sibling(logger, name)
            if isinstance(run, TensorBoardLogger):
                write_histograms(run.experiment, weights[name], trainer.global_step)
                run.finalize("success")

    def _publish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Scalars and tables to the loggers, the table to the console, the checkpoint and the report to files."""
        assert self.result is not None
        sides = (self.metrics.get("dense", {}), self.metrics.get("pruned", {}))
        metrics = comparison(*sides) if all(sides) else ""
        scalars = {f"nettrim/{r.name}/{key}": value for r in self.result.reports for key, value in r.scalars().items()}
        totals = {f"nettrim/total/{key}": value for key, value in self.result.total().items() if value is not None}
        for logger in trainer.loggers:
            logger.log_metrics(scalars | totals, trainer.global_step)
            if isinstance(logger, TensorBoardLogger):
                write_text(logger.experiment, self.result, metrics, trainer.global_step)
            logger.save()
        trainer.print("\n".join(["", self.result.table(), *([""] if metrics else []), metrics]).rstrip())
        if self.save and (folder := self._folder(trainer)) is not None:
            trainer.save_checkpoint(folder / "pruned.ckpt")
            if trainer.is_global_zero:
                self._write(folder / "report.json", json.dumps(self._report(), indent=2, allow_nan=False) + "\n")
            trainer.print(f"\nNetTrim: wrote {folder / 'pruned.ckpt'} and report.json beside it")

    def _report(self) -> dict[str, Any]:
        assert self.result is not None
        solver = self._trim_arguments["solver"]
        settings = asdict(solver) if is_dataclass(solver) and not isinstance(solver, type) else {}
        arguments = self._trim_arguments | {
            "solver": {"class_path": f"{type(solver).__module__}.{type(solver).__qualname__}", "init_args": settings},
            "calibration": self.calibration,
        }
        packages = ("lightning_nettrim", "torch", "lightning")
        return as_json(self.result, self.metrics, arguments, {name: version(name) for name in packages})

    def _show_plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print what would be pruned and what would not, and write it as YAML."""
        chosen = {key: self._trim_arguments[key] for key in ("targets", "ignore", "per_layer")}
        held = hold(pl_module, islice(self._batches(trainer, pl_module), 1), self._trim_arguments["num_samples"], 0)
        todo = plan(pl_module, held, self._common, **chosen)
        layers = {
            name: {key: value for key, value in asdict(todo.budgets[name]).items() if value is not None}
            | {"shape": list(layer.weight.shape), "follows": "ReLU" if todo.flows[name].relu else "linear"}
            for name, layer in todo.layers.items()
        }
        text = yaml.safe_dump(
            {"layers": layers, "skipped": {layer.name: layer.reason for layer in todo.skipped}}, sort_keys=False
        )
        trainer.print(f"NetTrim would prune (dry_run, nothing was changed):\n{text}")
        if self.save and trainer.is_global_zero and (folder := self._folder(trainer)) is not None:
            self._write(folder / "plan.yaml", text)

    def _write(self, path: Path, text: str) -> None:
        """Write a file that is either whole or not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(path.suffix + ".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)

    def _folder(self, trainer: pl.Trainer) -> Path | None:
        """``<log_dir>/nettrim``; None where a trainer is not meant to write anything."""
        if trainer.fast_dev_run or trainer.barebones or trainer.log_dir is None:  # type: ignore[attr-defined]
            return None
        return Path(trainer.log_dir) / "nettrim"

    def _batches(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Any]:
        return calibration_batches(trainer, pl_module, self.calibration, self._trim_arguments["num_samples"])
