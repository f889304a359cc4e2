"""One worker process, as ``duly run`` starts it: ``python -m duly.cli.worker MODULE:APP ...``.

It works until SIGTERM or until its supervisor is gone, then drains. Exit statuses: 0 drained,
1 a lane broke, handlers still ran at the deadline, or it cannot start now, 2 it never can.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import FrameType

import msgspec

from duly import logs
from duly.cli.loading import load_app
from duly.cli.metering import Place, count, served
from duly.errors import BrokerUnusable, ConfigurationError, DulyError
from duly.supervisor import CUT_OFF, DRAINED, REFUSED, Lifeline
from duly.worker import Worker

log = logging.getLogger("duly.worker")

DEFAULT_TURN_S, TURN_S = 0.005, 0.0005
"""How long a thread has the interpreter while another one wants it."""


class Orders(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a worker process is told on its command line, as one JSON argument."""

    app: str
    consumers: Sequence[str] | None
    drain_s: float
    log_format: logs.Format
    processes: int
    metrics: Place | None = None

    def command(self) -> Sequence[str]:
        """The command that starts such a worker."""
        return [sys.executable, "-m", "duly.cli.worker", msgspec.json.encode(self).decode()]


@dataclass(slots=True)
class Process:
    """This process's wish to end, and who watches it."""

    orders: Orders
    lifeline: Lifeline | None
    # Plain, not a threading.Event: a signal handler that sets one can wait for itself.
    ending: bool = False
    working: bool = False

    def end(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Wish to end; what a signal calls."""
        self.ending = True

    def work(self) -> int:
        """Work until the end is wanted; returns the exit status."""
        if self.lifeline is not None:
            self.lifeline.start(self._orphaned)
        try:
            app = load_app(self.orders.app)
            count(app, self.orders.metrics)
            worker = Worker(
                app,
                consumers=self.orders.consumers,
                supervised=self.lifeline is not None,
                processes=self.orders.processes,
            )
            worker.prepare()
        except (ConfigurationError, BrokerUnusable) as error:
            return self._refuse(error)
        except DulyError as error:
            # For now, it may be: the supervisor starts another, after a while.
            log.error("this worker cannot start: %s", error)  # noqa: TRY400 - it says enough
            return CUT_OFF
        except Exception:
            log.exception("this worker could not start")
            return CUT_OFF
        if self.ending:
            return self._drain(worker)  # it has begun nothing
        self.working = True
        # Before the first handler runs: from now on silence means that one hangs, and is not
        # forgiven like that of a long import.
        if self.lifeline is not None:
            self.lifeline.ready(lambda: counts(worker))
        settle_heap()
        take_turns()
        worker.start()
        with served(app, self.orders.metrics):
            while not (self.ending or worker.wait(0.1)):
                pass
            return self._drain(worker)

    def _refuse(self, error: Exception) -> int:
        if self.lifeline is None:
            print(f"duly: {error}", file=sys.stderr)  # noqa: T201 - nobody else says it
        else:
            self.lifeline.refuse(str(error))
        return REFUSED

    def _orphaned(self) -> None:
        log.error("the supervisor is gone: draining")
        if self.working:
            self.ending = True
            threading.Event().wait(self.orders.drain_s)
        self._end_now()

    def _end_now(self) -> None:
        # Nobody else is left to end a handler that hangs, and what it has started.
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os._exit(CUT_OFF)

    def _drain(self, worker: Worker) -> int:
        try:
            clean = worker.drain(self.orders.drain_s)
        except BaseException:  # what ended a lane may be a SystemExit of a handler's own
            log.exception("this worker ends: a lane broke")
            return CUT_OFF
        if not clean:
            log.warning(
                "handlers still ran after %g s; their messages come again", self.orders.drain_s
            )
            return CUT_OFF
        # Handlers may have published at-most-once, which waits in a buffer.
        worker.app.close()
        return DRAINED


def take_turns() -> None:
    """Let threads take the interpreter in turns much shorter than by default, 5 ms.

    With each statement of a batch a lane that has its answer waits that long for a thread that
    reads what comes next. An application that has set something else keeps it.
    """
    if sys.getswitchinterval() == DEFAULT_TURN_S:
        sys.setswitchinterval(TURN_S)


def settle_heap() -> None:
    """Let the garbage collector pass over all that is there by now: modules, the application.

    It stays for as long as the process does. A batch's payloads live long enough to make the
    collector look at everything now and then, which for a large application takes longer than
    the batch.
    """
    gc.collect()
    gc.freeze()


def counts(worker: Worker) -> Mapping[str, Mapping[str, int]]:
    """What each consumer has done, as the lifeline carries it."""
    return {name: asdict(each) for name, each in worker.counts().items()}


def main(argument: str) -> int:
    """Work as the orders say; returns the exit status."""
    orders = msgspec.json.decode(argument, type=Orders)
    process = Process(orders, Lifeline.from_environment())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, process.end)
    logs.configure(orders.log_format)
    return process.work()


if __name__ == "__main__":
    status = main(sys.argv[1])
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: that would wait for handlers which were told to end and did not.
    os._exit(status)
