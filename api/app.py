"""The factory: `uvicorn --factory api.app:create_app`.

Importing this module does nothing; the environment is read once, when the factory is called without settings. Schema
migrations are not run here (`satune up` and the compose file run them once before): two API processes that start
together must not both migrate. FastAPI's interactive docs are off because they load from a CDN; `/docs` is a page of ours.
"""

import functools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from api import errors
from api.auth import session_secret
from api.chats import Chats
from api.dashboard import pages
from api.dashboard.new_job import new_job
from api.dashboard.reference import reference
from api.deps import Services
from api.drafts import PARTIAL
from api.followers import Followers
from api.gate import Gate
from api.head import Head
from api.limiter import Limiter
from api.openapi import describe
from api.queueing import Queueing
from api.routes import (
    after,
    chat,
    datasets,
    estimates,
    exports,
    files,
    fine_tuning,
    health,
    integrations,
    job_run,
    limits,
    models,
    organization,
    queue,
    sat,
    uploads,
    webhooks,
)
from api.together import Together
from jobs.artifacts import Artifacts
from jobs.db import make_engine
from jobs.queue import make_bell
from jobs.settings import Settings
from jobs.store import Store

# An upload that stands still this long has lost its process.
STALE_UPLOAD_SECONDS = 24 * 3600


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service for these settings, by default those of the environment."""
    chosen = settings or Settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = make_engine(chosen)
        store = Store(engine)
        bell = make_bell(chosen)
        if chosen.api_key:
            store.ensure_key(chosen.api_key, name="bootstrap")
        artifacts = Artifacts.from_settings(chosen)
        together = Together()
        _forget_stale_uploads(artifacts.files)
        queueing = Queueing(store, chosen)
        chats = Chats(store, bell, queueing)
        app.state.services = Services(
            settings=chosen,
            store=store,
            artifacts=artifacts,
            bell=bell,
            session_secret=session_secret(chosen.data_dir),
            limiter=Limiter(chosen.broker_url),
            followers=Followers(store, streams_per_key=chosen.streams_per_key),
            queueing=queueing,
            together=together,
            chats=chats,
        )
        yield
        await chats.close()
        together.close()
        engine.dispose()

    app = FastAPI(
        title="Satune",
        version=health.release(),
        description="Managed sparse fine-tuning. Routes under /v1 keep the shapes of the OpenAI API.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    app.add_middleware(Head)
    app.add_middleware(Gate, allowed_hosts=chosen.allowed_hosts)
    errors.install(app)
    # Tried in this order, so what is polled comes first.
    for router in (
        fine_tuning.router,
        job_run.router,
        estimates.router,
        files.router,
        datasets.router,
        uploads.router,
        after.router,
        exports.router,
        integrations.router,
        queue.router,
        sat.router,
        models.router,
        chat.router,
        organization.router,
        limits.router,
        webhooks.router,
        health.router,
    ):
        app.include_router(router)
    pages.install(app)
    app.include_router(new_job)
    app.include_router(reference)
    app.openapi = functools.cache(lambda: describe(app))  # type: ignore[method-assign]
    return app


def _forget_stale_uploads(folder: Path) -> None:
    for path in folder.glob(PARTIAL + "*"):
        if time.time() - path.stat().st_mtime > STALE_UPLOAD_SECONDS:
            path.unlink(missing_ok=True)
