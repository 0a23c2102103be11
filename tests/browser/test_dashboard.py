"""The dashboard as a browser meets it: no errors, nothing from elsewhere, accessible in both themes."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from axe_playwright_python.sync_playwright import Axe

from tests.api.conftest import KEY
from tests.api.finished import claim_job, events, fail_job, finish_job, new_job, train_job
from tests.service import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page


class Seen:
    """A page with all that went wrong on it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.errors: list[str] = []
        self.foreign: list[str] = []
        page.on(
            "console",
            lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None,
        )
        page.on("pageerror", lambda e: self.errors.append(str(e)))
        page.on(
            "request",
            lambda r: None if r.url.startswith((url, "data:")) else self.foreign.append(r.url),
        )

    def open(self, path: str) -> None:
        self.page.goto(self.url + path)

    def check(self) -> None:
        assert self.errors == []
        assert self.foreign == []
        found = Axe().run(self.page)
        assert found.violations_count == 0, found.generate_report()


@contextmanager
def signed_in(browser: Browser, url: str, **options: Any) -> Iterator[Seen]:
    """A page of somebody who is signed in, in a context of its own."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(10_000)
    found = Seen(page, url)
    found.open(f"/login?key={KEY}")
    yield found
    context.close()


@pytest.fixture(params=["light", "dark"])
def seen(browser: Browser, url: str, request: pytest.FixtureRequest) -> Iterator[Seen]:
    with signed_in(browser, url, color_scheme=request.param) as found:
        yield found


def fits(page: Page) -> bool:
    """Whether nothing is to be scrolled to the side, neither the page nor a table."""
    wide = "e => e.scrollWidth <= e.clientWidth"
    return all(page.locator("html, .table, .events").evaluate_all(f"all => all.map({wide})"))


def test_an_empty_list_says_how_to_start(seen):
    seen.page.get_by_text("satune submit").wait_for()
    seen.check()


def test_list_and_pages_of_every_kind_are_clean(seen, app):
    services = app.state.services
    done = new_job(services, suffix="good")
    finish_job(services, steps=40)
    failed = new_job(services, suffix="bad")
    fail_job(services, "loss_not_finite", "The loss was not finite at step 3.")
    running = new_job(services, suffix="x" * 64)
    train_job(services, steps=12, total=40)

    seen.open("/")
    assert seen.page.locator("tbody tr").count() == 3
    row = " ".join(seen.page.locator("tbody tr", has_text="good").inner_text().split())
    assert "4.750 → 2.230 held-out 38 % / 19 % 220 just now" in row.replace("to ", "")
    seen.check()
    seen.page.set_viewport_size({"width": 390, "height": 800})
    eventually(lambda: fits(seen.page), seconds=10)
    assert seen.page.get_by_text("loss 4.750").is_visible()
    seen.page.set_viewport_size({"width": 1280, "height": 720})
    seen.page.get_by_role("link", name="Failed").click()
    assert seen.page.locator("tbody tr").count() == 1

    for job, words in (
        (done, "Held-out loss"),
        (failed, "Lower the learning rate"),
        (running, "Cancel job"),
    ):
        seen.open(f"/jobs/{job}")
        seen.page.get_by_text(words).first.wait_for()
        if job != failed:
            seen.page.locator("canvas").first.wait_for()
            assert seen.page.locator("canvas").count() == 4
        seen.check()
    # A status of any length leaves the buttons where they are.
    button = seen.page.get_by_role("button", name="Cancel job")
    before = button.bounding_box()
    said = "document.querySelector('.about span:nth-of-type(2)').textContent = 'word '.repeat(60)"
    seen.page.evaluate(said)
    assert button.bounding_box() == before
    seen.page.set_viewport_size({"width": 390, "height": 800})
    eventually(lambda: fits(seen.page), seconds=10)


def test_a_job_shows_which_layers_sleep_and_what_their_sleep_costs(seen, app):
    services = app.state.services
    job = new_job(services)
    claim = train_job(services, steps=12, total=40)
    blocks = [
        {"kind": kind, "layer": layer, "awake_share": awake, "coverage": 1.0}
        for layer, shares in enumerate([(0.9, 1.0), (0.1, 0.5)])
        for kind, awake in zip(("mlp", "attention"), shares, strict=True)
    ]
    errors = [
        {
            "kind": b["kind"],
            "layer": b["layer"],
            "rate": rate,
            "error": rate / 10 / (1 + b["layer"]),
        }
        for b in blocks
        for rate in (0.25, 0.5)
    ]
    told = {"seq": 9000, "time": 1.0, "kind": "selection", "step": 3, "stage_begins": True}
    told |= {"share": 1.0, "dense_loss": 2.0, "sparse_loss": 2.1, "gap": 0.1, "seconds": 0.1}
    told |= {"errors": errors, "blocks": blocks}
    dense = {**told, "step": 30, "share": 0.0, "errors": []}
    dense["blocks"] = [{**b, "awake_share": 1.0} for b in blocks]
    services.store.record(claim, [told, dense], run="runs/x/2", read_position=2)
    seen.open(f"/jobs/{job}")
    cells = seen.page.locator("#layers tbody tr").all_inner_texts()
    assert [" ".join(row.split()) for row in cells] == [
        "0 90 % 0.05 at 50 % 100 % 0.05 at 50 %",
        "1 10 % 0.025 at 50 % 50 % 0.025 at 50 %",
    ]
    seen.page.set_viewport_size({"width": 400, "height": 800})
    seen.check()


def test_the_reference_is_clean(seen):
    seen.open("/docs")
    for name in ("createFineTuningJob", "object-FineTuningJob"):
        seen.page.locator(f"#{name} summary").click()
    seen.page.get_by_text("sat.omission_rate.mlp").first.wait_for()
    seen.check()


def test_a_running_job_is_followed_to_its_end_without_reload(seen, app):
    services = app.state.services
    job = new_job(services)
    claim = train_job(services, steps=5, total=20)
    seen.open(f"/jobs/{job}")
    seen.page.locator("canvas").first.wait_for()
    seen.page.evaluate("window.same = true")
    axis = seen.page.locator("[data-chart=loss] .u-legend .u-value").first
    over = seen.page.locator("[data-chart=loss] .u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    middle = box["y"] + box["height"] / 2

    def step_at(share: float) -> str:
        seen.page.mouse.move(box["x"] + share * box["width"], middle)
        return axis.inner_text()

    # The newest row waits for its evaluation; the axis goes to step 20.
    eventually(lambda: step_at(0.99) == "4", seconds=10)
    step_at(0.02)
    seen.page.mouse.down()
    seen.page.mouse.move(box["x"] + 0.12 * box["width"], middle, steps=3)
    seen.page.mouse.up()
    eventually(lambda: step_at(0.5) in ("1", "2"), seconds=10)
    finish_job(services, steps=20, claim=claim, first=6)
    seen.page.get_by_text("Take it home").wait_for()
    seen.page.get_by_text("at step 20").first.wait_for()
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    middle = box["y"] + box["height"] / 2
    eventually(lambda: step_at(0.5) in ("1", "2"), seconds=10)
    seen.page.mouse.dblclick(box["x"] + 0.5 * box["width"], middle)
    eventually(lambda: step_at(0.99) == "20", seconds=10)
    assert seen.page.evaluate("window.same") is True
    seen.check()


def test_an_evaluation_that_comes_after_its_step_is_drawn(seen, app):
    services = app.state.services
    job = new_job(services)
    claim = claim_job(services, 40)
    *told, late = events(1, 10, 40)
    services.store.record(claim, told, run="runs/x/2", read_position=1)
    seen.open(f"/jobs/{job}")
    seen.page.locator("canvas").first.wait_for()
    then = [{**late, "eval_loss": 1.234}, events(11, 11, 40)[0]]
    services.store.record(claim, then, run="runs/x/2", read_position=2)
    seen.page.get_by_text("now 1.234").first.wait_for()
    seen.check()


def test_an_error_leaves_what_is_shown(seen, app):
    services = app.state.services
    job = new_job(services)
    seen.open(f"/jobs/{job}")
    seen.page.route(f"**/jobs/{job}", lambda route: route.fulfill(status=502, body="Bad Gateway"))
    for _ in range(2):
        with seen.page.expect_response(lambda response: response.status == 502):
            pass
    assert seen.page.get_by_role("button", name="Cancel job").is_visible()
    assert "Bad Gateway" not in seen.page.content()
    away = seen.page.get_by_role("status").filter(has_text="shown as of")
    away.wait_for()
    seen.page.unroute(f"**/jobs/{job}")
    away.wait_for(state="detached")
    seen.page.route(f"**/jobs/{job}", lambda route: route.abort())
    away.wait_for()


def test_a_session_that_has_ended_asks_to_sign_in_on_a_page_of_its_own(seen, app):
    for path in ("/", f"/jobs/{new_job(app.state.services)}"):
        seen.open(f"/login?key={KEY}")
        seen.open(path)
        seen.page.context.clear_cookies()
        seen.page.get_by_label("API key").wait_for()
        assert seen.page.locator("header.top, .crumbs").count() == 1


def test_a_list_that_is_renewed_keeps_the_focus(seen, app):
    job = new_job(app.state.services)
    seen.open("/")
    seen.page.locator("tbody a").focus()
    new_job(app.state.services)
    seen.page.locator("tbody tr").nth(1).wait_for()
    focused = seen.page.evaluate("document.activeElement.getAttribute('href')")
    assert focused == f"/jobs/{job}"
    seen.check()


def test_a_job_is_cancelled_from_its_page(seen, app):
    services = app.state.services
    job = new_job(services)
    seen.page.on("dialog", lambda dialog: dialog.accept())
    seen.open(f"/jobs/{job}")
    seen.page.get_by_role("button", name="Cancel job").click()
    seen.page.get_by_text("Cancelled").first.wait_for()
    seen.page.get_by_text("No step was measured.").first.wait_for()
    moment = seen.page.locator(".events time").first
    here = "e => new Date(e.dateTime).toLocaleTimeString('en', {hourCycle: 'h23'}).padStart(8, '0')"
    assert moment.inner_text() == moment.evaluate(here)
    assert moment.get_attribute("title") == moment.evaluate(
        "e => new Date(e.dateTime).toLocaleString()"
    )
    assert services.store.get_job("default", job).status == "cancelled"
    seen.check()


def test_the_sign_in_page_takes_the_key_and_leads_where_one_wanted(seen, app):
    job = new_job(app.state.services)
    seen.page.get_by_role("button", name="Sign out").click()
    seen.page.get_by_label("API key").wait_for()
    seen.check()
    seen.open(f"/jobs/{job}")
    focus = "document.activeElement.name"
    eventually(lambda: seen.page.evaluate(focus) == "key", seconds=10)
    seen.page.keyboard.type(KEY)
    seen.page.get_by_role("button", name="Sign in").click()
    seen.page.get_by_role("heading", name=job).wait_for()


def test_the_chosen_theme_stays(seen, app):
    job = new_job(app.state.services)
    train_job(app.state.services, steps=5, total=20)
    seen.open(f"/jobs/{job}")
    marker = seen.page.locator("[data-chart=loss] .u-marker").nth(2)
    for theme, colour in (("light", "rgb(22, 102, 176)"), ("dark", "rgb(100, 181, 246)")):
        seen.page.get_by_label("Colours").select_option(theme)
        assert marker.evaluate("e => e.style.borderTopColor") == colour
    seen.page.reload()
    assert seen.page.locator("html").get_attribute("data-theme") == "dark"
    seen.check()
