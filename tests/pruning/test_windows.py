"""Windows of a network: which modules they are, and that each of them can be run alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_nettrim.calibration.batch import CalibrationBatch, evaluation_mode
from lightning_nettrim.layers import find_layers
from lightning_nettrim.pruning.recovery import tuned_parameters
from lightning_nettrim.pruning.windows import find_windows, record_outputs
from lightning_nettrim.runtime.offload import TensorStore
from recipes.models import LeNet5, ResNet, ViT
from recipes.text import CharLlama


class Residual(nn.Module):
    """A residual block that overwrites its input."""

    def __init__(self, size=6):
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x, scale=1.0):
        x += scale * self.down(self.up(x).relu())
        return x


class Experts(nn.Module):
    """A residual block with a list of parts that have no residual sums."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return x + torch.cat([expert(part) for expert, part in zip(self.experts, x.chunk(3), strict=True)])


class Wrapper(nn.Module):
    """A network inside another one, with a residual sum before its blocks."""

    def __init__(self):
        super().__init__()
        self.network = nn.Module()
        self.network.forward = self.run
        self.network.embed = nn.Linear(6, 6)
        self.network.blocks = nn.ModuleList([Residual(), Experts(), Residual()])
        self.head = nn.Linear(6, 4)

    def run(self, x):
        x = self.network.embed(x) + torch.ones_like(x)
        for block in self.network.blocks:
            x = block(x)
        return x

    def forward(self, x):
        return self.head(self.network(x))


def windows_of(model, *inputs):
    layers, _ = find_layers(model)
    tuned = tuned_parameters(model, layers)
    with evaluation_mode(model):
        return find_windows(model, CalibrationBatch(inputs[0] if len(inputs) == 1 else inputs), layers, tuned.values())


def names(windows):
    return [window.name for window in windows]


def test_residual_blocks_are_windows():
    images = torch.randn(2, 28, 28)
    assert names(windows_of(ResNet(blocks=2), images)) == [
        "conv1", "bn1", "stage1.0", "stage1.1", "stage2.0", "stage2.1", "stage3.0", "stage3.1", "fc",
    ]  # fmt: skip
    vit = windows_of(ViT(depth=2), images)
    assert names(vit) == ["embed", "blocks.0", "blocks.1", "norm", "head"]
    assert [window.layers for window in vit] == [1, 4, 4, 0, 1]
    model = CharLlama()
    windows = windows_of(model, torch.zeros(2, 8, dtype=torch.long))
    assert names(windows)[-3:] == ["blocks.3", "norm", "head"]


def test_modules_around_blocks_are_divided_and_lists_inside_blocks_are_not():
    assert names(windows_of(Wrapper(), torch.randn(6, 6))) == [
        "network.embed", "network.blocks.0", "network.blocks.1", "network.blocks.2", "head",
    ]  # fmt: skip


def test_a_small_network_without_residual_sums_is_one_window():
    assert names(windows_of(LeNet5(), torch.randn(2, 28, 28))) == [""]


def test_a_sequence_without_residual_sums_is_joined_up_to_four_layers():
    def part(size):
        return [nn.Linear(size, size), nn.BatchNorm1d(size), nn.ReLU()]

    model = nn.Sequential(*(module for _ in range(6) for module in part(5)), Residual(5), nn.Linear(5, 3), nn.ReLU())
    windows = windows_of(model, torch.randn(4, 5))
    assert names(windows) == ["0", "12", "18", "19"]
    assert [len(window.modules) for window in windows] == [12, 6, 1, 2]
    assert [window.layers for window in windows] == [4, 2, 2, 1]


class Shared(nn.Module):
    """A block that is called twice, and a head."""

    def __init__(self):
        super().__init__()
        self.block, self.head = Residual(), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.block(self.block(x)))


def test_a_module_whose_parts_are_called_twice_is_not_divided():
    assert names(windows_of(Shared(), torch.randn(3, 6))) == [""]


def test_modules_that_are_called_twice_are_left_out():
    model = Shared()
    layers, _ = find_layers(model)

    def step(model, x):  # does not call the model itself
        return model.head(model.block(model.block(x)))

    windows = find_windows(model, CalibrationBatch(torch.randn(3, 6), step), layers, list(model.parameters()))
    assert names(windows) == ["head"]
    with pytest.raises(ValueError, match="called once per batch, got none: use scope='network'"):
        find_windows(
            model,
            CalibrationBatch(torch.randn(3, 6), lambda model, x: model.block(model.block(x))),
            layers,
            list(model.parameters()),
        )


def test_a_window_alone_repeats_the_network():
    torch.manual_seed(0)
    model = Wrapper().eval()
    windows = windows_of(model, torch.randn(6, 6))
    batches = [CalibrationBatch(torch.randn(6, 6)) for _ in range(2)]
    store = TensorStore()
    with evaluation_mode(model):
        outputs = record_outputs(model, windows, batches, store)
        for window, recorded in zip(windows, outputs, strict=True):
            inputs = window.record_inputs(model, batches, store)
            for _ in range(2):
                for index, target in enumerate(recorded):
                    assert torch.equal(window.outputs(inputs)(index), target.load()[0])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_keyword_arguments_are_recorded_and_objects_that_may_change_are_refused():
    torch.manual_seed(0)
    block = Residual()

    class Calling(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.block, self.head, self.scale = block, nn.Linear(6, 2), scale

        def forward(self, x):
            return self.head(self.block(x.clone(), scale=self.scale))

    batch = CalibrationBatch(torch.randn(3, 6))
    with evaluation_mode(block):
        model = Calling(torch.tensor(0.5))
        (window, _), store = windows_of(model, batch.batch), TensorStore()
        (inputs,) = window.record_inputs(model, [batch], store)
        assert torch.equal(window.run(inputs), block(batch.batch.clone(), scale=0.5))

        class Number(float):
            pass

        class Cache:
            __rmul__ = __mul__ = lambda self, other: other

        assert window.record_inputs(Calling(Number(0.5)), [batch], store)
        with pytest.raises(ValueError, match="arguments of 'block', got Cache, .*: switch caches off, or use scope"):
            window.record_inputs(Calling(Cache()), [batch], store)


def test_a_window_that_depends_on_the_batch_is_refused():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = Residual(), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(F.relu(x) if x.mean() > 5 else self.block(x.clone()))

    model = Skipping()
    windows = windows_of(model, torch.randn(3, 6))
    batches, store = [CalibrationBatch(torch.randn(3, 6)), CalibrationBatch(10 + torch.randn(3, 6))], TensorStore()
    with pytest.raises(ValueError, match="expected one call of 'block' in each batch, got 0"):
        record_outputs(model, windows, batches, store)
    with pytest.raises(ValueError, match="expected one call of 'block' in each batch, got 0"):
        windows[0].record_inputs(model, batches, store)
