"""One service for all tests that only speak to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.cli.running import Up, up

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """`satune up` on a fresh folder."""
    with up(tmp_path_factory.mktemp("up") / "data") as running:
        yield running
