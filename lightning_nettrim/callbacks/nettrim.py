"""The callback `NetTrim`: prunes the trained network when training ends, or before a validation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_nettrim.callbacks import checkpoints, run_folder
from lightning_nettrim.callbacks.finetuning import FineTuning
from lightning_nettrim.callbacks.lightning_package import fitting
from lightning_nettrim.callbacks.monitoring import check_monitor, monitored_value
from lightning_nettrim.callbacks.progress_bar import shown_progress
from lightning_nettrim.callbacks.pruned_masks import PrunedMasks
from lightning_nettrim.callbacks.publishing import publish, publish_histograms, show_plan, warn_of_dense
from lightning_nettrim.callbacks.steps import LoadedBatch
from lightning_nettrim.callbacks.strategy import check_strategy
from lightning_nettrim.callbacks.trainer_pruning import TrainerPruning, processes_of
from lightning_nettrim.callbacks.validation import averages, restart_validation, run_validation
from lightning_nettrim.core.pattern import Pattern
from lightning_nettrim.layers import masking
from lightning_nettrim.pruning.allocation.base import Allocation
from lightning_nettrim.pruning.budget import Options
from lightning_nettrim.pruning.config import PruningConfig
from lightning_nettrim.pruning.recovery import Recovery
from lightning_nettrim.pruning.results import LayerReport, PruningResult, Trial
from lightning_nettrim.pruning.units.base import UnitSelection
from lightning_nettrim.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from lightning_nettrim.runtime.resume import ResumeStore
from lightning_nettrim.runtime.sharded import is_sharded
from lightning_nettrim.solvers import Solver

log = logging.getLogger(__name__)


class NetTrim(Callback):
    """Prunes the trained network without retraining it, and compares it with the dense one.

    After ``fit``, on the training device, every Linear, convolution and attention layer gets sparse weights that
    reproduce the trained responses, after the BatchNorm, the residual sum and the ReLU that follow. A ``validate`` of a
    dense network prunes it first, so that a checkpoint can be pruned without training. The result is the attribute
    ``result``, and the run's folder gets a ``nettrim/`` with ``pruned.ckpt``, an ordinary Lightning checkpoint with the
    same keys, and ``report.json``.

    Before the first training step one batch is recorded and one small layer solved, so that what cannot work fails
    early. If pruning fails after training, the trained weights are in ``dense.ckpt``, all other callbacks and hooks
    run, and the error is raised at the end (immediately, with several processes). The callback moves itself to the end
    of the Trainer's callbacks, so that it prunes the weights that others, such as weight averaging, produce.

    With ``finetune_epochs`` the Trainer's own loop is run once more after pruning, with the module, its optimizers and
    all callbacks, and the zeros stay zero. The metrics are those of the ``dense``, the ``pruned`` and the ``finetuned``
    network; the files hold the last one. ``max_drop`` is about the pruned one. A ``validate`` does not fine-tune.

    Args:
        epsilon: maximum change of each layer's response, relative to its norm: 0.05 is 5 %. The sparsity results.
        sparsity: fraction of zeros, exact to the weight. The change of the responses results.
        macs: fraction of the network's multiply-accumulates that the pattern ``units`` leaves at most, once compacted.
        parameters: fraction of the network's parameters that the pattern ``units`` leaves at most, once compacted.
        latency: fraction of the time of a forward pass that the pattern ``units`` leaves at most, once compacted, as
            measured on this machine.
        max_drop: maximum drop of the metric (``mode="min"``: rise). The sparsest network within it is searched by
            trials; if there is none, the network stays dense.
        mode: whether a larger (``"max"``) or a smaller (``"min"``) metric is better.
        relative: whether ``max_drop`` is a fraction of the dense network's metric.
        pattern: pattern of the zeros: ``unstructured``, ``per_neuron``, ``neuron``, ``n:m`` as ``2:4``, blocks of
            outputs by inputs as ``4x4``, or a `Pattern`; ``units`` are whole neurons and channels that no layer reads,
            which `compact` removes.
        select: how the pattern ``units`` chooses units; ``None`` is ``Elimination()``, by the errors of the layers that
            read them, and ``Coreset()`` is by sensitivities, without data.
        round_to: the pattern ``units`` keeps multiples of so many units.
        latency_batch_size: batch size at which ``latency`` is measured.
        allocate: how the sparsity is distributed over layers without a budget of their own: ``global``, where it
            changes the network's output least; ``uniform``, the same in each layer; ``epsilon``, to one relative error
            of all responses; ``magnitude``, where the smallest weights are; or an `Allocation`. The total is exact for
            single weights.
        importance: how the error of a neuron is weighted by solvers that minimize the distance of responses:
            ``outgoing``, by the norm of the weights that read it, or ``equal``.
        scheme: ``cascade`` prunes layer after layer on the activations of the pruned network, so that a layer
            compensates for the ones before it; ``parallel`` prunes every layer on the activations of the dense network.
        solver: the method; ``None`` is Cardinality at a sparsity and ADMM, the convex program, at an epsilon.
        refit: refit the weights on their support.
        recover: tunes the kept weights to the dense network's output after pruning, without labels, as
            ``Distillation()``; ``None`` does not.
        targets: layers to prune, by names, globs, ``re:`` patterns or class names; ``None`` is every layer that can be
            pruned.
        ignore: layers to leave dense, by the same keys.
        per_layer: options by the same keys in place of the common ones, as ``{"fc3": {"sparsity": 0.6}}``; the options
            are ``epsilon``, ``sparsity``, ``pattern``, ``refit`` and, as limits for ``allocate``, ``min_sparsity`` and
            ``max_sparsity``.
        num_samples: maximum number of calibration inputs (images, sequences), in each process; a uniform sample of one
            pass over the data.
        max_rows: maximum number of rows per layer (tokens, patches); a uniform sample; ``None`` is ``num_samples``, but
            at least 8192.
        seed: seed of the samples.
        penalize_bias: prune biases like weights, as in the paper.
        recalibrate_batchnorm: re-estimate the running statistics of every BatchNorm after a pruned layer. One that was
            folded into a solved layer gets a new scale and shift with them, so that its output does not change.
        max_memory: GiB of additional memory, from which the rows of a layer and the layers recorded at a time are
            derived: of the model's device or, on the CPU, of the process; ``None`` is half of the available memory.
        offload: where calibration inputs and reference outputs are kept: ``device``, ``cpu``, or ``disk`` for temporary
            files. What exceeds a quarter of ``max_memory`` is written to disk in any case.
        on_failure: what is done if the solve of a layer fails (NaN, infeasible, or an error above its epsilon):
            ``magnitude``, prune it by magnitude and refit, or ``dense``, leave it dense.
        plan: file of a plan that a dry run has written, possibly edited; in place of a budget and of layer choices.
        monitor: name of the validation metric that ``max_drop`` is about.
        calibration: the data to calibrate on, ``train`` or ``val``.
        calibration_step: the step of the module that calibration batches run through; ``None`` is the first of
            ``calibration_step(batch)``, ``validation_step``, ``training_step`` and ``predict_step`` that accepts them.
        checkpoint: prune the ``last`` weights, or the ``best`` ones, from ModelCheckpoint's best file.
        compare: validate the dense and the pruned network, logged to two sibling runs of the logger.
        save: write ``pruned.ckpt``, ``report.json`` and each finished layer, under ``layers/``, so that an interrupted
            run can be resumed by starting it again with the same network, data and options.
        enforce: keep zeros exactly zero in a later ``fit`` of a pruned network. It is pruned further at the end if the
            callback's budget is another one than it was pruned to.
        finetune_epochs: number of further epochs on the pruned network, whatever has ended the training; 0 for none.
        finetune_lr: learning rate of these epochs, constant, as schedulers have come to their end; ``None`` is that at
            the end of the training, but at least a tenth of the highest one.
        dry_run: print what would be pruned, write it as ``nettrim/plan.yaml``, and leave the network dense.
        allow_untested_strategy: allow other strategies than a single device, DDP and FSDP2, at your own risk.

    Raises:
        MisconfigurationException: naming the option, what was expected and what was given.

    References:
        Aghasi, Abdi, Romberg, "Fast Convex Pruning of Deep Neural Networks", SIAM J. Math. Data Sci. 2020.
    """

    def __init__(
        self,
        epsilon: float | None = None,
        sparsity: float | None = None,
        macs: float | None = None,
        parameters: float | None = None,
        latency: float | None = None,
        max_drop: float | None = None,
        mode: Literal["max", "min"] = "max",
        relative: bool = False,
        pattern: str | Pattern = "unstructured",
        select: UnitSelection | None = None,
        round_to: int = 1,
        latency_batch_size: int = 1,
        allocate: Literal["uniform", "epsilon", "global", "magnitude"] | Allocation = "global",
        importance: Literal["outgoing", "equal"] = "outgoing",
        scheme: Literal["cascade", "parallel"] = "cascade",
        solver: Solver | None = None,
        refit: bool = True,
        recover: Recovery | None = None,
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
        plan: str | Path | None = None,
        monitor: str | None = None,
        calibration: Literal["train", "val"] = "train",
        calibration_step: str | None = None,
        checkpoint: Literal["last", "best"] = "last",
        compare: bool = True,
        save: bool = True,
        enforce: bool = True,
        finetune_epochs: int = 0,
        finetune_lr: float | None = None,
        dry_run: bool = False,
        allow_untested_strategy: bool = False,
    ) -> None:
        try:
            self.config = PruningConfig.from_arguments(locals())
        except ValueError as error:
            raise MisconfigurationException(f"NetTrim: {error}") from error
        for name, value, choices in (
            ("calibration", calibration, ("train", "val")),
            ("checkpoint", checkpoint, ("last", "best")),
        ):
            if value not in choices:
                expected = " or ".join(map(repr, choices))
                raise MisconfigurationException(f"NetTrim: {name}: expected {expected}, got {value!r}")
        if (max_drop is None) != (monitor is None):
            raise MisconfigurationException(
                f"NetTrim: max_drop, monitor: expected both or none of them, got {max_drop} and {monitor!r}: name a"
                " validation metric and how far it may fall"
            )
        self.monitor = monitor
        self.calibration = calibration
        self.checkpoint = checkpoint
        self.compare = compare
        self.save = save
        self.enforce = enforce
        self.dry_run = dry_run
        self.allow_untested_strategy = allow_untested_strategy
        self.result: PruningResult | None = None
        self.metrics: dict[str, dict[str, float]] = {}
        self.folder: Path | None = None  # where the files of the last pruning are
        self._pruned = PrunedMasks(self.config)
        self._trainer_pruning = TrainerPruning(self.config, calibration, calibration_step)
        self._finetuning = FineTuning(finetune_epochs, finetune_lr, enforce)
        self._finished = False  # this object has pruned a network at the end of a fit
        self._handles: list[RemovableHandle] = []
        self._reset()

    def _reset(self) -> None:
        """Forget the state of a fit or a validation."""
        self._enforcing = False  # zeros are enforced in this fit
        self._pruning = False  # this fit ends with pruning
        self._checked = False  # `check_pruning` was called on the first batch
        self._trainer_pruning.reset()
        self._ended = False  # training has ended
        self._awaiting_metrics = False  # of the pruned network, from the user's own validation
        self._failure: Exception | None = None  # of pruning, to be raised at the end
        self._dense_saved = False

    @property
    def masks(self) -> dict[str, Tensor]:
        """``{parameter name: bool tensor}`` of the pruned network, True where the weight is kept."""
        return self._pruned.masks

    @property
    def state_key(self) -> str:
        """The same for all options, so that a resumed fit with other options finds the masks."""
        return self._generate_state_key()

    def state_dict(self) -> dict[str, Any]:
        """The masks, by parameter name, the budget of the pruned network, and how far it is fine-tuned."""
        return self._pruned.state_dict() | {"finetuning": self._finetuning.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The state of a checkpoint; a network that was pruned to another budget is not fine-tuned further."""
        self._pruned.load_state_dict(state_dict)
        if self._pruned.budget == self._pruned.requested_budget() and "finetuning" in state_dict:
            self._finetuning.load_state_dict(state_dict["finetuning"])
        if self._finetuning.begun:
            results = self._finetuning.results
            self.result = PruningResult.from_primitives(results["result"], self._pruned.masks)
            self.metrics, self.folder = dict(results["metrics"]), None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the Trainer, and become its last callback."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, NetTrim) for callback in callbacks) > 1:
            raise MisconfigurationException("NetTrim: expected one in a Trainer, got several: merge them by per_layer")
        if not self.allow_untested_strategy:
            check_strategy(trainer)
        self._remove_hooks()
        self._reset()
        self._finetuning.forget()
        trainer.callbacks = [*(each for each in callbacks if each is not self), self]  # type: ignore[attr-defined]
        self._handles.append(pl_module.register_load_state_dict_pre_hook(checkpoints.accept_compiled_names))
        if self.checkpoint == "best" and fitting(trainer):
            checkpoints.check_best_is_kept(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the network and the data before training."""
        self._trainer_pruning.find_layers(pl_module)
        if self.calibration == "val" and not trainer.enable_validation:
            raise MisconfigurationException("NetTrim: calibration='val': expected validation data, got none")
        if self.monitor is not None and not trainer.enable_validation:
            raise MisconfigurationException(f"NetTrim: monitor={self.monitor!r}: expected validation data, got none")
        if self.save:
            run_folder.check_writable(trainer)
        self._finetuning.attach(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enforce the zeros of a network that was pruned before, else forget the masks of any other network."""
        masks = self._pruned.find(pl_module)
        self._enforcing = self.enforce and bool(masks)
        self._pruning = not self._enforcing or self._pruned.needs_pruning(masks)
        if self._enforcing:
            self._handles += self._pruned.enforce_after_steps(trainer, pl_module, masks)
        if self._pruning:
            self._finetuning.forget()
        if self._finetuning.begun:
            self._finetuning.start(trainer)
        elif self._enforcing:
            after = ", and pruning it further afterwards" if self._pruning else ""
            kept = f"keeping the zeros of {len(masks)} pruned parameters in this fit{after}"
            if self._pruned.budget:
                rank_zero_info(f"NetTrim: {kept}")
            else:
                rank_zero_warn(f"NetTrim: {self._pruned.describe(masks)}: {kept}; enforce=False trains them")
        else:
            self._pruned.masks, self.result, self.metrics, self._finished, self.folder = {}, None, {}, False, None
        if self._pruning and self.monitor is not None:
            with isolate_rng():
                monitored_value(run_validation(trainer, batches=1), self.monitor)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check on the first batch that calibration and a solve work."""
        self._finetuning.observe(trainer)
        if self._pruning and not self._checked:
            self._checked = True
            self._trainer_pruning.check(trainer, pl_module, LoadedBatch(batch))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Restore zeros that something else than an optimizer has changed."""
        if self._enforcing:
            masking.apply(pl_module, self.masks)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune the trained network, validate it beside the dense one, and train it on."""
        self._ended = True
        self._remove_hooks()
        if self._finetuning.begun:
            with self._postponed_failure(trainer):
                self._publish_finetuned(trainer, pl_module)
        elif self._pruning:
            with self._postponed_failure(trainer):
                self._prune_trained(trainer, pl_module)
            if self._finetuning.begun:
                self._finetuning.run(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if nothing was trained and therefore nothing pruned."""
        if not self._ended:
            rank_zero_warn(
                "NetTrim: this fit has trained nothing (max_epochs or max_steps is reached, or there are no batches)"
                " and pruned nothing: trainer.validate(model, ...) with this callback prunes a network as it is"
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Make every checkpoint of a pruned network hold its zeros, whatever other callbacks have written into it."""
        if not self.masks or not masking.satisfied(pl_module, self.masks):
            return
        if not self._enforcing:
            checkpoints.replace_weights(checkpoint, pl_module)
        processes = processes_of(trainer, pl_module) if is_sharded(pl_module) else SINGLE_PROCESS
        with processes.raise_together():
            checkpoints.verify(checkpoint["state_dict"], self.masks, "the checkpoint")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune a network that a ``validate`` is given dense, or pruned to another budget."""
        if trainer.sanity_checking or fitting(trainer):
            return
        if trainer.ckpt_path is not None and self._warn_of_dense(trainer, pl_module):
            return
        self._trainer_pruning.find_layers(pl_module)
        masks = self._pruned.find(pl_module)
        if masks and not self._pruned.needs_pruning(masks):
            self._pruned.masks = masks
            if not self._pruned.budget:
                rank_zero_warn(
                    f"NetTrim: {self._pruned.describe(masks)}: not pruned again; a higher sparsity prunes it"
                )
            return
        self.folder = run_folder.claim(trainer) if self.save else None
        if self.dry_run:
            show_plan(trainer, self._trainer_pruning.prune(trainer, pl_module, dry_run=True).plan, self.folder)
        else:
            self._prune(trainer, pl_module)
            self._awaiting_metrics = True
        restart_validation(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish the metrics of a ``validate`` of the network it has pruned."""
        if self._awaiting_metrics:
            self._awaiting_metrics = False
            self.metrics["pruned"] = averages(trainer, trainer.callback_metrics)
            self._publish(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if the dense network is tested instead of the pruned one."""
        self._warn_of_dense(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if the dense network predicts instead of the pruned one."""
        self._warn_of_dense(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Forget the state of the fit; an interrupted solve has restored the trained weights itself."""
        self._remove_hooks()
        self._reset()
        self._finetuning.restore()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the folder, and raise a failure of pruning now that all others have finished."""
        failure = self._failure
        if self.folder is not None and trainer.is_global_zero:
            run_folder.release(self.folder)
        self._remove_hooks()
        self._reset()
        self._finetuning.restore()
        if failure is not None:
            raise failure

    def _remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def _postponed_failure(self, trainer: pl.Trainer) -> Iterator[None]:
        """A `with` after which an error is kept until the fit has ended, and the dense network is saved.

        With several processes it is raised immediately, as the others would wait for this one.
        """
        try:
            yield
        except Exception as error:
            if trainer.world_size > 1:
                raise
            self._failure = error
            try:
                if self.result is None:
                    self._save_dense(trainer)
            except Exception as second:  # which must not prevent other callbacks from finishing
                log.error("NetTrim: the trained network could not be saved (%s: %s)", type(second).__name__, second)
            where = str(self.folder / "dense.ckpt") if self.folder and self._dense_saved else "in memory only"
            log.error(
                "NetTrim: pruning failed (%s: %s). The trained network: %s. The error is raised when the fit has ended",
                type(error).__name__, error, where,
            )  # fmt: skip

    def _save_dense(self, trainer: pl.Trainer) -> None:
        """Write the trained network, unless it is written already."""
        self.folder = self.folder or run_folder.claim(trainer)
        if self.folder is not None and not self._dense_saved:
            trainer.save_checkpoint(self.folder / "dense.ckpt", weights_only=False)
            self._dense_saved = True

    def _prune_trained(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune at the end of a fit, after the trained network has been saved."""
        self.folder = None
        if self.checkpoint == "best":
            rank_zero_info(f"NetTrim: pruning the best weights, of {checkpoints.load_best(trainer, pl_module)}")
        if self.dry_run:
            self.folder = run_folder.claim(trainer) if self.save else None
            show_plan(trainer, self._trainer_pruning.prune(trainer, pl_module, dry_run=True).plan, self.folder)
            return
        if self.save:
            self._save_dense(trainer)
        self._trainer_pruning.find_layers(pl_module)
        self._prune(trainer, pl_module)
        if self.compare:
            self.metrics["pruned"] = run_validation(trainer, "pruned").logged
        assert self.result is not None
        if not self._finetuning.epochs or not self.result.sparsity:
            self._publish(trainer)
            self._finished = True
            return
        self._finetuning.begin(trainer, {"result": self.result.to_primitives(), "metrics": dict(self.metrics)})
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / "pruned.ckpt", weights_only=False)

    def _publish_finetuned(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate and publish the fine-tuned network."""
        assert self.result is not None
        notes = (*self.result.notes, self._finetuning.line())
        self._finetuning.end(trainer)
        self._enforcing = False
        masking.apply(pl_module, self.masks)
        sparsity = masking.sparsity(dict(pl_module.named_parameters()))
        self.result = replace(self.result, model_sparsity=sparsity, notes=notes)
        if self.compare:
            self.metrics["finetuned"] = run_validation(trainer, "finetuned").logged
        weights = masking.tensors(pl_module)
        publish_histograms(trainer, {"finetuned": {name: weights[name] for name in self.masks}})
        if self.save and self.folder is None:
            self.folder = run_folder.claim(trainer)
        self._trainer_pruning.prepare(trainer, pl_module)
        self._publish(trainer)
        self._finished = True

    def _warn_of_dense(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether the network pruned by the last fit has been replaced by a dense one; warns if so."""
        if not self._finished or self.result is None:
            return False
        masks = checkpoints.by_own_names(self.result.masks, pl_module)
        if masking.satisfied(pl_module, masks):
            return False
        self._pruned.masks = masks
        warn_of_dense(trainer, self.folder)
        return True

    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune the network, with one line per layer and histograms of the weights before and after."""
        self.result, self._finished, self.metrics = None, False, {}
        if self.compare:
            self.metrics["dense"] = run_validation(trainer, "dense").logged
        if (monitor := self.monitor) is not None:
            weights = [layer.parameter_names()[0] for layer in self._trainer_pruning.find_layers(pl_module).values()]
            check_monitor(trainer, pl_module, monitor, weights)
        before = masking.clone(pl_module, [name for name, _ in pl_module.named_parameters()])
        with shown_progress(trainer) as bar:

            def show(row: LayerReport | Trial) -> None:
                bar.clear()
                trainer.print(f"NetTrim: {row.line()}")

            result = self._trainer_pruning.prune(
                trainer,
                pl_module,
                metric=None if monitor is None else lambda: monitored_value(run_validation(trainer), monitor),
                resume=self._resume_store(trainer),
                on_layer=show,
                on_trial=show,
                on_progress=bar,
            )
        self.result, self._enforcing = result, False
        self._pruned.set(result.masks)
        checkpoints.share_with_averages(trainer, pl_module)
        after = masking.tensors(pl_module)
        sides = {"dense": before, "pruned": after}
        publish_histograms(
            trainer, {side: {name: weights[name] for name in self.masks} for side, weights in sides.items()}
        )

    def _resume_store(self, trainer: pl.Trainer) -> Any:
        """What makes the store of finished layers, beside those of interrupted runs; ``None`` without a folder."""
        if self.folder is None or not self.save:
            return None
        folder, others = self.folder / "layers", run_folder.interrupted(trainer, self.folder)

        def make(processes: ProcessGroup) -> ResumeStore:
            return ResumeStore(folder, others, processes)

        return make

    def _publish(self, trainer: pl.Trainer) -> None:
        """Scalars and tables to the loggers, the table to the console, the checkpoint and the report to files."""
        assert self.result is not None
        arguments = {
            "monitor": self.monitor,
            "calibration": self.calibration,
            "calibration_step": self._trainer_pruning.step_name,
            "checkpoint": self.checkpoint,
            "finetune_epochs": self._finetuning.epochs,
            "finetune_lr": self._finetuning.lr,
        }
        folder = self.folder if self.save else None
        compaction = self._trainer_pruning.report_compaction if self.config.budget.pattern.selects_units else None
        publish(trainer, self.result, self.metrics, self.config, arguments, folder, compaction)
