"""Linear layers."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lightning_nettrim.layers.base import Layer, LayerCall


class Linear(Layer):
    """``nn.Linear``: each index of the leading dimensions is a row."""

    is_plain_matrix: ClassVar[bool] = True

    def observe(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> LayerCall:
        """The rows of the input and of the output.

        Args:
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            output: output of the call.
        """
        return self.token_call(args[0] if args else kwargs["input"], output)


class TransposedLinear(Linear):
    """A linear layer with a weight of shape ``(N, M)``, such as ``Conv1D`` in Hugging Face's GPT-2."""

    @property
    def inputs(self) -> int:
        """N, the number of inputs."""
        return self.parameter.shape[0]

    def observe(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> LayerCall:
        """The rows of the input and of the output.

        Args:
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            output: output of the call.
        """
        return super().observe(args if args else (kwargs["x"],), kwargs, output)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Add the dimension of the groups: ``(1, N, M)``."""
        return weight.unsqueeze(0)

    def from_matrix(self, W: Tensor) -> Tensor:
        """Remove the dimension of the groups; the inverse of `to_matrix`."""
        return W.reshape(self.parameter.shape)
