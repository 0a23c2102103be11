"""One GGUF file from a Hugging Face folder of the Llama family, by the `gguf` library that llama.cpp itself uses.

What `sat_io.portable` lets through is written: names from gguf's own map, vectors in float32, and the rows of query
and key projections in llama.cpp's order, whose rope turns neighbours where transformers' turns halves. Tensors are written
one at a time, so memory holds one of them. The road not taken is llama.cpp's convert script: it is no package, and would
have to be copied.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sat_core.plan.errors import PlanError
from sat_io.portable import BYTES, gguf_refusal, piece_scores, pre_tokenizer_of, rope_of

_SUFFIXES = (".weight", ".bias")


def write_gguf(model: Path, target: Path, *, dtype: torch.dtype, name: str) -> None:
    """Write the model folder as one file.

    Raises:
        PlanError: with code format_not_supported, where it cannot be written faithfully, or as `cast` does.
    """
    try:
        import gguf
    except ImportError as error:
        raise _unsupported("this worker lacks the gguf library: pip install gguf") from error
    if refusal := gguf_refusal(model):
        raise _unsupported(refusal)
    config = json.loads((model / "config.json").read_text("utf-8"))
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_name(name)
    _add_shape(writer, config)
    _add_tokenizer(gguf, writer, model, config["vocab_size"])
    file_types = gguf.LlamaFileType
    writer.add_file_type(
        {
            torch.float32: file_types.ALL_F32,
            torch.float16: file_types.MOSTLY_F16,
            torch.bfloat16: file_types.MOSTLY_BF16,
        }[dtype]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    kinds = gguf.GGMLQuantizationType
    raw = {torch.float32: kinds.F32, torch.float16: kinds.F16, torch.bfloat16: kinds.BF16}
    try:
        # Twice over the same tensors: all of their descriptions stand before the first byte of one.
        for known, tensor in _tensors(model, config, names, dtype):
            data = _bytes(tensor)
            writer.add_tensor_info(known, data.shape, data.dtype, data.nbytes, raw[tensor.dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in _tensors(model, config, names, dtype):
            writer.write_tensor_data(_bytes(tensor))
    finally:
        writer.close()


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in a dtype that holds all of it.

    Raises:
        PlanError: with code invalid_value, where a value would be infinite.
    """
    if not tensor.is_floating_point():
        return tensor
    made = tensor.to(dtype)
    if not bool(torch.isfinite(made).all()):
        kind = str(dtype).removeprefix("torch.")
        raise PlanError(
            f"{name} has values that {kind} cannot hold; allowed for this model: float32, bfloat16.",
            "dtype",
            code="invalid_value",
        )
    return made


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection, each head's two halves interleaved."""
    halves = weight.view(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def rope_factors(config: dict[str, Any]) -> torch.Tensor | None:
    """By what Llama 3 divides each frequency of its rope; None for a plain rope."""
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    factor, low, high = (
        float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor")
    )
    context, width = rope["original_max_position_embeddings"], _head_dim(config)
    factors = []
    for i in range(0, width, 2):
        turns = context / (2 * math.pi * rope["rope_theta"] ** (i / width))
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)


def _tensors(
    model: Path, config: dict[str, Any], names: Any, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """GGUF's name and the tensor as it is written, always in the same order."""
    factors = rope_factors(config)
    if factors is not None:
        yield "rope_freqs.weight", factors
    heads = config["num_attention_heads"]
    permutations = {"q_proj": heads, "k_proj": config.get("num_key_value_heads") or heads}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                known = names.get_name(name, try_suffixes=_SUFFIXES)
                if known is None:
                    raise _unsupported(f"llama.cpp knows no tensor {name!r}")
                tensor = file.get_tensor(name)
                module = name.split(".")[-2]
                if module in permutations:
                    tensor = permuted(tensor, permutations[module])
                kept = torch.float32 if tensor.dim() == 1 else dtype
                yield known, cast(name, tensor, kept).contiguous()


def _bytes(tensor: torch.Tensor) -> Any:
    """As numpy, which knows no bfloat16: its bytes then."""
    return (tensor.view(torch.uint8) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def _add_shape(writer: Any, config: dict[str, Any]) -> None:
    heads, width = config["num_attention_heads"], _head_dim(config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope_of(config)["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _add_tokenizer(gguf: Any, writer: Any, model: Path, size: int) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text("utf-8"))
    kinds = gguf.TokenType
    # Rows of the embedding that no token has still need a name.
    tokens, types = [f"[PAD{i}]" for i in range(size)], [kinds.UNUSED] * size
    for text, number in tokenizer["model"]["vocab"].items():
        tokens[number], types[number] = text, kinds.NORMAL
    for added in tokenizer.get("added_tokens", []):
        kind = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    if tokenizer["model"].get("byte_fallback"):
        _add_pieces(kinds, writer, tokenizer, tokens, types)
    elif (known := pre_tokenizer_of(tokenizer)) is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(known[0])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(
        model, load_merges=not tokenizer["model"].get("byte_fallback"), n_vocab=size
    )
    # Said outright, since llama.cpp's own default differs from one pre-tokenizer to the next.
    special.add_special_token = {"bos": False, "eos": False, **special.add_special_token}
    template = model / "chat_template.jinja"
    if special.chat_template is None and template.is_file():
        special.chat_template = template.read_text("utf-8")
    special.add_to_gguf(writer, quiet=True)


def _add_pieces(
    kinds: Any, writer: Any, tokenizer: dict[str, Any], tokens: list[str], types: list[Any]
) -> None:
    """SentencePiece's kind of vocabulary: scores instead of merges, and bytes that are told as such."""
    scores = piece_scores(tokenizer) or {}
    for number, text in enumerate(tokens):
        if types[number] is kinds.NORMAL and text in BYTES:
            types[number] = kinds.BYTE
        elif text == tokenizer["model"].get("unk_token"):
            types[number] = kinds.UNKNOWN
    lowest = min(scores.values(), default=0.0) - 1
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([scores.get(text, lowest) for text in tokens])
    writer.add_add_space_prefix(True)


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _unsupported(why: str) -> PlanError:
    return PlanError(
        f"The model cannot be written as GGUF: {why}.", "format", code="format_not_supported"
    )
