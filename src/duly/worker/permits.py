"""A rate limit on handler starts: a token bucket shared by the lanes of a consumer."""

from __future__ import annotations

import threading
from collections.abc import Callable

# Unused starts are saved up for this long, so that batches stay batches at high rates.
BURST_S = 0.1


class Permits:
    """At most ``rate_per_s`` starts a second over time; bursts of a tenth of a second's worth."""

    def __init__(self, rate_per_s: float, clock: Callable[[], float]) -> None:
        self._rate = rate_per_s
        self._clock = clock
        self._most = max(1.0, rate_per_s * BURST_S)
        self._saved = 1.0
        self._at = clock()
        self._lock = threading.Lock()

    def take(self, wished: int) -> int:
        """Of ``wished`` starts, how many are allowed now; they count as used."""
        with self._lock:
            self._save()
            allowed = max(0, min(wished, int(self._saved)))
            self._saved -= allowed
            return allowed

    def give_back(self, unused: int) -> None:
        """Return starts that were allowed and not needed. Less than 0: so many more were made,
        and no other is allowed before their time has come.
        """
        with self._lock:
            self._save()
            self._saved = min(self._most, self._saved + unused)

    @property
    def are_owed(self) -> bool:
        """Whether more has started than was allowed until now."""
        with self._lock:
            self._save()
            return self._saved < 0

    def _save(self) -> None:
        now = self._clock()
        self._saved = min(self._most, self._saved + (now - self._at) * self._rate)
        self._at = now
