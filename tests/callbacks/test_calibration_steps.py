"""Calibration by a module's own steps: many forms of modules, batches and steps, and that steps leave no trace."""

from __future__ import annotations

from collections import UserDict, namedtuple

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.demos.boring_classes import BoringModel, DemoModel, ManualOptimBoringModel
from lightning.pytorch.demos.lstm import LightningLSTM
from lightning.pytorch.demos.transformer import LightningTransformer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from trainers import (
    LIGHTNING_WARNINGS,
    NO_VALIDATION_DATA,
    Watch,
    copy_state,
    equal_states,
    half,
    has_hooks,
    make_trainer,
    read_events,
)

from lightning_nettrim import Cardinality, NetTrim

pytestmark = [
    *LIGHTNING_WARNINGS,
    NO_VALIDATION_DATA,
    pytest.mark.filterwarnings("ignore:You called `self.log.'hp_metric'"),
]

P, N = 64, 6


def rows(seed=0, count=P):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, N, generator=generator)
    scale = 0.2 + torch.rand(count, 1, generator=generator)
    return x, scale, (x[:, :3] * scale).argmax(1)


def loader(form, collate=None):
    x, scale, y = rows()
    return DataLoader([form(*row) for row in zip(x, scale, y, strict=True)], batch_size=16, collate_fn=collate)


class Base(pl.LightningModule):
    """Two layers; subclasses define `loss` of a batch."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(N, 8), nn.Linear(8, 3)

    def net(self, x):
        return self.fc2(self.fc1(x).relu())

    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        raise NotImplementedError

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Tuple(Base):
    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self(x), y)


class OptionalScale(Base):
    def forward(self, x, scale=None):
        return self.net(x if scale is None else x * scale)

    def loss(self, batch):
        x, scale, y = batch.values() if isinstance(batch, dict) else batch
        return F.cross_entropy(self(x, scale), y)


class WholeTuple(Base):
    def forward(self, batch):
        x, scale, _ = batch
        return self.net(x * scale)

    def loss(self, batch):
        return F.cross_entropy(self(batch), batch[2])


class WholeDict(Base):
    def forward(self, batch):
        return self.net(batch["x"] * batch["scale"])

    def loss(self, batch):
        return F.cross_entropy(self(batch), batch["y"])


class Keywords(Base):
    """The form of Hugging Face's examples: a dict as keyword arguments."""

    def forward(self, **inputs):
        return F.cross_entropy(self.net(inputs["x"]), inputs["y"])

    def loss(self, batch):
        return self(**batch)


class ImageLabel(Base):
    def loss(self, batch):
        return F.cross_entropy(self(batch["image"]), batch["label"])


class Nested(Base):
    def loss(self, batch):
        return F.cross_entropy(self(batch["inputs"]["x"] * batch["inputs"]["scale"]), batch["target"][0])


class NoForward(Base):
    forward = pl.LightningModule.forward

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y)


class TrainingOnly(Tuple):
    validation_step = pl.LightningModule.validation_step


class OtherValidation(Tuple):
    """Validates on batches of another form than it trains on."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch["x"]), batch["y"]))


class OwnStep(Tuple):
    def validation_step(self, batch, batch_idx):
        raise RuntimeError("not for training batches")

    def calibration_step(self, batch):
        self.net(batch[0])


class Predicting(Tuple):
    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self(batch[0]).argmax(1)


class Autoencoder(Base):
    """Flattens in its steps; its forward only encodes."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(N, 5), nn.ReLU(), nn.Linear(5, 2))
        self.decoder = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, N))
        del self.fc1, self.fc2

    def forward(self, x):
        return self.encoder(x)

    def loss(self, batch):
        x = batch[0].view(len(batch[0]), -1)
        return F.mse_loss(self.decoder(self.encoder(x)), x)


class Gan(Base):
    """Two networks, two optimizers and manual optimization; no validation; images are logged."""

    def __init__(self):
        super().__init__()
        del self.fc1, self.fc2
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, N))
        self.discriminator = nn.Sequential(nn.Linear(N, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))

    def forward(self, z):
        return self.generator(z)

    def training_step(self, batch):
        real, one = batch[0], torch.ones(len(batch[0]), 1)
        first, second = self.optimizers()
        z = torch.randn(len(real), 4).type_as(real)
        self.toggle_optimizer(first)
        self.generated = self(z)
        if self.logger is not None:
            self.logger.experiment.add_image("generated", self.generated.detach().unsqueeze(0), 0)
        loss = F.binary_cross_entropy_with_logits(self.discriminator(self(z)), one)
        self.log("g_loss", loss, prog_bar=True)
        self.manual_backward(loss)
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        losses = [
            F.binary_cross_entropy_with_logits(self.discriminator(real), one),
            F.binary_cross_entropy_with_logits(self.discriminator(self(z).detach()), 0 * one),
        ]
        self.manual_backward(sum(losses))
        second.step()
        second.zero_grad()
        self.untoggle_optimizer(second)
        for schedule in self.lr_schedulers():
            schedule.step()

    validation_step = pl.LightningModule.validation_step

    def configure_optimizers(self):
        optimizers = [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (self.generator, self.discriminator)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizer, 10) for optimizer in optimizers]


class Closure(TrainingOnly):
    """Computes its loss in a closure of the optimizer."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class SeveralLosses(Base):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(8, 1)

    def forward(self, x):
        hidden = self.fc1(x).relu()
        return {"class": self.fc2(hidden), "value": self.other(hidden)}

    def loss(self, batch):
        x, scale, y = batch
        found = self(x)
        return F.cross_entropy(found["class"], y) + F.mse_loss(found["value"], scale)


class SeveralLoaders(Tuple):
    """Trains on a dict of batches."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch["a"]) + self.loss(batch["b"])


class Noisy(Base):
    """Draws random numbers in its steps, like variational autoencoders and diffusion models."""

    def loss(self, batch):
        x, _ = batch
        hidden = self.fc1(x + torch.randn_like(x)).relu()
        return self.fc2(hidden).square().mean()


class Views(Base):
    """Compares two views of the samples of a batch with each other."""

    def loss(self, batch):
        (one, other), _ = batch
        return F.cross_entropy(self(one) @ self(other).mT, torch.arange(len(one)))


class ManyLoaders(Tuple):
    def validation_step(self, batch, batch_idx, dataloader_idx):
        self.log(f"val_loss_{dataloader_idx}", self.loss(batch), add_dataloader_idx=False)


class Strings(Base):
    """Batches have strings beside the tensors."""

    def loss(self, batch):
        assert len(batch["name"]) == len(batch["x"])
        return F.cross_entropy(self(batch["x"]), batch["y"])


class Attribute(Base):
    def loss(self, batch):
        return F.cross_entropy(self(batch.x), batch.y)


class Crops(Base):
    """Takes a list of inputs of several sizes."""

    def loss(self, batch):
        inputs, labels = batch
        return F.cross_entropy(torch.stack([self(x).mean(0) for x in inputs]), torch.stack(labels))


class Momentum(TrainingOnly):
    """Changes a second network and a queue in its step, like momentum encoders."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(N, 8)
        self.register_buffer("queue", torch.randn(8, 16))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.teacher.weight.lerp_(self.fc1.weight, 0.1)
            keys = self.teacher(batch[0])
            self.queue[:, int(self.place) % 16] = keys[0]
            self.place += 1
        return self.loss(batch) + (self.fc1(batch[0]) @ self.queue).square().mean()


class Gradients(Base):
    """Needs gradients with respect to its inputs, like networks of energies and forces."""

    def loss(self, batch):
        with torch.enable_grad():
            x = batch[0].requires_grad_()
            energy = self.net(x).square().sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return force.square().mean()


class Collecting(Tuple):
    """Collects the outputs of its steps until the epoch ends, and updates metrics."""

    def __init__(self):
        super().__init__()
        self.outputs, self.steps, self.plain = [], 0, {"acc": torchmetrics.MeanMetric()}
        self.mean = torchmetrics.MeanMetric()

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.outputs.append(loss)
        self.steps += 1
        self.mean.update(loss)
        self.plain["acc"].update(loss)
        self.log("mean", self.mean)

    def on_validation_epoch_end(self):
        assert len(self.outputs) == self.expected
        self.log("val_loss", torch.stack(self.outputs).mean())
        self.log("plain", self.plain["acc"].compute())
        self.outputs.clear()
        self.plain["acc"].reset()


Pair = namedtuple("Pair", "x y")


def pairs(x, scale, y):
    return x, y


def triples(x, scale, y):
    return x, scale, y


def names(x, scale, y):
    return {"x": x, "scale": scale, "y": y}


def crops(batch):
    return [x.repeat(1 + i % 3, 1) for i, (x, y) in enumerate(batch)], [y for x, y in batch]


class Encoding(UserDict):
    """A mapping that is no dict, with attributes, as Hugging Face's tokenizers return."""

    def __getattr__(self, name):
        return self["data" if name == "data" else name] if name != "data" else super().__getattribute__("data")


def encoded(batch):
    return Encoding({key: torch.stack([row[key] for row in batch]) for key in ("x", "y")})


class Words(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        words = torch.randint(20, (9,), generator=generator)
        return words[:-1], words[1:]


def offline(kind):
    """A demo of Lightning with a small vocabulary, which downloads nothing."""
    return type(kind.__name__, (kind,), {"prepare_data": lambda self: None})(20)


TABLE = {
    "(x, y), validation_step": (Tuple, lambda: loader(pairs), "validation_step"),
    "(x, scale, y), optional argument": (OptionalScale, lambda: loader(triples), "validation_step"),
    "dict, optional argument": (OptionalScale, lambda: loader(names), "validation_step"),
    "forward(batch) of a tuple": (WholeTuple, lambda: loader(triples), "validation_step"),
    "forward(batch) of a dict": (WholeDict, lambda: loader(names), "validation_step"),
    "forward(**inputs)": (Keywords, lambda: loader(lambda x, s, y: {"x": x, "y": y}), "validation_step"),
    "image and label": (ImageLabel, lambda: loader(lambda x, s, y: {"image": x, "label": y}), "validation_step"),
    "nested": (
        Nested,
        lambda: loader(lambda x, s, y: {"inputs": {"x": x, "scale": s}, "target": [y]}),
        "validation_step",
    ),
    "no forward": (NoForward, lambda: loader(pairs), "validation_step"),
    "training_step only": (TrainingOnly, lambda: loader(pairs), "training_step"),
    "validation of another form": (OtherValidation, lambda: loader(pairs), "training_step"),
    "calibration_step": (OwnStep, lambda: loader(pairs), "calibration_step"),
    "predict_step": (Predicting, lambda: loader(pairs), "predict_step"),
    "autoencoder": (Autoencoder, lambda: loader(pairs), "validation_step"),
    "gan": (Gan, lambda: loader(pairs), "training_step"),
    "closure": (Closure, lambda: loader(pairs), "training_step"),
    "several losses": (SeveralLosses, lambda: loader(triples), "validation_step"),
    "several loaders": (SeveralLoaders, lambda: {"a": loader(pairs), "b": loader(pairs)}, "training_step"),
    "noise": (Noisy, lambda: loader(pairs), "validation_step"),
    "two views": (Views, lambda: loader(lambda x, s, y: ((x, x + 0.1), y)), "validation_step"),
    "dataloader_idx": (ManyLoaders, lambda: loader(pairs), "validation_step"),
    "strings": (Strings, lambda: loader(lambda x, s, y: {"x": x, "y": y, "name": f"{y}"}), "validation_step"),
    "named tuple": (Attribute, lambda: loader(lambda x, s, y: Pair(x, y)), "validation_step"),
    "another mapping": (Attribute, lambda: loader(names, encoded), "validation_step"),
    "lists of several sizes": (Crops, lambda: loader(pairs, crops), "validation_step"),
    "momentum encoder": (Momentum, lambda: loader(pairs), "training_step"),
    "gradients by inputs": (Gradients, lambda: loader(pairs), "validation_step"),
    "BoringModel": (BoringModel, None, "validation_step"),
    "ManualOptimBoringModel": (ManualOptimBoringModel, None, "validation_step"),
    "DemoModel": (DemoModel, lambda: DataLoader(torch.randn(64, 32), batch_size=8), "training_step"),
    "LightningTransformer": pytest.param(
        lambda: offline(LightningTransformer),
        lambda: DataLoader(Words(), 8),
        "training_step",
        marks=pytest.mark.slow,  # 19 layers
    ),
    "LightningLSTM": (lambda: offline(LightningLSTM), lambda: DataLoader(Words(), 8, drop_last=True), "training_step"),
}


@pytest.mark.parametrize(("kind", "data", "step"), TABLE.values(), ids=TABLE.keys())
def test_modules_of_many_forms_are_pruned(tmp_path, kind, data, step):
    """Zeros in memory, in the file and after a reload; calibration changes no other weights, attributes and hooks."""
    model = kind()
    requested = "predict_step" if step == "predict_step" else None
    callback = NetTrim(
        sparsity=0.5, allocate="uniform", calibration_step=requested, max_rows=512, solver=Cardinality(max_steps=5)
    )
    attributes = {*vars(model)}
    watch = Watch()
    trainer = make_trainer(tmp_path, watch, callback, num_sanity_val_steps=0)
    trainer.fit(model, *([] if data is None else [data()]))
    pruned = tuple(report.name for report in callback.result.reports)
    others = [name for name in watch.trained if not name.startswith(pruned)]
    assert all(torch.equal(model.state_dict()[name], watch.trained[name]) for name in others)
    assert callback.result.reports
    for report in callback.result.reports:
        assert report.zeros == round(0.5 * report.zeros / report.sparsity)
        assert report.sparsity == pytest.approx(0.5, abs=0.03)
        assert report.local_error < 0.9
    assert '"calibration_step": "' + step in (tmp_path / "nettrim/report.json").read_text()
    assert {*vars(model)} - attributes <= {"generated", "_hparams"}
    saved = torch.load(tmp_path / "nettrim/pruned.ckpt", weights_only=True)["state_dict"]
    reloaded = kind()
    reloaded.load_state_dict(saved)
    for name, kept in callback.masks.items():
        for tensor in (model.get_parameter(name), saved[name], reloaded.get_parameter(name)):
            assert torch.equal(tensor != 0, kept)
    assert not has_hooks(model)


def accuracy(model, *inputs):
    with torch.no_grad():
        return float((model.eval()(*inputs).argmax(1) == rows(7, 2000)[2]).float().mean())


@pytest.mark.parametrize("form", [triples, names])
def test_an_optional_argument_is_passed(tmp_path, form):
    torch.manual_seed(0)
    x, scale, _ = rows(7, 2000)
    model = OptionalScale()
    x_train, s_train, y_train = rows(1, 2000)
    data = DataLoader([form(*row) for row in zip(3 * x_train, s_train / 3, y_train, strict=True)], batch_size=100)
    callback = NetTrim(sparsity=0.5, allocate="uniform", solver=Cardinality(max_steps=20))
    watch = Watch()
    make_trainer(tmp_path, watch, callback, max_epochs=20).fit(model, data)
    pruned = accuracy(model, 3 * x, scale / 3)
    model.load_state_dict(watch.trained)
    dense = accuracy(model, 3 * x, scale / 3)
    assert dense > 0.85
    assert pruned > dense - 0.1


# --- steps leave no trace


def test_training_is_the_same_as_without_the_callback(tmp_path):
    """The check on the first batch and the validations before training change neither weights nor random numbers."""
    trained = []
    for callbacks in ([], [NetTrim(sparsity=0.5)], [half(sparsity=None, max_drop=1.0, monitor="val_loss")]):
        torch.manual_seed(5)
        data = DataLoader([*zip(*rows(), strict=True)], batch_size=16, shuffle=True)
        watch, model = Watch(), SeveralLosses()
        make_trainer(tmp_path, watch, *callbacks, num_sanity_val_steps=0).fit(model, data, loader(triples))
        trained.append(watch.trained)
    for other in trained[1:]:
        assert equal_states(trained[0], other)


def test_metrics_and_lists_of_a_module_are_restored(tmp_path):
    model = Collecting()
    model.expected = 4
    data = loader(pairs)
    callback = NetTrim(sparsity=0.5, allocate="uniform")
    make_trainer(tmp_path, callback, max_epochs=3, num_sanity_val_steps=0).fit(model, data, data)
    assert model.outputs == []
    assert model.steps == 12
    assert model.mean.update_count == 0
    for side in ("dense", "pruned"):
        assert callback.metrics[side]["val_loss"] == pytest.approx(callback.metrics[side]["mean"])
        assert callback.metrics[side]["val_loss"] == pytest.approx(callback.metrics[side]["plain"])


def test_steps_of_the_calibration_log_nothing(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    make_trainer(tmp_path, NetTrim(sparsity=0.5, allocate="uniform"), logger=logger).fit(Gan(), loader(pairs))
    events = read_events(tmp_path / "run", images=0)
    assert len(events.Images("generated")) == 8
    assert len(events.Scalars("g_loss")) == 8


# --- steps that cannot be used


class Unused(TrainingOnly):
    """Has a layer that no step calls."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Unused, {"targets": ["unused"]}, "training_step: it calls no layer that is to be pruned"),
        (Tuple, {"calibration_step": "forwards"}, "calibration_step: expected a method of Tuple, .* got 'forwards'"),
        (Tuple, {"calibration_step": "test_step"}, "test_step: there is no such step"),
        (OwnStep, {"calibration_step": "validation_step"}, "validation_step: it raised RuntimeError: not for training"),
    ],
)
def test_a_step_that_cannot_be_used_is_refused_before_training(tmp_path, kind, arguments, message):
    model, watch = kind(), Watch()
    before = copy_state(model)
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(tmp_path, watch, NetTrim(sparsity=0.5, **arguments)).fit(model, loader(pairs))
    assert watch.trained is None
    assert equal_states(copy_state(model), before)
