"""Looking after everybody's jobs and chores: ring again for those that wait, take back those whose worker is lost.

Harmless in any number. A lease is lost when its heartbeat counter has not moved for the lease time on this process's own
monotonic clock, so a sweeper that has just started, or just got its database back, waits one full lease first.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from jobs.chores import CHORE_PREFIX
from jobs.states import Stage

if TYPE_CHECKING:
    from jobs.queue import Bell
    from jobs.settings import Settings
    from jobs.spec import Lease
    from jobs.store import Store

log = logging.getLogger(__name__)


class Sweeper:
    """What one process has seen of the leases."""

    def __init__(self, settings: Settings, store: Store, bell: Bell) -> None:
        self.settings, self.store, self.bell = settings, store, bell
        self._since: dict[Lease, float] = {}
        self._swept_at = time.monotonic()

    def sweep(self) -> int:
        """Look once; the number of jobs and chores taken back."""
        now = time.monotonic()
        leases = [*self.store.leases(), *self.store.chore_leases()]
        if now - self._swept_at > self.settings.lease_seconds:
            # This process itself stood still; what it saw before says nothing of others.
            self._since = {}
        self._swept_at = now
        self._since = {lease: self._since.get(lease, now) for lease in leases}
        lost = [
            lease
            for lease, since in self._since.items()
            if now - since > self.settings.lease_seconds
        ]
        taken = 0
        for lease in lost:
            found = self._take_back(lease)
            taken += found
            log.warning(
                "%s of %s was lost%s",
                lease.job_id,
                lease.owner,
                "" if found else ", but moved again",
            )
        if any(self.store.waiting(stage) for stage in Stage) or self.store.chores_waiting():
            self.bell.ring()
        return taken

    def _take_back(self, lease: Lease) -> bool:
        most = self.settings.max_failures
        if lease.job_id.startswith(CHORE_PREFIX):
            return self.store.expire_chore(lease, max_failures=most)
        return self.store.expire(
            lease, max_failures=most, retry_seconds=self.settings.retry_seconds
        )
