"""A child that speaks the run-folder protocol and behaves as its config.json says; it trains nothing."""

import json
import os
import signal
import sys
import time
from pathlib import Path

folder = Path(sys.argv[2])
config = json.loads((folder / "config.json").read_text())
behaviour = config["behaviour"]
if behaviour == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: leave())
log = (folder / "events.jsonl").open("w", buffering=1)
number = 0


def emit(kind: str, **fields: object) -> None:
    global number  # noqa: PLW0603 - a script of one screen
    number += 1
    log.write(json.dumps({"seq": number, "time": time.time(), "kind": kind, **fields}) + "\n")


def leave() -> None:
    if behaviour in ("checkpoint", "slow"):
        time.sleep(1 if behaviour == "slow" else 0)
        saved = folder / "checkpoints" / "step-000003"
        saved.mkdir(parents=True)
        emit("checkpoint", step=3, path="checkpoints/step-000003", size_bytes=1, metrics={})
    sys.exit(10)


for step in (1, 2, 3):
    figures = dict.fromkeys(
        ("loss", "token_accuracy", "learning_rate", "grad_norm", "omission_rate_mlp", "omission_rate_attention",
         "awake_share", "tokens_per_second", "step_seconds", "flops"), 0.5,
    )  # fmt: skip
    emit("metrics", step=step, total_steps=3, tokens=step, memory_bytes=1, **figures)
(folder / ".pid").write_text(str(os.getpid()))
(folder / ".pid").rename(folder / "pid")
if behaviour in ("hang", "deaf", "checkpoint", "slow"):
    time.sleep(60)
if behaviour == "refuse":
    emit("failed", code="dataset_invalid", message="the data are bad", param=None)
    sys.exit(20)
if behaviour == "lack":
    single = config["micro_batch_size"] == 1
    param = "sat.train.max_seq_len" if single else "sat.asleep_on"
    emit("failed", code="out_of_memory", message="Memory ran out.", param=param)
    sys.exit(20)
if behaviour == "full":
    emit("failed", code="internal_error", message="OSError: No space left on device", param=None)
    sys.exit(20)
if behaviour == "tidies":
    for step in (6, 9):
        emit("checkpoint", step=step, path=f"checkpoints/step-{step}", size_bytes=1, metrics={})
if behaviour == "talks":
    for step in range(4, 10):
        time.sleep(0.5)
        emit("metrics", step=step, total_steps=9, tokens=step, memory_bytes=1, **figures)
    behaviour = "succeed"
if behaviour == "crash":
    sys.stderr.write("something broke\n")
    sys.exit(3)
if behaviour == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "succeed":
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    emit("result", path="model", summary={"trained_tokens": 3})
