"""Pruning with the weights in files equals pruning in memory, to the bit, with one block loaded at a time."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_nettrim import ADMM, Distillation, Magnitude, trim


class Residual(nn.Module):
    """x + W₂ ReLU(W₁ x), as a tensor or in a tuple, scaled by an argument that the model computes for each block."""

    def __init__(self, width: int, in_tuple: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.in_tuple = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), in_tuple

    def forward(self, x: Tensor, *, scale: tuple[Tensor, float]):
        x = x + scale[0] * scale[1] * self.down(torch.relu(self.up(x)))
        return (x, None) if self.in_tuple else x


class Network(nn.Module):
    """A stem, residual blocks and a head, with a buffer that is not saved."""

    def __init__(self, blocks: int = 3, width: int = 24, in_tuple: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(20, width), nn.ReLU())
        self.blocks = nn.ModuleList(Residual(width, in_tuple) for _ in range(blocks))
        self.head = nn.Linear(width, 26)
        self.register_buffer("scale", torch.full((1,), 0.5, device="cpu"), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = block(x, scale=(self.scale, 1.0 + i))
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x)


class NormalizedBlock(nn.Module):
    """BatchNorm, ReLU, Linear: the BatchNorm reads what the block before has computed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.norm(x)) + x)


def batches(count: int = 10, width: int = 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(50, width, generator=generator) for _ in range(count)]


def saved(make, tmp_path):
    """A network in memory, the same one on the meta device, and the file of its weights."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    with torch.device("meta"):
        on_meta = make().eval()
    return model, on_meta, tmp_path / "dense.safetensors"


def check_equal(make, data, tmp_path, **options):
    """Prune in memory and from the file, and compare weights and reports."""
    model, on_meta, weights = saved(make, tmp_path)
    output = tmp_path / "pruned.safetensors"
    options = {"allocate": "uniform"} | options
    in_memory = trim(model, data, **options)
    result = trim(on_meta, data, weights=weights, output=output, **options)
    pruned = load_file(output)
    assert list(pruned) == list(load_file(weights))
    for name, value in model.state_dict().items():
        assert torch.equal(pruned[name], value), name
    assert all(parameter.is_meta for parameter in on_meta.parameters())
    assert [report.name for report in result.reports] == [report.name for report in in_memory.reports]
    for own, other in zip(result.reports, in_memory.reports, strict=True):
        assert (own.zeros, own.sparsity, own.shape) == (other.zeros, other.sparsity, other.shape)
        assert own.local_error == pytest.approx(other.local_error, rel=1e-6)
        assert own.end_to_end_error == pytest.approx(other.end_to_end_error, rel=1e-6)
    for name in ("sparsity", "model_sparsity", "end_to_end_error", "output_distance", "output_norm"):
        assert getattr(result, name) == pytest.approx(getattr(in_memory, name), rel=1e-6), name
    assert result.plan == in_memory.plan
    assert result.skipped == in_memory.skipped
    return result


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
@pytest.mark.parametrize("in_tuple", [False, True])
def test_weights_and_reports_equal_those_of_pruning_in_memory(scheme, in_tuple, tmp_path):
    result = check_equal(lambda: Network(in_tuple=in_tuple), batches(), tmp_path, sparsity=0.6, scheme=scheme)
    assert [report.name for report in result.reports][:3] == ["stem.0", "blocks.0.up", "blocks.0.down"]
    assert result.sparsity == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
@pytest.mark.parametrize("refit", [True, False])
def test_batchnorms_before_the_first_layer_of_a_block_are_reestimated(scheme, refit, tmp_path):
    options = {"sparsity": 0.5, "scheme": scheme, "solver": Magnitude(), "refit": refit}
    check_equal(lambda: nn.Sequential(*(NormalizedBlock(20) for _ in range(3))), batches(), tmp_path, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"epsilon": 0.2, "solver": ADMM(max_steps=50)},
        {"pattern": "2:4", "solver": Magnitude()},
        {"sparsity": 0.5, "num_samples": 100, "max_rows": 64, "offload": "disk", "solver": Magnitude()},
        {"sparsity": 0.5, "ignore": ["head"], "per_layer": {"stem.0": {"sparsity": 0.2}}, "solver": Magnitude()},
        {"sparsity": 0.5, "importance": "equal", "penalize_bias": True, "solver": Magnitude()},
    ],
    ids=["epsilon", "2:4", "samples", "layers", "bias"],
)
def test_options_have_the_same_effect_as_in_memory(options, tmp_path):
    check_equal(Network, batches(), tmp_path, **options)


def test_allocation_by_magnitude_is_that_of_the_network_in_memory(tmp_path):
    result = check_equal(Network, batches(), tmp_path, sparsity=0.5, allocate="magnitude", solver=Magnitude())
    assert len({report.sparsity for report in result.reports}) > 3


def test_only_the_block_of_a_layer_is_in_memory_when_it_is_pruned(tmp_path):
    _, on_meta, weights = saved(Network, tmp_path)
    in_memory = {}

    def on_layer(report):
        in_memory[report.name] = {name for name, p in on_meta.named_parameters() if not p.is_meta}

    options = {"sparsity": 0.5, "allocate": "uniform", "solver": Magnitude(), "on_layer": on_layer}
    trim(on_meta, batches(), weights=weights, output=tmp_path / "pruned.safetensors", **options)
    outside = {"stem.0.weight", "stem.0.bias", "head.weight", "head.bias"}
    for layer, names in in_memory.items():
        block = ".".join(layer.split(".")[:2]) if layer.startswith("blocks.") else "blocks.0"
        own = {f"{block}.{name}" for name in ("up.weight", "up.bias", "down.weight", "down.bias")}
        assert names == outside | (set() if layer == "head" else own), layer


def test_a_checkpoint_in_several_files_is_copied_with_its_index(tmp_path):
    model, on_meta, weights = saved(Network, tmp_path)
    state, dense = load_file(weights), tmp_path / "dense"
    dense.mkdir()
    files = {name: f"{i % 2}.safetensors" for i, name in enumerate(state)}
    for file in set(files.values()):
        save_file({name: state[name].half() for name in state if files[name] == file}, dense / file)
    (dense / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}), encoding="utf-8")
    (dense / "config.json").write_text("{}", encoding="utf-8")
    (dense / "unused.safetensors").write_bytes(b"not in the index")
    model.load_state_dict({name: value.half() for name, value in state.items()})
    trim(model, batches(), sparsity=0.5, allocate="uniform", solver=Magnitude())
    output = tmp_path / "pruned"
    trim(on_meta, batches(), sparsity=0.5, allocate="uniform", solver=Magnitude(), weights=str(dense), output=output)
    names = {"0.safetensors", "1.safetensors", "config.json", "model.safetensors.index.json"}
    assert {path.name for path in output.iterdir()} == names
    pruned = load_file(output / "0.safetensors") | load_file(output / "1.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(pruned[name], value.half()), name


def test_an_interrupted_run_is_resumed_from_its_finished_layers(tmp_path):
    model, on_meta, weights = saved(Network, tmp_path)
    solver = Magnitude()
    trim(model, batches(), sparsity=0.5, allocate="uniform", solver=solver)
    output, folder, done = tmp_path / "pruned.safetensors", tmp_path / "layers", []

    def interrupt(report):
        done.append(report.name)
        if report.name == "blocks.1.up":
            raise KeyboardInterrupt

    files = {"weights": weights, "output": output, "folder": folder}
    options = {"sparsity": 0.5, "allocate": "uniform", "solver": solver} | files
    with pytest.raises(KeyboardInterrupt):
        trim(on_meta, batches(), on_layer=interrupt, **options)
    assert not output.exists()
    assert not [*tmp_path.glob("*.partial")]
    assert all(parameter.is_meta for parameter in on_meta.parameters())
    result = trim(on_meta, batches(), **options)
    assert done == ["stem.0", "blocks.0.up", "blocks.0.down", "blocks.1.up"]
    assert f"{len(done)} results are those of an interrupted run" in result.notes
    pruned = load_file(output)
    assert all(torch.equal(pruned[name], value) for name, value in model.state_dict().items())
    assert not folder.exists()


def test_other_weights_are_not_resumed_with_the_layers_of_an_interrupted_run(tmp_path):
    _, on_meta, weights = saved(Network, tmp_path)
    output, folder = tmp_path / "pruned.safetensors", tmp_path / "layers"

    def interrupt(report):
        if report.name == "blocks.2.down":
            raise KeyboardInterrupt

    options = {"sparsity": 0.5, "allocate": "uniform", "solver": Magnitude(), "folder": folder}
    with pytest.raises(KeyboardInterrupt):
        trim(on_meta, batches(), weights=weights, output=output, on_layer=interrupt, **options)
    state = load_file(weights)
    state["blocks.1.up.weight"][0, 0] += 1
    save_file(state, weights)
    result = trim(on_meta, batches(), weights=weights, output=output, **options)
    assert "3 results are those of an interrupted run" in result.notes


def test_a_dry_run_writes_nothing_and_its_plan_is_used(tmp_path):
    _, on_meta, weights = saved(Network, tmp_path)
    files = {"weights": weights, "output": tmp_path / "pruned.safetensors"}
    result = trim(on_meta, batches(), sparsity=0.5, allocate="magnitude", dry_run=True, **files)
    assert not files["output"].exists()
    plan = tmp_path / "plan.yaml"
    plan.write_text(result.plan, encoding="utf-8")
    planned = trim(on_meta, batches(), plan=plan, solver=Magnitude(), **files)
    assert planned.plan == result.plan


class Skipping(Network):
    """The last block reads the outputs of all blocks before it."""

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.stem(x), 0
        for block in self.blocks:
            y = y + x
            x = block(y, scale=(self.scale, 1.0))
        return self.head(x)


class Repeating(Network):
    """The first block is called twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in (*self.blocks, self.blocks[0]):
            x = block(x, scale=(self.scale, 1.0))
        return self.head(x)


@pytest.mark.parametrize("network", [Skipping, Repeating])
def test_networks_that_are_no_sequence_of_blocks_are_refused(network, tmp_path):
    _, on_meta, weights = saved(network, tmp_path)
    files = {"weights": weights, "output": tmp_path / "pruned.safetensors"}
    with pytest.raises(ValueError, match="blocks: expected a forward pass that calls each of them"):
        trim(on_meta, batches(), sparsity=0.5, allocate="uniform", **files)
    assert all(parameter.is_meta for parameter in on_meta.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocate": "global"}, "allocate: expected 'uniform' or 'magnitude' with weights=, got 'global'"),
        ({"recover": Distillation()}, "recover: expected None with weights="),
        ({"sparsity": None, "max_drop": 0.1, "metric": float}, "max_drop: expected None with weights="),
        ({"distributed": True}, "distributed: expected one process"),
        ({"output": None}, "weights, output: expected both or none"),
        ({"weights": None, "output": None, "blocks": "blocks"}, "weights, output: expected both or none"),
        ({"blocks": "head"}, r"blocks: expected the name of a sequence of modules \('stem', 'blocks'\), got 'head'"),
        ({"output": "dense.safetensors"}, "output: expected another path than that of the weights"),
        ({"weights": "nothing"}, "weights: expected a safetensors file or a folder of them, got .*nothing"),
    ],
)
def test_unusable_options_are_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, on_meta, weights = saved(Network, tmp_path)
    files = {"weights": weights, "output": tmp_path / "pruned.safetensors"}
    with pytest.raises(ValueError, match=message):
        trim(on_meta, batches(), **({"sparsity": 0.5, "allocate": "uniform"} | files | options))


def test_models_that_do_not_belong_to_the_weights_are_refused(tmp_path):
    model, on_meta, weights = saved(Network, tmp_path)
    options = {"sparsity": 0.5, "allocate": "uniform", "output": tmp_path / "pruned.safetensors"}
    with pytest.raises(ValueError, match=r"stem.0.weight: expected parameters on the meta device.*got one in memory"):
        trim(model, batches(), weights=weights, **options)
    state = load_file(weights)
    save_file(state | {"stem.0.weight": torch.zeros(2, 2)}, tmp_path / "shape.safetensors")
    with pytest.raises(ValueError, match=r"weights: expected stem.0.weight of shape \(24, 20\), got \(2, 2\)"):
        trim(on_meta, batches(), weights=tmp_path / "shape.safetensors", **options)
    save_file(state | {"head.weight": state["head.weight"] / 0}, tmp_path / "infinite.safetensors")
    with pytest.raises(ValueError, match=r"head.weight: expected finite weights, got NaN or Inf"):
        trim(on_meta, batches(), weights=tmp_path / "infinite.safetensors", **options)
    del state["blocks.1.up.bias"]
    save_file(state, tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match=r"weights: expected a tensor blocks.1.up.bias in .*, got none"):
        trim(on_meta, batches(), weights=tmp_path / "missing.safetensors", **options)
    (tmp_path / "damaged.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match="weights: expected a safetensors file, got .*damaged"):
        trim(on_meta, batches(), weights=tmp_path / "damaged.safetensors", **options)
