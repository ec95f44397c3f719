"""Module ⇄ matrix: which layers can be pruned, their W (with the bias as its last row), and their inputs as rows."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

T = TypeVar("T")


def matrix(layer: nn.Linear) -> Tensor:
    """``(N, M)`` weights, or ``(N + 1, M)`` with the bias as the last row; a copy in float32 or float64."""
    W = layer.weight.detach().mT
    if layer.bias is not None:
        W = torch.cat([W, layer.bias.detach().unsqueeze(0)])
    return W.to(solve_dtype(W.dtype), copy=True)


def rows(layer: nn.Linear, x: Tensor) -> Tensor:
    """``(P, N)``: the layer's input with all leading dimensions flattened."""
    return x.detach().reshape(-1, layer.in_features)


def with_bias(layer: nn.Linear, X: Tensor) -> Tensor:
    """``(P, N)`` or ``(P, N + 1)``: rows in the solve's dtype, with a column of ones where the layer has a bias."""
    X = X.to(solve_dtype(X.dtype))
    return X if layer.bias is None else torch.cat([X, X.new_ones(len(X), 1)], 1)


def solve_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def parameters_of(name: str, layer: nn.Linear, W: Tensor) -> dict[str, Tensor]:
    """The matrix W as the layer's own parameters, under their names in the model; `matrix` turned round."""
    prefix = f"{name}." if name else ""
    parts = {f"{prefix}weight": W[: layer.in_features].mT}
    if layer.bias is not None:
        parts[f"{prefix}bias"] = W[-1]
    return parts


def refuse_unusable(model: nn.Module) -> None:
    """Raise for a model that cannot be pruned in place.

    Raises:
        ValueError: for compiled modules and for parameters on the meta device.
    """
    for name, module in model.named_modules():
        compiled = getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        if compiled:
            raise ValueError(
                f"{name or type(module).__name__}: expected an eager module, got a compiled one, through which hooks do"
                " not fire: prune first and compile afterwards (a wrapper of torch.compile holds it as `_orig_mod`)"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name}: expected weights in memory, got the meta device: materialise the model first")


def prunable(
    model: nn.Module, targets: Sequence[str] | None = None, ignore: Sequence[str] | None = None
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The layers to prune by name, and the reason for each layer with a weight matrix that is left alone.

    Args:
        model: any module.
        targets: names, globs, ``re:`` patterns or class names; ``None`` is every layer that can be pruned.
        ignore: the same, taken away from the targets.

    Returns:
        ``{name: layer}`` and ``{name: reason}``.

    Raises:
        ValueError: for a key that matches nothing, for NaN or integer weights, and where no layer is left.
    """
    candidates = {name: module for name, module in model.named_modules() if _has_matrix(module)}
    wanted = candidates if targets is None else _matching("targets", targets, candidates)
    unwanted = {} if ignore is None else _matching("ignore", ignore, candidates)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    layers: dict[str, nn.Linear] = {}
    skipped: dict[str, str] = {}
    for name, module in candidates.items():
        if name not in wanted:
            skipped[name] = "not among the targets"
        elif name in unwanted:
            skipped[name] = "ignored"
        elif reason := _unsupported(module, owners):
            skipped[name] = reason
        else:
            assert isinstance(module, nn.Linear)
            _refuse_weights(name, module)
            layers[name] = module
    if not layers:
        found = "; ".join(f"{name or '(the model)'}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            f"expected at least one layer to prune, got none ({found or 'no weight matrix'}): change targets or ignore"
        )
    return layers, skipped


def per_layer_options(
    options: Mapping[str, Mapping[str, T]] | None, layers: Mapping[str, nn.Module]
) -> dict[str, dict[str, T]]:
    """Overrides by layer name; keys are those of `prunable`, and of two that match one layer the later wins.

    Raises:
        ValueError: for a key that matches nothing.
    """
    chosen: dict[str, dict[str, T]] = {name: {} for name in layers}
    for key, values in (options or {}).items():
        for name in _matching("per_layer", [key], layers):
            chosen[name].update(values)
    return chosen


def _has_matrix(module: nn.Module) -> bool:
    """Whether the module itself owns a parameter of two or more dimensions (initialised or not)."""
    if is_parametrized(module):
        return True
    own = [p for p in module._parameters.values() if p is not None]
    return any(is_lazy(p) or p.dim() > 1 for p in own) or _is_quantized(module)


def _is_quantized(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "quantized" in type(module).__module__ or (
        isinstance(module, nn.Linear) and isinstance(weight, Tensor) and not weight.is_floating_point()
    )


def _unsupported(module: nn.Module, owners: Mapping[int, list[str]]) -> str | None:
    """Why this layer cannot be pruned, or None."""
    kind = type(module).__name__
    if is_parametrized(module):
        return f"its {kind} weight is parametrized: remove the parametrization first"
    if not isinstance(module, nn.Linear):
        return f"{kind} is not supported: only Linear is"
    if is_lazy(module.weight):
        return "its weight is not initialised: run one batch first"
    for parameter in module.parameters(recurse=False):
        if len(names := owners.get(id(parameter), [])) > 1:
            return f"its weight is shared ({', '.join(names)})"
    return None


def _refuse_weights(name: str, layer: nn.Linear) -> None:
    for parameter in layer.parameters(recurse=False):
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
    if key.startswith("re:"):
        return re.fullmatch(key[3:], name) is not None
    classes = {cls.__name__ for cls in type(module).__mro__ if cls not in (nn.Module, object)}
    return key == name or key in classes or fnmatch.fnmatchcase(name, key)
