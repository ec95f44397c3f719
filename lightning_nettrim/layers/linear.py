"""Linear layers."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from lightning_nettrim.layers.base import Layer, LayerCall


class Linear(Layer):
    """``nn.Linear``: every position of the leading dimensions is a row."""

    is_plain_matrix: ClassVar[bool] = True

    @property
    def inputs(self) -> int:
        """Inputs of a neuron."""
        return self.parameter.shape[1]

    def observe(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> LayerCall:
        """Rows of the input and of the output."""
        x = args[0] if args else kwargs["input"]
        shape = tuple(output.shape[:-1])
        return LayerCall(
            math.prod(shape), lambda i: self.take_rows(x, i), lambda i: self.take_rows(output, i), output, shape
        )


class TransposedLinear(Linear):
    """A linear layer whose weight is ``(N, M)``, as ``Conv1D`` of Hugging Face's GPT-2 is."""

    @property
    def inputs(self) -> int:
        """Inputs of a neuron."""
        return self.parameter.shape[0]

    def observe(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> LayerCall:
        """Rows of the input and of the output."""
        return super().observe(args if args else (kwargs["x"],), kwargs, output)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """``(1, N, M)``."""
        return weight.unsqueeze(0)

    def from_matrix(self, W: Tensor) -> Tensor:
        """`to_matrix` turned round."""
        return W.reshape(self.parameter.shape)
