"""Checkpoints of Hugging Face's models are pruned from their files as in memory."""

import copy

import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")

from lightning_nettrim import Magnitude, trim  # noqa: E402

pytestmark = pytest.mark.integration

TINY = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))


def llama_with_tied_weights():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, tie_word_embeddings=True))


def qwen_with_local_attention():
    """Every second block attends to a window: the model gives it another mask."""
    config = transformers.Qwen2Config(**TINY, use_sliding_window=True, sliding_window=3, max_window_layers=1)
    assert set(config.layer_types) == {"full_attention", "sliding_attention"}
    return transformers.Qwen2ForCausalLM(config)


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=60, n_embd=32, n_layer=3, n_head=2, n_positions=32, loss_type="ForCausalLMLoss"
        )
    )


def bert():
    config = {**TINY, "num_labels": 3}
    del config["num_key_value_heads"]
    return transformers.BertForSequenceClassification(transformers.BertConfig(**config))


def padded_batches():
    torch.manual_seed(1)
    for _ in range(4):
        lengths = torch.randint(4, 13, (8, 1))
        yield {"input_ids": torch.randint(2, 60, (8, 12)), "attention_mask": (torch.arange(12) < lengths).long()}


@pytest.mark.parametrize("make", [llama, llama_with_tied_weights, qwen_with_local_attention, gpt2, bert])
def test_a_checkpoint_is_pruned_from_its_files_as_in_memory(make, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    with torch.device("meta"):
        on_meta = type(model)(copy.deepcopy(model.config)).eval()
    options = {"sparsity": 0.5, "allocate": "uniform", "max_rows": 512, "solver": Magnitude(), "ignore": ["*lm_head*"]}
    options = options if make in (llama, qwen_with_local_attention) else options | {"ignore": None}
    in_memory = trim(model, padded_batches(), **options)
    files = {"weights": tmp_path / "dense", "output": tmp_path / "pruned"}
    result = trim(on_meta, padded_batches(), **files, **options)
    assert [(r.name, r.zeros) for r in result.reports] == [(r.name, r.zeros) for r in in_memory.reports]
    assert {layer.name for layer in result.skipped} == {layer.name for layer in in_memory.skipped}
    assert len([*(tmp_path / "pruned").glob("*.safetensors")]) > 1
    read = type(model).from_pretrained(tmp_path / "pruned").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(read[name], value), name
    assert not any(path.suffix == ".partial" for path in (tmp_path / "pruned").iterdir())
    assert load_file(next((tmp_path / "pruned").glob("*.safetensors")))
