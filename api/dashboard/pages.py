"""Routes of the dashboard. A page without a session is answered with the sign-in page and 401, never a redirect.

Pages are HTML made of the same records that the API speaks; parts of them are asked for again by htmx, charts ask for
metrics after the last step they have. What goes wrong outside `/v1` is told a browser as a page.
"""

import contextlib
import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Form, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import (
    HTMLResponse,
    JSONResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.exceptions import HTTPException
from starlette.routing import Match

from api.auth import (
    SignInNeededError,
    Viewer,
    cookie_name,
    need,
    require_session,
    start_session,
)
from api.dashboard.rendering import HERE, Assets, missing, render
from api.deps import App, Services
from api.errors import ApiError, error_response, request_id_of
from api.routes.fine_tuning import result_archive
from api.schemas.jobs import StatusDetail, finite, report
from jobs.errors import InvalidCursor, JobNotPausable, JobsError, JobTerminal, NotFound
from jobs.spec import JobRecord
from jobs.states import TERMINAL, Status
from sat_core.plan.config import TrainConfig
from sat_core.plan.errors import PlanError

JOBS_PER_PAGE = 25
EVENTS_SHOWN = 30
EVENTS_PER_PAGE = 100
# Above this many rows a chart has more points than pixels.
MAX_CHART_ROWS = 2000
CHART_COLUMNS = (
    "step",
    "loss",
    "eval_loss",
    "omission_rate_mlp",
    "omission_rate_attention",
    "tokens_per_second",
    "learning_rate",
)

pages = APIRouter(dependencies=[Depends(require_session)], include_in_schema=False)
sign_in = APIRouter(include_in_schema=False)


@pages.get("/")
def jobs_page(
    request: Request,
    app: App,
    project: Viewer,
    status: Annotated[str, Query()] = "",
    after: Annotated[str | None, Query()] = None,
) -> HTMLResponse:
    """The jobs of the project, newest first."""
    chosen = status if status in set(Status) else ""
    try:
        page = app.store.list_jobs(project, after=after, limit=JOBS_PER_PAGE, status=chosen or None)
    except InvalidCursor:
        return missing(request, "This page of the list no longer exists.")
    counts = app.store.counts_by_status(project)
    query = {"status": chosen, "after": after}
    values: dict[str, Any] = {
        "jobs": page.items,
        "counts": {str(name): count for name, count in counts.items()},
        "total": sum(counts.values()),
        "chosen": chosen,
        "after": after,
        "here": "/?" + urlencode({k: v for k, v in query.items() if v}),
        "next_page": "/?" + urlencode({"status": chosen, "after": page.items[-1].id})
        if page.has_more
        else None,
    }
    partial = request.headers.get("hx-request") == "true"
    return render(request, "jobs_table.html" if partial else "jobs.html", **values)


@pages.get("/jobs/{job_id}")
def job_page(job_id: str, request: Request, app: App, project: Viewer) -> HTMLResponse:
    """One job; htmx asks for it again and gets the parts that change."""
    try:
        job = app.store.get_job(project, job_id)
    except NotFound:
        return missing(request, f"There is no job {job_id} in this project.")
    partial = request.headers.get("hx-request") == "true"
    name = "job_live.html" if partial else "job.html"
    return render(request, name, partial=partial, **_job_values(app, job))


@pages.get("/jobs/{job_id}/events")
def events_page(
    job_id: str,
    request: Request,
    app: App,
    project: Viewer,
    after: Annotated[str | None, Query()] = None,
) -> HTMLResponse:
    """What was told of a job before the event `after`, newest first."""
    try:
        job = app.store.get_job(project, job_id)
        found = app.store.events(
            project, job_id, after=after, limit=EVENTS_PER_PAGE, newest_first=True
        )
    except NotFound:
        return missing(request, f"There is no job {job_id} in this project.")
    except InvalidCursor:
        return missing(request, "This page of the list no longer exists.")
    return render(request, "events.html", job=job, events=found)


def _job_values(app: Services, job: JobRecord) -> dict[str, Any]:
    events = app.store.events(
        job.project, job.id, after=None, limit=EVENTS_SHOWN, newest_first=True
    )
    asked = {"model": job.model, **job.request}
    return {
        "job": job,
        "doing": StatusDetail.of(job, app.queueing.place(job)).message,
        "report": report(job, app),
        "files": {
            name: _filename(app, job.project, getattr(job, name))
            for name in ("training_file", "validation_file")
        },
        "events": events,
        "layers": _layers(app.store.selections(job.project, job.id)),
        "requested": json.dumps(asked, indent=2),
        "resolved": json.dumps(job.config, indent=2) if job.config else None,
    }


def _layers(selections: tuple[dict[str, Any], ...]) -> dict[str, Any] | None:
    """Who is awake in each layer where most sleep, and what the sleep of so many was measured to cost there."""
    if not selections:
        return None
    chosen = max(selections, key=lambda one: (one["share"], one["step"]))
    costs: dict[tuple[str, int], tuple[float, float]] = {}
    for entry in chosen["errors"]:
        block = entry["kind"], entry["layer"]
        costs[block] = max(costs.get(block, (0.0, 0.0)), (entry["rate"], entry["error"]))
    rows: dict[int, dict[str, Any]] = {}
    for block in chosen["blocks"]:
        rate, cost = costs.get((block["kind"], block["layer"]), (None, None))
        rows.setdefault(block["layer"], {})[block["kind"]] = {
            "awake": block["awake_share"],
            "rate": rate,
            "cost": cost,
        }
    return {
        "step": chosen["step"],
        "share": chosen["share"],
        "rows": sorted(rows.items()),
        "kinds": [k for k in ("mlp", "attention") if any(k in r for r in rows.values())],
        "highest": max((cost for _, cost in costs.values()), default=None),
    }


def _filename(app: Services, project: str, file_id: str | None) -> str | None:
    if file_id is None:
        return None
    try:
        return app.store.get_file(project, file_id).filename
    except NotFound:
        return f"{file_id} (deleted)"


@pages.get("/jobs/{job_id}/metrics.json")
def chart_rows(
    job_id: str, app: App, project: Viewer, after: Annotated[int, Query(ge=-1)] = -1
) -> JSONResponse:
    """Rows after a step for the charts, thinned where they are more than a chart can show."""
    # The job before its rows: where it has ended, these are all.
    job = app.store.get_job(project, job_id)
    columns, kept, measured = app.store.thinned_metrics(
        project, job_id, after_step=after, max_rows=MAX_CHART_ROWS
    )
    if job.status not in TERMINAL:
        # An evaluation at the newest step may yet join its row, and no row is asked for twice.
        kept = kept[:-1]
    step = list(columns).index("step")
    drawn = [list(columns).index(name) for name in CHART_COLUMNS]
    return JSONResponse(
        {
            "columns": list(CHART_COLUMNS),
            "rows": finite([[row[i] for i in drawn] for row in kept]),
            "last_step": kept[-1][step] if kept else after,
            "measured": measured,
            "ended": job.status in TERMINAL,
            "total_steps": job.total_steps,
            "plan": _plan(job),
        },
        headers={"cache-control": "no-store"},
    )


def _plan(job: JobRecord) -> list[dict[str, Any]]:
    """The ladder as resolved, so that the chart shows where the run is going. Steps are 1-based, as in metrics."""
    if job.config is None:
        return []
    sat = TrainConfig.from_dict(job.config).sat
    if not sat.sparse:
        return []
    return [
        {
            "first": phase.first_step + 1,
            "last": phase.last_step + 1,
            "mlp": sat.mlp_rate * phase.share,
            "attention": sat.attention_rate * phase.share,
        }
        for phase in sat.ladder.phases()
    ]


@pages.post("/jobs/{job_id}/{wish}")
def wish(
    job_id: str,
    wish: Literal["cancel", "pause", "resume"],
    background: BackgroundTasks,
    app: App,
    project: Viewer,
) -> RedirectResponse:
    """Cancel, pause or resume from the page; a job that has ended meanwhile is simply shown."""
    ask = {
        "cancel": app.store.cancel_job,
        "pause": app.store.pause_job,
        "resume": app.store.resume_job,
    }
    with contextlib.suppress(JobTerminal, JobNotPausable):
        ask[wish](project, job_id)
        background.add_task(app.bell.ring)
    return RedirectResponse(f"/jobs/{job_id}", status_code=303)


@pages.get("/jobs/{job_id}/model.tar")
def model_archive(job_id: str, app: App, project: Viewer) -> StreamingResponse:
    """The result for a browser, which holds no API key."""
    return result_archive(app, project, job_id)


@sign_in.get("/login", response_model=None)
def login_page(request: Request, app: App, key: Annotated[str | None, Query()] = None) -> Response:
    """The form, or at once a session where the address carries a valid key, as `satune up` prints it."""
    return _form(request) if key is None else _login(request, app, key, "/")


@sign_in.post("/login", response_model=None)
def login(
    request: Request,
    app: App,
    key: Annotated[str, Form()] = "",
    next: Annotated[str, Form()] = "/",
) -> Response:
    """A session for a valid key, and the page that was asked for without one."""
    return _login(request, app, key, next)


@sign_in.post("/logout")
def logout(app: App) -> RedirectResponse:
    """End the session."""
    response = RedirectResponse("/login", status_code=303)
    response.delete_cookie(cookie_name(app), path="/")
    return response


def _login(request: Request, app: Services, secret: str, then: str) -> Response:
    key = app.store.authenticate(secret.strip())
    if key is None:
        return _form(request, 401, then=then, refused="This key is not valid here.")
    try:
        need(key, "jobs:read")
    except ApiError as error:
        return _form(request, 403, then=then, refused=error.message)
    # 303 to a clean address: the key leaves the address bar and the history entry.
    response = RedirectResponse(_own(request, then), status_code=303)
    start_session(response, app, key)
    return response


def _form(
    request: Request, status: int = 200, *, then: str = "/", refused: str | None = None
) -> HTMLResponse:
    return render(request, "login.html", status, then=_own(request, then), refused=refused)


def _own(request: Request, address: str) -> str:
    """The address where it is a page of this service, else the list: whoever made the link may want to lead elsewhere."""
    local = re.fullmatch(r"(/(?!/)[^\\\s?#]*)([?#][^\\\s]*)?", address)
    scope = {**request.scope, "method": "GET", "path": local[1] if local else ""}
    found = any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
    return address if local and found else "/"


def _as_page(answer: Callable[[Request, Any], Any]) -> Callable[[Request, Exception], Response]:
    """The answer to an exception, for a browser in a page that says the same."""

    def page(request: Request, error: Exception) -> Response:
        told = answer(request, error)
        assert isinstance(told, JSONResponse)  # noqa: S101 - as all answers of `api.errors` are
        wanted = "text/html" in request.headers.get("accept", "")
        if not wanted or request.url.path.startswith("/v1/"):
            return told
        body = json.loads(bytes(told.body))
        shown = {"title": body["title"], "message": body["detail"]}
        html = render(request, "missing.html", told.status_code, **shown)
        kept = {k: v for k, v in told.headers.items() if not k.startswith("content-")}
        html.headers.update(kept)
        return html

    return page


def install(app: FastAPI) -> None:
    """Add the pages, their static files, and pages as answers to what goes wrong, one of which asks to sign in."""
    for kind in (ApiError, PlanError, JobsError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _as_page(app.exception_handlers[kind]))

    def ask_to_sign_in(request: Request, _: Exception) -> Response:
        if request.url.path.endswith(".json"):
            ended = ApiError("invalid_api_key", "The session has ended; sign in again.")
            return error_response(ended, request_id_of(request))
        read = request.method == "GET"
        asked = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return _form(request, 401, then=asked if read else "/")

    app.add_exception_handler(SignInNeededError, ask_to_sign_in)
    app.include_router(pages)
    app.include_router(sign_in)
    app.mount("/static", Assets(directory=HERE / "static"), name="static")
