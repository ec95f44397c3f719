"""Parameters and multiply-accumulates of a network as functions of the numbers of kept units."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_nettrim.calibration.batch import CalibrationBatch, evaluation_mode
from lightning_nettrim.calibration.nested import count_inputs
from lightning_nettrim.pruning.units.groups import UnitGroup
from lightning_nettrim.pruning.units.surgery import num_channels


@dataclass(frozen=True)
class ModuleCost:
    """The cost of one module of the trained network.

    Attributes:
        weights: number of values that are proportional to its inputs and outputs.
        biases: number of values that are proportional to its outputs.
        macs: multiply-accumulates per input of the network.
        inputs: groups whose units it reads, and the fraction of its inputs that one unit has.
        outputs: groups whose units it computes, and the fraction of its outputs that one unit has.
    """

    weights: int
    biases: int
    macs: float
    inputs: tuple[tuple[str, float], ...]
    outputs: tuple[tuple[str, float], ...]


class UnitCosts:
    """Costs of a network with some of its units removed.

    Args:
        model: the trained model.
        batch: a batch, on which the multiply-accumulates are counted.
        groups: the groups of units.

    Attributes:
        sizes: number of units of each group.
    """

    def __init__(self, model: nn.Module, batch: CalibrationBatch, groups: Mapping[str, UnitGroup]) -> None:
        self.sizes = {name: group.size for name, group in groups.items()}
        self._total = {
            "units": float(sum(self.sizes.values())),
            "parameters": float(sum(p.numel() for p in model.parameters())),
        }
        modules = dict(model.named_modules())
        touched = {path: modules[path] for group in groups.values() for path in _paths(group)}
        macs, self._total["macs"] = count_macs(model, batch, touched)
        self._modules = {path: _module_cost(path, module, macs[path], groups) for path, module in touched.items()}
        self._of_group = {
            name: [self._modules[path] for path in dict.fromkeys(_paths(group))] for name, group in groups.items()
        }

    def total(self, measure: str) -> float:
        """Cost of the trained network."""
        return self._total[measure]

    def of(self, kept: Mapping[str, int], measure: str) -> float:
        """Cost of the network with so many units of each group."""
        if measure == "units":
            return float(sum(kept.values()))
        removed = sum(self._cost(m, self.sizes, measure) - self._cost(m, kept, measure) for m in self._modules.values())
        return self._total[measure] - removed

    def saving(self, group: str, kept: Mapping[str, int], fewer: int, measure: str) -> float:
        """Reduction of the cost by fewer units of one group."""
        if measure == "units":
            return float(kept[group] - fewer)
        reduced = {**kept, group: fewer}
        return sum(self._cost(m, kept, measure) - self._cost(m, reduced, measure) for m in self._of_group[group])

    def _cost(self, module: ModuleCost, kept: Mapping[str, int], measure: str) -> float:
        inputs, outputs = (
            1 - sum((self.sizes[name] - kept[name]) * fraction for name, fraction in parts)
            for parts in (module.inputs, module.outputs)
        )
        if measure == "macs":
            return module.macs * inputs * outputs
        return module.weights * inputs * outputs + module.biases * outputs


def count_macs(
    model: nn.Module, batch: CalibrationBatch, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, float], float]:
    """Multiply-accumulates per input of some modules and of the whole model, by PyTorch's counter of operations."""
    counts, starts = dict.fromkeys(modules, 0.0), dict[str, int]()
    size = count_inputs(batch.batch)
    counter = FlopCounterMode(display=False)
    with evaluation_mode(model), counter, ExitStack() as stack:
        for path, module in modules.items():

            def before(module: nn.Module, args: Any, path: str = path) -> None:
                starts[path] = counter.get_total_flops()

            def after(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
                counts[path] += (counter.get_total_flops() - starts[path]) / 2 / size

            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after).remove)
        batch(model)
        total = counter.get_total_flops() / 2 / size
    return counts, total


def _paths(group: UnitGroup) -> list[str]:
    """The modules that a group changes; a reader is a module of the same name."""
    return [*group.readers, *group.producers, *group.channelwise]


def _module_cost(path: str, module: nn.Module, macs: float, groups: Mapping[str, UnitGroup]) -> ModuleCost:
    own = dict(module.named_parameters(recurse=False))
    weights = sum(p.numel() for p in own.values() if p.dim() > 1)
    biases = sum(p.numel() for p in own.values() if p.dim() <= 1)
    computed = [(name, {**group.producers, **group.channelwise}.get(path)) for name, group in groups.items()]
    read = [(name, group.readers.get(path)) for name, group in groups.items()]
    inputs, outputs = num_channels(module)
    return ModuleCost(
        weights,
        biases,
        macs,
        tuple((name, channels.shape[1] / inputs) for name, channels in read if channels is not None),
        tuple((name, channels.shape[1] / outputs) for name, channels in computed if channels is not None),
    )
