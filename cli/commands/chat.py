"""Talking to a model before it is taken home."""

from __future__ import annotations

import itertools
import sys
from typing import Annotated, Any

import typer

from cli.client import Client, Connection
from cli.commands.export import model_of
from cli.console import emit, err
from cli.options import HERE, DataDir, Json, known_jobs

app = typer.Typer()


@app.command()
def chat(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Name of a model, or id of a job.", autocompletion=known_jobs
        ),
    ],
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What to say; - reads standard input.")
    ],
    system: Annotated[str | None, typer.Option(help="A system message before it.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of the answer; 1,024 without it.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help="0 always says the likeliest.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Share of probability to draw from.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same one, the same answer.")] = None,
    data_dir: DataDir = HERE,
    as_json: Json = False,
) -> None:
    """Ask a model, and print its answer as it is written.

    A model that is not loaded is loaded first, where no job wants the slot. Ctrl-C ends the answer.
    """
    client = Client(Connection.find(data_dir))
    said = sys.stdin.read() if prompt == "-" else prompt
    messages = [{"role": "system", "content": system}] if system is not None else []
    body: dict[str, Any] = {
        "model": model_of(client, source),
        "messages": [*messages, {"role": "user", "content": said}],
        "max_completion_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "stop": stop or None,
        "seed": seed,
    }
    if as_json:
        emit(client.answer(body))
        return
    with err.status("Waiting for the model"):
        pieces = client.pieces(body)
        first = next(pieces, "")
    for piece in itertools.chain([first], pieces):
        typer.echo(piece, nl=False)
    typer.echo()
