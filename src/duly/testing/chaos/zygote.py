"""Starts processes in milliseconds: a process that has imported duly, and forks.

    python -m duly.testing.chaos.zygote package.module:function [module ...]

It has one thread and opens no file of duly's, so that a child is as good as one newly started;
the modules are imported once, for all.
One line of JSON on standard input starts a child, which calls the function with its orders and
ends with the status that returns; on standard output it tells who ended how.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from duly.sql.sqlite.driver import named_statements

Run = Callable[[dict[str, Any]], int]
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(named: str, modules: Sequence[str]) -> None:
    """Serve until standard input ends; then whoever is left is killed."""
    module, _, function = named.partition(":")
    for more in modules:
        importlib.import_module(more)
    run: Run = getattr(importlib.import_module(module), function)
    named_statements()  # read once, for all children
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # Ctrl-C reaches the whole group. It ends with who asked for it, or it would leave children.
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(wake)
    running: set[int] = set()
    asked = b""
    while True:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            _drain(woken)
            _reap(running)
        if 0 not in ready:
            continue
        data = os.read(0, 65536)
        if not data:
            break
        *lines, asked = (asked + data).split(b"\n")
        for line in lines:
            _start(run, json.loads(line), running)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _start(run: Run, told: dict[str, Any], running: set[int]) -> None:
    # Told to end before it is itself, it would ignore that as its parent does: it hears it later.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    pid = os.fork()
    if pid == 0:
        _be_child(run, told["orders"])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    running.add(pid)
    _tell({"number": told["number"], "started": pid})


def _be_child(run: Run, orders: dict[str, Any]) -> None:
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, *ENDING):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        log = os.open(orders["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        for fd, end in ((null, 0), (log, 1), (log, 2)):
            os.dup2(fd, end)
        os.setsid()
        status = run(orders)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - a child may end in no other way than below
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _reap(running: set[int]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        running.discard(pid)
        _tell({"ended": pid, "status": os.waitstatus_to_exitcode(status)})


def _drain(fd: int) -> None:
    try:
        while os.read(fd, 4096):
            pass
    except BlockingIOError:
        pass


def _tell(what: dict[str, Any]) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
