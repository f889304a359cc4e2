"""A worker of every guarantee, without a database: what its handlers did others can see.

``COPIER_BROKER`` is the broker's URL, ``ZOMBIE_FOLDER`` where the files are, and
``ZOMBIE_CONSUMERS`` names those that are worked. With ``ZOMBIE_STOPS`` it stops itself before it
commits where partitions begin that nobody has had.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import duly
from duly.brokers.kafka.admin import Admin
from duly.worker import Worker
from tests.kafka.copier import HERE, RETRY, copier

CONSUMERS = ("lossy", "noted", "copy")
"""Their names: at-most-once, at-least-once, and exactly-once from Kafka to Kafka."""


def shop(broker: str, folder: Path) -> duly.App:
    """All but the last."""
    app = duly.App("shop", broker=broker)

    def write(name: str, number: int) -> None:
        with (folder / name).open("a") as file:  # one write each: what is killed tears none
            file.write(f"{number}\n")

    @app.consumer(HERE, name="lossy", guarantee="at-most-once", batch=10)
    def lossy(number: int) -> None:
        write("lossy", number)

    @app.consumer(HERE, name="noted", guarantee="at-least-once", batch=10, retry=RETRY)
    def noted(number: int) -> None:
        write("noted", number)

    return app


def stop_before_beginning() -> None:
    """Stop once where it is known where partitions begin, and not committed."""
    starts = Admin.starts

    def stopping(*given: Any) -> Any:
        found = starts(*given)
        setattr(Admin, "starts", starts)  # noqa: B010 - types
        os.kill(os.getpid(), signal.SIGSTOP)
        threading.Event().wait(1.0)  # its driver is told that it is no member any more
        return found

    setattr(Admin, "starts", stopping)  # noqa: B010 - types


def main() -> None:
    """Work until SIGTERM."""
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    if os.environ["ZOMBIE_STOPS"]:
        stop_before_beginning()
    broker, names = os.environ["COPIER_BROKER"], os.environ["ZOMBIE_CONSUMERS"].split()
    apps = [shop(broker, Path(os.environ["ZOMBIE_FOLDER"])), copier(broker, batch=10)]
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(app, consumers=mine))
            for app in apps
            if (mine := [each.name for each in app.consumers if each.name in names])
        ]
        while not over.wait(0.1):
            assert not any(worker.wait(0) for worker in workers), "a lane has ended"


if __name__ == "__main__":
    main()
