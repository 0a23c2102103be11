"""The bell: a message that says "look at the table", and nothing else.

The row is the truth, so a bell may be lost, doubled or late and only latency is lost. It carries no argument: whoever
can write to the broker can make work start earlier, not choose it. Ringing is bounded to about two seconds and never
raises. The road not taken is a broker that carries the jobs: measured, it loses some and runs others twice.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

from celery import Celery
from kombu.exceptions import KombuError

from jobs.settings import Settings

log = logging.getLogger(__name__)

WAKE_TASK = "satune.wake"
QUEUE = "satune"
# A bell nobody answered for so long is noise: the worker's own look at the table has long found the job.
EXPIRES_SECONDS = 600


class Bell(Protocol):
    """Anything that can wake workers."""

    def ring(self) -> None:
        """Wake a worker, best effort."""


class NullBell:
    """No broker: workers find jobs by their own look at the table."""

    def ring(self) -> None:
        """Do nothing."""


def broker_options(*, socket_timeout: float) -> dict[str, Any]:
    """Transport options under which a half-open connection is noticed within seconds rather than never."""
    return {
        "visibility_timeout": 3600,
        "socket_timeout": socket_timeout,
        "socket_connect_timeout": 2,
        "socket_keepalive": True,
        "health_check_interval": 5,
        "global_keyprefix": "satune:",
    }


class CeleryBell:
    """Rings through the broker that the workers listen to."""

    def __init__(self, settings: Settings) -> None:
        self._app = Celery("satune-bell", broker=settings.broker_url, set_as_current=False)
        self._app.conf.update(
            broker_transport_options=broker_options(socket_timeout=2),
            task_publish_retry=False,
            task_ignore_result=True,
            task_serializer="json",
            broker_connection_timeout=2,
        )

    def ring(self) -> None:
        """Send one wake-up; a broker that is away is logged and no more."""
        try:
            self._app.send_task(
                WAKE_TASK, queue=QUEUE, expires=EXPIRES_SECONDS, ignore_result=True, retry=False
            )
        except (KombuError, OSError) as error:
            log.warning("The bell could not be rung, jobs start at the next sweep: %s", error)

    def close(self) -> None:
        """Give the broker's connections back."""
        self._app.close()


def make_bell(settings: Settings) -> CeleryBell | NullBell:
    """The bell that fits the settings."""
    return CeleryBell(settings) if settings.broker_url else NullBell()
