"""Exports: the model comes home whole, in each form, and other libraries read it as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sat_io.export import DTYPES
from sat_io.gguf_file import permuted, rope_factors
from sat_io.portable import gguf_refusal
from tests.sat_core.tiny import read_events, run_core, tiny_model, write_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def byte_model(folder: Path, **extra: Any) -> Path:
    """A tiny Llama with a byte-level BPE tokenizer as GPT-2 has it, a few merges learnt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat, the hat and the rat"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tiny_model(vocab_size=304, bos_token_id=0, eos_token_id=1, **extra).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def export(root: Path, model: Path, target: str, dtype: str, **more: Any) -> Path:
    folder = root / f"{target}-{dtype}"
    folder.mkdir()
    config = {
        "format": "satune.export/1",
        "model": {"name": "ft:local/tiny:default::01234567", "path": str(model)},
        "base": {"name": "local/tiny", "path": str(model), "revision": None},
        "target": target,
        "dtype": dtype,
        **more,
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert run_core("export", folder) == 0, (folder / "events.jsonl").read_text()
    return folder / "export"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 35).view(2, 16)).logits


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_in_a_dtype_load_as_that(tmp_path: Path, dtype: str) -> None:
    model = write_model(tmp_path / "model")
    made = export(tmp_path, model, "safetensors", dtype)
    loaded = AutoModelForCausalLM.from_pretrained(made)
    assert loaded.dtype is DTYPES[dtype]
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, before[name].to(DTYPES[dtype])), name
    assert AutoTokenizer.from_pretrained(made).chat_template
    assert "library_name: transformers" in (made / "README.md").read_text()
    listed = json.loads((made.parent / "export.json").read_text())["files"]
    assert {f["name"] for f in listed} == {p.name for p in made.iterdir()}
    assert all(f["bytes"] == (made / f["name"]).stat().st_size for f in listed)
    assert json.loads((model / "config.json").read_text())["dtype"] == "float32"


def test_sharded_weights_stay_sharded_with_their_size_told(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    loaded.save_pretrained(model, max_shard_size="20KB")
    made = export(tmp_path, model, "safetensors", "bfloat16")
    index = json.loads((made / "model.safetensors.index.json").read_text())
    numbers = sum(p.numel() for p in loaded.parameters())
    assert index["metadata"]["total_size"] == 2 * numbers
    assert AutoModelForCausalLM.from_pretrained(made).dtype is torch.bfloat16


@pytest.mark.parametrize("target", ["safetensors", "gguf"])
def test_what_float16_cannot_hold_is_refused(tmp_path: Path, target: str) -> None:
    model = byte_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][0, 0] = 1e6
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError):
        export(tmp_path, model, target, "float16")
    failed = read_events(tmp_path / f"{target}-float16")[-1]
    assert (failed["code"], failed["param"]) == ("invalid_value", "dtype")
    assert "lm_head.weight" in failed["message"]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_adapters_load_with_peft_and_give_the_merged_model(tmp_path: Path, model_type: str) -> None:
    from sat_core.model import with_adapters

    base = tiny_model(model_type)
    base.save_pretrained(tmp_path / "base")
    adapted = with_adapters(base, rank=4, alpha=8, seed=0).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    state = {n: t for n, t in adapted.state_dict().items() if ".lora_" in n}
    save_file(state, tmp_path / "adapters.safetensors")
    wanted = logits(adapted)
    made = export(
        tmp_path,
        tmp_path / "base",
        "adapter",
        "float32",
        adapters=str(tmp_path / "adapters.safetensors"),
        lora_rank=4,
        lora_alpha=8,
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, made)), wanted)
    assert json.loads((made / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_gguf_holds_what_the_model_holds(tmp_path: Path, dtype: str) -> None:
    model = byte_model(tmp_path / "model")
    made = export(tmp_path, model, "gguf", dtype)
    reader = gguf.GGUFReader(made / "model.gguf")

    def said(name: str) -> Any:
        return reader.fields[name].contents()

    assert said("general.architecture") == "llama"
    assert said("llama.block_count") == 4
    assert said("llama.embedding_length") == 32
    assert said("llama.feed_forward_length") == 48
    assert (said("llama.attention.head_count"), said("llama.attention.head_count_kv")) == (4, 2)
    assert said("llama.rope.dimension_count") == 8
    assert said("llama.rope.freq_base") == 10000.0
    assert (said("tokenizer.ggml.model"), said("tokenizer.ggml.pre")) == ("gpt2", "gpt-2")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = said("tokenizer.ggml.tokens")
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert len(tokens) == 304
    kinds = said("tokenizer.ggml.token_type")
    assert kinds[:3] == [gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.NORMAL]
    assert kinds[len(tokenizer) :] == [gguf.TokenType.UNUSED] * (304 - len(tokenizer))
    merges = json.loads((model / "tokenizer.json").read_text())["model"]["merges"]
    assert said("tokenizer.ggml.merges") == [" ".join(pair) for pair in merges]
    assert (said("tokenizer.ggml.bos_token_id"), said("tokenizer.ggml.eos_token_id")) == (0, 1)
    assert said("tokenizer.ggml.add_bos_token") is False
    assert said("tokenizer.chat_template") == tokenizer.chat_template

    weights = load_file(model / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == len(weights)
    for name, weight in weights.items():
        written = found[names.get_name(name, try_suffixes=(".weight",))]
        # GGUF counts dimensions from the fastest.
        assert written.shape.tolist() == list(reversed(weight.shape))
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        expected = weight if heads is None else permuted(weight, heads)
        exact = expected if expected.dim() == 1 else expected.to(DTYPES[dtype]).float()
        plain = gguf.dequantize(written.data, written.tensor_type)
        assert np.array_equal(plain.reshape(weight.shape), exact.numpy()), name


def test_permuted_rows_under_llama_cpps_rope_give_the_same_attention_scores() -> None:
    """transformers turns the halves of a head, llama.cpp's LLaMA neighbours: the scores must be equal."""
    torch.manual_seed(0)
    heads, width, hidden, length = 4, 8, 32, 5
    x = torch.randn(length, hidden, dtype=torch.float64)
    q, k = (torch.randn(heads * width, hidden, dtype=torch.float64) for _ in range(2))
    angle = torch.arange(length).double()[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def halves(weight: torch.Tensor) -> torch.Tensor:
        a, b = (x @ weight.T).view(length, heads, width).chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def neighbours(weight: torch.Tensor) -> torch.Tensor:
        y = (x @ permuted(weight, heads).T).view(length, heads, width)
        a, b = y[..., 0::2], y[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    scores = [torch.einsum("ihd,jhd->hij", r(q), r(k)) for r in (halves, neighbours)]
    torch.testing.assert_close(*scores)


def test_llama_3_rope_is_written_as_transformers_computes_it(tmp_path: Path) -> None:
    model = byte_model(tmp_path / "model", rope_parameters=LLAMA3)
    config = json.loads((model / "config.json").read_text())
    factors = rope_factors(config)
    assert factors is not None
    loaded = AutoModelForCausalLM.from_pretrained(model)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](loaded.config, torch.device("cpu"))
    plain = 1 / 500000.0 ** (torch.arange(0, 8, 2).float() / 8)
    torch.testing.assert_close(plain / factors, scaled)
    assert len(set(factors.tolist())) > 1
    reader = gguf.GGUFReader(export(tmp_path, model, "gguf", "float16") / "model.gguf")
    written = next(t for t in reader.tensors if t.name == "rope_freqs.weight")
    assert np.array_equal(written.data, factors.numpy())
    assert reader.fields["llama.rope.freq_base"].contents() == 500000.0


def test_a_tied_embedding_is_written_once(tmp_path: Path) -> None:
    made = export(tmp_path, byte_model(tmp_path / "model", tied=True), "gguf", "float16")
    names = {tensor.name for tensor in gguf.GGUFReader(made / "model.gguf").tensors}
    assert "token_embd.weight" in names
    assert "output.weight" not in names


def test_what_gguf_cannot_say_is_refused_by_name(tmp_path: Path) -> None:
    assert gguf_refusal(byte_model(tmp_path / "good")) is None
    words = write_model(tmp_path / "words")
    assert "WordLevel" in (gguf_refusal(words) or "")
    with pytest.raises(AssertionError):
        export(tmp_path, words, "gguf", "float16")
    failed = read_events(tmp_path / "gguf-float16")[-1]
    assert (failed["code"], failed["param"]) == ("format_not_supported", "format")


@pytest.mark.parametrize(
    ("file", "path", "value", "said"),
    [
        ("config.json", ["model_type"], "gpt2", "gpt2"),
        ("config.json", ["attention_bias"], True, "attention_bias"),
        ("config.json", ["sliding_window"], 8, "sliding_window"),
        ("config.json", ["hidden_act"], "gelu", "gelu"),
        ("config.json", ["rope_parameters", "rope_type"], "yarn", "yarn"),
        ("config.json", ["vocab_size"], 20, "20 rows"),
        ("tokenizer.json", ["normalizer"], {"type": "NFC"}, "NFC"),
        ("tokenizer.json", ["pre_tokenizer", "add_prefix_space"], True, "pre-tokenizer"),
        ("tokenizer.json", ["pre_tokenizer"], {"type": "Whitespace"}, "pre-tokenizer"),
        ("tokenizer.json", ["model", "byte_fallback"], True, "mark spaces"),
        ("tokenizer.json", ["model", "ignore_merges"], True, "ignore_merges"),
        ("tokenizer.json", ["post_processor"], {"type": "RobertaProcessing"}, "Roberta"),
    ],
)
def test_each_reason_is_told(
    tmp_path: Path, file: str, path: list[str], value: Any, said: str
) -> None:
    model = byte_model(tmp_path / "model")
    content = json.loads((model / file).read_text())
    *above, last = path
    inner = content
    for name in above:
        inner = inner[name]
    inner[last] = value
    (model / file).write_text(json.dumps(content))
    assert said in (gguf_refusal(model) or "")
    (model / file).unlink()
    assert file in (gguf_refusal(model) or "")
