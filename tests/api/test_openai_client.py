"""The unmodified client of OpenAI, only its base_url changed, with strict validation of every answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import openai
import pytest

from .conftest import KEY, ROW
from .serving import served

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI


@pytest.fixture
def sdk(app: FastAPI) -> Iterator[openai.OpenAI]:
    with (
        served(app) as address,
        openai.OpenAI(
            base_url=f"{address}/v1", api_key=KEY, max_retries=0, _strict_response_validation=True
        ) as client,
    ):
        yield client


def test_a_whole_round_with_the_official_client(sdk):
    file = sdk.files.create(file=("data.jsonl", ROW * 3), purpose="fine-tune")
    assert sdk.files.wait_for_processing(file.id).status == "processed"
    assert sdk.files.content(file.id).read() == ROW * 3

    job = sdk.fine_tuning.jobs.create(
        model="local/tiny",
        training_file=file.id,
        suffix="sdk",
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        extra_body={"sat": {"omission_rate": {"mlp": 0.5, "attention": 0.25}}},
    )
    assert job.hyperparameters.n_epochs == 2
    assert job.sat["omission_rate"]["attention"] == 0.25

    assert sdk.fine_tuning.jobs.retrieve(job.id).id == job.id
    assert [j.id for j in sdk.fine_tuning.jobs.list(metadata={"team": "a"})] == [job.id]
    assert list(sdk.fine_tuning.jobs.list_events(job.id))
    assert list(sdk.fine_tuning.jobs.checkpoints.list(job.id)) == []
    assert sdk.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert [m.id for m in sdk.models.list()] == ["local/tiny"]
    assert sdk.files.delete(file.id).deleted


def test_errors_reach_the_user_of_the_client_with_their_words(sdk):
    with pytest.raises(openai.BadRequestError, match="line 2") as bad:
        sdk.files.create(file=("data.jsonl", ROW + b"{broken\n"), purpose="fine-tune")
    assert (bad.value.code, bad.value.param) == ("dataset_invalid", "file")
    assert bad.value.request_id
    assert bad.value.body["problems"][0]["line"] == 2

    # Refused long before all of it has arrived, and still the client reads why.
    with pytest.raises(openai.APIStatusError, match="limit of this service") as large:
        sdk.files.create(file=("data.jsonl", ROW * 100_000), purpose="fine-tune")
    assert (large.value.status_code, large.value.code) == (413, "file_too_large")

    with pytest.raises(openai.NotFoundError):
        sdk.fine_tuning.jobs.retrieve("ftjob-none")
    with pytest.raises(openai.AuthenticationError):
        sdk.with_options(api_key="wrong").models.list()
    file = sdk.files.create(file=("data.jsonl", ROW), purpose="fine-tune")
    job = sdk.fine_tuning.jobs.create(model="local/tiny", training_file=file.id)
    with pytest.raises(openai.ConflictError, match=job.id):
        sdk.files.delete(file.id)


def test_pause_and_resume_with_the_official_client(sdk):
    file = sdk.files.create(file=("data.jsonl", ROW), purpose="fine-tune")
    job = sdk.fine_tuning.jobs.create(model="local/tiny", training_file=file.id)
    # A client that checks every answer knows six statuses; a plain one is told the seventh.
    strict = sdk.with_options(default_headers={"x-compat": "strict"})
    assert strict.fine_tuning.jobs.pause(job.id).status == "queued"
    plain = openai.OpenAI(base_url=sdk.base_url, api_key=KEY)
    assert plain.fine_tuning.jobs.retrieve(job.id).status == "paused"
    plain.close()
    assert sdk.fine_tuning.jobs.resume(job.id).status == "validating_files"
    with pytest.raises(openai.NotFoundError):
        sdk.fine_tuning.jobs.pause("ftjob-none")
    sdk.fine_tuning.jobs.cancel(job.id)
    with pytest.raises(openai.ConflictError, match="cannot be resumed") as ended:
        sdk.fine_tuning.jobs.resume(job.id)
    assert ended.value.code == "job_terminal"
