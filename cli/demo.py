"""`satune demo`: three jobs through the REST API, as any client would send them.

Base training at rate 0 from random weights, then sparse continual pre-training on sources, then sparse supervised training on
questions and answers. It shows the road, on a model small enough for two cores; a model this small gains little from
sparsity, and the figures say what was measured.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from cli import demo_material
from cli.client import FAILED, USAGE, Client, CliError
from cli.watching import follow, report

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.console import Console

SEQUENCE = 128


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
    console.print("Making a model and data from Python's own library", highlight=False)
    material = demo_material.make(folder)
    base = _job(
        client,
        console,
        "1/3 base training, dense",
        material.model,
        material.documents,
        {
            "mode": "off",
            "train": {"max_steps": 260, "learning_rate": 4e-3, "max_seq_len": SEQUENCE},
            "eval": {"every": 65, "prompts": ["The for statement", "Return the"]},
        },
        batch_size=16,
    )
    sources = _job(
        client,
        console,
        "2/3 continual pre-training, half the MLP channels asleep",
        base["fine_tuned_model"],
        material.sources,
        {
            "omission_rate": {"mlp": 0.5, "attention": 0.0},
            "train": {"max_steps": 140, "learning_rate": 2e-3, "max_seq_len": SEQUENCE},
            "eval": {"every": 35, "prompts": ["    def __init__(self,", "import os\n"]},
        },
        batch_size=16,
    )
    final = _job(
        client,
        console,
        "3/3 supervised, half the MLP channels and some heads asleep",
        sources["fine_tuned_model"],
        material.questions,
        {
            "omission_rate": {"mlp": 0.5, "attention": 0.25},
            "train": {"max_steps": 140, "learning_rate": 2e-3, "max_seq_len": SEQUENCE},
            "eval": {
                "every": 35,
                "prompts": ["What does json.dumps do?", "What does os.path.join do?"],
                "max_new_tokens": 32,
            },
        },
        batch_size=16,
    )
    url = f"{client.connection.url}/jobs/{final['id']}"
    console.print(
        f"\nDone in {time.monotonic() - started:.0f} s. The last job: [link]{url}[/link]",
        highlight=False,
    )
    console.print(
        f"Sign in with {client.connection.dashboard_url}", highlight=False, soft_wrap=True
    )


def _job(
    client: Client,
    console: Console,
    title: str,
    model: str,
    files: tuple[Path, Path],
    sat: dict[str, Any],
    *,
    batch_size: int,
) -> dict[str, Any]:
    console.print(f"\n[bold]{title}[/]", highlight=False)
    body = {
        "model": model,
        "training_file": client.upload(files[0])["id"],
        "validation_file": client.upload(files[1])["id"],
        "suffix": "demo",
        "seed": 1,
        "hyperparameters": {"batch_size": batch_size},
        "sat": sat,
    }
    job = follow(client, client.create_job(body)["id"], console, title=title.split(",")[0])
    report(job, console)
    if job["status"] != "succeeded":
        reason = job["error"]["message"] if job["error"] else "it was cancelled"
        raise CliError(f"The demo's job {job['id']} {job['status']}: {reason}", FAILED)
    return job
