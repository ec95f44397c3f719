"""Activations of the layers of a model on the calibration set, with the weights that the model has when asked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_nettrim.calibration.calibration_set import CalibrationSet
from lightning_nettrim.calibration.recording import Recording, record
from lightning_nettrim.core.reductions import all_finite
from lightning_nettrim.layers import Layer
from lightning_nettrim.layers.context import LayerContext
from lightning_nettrim.layers.folding import FoldedLayer
from lightning_nettrim.runtime.distributed import SINGLE_PROCESS, ProcessGroup

COMPARED_ROWS = 256
"""Rows on which it is determined which layer reads the output of which."""


@dataclass(frozen=True, eq=False)
class Activations:
    """The inputs and responses of layers on a calibration set; the model must be in evaluation mode.

    Args:
        model: the model.
        layers: ``{name: layer}`` in order of execution.
        contexts: what follows each layer.
        folded_layers: each layer with the BatchNorm that follows folded in, as trained.
        calibration_set: sampled inputs.
        rows: maximum number of rows of each layer.
        seed: of the sample of rows.
        processes: processes that each have inputs of their own.
    """

    model: nn.Module
    layers: Mapping[str, Layer]
    contexts: Mapping[str, LayerContext]
    folded_layers: Mapping[str, FoldedLayer]
    calibration_set: CalibrationSet
    rows: Mapping[str, int]
    seed: int
    processes: ProcessGroup = SINGLE_PROCESS

    def first_inputs(self, size: int) -> Activations:
        """The same on about the first ``size`` inputs."""
        return replace(self, calibration_set=self.calibration_set.first(size))

    def responses(self, *names: str) -> dict[str, Tensor]:
        """``{name: (groups, P, M)}``: the responses of layers, after everything that follows them."""
        recordings = self.record(*names, inputs=())
        return {name: self.response(name, recordings.pop(name)) for name in names if name in recordings}

    def record(
        self, *names: str, inputs: Collection[str] | None = None, outputs: Collection[str] | None = None
    ) -> dict[str, Recording]:
        """Record several layers in one pass over the calibration set.

        Args:
            *names: of the layers.
            inputs: layers to record inputs of; ``None`` is all.
            outputs: layers to record outputs of; ``None`` is all.
        """
        layers = {name: self.layers[name] for name in names}
        with self.processes.raise_together():
            return record(
                self.model, layers, self.calibration_set, contexts=self.contexts, inputs=inputs, outputs=outputs,
                num_samples=self.rows, seed=self.seed, stop=True,
            )  # fmt: skip

    def inputs(self, name: str, recording: Recording) -> Tensor:
        """``(groups, P, N)`` or, with a column of ones, ``(groups, P, N + 1)``: recorded inputs of a layer.

        Raises:
            ValueError: for NaN and Inf.
        """
        return self.folded_layers[name].input_rows(self._finite(name, recording.X))

    def outputs(self, name: str, recording: Recording) -> Tensor:
        """``(P, groups·M)``: recorded outputs of a layer.

        Raises:
            ValueError: for NaN and Inf.
        """
        return self._finite(name, recording.Z)

    def offset(self, name: str, recording: Recording) -> Tensor | None:
        """``(groups, P or 1, M)``: what is added to the products of a layer."""
        return self.folded_layers[name].offset(None if recording.R is None else self._finite(name, recording.R))

    def response(self, name: str, recording: Recording) -> Tensor:
        """``(groups, P, M)``: the recorded response of a layer with the current BatchNorm, in the solve's dtype.

        Raises:
            ValueError: for NaN and Inf.
        """
        folded = self.folded_layers[name].updated(self.contexts[name], self.model)
        R = None if recording.R is None else self._finite(name, recording.R)
        return folded.response(self._finite(name, recording.Z), R)

    def is_input_of(self, source: str, recording: Recording, target: Recording) -> bool:
        """Whether the response of the source is the input of the target, bit by bit, in every process."""
        return self._equal(self.response(source, recording)[0], target)

    def _equal(self, response: Tensor, target: Recording) -> bool:
        return self.processes.all(target.X is not None and torch.equal(response, target.X.to(response.dtype)))

    def outgoing_importance(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{name: (groups, 1, M)}``: the norm of the weights that read each output, with mean square one.

        A layer reads another one if its input equals that one's response on some rows of the first calibration batch.
        Layers without readers are left out.
        """
        return importance_of_reads(self.reads(weights, {})[0])

    def reads(
        self, weights: Mapping[str, Tensor], earlier: Mapping[str, Tensor]
    ) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
        """The weights with which layers read the responses of others.

        Args:
            weights: ``{name: (groups, N, M)}`` of the layers.
            earlier: ``{name: (P, M)}``: compared responses of other layers.

        Returns:
            ``{name: [(M,), ...]}``: for each reader of a response, the sums of its squared weights; and
            ``{name: (P, M)}``: the compared responses of the layers.
        """
        first = replace(self, calibration_set=self.calibration_set[:1], rows=dict.fromkeys(self.rows, COMPARED_ROWS))
        recordings = first.record(*self.layers)
        responses = {name: self.response(name, recording)[0] for name, recording in recordings.items()}
        reads: dict[str, list[Tensor]] = {}
        for name, response in (dict(earlier) | responses).items():
            inputs = response.shape[-1]
            for reader, recording in recordings.items():
                if reader != name and self._equal(response, recording):
                    reads.setdefault(name, []).append(weights[reader][0, :inputs].square().sum(-1))
        return reads, responses

    def _finite(self, name: str, recorded: Tensor | None) -> Tensor:
        """The recorded tensor after a check that it is finite; an error in one process is raised in all."""
        assert recorded is not None
        with self.processes.raise_together():
            if not bool(all_finite(recorded)):
                raise ValueError(
                    f"{name}: expected finite activations, got NaN or Inf: check the calibration data and the weights"
                )
        return recorded


def importance_of_reads(reads: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    """``{name: (groups, 1, M)}``: the norm of all weights that read each output, with mean square one.

    Args:
        reads: ``{name: [(M,), ...]}``: sums of squared weights, as `Activations.reads` returns them.
    """
    squares = {name: torch.stack(parts).sum(0) for name, parts in reads.items()}
    return {
        name: (square / square.mean()).nan_to_num(1.0).clamp(min=1e-2).sqrt().reshape(1, 1, -1)
        for name, square in squares.items()
    }
