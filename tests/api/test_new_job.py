"""The form of the dashboard makes what a create makes: the same request, the same refusals, one job for one form."""

from __future__ import annotations

import html
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from api.dashboard.new_job import METHODS, changes, method_of
from api.dashboard.rendering import templates
from api.routes.after import create_body
from api.schemas.estimates import Estimate, EstimatedData
from sat_core.plan.request import RunRequest

from .conftest import KEY, ROW, create, upload

REFUSED = [
    ("model", "", "missing"),
    ("model", "local/none", "does not exist"),
    ("model", "a\0b/c", "NUL"),
    ("training_file", "", "missing"),
    ("suffix", "a b", "letters"),
    ("seed", "-1", "integer from 0"),
    ("n_epochs", "many", "at least 1"),
    ("batch_size", "1.5", "integer"),
    ("learning_rate_multiplier", "nan", "above 0"),
    ("method", "magic", "balanced"),
    ("sat", "{", "not valid JSON"),
    ("sat", "[" * 100_000, "not valid JSON"),
    ("sat", "[1]", "an object"),
    ("sat", '{"omision_rate": {}}', "omission_rate"),
    ("sat", '{"train": {"warmup": 2}}', "sat.train.warmup"),
]
SPAN = {"low": 80, "expected": 90, "high": 200}
SAT = {
    "mode": "on",
    "preset": "fast",
    "omission_rate": {"mlp": 0.4, "pooled": True},
    "train": {"max_steps": 9, "learning_rate": 3e-05, "warmup": 0.0},
    "eval": {"every": 0, "prompts": ["Größe <b>", "two"]},
    "data": {"validation_split": 0.0},
}
AGAIN = [
    {},
    {"sat": SAT, "seed": 7, "suffix": "x", "metadata": {"team": "a"}},
    {"sat": {"mode": "off", "preset": "safe"}, "hyperparameters": {"n_epochs": 3}},
    {"sat": {"train": {"tuning": "lora", "lora_rank": 4}, "omission_rate": {"mlp": 0.0}}},
    {"hyperparameters": {"learning_rate_multiplier": 0.1, "batch_size": 16}},
    {"integrations": [{"type": "tensorboard"}], "sat": {"priority": "low"}},
]


@pytest.fixture
def browser(client):
    """A client that is signed in."""
    client.get(f"/login?key={KEY}")
    return client


def token(page: str) -> str:
    return re.search(r'name="token" value="([0-9a-f]{32})"', page)[1]


def form(client, path: str = "/new") -> dict[str, str]:
    """What a browser would send of the page as it is."""
    page = client.get(path).text
    fields = dict(re.findall(r'<input[^>]*? name="(\w+)" value="([^"]*)"', page))
    fields |= {"method": re.search(r'value="(\w+)" checked', page)[1]}
    fields["sat"] = re.search(r"<textarea.*?>(.*?)</textarea>", page, re.DOTALL)[1]
    for name, body in re.findall(r'<select\s+id="(\w+_file)".*?>(.*?)</select>', page, re.DOTALL):
        chosen = re.search(r'value="(\S+)" selected', body)
        fields[name] = chosen[1] if chosen else ""
    for name in ("model", "suffix", "n_epochs", "batch_size", "learning_rate_multiplier", "seed"):
        fields[name] = re.search(rf'id="{name}".*?value="([^"]*)"', page, re.DOTALL)[1]
    return {name: html.unescape(value) for name, value in fields.items()}


def send(client, fields: dict[str, str], upload: tuple[str, bytes] = ("", b""), **more: str):
    data = {"wish": "start", **fields, **more}
    return client.post("/new", data=data, files={"training_upload": upload}, follow_redirects=False)


def jobs(services) -> list:
    return list(services.store.list_jobs("default", limit=100).items)


def wrong(page: str) -> dict[str, str]:
    """What is said to be wrong, by field."""
    found = re.findall(r'class="wrong" id="(\w+)-wrong">(.*?)<', page, re.DOTALL)
    return {name: html.unescape(said.strip()) for name, said in found}


def test_a_plain_form_makes_the_job_of_a_plain_create(browser, services, file_id):
    answer = send(browser, form(browser), model="local/tiny", training_file=file_id)
    made = create(browser, file_id).json()["id"]
    newest, first = jobs(services)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/jobs/{first.id}")
    assert newest.id == made
    first, newest = (create_body(job, by_method=False) for job in (first, newest))
    assert first == newest


def test_a_method_is_its_settings(browser, services, file_id):
    usual = RunRequest(model="x").to_dict()["sat"]
    for name, method in METHODS.items():
        fields = form(browser) | {"model": "local/tiny", "training_file": file_id, "sat": "null"}
        send(browser, fields, method=name)
        sat = jobs(services)[0].request["sat"]
        told = {key: value for key, value in method.sat.items() if value != "balanced"}
        assert changes(usual, sat) == told
        assert method_of(sat) == name


def test_run_again_keeps_all_but_what_is_changed(browser, services, file_id):
    other = upload(browser, ROW * 2, filename="held.jsonl").json()["id"]

    def body(job: str) -> dict:
        return create_body(services.store.get_job("default", job), by_method=False)

    for more in AGAIN:
        first = create(browser, file_id, validation_file=other, **more).json()["id"]
        again = form(browser, f"/new?from={first}")
        same = send(browser, again).headers["location"].removeprefix("/jobs/")
        assert same != first
        assert body(same) == body(first)
        changed = send(browser, again, n_epochs="9").headers["location"].removeprefix("/jobs/")
        hyper = body(first)["hyperparameters"] | {"n_epochs": 9}
        assert body(changed) == body(first) | {"hyperparameters": hyper}


def test_a_job_whose_file_was_deleted_is_filled_all_the_same(browser, services, file_id):
    first = create(browser, file_id).json()["id"]
    services.store.cancel_job("default", first)
    browser.delete(f"/v1/files/{file_id}")
    again = form(browser, f"/new?from={first}")
    assert again["training_file"] == file_id
    refused = send(browser, again)
    assert refused.status_code == 400
    assert "does not exist" in wrong(refused.text)["training_file"]
    assert browser.get("/new?from=ftjob-none").status_code == 404


def test_a_refusal_stands_at_its_field_and_what_was_typed_stays(browser, services, file_id):
    good = form(browser) | {"model": "local/tiny", "training_file": file_id, "suffix": "mine"}
    for field, typed, said in REFUSED:
        refused = send(browser, good | {field: typed})
        assert refused.status_code == 400, typed
        assert list(wrong(refused.text)) == [field]
        assert said in wrong(refused.text)[field]
        if field != "method":
            assert f'aria-describedby="{field}-wrong' in refused.text
            assert 'aria-invalid="true" autofocus' in refused.text
        kept = html.unescape(refused.text)
        assert field == "suffix" or 'value="mine"' in kept
        assert typed in kept or field in ("method", "training_file")
    assert jobs(services) == []


def test_one_form_makes_one_job_however_often_it_comes(browser, services, file_id):
    fields = form(browser) | {"model": "local/tiny", "training_file": file_id}
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: send(browser, fields), range(4)))
    (job,) = jobs(services)
    assert {answer.headers.get("location") for answer in answers} == {f"/jobs/{job.id}"}
    # Gone back to and changed, it is another one.
    assert send(browser, fields, seed="2").headers["location"] != f"/jobs/{job.id}"
    assert send(browser, form(browser) | fields | {"token": ""}).status_code == 303
    assert len(jobs(services)) == 3


def test_a_file_that_is_sent_along_is_kept_and_chosen(browser, services):
    fields = form(browser) | {"model": "local/tiny"}
    bad = send(browser, fields, ("bad.jsonl", ROW + b"{}\n"), suffix="mine")
    assert bad.status_code == 400
    assert "bad.jsonl" in wrong(bad.text)["training_upload"]
    assert "Line 2" in bad.text
    assert 'value="mine"' in bad.text
    large = send(browser, fields, ("large.jsonl", ROW * 20_000))
    assert large.status_code == 400
    assert "SATUNE_MAX_FILE_BYTES" in wrong(large.text)["training_upload"]
    assert services.store.list_files("default").items == ()

    refused = send(browser, fields, ("data.jsonl", ROW * 3), n_epochs="0")
    (file,) = services.store.list_files("default").items
    assert (file.filename, file.rows) == ("data.jsonl", 3)
    assert f'value="{file.id}" selected' in refused.text
    fields |= {"token": token(refused.text)}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: send(browser, fields, ("data.jsonl", ROW * 3)), range(2)))
    (job,) = jobs(services)
    assert len(services.store.list_files("default").items) == 2
    assert job.training_file in {f.id for f in services.store.list_files("default").items}
    assert send(browser, fields, ("data.jsonl", ROW * 4)).status_code == 303, "gone back to"
    assert {job.training_file for job in jobs(services)} != {job.training_file}
    assert list(services.artifacts.files.glob(".part-*")) == []


@pytest.mark.usefixtures("early_in_a_minute")
def test_a_limit_of_the_project_is_said_above_the_form(browser, services, file_id):
    services.store.set_limits("default", {"queued_jobs": 1})
    fields = {"model": "local/tiny", "training_file": file_id}
    assert send(browser, form(browser) | fields).status_code == 303
    refused = send(browser, form(browser) | fields)
    assert refused.status_code == 429
    assert 'role="alert"' in refused.text
    services.store.set_limits("default", {"requests_per_minute": 1})
    bad = form(browser) | fields | {"model": "", "suffix": "mine"}
    first, second = send(browser, bad), send(browser, bad)
    assert (first.status_code, second.status_code) == (400, 429)
    assert 'value="mine"' in second.text


def session(client, services, *scopes: str):
    _, _, secret = services.store.create_service_account("default", "ci", scopes)
    client.headers.pop("authorization", None)
    client.get(f"/login?key={secret}")
    return client


def test_a_key_that_may_not_start_jobs_sees_no_way_to_and_is_told_why(client, services, file_id):
    job = create(client, file_id).json()["id"]
    session(client, services, "jobs:read", "files")
    for path in ("/", f"/jobs/{job}"):
        assert "/new" not in client.get(path).text
    refused = client.get("/new")
    assert refused.status_code == 403
    assert "jobs:write" in refused.text
    assert send(client, {"model": "local/tiny", "training_file": file_id}).status_code == 403


def test_a_key_without_files_or_models_is_shown_none_and_may_name_a_file(client, services, file_id):
    session(client, services, "jobs:read", "jobs:write")
    page = client.get("/new").text
    assert "data.jsonl" not in page
    assert "local/tiny" not in page
    assert "training_upload" not in page
    fields = {"model": "local/tiny", "training_file": file_id, "method": "dense"}
    refused = send(client, fields, ("data.jsonl", ROW))
    assert refused.status_code == 403
    assert len(services.store.list_files("default").items) == 1
    assert send(client, fields).status_code == 303


def test_ids_of_another_project_are_none(client, services, file_id):
    job = create(client, file_id).json()["id"]
    other = services.store.create_project("Other").id
    _, _, secret = services.store.create_service_account(other, "ci", ("jobs:read", "jobs:write"))
    client.headers.pop("authorization")
    client.get(f"/login?key={secret}")
    assert client.get(f"/new?from={job}").status_code == 404
    fields = {"model": "local/tiny", "method": "dense", "again": job, "training_file": file_id}
    assert send(client, fields).status_code in (400, 404)


def test_a_form_of_another_site_is_refused(browser, services, file_id):
    fields = form(browser) | {"model": "local/tiny", "training_file": file_id}
    browser.headers["origin"] = "http://elsewhere.example"
    assert send(browser, fields).status_code == 403
    assert jobs(services) == []


def plan(**more) -> str:
    """The words of an estimate in which nothing is known but what must be, and what is given."""
    flops = {"dense": 10**15, "sat": 7 * 10**14, "probe": 0, "ratio": 0.7}
    counts = dict.fromkeys(EstimatedData.model_fields, 0) | {"steps": 75, "rows": 9}
    bytes_of = dict.fromkeys(("weights", "gradients", "optimizer", "activations", "runtime"), 1)
    memory = {"peak": SPAN, "available": None, "fits": None, "basis": "analytic"} | bytes_of
    time = {"basis": "analytic", "seconds": None, "queue_seconds": None, "runs": 0}
    given = {
        "id": "chore-1",
        "created_at": 1,
        "status": "ready",
        "model": "local/tiny",
        "training_file": "file-1",
        "hyperparameters": {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 0.5},
        "data": counts | more.pop("data", {}),
        "flops": flops,
        "speedup": {"flop_bound": 1.43, "expected": None, "by_phase": []} | more.pop("speedup", {}),
        "time": time | {"past_error": None} | more.pop("time", {}),
        "memory": memory | more.pop("memory", {}),
        "energy": {"joules": None},
    }
    found = Estimate.model_validate(given | more)
    page = templates().get_template("new_plan.html").render(plan=found, workers=1)
    return " ".join(html.unescape(re.sub("<.*?>", " ", page)).split())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "Time not known yet"),
        ({}, "Memory 90 B 80 B to 200 B Speed-up"),
        ({}, "Resolved 3 epochs batches of 8, 0.5 "),
        ({"status": "pending"}, "A worker reads the data"),
        ({"status": "failed", "error": {"code": "x", "message": "No <row>."}}, "No <row>."),
        (
            {"time": {"seconds": SPAN}},
            "about 1 min 30 s 1 min 20 s to 3 min 20 s; from runs of other",
        ),
        ({"time": {"seconds": SPAN, "basis": "calibrated"}}, "from runs like it"),
        ({"time": {"queue_seconds": {"low": 0, "high": 70}}}, "Wait up to 1 min 10 s"),
        ({"memory": {"available": 100}}, "80 B to 200 B; may not fit the 100 B"),
        ({"memory": {"available": 300, "fits": True}}, "fits in the 300 B"),
        ({"memory": {"available": 10, "fits": False}}, "does not fit the 10 B"),
        ({"speedup": {"expected": 1.25}}, "1.25 \N{MULTIPLICATION SIGN} expected at most 1.43"),
        ({"data": {"truncated_rows": 2, "truncated_tokens": 30}}, "2 of 9 rows 30 tokens"),
        ({"energy": {"joules": 7.2e6}}, "2.00 kWh"),
        ({"warnings": ["Mind <this>."]}, "Mind <this>."),
    ],
)
def test_a_plan_is_said_in_words(more, words):
    assert words in plan(**more)
