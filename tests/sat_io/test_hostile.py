"""Hostile files, from upload to corpus: each gets the verdict it deserves, and none hangs, crashes or loses a row silently.

The files come from a generator that is not part of the project; where it is absent these tests skip.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sat_core.plan.errors import DataError
from sat_io.formats import FileCheck
from sat_io.sources import Source
from tests.sat_io.corpora import make

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
GENERATOR = SHARED / "bad_inputs" / "make_bad_inputs.py"
MODEL = SHARED / "models" / "stories260k-llama"
SEQ_LEN = 512
# Real files with rows that cannot be trained on, and what is said of the first.
UNUSABLE = {
    "llm_adapters_math_1000.json": "line 176, /output: output is empty",
    "self_instruct_seed_tasks.jsonl": "line 1: keys are 'id', 'name', 'instruction', 'instances'",
    "self_instruct_user_oriented.jsonl": "line 1: keys are 'id', 'motivation_app', 'instruction'",
}

pytestmark = pytest.mark.skipif(
    not (GENERATOR.exists() and MODEL.exists()), reason="the shared bad inputs are not here"
)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("bad")
    subprocess.run([sys.executable, GENERATOR, folder], check=True, capture_output=True)
    return folder, json.loads((folder / "EXPECTED.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def judged(path: Path) -> tuple[bool, int, str]:
    check = FileCheck(path.name)
    with path.open("rb") as file:
        while chunk := file.read(4096):
            check.feed(chunk)
    report = check.finish()
    return report.ok, report.rows, report.summary(path.name)


def prepared(root: Path, tokenizer: Any, path: Path) -> tuple[int | None, str]:
    try:
        source = Source(path=path, filename=path.name)
        _, figures = make(root, tokenizer, source, seq_len=SEQ_LEN)
    except DataError as error:
        return None, error.message
    assert figures["trained_tokens"] > 0
    return figures["rows"], ""


def test_every_bad_input_gets_its_verdict_on_upload_and_in_prepare(
    tmp_path: Path, tokenizer: Any, cases: tuple[Path, list[dict[str, Any]]]
) -> None:
    folder, expected = cases
    wrong = []
    for case in expected:
        path = folder / case["file"]
        accepted, rows, summary = judged(path)
        read, message = prepared(tmp_path, tokenizer, path)
        reasons = f"{summary} / {message}"
        if case["expect"] == "accept" and not (accepted and rows == read == case["rows"]):
            wrong.append(f"{case['file']} was refused or lost rows: {reasons}")
        if case["expect"] == "reject" and (accepted or read is not None):
            wrong.append(f"{case['file']} was accepted ({case['why']})")
        if case["expect"] == "either" and not accepted and read is not None:
            wrong.append(f"{case['file']} was refused on upload and taken by prepare: {reasons}")
        # A file that is taken only by the check: every answer is cut off, which the tokenizer alone can know.
        if accepted and read is None and "not one token" not in message:
            wrong.append(f"{case['file']} was taken on upload and refused by prepare: {message}")
        if len(reasons) > 2000:
            wrong.append(f"{case['file']} is answered with {len(reasons)} characters")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "path", sorted((SHARED / "datasets").glob("[ip]*/*")), ids=lambda p: p.name
)
def test_real_data_is_read_the_same_on_upload_and_in_prepare(
    tmp_path: Path, tokenizer: Any, path: Path
) -> None:
    accepted, rows, summary = judged(path)
    read, message = prepared(tmp_path, tokenizer, path)
    if path.name in UNUSABLE:
        assert not accepted
        assert UNUSABLE[path.name] in summary
        assert UNUSABLE[path.name] in message
        return
    assert accepted, summary
    assert read, message
    if path.suffix != ".txt":
        assert read == rows
