"""What a user's script does with OpenAI's client, and nothing that needs Satune: base_url and api_key are other ones.

A program of its own, because each version of the client lives in an environment of its own. It is told all it needs as one
JSON object, says each step when it is done, and ends with status 0 where every answer was whole and as expected. A journey is
made by two clients at once, a plain one and one with strict validation: each asks everything, and each changes something.
"""

import hashlib
import json
import sys
import time
from functools import partial

import openai
from pydantic import BaseModel

PATIENCE_S = 120
TERMINAL = ("succeeded", "failed", "cancelled")
BROKEN = b"{broken\n"


def whole(thing):
    """The answer, once every field that its type requires was found in it, at every depth."""
    if isinstance(thing, BaseModel):
        for name, field in type(thing).model_fields.items():
            assert not field.is_required() or name in thing.model_fields_set, (
                f"{name} is missing from {thing!r}"
            )
            whole(getattr(thing, name, None))
    elif isinstance(thing, list | tuple):
        for item in thing:
            whole(item)
    return thing


def until(ask, happened):
    """The first answer of which it is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened(answer := whole(ask())):
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {answer!r}"
        time.sleep(0.2)
    return answer


def refused(kind, ask):
    """The error of that kind which the call raises; its message alone must help."""
    try:
        ask()
    except kind as raised:
        error = raised
    else:
        raise AssertionError(f"{kind.__name__} was not raised")
    assert error.request_id
    assert error.code
    assert len(error.body["message"]) > 20
    return error


def begin(client, order, data, steps, **more):
    """A job of so many steps."""
    sat = {
        "mode": "on",
        "train": {"max_steps": steps, "max_seq_len": 32},
        "eval": {"every": 0, "forgetting_sequences": 0},
        "checkpoints": {"every": 0},
    }
    hyper = {"batch_size": 4, "n_epochs": "auto", "learning_rate_multiplier": 1.0}
    return whole(
        client.fine_tuning.jobs.create(
            model=order["model"],
            training_file=data,
            seed=3,
            method={"type": "supervised", "supervised": {"hyperparameters": hyper}},
            extra_body={"sat": sat},
            **more,
        )
    )


def upload(client, rows):
    """The data set whole and in parts; the ids of both files."""
    file = whole(client.files.create(file=("train.jsonl", rows), purpose="fine-tune"))
    assert whole(client.files.wait_for_processing(file.id)).status == "processed"
    assert client.files.content(file.id).read() == rows
    assert file.id in [whole(f).id for f in client.files.list(purpose="fine-tune", limit=1)]

    middle = rows.index(b"\n", len(rows) // 2)
    announced = whole(
        client.uploads.create(
            bytes=len(rows), filename="parts.jsonl", mime_type="text/jsonl", purpose="fine-tune"
        )
    )
    parts = [
        whole(client.uploads.parts.create(announced.id, data=data)).id
        for data in (rows[:middle], rows[middle:])
    ]
    md5 = hashlib.md5(rows, usedforsecurity=False).hexdigest()
    done = whole(client.uploads.complete(announced.id, part_ids=parts, md5=md5))
    assert (done.status, done.file.bytes) == ("completed", len(rows))
    other = client.uploads.create(
        bytes=1, filename="none.jsonl", mime_type="text/jsonl", purpose="fine-tune"
    )
    assert whole(client.uploads.cancel(other.id)).status == "cancelled"
    return file.id, done.file.id


def errors(client, order, rows, file):
    """Every refusal reaches the user with its words."""
    bad = refused(
        openai.BadRequestError,
        lambda: client.files.create(file=("bad.jsonl", rows + BROKEN), purpose="fine-tune"),
    )
    assert (bad.code, bad.param) == ("dataset_invalid", "file")
    assert bad.body["problems"][0]["line"] == rows.count(b"\n") + 1
    typo = refused(
        openai.BadRequestError,
        lambda: client.fine_tuning.jobs.create(
            model=order["model"], training_file=file, extra_body={"sat": {"omision_rate": {}}}
        ),
    )
    assert (typo.code, "omission_rate" in typo.body["message"]) == ("unknown_parameter", True)
    none = refused(openai.NotFoundError, lambda: client.fine_tuning.jobs.retrieve("ftjob-none"))
    assert none.code == "job_not_found"
    stranger = client.with_options(api_key="wrong")
    assert refused(openai.AuthenticationError, stranger.models.list).code == "invalid_api_key"
    used = refused(openai.ConflictError, lambda: client.files.delete(file))
    assert used.code == "file_in_use"


def chat(client, model):
    """A few words from a model, at once and as they come."""
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": "a b c"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    answer = whole(client.chat.completions.create(**asked))
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens >= 1
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = [whole(chunk) for chunk in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == (answer.choices[0].message.content or "")
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens


def journey(plain, strict, order):
    """From a file to a model and back to nothing."""
    clients = (plain, strict)

    def when(job, happened):
        return [until(partial(c.fine_tuning.jobs.retrieve, job.id), happened) for c in clients]

    rows = "".join(json.dumps(row) + "\n" for row in order["rows"]).encode()
    files = [upload(client, rows) for client in clients]
    (file, _), (_, parts) = files
    yield "upload"

    long = begin(strict, order, file, 100_000, suffix="long", metadata={"client": order["name"]})
    short = begin(plain, order, parts, 3, validation_file=file)
    assert (long.object, long.user_provided_suffix) == ("fine_tuning.job", "long")
    assert long.hyperparameters.batch_size == 4
    for client in clients:
        errors(client, order, rows, file)
    yield "create, and what is refused"

    for client in clients:
        listed = list(client.fine_tuning.jobs.list(metadata={"client": order["name"]}, limit=1))
        assert [whole(job).id for job in listed] == [long.id]
        assert {long.id, short.id} <= {job.id for job in client.fine_tuning.jobs.list(limit=1)}
    when(long, lambda j: j.status == "running" and stepped(j))
    for client in clients:
        events = [whole(event) for event in client.fine_tuning.jobs.list_events(long.id, limit=2)]
        assert len(events) == len({event.id for event in events}) > 2
    yield "list, events"

    assert whole(strict.fine_tuning.jobs.pause(long.id)).id == long.id
    paused = when(long, lambda j: j.status_detail["state"] == "by_user")
    # A client that checks every answer knows six statuses; a plain one is told the seventh.
    assert [job.status for job in paused] == ["paused", "queued"]
    for client in clients:
        checkpoint = whole(client.fine_tuning.jobs.checkpoints.list(long.id).data)[0]
        assert checkpoint.step_number >= 1
    yield "pause, checkpoints"

    for client, ended in zip(clients, when(short, lambda j: j.status in TERMINAL), strict=True):
        assert ended.status == "succeeded", ended.error
        assert ended.hyperparameters.n_epochs != "auto"
        table = client.files.content(ended.result_files[0]).text
        assert table.startswith("step,train_loss")
        model = ended.fine_tuned_model
        assert whole(client.models.retrieve(model)).id == model
        assert {order["model"], model} <= {whole(m).id for m in client.models.list()}
    yield "result, models"

    for name in (model, checkpoint.fine_tuned_model_checkpoint):
        for client in clients:
            chat(client, name)
    yield "chat"

    assert whole(plain.fine_tuning.jobs.resume(long.id)).id == long.id
    step = checkpoint.step_number
    when(long, lambda j: j.status == "running" and stepped(j) > step)
    yield "resume"

    plain.fine_tuning.jobs.cancel(long.id)
    for gone in when(long, lambda j: j.status in TERMINAL):
        assert (gone.status, gone.error) == ("cancelled", None)
    for client in clients:
        again = refused(openai.ConflictError, partial(client.fine_tuning.jobs.resume, long.id))
        assert again.code == "job_terminal"
    yield "cancel"

    assert whole(strict.models.delete(model)).deleted
    for client, names in zip(clients, files, strict=True):
        assert refused(openai.NotFoundError, partial(client.models.retrieve, model))
        for name in names:
            assert whole(client.files.delete(name)).deleted
    yield "delete"


def stepped(job):
    """Steps that a job has trained."""
    return (job.progress or {}).get("step") or 0


def one_job(client, order):
    """A create, with whatever the client does about answers that do not come."""
    raw = client.fine_tuning.jobs.with_raw_response.create(
        model=order["model"], training_file=order["file"]
    )
    yield json.dumps({"id": whole(raw.parse()).id, "headers": dict(raw.headers)})


def connect(order, *, strict):
    """A client, unmodified."""
    return openai.OpenAI(
        base_url=order["base_url"],
        api_key=order["api_key"],
        default_headers={"x-compat": "strict"} if strict else {},
        _strict_response_validation=strict,
    )


def main(order):
    """Do what the order says; prints the steps."""
    with connect(order, strict=False) as plain, connect(order, strict=True) as strict:
        if order["do"] == "journey":
            steps = journey(plain, strict, order)
        else:
            steps = one_job(strict if order["strict"] else plain, order)
        for done in steps:
            print(done, flush=True)  # noqa: T201 - the test reads it


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
