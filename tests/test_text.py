"""The recipe on text: its data, its network, its configuration, and the benchmark that prunes it by every method."""

from __future__ import annotations

import csv
from dataclasses import replace
from pydoc_data import topics

import lightning.pytorch as pl
import pytest
import torch
import yaml

from benchmarks import llama, run
from lightning_nettrim import Cardinality
from lightning_nettrim.cli import main
from recipes.text import CharLlama, Topics, rotate
from tests.mnist import ROOT

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:\s*By default only one JsonargparseDeprecationWarning per type"),
    pytest.mark.filterwarnings(r"ignore:[\s\S]*was deprecated in v4[.\d]* and will be removed:DeprecationWarning"),
]

TINY = {"symbols": 32, "dim": 16, "depth": 2, "heads": 2, "hidden": 24}


@pytest.fixture
def short(monkeypatch):
    """Two topics of 720 characters in all, joined in the order of their names."""
    monkeypatch.setattr(topics, "topics", {"b": 16 * "the first topic. ", "a": 16 * "all other characters: a z Z. "})


def made(**arguments):
    data = Topics(**arguments)
    data.setup("fit")
    return data


def read(data, windows):
    """The characters of ids."""
    return "".join(f"\0{data.alphabet}"[i] for i in windows.flatten())


def test_the_last_tenth_is_held_out_and_read_once(short):
    text = 16 * "all other characters: a z Z. " + 16 * "the first topic. "
    data = made(length=8)
    split = len(text) - len(text) // 10
    assert data.alphabet == "".join(sorted(set(text[:split])))
    ids, next_ids = data.held_out.tensors
    assert read(data, ids) == text[split : split + ids.numel()]
    assert read(data, next_ids) == text[split + 1 : split + 1 + ids.numel()]
    assert len(text) - split - 1 - 8 < ids.numel() < len(text) - split
    ids, next_ids = data.train.tensors
    assert read(data, ids[:, 0]) == text[: split - 8]
    assert torch.equal(ids[1:], next_ids[:-1])


def test_the_split_is_the_same_each_time():
    one, two = made(), made()
    assert one.alphabet == two.alphabet
    for part in ("train", "held_out"):
        for a, b in zip(getattr(one, part).tensors, getattr(two, part).tensors, strict=True):
            assert a.dtype == torch.int64
            assert torch.equal(a, b)


def test_other_characters_have_one_id(monkeypatch):
    monkeypatch.setattr(topics, "topics", {"a": 45 * "ab" + 5 * "é?"})
    data = made(length=3)
    assert data.alphabet == "ab"
    assert not data.held_out.tensors[0].any()
    monkeypatch.setattr(topics, "topics", {"a": 50 * "abbccc"})
    data = made(length=3, symbols=3)
    assert data.alphabet == "bc"
    assert data.train.tensors[0][0].tolist() == [0, 1, 1]


def test_an_epoch_covers_the_training_part_once_in_windows_that_differ():
    data = made(length=64, batch_size=100)
    batches = list(data.train_dataloader())
    ids, next_ids = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    assert batches[0][0].shape == batches[0][1].shape == (100, 64)
    assert ids.shape[0] == len(data.train_dataloader().sampler.sampler) == -(-len(data.train) // 64)
    assert torch.equal(ids[:, 1:], next_ids[:, :-1])
    first = next(iter(data.train_dataloader()))[0]
    assert not torch.equal(first, batches[0][0])
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert torch.equal(torch.cat([ids for ids, _ in loader]), data.held_out.tensors[0])


def test_a_later_character_changes_no_earlier_logit():
    model, ids = CharLlama(**TINY).eval(), torch.randint(32, (3, 12))
    logits = model(ids)
    assert logits.shape == (3, 12, 32)
    changed = ids.clone()
    changed[:, 7] = (ids[:, 7] + 1) % 32
    difference = (model(changed) - logits).abs().amax((0, 2))
    assert not difference[:7].any()
    assert bool((difference[7:] > 0).all())


def test_rotated_products_depend_on_the_distance_alone():
    a, b = torch.randn(2, 1, 8, dtype=torch.float64)
    products = rotate(a.expand(10, 8)) @ rotate(b.expand(10, 8)).T
    torch.testing.assert_close(rotate(a.expand(10, 8))[0], a[0])
    for distance in range(-9, 10):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)


def test_the_loss_before_training_is_near_that_of_chance_and_training_lowers_it(short):
    model, data = CharLlama(**TINY), made(length=8)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_epochs=5, accelerator="cpu", devices=1, **quiet)
    (before,) = trainer.validate(model, data, verbose=False)
    trainer.fit(model, data)
    (after,) = trainer.validate(model, data, verbose=False)
    assert before["val_loss"] == pytest.approx(torch.tensor(32.0).log(), abs=0.5)
    assert after["val_loss"] < before["val_loss"] - 0.5
    assert after["val_loss"] == pytest.approx(llama.loss(model, data), abs=1e-5)
    ids, next_ids = data.held_out.tensors
    expected = -model(ids).detach().log_softmax(-1).gather(-1, next_ids.unsqueeze(-1)).mean()
    assert after["val_loss"] == pytest.approx(float(expected), abs=1e-5)


def recipe():
    return yaml.safe_load((ROOT / "recipes/text_llama.yaml").read_text(encoding="utf-8"))


def test_the_recipe_is_read_and_prunes_every_layer_but_the_head(short, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["nettrim"])
    tiny = [f"--model.init_args.{name}={value}" for name, value in TINY.items()]
    callback = recipe()["trainer"]["callbacks"][0]
    delta = {"trainer": {"callbacks": [{**callback, "init_args": {**callback["init_args"], "allocate": "uniform"}}]}}
    (tmp_path / "delta.yaml").write_text(yaml.safe_dump(delta))
    options = [f"--trainer.logger.init_args.save_dir={tmp_path}", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    options += ["--data.init_args.length=8", *tiny, "--trainer.enable_progress_bar=false"]
    main(["fit", "--config", "recipes/text_llama.yaml", "--config", str(tmp_path / "delta.yaml"), *options])
    saved = torch.load(tmp_path / "text_llama/version_0/nettrim/pruned.ckpt", weights_only=True)["state_dict"]
    weights = {key: weight for key, weight in saved.items() if weight.ndim == 2}
    pruned = {key for key, weight in weights.items() if (weight == 0).any()}
    assert pruned == weights.keys() - {"embed.weight", "head.weight"}
    total = sum(weights[key].numel() for key in pruned)
    assert sum(int((weights[key] == 0).sum()) for key in pruned) == pytest.approx(0.7 * total, abs=len(pruned))


def test_the_command_prints_a_table_and_writes_its_file(short, tmp_path, monkeypatch, capsys):
    tiny = recipe()
    tiny["model"]["init_args"], tiny["data"]["init_args"] = TINY, {"length": 8, "batch_size": 1000}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    monkeypatch.setattr(llama, "RECIPE", tmp_path / "tiny.yaml")
    for method, options in llama.METHODS.items():
        short_options = {"solver": Cardinality(max_steps=4)} | options
        if "recover" in options:
            short_options["recover"] = replace(options["recover"], max_steps=4)
        monkeypatch.setitem(llama.METHODS, method, short_options)
    settings = ["--out", str(tmp_path / "out"), "--epochs", "1", "--samples", "40", "--budgets", "0.7"]
    run.main(["llama", *settings])
    printed = capsys.readouterr().out
    with (tmp_path / "out/llama.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"dense", *llama.METHODS}
    for method in llama.METHODS:
        assert method in printed
        assert float(rows[method]["sparsity"]) == pytest.approx(0.7, abs=0.01)
        assert float(rows[method]["loss"]) > 0
    assert float(rows["dense"]["sparsity"]) == 0
    assert (tmp_path / "out/llama-1.pt").exists()
    data, model = made(length=8), CharLlama(**TINY)
    model.load_state_dict(torch.load(tmp_path / "out/llama-1.pt", weights_only=True))
    assert float(rows["dense"]["loss"]) == pytest.approx(llama.loss(model, data))
