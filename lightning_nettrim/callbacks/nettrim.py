"""NetTrim: prune what was trained, when training ends or before a validation."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_nettrim import mask
from lightning_nettrim.callbacks.calibration import calibration_batches
from lightning_nettrim.callbacks.compare import averages, restart, validation
from lightning_nettrim.callbacks.progress import progress
from lightning_nettrim.callbacks.publish import (
    finished_layers,
    publish,
    publish_histograms,
    show_plan,
    warn_of_dense,
)
from lightning_nettrim.layers import prunable, refuse_unusable
from lightning_nettrim.plan import budgets_of, check_arguments, read
from lightning_nettrim.report import LayerReport, Trial, TrimResult
from lightning_nettrim.solvers import Solver
from lightning_nettrim.trim import trim


class NetTrim(Callback):
    """Prunes the trained network without retraining it, and shows it beside the dense one.

    After ``fit``, on the training device, every Linear, convolution and attention gets sparse weights that answer as
    the trained ones did, behind the BatchNorm, the residual sum and the ReLU that follow. A ``validate`` of a network
    that is not pruned yet prunes it first, so that a checkpoint can be pruned without training. The result is
    `callback.result`, and ``<log_dir>/nettrim/`` holds ``pruned.ckpt``, an ordinary Lightning checkpoint with the same
    keys, and ``report.json``.

    Args:
        epsilon: largest change of a layer's response, relative: 0.05 is 5 % of its norm. Give this, ``sparsity``,
            ``max_drop`` or ``plan``.
        sparsity: fraction of zeros, exact to the weight.
        max_drop: how far ``monitor`` may fall (``mode: min``: rise): the sparsest network within it is found by trials,
            each validated. Where none is within, the network stays dense.
        monitor: the validation metric that ``max_drop`` is about.
        mode: whether a larger (``max``) or a smaller (``min``) metric is better.
        relative: ``max_drop`` is a fraction of the dense network's metric.
        pattern: of the zeros: ``unstructured``, ``per_neuron``, ``n:m`` as ``2:4``, ``neuron``, or blocks of outputs by
            inputs as ``4x4``.
        allocate: how the zeros are spread over the layers without a budget of their own: ``global``, where they change
            the network's output least in a quick rehearsal; ``uniform``; ``epsilon``, to one relative response error;
            ``magnitude``, where the smallest weights of all are. The total is exact for single weights.
        importance: what a neuron's error counts: ``outgoing``, as the next layer's weights read it, or ``equal``.
        scheme: ``cascade`` solves layer after layer on the pruned network's signals, ``parallel`` on the trained ones.
        solver: the method; if not given, Cardinality at a sparsity, and ADMM, the convex program, at an epsilon.
        refit: refit the weights on their support.
        targets: layers to prune: names, globs, ``re:`` patterns or class names; every layer that can be if not given.
        ignore: layers to leave alone, by the same keys.
        per_layer: options by the same keys in place of the common ones, e.g. ``{fc3: {sparsity: 0.6}}``; the options
            are ``epsilon``, ``sparsity``, ``pattern``, ``refit`` and, as bounds, ``min_sparsity``, ``max_sparsity``.
        num_samples: inputs, and rows per layer, to calibrate on at most, in each process; a uniform sample of one pass.
        seed: of that sample.
        penalize_bias: let biases be pruned like weights, the paper's way.
        recalibrate_batchnorm: re-estimate the running statistics of BatchNorms behind pruned layers.
        max_memory: GiB beyond what is in use when pruning begins, by which the rows of a layer and the layers recorded
            at a time are chosen; half of what is free if not given.
        offload: where calibration inputs and trained responses wait: ``device``, ``cpu`` or ``disk``.
        on_failure: where a layer's solve fails: ``magnitude``, prune it by magnitude and refit, or ``dense``, leave it.
        calibration: the data to calibrate on, ``train`` or ``val``.
        compare: validate the dense and the pruned network into two sibling runs of the logger.
        save: write ``pruned.ckpt`` and ``report.json``, and each layer as it is finished, under ``layers/``: a run that
            is cut short goes on from there when it is started again with the same network, data and arguments.
        enforce: keep zeros exactly zero in a later ``fit`` of the pruned network; it is not pruned again then.
        dry_run: print what would be pruned, write it as ``nettrim/plan.yaml``, and leave the network as it is.
        plan: file of such a plan, perhaps edited, in place of budgets and of layer choices.
        allow_untested_strategy: run under other strategies than a single device and DDP, at your own risk.

    Raises:
        MisconfigurationException: naming the argument, what was expected and what was given.

    References:
        Aghasi, Abdi, Romberg, "Fast Convex Pruning of Deep Neural Networks", SIAM J. Math. Data Sci. 2020.
    """

    def __init__(
        self,
        epsilon: float | None = None,
        sparsity: float | None = None,
        max_drop: float | None = None,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        relative: bool = False,
        pattern: str = "unstructured",
        allocate: Literal["uniform", "epsilon", "global", "magnitude"] = "global",
        importance: Literal["outgoing", "equal"] = "outgoing",
        scheme: Literal["cascade", "parallel"] = "cascade",
        solver: Solver | None = None,
        refit: bool = True,
        targets: list[str] | None = None,
        ignore: list[str] | None = None,
        per_layer: dict[str, dict[str, float | bool | str]] | None = None,
        num_samples: int = 8192,
        seed: int = 0,
        penalize_bias: bool = False,
        recalibrate_batchnorm: bool = True,
        max_memory: float | None = None,
        offload: Literal["device", "cpu", "disk"] = "cpu",
        on_failure: Literal["magnitude", "dense"] = "magnitude",
        calibration: Literal["train", "val"] = "train",
        compare: bool = True,
        save: bool = True,
        enforce: bool = True,
        dry_run: bool = False,
        plan: str | None = None,
        allow_untested_strategy: bool = False,
    ) -> None:
        self._trim_arguments: dict[str, Any] = {
            "epsilon": epsilon,
            "sparsity": sparsity,
            "max_drop": max_drop,
            "mode": mode,
            "relative": relative,
            "pattern": pattern,
            "allocate": allocate,
            "importance": importance,
            "scheme": scheme,
            "solver": solver,
            "refit": refit,
            "targets": targets,
            "ignore": ignore,
            "per_layer": per_layer,
            "num_samples": num_samples,
            "seed": seed,
            "penalize_bias": penalize_bias,
            "recalibrate_batchnorm": recalibrate_batchnorm,
            "max_memory": max_memory,
            "offload": offload,
            "on_failure": on_failure,
            "plan": plan,
        }
        try:
            self._common = check_arguments(**self._trim_arguments)
        except ValueError as error:
            raise MisconfigurationException(f"NetTrim: {error}") from error
        if calibration not in ("train", "val"):
            raise MisconfigurationException(f"NetTrim: calibration: expected 'train' or 'val', got {calibration!r}")
        if (max_drop is None) != (monitor is None):
            raise MisconfigurationException(
                f"NetTrim: expected max_drop and monitor together, got {max_drop} and {monitor!r}: name a validation"
                " metric and how far it may fall"
            )
        self.monitor = monitor
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
        tested = isinstance(trainer.strategy, SingleDeviceStrategy) or type(trainer.strategy) is DDPStrategy
        if not tested and not self.allow_untested_strategy:
            raise MisconfigurationException(
                f"NetTrim: expected a single device or DDP, with the whole network in every process, got"
                f" {type(trainer.strategy).__name__}: train with it, then prune with"
                " `Trainer(devices=1).validate(model, ckpt_path=...)`; or set allow_untested_strategy"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a network or data that cannot be used, before training rather than after it."""
        self._check(pl_module)
        if self.calibration == "val" and not trainer.enable_validation:
            raise MisconfigurationException("NetTrim: calibration='val' expected validation data, got none")
        if self.monitor is not None and not trainer.enable_validation:
            raise MisconfigurationException(f"NetTrim: monitor={self.monitor!r} expected validation data, got none")

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
            self.metrics["pruned"] = averages(trainer, trainer.callback_metrics)
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
            options = arguments["per_layer"] if arguments["plan"] is None else read(arguments["plan"], layers)
            budgets_of(layers, self._common, options)
        except ValueError as error:
            raise MisconfigurationException(f"NetTrim: {error}") from error

    def _warn_of_dense(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether the network pruned by the last fit has been replaced by a dense one; warns if so."""
        if not self._finished or self.result is None or mask.obeys(pl_module, self.result.masks):
            return False
        self.masks = self.result.masks
        warn_of_dense(trainer)
        return True

    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Solve and swap on calibration batches, one line per layer, histograms before and after."""
        before = {name: parameter.detach().clone() for name, parameter in pl_module.named_parameters()}
        with progress(trainer) as bar:

            def tell(row: LayerReport | Trial) -> None:
                bar.clear()
                trainer.print(f"NetTrim: {row.line()}")

            self.result = self._trim(
                trainer,
                pl_module,
                metric=None if self.monitor is None else lambda: self._metric(trainer),
                on_layer=tell,
                on_trial=tell,
                on_progress=bar,
                **(finished_layers(trainer) if self.save else {}),
            )
        self.masks = self.result.masks
        after = {name: parameter.detach() for name, parameter in pl_module.named_parameters()}
        publish_histograms(trainer, *({name: side[name] for name in self.masks} for side in (before, after)))

    def _metric(self, trainer: pl.Trainer) -> float:
        """The monitored metric of the network as it is, which no logger sees."""
        metrics = validation(trainer)
        if self.monitor not in metrics:
            raise MisconfigurationException(
                f"NetTrim: monitor: expected one of the logged validation metrics {', '.join(metrics) or '(none)'},"
                f" got {self.monitor!r}"
            )
        return metrics[self.monitor]

    def _publish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Scalars and tables to the loggers, the table to the console, the checkpoint and the report to files."""
        assert self.result is not None
        arguments = self._trim_arguments | {"monitor": self.monitor, "calibration": self.calibration}
        publish(trainer, self.result, self.metrics, arguments, self.save)

    def _show_plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print what would be pruned and what would not, and write it as YAML."""
        show_plan(trainer, self._trim(trainer, pl_module, dry_run=True).plan, self.save)

    def _trim(self, trainer: pl.Trainer, pl_module: pl.LightningModule, **more: Any) -> TrimResult:
        """`trim` by the callback's arguments, on its calibration batches, with the other processes of the Trainer."""
        batches = calibration_batches(trainer, pl_module, self.calibration, self._trim_arguments["num_samples"])
        distributed = isinstance(trainer.strategy, DDPStrategy)
        return trim(pl_module, batches, **self._trim_arguments, distributed=distributed, **more)
