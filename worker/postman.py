"""Sends the webhooks that are due, from a thread of its own: a receiver that answers slowly must not delay a sweep.

Harmless in any number, like the sweeper: a delivery is claimed in SQL before it is sent.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from jobs.courier import Courier
from jobs.errors import StoreUnavailable

if TYPE_CHECKING:
    from jobs.settings import Settings
    from jobs.spec import DeliveryRecord
    from jobs.store import Store

log = logging.getLogger(__name__)

AT_ONCE = 8
TIDY_SECONDS = 3600.0


class Postman:
    """One process's sender of webhooks."""

    def __init__(self, settings: Settings, store: Store, stopping: threading.Event) -> None:
        self.settings, self.store, self.stopping = settings, store, stopping
        self._courier = Courier(settings.webhook_networks)
        self._tidied_at = time.monotonic() - TIDY_SECONDS
        self._thread = threading.Thread(target=self._run, name="postman", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Wait so long for the round that is under way."""
        if self._thread.is_alive():
            self._thread.join(seconds)

    def round(self) -> int:
        """Send what is due now; how many were tried."""
        if not self.store.any_due_delivery():
            return 0
        due = self.store.due_deliveries(AT_ONCE)
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="postman") as pool:
            list(pool.map(self._deliver, due))
        return len(due)

    def _deliver(self, delivery: DeliveryRecord) -> None:
        found = self.store.address_of(delivery)
        if found is None:
            return
        url, secrets = found
        outcome = self._courier.send(url, secrets, delivery.event_id, delivery.body)
        if outcome.error:
            log.info("Webhook %s to %s: %s", delivery.id, delivery.endpoint_id, outcome.error)
        self.store.delivered(delivery, outcome.status, outcome.error, outcome.retry_after_seconds)

    def _run(self) -> None:
        while not self.stopping.is_set():
            sent = 0
            try:
                sent = self.round()
                if time.monotonic() - self._tidied_at > TIDY_SECONDS:
                    self.store.forget_deliveries()
                    self._tidied_at = time.monotonic()
            except StoreUnavailable as error:
                log.warning("%s", error)
            except Exception:
                # One delivery that breaks comes up again later; those of the others must go out.
                log.exception("A round of webhooks broke")
            if sent < AT_ONCE:
                self.stopping.wait(self.settings.sweep_seconds)
