"""Histories made by hand, one verb for each thing that happens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from duly.guarantees import Admission, Guarantee
from duly.testing.checker import Judgement, Terms, judge
from duly.testing.history import (
    About,
    Admit,
    Claim,
    Commit,
    Dead,
    Effect,
    End,
    Event,
    Fault,
    Final,
    Output,
    Publish,
    Read,
    Reported,
    Row,
    Settle,
    Start,
    Waiting,
)

AMO = Terms(Guarantee.AT_MOST_ONCE)
ALO = Terms(Guarantee.AT_LEAST_ONCE)
EXACT = Terms(
    Guarantee.EXACTLY_ONCE,
    admission=Admission.BY_CLAIM,
    drops_repeats=True,
    tables=("one", "two"),
    has_output=True,
)


def message(id: str, *, topic: str = "t", key: str | None = None, content: str = "x") -> About:
    return About(topic, "app", id, key, content, 1000)


class Story:
    """A history under some terms; ``read`` ends it with what the resources say."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.events: list[Event] = []
        self.runs: dict[str, About] = {}
        self._numbers = itertools.count(1)
        self._log: list[About] = []
        self._rows: list[Row] = []
        self._outputs: list[Output] = []
        self._dead: list[Dead] = []
        # Whether every subscription has the messages in the log's order.
        self.one_order = True

    def add(self, kind: Any, who: str, *args: Any, **more: Any) -> None:
        self.events.append(kind(float(len(self.events)), who, *args, **more))

    def publish(
        self,
        *messages: About,
        who: str = "p",
        end: str = "ok",
        stored: bool | None = None,
        tx: str = "",
    ) -> None:
        for each in messages:
            self.add(Publish, who, "invoke", each, tx)
            if end and not tx:
                self.add(Publish, who, end, each, tx)
            if stored if stored is not None else end == "ok":
                self._log.append(each)

    def ask(self, who: str = "w") -> None:
        """A claim is made, and what comes of it is told later."""
        self.add(Claim, who, "invoke", "c")

    def claim(self, message: About, token: str, who: str = "w", **more: Any) -> None:
        self.add(Claim, who, "ok", "c", token, message, **more)

    def run(
        self,
        message: About,
        token: str,
        *,
        how: str = "returned",
        who: str = "w",
        tx: str = "",
        attempt: int = 1,
    ) -> str:
        run = self.start(message, token, who=who, tx=tx, attempt=attempt)
        self.add(End, who, run, how)
        return run

    def start(
        self, message: About, token: str, *, who: str = "w", tx: str = "", attempt: int = 1
    ) -> str:
        run = f"run{next(self._numbers)}"
        self.runs[run] = message
        self.add(Start, who, "c", token, message, run, attempt, tx)
        return run

    def end(self, run: str, how: str = "returned", who: str = "w") -> None:
        self.add(End, who, run, how)

    def settle(
        self,
        token: str,
        kind: str = "done",
        *,
        end: str = "ok",
        who: str = "w",
        tx: str = "",
        refused: bool = False,
    ) -> None:
        self.add(Settle, who, "invoke", "c", token, kind, tx)
        if end and not tx:
            self.add(Settle, who, end, "c", token, kind, tx, refused)

    def admit(self, tx: str, *fresh: str, who: str = "w") -> None:
        self.add(Admit, who, tx, "c", str(self.terms.admission), fresh)

    def commit(self, tx: str, end: str = "ok", who: str = "w") -> None:
        self.add(Commit, who, "invoke", tx)
        if end:
            self.add(Commit, who, end, tx)

    def fault(self, kind: str, who: str = "w", point: str = "") -> None:
        self.add(Fault, who, kind, point)

    def effect(self, run: str, what: str = "call") -> None:
        self.add(Effect, "w", run, self.runs[run], what)

    def reported(self, message: About, times: int, what: str = "call") -> None:
        self.add(Reported, "v", message, times, what)

    # --- whole passages

    def handled(self, message: About, token: str, **more: Any) -> str:
        """Claimed, run and settled, as the terms want it."""
        self.claim(message, token)
        match self.terms.guarantee:
            case Guarantee.AT_MOST_ONCE:
                self.settle(token)
                return self.run(message, token, **more)
            case Guarantee.AT_LEAST_ONCE:
                run = self.run(message, token, **more)
                self.settle(token)
                return run
            case Guarantee.EXACTLY_ONCE:
                return self.transaction(message, token, f"tx-{token}")

    def transaction(
        self, message: About, token: str, tx: str, end: str = "ok", who: str = "w"
    ) -> str:
        """Admitted, run, settled and committed, with all its effects."""
        self.admit(tx, token, who=who)
        run = self.run(message, token, tx=tx, who=who)
        self.publish_output(run, tx, who)
        self.settle(token, tx=tx, who=who)
        self.commit(tx, end, who)
        if end == "ok":
            self.there(message, run)
        return run

    def publish_output(self, run: str, tx: str, who: str = "w") -> None:
        self.add(Publish, who, "invoke", output_of(run), tx)

    # --- what the resources say

    def there(
        self,
        message: About,
        run: str,
        *,
        tables: Sequence[str] = ("one", "two"),
        output: bool = True,
    ) -> None:
        self._rows += [Row(table, message, run) for table in tables]
        if output:
            self._outputs.append(Output(output_of(run), run))
            self._log.append(output_of(run))

    def in_log(self, *messages: About) -> None:
        self._log += messages

    def not_in_log(self, message: About) -> None:
        self._log.remove(message)

    def dead(self, message: About) -> None:
        self._dead.append(Dead("c", message))

    def read(self, *, waiting: Sequence[Waiting] = (), leaks: Sequence[str] = ()) -> None:
        final = Final(
            tuple(self._log),
            tuple(self._rows),
            tuple(self._outputs),
            tuple(self._dead),
            tuple(waiting),
            tuple(leaks),
            one_order=self.one_order,
        )
        self.add(Read, "reader", final)

    def judged(self, **read: Any) -> Judgement:
        self.read(**read)
        return judge(self.events, self.terms)


def output_of(run: str) -> About:
    return message(f"out-{run}", topic="outputs")
