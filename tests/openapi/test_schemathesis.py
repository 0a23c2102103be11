"""Every operation that the description names, called as it says and as it does not, by Schemathesis with all its checks.

`make test-openapi` tries other cases each time, and thousands: CASES is how many the fuzzing makes of each operation. Here
they are few and always the same. Left out is the stream of a job, which ends when the job does; and of requests that may
wait, `wait` is 0.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.api.conftest import KEY, app, migrated, settings
from tests.api.serving import served

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["app", "migrated", "settings"]

ROOT = Path(__file__).parents[2]
CHOICE = (
    ("--max-examples", os.environ["CASES"])
    if "CASES" in os.environ
    else ("--max-examples", "3", "--seed", "1")
)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_api_does_what_its_description_says(app: FastAPI, tmp_path: Path):
    with served(app) as address:
        keys = httpx.get(
            f"{address}/v1/organization/projects/default/api_keys",
            headers={"authorization": f"Bearer {KEY}"},
        )
        command = [
            *(sys.executable, "-m", "schemathesis.cli"),
            *("--config-file", str(Path(__file__).with_name("schemathesis.toml"))),
            *("run", f"{address}/openapi.json", "--header", f"Authorization: Bearer {KEY}"),
            *("--checks", "all", *CHOICE, "--continue-on-failure"),
            *("--exclude-operation-id", "streamFineTuningJob", "--no-color", "--no-shrink"),
            # That it finds few bad names for a path is no fault of the API.
            *("--suppress-health-check", "filter_too_much"),
        ]
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OWN_KEY_ID": keys.json()["data"][0]["id"]},
            cwd=tmp_path,
            check=False,
            capture_output=True,
            text=True,
        )
    print(done.stdout)  # noqa: T201 - what was tried; `make test-openapi` shows it
    assert done.returncode == 0, done.stdout + done.stderr
