"""The Celery application of one host.

    celery -A worker.app worker --pool threads --without-gossip --without-mingle

Celery carries bells only (`jobs.queue` says why), so messages are acknowledged early, hold no argument, and no result
backend exists. A thread that hears one claims jobs until none is waiting or no slot is free. The threads pool, because all
work is done by child processes; one worker a host, because it owns that host's GPUs.

SIGTERM: children are asked to write a checkpoint, their jobs go back to the queue uncounted, the worker ends.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from celery import Celery
from celery.signals import worker_process_init, worker_ready, worker_shutting_down

from jobs.db import make_engine
from jobs.queue import QUEUE, WAKE_TASK, broker_options, make_bell
from jobs.settings import Settings
from jobs.store import Store
from worker.host import Host

log = logging.getLogger(__name__)

LOCAL_BROKER = "redis://127.0.0.1:6379/0"


def make_app(settings: Settings) -> Celery:
    """The application, with a broker; nothing is connected yet."""
    app = Celery("satune", broker=settings.broker_url or LOCAL_BROKER, set_as_current=False)
    app.conf.update(
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        task_default_queue=QUEUE,
        task_ignore_result=True,
        task_acks_late=False,
        task_publish_retry=False,
        worker_prefetch_multiplier=1,
        worker_concurrency=4,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_transport_options=broker_options(socket_timeout=5),
    )
    return app


settings = Settings()
app = make_app(settings)
_host: Host | None = None


@app.task(name=WAKE_TASK, ignore_result=True)
def wake() -> None:
    """Look at the table."""
    if _host is not None:
        _host.look()


@worker_ready.connect
def start(**_: Any) -> None:
    """Take the host's slots and begin to look."""
    global _host  # noqa: PLW0603 - Celery's signals carry no state of ours
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    _host = Host(settings, Store(make_engine(settings)), make_bell(settings))
    _host.start()


@worker_shutting_down.connect
def stop(**_: Any) -> None:
    """Give all jobs back, their checkpoints written."""
    if _host is not None:
        _host.stop()


@worker_process_init.connect
def refuse_prefork(**_: Any) -> None:
    """A forked pool would own the slots once per fork."""
    log.error("Satune's worker needs --pool threads")
    os._exit(2)
