"""The dashboard's pages as they are served: what they say, whom they let in, and where they lead."""

from __future__ import annotations

import pytest

from .conftest import KEY, create
from .finished import claim_job, finish_job, new_job, train_job
from .test_organization import secret_of

HTML = {"accept": "text/html"}


@pytest.fixture
def browser(client, services):
    """A client with a session and no key of its own."""
    del client.headers["authorization"]
    client.get(f"/login?key={KEY}")
    return client


def test_signing_in_leads_where_one_wanted_and_nowhere_else(anonymous, services):
    job = f"/jobs/{new_job(services)}"
    asked = anonymous.get(f"{job}/events?after=x")
    assert asked.status_code == 401
    assert f'name="next" value="{job}/events?after=x"' in asked.text
    assert 'name="next" value="/"' in anonymous.post(f"{job}/cancel").text
    wrong = anonymous.post("/login", data={"key": "wrong", "next": job})
    assert f'name="next" value="{job}"' in wrong.text
    for wanted, led in (
        (job, job),
        ("/?status=failed", "/?status=failed"),
        ("//evil.example", "/"),
        ("/\\evil.example", "/"),
        ("/\t/evil.example", "/"),
        ("https://evil.example/", "/"),
        ("//[", "/"),
        ("jobs", "/"),
        (f"{job}/cancel", "/"),
        ("/nothing", "/"),
    ):
        answer = anonymous.post("/login", data={"key": KEY, "next": wanted}, follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, led), wanted


def test_a_key_that_may_see_no_job_is_refused_on_the_form(client):
    secret = secret_of(client, "default", "files")
    del client.headers["authorization"]
    for answer in (client.post("/login", data={"key": secret}), client.get(f"/login?key={secret}")):
        assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)
        assert "needs a key with scope jobs:read; this one has: files." in answer.text


def test_who_may_only_read_is_shown_no_buttons(client, services, file_id):
    job = create(client, file_id).json()["id"]
    secret = secret_of(client, "default", "jobs:read")
    del client.headers["authorization"]
    client.get(f"/login?key={secret}")
    assert "Cancel job" not in client.get(f"/jobs/{job}").text
    refused = client.post(f"/jobs/{job}/cancel", headers=HTML)
    assert refused.status_code == 403
    assert "needs a key with scope jobs:write" in refused.text
    assert "<h1>The API key lacks a scope that this needs</h1>" in refused.text


def test_what_goes_wrong_is_told_a_browser_as_a_page(browser, services):
    page = browser.get("/nope", headers=HTML)
    assert page.status_code == 404
    assert "<p>Nothing is served at /nope.</p>" in page.text
    assert browser.get("/nope").json()["error"]["code"] == "not_found"
    assert browser.get("/v1/nope", headers=HTML).json()["error"]["code"] == "not_found"
    reload = browser.get(f"/jobs/{new_job(services)}/pause", headers=HTML)
    assert (reload.status_code, reload.headers["allow"]) == (405, "POST")
    assert reload.headers["content-type"].startswith("text/html")
    assert browser.get("/jobs/x/model.tar", headers=HTML).text.startswith("<!doctype html>")


def test_a_job_that_waits_says_why(browser, services):
    page = browser.get(f"/jobs/{new_job(services)}").text
    assert "Place 1 of 1 in the queue" in page
    assert "Cancel job" in page


def test_a_job_that_is_being_cancelled_is_not_cancelled_again(browser, services):
    job = new_job(services)
    train_job(services, steps=2, total=20)
    services.store.cancel_job("default", job)
    assert (
        '<button class="danger" disabled>Cancelling…</button>' in browser.get(f"/jobs/{job}").text
    )


def test_a_model_that_became_worse_is_said_to_be(browser, services):
    said = "the model is worse than its base"
    for after, worse in ((7.6, True), (2.0, False)):
        job = new_job(services)
        finish_job(services, steps=3, eval_loss_after=after)
        assert (said in browser.get(f"/jobs/{job}").text) is worse


def test_all_events_can_be_gone_through_and_samples_are_shown(browser, services):
    job = new_job(services)
    claim = claim_job(services, 40)
    told = [
        {"seq": i, "time": 1.0 + i, "kind": "message", "level": "info", "message": f"word {i};"}
        for i in range(150)
    ]
    told.append(
        {"seq": 150, "time": 200.0, "kind": "sample", "step": 0, "prompt": "Q<", "text": " A"}
    )
    services.store.record(claim, told, run="r", read_position=1)
    path, pages = f"/jobs/{job}", []
    while path:
        pages.append(browser.get(path).text)
        before, older, _ = pages[-1].partition('">Older events')
        path = before.rsplit('href="', 1)[1] if older else ""
    assert len(pages) == 3
    seen = "".join(pages)
    assert all(seen.count(f"word {i};") == 1 for i in range(150))
    assert "<b>Q&lt;</b> A" in seen
    assert browser.get(f"/jobs/{job}/events?after=x").status_code == 404
    assert browser.get("/jobs/x/events").status_code == 404


def test_a_list_shows_when_a_job_was_created_and_what_it_was_on_average(browser, services):
    new_job(services)
    finish_job(services, steps=40)
    page = browser.get("/").text
    assert "38\N{NO-BREAK SPACE}% / 19\N{NO-BREAK SPACE}%" in page
    assert ">Created<" in page
