"""A job begun in a real browser: by keyboard, with what goes wrong said where it is, and its plan beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.api.conftest import KEY, ROW
from tests.api.finished import finish_job, new_job
from tests.browser.test_dashboard import Seen, seen, signed_in
from tests.service import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page

    from jobs.spec import ChoreRecord

__all__ = ["seen"]

DATA = {"name": "data.jsonl", "mimeType": "application/jsonl", "buffer": ROW * 3}
GIB = 2**30
WIDTH = "document.documentElement.scrollWidth"


@pytest.fixture
def plain(browser: Browser, url: str) -> Iterator[Seen]:
    """A page in one theme, for what is not about looks."""
    with signed_in(browser, url) as found:
        yield found


def result(**more: Any) -> dict[str, Any]:
    """What a worker answers to the question for an estimate."""
    phases = [
        {"first_step": 1, "last_step": 40, "steps": 40, "state": "training_sparse", "ratio": 0.7}
        | {"omission_rate_mlp": 0.5, "omission_rate_attention": 0.0}
        | {"flops": 70, "dense_flops": 100}
    ]
    parts = ("weights", "gradients", "optimizer", "activations", "runtime")
    quote = {
        "flops": {"dense": 2 * 10**15, "sat": 14 * 10**14, "probe": 10**12, "ratio": 0.7},
        "phases": phases,
        "memory_bytes": dict.fromkeys(parts, GIB) | {"peak": 5 * GIB},
        "width": 128,
        "labels": 31_204,
        "tokens": 40_000,
    }
    figures = {"rows": 214, "sequences": 200, "tokens": 30_000, "seq_len": 512, "longest": 480}
    return {
        "quote": quote,
        "hardware": {"name": "one CPU", "host": "here", "memory_bytes": 16 * GIB},
        "hyperparameters": {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.0},
        "figures": figures | {"truncated_rows": 4, "truncated_tokens": 1234},
        "config": {"batch_size": 8, "total_steps": 75},
        "warnings": ["12 rows stand in the data twice or more."],
    } | more


def focused(page: Page, name: str) -> None:
    """Wait until the element of that id has the focus, which a new page gives when it is drawn."""
    eventually(lambda: page.evaluate("document.activeElement.id") == name, seconds=10)


def claim(services) -> ChoreRecord:
    found = services.store.claim_chore("w-test")
    assert found is not None
    return found


def jobs(services) -> list:
    return list(services.store.list_jobs("default", limit=100).items)


def test_a_job_is_begun_by_keyboard_alone(plain, app):
    services, page = app.state.services, plain.page
    plain.open("/new")
    page.get_by_label("Training file").and_(page.locator("select")).wait_for()
    page.keyboard.press("Tab")
    for _ in range(20):
        if page.evaluate("document.activeElement.id") == "model":
            break
        page.keyboard.press("Tab")
    page.keyboard.type("local/none")
    for _ in range(2):
        page.keyboard.press("Tab")
    focused(page, "training_upload")
    page.locator("#training_upload").set_input_files(DATA)
    page.locator("#model").press("Enter")

    page.get_by_text("does not exist").wait_for()
    focused(page, "model")
    described = page.locator("#model").get_attribute("aria-describedby") or ""
    assert "does not exist" in page.locator("#" + described.split()[0]).inner_text()
    assert "data.jsonl: 3 rows" in page.locator("#training_file option:checked").inner_text()
    assert jobs(services) == []

    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("local/tiny")
    page.keyboard.press("Enter")
    page.wait_for_url("**/jobs/*")
    (job,) = jobs(services)
    assert page.url.endswith(f"/jobs/{job.id}")
    assert len(services.store.list_files("default").items) == 1


def test_a_double_click_makes_one_job(plain, app):
    page = plain.page
    plain.open("/new")
    page.get_by_label("Base model").fill("local/tiny")
    page.locator("#training_upload").set_input_files(DATA)
    page.get_by_role("button", name="Start job").dblclick()
    page.wait_for_url("**/jobs/*")
    assert len(jobs(app.state.services)) == 1
    page.go_back()
    page.get_by_role("button", name="Start job").wait_for()
    plain.check()


def test_a_job_is_run_again_from_its_page(plain, app):
    services, page = app.state.services, plain.page
    first = new_job(services, suffix="good")
    finish_job(services, steps=40)
    plain.open(f"/jobs/{first}")
    page.get_by_role("link", name="Run again with changes").click()
    page.get_by_label("Epochs").fill("2")
    page.get_by_role("button", name="Start job").click()
    page.get_by_text("Cancel job").wait_for()
    again, before = jobs(services)
    assert before.id == first
    assert again.request["hyperparameters"].pop("n_epochs") == 2
    before.request["hyperparameters"].pop("n_epochs")
    same = ("request", "model", "training_file", "validation_file", "suffix", "metadata")
    for name in same:
        assert getattr(again, name) == getattr(before, name)


def test_an_estimate_comes_beside_the_form_and_starts_nothing(seen, app):
    services, page = app.state.services, seen.page
    seen.open("/new")
    seen.check()
    page.get_by_label("Base model").fill("local/tiny")
    page.get_by_label("SAT fast").check()
    page.locator("#training_upload").set_input_files(DATA)
    page.get_by_role("button", name="Estimate").click()
    page.get_by_text("No worker is alive").wait_for()
    focused(page, "plan-title")
    seen.check()
    services.store.finish_chore(claim(services), result())
    page.get_by_text("on 200 sequences").wait_for()
    plan = page.locator(".plan")
    for words in (
        "on 200 sequences, 31.2k tokens trained",
        "not known yet",
        "5.0 GiB",
        "at most 1.43",
        "4 of 214 rows",
        "12 rows stand in the data twice",
    ):
        assert words in plan.inner_text()
    assert page.get_by_label("SAT fast").is_checked()
    assert page.locator("#stale").is_hidden()
    page.get_by_label("Epochs").fill("2")
    assert page.locator("#stale").is_visible()
    assert jobs(services) == []
    seen.check()
    page.set_viewport_size({"width": 390, "height": 800})
    eventually(lambda: page.evaluate(WIDTH) <= 390, seconds=10)
    seen.check()


def test_what_would_fail_is_said_before_there_is_a_job(plain, app):
    services, page = app.state.services, plain.page
    plain.open("/new")
    page.get_by_label("Base model").fill("local/tiny")
    page.locator("#training_upload").set_input_files(DATA)
    page.get_by_role("button", name="Estimate").click()
    page.get_by_text("No worker is alive").wait_for()
    error = {"code": "model_unsupported", "message": "It has no layers.", "param": "model"}
    services.store.fail_chore(claim(services), error)
    page.get_by_text("It has no layers.").wait_for()
    plain.check()


def test_a_refusal_is_accessible_and_fits_a_telephone(seen):
    page = seen.page
    seen.open("/new")
    page.get_by_text("Advanced").click()
    page.get_by_label("Base model").fill("local/tiny")
    page.get_by_label("as JSON").fill('{"omission_rate": {"mpl": 0.5}}')
    page.locator("#training_upload").set_input_files(DATA)
    page.get_by_role("button", name="Start job").click()
    page.get_by_text("Did you mean 'mlp'?").wait_for()
    focused(page, "sat")
    page.set_viewport_size({"width": 390, "height": 800})
    eventually(lambda: page.evaluate(WIDTH) <= 390, seconds=10)
    # The browser itself reports the answer 400 of the page.
    seen.errors = [said for said in seen.errors if "400" not in said]
    seen.check()


def test_it_works_without_script(browser, url, app):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{url}/login?key={KEY}")
    page.goto(f"{url}/new")
    page.fill("#model", "local/tiny")
    page.set_input_files("#training_upload", DATA)
    page.fill("#n_epochs", "0")
    page.click("text=Start job")
    page.wait_for_selector("#n_epochs-wrong")
    page.fill("#n_epochs", "1")
    page.click("text=Start job")
    page.wait_for_url("**/jobs/*")
    assert len(jobs(app.state.services)) == 1
    context.close()


def test_the_links_to_it(plain, app):
    plain.open("/")
    plain.page.get_by_role("link", name="Start one here").click()
    plain.page.get_by_role("heading", name="New job").wait_for()
    current = plain.page.get_by_role("navigation", name="Main").locator("[aria-current]")
    assert current.inner_text() == "New job"
    plain.page.set_viewport_size({"width": 390, "height": 800})
    plain.open("/")
    plain.page.get_by_role("link", name="New job").click()
    plain.page.get_by_role("heading", name="New job").wait_for()
