"""What is done to a node beside the round, one thing after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Errand:
    """One thing at a time, on a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def run(self, act: Callable[[], None]) -> bool:
        """Begin it; False: another is under way. Raises what the last one raised."""
        if self._thread is not None and self._thread.is_alive():
            return False
        self.wait()
        self._thread = threading.Thread(target=self._do, args=(act,))
        self._thread.start()
        return True

    def _do(self, act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - raised where somebody waits for it
            self._failed = error

    def wait(self) -> None:
        """Until nothing is under way. Raises what the last one raised."""
        if self._thread is not None:
            self._thread.join()
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed
