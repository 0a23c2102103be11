"""`satune demo`: three jobs through the REST API, as any client would send them.

Base training at rate 0 from random weights, then sparse continual pre-training on sources, then sparse supervised training on
questions and answers. It shows the road, on a model small enough for two cores; a model this small gains little from
sparsity, and the figures say what was measured.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cli import demo_material
from cli.client import FAILED, USAGE, Client, CliError
from cli.watching import follow, report

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.console import Console

SEQUENCE = 128
BATCH = 8


@dataclass(frozen=True)
class Stage:
    """One job of the demo. Steps are few because minutes are; `prompts` are continued before and after."""

    title: str
    steps: int
    learning_rate: float
    prompts: tuple[str, ...]
    omission_rate: dict[str, float] | None

    def settings(self) -> dict[str, Any]:
        """The `sat` object of the job."""
        rates = {"omission_rate": self.omission_rate} if self.omission_rate else {"mode": "off"}
        return {
            **rates,
            "train": {
                "max_steps": self.steps,
                "learning_rate": self.learning_rate,
                "max_seq_len": SEQUENCE,
            },
            "eval": {
                "every": self.steps // 4,
                "prompts": list(self.prompts),
                "max_new_tokens": 32,
            },
        }


BASE = Stage(
    "1/3 base training, dense", 420, 6e-3, ("The for statement", "Return the"), omission_rate=None
)
SOURCES = Stage(
    "2/3 continual pre-training on Python sources, half of the MLP channels asleep",
    220,
    4e-3,
    ("    def __init__(self,", "import "),
    {"mlp": 0.5, "attention": 0.0},
)
QUESTIONS = Stage(
    "3/3 supervised on questions and answers, half of the MLP channels and a quarter of the heads asleep",
    300,
    4e-3,
    ("What does json.dumps do?", "What does os.path.join do?"),
    {"mlp": 0.5, "attention": 0.25},
)


def run(client: Client, console: Console, *, tend: Callable[[], None] = lambda: None) -> None:
    """The whole demonstration; progress and results go to `console`, `tend` is called now and then.

    Raises:
        CliError: where a job does not succeed, or the service runs on another machine.
    """
    folder = client.connection.data_dir
    if folder is None:
        raise CliError(
            "The demo writes a model into the service's data folder, so it runs beside it: satune demo --up.",
            USAGE,
        )
    started = time.monotonic()
    console.print(
        "Making a model with random weights, and data, from Python's own library", highlight=False
    )
    material = demo_material.make(folder)
    model, job = material.model, {}
    for stage, files in (
        (BASE, material.documents),
        (SOURCES, material.sources),
        (QUESTIONS, material.questions),
    ):
        job = _job(client, console, stage, model, files, tend)
        model = job["fine_tuned_model"]
    url = f"{client.connection.url}/jobs/{job['id']}"
    console.print(
        f"\nDone in {time.monotonic() - started:.0f} s. The last job's page: {url}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"Sign in with {client.connection.dashboard_url}", highlight=False, soft_wrap=True
    )


def _job(
    client: Client,
    console: Console,
    stage: Stage,
    model: str,
    files: tuple[Path, Path],
    tend: Callable[[], None],
) -> dict[str, Any]:
    console.print(f"\n[bold]{stage.title}[/]", highlight=False, soft_wrap=True)
    body = {
        "model": model,
        "training_file": client.upload(files[0])["id"],
        "validation_file": client.upload(files[1])["id"],
        "suffix": "demo",
        "seed": 1,
        "hyperparameters": {"batch_size": BATCH},
        "sat": stage.settings(),
    }
    job_id = client.create_job(body)["id"]
    job = follow(client, job_id, console, title=stage.title.split()[0], tend=tend)
    if job["status"] != "succeeded":
        reason = job["error"]["message"] if job["error"] else "it was cancelled"
        raise CliError(f"The demo's job {job['id']} {job['status']}: {reason}", FAILED)
    report(job, console)
    return job
