"""Selection of the layers to prune by name, pattern or class, and the reasons why others are not pruned."""

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
from lightning_nettrim.runtime.sharded import check_sharding, full

T = TypeVar("T")

NOT_TARGETED, IGNORED = "not among the targets", "ignored"
EXCLUDED_BY_USER = (NOT_TARGETED, IGNORED)
"""The reasons for layers that the user has excluded."""


def check_model(model: nn.Module) -> None:
    """Check that a model can be pruned in place.

    Raises:
        ValueError: if a parameter is on the meta device, or divided among processes in another way than by FSDP2.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{name}: expected weights in memory, got the meta device: materialize the model first, or give"
                " the file of its weights to trim(weights=...)"
            )
    check_sharding(model)


def find_layers(
    model: nn.Module, targets: Sequence[str] | None = None, ignore: Sequence[str] | None = None
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Find the layers to prune, and the reason for each other layer with a weight matrix.

    Modules that share all their parameters are one layer, with the name of the first.

    Args:
        model: any module.
        targets: names, globs, ``re:`` patterns or class names; ``None`` is every layer that can be pruned.
        ignore: keys of the same kinds, for layers that are not pruned although they are targets.

    Returns:
        ``{name: layer}`` of the layers to prune and ``{name: reason}`` of the others.

    Raises:
        ValueError: if a key matches no layer, if weights are not finite or not floating-point, or if no layer is left.
    """
    candidates, modules = _find_candidates(model)
    targeted = modules if targets is None else _select("targets", targets, modules)
    ignored = {} if ignore is None else _select("ignore", ignore, modules)
    layers: dict[str, Layer] = {}
    skipped: dict[str, str] = {}
    for name, candidate in candidates.items():
        if name not in targeted:
            skipped[name] = NOT_TARGETED
        elif name in ignored:
            skipped[name] = IGNORED
        elif isinstance(candidate, str):
            skipped[name] = candidate
        else:
            _check_weights(name, candidate)
            layers[name] = candidate
    if not layers:
        reasons = "; ".join(f"{name or '(the model)'}: {reason}" for name, reason in skipped.items())
        reasons = reasons or "no weight matrix"
        raise ValueError(f"expected at least one layer to prune, got none ({reasons}): change targets or ignore")
    return layers, skipped


def _find_candidates(model: nn.Module) -> tuple[dict[str, Layer | str], dict[str, nn.Module]]:
    """All layers with a weight matrix, or the reasons why they cannot be pruned, and their modules; both by name."""
    candidates: dict[str, Layer | str] = {}
    modules: dict[str, nn.Module] = {}
    layer_types = {module: found for module in model.modules() if (found := layer_type_of(module)) is not None}
    parts = {id(part) for module, layer_type in layer_types.items() for part in layer_type.submodules(module)}
    in_metrics = {id(part) for module in model.modules() if _is_metric(module) for part in module.modules()}
    for path, module in model.named_modules():
        if (_has_matrix(module) or module in layer_types) and id(module) not in parts:
            for name, candidate in _layers_of_module(path, module):
                reason = "it belongs to a metric, which is not part of the network"
                candidates[name], modules[name] = reason if id(module) in in_metrics else candidate, module
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(joined(path, key))
    by_weight: dict[int, list[Layer]] = {}
    for candidate in candidates.values():
        if isinstance(candidate, Layer):
            by_weight.setdefault(id(candidate.parameter), []).append(candidate)
    for (first, *aliases), names in ((layers, owners[key]) for key, layers in by_weight.items()):
        if len(aliases) + 1 < len(names) or any(not _are_aliases(first, alias) for alias in aliases):
            reason = f"its weight is shared ({', '.join(names)})"
            candidates |= dict.fromkeys([layer.name for layer in (first, *aliases)], reason)
        elif aliases:
            candidates[first.name] = replace(first, aliases=tuple(aliases))
            candidates |= {alias.name: f"it is the same layer as {first.name} and pruned with it" for alias in aliases}
    return candidates, modules


def _layers_of_module(path: str, module: nn.Module) -> Iterator[tuple[str, Layer | str]]:
    """The layers of one module by name, or the reasons why they cannot be pruned."""
    kind = type(module).__name__
    if is_parametrized(module):
        yield path, "its weight is computed by a parametrization: call parametrize.remove_parametrizations on it first"
    elif any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
        yield path, "its weight is not initialized: run one batch first"
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        yield path, f"{kind} is recurrent: errors accumulate over time steps, which its recorded inputs do not show"
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        yield path, f"{kind} looks up rows of its weight: there is no matrix product to prune"
    elif (layer_type := layer_type_of(module)) is None:
        yield path, f"{kind} has parameters, but no layer type is registered for it: call register_layer"
    else:
        yield from layer_type.from_module(path, module)


def _are_aliases(layer: Layer, other: Layer) -> bool:
    """Whether two layers that share their weight also share their bias and represent the same matrices."""
    if type(layer) is not type(other) or (layer.bias is None) != (other.bias is None) or layer.groups != other.groups:
        return False
    if layer.bias is None or other.bias is None:
        return True
    return layer.module.get_parameter(layer.bias) is other.module.get_parameter(other.bias)


def match_options(
    options: Mapping[str, Mapping[str, T]] | None, layers: Mapping[str, Layer]
) -> dict[str, dict[str, T]]:
    """Options of each layer, from options by key.

    Args:
        options: ``{key: options}``, with keys as in `find_layers`. If several keys match a layer, later ones take
            precedence.
        layers: ``{name: layer}``.

    Returns:
        ``{name: options}`` of all layers.

    Raises:
        ValueError: if a key matches no layer.
    """
    by_layer: dict[str, dict[str, T]] = {name: {} for name in layers}
    modules = {name: layer.module for name, layer in layers.items()}
    for key, values in (options or {}).items():
        for name in _select("per_layer", [key], modules):
            by_layer[name].update(values)
    return by_layer


def _has_matrix(module: nn.Module) -> bool:
    """Whether a module itself, not a submodule, has a weight matrix, which may be computed or not initialized."""
    return is_parametrized(module) or bool(matrices(module)) or _is_quantized(module)


def matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weight matrices of a module itself, by name.

    These are parameters with two or more dimensions, or not initialized, whose name contains "weight" or "proj". Other
    parameters, such as the class token and the position embeddings of a transformer, do not count.
    """
    weights = {key: p for key, p in module._parameters.items() if p is not None and ("weight" in key or "proj" in key)}
    return {key: p for key, p in weights.items() if is_lazy(p) or p.dim() > 1}


def _is_metric(module: nn.Module) -> bool:
    """Whether a module is a metric of torchmetrics, without importing this optional package."""
    return any(cls.__name__ == "Metric" and cls.__module__ == "torchmetrics.metric" for cls in type(module).__mro__)


def _is_quantized(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "quantized" in type(module).__module__ or (
        isinstance(module, nn.Linear) and isinstance(weight, Tensor) and not weight.is_floating_point()
    )


def _check_weights(name: str, layer: Layer) -> None:
    for parameter in (layer.parameter, *([] if layer.bias is None else [layer.module.get_parameter(layer.bias)])):
        if not parameter.is_floating_point():
            raise ValueError(f"{name}: expected floating-point weights, got {parameter.dtype}: ignore this layer")
        if not parameter.is_meta and not bool(full(parameter).isfinite().all()):
            raise ValueError(
                f"{name}: expected finite weights, got NaN or Inf: check whether the training has diverged"
            )


def _select(argument: str, keys: Sequence[str], modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules that match any of the keys; ``argument`` is the name of the argument, for messages."""
    selected: dict[str, nn.Module] = {}
    for key in [keys] if isinstance(keys, str) else keys:
        matches = {name: module for name, module in modules.items() if _matches(key, name, module)}
        if not matches:
            kinds = {type(module).__name__ for module in modules.values()}
            close = difflib.get_close_matches(key, [*modules, *kinds], n=3, cutoff=0.3) or list(modules)[:3]
            raise ValueError(
                f"{argument}: {key!r} matches no layer: use a name or class such as {', '.join(map(repr, close))}"
            )
        selected |= matches
    return selected


def _matches(key: str, name: str, module: nn.Module) -> bool:
    """Whether a key matches a layer by name, with or without the prefixes of compiled modules, or by class."""
    names = (name, eager_name(name))
    if key.startswith("re:"):
        return any(re.fullmatch(key[3:], candidate) is not None for candidate in names)
    classes = {cls.__name__ for cls in type(module).__mro__ if cls not in (nn.Module, object)}
    return key in classes or any(key == candidate or fnmatch.fnmatchcase(candidate, key) for candidate in names)
