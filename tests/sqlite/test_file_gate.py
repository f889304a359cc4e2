"""Who waits for a group's commit at its gate, and what happens when somebody leaves who had a part
in opening it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from duly.message import Message
from duly.sql import outbox
from duly.sql.sqlite import DatabaseFile
from duly.sql.sqlite.gate import Gate
from duly.sql.sqlite.writer import _Write
from duly.sql.steps import Ask, Steps
from tests.waiting import eventually

MANY = 10
LED, NEXT, OPENER, FIRST_AT_THE_GATE = range(4)


@pytest.fixture
def file(db_path: Path) -> Iterator[DatabaseFile]:
    file = DatabaseFile.open(db_path, busy_s=10)
    yield file
    file.close()


def put(id: str) -> Callable[[], Steps[Any]]:
    message: Message[Any] = Message("topic", "test", id, b"", 0)
    return lambda: outbox.put({"topic"}, [message])


def stored(file: DatabaseFile) -> set[str]:
    return {message.id for _, message in file.read(lambda: outbox.first(10_000))}


class Callers:
    """Callers that queue one after the other while the file's turn is taken."""

    def __init__(self, file: DatabaseFile) -> None:
        self.file = file
        self.ended: dict[int, BaseException | None] = {}
        self.threads: list[threading.Thread] = []

    def queue(
        self,
        steps: list[Callable[[], Steps[Any]]],
        *,
        meanwhile: Any = None,
        leading: bool = False,
    ) -> None:
        """``leading``: the first is already in its transaction while the others come."""
        turn = self.file.turn()
        if not leading:
            turn.acquire(10)
        writer = self.file._writer
        for make_steps in steps:
            number = len(self.threads)
            thread = threading.Thread(target=self.call, args=(number, make_steps), daemon=True)
            self.threads.append(thread)
            thread.start()
            queued = number + 1 - leading
            eventually(lambda: len(writer._queue) == queued and writer._led, "it queues")  # noqa: B023
        if meanwhile is not None:
            meanwhile()
        turn.close()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive(), "everybody is woken"

    def call(self, number: int, make_steps: Callable[[], Steps[Any]]) -> None:
        try:
            self.file.write(make_steps)
            self.ended[number] = None
        except BaseException as error:
            self.ended[number] = error


def puts() -> list[Callable[[], Steps[Any]]]:
    return [put(str(n)) for n in range(MANY)]


def all_but(*numbers: int) -> set[str]:
    return {str(n) for n in range(MANY)} - {str(n) for n in numbers}


def test_everybody_at_a_gate_is_woken_and_it_is_used_again(
    file: DatabaseFile, monkeypatch: pytest.MonkeyPatch
):
    made: list[Gate] = []
    real = Gate.made

    def make() -> Gate:
        made.append(real())
        return made[-1]

    monkeypatch.setattr(Gate, "made", make)
    for _ in range(5):
        Callers(file).queue(puts())
    assert len(made) == 1
    assert file._writer._gates == made


def test_gates_are_gone_when_the_file_is_closed(db_path: Path):
    file = DatabaseFile.open(db_path)
    Callers(file).queue(puts())
    [gate] = file._writer._gates
    ends = gate._read, gate._write
    del gate
    file.close()
    for end in ends:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(end)


def test_without_descriptors_everybody_waits_alone(
    file: DatabaseFile, monkeypatch: pytest.MonkeyPatch
):
    def refuse() -> Gate:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Gate, "made", refuse)
    Callers(file).queue(puts())
    assert stored(file) == all_but()
    assert file.stats.commits == 1


@pytest.mark.parametrize("bad", [LED, NEXT, OPENER, FIRST_AT_THE_GATE, MANY - 1])
def test_one_failure_among_those_at_a_gate_is_its_callers(file: DatabaseFile, bad: int):
    def failing() -> Steps[None]:
        yield Ask("outbox_first", (1,))
        raise LookupError("mine")

    callers, steps = Callers(file), puts()
    steps[bad] = failing
    callers.queue(steps)
    assert {n for n, error in callers.ended.items() if error is not None} == {bad}
    assert stored(file) == all_but(bad)


def test_those_at_a_gate_whose_group_was_cut_short_are_stored_later(
    file: DatabaseFile, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("duly.sql.sqlite.writer._GROUP_S", -1.0)
    callers = Callers(file)
    callers.queue(puts())
    assert stored(file) == all_but()
    assert file.stats.commits == MANY


class Interrupted:
    """A lock on which somebody waits until a signal interrupts it."""

    def __init__(self) -> None:
        self.now = threading.Event()

    def acquire(self) -> None:
        self.now.wait(10)
        raise KeyboardInterrupt

    def release(self) -> None:
        pass


@pytest.mark.parametrize("who", [(NEXT,), (OPENER,), (NEXT, OPENER)])
@pytest.mark.parametrize("later", [0, 5])
@pytest.mark.parametrize("leading", [False, True])
def test_who_is_interrupted_passes_on_what_it_was_to_do(
    file: DatabaseFile,
    monkeypatch: pytest.MonkeyPatch,
    who: tuple[int, ...],
    later: int,
    leading: bool,
):
    go = threading.Event()

    def slow() -> Steps[Any]:
        go.wait(10)
        return (yield from put("0")())

    locks: dict[int, Interrupted] = {}
    waits = [0]
    real = _Write.will_wait_alone

    def will_wait_alone(write: _Write[Any]) -> Any:
        waits[0] += 1
        if waits[0] in who:
            write.woken = locks[waits[0]] = Interrupted()  # type: ignore[assignment]
            return write.woken
        return real(write)

    monkeypatch.setattr(_Write, "will_wait_alone", will_wait_alone)
    callers = Callers(file)

    def interrupt() -> None:
        for number in who:
            locks[number].now.set()
            eventually(lambda: number in callers.ended, "it has left")  # noqa: B023
        for number in range(MANY, MANY + later):
            thread = threading.Thread(
                target=callers.call, args=(number, put(str(number))), daemon=True
            )
            callers.threads.append(thread)
            thread.start()
        queued = MANY + later - len(who) - leading
        eventually(lambda: len(file._writer._queue) == queued, "the later ones queue")
        go.set()

    steps = puts()
    if leading:  # the first runs its own, and the next is to lead the others
        steps[LED] = slow
    callers.queue(steps, meanwhile=interrupt, leading=leading)
    assert {n for n, error in callers.ended.items() if error is not None} == {*who}
    assert stored(file) == all_but(*who) | {str(n) for n in range(MANY, MANY + later)}


def test_whose_group_is_just_stored_may_leave_and_those_at_its_gate_are_woken(
    file: DatabaseFile, monkeypatch: pytest.MonkeyPatch
):
    locks: list[Any] = []
    real = _Write.will_wait_alone

    def will_wait_alone(write: _Write[Any]) -> Any:
        if len(locks) + 1 == OPENER:
            write.woken = Interrupted()  # type: ignore[assignment]
            locks.append(write.woken)
        else:
            locks.append(real(write))
        return locks[-1]

    monkeypatch.setattr(_Write, "will_wait_alone", will_wait_alone)

    def slow() -> Steps[Any]:
        locks[OPENER - 1].now.set()
        eventually(lambda: OPENER in callers.ended, "the opener has left")
        return (yield from put("0")())

    callers, steps = Callers(file), puts()
    steps[LED] = slow
    callers.queue(steps)
    assert isinstance(callers.ended[OPENER], KeyboardInterrupt)
    assert stored(file) == all_but()


def test_who_comes_while_the_opener_waits_to_lead_waits_alone(
    file: DatabaseFile, monkeypatch: pytest.MonkeyPatch
):
    locks: list[Any] = []
    real = _Write.will_wait_alone

    def will_wait_alone(write: _Write[Any]) -> Any:
        if len(locks) + 1 == NEXT:
            write.woken = Interrupted()  # type: ignore[assignment]
            locks.append(write.woken)
        else:
            locks.append(real(write))
        return locks[-1]

    monkeypatch.setattr(_Write, "will_wait_alone", will_wait_alone)
    go, turn, callers = threading.Event(), file.turn(), Callers(file)
    taking = threading.Thread(target=turn.acquire, args=(10,))

    def slow() -> Steps[Any]:
        go.wait(10)
        return (yield from put("0")())

    def come_later() -> None:
        locks[NEXT - 1].now.set()
        eventually(lambda: NEXT in callers.ended, "the next leader has left")
        taking.start()
        eventually(lambda: turn._pending, "it is next to have the turn")
        go.set()
        taking.join()
        eventually(lambda: file._writer._queue[0].leads, "the opener is to lead")
        for number in range(MANY, MANY + 5):
            args = number, put(str(number))
            callers.threads.append(threading.Thread(target=callers.call, args=args, daemon=True))
            callers.threads[-1].start()
            queued = number - MANY + 2
            eventually(lambda: len(file._writer._queue) == queued, "it queues")  # noqa: B023
        turn.release()

    steps = [slow, *puts()[1:3]]
    callers.queue(steps, meanwhile=come_later, leading=True)
    turn.close()
    assert stored(file) == {"0", "2"} | {str(n) for n in range(MANY, MANY + 5)}


def test_a_gate_that_was_broken_open_is_not_shut_again():
    gate = Gate.made()
    gate.join()
    gate.open()
    assert gate.wait()
    gate.shut()
    gate.join()
    gate.break_open()
    assert not gate.wait()


def test_a_gate_that_is_broken_open_by_many_blocks_nobody():
    """Of who finds it closed each breaks it open: by as many as this the pipe would be full."""
    gate = Gate.made()
    for _ in range(1000):
        gate.join()
    broken = threading.Event()

    def break_open() -> None:
        for _ in range(1000):
            gate.break_open()
        broken.set()

    threading.Thread(target=break_open, daemon=True).start()
    assert broken.wait(10)
    assert not any(gate.wait() for _ in range(1000))
