"""Selection of the layers to prune, by names, patterns or classes, and the reasons why others cannot be pruned."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_nettrim.layers.base import Layer, eager_name, joined
from lightning_nettrim.layers.registry import layer_type_of

T = TypeVar("T")


NOT_TARGETED, IGNORED = "not among the targets", "ignored"
EXCLUDED_BY_USER = (NOT_TARGETED, IGNORED)
"""The reasons for layers that the user has left out."""


def check_model(model: nn.Module) -> None:
    """Raise for a model that cannot be pruned in place.

    Raises:
        ValueError: for parameters on the meta device.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name}: expected weights in memory, got the meta device: materialize the model first")


def find_layers(
    model: nn.Module, targets: Sequence[str] | None = None, ignore: Sequence[str] | None = None
) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers to prune by name, and the reason for each layer with a weight matrix that is left alone.

    Modules that share all their parameters are one layer, by the name of the first.

    Args:
        model: any module.
        targets: names, globs, ``re:`` patterns or class names; ``None`` is every layer that can be pruned.
        ignore: the same, taken away from the targets.

    Returns:
        ``{name: layer}`` and ``{name: reason}``.

    Raises:
        ValueError: for a key that matches nothing, for NaN or integer weights, and where no layer is left.
    """
    candidates, kinds = _candidates(model)
    wanted = kinds if targets is None else _matching("targets", targets, kinds)
    unwanted = {} if ignore is None else _matching("ignore", ignore, kinds)
    layers: dict[str, Layer] = {}
    skipped: dict[str, str] = {}
    for name, candidate in candidates.items():
        if name not in wanted:
            skipped[name] = NOT_TARGETED
        elif name in unwanted:
            skipped[name] = IGNORED
        elif isinstance(candidate, str):
            skipped[name] = candidate
        else:
            _refuse_weights(name, candidate)
            layers[name] = candidate
    if not layers:
        found = "; ".join(f"{name or '(the model)'}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            f"expected at least one layer to prune, got none ({found or 'no weight matrix'}): change targets or ignore"
        )
    return layers, skipped


def _candidates(model: nn.Module) -> tuple[dict[str, Layer | str], dict[str, nn.Module]]:
    """Every layer with a weight matrix, or why it cannot be pruned, and the module of each; both by name."""
    candidates: dict[str, Layer | str] = {}
    kinds: dict[str, nn.Module] = {}
    types = {module: kind for module in model.modules() if (kind := layer_type_of(module)) is not None}
    parts = {id(part) for module, kind in types.items() for part in kind.submodules(module)}
    measuring = {id(part) for module in model.modules() if _is_metric(module) for part in module.modules()}
    for path, module in model.named_modules():
        if (_has_matrix(module) or module in types) and id(module) not in parts:
            for name, candidate in _layers_of(path, module):
                reason = "it belongs to a metric, which measures the network and is no part of it"
                candidates[name], kinds[name] = reason if id(module) in measuring else candidate, module
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(joined(path, key))
    sharing: dict[int, list[Layer]] = {}
    for candidate in candidates.values():
        if isinstance(candidate, Layer):
            sharing.setdefault(id(candidate.parameter), []).append(candidate)
    for (first, *twins), names in ((layers, owners[key]) for key, layers in sharing.items()):
        if len(twins) + 1 < len(names) or any(not _alike(first, twin) for twin in twins):
            reason = f"its weight is shared ({', '.join(names)})"
            candidates |= dict.fromkeys([layer.name for layer in (first, *twins)], reason)
        elif twins:
            candidates[first.name] = replace(first, aliases=tuple(twins))
            candidates |= {twin.name: f"it is the same layer as {first.name}, and solved with it" for twin in twins}
    return candidates, kinds


def _layers_of(path: str, module: nn.Module) -> Iterator[tuple[str, Layer | str]]:
    """The layers of one module by name, or why they cannot be pruned."""
    kind = type(module).__name__
    if is_parametrized(module):
        yield path, "its weight is computed by a parametrization: call parametrize.remove_parametrizations on it first"
    elif any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
        yield path, "its weight is not initialized: run one batch first"
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        yield path, f"{kind} feeds its outputs back, so that an error grows from step to step unseen by its inputs"
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        yield path, f"{kind} looks its rows up: there is no product to sparsify"
    elif (layer_type := layer_type_of(module)) is None:
        yield path, f"{kind} has parameters of its own, and no layer type is registered for it"
    else:
        yield from layer_type.from_module(path, module)


def _alike(layer: Layer, twin: Layer) -> bool:
    """Whether two layers with one weight have the same bias too, and the same matrices."""
    if type(layer) is not type(twin) or (layer.bias is None) != (twin.bias is None) or layer.groups != twin.groups:
        return False
    if layer.bias is None or twin.bias is None:
        return True
    return layer.module.get_parameter(layer.bias) is twin.module.get_parameter(twin.bias)


def match_options(
    options: Mapping[str, Mapping[str, T]] | None, layers: Mapping[str, Layer]
) -> dict[str, dict[str, T]]:
    """Overrides by layer name; keys are those of `prunable`, and of two that match one layer the later wins.

    Raises:
        ValueError: for a key that matches nothing.
    """
    chosen: dict[str, dict[str, T]] = {name: {} for name in layers}
    modules = {name: layer.module for name, layer in layers.items()}
    for key, values in (options or {}).items():
        for name in _matching("per_layer", [key], modules):
            chosen[name].update(values)
    return chosen


def _has_matrix(module: nn.Module) -> bool:
    """Whether the module itself owns a weight of two or more dimensions (initialized or not)."""
    return is_parametrized(module) or bool(matrices(module)) or _is_quantized(module)


def matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own parameters of two or more dimensions, or not initialized yet, that are called weights.

    Parameters by other names, as tokens and positions of a transformer are, make no layer.
    """
    own = {key: p for key, p in module._parameters.items() if p is not None and ("weight" in key or "proj" in key)}
    return {key: p for key, p in own.items() if is_lazy(p) or p.dim() > 1}


def _is_metric(module: nn.Module) -> bool:
    """Whether a module is a metric of torchmetrics, which need not be installed."""
    return any(cls.__name__ == "Metric" and cls.__module__ == "torchmetrics.metric" for cls in type(module).__mro__)


def _is_quantized(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "quantized" in type(module).__module__ or (
        isinstance(module, nn.Linear) and isinstance(weight, Tensor) and not weight.is_floating_point()
    )


def _refuse_weights(name: str, layer: Layer) -> None:
    for parameter in (layer.parameter, *([] if layer.bias is None else [layer.module.get_parameter(layer.bias)])):
        if not parameter.is_floating_point():
            raise ValueError(f"{name}: expected floating-point weights, got {parameter.dtype}: ignore this layer")
        if not bool(parameter.isfinite().all()):
            raise ValueError(f"{name}: expected finite weights, got NaN or Inf: the training has diverged")


def _matching(argument: str, keys: Sequence[str], layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for key in [keys] if isinstance(keys, str) else keys:
        hits = {name: module for name, module in layers.items() if _matches(key, name, module)}
        if not hits:
            kinds = {type(module).__name__ for module in layers.values()}
            near = difflib.get_close_matches(key, [*layers, *kinds], n=3, cutoff=0.3) or list(layers)[:3]
            raise ValueError(f"{argument}: {key!r} matches no layer: the nearest are {', '.join(map(repr, near))}")
        found |= hits
    return found


def _matches(key: str, name: str, module: nn.Module) -> bool:
    """Whether a key means a layer, by its name with or without the prefix of compiled modules, or by its class."""
    names = (name, eager_name(name))
    if key.startswith("re:"):
        return any(re.fullmatch(key[3:], each) is not None for each in names)
    classes = {cls.__name__ for cls in type(module).__mro__ if cls not in (nn.Module, object)}
    return key in classes or any(key == each or fnmatch.fnmatchcase(each, key) for each in names)
