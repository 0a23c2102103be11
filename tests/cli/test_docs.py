"""docs/cli.md: every command line in it can be parsed, every command stands in it, and the exit codes are those of the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from cli import client
from cli.main import app

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cli.md").read_text("utf-8")
GROUP = typer.main.get_command(app)


def lines(text: str) -> list[str]:
    """The `satune ...` lines of a page's shell blocks."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    shell = [block.replace("\\\n", " ") for kind, block in blocks if kind in ("", "sh")]
    found = [line for block in shell for line in block.splitlines()]
    return [line for line in found if re.match(r"(\.venv/bin/)?satune ", line)]


def pages() -> list[str]:
    """Every such line of the README and docs."""
    sources = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [line for path in sources for line in lines(path.read_text("utf-8"))]


@pytest.mark.parametrize("line", sorted(set(pages())))
def test_a_command_line_of_the_docs_can_be_parsed(line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    if name.startswith("-"):
        assert any(name in parameter.opts for parameter in GROUP.params)
        return
    GROUP.commands[name].make_context(name, arguments)


def test_every_command_stands_in_the_docs() -> None:
    shown = {shlex.split(line, comments=True)[1] for line in lines(PAGE)}
    assert set(GROUP.commands) <= shown


def test_the_exit_codes_are_those_of_the_code() -> None:
    table = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)}
    names = ("FAILED", "USAGE", "CANCELLED", "NOT_FOUND", "NOT_ALLOWED", "UNREACHABLE", "NOT_NOW")
    codes = {getattr(client, name) for name in (*names, "TIMED_OUT", "INTERRUPTED")}
    assert table == {0} | codes
