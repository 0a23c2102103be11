"""Change base_url and api_key, nothing else: whole rounds with a real job, by every client; in Python by a strict one too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .conftest import CLIENTS

if TYPE_CHECKING:
    from tests.cli.running import Up

    from .conftest import Client

ROWS = [
    {"messages": [{"role": "user", "content": f"{a} {b}"}, {"role": "assistant", "content": b * 3}]}
    for a, b in zip("abcdefghijkl", "mnopqrstuvwx", strict=True)
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "client", [client for client in CLIENTS if not client.strict], ids=str, indirect=True
)
def test_a_whole_journey(client: Client, service: Up):
    connection = service.connection
    steps = client.run(
        "journey",
        f"{connection['url']}/v1",
        connection["api_key"],
        model="local/tiny",
        rows=ROWS,
    )
    assert steps == [
        "upload",
        "create, and what is refused",
        "list, events",
        "pause, checkpoints",
        "result, models",
        "chat",
        "resume",
        "cancel",
        "delete",
    ]
