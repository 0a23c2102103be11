"""Requests per minute of a project, counted by the `limits` library: in Redis where a broker is, else in this process.

Redis may vanish, and the service must not vanish with it: requests are then counted in this process, and Redis is asked
again after a while. Projects without a limit are not counted at all.
"""

import logging
import math
import time

import redis
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage, RedisStorage, Storage
from limits.strategies import SlidingWindowCounterRateLimiter

from api.errors import ApiError
from jobs.spec import Key

log = logging.getLogger(__name__)

AGAIN_SECONDS = 10.0
# OpenAI's clients wait no longer than this, and fail with other words instead.
LONGEST_WAIT_SECONDS = 120


class Limiter:
    """Counts for all projects."""

    def __init__(self, broker_url: str | None) -> None:
        self._local = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._shared = _shared(broker_url) if broker_url else None
        self._shared_from = 0.0

    def count(self, key: Key) -> dict[str, str]:
        """Count one request; the headers that tell of it. Raises ApiError where it is one too many."""
        if key.requests_per_minute is None:
            return {}
        item = RateLimitItemPerMinute(key.requests_per_minute)
        taken, remaining, wait = self._hit(item, key.project)
        headers = {
            "x-ratelimit-limit-requests": str(item.amount),
            "x-ratelimit-remaining-requests": str(remaining),
            "x-ratelimit-reset-requests": f"{wait}s",
            "ratelimit-policy": f'"default";q={item.amount};w=60',
            "ratelimit": f'"default";r={remaining};t={wait}',
        }
        if not taken:
            raise ApiError(
                "rate_limited",
                f"This project may send {item.amount} requests a minute; try again in {wait} s.",
                headers=headers | waiting(wait),
            )
        return headers

    def _hit(self, item: RateLimitItemPerMinute, project: str) -> tuple[bool, int, int]:
        if self._shared is not None and time.monotonic() >= self._shared_from:
            try:
                return _hit(self._shared, item, project)
            except redis.RedisError as error:
                log.warning("Requests are counted in this process, Redis is away: %s", error)
                self._shared_from = time.monotonic() + AGAIN_SECONDS
        return _hit(self._local, item, project)


def waiting(seconds: int) -> dict[str, str]:
    """Headers that say when to try again; beyond what clients wait, they say not to."""
    headers = {"retry-after": str(seconds)}
    return headers | {"x-should-retry": "false"} if seconds > LONGEST_WAIT_SECONDS else headers


def _hit(
    limiter: SlidingWindowCounterRateLimiter, item: RateLimitItemPerMinute, project: str
) -> tuple[bool, int, int]:
    taken = limiter.hit(item, project)
    stats = limiter.get_window_stats(item, project)
    return taken, stats.remaining, max(1, math.ceil(stats.reset_time - time.time()))


def _shared(url: str) -> SlidingWindowCounterRateLimiter:
    # Celery's name for a socket, and the library's.
    address = url.replace("redis+socket://", "redis+unix://")
    storage: Storage = RedisStorage(
        address, key_prefix="satune-limits", socket_timeout=1, socket_connect_timeout=1
    )
    return SlidingWindowCounterRateLimiter(storage)
