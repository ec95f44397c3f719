"""Gathering and writing of single parameters, in one process whose part of a tensor is all of it."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn
from torch.distributed import fsdp
from torch.distributed import tensor as dtensor

from lightning_nettrim.layers import masking
from lightning_nettrim.runtime import sharded

pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 7), reason="FSDP2 of torch 2.6 fails on the CPU ('Stream' has no 'record_event')"
)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """A mesh of this process alone."""
    store = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.fixture
def network(mesh):
    """Two Linear layers, of which the first is gathered on its own."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    fsdp.fully_shard(network[0], mesh=mesh)
    return fsdp.fully_shard(network, mesh=mesh)


def test_only_networks_divided_by_fully_shard_count_as_such(network):
    assert sharded.is_sharded(network)
    assert sharded.is_sharded(network[0].weight)
    assert not sharded.is_sharded(nn.Linear(3, 4))
    assert not sharded.is_sharded(torch.zeros(2))


def test_a_tensor_that_is_not_divided_is_returned_as_it_is():
    value, like = torch.ones(3, 2), torch.zeros(3, 2)
    assert sharded.sharded_like(value, like) is value
    for part in (sharded.full(value), sharded.local(value), sharded.local_part(value, like)):
        assert part.data_ptr() == value.data_ptr()


def test_a_divided_value_is_gathered_to_itself(network):
    value = torch.arange(12.0).reshape(4, 3)
    divided = sharded.sharded_like(value, network[0].weight)
    assert sharded.is_sharded(divided)
    assert torch.equal(sharded.full(divided), value)
    assert torch.equal(sharded.local_part(divided, network[0].weight), value)
    assert sharded.local(divided).data_ptr() != value.data_ptr()
    other = torch.arange(30.0).reshape(1, 5, 6)
    assert torch.equal(sharded.full(sharded.sharded_like(other, network[0].weight, -1)), other)


def test_values_written_after_a_forward_pass_are_those_of_the_next_one(network):
    x = torch.ones(1, 3)
    with torch.no_grad():
        network(x)  # after which the outermost module keeps its gathered parameters
        values = {name: torch.full_like(value, 0.5) for name, value in masking.clone(network, ["2.weight"]).items()}
        before = network[2].weight
        masking.assign(network, values)
        output = network(x)
        hidden = sharded.full(network[0].weight) @ x[0] + sharded.full(network[0].bias)
    assert sharded.is_sharded(before)
    sharded.reshard(network)
    expected = hidden.relu().sum() * 0.5 + sharded.full(network[2].bias)
    torch.testing.assert_close(output[0], expected)


def test_masks_are_applied_to_the_part_of_a_process(network):
    mask = torch.tensor([[True, False, True]] * 4)
    assert not masking.satisfied(network, {"0.weight": mask})
    masking.apply(network, {"0.weight": mask})
    assert masking.satisfied(network, {"0.weight": mask})
    assert torch.equal(sharded.full(network[0].weight) != 0, mask)
    assert masking.sparsity({"": network[0].weight}) == pytest.approx(1 / 3)


def test_a_module_is_gathered_within_a_with_only(network):
    with sharded.gathered(network[0]):
        assert not sharded.is_sharded(network[0].weight)
        assert sharded.is_sharded(network[2].weight)
    assert sharded.is_sharded(network[0].weight)


def test_the_class_of_a_module_is_that_before_it_was_divided(network):
    assert type(network[0]) is not nn.Linear
    assert sharded.class_of(network[0]) is nn.Linear
    assert sharded.class_of(network[2]) is nn.Linear


def test_a_network_is_as_before_after_a_forward_pass_that_failed(network):
    def fail(*_):
        raise ValueError("failed")

    x = torch.ones(1, 3)
    expected = network(x).detach()
    handle = network[2].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="failed"):
        network(x)
    handle.remove()
    sharded.recover(network)
    assert all(sharded.is_sharded(parameter) for parameter in network.parameters())
    assert torch.equal(network(x).detach(), expected)


def test_division_by_fully_shard_is_accepted_and_any_other_refused_by_name(network, mesh):
    sharded.check_sharding(network)
    sharded.check_sharding(nn.Linear(3, 4))
    other = nn.Linear(3, 4)
    other.weight = nn.Parameter(dtensor.distribute_tensor(other.weight.detach(), mesh, [dtensor.Shard(0)]))
    with pytest.raises(ValueError, match=r"weight: expected parameters that only FSDP2 .* got tensor parallelism"):
        sharded.check_sharding(other)
