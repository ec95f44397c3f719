"""Modules as other people write them: compiled, pruned, parametrized, with weights that are used directly."""

from __future__ import annotations

import logging

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.utils.data import DataLoader, TensorDataset
from trainers import LIGHTNING_WARNINGS, make_trainer

from lightning_nettrim import Magnitude, NetTrim, trim
from lightning_nettrim.layers import find_layers

pytestmark = [
    *LIGHTNING_WARNINGS,
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning"),
]

X = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
HALF = {"sparsity": 0.5, "allocate": "uniform", "max_rows": 512}


def network():
    """6-8-4 with a ReLU, the same in every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def sparsity(weight):
    return float((weight == 0).float().mean())


# --- compiled


class Module(pl.LightningModule):
    """`network`, compiled in one of several ways."""

    def __init__(self, how="not"):
        super().__init__()
        net = network()
        self.net = torch.compile(net, backend="eager") if how == "submodule" else net
        if how == "in place":
            self.net.compile(backend="eager")
        if how == "method":
            self.step = torch.compile(self.step, backend="eager")

    def forward(self, x):
        return self.net(x)

    def step(self, batch):
        return self(batch[0]).square().mean()

    def training_step(self, batch, batch_idx):
        return self.step(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        return DataLoader(TensorDataset(X), batch_size=50)

    def val_dataloader(self):
        return DataLoader(TensorDataset(X), batch_size=50)


@pytest.mark.parametrize("how", ["submodule", "in place", "method", "module"])
def test_a_compiled_module_is_pruned_like_the_eager_one(tmp_path, how):
    models, callbacks = [], []
    for kind in ("not", how):
        torch.manual_seed(0)
        model = torch.compile(Module(), backend="eager") if kind == "module" else Module(kind)
        callback = NetTrim(per_layer={"net.0": {"sparsity": 0.25}}, **HALF)
        make_trainer(tmp_path / kind.replace(" ", "_"), callback, max_epochs=1).fit(model)
        models.append(model)
        callbacks.append(callback)
    eager, compiled = (list(model.parameters()) for model in models)
    assert all(torch.equal(one, other) for one, other in zip(eager, compiled, strict=True))
    assert [report.sparsity for report in callbacks[1].result.reports] == [0.25, 0.5]
    with torch.no_grad():
        assert torch.allclose(models[0](X), models[1](X), atol=1e-6)


@pytest.mark.parametrize(("written", "read"), [("submodule", "not"), ("not", "submodule"), ("submodule", "submodule")])
def test_checkpoints_of_compiled_modules_load_into_either_form(tmp_path, written, read):
    make_trainer(tmp_path, first := NetTrim(**HALF), max_epochs=1).fit(source := Module(written))
    file = first.folder / "pruned.ckpt"
    keys = torch.load(file, weights_only=True)["state_dict"]
    assert any("_orig_mod" in key for key in keys) == (written == "submodule")
    make_trainer(tmp_path, again := NetTrim(**HALF)).validate(model := Module(read), ckpt_path=file, verbose=False)
    assert again.result is None
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), model.parameters(), strict=True))
    make_trainer(tmp_path, NetTrim(**HALF), max_epochs=3).fit(model := Module(read), ckpt_path=file)
    pairs = [*zip(source.parameters(), model.parameters(), strict=True)]
    assert all(bool((b[a == 0] == 0).all()) for a, b in pairs)
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_trim_prunes_compiled_modules():
    whole, inside, eager = network(), network(), network()
    inside[0].compile(backend="eager")
    for model in (torch.compile(whole, backend="eager"), inside, eager):
        trim(model, X.split(50), **HALF)
    for other in (whole, inside):
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), eager.parameters(), strict=True))
    assert sparsity(eager[0].weight) == 0.5


# --- pruned, parametrized


def test_weights_pruned_by_torch_are_pruned_further_and_stay_parametrized():
    model, plain = network(), network()
    prune.l1_unstructured(model[0], "weight", amount=0.25)
    prune.l1_unstructured(model[0], "bias", amount=0.25)
    with torch.no_grad():
        plain[0].weight.copy_(model[0].weight)
        plain[0].bias.copy_(model[0].bias)
    keys = list(model.state_dict())
    trim(model, X.split(50), **HALF)
    trim(plain, X.split(50), **HALF)
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert torch.allclose(model(X), plain(X), atol=1e-6)
    assert torch.equal(model[0].weight_mask, (plain[0].weight != 0).float())
    assert torch.equal(model[0].weight_orig, plain[0].weight)
    prune.remove(model[0], "weight")
    assert torch.equal(model[0].weight, plain[0].weight)


REPARAMETRIZED = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
    "parametrizations.orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("change", REPARAMETRIZED.values(), ids=REPARAMETRIZED.keys())
@pytest.mark.parametrize("ignored", [True, False])
def test_computed_weights_stay_dense_with_the_reason(change, ignored):
    model = network().eval()
    change(model[0])
    with torch.no_grad():
        before = model[0](X)
    result = trim(model, X.split(50), ignore=["0"] if ignored else None, **HALF)
    (skipped,) = result.skipped
    assert skipped.name == "0"
    assert skipped.reason == "ignored" if ignored else "computed by a" in skipped.reason
    assert sparsity(model[2].weight) == 0.5
    with torch.no_grad():
        assert torch.equal(model[0](X), before)


def test_a_layer_is_pruned_after_its_parametrization_is_removed():
    model = network().eval()
    parametrizations.weight_norm(model[0])
    parametrize.remove_parametrizations(model[0], "weight")
    trim(model, X.split(50), **HALF)
    assert sparsity(model[0].weight) == sparsity(model[2].weight) == 0.5


# --- attention


def test_cross_attention_is_skipped_and_the_rest_of_a_decoder_is_pruned():
    torch.manual_seed(0)

    class Translator(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = nn.Transformer(8, 2, 1, 1, 12, batch_first=True)

        def forward(self, source, target):
            return self.transformer(source, target)

    model = Translator().eval()
    batches = [(torch.randn(10, 5, 8), torch.randn(10, 4, 8)) for _ in range(4)]
    result = trim(model, batches, **HALF)
    names = {report.name.removeprefix("transformer.") for report in result.reports}
    assert {"decoder.layers.0.self_attn.in_proj", "decoder.layers.0.multihead_attn.out_proj"} <= names
    reasons = {layer.name.removeprefix("transformer."): layer.reason for layer in result.skipped}
    assert set(reasons) == {"decoder.layers.0.multihead_attn.in_proj"}
    assert "expected self-attention" in reasons["decoder.layers.0.multihead_attn.in_proj"]


# --- weights that are used directly, parameters that are not layers


class Fused(nn.Module):
    """Uses the weights of a Linear directly, like eva02 and Mamba, and has a matrix and tokens of its own."""

    def __init__(self, size=16):
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 6)), nn.Parameter(torch.zeros(1, 4, 6))
        self.qkv, self.fc, self.both = nn.Linear(6, size, bias=False), nn.Linear(size, 6), nn.Linear(6, 6)
        self.kernel, self.table = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(9, 2))

    def forward(self, x):
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        hidden = F.linear(x, self.qkv.weight).relu()
        y = self.fc(hidden) @ self.kernel + self.table[:6].sum()
        return self.both(y) + F.linear(y, self.both.weight)


def test_weights_that_are_used_directly_are_skipped_with_the_reason():
    torch.manual_seed(0)
    model = Fused()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = trim(model, [torch.randn(20, 3, 6) for _ in range(5)], **HALF)
    assert [report.name for report in result.reports] == ["fc"]
    reasons = {layer.name: layer.reason for layer in result.skipped}
    assert set(reasons) == {"", "qkv", "both"}
    assert "outside its own forward" in reasons["qkv"]
    assert "outside its own forward" in reasons["both"]
    assert reasons[""] == "Fused multiplies by its own parameter kernel, for which there is no layer type"
    untouched = [name for name in before if not name.startswith("fc.")]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in untouched)


def test_a_note_warns_if_little_of_a_network_can_be_pruned(caplog):
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING):
        result = trim(Fused(4), [torch.randn(20, 3, 6) for _ in range(5)], **HALF)
    (note,) = [note for note in result.notes if "values in weight matrices" in note]
    assert note.startswith("only 20% of the values in weight matrices are in layers that can be pruned (")
    assert note in caplog.text
    assert not trim(network(), X.split(50), **HALF).notes
    assert not trim(network(), X.split(50), ignore=["0"], **HALF).notes


def test_networks_of_metrics_are_not_pruned():
    class Perceptual(torchmetrics.Metric):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 4)

        def update(self, x):
            self.net(x)

        def compute(self):
            return torch.zeros(())

    model = network()
    model.add_module("metric", Perceptual())
    layers, skipped = find_layers(model)
    assert list(layers) == ["0", "2"]
    assert "belongs to a metric" in skipped["metric.net"]


def test_a_compiled_name_matches_keys_with_and_without_its_prefix():
    model = nn.ModuleDict({"net": torch.compile(network(), backend="eager")})
    for key in ("net.0", "net._orig_mod.0", "re:net.0"):
        assert list(find_layers(model, ignore=[key])[0]) == ["net._orig_mod.2"]


def test_a_search_has_no_note_of_an_interrupted_run(tmp_path):
    model = network()
    dense = model(X).detach()

    @torch.no_grad()
    def metric():
        return -float((model(X) - dense).square().mean())

    result = trim(model, X.split(50), max_drop=0.05, metric=metric, folder=tmp_path, solver=Magnitude())
    assert result.notes == ()
    assert len(result.trials) > 2
