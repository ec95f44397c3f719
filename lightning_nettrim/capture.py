"""Capture: what each layer sees and answers on held inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_nettrim.flow import BATCH_NORMS, Flow, Point, Tracer
from lightning_nettrim.layers import Layer, Seen
from lightning_nettrim.padding import PaddingMasks
from lightning_nettrim.replay import AmbiguousBatch, Replay
from lightning_nettrim.sample import Reservoir
from lightning_nettrim.usage import DirectProducts


@dataclass(frozen=True, eq=False)
class Tape:
    """What the hooks of one layer recorded.

    Attributes:
        X: ``(P, groups·N)`` inputs, without the bias column; ``None`` where only outputs were asked for.
        Z: ``(P, groups·M)`` outputs before anything that follows; ``None`` where only inputs were asked for.
        R: ``(P, groups·M)`` what a residual sum adds to them; ``None`` where there is none.
        seen: rows that flowed through the layer, of which P were kept.
    """

    X: Tensor | None
    Z: Tensor | None
    R: Tensor | None
    seen: int

    @property
    def rows(self) -> int:
        """P."""
        return next(len(t) for t in (self.X, self.Z) if t is not None)


class _Enough(BaseException):
    """Raised to end a forward pass whose remainder nobody asked for."""


@contextmanager
def listening(
    layers: Mapping[str, Layer], tell: Callable[[str, Layer, tuple[Any, ...], dict[str, Any], Any], None]
) -> Iterator[None]:
    """A `with` in which each call of a layer, or of a partner of it, is told."""

    def hook(name: str, user: Layer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        return lambda module, args, kwargs, output: tell(name, user, args, kwargs, output)

    with ExitStack() as stack:
        for name, layer in layers.items():
            for user in (layer, *layer.partners):
                handle = user.module.register_forward_hook(hook(name, user), with_kwargs=True)
                stack.callback(handle.remove)
        yield


def record(
    model: nn.Module,
    layers: Mapping[str, Layer],
    replays: Iterable[Replay],
    *,
    flows: Mapping[str, Flow] | None = None,
    inputs: Collection[str] | None = None,
    outputs: Collection[str] | None = None,
    num_samples: int | Mapping[str, int],
    seed: int,
    stop: bool = False,
) -> dict[str, Tape]:
    """Replay held batches and keep a bounded sample of what each layer sees and answers.

    Positions that pass a layer are chosen by their number in the stream alone: two recordings of one layer over the
    same batches hold the same rows, whatever weights the model has by then. Only chosen ones are laid out as rows.
    Padded tokens are no positions.

    Args:
        model: the model, in evaluation mode.
        layers: ``{name: layer}`` to record.
        replays: what `hold` returned.
        flows: how the layers are used; without them no residual sums are recorded.
        inputs: names of layers to record X of; ``None`` is all.
        outputs: names of layers to record Z of; ``None`` is all.
        num_samples: rows kept per layer at most, of all layers or of each.
        seed: of the sample.
        stop: skip the rest of a forward pass once all layers were called as often as their flows say.

    Returns:
        ``{name: Tape}``, for the layers that were reached.

    Raises:
        ValueError: if a residual sum of a flow is not met.
    """
    most = dict.fromkeys(layers, num_samples) if isinstance(num_samples, int) else num_samples
    reservoirs = {name: Reservoir(most[name], seed) for name in layers}
    seeing, answering = (set(layers if names is None else names) for names in (inputs, outputs))
    sums = {name: flows[name].sums if flows else 0 for name in layers}
    waiting: dict[str, list[_Waiting]] = {name: [] for name in layers}
    expected = sum(flows[name].calls for name in layers) if flows and stop else 0
    finished = 0

    def finish(name: str, call: _Waiting) -> None:
        nonlocal finished
        reservoirs[name].keep(call.keys, [t for t in (call.X, call.Z, call.R) if t is not None])
        finished += 1
        if finished == expected:
            raise _Enough

    def listen(name: str, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen = layer.see(args, kwargs, output)
        kept = masks.kept(seen.shape, next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None))
        chosen, keys = reservoirs[name].pick(seen.count if kept is None else len(kept))
        chosen = chosen if kept is None else kept[chosen]
        call = _Waiting(layer, chosen, keys, sums[name])
        call.X = seen.inputs(chosen) if name in seeing else None
        call.Z = seen.outputs(chosen) if name in answering else None
        if not call.sums:
            finish(name, call)
        else:
            assert seen.tensor is not None
            waiting[name].append(call)
            tracer.follow(seen.tensor, name, call, layer.channels(seen.tensor))

    def summed(name: str, call: _Waiting, other: Tensor) -> None:
        R = call.layer.lay(other, call.chosen)
        call.R = R if call.R is None else call.R + R
        call.sums -= 1
        if not call.sums:
            waiting[name].remove(call)
            finish(name, call)

    tracer = Tracer(model, summed)
    followed = PaddingMasks().followed(model)
    with followed as masks, listening(layers, listen), tracer if any(sums.values()) else ExitStack():
        for replay in replays:
            finished = 0
            try:
                replay(model)
            except _Enough:
                pass
            finally:
                tracer.forget()
                masks.forget()
            for name, calls in waiting.items():
                if calls:
                    raise ValueError(f"{name}: expected the residual sum that follows it in other batches, met none")
    return {
        name: _tape(reservoir, name in seeing, name in answering, sums[name] > 0)
        for name, reservoir in reservoirs.items()
        if reservoir.seen
    }


@dataclass(frozen=True)
class Course:
    """What `watch` saw.

    Attributes:
        flows: of the layers that were reached, in order of first execution.
        unusable: why the calls of the others that were reached are not their weights times what they see.
        direct: names of parameters that are multiplied outside the forward of a layer.
        norms: the BatchNorms with running statistics, in order of first execution, each with the layer that was last
            called before it.
        rows: positions of each layer in all batches together.
    """

    flows: dict[str, Flow]
    unusable: dict[str, str]
    direct: list[str]
    norms: dict[str, str | None]
    rows: dict[str, int]

    def described(self) -> dict[str, str]:
        """All of it in words, however often a layer is called."""
        flows = {name: f"{flow} behind {flow.norm}" if flow.norm else str(flow) for name, flow in self.flows.items()}
        return flows | self.unusable | {name: f"behind {layer}" for name, layer in self.norms.items()}


def watch(model: nn.Module, layers: Mapping[str, Layer], replays: Iterable[Replay]) -> Course:
    """Let held batches flow and see what each layer's output meets, in order of first execution.

    A call is followed through a BatchNorm with running statistics, residual sums and max-pooling to a rectifier, as
    long as nothing else reads what lies between; where the calls of a layer meet different things, or it is returned,
    its response is linear. A BatchNorm that others go through as well is not followed.

    Raises:
        ValueError: if the model does not take a batch.
    """
    tracer, products = Tracer(model), DirectProducts(model, layers)
    points: dict[str, list[Point]] = {}
    flows: dict[str, list[Flow]] = {}
    calls: dict[str, int] = {}
    unusable: dict[str, str] = {}
    passes: dict[str, int] = {}
    rows: Counter[str] = Counter()
    behind: dict[str, str | None] = {}
    last: str | None = None

    def pass_by(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            passes[name] = passes.get(name, 0) + 1
            behind[name] = last

        return hook

    def listen(name: str, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal last
        points.setdefault(name, [])
        flows.setdefault(name, [])
        first = not points[name] and not flows[name]
        try:
            seen = layer.see(args, kwargs, output)
            rows[name] += seen.count
            tensor = seen.tensor if not first or _is_product(layer, seen) else None
        except ValueError as error:
            unusable[name] = str(error)
            tensor = None
        else:
            if tensor is None and seen.tensor is not None:
                unusable[name] = f"{layer.kind} answers something else than its weights times its inputs"
        if tensor is None:
            points[name].append(Point(name, None))
        else:
            points[name].append(tracer.follow(tensor, name, None, layer.channels(tensor)))
        last = last if name in unusable else name

    with listening(layers, listen), products.following(), ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, BATCH_NORMS) and module.running_mean is not None:
                stack.callback(module.register_forward_pre_hook(pass_by(name)).remove)
        for replay in replays:
            try:
                with tracer, products:
                    result = replay(model)
            except AmbiguousBatch:
                raise
            except Exception as error:
                raise ValueError(
                    f"expected batches that {type(model).__name__}.forward takes, got inputs of shapes"
                    f" {replay.shapes()}, on which it raised {type(error).__name__}: {error}. Of a tuple as many"
                    " elements are passed as forward requires, of a mapping the entries that it names: yield batches of"
                    " that form, or pass forward=lambda model, batch: ..."
                ) from error
            for leaf in tree_flatten(result)[0]:
                if isinstance(leaf, Tensor):
                    tracer.met(leaf, "returned")
            for name, called in points.items():
                calls[name] = max(calls.get(name, 0), len(called))
                flows[name] += [point.flow() for point in called]
                called.clear()
            tracer.forget()
    for name, layer in layers.items():
        if layer.names(bias=False)[0] in products.found:
            unusable[name] = "its weight is used by an operation outside its own forward, which hooks do not see"
    found = {}
    for name, met in flows.items():
        alike = all(flow.same(met[0]) for flow in met)
        alone = met[0].norm is None or passes[met[0].norm] == len(met)
        if name not in unusable:
            found[name] = replace(met[0], calls=calls[name]) if alike and alone else Flow(calls[name])
    return Course(found, unusable, sorted(products.found), behind, dict(rows))


def _is_product(layer: Layer, seen: Seen, positions: int = 16) -> bool:
    """Whether some rows of inputs times the weights are the outputs, as far as the precision of the layer goes."""
    some = torch.arange(min(positions, seen.count))
    W, Z = layer.matrix(), layer.columns(seen.outputs(some))
    X = layer.rows(seen.inputs(some), layer.bias is not None)
    return not bool((X @ W - Z).norm() > 2e-2 * Z.norm() + 1e-6)


@dataclass(eq=False)
class _Waiting:
    """A call whose rows are complete once so many sums were met."""

    layer: Layer
    chosen: Tensor
    keys: Tensor
    sums: int
    X: Tensor | None = None
    Z: Tensor | None = None
    R: Tensor | None = None


def _tape(reservoir: Reservoir, inputs: bool, outputs: bool, sums: bool) -> Tape:
    columns = iter([torch.cat(parts) for parts in zip(*(c.load() for c in reservoir.chunks()), strict=True)])
    X, Z, R = (next(columns) if asked else None for asked in (inputs, outputs, sums))
    return Tape(X, Z, R, reservoir.seen)
