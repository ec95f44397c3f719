"""Capture: what each layer sees and answers on held inputs, and which layers a ReLU follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lightning_nettrim.layers import rows
from lightning_nettrim.sample import Inputs, Reservoir, forward


@dataclass(frozen=True)
class Flow:
    """How one layer is used in a forward pass: how often, and whether a ReLU is all that its output meets."""

    calls: int
    relu: bool


@dataclass(frozen=True, eq=False)
class Tape:
    """What the hooks of one layer recorded.

    Attributes:
        X: ``(P, N)`` inputs, without the bias column; ``None`` where only outputs were asked for.
        Z: ``(P, M)`` outputs before any activation; ``None`` where only inputs were asked for.
        seen: rows that flowed through the layer, of which P were kept.
    """

    X: Tensor | None
    Z: Tensor | None
    seen: int


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A `with` in which the model is in evaluation mode; every module's own mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class _Enough(BaseException):
    """Raised by a hook to end a forward pass whose remainder nobody asked for."""


def record(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Iterable[Inputs],
    *,
    inputs: bool = True,
    outputs: bool = True,
    num_samples: int,
    seed: int,
    stop_after: int | None = None,
) -> dict[str, Tape]:
    """Replay held batches and keep a bounded sample of what each layer sees and answers.

    Rows that pass a layer are chosen by their number in the stream alone: two recordings of one layer over the same
    batches hold the same rows, whatever weights the model has by then.

    Args:
        model: the model, in evaluation mode.
        layers: ``{name: layer}`` to record.
        batches: what `hold` returned.
        inputs: record X.
        outputs: record Z.
        num_samples: rows kept per layer at most.
        seed: of the sample.
        stop_after: calls of recorded layers after which the rest of a forward pass is skipped; ``None`` runs it all.

    Returns:
        ``{name: Tape}``, for the layers that were reached.
    """
    reservoirs = {name: Reservoir(num_samples, seed) for name in layers}
    calls = 0

    def listen(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            nonlocal calls
            x = args[0] if args else kwargs["input"]
            X = rows(layers[name], x) if inputs else None
            Z = output.detach().reshape(-1, output.shape[-1]) if outputs else None
            reservoirs[name].offer([t for t in (X, Z) if t is not None])
            calls += 1
            if calls == stop_after:
                raise _Enough

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(listen(name), with_kwargs=True).remove)
        for batch in batches:
            calls = 0
            try:
                forward(model, batch)
            except _Enough:
                continue
    tapes = {}
    for name, reservoir in reservoirs.items():
        if reservoir.seen:
            columns = [torch.cat(parts) for parts in zip(*reservoir.chunks(), strict=True)]
            X, Z = columns if inputs and outputs else (columns[0], None) if inputs else (None, columns[0])
            tapes[name] = Tape(X, Z, reservoir.seen)
    return tapes


def watch(model: nn.Module, layers: Mapping[str, nn.Linear], batch: Inputs) -> dict[str, Flow]:
    """Let one batch flow and see, for each layer reached, in order of first execution, what its output meets.

    A layer is followed by a ReLU if every operation that reads its output is one (a module, a function, a method, in
    place or not, or a clamp at zero), perhaps behind views, copies or an inactive dropout. A layer whose output is read
    by anything else, or returned by the model, is a linear response.

    Raises:
        ValueError: if the model does not take the batch.
    """
    watcher = _Watcher()
    order: dict[str, int] = {}

    def listen(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            order[name] = order.get(name, 0) + 1
            watcher.follow(output, name)

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(listen(name)).remove)
        try:
            with watcher:
                result = forward(model, batch)
        except Exception as error:
            shapes = [tuple(leaf.shape) for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor)]
            raise ValueError(
                f"expected batches that {type(model).__name__}.forward takes, got inputs of shapes {shapes}, on which"
                f" it raised {type(error).__name__}: {error}. Of a tuple the first element is passed, of a mapping the"
                " entries that forward names: yield batches of that form"
            ) from error
    for leaf in tree_flatten(result)[0]:
        if isinstance(leaf, Tensor):
            watcher.met(leaf, "returned")
    return {name: Flow(calls, watcher.uses.get(name) == {"relu"}) for name, calls in order.items()}


_SAME_VALUES = {
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "t",
    "contiguous", "clone", "detach", "alias", "dropout", "feature_dropout", "alpha_dropout", "to", "_to_copy",
}  # fmt: skip


class _Watcher(TorchDispatchMode):
    """Follows tensors by identity through the operations of a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: dict[str, set[str]] = {}
        self._followed: dict[int, tuple[Tensor, str]] = {}

    def follow(self, tensor: Tensor, name: str) -> None:
        """From now on, note what reads this tensor."""
        self._followed[id(tensor)] = (tensor, name)

    def met(self, tensor: Tensor, use: str) -> None:
        """Note a use of a tensor, if it is followed."""
        if id(tensor) in self._followed:
            self.uses.setdefault(self._followed[id(tensor)][1], set()).add(use)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note it for the followed tensors that it reads."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        for leaf in tree_flatten((args, kwargs))[0]:
            if not isinstance(leaf, Tensor) or id(leaf) not in self._followed:
                continue
            if name in _SAME_VALUES and isinstance(result, Tensor):
                self.follow(result, self._followed[id(leaf)][1])
            elif _is_relu(name, args, kwargs):
                self.met(leaf, "relu")
                if name.endswith("_"):
                    self._forget_storage(leaf)
            else:
                self.met(leaf, name)
        return result

    def _forget_storage(self, tensor: Tensor) -> None:
        """After an operation in place the memory holds responses, under whatever view."""
        place = tensor.untyped_storage().data_ptr()
        self._followed = {
            key: (other, name)
            for key, (other, name) in self._followed.items()
            if other.untyped_storage().data_ptr() != place
        }


def _is_relu(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name in ("relu", "relu_"):
        return True
    low = args[1] if len(args) > 1 else kwargs.get("min")
    high = args[2] if len(args) > 2 else kwargs.get("max")
    at_zero = isinstance(low, int | float) and low == 0
    return at_zero and (name in ("clamp_min", "clamp_min_") or (name in ("clamp", "clamp_") and high is None))
