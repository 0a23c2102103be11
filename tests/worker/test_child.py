"""What a child finds around it when it starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from jobs.states import Stage
from worker.child import KEEP_FREED, Child

TELL = "import json, os, pathlib, sys; pathlib.Path(sys.argv[2], 'told').write_text(json.dumps(dict(os.environ)))"


def environment_of(command: str, folder: Path) -> dict[str, str]:
    child = Child(command, folder, devices="", program=(sys.executable, "-c", TELL))
    try:
        assert child.ended(30)
        assert child.process.returncode == 0, child.log_end()
    finally:
        child.close()
    told: dict[str, str] = json.loads((folder / "told").read_text())
    return told


def test_a_training_keeps_what_it_frees_and_what_reads_strangers_data_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in KEEP_FREED:
        monkeypatch.delenv(name, raising=False)
    assert environment_of(Stage.TRAIN, tmp_path).items() >= KEEP_FREED.items()
    assert not environment_of(Stage.PREPARE, tmp_path).keys() & KEEP_FREED.keys()


def test_who_sets_the_allocator_himself_is_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "5")
    assert environment_of(Stage.TRAIN, tmp_path)["MALLOC_TRIM_THRESHOLD_"] == "5"
