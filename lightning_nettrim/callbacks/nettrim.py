"""NetTrim: prune what was trained, when training ends or before a validation."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_nettrim import mask
from lightning_nettrim.callbacks import checkpoints, folder
from lightning_nettrim.callbacks.calibration import calibration_batches
from lightning_nettrim.callbacks.compare import Pass, averages, restart, validation
from lightning_nettrim.callbacks.package import fitting, is_a
from lightning_nettrim.callbacks.progress import progress
from lightning_nettrim.callbacks.publish import publish, publish_histograms, show_plan, warn_of_dense
from lightning_nettrim.callbacks.steps import STEPS, Loaded, StepForward, choose_step
from lightning_nettrim.layers import Layer, prunable, refuse_unusable
from lightning_nettrim.plan import budgets_of, check_arguments
from lightning_nettrim.prepare import Choice, Source, precheck, rows_limit
from lightning_nettrim.ranks import ALONE, Group
from lightning_nettrim.report import LayerReport, Trial, TrimResult
from lightning_nettrim.solvers import Solver
from lightning_nettrim.trained import Settings
from lightning_nettrim.trim import trim

log = logging.getLogger(__name__)

PRUNED = 0.01
"""Fraction of exact zeros from which on a weight counts as pruned."""

BUDGET = ("epsilon", "sparsity", "max_drop", "pattern", "per_layer", "targets", "ignore", "plan")
"""The arguments that say how far a network is to be pruned."""


class NetTrim(Callback):
    """Prunes the trained network without retraining it, and shows it beside the dense one.

    After ``fit``, on the training device, every Linear, convolution and attention gets sparse weights that reproduce
    the trained responses, after the BatchNorm, the residual sum and the ReLU that follow. A ``validate`` of a network
    that is not pruned yet prunes it first, so that a checkpoint can be pruned without training. The result is
    `callback.result`, and the run's folder gets a ``nettrim/`` with ``pruned.ckpt``, an ordinary Lightning checkpoint
    with the same keys, and ``report.json``.

    Before the first training step one batch is recorded and one small layer solved, so that what cannot work fails
    then. When pruning fails after training, the trained weights are in ``dense.ckpt``, all other callbacks and hooks
    run, and the error is raised at the end (at once, in several processes). The callback moves itself to the end of the
    Trainer's callbacks, so that it prunes what others, as weight averaging does, leave at the end of training.

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
        num_samples: inputs (images, sequences) to calibrate on at most, in each process; a uniform sample of one pass.
        max_rows: rows per layer (tokens, patches) at most; ``num_samples``, but at least 8192, if not given.
        seed: of that sample.
        penalize_bias: let biases be pruned like weights, the paper's way.
        recalibrate_batchnorm: re-estimate the running statistics of BatchNorms behind pruned layers.
        max_memory: GiB beyond what is in use when pruning begins, by which the rows of a layer and the layers recorded
            at a time are chosen; half of what is free if not given.
        offload: where calibration inputs and trained responses wait: ``device``, ``cpu`` or ``disk``.
        on_failure: where a layer's solve fails: ``magnitude``, prune it by magnitude and refit, or ``dense``, leave it.
        calibration: the data to calibrate on, ``train`` or ``val``.
        calibration_step: the step of the module that calibration batches run through; if not given, the first of
            ``calibration_step(batch)``, ``validation_step``, ``training_step`` and ``predict_step`` that takes them.
        checkpoint: prune the ``last`` weights, or the ``best`` ones, of ModelCheckpoint's best file.
        compare: validate the dense and the pruned network into two sibling runs of the logger.
        save: write ``pruned.ckpt`` and ``report.json``, and each layer as it is finished, under ``layers/``: a run that
            is cut short goes on from there when it is started again with the same network, data and arguments.
        enforce: keep zeros exactly zero in a later ``fit`` of a pruned network. It is pruned further at the end if this
            callback asks for another budget than the one it was pruned to.
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
        max_rows: int | None = None,
        seed: int = 0,
        penalize_bias: bool = False,
        recalibrate_batchnorm: bool = True,
        max_memory: float | None = None,
        offload: Literal["device", "cpu", "disk"] = "cpu",
        on_failure: Literal["magnitude", "dense"] = "magnitude",
        calibration: Literal["train", "val"] = "train",
        calibration_step: str | None = None,
        checkpoint: Literal["last", "best"] = "last",
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
            "max_rows": max_rows,
            "seed": seed,
            "penalize_bias": penalize_bias,
            "recalibrate_batchnorm": recalibrate_batchnorm,
            "max_memory": max_memory,
            "offload": offload,
            "on_failure": on_failure,
            "plan": plan,
        }
        try:
            checked = inspect.signature(check_arguments).parameters
            self._common = check_arguments(**{name: self._trim_arguments[name] for name in checked})
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
                f"NetTrim: expected max_drop and monitor together, got {max_drop} and {monitor!r}: name a validation"
                " metric and how far it may fall"
            )
        self.monitor = monitor
        self.calibration = calibration
        self.calibration_step = calibration_step
        self.checkpoint = checkpoint
        self.compare = compare
        self.save = save
        self.enforce = enforce
        self.dry_run = dry_run
        self.allow_untested_strategy = allow_untested_strategy
        self.masks: dict[str, Tensor] = {}
        self.result: TrimResult | None = None
        self.metrics: dict[str, dict[str, float]] = {}
        self.folder: Path | None = None  # where the files of the last pruning are
        self._pruned_to = ""  # the budget that the masks are of
        self._finished = False  # this object has pruned a network at the end of a fit
        self._reset()

    def _reset(self) -> None:
        """Nothing is under way."""
        self._keeping = False  # zeros are enforced in this fit
        self._pruning = False  # this fit ends with pruning
        self._checked = False  # that it can was seen on the first batch
        self._step: StepForward | None = None  # that calibration batches run through, once it is known
        self._ended = False  # training has come to its end
        self._awaiting = False  # the pruned network is being validated by the user's own validation
        self._failure: Exception | None = None  # of pruning, to be raised when all others have finished
        self._dense_saved = False
        self._handles: list[RemovableHandle] = []

    @property
    def state_key(self) -> str:
        """One NetTrim a trainer, whatever its arguments: a resumed fit with other ones still finds its masks."""
        return self._generate_state_key()

    def state_dict(self) -> dict[str, Any]:
        """The masks, by parameter name, and the budget that they are of."""
        return {"masks": dict(self.masks), "pruned_to": self._pruned_to}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the masks of a checkpoint."""
        self.masks = dict(state_dict["masks"])
        self._pruned_to = state_dict.get("pruned_to", self._budget())

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work before any time is spent, and become the last callback."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, NetTrim) for callback in callbacks) > 1:
            raise MisconfigurationException("expected one NetTrim in a Trainer, got several: merge them by per_layer")
        tested = is_a(trainer.strategy, "SingleDeviceStrategy") or type(trainer.strategy).__name__ == "DDPStrategy"
        if not tested and not self.allow_untested_strategy:
            raise MisconfigurationException(
                f"NetTrim: expected a single device or DDP, with the whole network in every process, got"
                f" {type(trainer.strategy).__name__}: train with it, then prune with"
                " `Trainer(devices=1).validate(model, ckpt_path=...)`; or set allow_untested_strategy"
            )
        self._release()
        self._reset()
        trainer.callbacks = [*(each for each in callbacks if each is not self), self]  # type: ignore[attr-defined]
        self._handles.append(pl_module.register_load_state_dict_pre_hook(checkpoints.accept_compiled_names))
        if self.checkpoint == "best" and fitting(trainer):
            checkpoints.refuse_no_best(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a network or data that cannot be used, before training rather than after it."""
        self._check(pl_module)
        if self.calibration == "val" and not trainer.enable_validation:
            raise MisconfigurationException("NetTrim: calibration='val' expected validation data, got none")
        if self.monitor is not None and not trainer.enable_validation:
            raise MisconfigurationException(f"NetTrim: monitor={self.monitor!r} expected validation data, got none")
        if self.save:
            folder.refuse_unwritable(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the zeros if this network was pruned before, else forget about any other network."""
        known = self._known(pl_module)
        self._keeping = self.enforce and bool(known)
        self._pruning = not self._keeping or self._prunes_on(known)
        if self._keeping:
            self.masks = {name: kept.to(pl_module.device) for name, kept in known.items()}
            self._handles += [
                optimizer.register_step_post_hook(lambda *_: mask.enforce(pl_module, self.masks))
                for optimizer in trainer.optimizers
                if hasattr(optimizer, "register_step_post_hook")
            ]
            after = ", and pruning on after it" if self._pruning else ""
            kept = f"keeping the zeros of {len(self.masks)} pruned parameters during this fit{after}"
            if self._pruned_to:
                rank_zero_info(f"NetTrim: {kept}")
            else:
                rank_zero_warn(f"NetTrim: {self._described(known)}: {kept}; enforce=False trains them")
        else:
            self._forget()
        if self._pruning and self.monitor is not None:
            with isolate_rng():
                self._monitored(validation(trainer, batches=1))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """See on the first batch that calibration and a solve are going to work."""
        if self._pruning and not self._checked:
            self._checked = True
            self._precheck(trainer, pl_module, Loaded(batch))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Put back the zeros that others than the optimizer have moved."""
        if self._keeping:
            mask.enforce(pl_module, self.masks)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune, with the dense and the pruned network validated side by side."""
        self._ended = True
        self._release()
        if self._pruning:
            with self._postponed_failure(trainer):
                self._prune_trained(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if nothing was trained and therefore nothing pruned."""
        if not self._ended:
            rank_zero_warn(
                "NetTrim: this fit has trained nothing (max_epochs or max_steps is reached, or there are no batches)"
                " and pruned nothing: trainer.validate(model, ...) with this callback prunes a network as it is"
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let every checkpoint of a pruned network hold its zeros, whatever other callbacks have put into it."""
        if not self.masks or not mask.obeys(pl_module, self.masks):
            return
        if not self._keeping:
            checkpoints.replace_weights(checkpoint, pl_module)
        checkpoints.verify(checkpoint["state_dict"], self.masks, "the checkpoint")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune a network that a plain ``validate`` brings unpruned, or pruned to another budget."""
        if trainer.sanity_checking or fitting(trainer):
            return
        if trainer.ckpt_path is not None and self._warn_of_dense(trainer, pl_module):
            return
        self._check(pl_module)
        known = self._known(pl_module)
        if known and not self._prunes_on(known):
            self.masks = known
            if not self._pruned_to:
                rank_zero_warn(f"NetTrim: {self._described(known)}: not pruned again; another sparsity prunes on")
            return
        self.folder = folder.claim(trainer) if self.save else None
        if self.dry_run:
            self._show_plan(trainer, pl_module)
        else:
            self._prune(trainer, pl_module)
            self._awaiting = True
        restart(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish what the plain ``validate`` of the freshly pruned network has measured."""
        if self._awaiting:
            self._awaiting = False
            self.metrics["pruned"] = averages(trainer, trainer.callback_metrics)
            self._publish(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the dense network is about to be tested by mistake."""
        self._warn_of_dense(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the dense network is about to predict by mistake."""
        self._warn_of_dense(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Forget what was under way; `trim` itself has put back the trained weights of a solve that was cut short."""
        self._release()
        self._reset()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing is under way any more; a failure of pruning is raised now that all others have finished."""
        failure = self._failure
        if self.folder is not None and trainer.is_global_zero:
            folder.release(self.folder)
        self._release()
        self._reset()
        if failure is not None:
            raise failure

    def _release(self) -> None:
        """Take all hooks away."""
        while self._handles:
            self._handles.pop().remove()

    def _forget(self) -> None:
        self.masks, self.result, self.metrics, self._finished, self.folder = {}, None, {}, False, None

    def _budget(self) -> str:
        """The arguments that say how far to prune, in words."""
        return json.dumps({name: self._trim_arguments[name] for name in BUDGET}, default=str, sort_keys=True)

    def _known(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """The masks that a network obeys: those of this callback, else those of its own zeros."""
        known = checkpoints.by_own_names(self.masks, pl_module)
        if known and mask.obeys(pl_module, known):
            return known
        self._pruned_to = ""
        return self._zeros(pl_module)

    def _described(self, masks: dict[str, Tensor]) -> str:
        return f"the network comes with {mask.sparsity(masks):.0%} exact zeros in {len(masks)} weights, as a pruned one"

    def _zeros(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """The masks of a network that was pruned before and has come without them; none of a dense one.

        Zeros of an initialization are none of pruning: all values are zero there, or all others the same.
        """
        choice, masks = self._choice(pl_module), {}
        for layer in prunable(pl_module, choice.targets, choice.ignore)[0].values():
            weight = layer.parameter.detach()
            if mask.sparsity({"": weight}) >= PRUNED and len(weight[weight != 0].unique()) > 1:
                masks[layer.names()[0]] = weight != 0
        return masks

    def _prunes_on(self, masks: dict[str, Tensor]) -> bool:
        """Whether a pruned network is to be pruned to another budget.

        Where it is not known which one it was pruned to, its zeros are compared with the sparsity asked for.
        """
        if self._pruned_to:
            return self._pruned_to != self._budget()
        sparsity = self._trim_arguments["sparsity"]
        return sparsity is not None and mask.sparsity(masks) < sparsity - PRUNED

    def _check(self, pl_module: pl.LightningModule) -> dict[str, Layer]:
        """The layers to prune; raises for a network that cannot be pruned and for keys that match nothing in it."""
        try:
            refuse_unusable(pl_module)
            choice = self._choice(pl_module)
            layers, _ = prunable(pl_module, choice.targets, choice.ignore)
            budgets_of(layers, self._common, choice.per_layer)
        except ValueError as error:
            raise MisconfigurationException(f"NetTrim: {error}") from error
        step = self.calibration_step
        if step is not None and not callable(getattr(pl_module, step, None)):
            raise MisconfigurationException(
                f"NetTrim: calibration_step: expected a method of {type(pl_module).__name__}, such as"
                f" {', '.join(STEPS[1:])}, got {step!r}"
            )
        return layers

    def _choice(self, pl_module: pl.LightningModule) -> Choice:
        arguments = self._trim_arguments
        choice = Choice(self._common, arguments["targets"], arguments["ignore"], arguments["per_layer"])
        return choice.by_plan(pl_module, arguments["plan"])

    def _precheck(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loaded: Loaded) -> None:
        """Record a batch and solve for one layer, as after training; random numbers are left alone."""
        arguments = self._trim_arguments
        rows = rows_limit(arguments["num_samples"], arguments["max_rows"])
        settings = Settings(
            arguments["scheme"], arguments["solver"], rows, arguments["seed"], arguments["penalize_bias"],
            arguments["importance"], arguments["recalibrate_batchnorm"], arguments["on_failure"],
        )  # fmt: skip
        with isolate_rng():
            if self.calibration == "val":
                loaded = next(calibration_batches(trainer, pl_module, "val", 1))
            forward = self._forward(trainer, pl_module, loaded)
            source = Source([loaded], arguments["num_samples"], forward, _distributed(trainer))
            try:
                precheck(pl_module, source, self._choice(pl_module), settings)
            except ValueError as error:
                raise MisconfigurationException(f"NetTrim: pruning would fail after this fit: {error}") from error

    def _forward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loaded: Loaded) -> StepForward:
        """How calibration batches run through the module, chosen on one of them."""
        if self._step is None:
            layers, ranks = self._check(pl_module), Group.of(pl_module) if _distributed(trainer) else ALONE
            try:
                with ranks.together():
                    step = choose_step(trainer, pl_module, layers, loaded, self.calibration_step)
                ranks.agree({"calibration_step": step.step})
            except ValueError as error:
                raise MisconfigurationException(f"NetTrim: {error}") from error
            self._step = step
        return self._step

    @contextmanager
    def _postponed_failure(self, trainer: pl.Trainer) -> Iterator[None]:
        """A `with` after which an error waits until the fit is over for all others; the dense network is saved.

        In one of several processes it does not wait, as the others would wait for this one.
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
            except Exception as also:  # which must not keep others from ending well
                log.error("NetTrim: the trained network could not be written (%s: %s)", type(also).__name__, also)
            where = str(self.folder / "dense.ckpt") if self.folder and self._dense_saved else "in memory only"
            log.error(
                "NetTrim: pruning failed (%s: %s). The trained network: %s. The error is raised when the fit has ended",
                type(error).__name__, error, where,
            )  # fmt: skip

    def _save_dense(self, trainer: pl.Trainer) -> None:
        """Write the trained network, if it is not there yet."""
        self.folder = self.folder or folder.claim(trainer)
        if self.folder is not None and not self._dense_saved:
            trainer.save_checkpoint(self.folder / "dense.ckpt", weights_only=False)
            self._dense_saved = True

    def _prune_trained(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune at the end of a fit, with the trained network on disk before anything can go wrong."""
        self.folder = None
        if self.checkpoint == "best":
            rank_zero_info(f"NetTrim: pruning the best weights, of {checkpoints.load_best(trainer, pl_module)}")
        if self.dry_run:
            self.folder = folder.claim(trainer) if self.save else None
            self._show_plan(trainer, pl_module)
            return
        if self.save:
            self._save_dense(trainer)
        self._check(pl_module)
        self._prune(trainer, pl_module)
        if self.compare:
            self.metrics["pruned"] = validation(trainer, "pruned").logged
        self._publish(trainer)
        self._finished = True

    def _warn_of_dense(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether the network pruned by the last fit has been replaced by a dense one; warns if so."""
        if not self._finished or self.result is None:
            return False
        masks = checkpoints.by_own_names(self.result.masks, pl_module)
        if mask.obeys(pl_module, masks):
            return False
        self.masks = masks
        warn_of_dense(trainer, self.folder)
        return True

    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Solve and swap on calibration batches, one line per layer, histograms before and after."""
        self.result, self._finished = None, False
        dense = validation(trainer, "dense") if self.compare else Pass({}, {})
        self.metrics = {"dense": dense.logged} if self.compare else {}
        if self.monitor is not None:
            self._refuse_constant(trainer, pl_module)
        before = {name: parameter.detach().clone() for name, parameter in pl_module.named_parameters()}
        with progress(trainer) as bar:

            def tell(row: LayerReport | Trial) -> None:
                bar.clear()
                trainer.print(f"NetTrim: {row.line()}")

            where = {} if self.folder is None or not self.save else {
                "folder": self.folder / "layers", "resume_from": folder.unfinished(trainer, self.folder)
            }  # fmt: skip
            result = self._trim(
                trainer,
                pl_module,
                metric=None if self.monitor is None else lambda: self._monitored(validation(trainer)),
                on_layer=tell,
                on_trial=tell,
                on_progress=bar,
                **where,
            )
        self.result, self.masks, self._pruned_to, self._keeping = result, result.masks, self._budget(), False
        checkpoints.share_with_averages(trainer, pl_module)
        after = {name: parameter.detach() for name, parameter in pl_module.named_parameters()}
        publish_histograms(trainer, *({name: side[name] for name in self.masks} for side in (before, after)))

    def _monitored(self, found: Pass) -> float:
        """The monitored metric of a validation."""
        if self.monitor not in found.monitored:
            raise MisconfigurationException(
                "NetTrim: monitor: expected one of the metrics that the module logs in its validation,"
                f" {', '.join(found.monitored) or '(none)'}, got {self.monitor!r}"
            )
        return found.monitored[str(self.monitor)]

    def _refuse_constant(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise for a monitor that is the same for the trained network and for one whose weights are all zero."""
        trained = self._monitored(validation(trainer))
        names = [layer.names()[0] for layer in self._check(pl_module).values()]
        weights = mask.copies(pl_module, names)
        try:
            mask.swap(pl_module, {name: torch.zeros_like(weight) for name, weight in weights.items()})
            destroyed = self._monitored(validation(trainer))
        finally:
            mask.swap(pl_module, weights)
        if trained == destroyed:
            raise MisconfigurationException(
                f"NetTrim: monitor: expected a metric that can fall, got {self.monitor!r}, which is {trained:g} for"
                " the trained network and for one without weights, as a best value so far is: monitor the metric itself"
            )

    def _publish(self, trainer: pl.Trainer) -> None:
        """Scalars and tables to the loggers, the table to the console, the checkpoint and the report to files."""
        assert self.result is not None
        arguments = self._trim_arguments | {
            "monitor": self.monitor,
            "calibration": self.calibration,
            "calibration_step": None if self._step is None else self._step.step,
            "checkpoint": self.checkpoint,
        }
        publish(trainer, self.result, self.metrics, arguments, self.folder if self.save else None)

    def _show_plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print what would be pruned and what would not, and write it as YAML."""
        show_plan(trainer, self._trim(trainer, pl_module, dry_run=True).plan, self.folder)

    def _trim(self, trainer: pl.Trainer, pl_module: pl.LightningModule, **more: Any) -> TrimResult:
        """`trim` by the callback's arguments, on its calibration batches, with the other processes of the Trainer."""
        batches = calibration_batches(trainer, pl_module, self.calibration, self._trim_arguments["num_samples"])
        first = next(batches, None)
        if first is None:
            raise MisconfigurationException("NetTrim: expected batches to calibrate on, got none: the loader is empty")
        forward = self._forward(trainer, pl_module, first)
        return trim(
            pl_module, chain([first], batches), **self._trim_arguments, forward=forward,
            distributed=_distributed(trainer), **more,
        )  # fmt: skip


def _distributed(trainer: pl.Trainer) -> bool:
    return is_a(trainer.strategy, "DDPStrategy")
