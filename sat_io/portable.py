"""Whether a model can be written as GGUF so that llama.cpp computes and tokenises what transformers does.

GGUF names an architecture and a pre-tokenizer, and the reader's own code does the rest; so what is not known to be the same
there is refused by name, never written on hope. Read from config.json and tokenizer.json alone, before anything is loaded.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

ARCHITECTURES = ("llama", "mistral")
ROPES = ("default", "llama3")
_LETTERS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Split pattern to llama.cpp's name of the pre-tokenizer, and whether that looks whole words up before merging.
_SPLITS = {_LETTERS % "{1,3}": ("llama-bpe", True), _LETTERS % "": ("qwen2", False)}
_SPACE = "\u2581"
# What Llama 2 and its kin do to a text before they cut it up.
_SPACES_MARKED = [
    {"type": "Prepend", "prepend": _SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
]
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def gguf_refusal(model: Path) -> str | None:
    """Why the model folder cannot be written as GGUF; None where it can."""
    try:
        config = json.loads((model / "config.json").read_text("utf-8"))
        tokenizer = json.loads((model / "tokenizer.json").read_text("utf-8"))
    except FileNotFoundError as error:
        return f"its folder has no {error.filename.rpartition('/')[2]}"
    except ValueError as error:
        return f"its config.json or tokenizer.json cannot be read: {error}"
    return _model_refusal(config) or _tokenizer_refusal(tokenizer, config)


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """The rope parameters of a config.json, whichever release of transformers wrote it."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    return {**rope, "rope_type": kind, "rope_theta": theta}


def pre_tokenizer_of(tokenizer: dict[str, Any]) -> tuple[str, bool] | None:
    """llama.cpp's name of a byte-level pre-tokenizer, and whether it looks words up before merging; None: unknown."""
    found = tokenizer.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    whole = last.get("use_regex", True)
    if len(steps) == 1 and whole:
        return "gpt-2", False
    if len(steps) != 2:
        return None
    first = steps[0]
    if first.get("type") == "Digits" and first.get("individual_digits") and whole:
        return "smollm", False
    plain = first.get("behavior") == "Isolated" and not first.get("invert")
    if first.get("type") == "Split" and plain and not whole:
        return _SPLITS.get((first.get("pattern") or {}).get("Regex", ""))
    return None


def piece_scores(tokenizer: dict[str, Any]) -> dict[str, float] | None:
    """Scores by which llama.cpp, as SentencePiece does, merges pieces in the order of a tokenizer's merges; None: it cannot.

    There any two neighbours merge whose join is a piece, the highest score first. That is what the merges say only where
    they name every such pair, and all pairs of one piece next to each other.
    """
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in merges]
    scores: dict[str, float] = {}
    last = None
    for rank, (left, right) in enumerate(pairs):
        piece = left + right
        if piece != last and piece in scores:
            return None
        scores.setdefault(piece, -float(rank))
        last = piece
    named = set(pairs)
    added = {token["content"] for token in tokenizer.get("added_tokens", [])}
    for piece in vocabulary.keys() - added - set(BYTES):
        for at in range(1, len(piece)):
            pair = (piece[:at], piece[at:])
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in named:
                return None
    return scores


def _model_refusal(config: dict[str, Any]) -> str | None:
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        return f"its architecture is {kind!r}; allowed: {', '.join(ARCHITECTURES)}"
    for name in ("attention_bias", "mlp_bias", "sliding_window"):
        if config.get(name):
            return f"{name} is {config[name]!r} in its config.json; allowed is none"
    if config.get("hidden_act", "silu") != "silu":
        return f"its activation is {config['hidden_act']!r}; allowed is 'silu'"
    rope = rope_of(config)["rope_type"]
    if rope not in ROPES:
        return f"its rope type is {rope!r}; allowed: {', '.join(ROPES)}"
    return None


def _tokenizer_refusal(tokenizer: dict[str, Any], config: dict[str, Any]) -> str | None:
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        return f"its tokenizer is {model.get('type')!r}; allowed is 'BPE'"
    refusal = (_pieces_refusal if model.get("byte_fallback") else _bytes_refusal)(tokenizer)
    if refusal:
        return refusal
    after = tokenizer.get("post_processor") or {}
    kinds = {step.get("type") for step in after.get("processors", [after])}
    if not kinds <= {None, "ByteLevel", "TemplateProcessing"}:
        return (
            f"its post-processor is {sorted(map(str, kinds))}; allowed is one that adds BOS or EOS"
        )
    ids = [*model.get("vocab", {}).values(), *(t["id"] for t in tokenizer.get("added_tokens", []))]
    size = config.get("vocab_size") or 0
    if max(ids, default=0) >= size:
        return f"its tokenizer has ids up to {max(ids)}, but the model {size} rows"
    return None


def _bytes_refusal(tokenizer: dict[str, Any]) -> str | None:
    """Of a byte-level BPE, as GPT-2's and Llama 3's."""
    if tokenizer.get("normalizer") is not None:
        kind = tokenizer["normalizer"].get("type")
        return f"its tokenizer normalises text ({kind}), which llama.cpp would not do"
    known = pre_tokenizer_of(tokenizer)
    if known is None:
        return "its pre-tokenizer is none that llama.cpp is known to have (GPT-2, Llama 3, Qwen 2, SmolLM)"
    if bool(tokenizer["model"].get("ignore_merges")) != known[1]:
        return f"ignore_merges of its tokenizer is not that of llama.cpp's {known[0]!r}"
    return None


def _pieces_refusal(tokenizer: dict[str, Any]) -> str | None:
    """Of pieces that fall back to bytes, as Llama 2's."""
    normalizer = tokenizer.get("normalizer") or {}
    marks = normalizer.get("normalizers") == _SPACES_MARKED
    if not marks or tokenizer.get("pre_tokenizer") is not None:
        return (
            "its tokenizer does not mark spaces as Llama 2's does, which is what llama.cpp would do"
        )
    if missing := set(BYTES) - tokenizer["model"]["vocab"].keys():
        return f"its tokenizer falls back to bytes and lacks {len(missing)} of them"
    if piece_scores(tokenizer) is None:
        return "its tokenizer's merges are not in an order that llama.cpp could follow"
    return None
