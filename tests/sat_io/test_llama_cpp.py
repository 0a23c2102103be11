"""What is written as GGUF, llama.cpp itself reads: the same tokens of a text, and the same odds of the next one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sat_io.portable import gguf_refusal
from tests.sat_core.tiny import tiny_model

from .test_export import LLAMA3, byte_model, export

STORIES = Path(__file__).resolve().parents[3] / "shared/data/models/stories260k-llama"
TEXTS = (
    "the cat sat on the mat",
    "  two spaces,\n\ta tab; 42 hats & 1 rät",
    "emoji 🐈 and 猫",
)
# A process of its own: two libraries with thread pools of their own do not share one well.
READER = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.cpuparams.n_threads = sys.argv[1], 256, 1
server = xllamacpp.Server(params)
for text in json.loads(sys.argv[2]):
    ask = {"prompt": text, "max_tokens": 1, "temperature": 0.0, "logprobs": 5}
    answer = server.handle_completions(ask)
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    tokens = answer["usage"]["prompt_tokens"]
    print(json.dumps({"tokens": tokens, "top": {str(t["id"]): t["logprob"] for t in top}}))
"""


def piece_model(folder: Path) -> Path:
    """A tiny Llama whose tokenizer is of Llama 2's kind: pieces with marked spaces, bytes for what no piece has."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    marked = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    learner = Tokenizer(models.BPE())
    learner.normalizer = marked
    trainer = trainers.BpeTrainer(vocab_size=60, show_progress=False, max_token_length=4)
    learner.train_from_iterator(["the cat sat on the mat, the hat and the rat"] * 9, trainer)
    learnt = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *learnt["vocab"]]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    # As a conversion from SentencePiece writes them: every way to make a piece, piece after piece.
    merges = [
        (piece[:at], piece[at:])
        for piece in dict.fromkeys("".join(pair) for pair in learnt["merges"])
        for at in range(1, len(piece))
        if piece[:at] in vocabulary and piece[at:] in vocabulary
    ]
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = marked
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tiny_model(vocab_size=len(vocabulary) + 3, bos_token_id=1, eos_token_id=2).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def read_by_llama_cpp(file: Path) -> list[dict[str, Any]]:
    made = subprocess.run(
        [sys.executable, "-c", READER, str(file), json.dumps(TEXTS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    return [json.loads(line) for line in made.stdout.splitlines() if line.startswith("{")]


def assert_same(model: Path, file: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for text, read in zip(TEXTS, read_by_llama_cpp(file), strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert read["tokens"] == ids.shape[1], text
        with torch.no_grad():
            wanted = stock(ids).logits[0, -1].log_softmax(-1)
        for token, logprob in read["top"].items():
            # llama.cpp keeps keys and values in float16.
            assert logprob == pytest.approx(float(wanted[int(token)]), abs=0.02), (text, token)


@pytest.mark.parametrize(
    ("make", "extra"),
    [
        (byte_model, {}),
        (byte_model, {"rope_parameters": LLAMA3, "num_key_value_heads": 1}),
        (piece_model, {}),
    ],
    ids=["bytes", "bytes, Llama 3's rope", "pieces"],
)
def test_llama_cpp_computes_what_transformers_does(
    tmp_path: Path, make: Any, extra: dict[str, Any]
) -> None:
    model = make(tmp_path / "model", **extra)
    tokenizer = AutoTokenizer.from_pretrained(model)
    spread = AutoModelForCausalLM.from_pretrained(model)
    head = spread.get_output_embeddings().weight
    with torch.no_grad():
        # A random head gives every token nearly the same odds. Here what can be read alone has odds that can be told
        # apart, and the rest, bytes of longer letters among it, comes after: llama.cpp joins those to the next token.
        for token in range(len(head)):
            text = tokenizer.decode([token])
            head[token] *= 40 if text.isprintable() and text.isascii() else 0
    spread.save_pretrained(model)
    assert_same(model, export(tmp_path, model, "gguf", "float32") / "model.gguf")


@pytest.mark.skipif(not STORIES.exists(), reason="the real small model is not at ../shared/data")
def test_llama_cpp_reads_a_real_model(tmp_path: Path) -> None:
    assert_same(STORIES, export(tmp_path, STORIES, "gguf", "float32") / "model.gguf")


def test_merges_that_llama_cpp_could_not_follow_are_refused(tmp_path: Path) -> None:
    model = piece_model(tmp_path / "model")
    assert gguf_refusal(model) is None
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    left_out = tokenizer["model"]["merges"].pop()
    file.write_text(json.dumps(tokenizer))
    assert "order that llama.cpp could follow" in str(gguf_refusal(model)), left_out
    del tokenizer["model"]["vocab"]["<0x00>"]
    file.write_text(json.dumps(tokenizer))
    assert "lacks 1 of them" in str(gguf_refusal(model))
