"""Real input from what every machine with Python has: the language reference, docstrings and sources of its library.

A small Llama with random weights and a byte-level BPE tokenizer, three data sets with held-out parts. No model hub, no
download, nothing made up. Modules are parsed, never imported, so nothing of them runs. Weights are written with NumPy:
the client needs no torch.
"""

from __future__ import annotations

import ast
import itertools
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

VOCAB, HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = (
    2048,
    128,
    512,
    6,
    8,
    4,
    16,
    256,
)
END, PAD, USER, ASSISTANT = "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|assistant|>' }}{% generation %}"
    "{{ message['content'] + '<|end|>' }}{% endgeneration %}{% else %}{{ '<|user|>' + message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
HELD_OUT_EVERY = 20
# Held-out loss is measured several times a job: enough text for a steady figure, no more.
MAX_HELD_OUT_CHARACTERS = 40_000
MAX_TEXT_BYTES = 1_500_000
MODEL_NAME = "demo-base-random"
SKIPPED = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "pydoc_data",
    "ensurepip",
    "__pycache__",
}


@dataclass(frozen=True, kw_only=True)
class Material:
    """Files of the three data sets, each with its held-out part; `model` is the name the API knows."""

    model: str
    documents: tuple[Path, Path]
    sources: tuple[Path, Path]
    questions: tuple[Path, Path]


def make(data_dir: Path) -> Material:
    """Write data sets into `data_dir`/demo and the model into `data_dir`/models; made once, then found ready."""
    folder = data_dir / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    names = ("documents", "sources", "questions")
    files = {name: (folder / f"{name}.jsonl", folder / f"{name}-held-out.jsonl") for name in names}
    model = data_dir / "models" / MODEL_NAME
    if not (model / "config.json").exists() or not all(
        path.exists() for pair in files.values() for path in pair
    ):
        rows = _rows()
        for name in names:
            _write(files[name], rows[name])
        _write_model(
            model, [row["text"] for name in ("documents", "sources") for row in rows[name]]
        )
    return Material(model=f"local/{MODEL_NAME}", **files)


def _rows() -> dict[str, list[dict[str, Any]]]:
    """Rows of the three data sets, in an order that depends on names only."""
    documents = [{"text": _prose(text)} for text in _topics()]
    sources, questions, size = [], [], 0
    for path in _modules():
        try:
            text = path.read_text("utf-8")
            tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue
        if size < MAX_TEXT_BYTES:
            sources.append({"text": text})
            size += len(text)
        for name, docstring in _docstrings(tree, _dotted(path)):
            documents.append({"text": _prose(docstring)})
            answer = " ".join(docstring.split("\n\n")[0].split())
            if 20 <= len(answer) <= 200:
                questions.append(
                    {
                        "messages": [
                            {"role": "user", "content": f"What does {name} do?"},
                            {"role": "assistant", "content": answer},
                        ]
                    }
                )
    documents = [row for row in documents if row["text"]]
    return {"documents": documents, "sources": sources, "questions": questions}


def _topics() -> list[str]:
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]


def _prose(text: str) -> str:
    """Its sentences, a paragraph a line: line breaks and tables would be most of what so small a model learns."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return "\n".join(p for p in paragraphs if p[-1:] in (".", ":") and ">>>" not in p)


def _modules() -> Iterator[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not SKIPPED & set(inside.parts) and not any(
            part.startswith(("_", "config-")) for part in inside.parts
        ):
            yield path


def _dotted(path: Path) -> str:
    root = Path(sysconfig.get_path("stdlib"))
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def _docstrings(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of a module's public functions, classes and methods."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    todo: list[tuple[str, ast.AST]] = [(module, tree)]
    while todo:
        name, node = todo.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, kinds) and not child.name.startswith("_"):
                todo.append((f"{name}.{child.name}", child))
                docstring = ast.get_docstring(child)
                if docstring:
                    yield f"{name}.{child.name}", docstring


def _write(pair: tuple[Path, Path], rows: list[dict[str, Any]]) -> None:
    for path, held in zip(pair, (False, True), strict=True):
        lines = [json.dumps(row) for i, row in enumerate(rows) if (i % HELD_OUT_EVERY == 0) is held]
        if held:
            lines = [line for line in lines if len(line) < MAX_HELD_OUT_CHARACTERS // 4]
            sizes = itertools.accumulate(len(line) for line in lines)
            lines = lines[: sum(size <= MAX_HELD_OUT_CHARACTERS for size in sizes)]
        path.write_text("".join(line + "\n" for line in lines), "utf-8")


def _write_model(folder: Path, texts: list[str]) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder, texts)
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> Any:
        return random.normal(0, 0.02, (rows, columns)).astype(np.float32)

    ones = np.ones(HIDDEN, dtype=np.float32)
    weights = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN), "model.norm.weight": ones}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        weights |= {
            f"{layer}.{norm}.weight": ones
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        weights[f"{layer}.self_attn.q_proj.weight"] = matrix(HEADS * HEAD_DIM, HIDDEN)
        weights[f"{layer}.self_attn.k_proj.weight"] = matrix(KV_HEADS * HEAD_DIM, HIDDEN)
        weights[f"{layer}.self_attn.v_proj.weight"] = matrix(KV_HEADS * HEAD_DIM, HIDDEN)
        weights[f"{layer}.self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * HEAD_DIM)
        weights[f"{layer}.mlp.gate_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        weights[f"{layer}.mlp.up_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        weights[f"{layer}.mlp.down_proj.weight"] = matrix(HIDDEN, INTERMEDIATE)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "dtype": "float32",
    }
    # config.json comes last: with it the folder counts as a model.
    (folder / "config.json").write_text(json.dumps(config, indent=1), "utf-8")


def _write_tokenizer(folder: Path, texts: list[str]) -> None:
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts,
        vocab_size=VOCAB,
        min_frequency=2,
        special_tokens=[END, PAD, USER, ASSISTANT],
        show_progress=False,
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), "utf-8")
