"""Tiny random models of the stock classes, batches, and run folders for the core's tests."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sat_core.__main__ import main as sat_core
from sat_core.corpus import IGNORED_LABEL, Batch
from sat_core.model import attention_implementation
from sat_core.plan.config import SatConfig
from sat_core.sparsity import Sparsity, sparsify
from sat_io.__main__ import main as sat_io

VOCAB = 96
_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OWN: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 8},
    "phi3": {"resid_pdrop": 0.0, "original_max_position_embeddings": 64},
    "gpt2": {"n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0},
    "falcon": {
        "ffn_hidden_size": 48,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
}
EXPERTS = ("mixtral", "qwen3_moe")
WITH_KV_HEADS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "mixtral",
    "qwen3_moe",
)


def tiny_model(
    model_type: str = "llama", *, kv_heads: int = 2, tied: bool = False, seed: int = 0, **extra: Any
) -> Any:
    """A random model of the stock class with biases that are not zero; GPT-2, NeoX and OPT have as many KV heads as heads."""
    torch.manual_seed(seed)
    own = {**_SMALL, **_OWN.get(model_type, {})}
    if model_type in WITH_KV_HEADS:
        own |= {"num_key_value_heads": kv_heads, "head_dim": 8}
    if model_type == "falcon":
        # One KV head is Falcon 7B's layout, more are that of the larger ones.
        own |= {"num_kv_heads": kv_heads, "new_decoder_architecture": kv_heads > 1}
    config = AutoConfig.for_model(model_type, **{**own, "tie_word_embeddings": tied, **extra})
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention_implementation(config), dtype=torch.float32
    )
    if model_type in EXPERTS:
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.train()


def sparsity_of(model: Any, optimizer: Any = None, **settings: Any) -> Sparsity:
    """Settings that suit a tiny model: half of everything, the same in every layer, unless said otherwise."""
    chosen = {
        "mlp_rate": 0.5,
        "attention_rate": 0.5,
        "allotment": "uniform",
        "total_steps": 10,
        "dense_start": 0.0,
    }
    return sparsify(model, optimizer, SatConfig(**{**chosen, **settings}))


def random_batch(seed: int, *, rows: int = 3, width: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, width), generator=generator)
    lengths = torch.randint(width // 2, width + 1, (rows,), generator=generator)
    labels = ids.clone()
    for row, length in enumerate(lengths.tolist()):
        ids[row, length:] = 0
        labels[row, length:] = IGNORED_LABEL
        labels[row, : row + 1] = IGNORED_LABEL
    return Batch(ids, labels, lengths)


def write_model(folder: Path) -> Path:
    """A tiny Llama with a word tokenizer and a chat template, saved as a Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<pad>",
        "<bos>",
        "<eos>",
        "<unk>",
        *(chr(c) for c in range(97, 123)),
        *(f"w{i}" for i in range(60)),
    ]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w0 ' if m['role'] == 'user' else 'w1 ' }}{{ m['content'] }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}{{ 'w1 ' }}{% endif %}"
    )
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_text(path: Path, *, documents: int = 60) -> Path:
    generator = torch.Generator().manual_seed(5)
    lines = []
    for _ in range(documents):
        picks = torch.randint(0, 26, (24,), generator=generator).tolist()
        lines.append(json.dumps({"text": " ".join(chr(97 + p) for p in sorted(picks))}))
    path.write_text("\n".join(lines))
    return path


def run_core(command: str, folder: Path) -> int:
    """The programs' own `main`, in this process: importing torch anew costs seconds a run."""
    return (sat_core if command == "train" else sat_io)([command, str(folder)])


def read_events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def prepare(
    root: Path, *, data: Path, sat: dict[str, Any], hyperparameters: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Run `prepare` in `root`/prepare; the prepared JSON."""
    folder = root / "prepare"
    folder.mkdir(parents=True)
    model = root / "model"
    if not model.exists():
        write_model(model)
    config = {
        "format": "satune.prepare/1",
        "request": {
            "model": "local/tiny",
            "seed": 3,
            "hyperparameters": hyperparameters,
            "sat": sat,
        },
        "model": {"name": "local/tiny", "path": str(model), "revision": None},
        "training_file": {"path": str(data), "filename": data.name},
        "validation_file": None,
        "corpora_dir": str(root / "corpora"),
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert run_core("prepare", folder) == 0, (folder / "events.jsonl").read_text()
    return dict(json.loads((folder / "train.json").read_text()))
