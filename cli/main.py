"""`satune`: what runs on this machine - up, demo, doctor - and all other commands, put together."""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from typing import Annotated

import typer
from rich.markup import escape

from cli import demo as demonstration
from cli.client import FAILED, INTERRUPTED, Client, CliError, Connection
from cli.commands import chat, export, jobs, submit
from cli.console import emit, err, out, say
from cli.doctor import examine
from cli.options import HERE, DataDir, Json
from cli.up import Service

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(importlib.metadata.version("satune"))
        raise typer.Exit


@app.callback()
def satune(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Managed sparse fine-tuning of language models."""


@app.command()
def up(
    data_dir: DataDir = HERE,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
) -> None:
    """Run the service on this machine, with nothing to install beside Python."""
    with (
        Service(data_dir, host=host, port=port, say=say) as service,
        contextlib.suppress(KeyboardInterrupt),
    ):
        greet(service.start())
        service.watch()


@app.command()
def demo(
    data_dir: DataDir = HERE,
    start: Annotated[
        bool, typer.Option("--up", help="Start the service first, if none runs.")
    ] = False,
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="Port where --up starts one; 0 picks a free one."),
    ] = 0,
) -> None:
    """Make a small model from Python's own documentation, and train it sparsely three times."""
    if not start:
        demonstration.run(Client(Connection.find(data_dir)), err)
        return
    with Service(data_dir, host="127.0.0.1", port=port, say=say) as service:
        connection = service.start()
        greet(connection)
        demonstration.run(Client(connection), err, tend=service.tend)
        if sys.stdin.isatty() and err.is_terminal:
            err.print(
                f"\nStill serving at [link]{connection.dashboard_url}[/link]. Ctrl-C ends it.",
                soft_wrap=True,
            )
            service.watch()


@app.command()
def doctor(data_dir: DataDir = HERE, as_json: Json = False) -> None:
    """Say what this machine has, and whether a server answers."""
    checks = examine(data_dir)
    if as_json:
        emit([vars(check) for check in checks])
    else:
        for check in checks:
            out.print(
                f"{'[green]ok[/]  ' if check.ok else '[red]bad[/] '} {check.name}: {escape(check.found)}",
                highlight=False,
            )
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


for module in (submit, jobs, export, chat):
    app.add_typer(module.app)


def main() -> None:
    """Entry point: errors become one line and an exit code."""
    try:
        app()
    except CliError as error:
        err.print(f"[red]error[/] {escape(error.message)}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except OSError as error:
        err.print(f"[red]error[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def greet(connection: Connection) -> None:
    """Say where the service is and how to sign in, as a notebook server does."""
    err.print(f"\nSatune is ready: {connection.url}/v1", highlight=False)
    err.print(f"key        {connection.api_key}", highlight=False, soft_wrap=True)
    err.print(f"dashboard  {connection.dashboard_url}\n", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
