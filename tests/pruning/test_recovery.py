"""Recovery of a pruned network: lower error, the same zeros, nothing else changed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_nettrim import Distillation, Magnitude, trim
from lightning_nettrim.calibration.batch import CalibrationBatch, evaluation_mode
from lightning_nettrim.calibration.network_output import find_output
from lightning_nettrim.pruning.matching import LOSSES, kl_divergence, relative_squared_error
from lightning_nettrim.pruning.recovery import tuned_parameters


class Network(nn.Module):
    """Two convolutions with BatchNorm and a linear head."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.head(x.mean((2, 3)))


def images(count, seed):
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def network():
    torch.manual_seed(0)
    model = Network()
    model(images(256, 1))
    return model.eval()


PRUNED = {"sparsity": 0.7, "allocate": "uniform", "solver": Magnitude(), "refit": False}


def pruned(**options):
    model = network()
    return model, trim(model, images(640, 2).split(64), **(PRUNED | options))


def error(model):
    x = images(512, 3)
    with torch.no_grad():
        dense = network()(x)
        return float((model(x) - dense).norm() / dense.norm())


def test_the_error_falls_on_other_data_and_the_zeros_stay():
    before, _ = pruned()
    after, result = pruned(recover=Distillation(max_steps=100, lr=3e-3))
    assert error(after) < 0.8 * error(before)
    parameters = dict(after.named_parameters())
    assert all(not bool(parameters[name][~mask].any()) for name, mask in result.masks.items())
    assert result.recovery.loss == "mse"
    assert result.recovery.loss_after < result.recovery.loss_before
    assert result.end_to_end_error < result.recovery.end_to_end_error_before
    assert result.end_to_end_bound is None
    assert "recovery: end-to-end error" in result.table()


@pytest.mark.parametrize("scope", ["network", "block"])
def test_statistics_and_gradients_are_as_before(scope):
    before, _ = pruned(recalibrate_batchnorm=False)
    after, _ = pruned(recalibrate_batchnorm=False, recover=Distillation(max_steps=20, scope=scope))
    for name in ("norm1", "norm2"):
        one, other = before.get_submodule(name), after.get_submodule(name)
        assert torch.equal(one.running_mean, other.running_mean)
        assert torch.equal(one.running_var, other.running_var)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in after.parameters())
    assert not any(module._forward_hooks for module in after.modules())
    assert not after.training


@pytest.mark.parametrize("scope", ["network", "block"])
def test_nothing_changes_if_nothing_improves(scope):
    before, plain = pruned()
    after, result = pruned(recover=Distillation(max_steps=2, lr=1e6, check_every=1, scope=scope))
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True)
    )
    assert result.recovery.steps == 0
    assert result.recovery.loss_after == result.recovery.loss_before
    assert result.end_to_end_error == plain.end_to_end_error


@pytest.mark.parametrize("scope", ["network", "block"])
def test_it_is_deterministic(scope):
    one, other = (pruned(recover=Distillation(max_steps=30, scope=scope))[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_interruption_restores_the_trained_weights():
    model = network()
    trained = {name: value.clone() for name, value in model.state_dict().items()}

    def stop(phase, fraction):
        if phase == "recovering" and fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trim(model, images(640, 2).split(64), **PRUNED, recover=Distillation(max_steps=10), on_progress=stop)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in trained.items())


def test_the_output_is_that_of_the_last_module_and_softmax_is_recognized():
    model, batch = network(), CalibrationBatch(images(8, 0))
    with evaluation_mode(model):
        output = find_output(model, batch)
        assert output.module is model.head
        assert not output.is_logits
        torch.testing.assert_close(output.of(model, batch), model(batch.batch))
        logits = CalibrationBatch(images(8, 0), lambda model, x: F.cross_entropy(model(x), torch.zeros(8).long()))
        assert find_output(model, logits).is_logits


def test_auto_uses_the_divergence_where_a_softmax_follows():
    def loss(model, x):
        return F.cross_entropy(model(x), torch.zeros(len(x)).long())

    _, result = pruned(recover=Distillation(max_steps=10), forward=loss)
    assert result.recovery.loss == "kl+mse"


def test_losses_are_their_definitions():
    torch.manual_seed(1)
    output, target = torch.randn(6, 4), torch.randn(6, 4)
    p, q = target.softmax(-1), output.softmax(-1)
    torch.testing.assert_close(kl_divergence(output, target), (p * (p / q).log()).sum(-1).mean())
    torch.testing.assert_close(
        relative_squared_error(output, target), (output - target).norm() ** 2 / target.norm() ** 2
    )
    both = kl_divergence(output, target) + relative_squared_error(output, target)
    torch.testing.assert_close(LOSSES["kl+mse"](output, target), both)


def test_layers_and_norms_are_tuned_and_others_not():
    model = network()
    result = trim(model, images(640, 2).split(64), **PRUNED, ignore=["head"], recover=Distillation(max_steps=10))
    assert torch.equal(model.head.weight, network().head.weight)
    names = set(tuned_parameters(model, {}))
    assert names == {f"{norm}.{key}" for norm in ("norm1", "norm2") for key in ("weight", "bias")}
    assert result.recovery is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "l1"}, "loss"),
        ({"scope": "layer"}, "scope"),
        ({"max_steps": 0}, "max_steps"),
        ({"lr": -1.0}, "lr"),
        ({"holdout": 1.0}, "holdout"),
    ],
)
def test_wrong_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=f"Distillation.{message}: expected"):
        Distillation(**options)


def test_something_else_is_refused():
    with pytest.raises(ValueError, match="recover: expected a Recovery"):
        pruned(recover="kl")


def test_one_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="at least two calibration batches"):
        trim(nn.Linear(4, 3), [torch.randn(1, 4)] * 1, sparsity=0.5, recover=Distillation())


class Transformer(nn.Module):
    """Three residual blocks with LayerNorm, and a head."""

    class Block(nn.Module):
        """A block of two layers."""

        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)

        def forward(self, x):
            return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 12)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def transformer():
    torch.manual_seed(0)
    return Transformer().eval()


def vectors(count, seed):
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def pruned_transformer(**options):
    model = transformer()
    return model, trim(model, vectors(640, 2).split(64), **(PRUNED | options))


def test_block_by_block_the_error_falls_on_other_data_and_only_one_window_has_gradients():
    def error(model):
        with torch.no_grad():
            return float((model(vectors(512, 3)) - transformer()(vectors(512, 3))).norm())

    before, _ = pruned_transformer()
    with_gradients = []

    def look(phase, fraction):
        if phase == "recovering":
            names = {name for name, value in model.named_parameters() if value.requires_grad}
            with_gradients.append({".".join(name.split(".")[:2]) for name in names if name.startswith("blocks")})

    model = transformer()
    result = trim(
        model, vectors(640, 2).split(64), **PRUNED, on_progress=look,
        recover=Distillation(scope="block", max_steps=60, lr=3e-3, check_every=20),
    )  # fmt: skip
    assert error(model) < 0.8 * error(before)
    assert {name for names in with_gradients for name in names} == {"blocks.0", "blocks.1", "blocks.2"}
    assert max(map(len, with_gradients)) == 1
    assert result.recovery.loss_after < result.recovery.loss_before
    assert result.end_to_end_error < result.recovery.end_to_end_error_before
    parameters = dict(model.named_parameters())
    assert all(not bool(parameters[name][~mask].any()) for name, mask in result.masks.items())


def test_a_backward_pass_keeps_the_activations_of_one_window():
    def most_saved(scope):
        saved = [0]

        def pack(tensor):
            saved[-1] += tensor.numel()
            return tensor

        def start(phase, fraction):
            saved.append(0)

        model, recover = transformer(), Distillation(scope=scope, max_steps=5)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trim(model, vectors(640, 2).split(64), **PRUNED, recover=recover, on_progress=start)
        return max(saved)

    assert most_saved("block") < 0.5 * most_saved("network")  # a third, and the layers around the blocks


def test_every_window_gets_closer_to_its_dense_output():
    def outputs(model):
        x = model.embed(vectors(512, 3))
        return [x := block(x) for block in model.blocks]

    before, _ = pruned_transformer()
    after, _ = pruned_transformer(recover=Distillation(scope="block", max_steps=60, lr=3e-3))
    with torch.no_grad():
        for one, other, dense in zip(outputs(before), outputs(after), outputs(transformer()), strict=True):
            assert (other - dense).norm() < (one - dense).norm()


def test_a_layer_whose_inputs_have_not_changed_stays_as_it_was_solved():
    before, _ = pruned_transformer()
    after, _ = pruned_transformer(recover=Distillation(scope="block", max_steps=30))
    assert torch.equal(before.embed.weight, after.embed.weight)
    assert not torch.equal(before.head.weight, after.head.weight)


def test_a_network_of_one_window_is_recovered_as_a_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 6))
    states = []
    for scope in ("network", "block"):
        copied = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 6))
        copied.load_state_dict(model.state_dict())
        recover = Distillation(scope=scope, loss="mse", max_steps=40)
        assert trim(copied, vectors(640, 2).split(64), **PRUNED, recover=recover).recovery.steps
        states.append(copied.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("scope", ["network", "block"])
def test_norms_of_a_rejected_trial_are_as_trained(scope):
    model, seen = transformer(), []

    def metric():
        seen.append(model.blocks[0].norm.weight.detach().clone())
        return float(len(seen) > 1)  # worse than dense in each trial

    trim(
        model, vectors(640, 2).split(64), solver=Magnitude(), refit=False, allocate="uniform", max_drop=0.1, mode="min",
        metric=metric, recover=Distillation(scope=scope, max_steps=20, lr=1e-2),
    )  # fmt: skip
    assert not torch.equal(seen[0], seen[1])  # tuned in the first trial
    for name, value in transformer().state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
