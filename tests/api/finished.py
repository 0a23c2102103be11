"""Jobs brought to a state through the store, as a worker would: claim, prepare, record events, finish.

What is served and drawn is then what the store really holds; only the training itself did not happen.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any

from jobs.spec import Claim, NewFile, NewJob, new_id
from jobs.states import Stage
from sat_core.plan.config import SatConfig, TrainConfig
from sat_core.plan.families import ModelShape
from sat_core.plan.request import RunRequest

if TYPE_CHECKING:
    from api.deps import Services

WORKER = "w-test"
SAID = {
    "calibrated": True,
    "seconds": [600.0, 700.0, 800.0],
    "joules": None,
    "peak_bytes": [9e8, 1e9, 1.1e9],
    "peak_measured": True,
}
QUOTE = {"flops": {"sat": 2 * 10**14}, "phases": [], "width": 128, "said": SAID}


def new_job(services: Services, suffix: str | None = None, project: str = "default") -> str:
    """A waiting job on a file of its own."""
    file = NewFile(
        id=new_id("file-"), filename="docs.txt", purpose="fine-tune", bytes=9, sha256="0" * 64
    )
    services.store.add_file(project, file)
    request = RunRequest.from_dict({"model": "local/tiny", "sat": {"omission_rate": {"mlp": 0.5}}})
    new = NewJob(
        request=request.to_dict(), model="local/tiny", training_file=file.id, suffix=suffix
    )
    return services.store.create_job(project, new).id


def config(total: int) -> TrainConfig:
    """A resolved configuration; its shape is not looked at by the service."""
    shape: dict[str, Any] = {field.name: 1 for field in dataclasses.fields(ModelShape)}
    return TrainConfig(
        model_name="local/tiny",
        model_path=None,
        model_revision=None,
        shape=ModelShape(**shape),
        corpus="corpora/x",
        seed=0,
        total_steps=total,
        batch_size=8,
        micro_batch_size=8,
        learning_rate=1e-3,
        lr_schedule="cosine",
        warmup_steps=2,
        weight_decay=0.01,
        max_grad_norm=1.0,
        precision="fp32",
        sat=SatConfig(total_steps=total, mlp_rate=0.5, attention_rate=0.25),
        optimizer="adamw",
        tuning="full",
        lora_rank=16,
        lora_alpha=32,
        gradient_checkpointing=False,
        compile=False,
        sharding="none",
        eval_every=0,
        forgetting_sequences=0,
        prompts=(),
        max_new_tokens=48,
        checkpoint_every=0,
        checkpoint_keep=2,
    )


def claim_job(services: Services, total: int) -> Claim:
    """The oldest waiting job, prepared and claimed for training."""
    store = services.store
    prepare = store.claim(WORKER, Stage.PREPARE)
    assert prepare is not None
    store.finish_prepare(
        prepare,
        {
            "config": config(total).to_dict(),
            "hyperparameters": {"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": 1.0},
            "total_steps": total,
            "figures": {"rows": 1204},
            "warnings": [],
            "quote": QUOTE,
        },
    )
    claim = store.claim(WORKER, Stage.TRAIN)
    assert claim is not None
    return claim


def loss_at(step: int, total: int) -> float:
    """A loss as one sees it, with a wobble that is always the same."""
    return (
        2.1
        + 2.6 * math.exp(-3.5 * step / total)
        + 0.12 * math.sin(step * 12.9898) * math.cos(step * 4.1)
    )


def events(first: int, last: int, total: int) -> list[dict[str, Any]]:
    """Events of steps `first`..`last`, with evaluations at the beginning, the end and every tenth of the run."""
    plan, found, now = config(total), [], time.time() - (last - first) * 0.8
    for step in range(first, last + 1):
        share = plan.sat.ladder.share_at(step - 1)
        speed = 4100 * (1 + 0.36 * share) + 60 * math.sin(step)
        values = {
            "kind": "metrics",
            "time": now + (step - first) * 0.8,
            "step": step,
            "total_steps": total,
            "tokens": step * 4096,
            "loss": loss_at(step, total),
            "token_accuracy": 0.4,
            "learning_rate": 5e-4 * (1 + math.cos(math.pi * step / total)),
            "grad_norm": 1.0,
            "omission_rate_mlp": plan.sat.mlp_rate * share,
            "omission_rate_attention": plan.sat.attention_rate * share,
            "awake_share": 1 - 0.4 * share,
            "tokens_per_second": speed,
            "step_seconds": 4096 / speed,
            "flops": 1e12 * step,
            "memory_bytes": 1 << 30,
        }
        found.append(values)
        if step % max(1, total // 10) == 0 or step == last:
            found.append(_evaluation(step, total, values["time"]))
    if first == 1:
        found.insert(0, _evaluation(0, total, now))
    return [{"seq": number, **event} for number, event in enumerate(found, 1)]


def _evaluation(step: int, total: int, when: float) -> dict[str, Any]:
    return {
        "kind": "evaluation",
        "time": when,
        "step": step,
        "eval_loss": 2.15 + 2.6 * math.exp(-3.5 * step / total),
        "eval_token_accuracy": 0.21 + 0.3 * step / total,
        "tokens": 2048,
    }


def train_job(services: Services, steps: int, total: int) -> Claim:
    """The oldest waiting job, `steps` of `total` trained; it is still held."""
    claim = claim_job(services, total)
    services.store.record(claim, events(1, steps, total), run="runs/x/2", read_position=1)
    return claim


def finish_job(
    services: Services,
    steps: int,
    claim: Claim | None = None,
    first: int = 1,
    **measured: float,
) -> str:
    """The oldest waiting job, or the claimed one, trained to its end; the name of its model."""
    claim = claim or claim_job(services, steps)
    services.store.record(claim, events(first, steps, steps), run="runs/x/2", read_position=2)
    folder = services.artifacts.result(claim.job_id, claim.attempt)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"kind": "result"}')
    (folder / "model.safetensors").write_bytes(b"\0" * 700)
    job = claim.job
    name = f"ft:{job.model}:{job.project}:{job.suffix or ''}:{job.id[-8:]}"
    summary = {
        "eval_loss_before": 4.75,
        "eval_loss_after": 2.23,
        "eval_token_accuracy_before": 0.21,
        "eval_token_accuracy_after": 0.51,
        "steps": steps,
        "trained_tokens": steps * 4096,
        "training_seconds": 745.0,
        "dense_seconds_estimate": 1003.0,
        "flops": 1.9e14,
        "dense_flops": 2.7e14,
        "mean_omission_rate_mlp": 0.38,
        "mean_omission_rate_attention": 0.19,
        "samples": [
            {
                "prompt": "Q: What does os.path.join do?\nA:",
                "before": " the the of the and of of",
                "after": " Join two or more pathname components, inserting '/' as needed.",
            }
        ],
    }
    summary |= measured
    path = services.artifacts.relative(folder)
    services.store.finish_train(claim, model=name, path=path, summary=summary)
    return name


def fail_job(services: Services, code: str, message: str) -> None:
    """The oldest waiting job, failed in training."""
    claim = train_job(services, steps=3, total=40)
    services.store.fail(claim, {"code": code, "message": message, "param": None})
