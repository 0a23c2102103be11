"""The demo's road, short: its material, `satune up`, one sparse job from the command line, and the model taken home."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli import demo_material
from tests.cli.running import up


@pytest.mark.slow
def test_a_sparse_job_goes_from_the_command_line_to_a_stock_model(tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data_dir = tmp_path / "data"
    material = demo_material.make(data_dir)
    train, held_out = material.questions
    with up(data_dir) as service:
        done = service.run(
            *("submit", "--model", material.model, "--dataset", str(train)),
            *("--validation", str(held_out), "--mlp", "0.5", "--suffix", "road", "--json"),
            *("--set", "sat.train.max_steps=24", "--set", "sat.train.learning_rate=0.005"),
            *("--set", "sat.train.max_seq_len=128", "--set", "hyperparameters.batch_size=8"),
            *("--set", "sat.eval.every=0", "--set", 'sat.eval.prompts=["What does ast.parse do?"]'),
            *("--set", "sat.checkpoints.every=0", "--set", "seed=1"),
        )
        assert done.returncode == 0, done.stderr
        listed = json.loads(service.run("list", "--json").stdout)
    job = json.loads(done.stdout)
    assert [(j["id"], j["status"]) for j in listed] == [(job["id"], "succeeded")]
    report = job["report"]
    assert report["eval_loss_after"] < report["eval_loss_before"] - 0.5
    assert report["flops"] < report["dense_flops"]
    assert report["samples"][0]["before"] != report["samples"][0]["after"]

    model = AutoModelForCausalLM.from_pretrained(report["model_path"])
    tokenizer = AutoTokenizer.from_pretrained(report["model_path"])
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What does ast.parse do?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=1
    )
    assert out.shape[1] > ids.shape[1]


def test_the_material_is_the_same_on_every_call_and_holds_nothing_out_twice(tmp_path: Path):
    first, second = (demo_material.make(tmp_path / name) for name in ("a", "b"))
    for name in ("documents", "sources", "questions"):
        for one, other in zip(getattr(first, name), getattr(second, name), strict=True):
            assert one.read_bytes() == other.read_bytes()
        train, held_out = (set(p.read_text("utf-8").splitlines()) for p in getattr(first, name))
        assert train
        assert held_out
    weights = [
        tmp_path / n / "models" / demo_material.MODEL_NAME / "model.safetensors" for n in "ab"
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
