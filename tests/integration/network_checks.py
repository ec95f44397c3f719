"""Properties of every pruned network, checked on its weights, not on what the package reports."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


@dataclass
class Snapshot:
    """A network before pruning: its state, the modes of its modules and the hooks on them."""

    state: dict
    modes: list
    hooks: list


def snapshot(model):
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return Snapshot(state, [module.training for module in model.modules()], hooks(model))


def hooks(model):
    return [len(getattr(module, kind)) for module in model.modules() for kind in HOOKS]


def owners(model):
    """``{name: module}`` of all modules with a weight matrix, and of the two matrices of an attention."""
    found, parts = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            found |= {f"{name}.in_proj": module, f"{name}.out_proj": module}
            parts.add(id(module.out_proj))
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() > 1 and id(module) not in parts:
            found[name] = module
    return found


def weight_of(model, name):
    parameters = dict(model.named_parameters())
    return next(parameters[key] for key in (f"{name}.weight", f"{name}_weight") if key in parameters).detach()


def check_pruned(model, before, result, sparsity):
    """Check the zeros, the list of skipped layers, and that nothing else has changed."""
    after, named = model.state_dict(), [report.name for report in result.reports]
    reasons = {layer.name: layer.reason for layer in result.skipped}

    weights = {name: weight_of(model, name) for name in named}
    for report in result.reports:
        zeros = int((weights[report.name] == 0).sum())
        assert zeros == report.zeros, report.name
        assert abs(zeros - sparsity * weights[report.name].numel()) <= 1, (report.name, zeros)
    total = sum(int((weight == 0).sum()) for weight in weights.values())
    assert abs(total / sum(map(torch.numel, weights.values())) - sparsity) < 1e-3
    assert abs(result.sparsity - sparsity) < 1e-3
    assert all(torch.equal(mask, after[name] != 0) for name, mask in result.masks.items())

    assert len(set(named)) == len(named)
    assert not set(named) & set(reasons)
    assert set(owners(model)) <= {*named, *reasons}, "a module with a weight matrix is neither pruned nor listed"
    parameters = {name for name, _ in model.named_parameters()}
    assert not {*named, *reasons} & parameters, "a parameter is listed as if it were a layer"
    assert all(reasons.values())

    assert list(after) == list(before.state)
    assert all(after[name].shape == value.shape for name, value in before.state.items())
    assert all(bool(value.isfinite().all()) for value in after.values() if value.is_floating_point())
    assert hooks(model) == before.hooks
    assert [module.training for module in model.modules()] == before.modes
    assert all(parameter.grad is None for parameter in model.parameters())
    for name in changed(before, after):
        assert may_change(model, name, named), f"{name} was changed"


def changed(before, after):
    return [name for name, value in before.state.items() if not torch.equal(value, after[name])]


def may_change(model, name, pruned):
    """Whether an entry of the state belongs to a pruned layer or to a BatchNorm (except its number of batches)."""
    path = name.rpartition(".")[0]
    if name.endswith("num_batches_tracked"):
        return False
    attention = {f"{path}.in_proj"} & set(pruned) if name.rpartition(".")[2].startswith("in_proj") else set()
    return path in pruned or bool(attention) or isinstance(model.get_submodule(path), _BatchNorm)


def by_magnitude(model, names, sparsity):
    """A copy in which the smallest weights of each layer are zero."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            weight = weight_of(other, name)
            smallest = weight.abs().flatten().argsort()[: round(sparsity * weight.numel())]
            weight.view(-1)[smallest] = 0
    return other


def error(model, outputs, inputs, run):
    """‖outputs of the model − outputs‖ / ‖outputs‖ on inputs."""
    with torch.no_grad():
        return float((run(model, inputs) - outputs).norm() / outputs.norm())
