"""Small networks of Hugging Face's transformers with random weights, by `trim` and in a Trainer."""

import copy

import lightning.pytorch as pl
import pytest
import torch

transformers = pytest.importorskip("transformers")

from network_checks import by_magnitude, check_pruned, error, snapshot  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from trainers import LIGHTNING_WARNINGS, make_trainer  # noqa: E402

from lightning_nettrim import Cardinality, NetTrim, trim  # noqa: E402
from lightning_nettrim.calibration.batch import evaluation_mode  # noqa: E402
from lightning_nettrim.calibration.recording import record  # noqa: E402
from lightning_nettrim.calibration.sampling import sample_inputs  # noqa: E402
from lightning_nettrim.layers import find_layers  # noqa: E402

pytestmark = [*LIGHTNING_WARNINGS, pytest.mark.integration]

VOCABULARY, WIDTH, TOKENS = 60, 32, 12
HALF = {"sparsity": 0.5, "allocate": "uniform", "max_rows": 512, "solver": Cardinality(max_steps=10)}


# --- networks


def bert():
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=32, num_labels=3,
        )
    )  # fmt: skip


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1,
            loss_type="ForCausalLMLoss",
        )
    )  # fmt: skip


LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def mixtral(experts):
    config = transformers.MixtralConfig(**LLAMA, num_local_experts=4)
    config._experts_implementation = experts
    return transformers.MixtralForCausalLM(config)


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    )


def bart():
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=32,
            pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=2,
        )
    )  # fmt: skip


def vit():
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16,
            patch_size=4, num_labels=3,
        )
    )  # fmt: skip


def whisper():
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=VOCABULARY, num_mel_bins=8, encoder_layers=1, encoder_attention_heads=2, decoder_layers=1,
            decoder_attention_heads=2, d_model=WIDTH, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=16,
            max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=2,
        )
    )  # fmt: skip


# --- batches


def tokens(seed, filler=0, length=TOKENS, rows=16, left=False):
    """Sentences of unequal length, with ``filler`` where the mask is 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, VOCABULARY, (rows, length), generator=generator)
    lengths = torch.randint(3, length + 1, (rows, 1), generator=generator)
    lengths[0] = length
    place = torch.arange(length)
    mask = (place >= length - lengths if left else place < lengths).long()
    return torch.where(mask == 1, ids, filler), mask


def sentences(seed, filler=0, **options):
    ids, mask = tokens(seed, filler, **options)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 3}


def text(seed, filler=0, **options):
    ids, mask = tokens(seed, filler, **options)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}


def left_padded(seed, filler=0):
    return text(seed, filler, left=True)


def pairs(seed, filler=0, target=TOKENS):
    """Source and target sentences; the target's own padding is masked, too."""
    ids, mask = tokens(seed, filler)
    targets, decoded = tokens(seed + 1000, filler, target)
    return {
        "input_ids": ids, "attention_mask": mask, "decoder_attention_mask": decoded,
        "decoder_input_ids": targets, "labels": torch.where(decoded == 1, targets, -100),
    }  # fmt: skip


def longer_targets(seed, filler=0):
    return pairs(seed, filler, TOKENS + 3)


def pictures(seed, filler=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(16, 3, 4, 4, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear")
    return {"pixel_values": pixels, "labels": torch.arange(16) % 3}


def speech(seed, filler=0):
    generator = torch.Generator().manual_seed(seed)
    ids, mask = tokens(seed)
    sound = torch.randn(16, 8, 8, generator=generator)
    features = torch.nn.functional.interpolate(sound, size=32, mode="linear")
    return {"input_features": features, "labels": torch.where(mask == 1, ids, -100)}


def batches(form, count=16, **options):
    return [form(seed, **options) for seed in range(count)]


def joined(dicts):
    return {key: torch.cat([one[key] for one in dicts]) for key in dicts[0]}


def logits(model, batch):
    return model(**batch).logits


def assert_same_weights(one, other):
    """Check that weights are equal up to rounding."""
    for name, weight in one.state_dict().items():
        distance = (weight - other.state_dict()[name]).norm() / weight.norm().clamp(min=1e-12)
        assert distance < 1e-4, f"{name} differs by {distance:.3f}"


def reasons(result):
    return {layer.name: layer.reason for layer in result.skipped}


# --- trim


NETWORKS = {
    "BERT": (bert, sentences), "GPT-2": (gpt2, text), "Llama": (llama, text), "T5": (t5, pairs), "ViT": (vit, pictures),
    "Whisper": (whisper, speech),
}  # fmt: skip


@pytest.mark.parametrize(("make", "form"), NETWORKS.values(), ids=NETWORKS.keys())
def test_a_network_is_pruned_by_dict_batches(make, form):
    model, held_out = make().eval(), joined(batches(form, 20)[16:])
    outputs = logits(model, held_out).detach()
    before, dense = snapshot(model), copy.deepcopy(model)
    data = batches(form)
    larger = [joined(data[i : i + 4]) for i in range(0, len(data), 4)]
    result = trim(model, larger, num_samples=256, **HALF)
    check_pruned(model, before, result, 0.5)
    magnitude = by_magnitude(dense, [report.name for report in result.reports], 0.5)
    assert error(model, outputs, held_out, logits) < error(magnitude, outputs, held_out, logits)


def test_all_layers_of_gpt2_are_pruned_which_are_conv1d():
    model = gpt2()
    result = trim(model, batches(text, 4), num_samples=64, **HALF)
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert [report.name for report in result.reports] == [f"transformer.h.{i}.{part}" for i in (0, 1) for part in parts]
    assert {report.type for report in result.reports} == {"Conv1D"}
    shared = reasons(result)["lm_head"]
    assert "its weight is shared (transformer.wte.weight, lm_head.weight)" in shared
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_batch_encoding_is_passed_like_a_dict():
    models = [bert().eval()]
    models.append(copy.deepcopy(models[0]))
    encodings = [transformers.BatchEncoding(batch) for batch in batches(sentences, 4)]
    for model, data in zip(models, (batches(sentences, 4), encodings), strict=True):
        trim(model, data, num_samples=64, **HALF)
    one, other = (model.state_dict() for model in models)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert float((one["classifier.weight"] == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


# --- padding


PADDED = {
    "BERT": (bert, sentences), "GPT-2": (gpt2, text), "GPT-2, left": (gpt2, left_padded), "Llama": (llama, text),
    "T5": (t5, pairs), "T5, longer targets": (t5, longer_targets), "BART": (bart, pairs),
}  # fmt: skip


@pytest.mark.parametrize(("make", "form"), PADDED.values(), ids=PADDED.keys())
def test_values_of_padded_tokens_change_nothing(make, form):
    models = [make().eval()]
    models.append(copy.deepcopy(models[0]))
    for model, filler in zip(models, (0, 7), strict=True):
        trim(model, batches(form, 4, filler=filler), num_samples=64, **HALF)
    assert_same_weights(*models)


def recorded_rows(model, data):
    layers = find_layers(model)[0]
    calibration_set = sample_inputs(model, data, 10_000, seed=0)
    with evaluation_mode(model):
        recordings = record(model, layers, calibration_set, num_samples=10_000, seed=0)
    assert all(recording.rows == recording.total_rows for recording in recordings.values())
    return {name: recording.rows for name, recording in recordings.items()}


@pytest.mark.parametrize(("make", "form"), [(bert, sentences), (gpt2, text), (gpt2, left_padded), (llama, text)])
def test_rows_of_a_layer_are_the_tokens_without_padding(make, form):
    data = batches(form, 3)
    rows, kept = recorded_rows(make(), data), sum(int(batch["attention_mask"].sum()) for batch in data)
    assert 0 < kept < sum(batch["attention_mask"].numel() for batch in data)
    for name, count in rows.items():
        assert count == (48 if name in ("bert.pooler.dense", "classifier") else kept), name


@pytest.mark.parametrize("form", [pairs, longer_targets])
@pytest.mark.parametrize(("make", "cross"), [(t5, "EncDecAttention"), (bart, "encoder_attn")])
def test_rows_of_a_decoder_are_those_of_the_target_and_of_keys_and_values_those_of_the_source(make, cross, form):
    data = batches(form, 3)
    source, target = (sum(int(b[key].sum()) for b in data) for key in ("attention_mask", "decoder_attention_mask"))
    assert source != target
    rows = recorded_rows(make(), data)
    reading = {name for name in rows if cross in name and name.rpartition(".")[2] in ("k", "v", "k_proj", "v_proj")}
    assert len(reading) == 4
    wrong = {
        name: count
        for name, count in rows.items()
        if count != (source if ".encoder." in f".{name}" or name in reading else target)
    }
    assert not wrong, f"expected {source} and {target} rows"


def test_targets_without_a_mask_are_all_recorded():
    data = [{key: value for key, value in batch.items() if "decoder" not in key} for batch in batches(pairs, 3)]
    rows, source = recorded_rows(t5(), data), sum(int(batch["attention_mask"].sum()) for batch in data)
    assert rows["decoder.block.0.layer.0.SelfAttention.q"] == 3 * 16 * TOKENS
    assert rows["encoder.block.0.layer.0.SelfAttention.q"] == source
    assert rows["decoder.block.0.layer.1.EncDecAttention.q"] == 3 * 16 * TOKENS
    assert rows["decoder.block.0.layer.1.EncDecAttention.k"] == source


# --- weight matrices without a layer type


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_the_experts_of_a_mixture_are_skipped(experts):
    model = mixtral(experts)
    result = trim(model, batches(text, 2), num_samples=32, **HALF)
    listed = reasons(result)
    for layer in (0, 1):
        assert "MixtralExperts" in listed[f"model.layers.{layer}.mlp.experts"]
        assert "MixtralTopKRouter" in listed[f"model.layers.{layer}.mlp.gate"]
    assert any("of the values in weight matrices are in layers that can be pruned" in note for note in result.notes)


# --- in a Trainer


class Glue(pl.LightningModule):
    """The form of Lightning's GLUE example: ``forward(**inputs)``, outputs collected over an epoch."""

    def __init__(self, model):
        super().__init__()
        self.model, self.validation_outputs = model, []

    def forward(self, **inputs):
        return self.model(**inputs)

    def training_step(self, batch, batch_idx):
        return self(**batch).loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss, scores = self(**batch)[:2]
        self.validation_outputs.append({"loss": loss, "scores": scores.argmax(-1), "labels": batch["labels"]})
        return loss

    def on_validation_epoch_end(self):
        assert len(self.validation_outputs) == 2
        scores, labels = (torch.cat([out[key] for out in self.validation_outputs]) for key in ("scores", "labels"))
        self.log("val_loss", torch.stack([out["loss"] for out in self.validation_outputs]).mean())
        self.log("val_acc", (scores == labels)[labels != -100].float().mean())
        self.validation_outputs.clear()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loader(form, first, count):
    data = joined([form(seed) for seed in range(first, first + count)])
    rows = [{key: value[i] for key, value in data.items()} for i in range(16 * count)]
    return DataLoader(rows, batch_size=16)


FITTED = {"BERT": (bert, sentences), "GPT-2": (gpt2, text), "T5": (t5, pairs)}


@pytest.mark.parametrize(("make", "form"), FITTED.values(), ids=FITTED.keys())
def test_a_fit_of_the_glue_example_prunes_and_writes(tmp_path, make, form):
    callback, module = NetTrim(num_samples=64, **HALF), Glue(make())
    make_trainer(tmp_path, callback, max_epochs=1).fit(module, loader(form, 0, 4), loader(form, 10, 2))
    for report in callback.result.reports:
        weight = module.get_parameter(f"{report.name}.weight")
        assert abs(int((weight == 0).sum()) - weight.numel() / 2) <= 1
    assert set(callback.metrics["dense"]) == set(callback.metrics["pruned"]) == {"val_loss", "val_acc"}
    assert module.validation_outputs == []

    again = Glue(make())
    again.load_state_dict(torch.load(tmp_path / "nettrim/pruned.ckpt", weights_only=True)["state_dict"])
    assert_same_weights(module, again)
    (metrics,) = make_trainer(tmp_path).validate(again, loader(form, 10, 2), verbose=False)
    assert metrics == pytest.approx(callback.metrics["pruned"])


def test_values_of_padded_tokens_change_nothing_in_a_trainer(tmp_path):
    modules = [Glue(bert())]
    modules.append(copy.deepcopy(modules[0]))
    for module, filler in zip(modules, (0, 7), strict=True):

        def form(seed, filler=filler):
            return sentences(seed, filler)

        callback = NetTrim(num_samples=64, calibration="val", save=False, **HALF)
        make_trainer(tmp_path, callback).validate(module, loader(form, 10, 2), verbose=False)
        assert callback.result.sparsity == pytest.approx(0.5, abs=1e-3)
    assert_same_weights(*modules)
