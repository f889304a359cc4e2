"""Which faults are counted as hits, in what order claims stand, and what a run is worth."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from duly.guarantees import Done
from duly.testing.chaos import verdict
from duly.testing.chaos.node import Node
from duly.testing.chaos.report import reasons, verdict_of
from duly.testing.chaos.server import Server
from duly.testing.chaos.setup import ON_A_NODE, Setup
from duly.testing.chaos.verdict import Tally, in_token_order, judged
from duly.testing.chaos.workload import SPECS
from duly.testing.checker import Anomaly
from duly.testing.history import About, Claim, Event, Fault, Publish, Settle
from duly.testing.recording import message_by_message

FAULTS = Setup().profile()


class Story:
    """A history, told event by event."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._at = itertools.count(1.0)

    def tell(self, who: str, make: Any, *args: Any, **more: Any) -> None:
        self.events.append(make(next(self._at), who, *args, **more))

    def claims(self, who: str, token: int | str, message: str) -> None:
        about = About("inputs", "chaos", message)
        receipt = f"({token}, 1)" if isinstance(token, int) else token
        self.tell(who, Claim, "ok", "least", receipt, about)

    def settles(self, who: str, token: int) -> None:
        self.tell(who, Settle, "ok", "least", f"({token}, 1)", "done")

    def hits(self) -> dict[str, int]:
        tally = Tally()
        verdict.hits_of(tally, self.events)
        return dict(tally.hits)


def test_a_kill_hits_in_the_middle_of_work():
    story = Story()
    story.claims("w1.1", 1, "a")
    story.settles("w1.1", 1)
    story.tell("w1.1", Fault, "crash", "killed")
    assert story.hits() == {}
    story.claims("w1.2", 2, "b")
    story.tell("w1.2", Fault, "crash", "killed")
    story.tell("p1.1", Fault, "crash", "killed")
    story.tell("p2.1", Publish, "invoke", About("inputs", "chaos", "c"))
    story.tell("p2.1", Fault, "crash", "killed")
    assert story.hits() == {"kill worker": 1, "kill publisher": 1}


def test_a_pause_hits_when_another_is_given_what_the_stopped_one_holds():
    story = Story()
    story.claims("w1.1", 1, "a")
    story.tell("w1.1", Fault, "stop", "SIGSTOP")
    story.tell("w1.1", Fault, "go on", "SIGCONT")
    story.claims("w2.1", 2, "a")
    assert story.hits() == {}
    story.tell("w2.1", Fault, "stop", "SIGSTOP")
    story.claims("w3.1", 3, "b")
    assert story.hits() == {}
    story.claims("w3.1", 4, "a")
    assert story.hits() == {"pause": 1}


def test_a_full_disk_hits_when_something_fails_on_it():
    story = Story()
    for phase in ("ok", "fail"):
        story.tell("world", Fault, "fill", "")
        story.tell("p1.1", Publish, phase, About("inputs", "chaos", phase))
        story.tell("world", Fault, "room", "")
    assert story.hits() == {"full disk": 1}


@pytest.mark.parametrize(
    ("what", "kinds"),
    [("server", ("kill server", "immediate shutdown")), ("node", ("kill node", "stop node"))],
)
def test_a_server_that_is_down_hits_when_something_fails_meanwhile(what: str, kinds: Any):
    story = Story()
    for kind, phase in zip(kinds, ("info", "ok"), strict=True):
        story.tell("world", Fault, f"{what} down", kind)
        story.tell("p1.1", Publish, phase, About("inputs", "chaos", kind))
        story.tell("world", Fault, f"{what} up", kind)
    assert story.hits() == {kinds[0]: 1}


def test_an_alarm_hits_when_somebody_waits_for_its_end():
    story = Story()
    message = About("inputs", "chaos", "a")
    for kind in ("memory alarm", "disk alarm"):
        story.tell("world", Fault, "alarm", kind)
        story.tell("p1.1", Publish, "invoke", message)
        if kind == "disk alarm":
            story.tell("p1.1", Publish, "ok", message)
        # In a transaction nobody waits for the broker.
        story.tell("p1.1", Publish, "invoke", message, "tx")
        story.tell("world", Fault, "alarm over", kind)
        story.tell("p1.1", Publish, "ok", message)
    story.tell("world", Fault, "alarm", "memory alarm")
    story.tell("p1.1", Publish, "invoke", message)
    story.tell("p1.1", Fault, "crash", "killed")
    story.tell("world", Fault, "alarm over", "memory alarm")
    assert story.hits() == {"memory alarm": 1, "kill publisher": 1}


def test_a_session_that_did_nothing_is_no_loss_and_a_cut_always_hits():
    story = Story()
    for state in ("idle", "active", "idle in transaction"):
        story.tell("world", Fault, "end session", state)
    story.tell("world", Fault, "cut after COMMIT", "link")
    assert story.hits() == {"end session": 2, "cut after COMMIT": 1}


def test_what_a_server_ended_is_counted_by_its_log(tmp_path: Path):
    (tmp_path / "histories").mkdir()
    for spec in SPECS:
        (tmp_path / "read" / spec.name).mkdir(parents=True)
    line = "2026-01-01 [1] duly-chaos ERROR:  canceling statement due to {} timeout\n"
    told = line.format("lock") * 2 + line.format("statement")
    (tmp_path / "server.log").write_text(told)
    hits = judged(tmp_path).hits
    assert hits == {"lock timeout": 2, "statement timeout": 1}


def test_a_setup_has_the_faults_that_its_places_can_have():
    on_files, on_a_server = Setup(), Setup("postgres", "postgres", _Named())
    assert "full disk" in on_files.profile()
    assert "cut after COMMIT" not in on_files.profile()
    assert "full disk" not in on_a_server.profile()
    assert {"cut after COMMIT", "end session"} <= {*on_a_server.profile()}
    assert "kill server" not in on_a_server.profile(), "it is somebody else's"
    assert "cut after COMMIT" not in on_a_server.profile(["cut after COMMIT"])


def test_a_setup_with_a_node_has_its_faults_and_no_others():
    node = Setup("rabbitmq", "sqlite", node=_Nowhere())
    of_others = {*ON_A_NODE} - Node.strikes
    assert {*Node.strikes, "full disk", "kill worker"} <= {*node.profile()}
    assert of_others
    assert not of_others & {*node.profile()}
    assert "cut after COMMIT" not in node.profile()
    assert not {*ON_A_NODE} & {*Setup().profile()}
    assert str(node) == "messages in rabbitmq, effects in sqlite"
    assert node.pause_s > Setup().pause_s, "the node hears nothing for as long as it waits"
    assert node.locked_apart == 1.0, "nobody locks the node"


class _Nowhere(Node):
    """A node that does not run."""

    def __init__(self) -> None:
        pass


class _Named(Server):
    """A server that is not a private one; nobody connects to it."""

    def __init__(self) -> None:
        self._private = None


def test_a_claim_that_is_recorded_late_stands_where_its_token_was_given_out():
    story = Story()
    story.claims("w2.1", 2, "a")
    story.settles("w2.1", 2)
    story.claims("w1.1", 1, "a")
    ordered = in_token_order(story.events)
    assert [getattr(event, "token", "") for event in ordered] == ["(2, 1)", "(1, 1)", "(2, 1)"]
    assert [event.at for event in ordered] == [1.0, 1.0, 2.0]
    assert in_token_order(ordered) == ordered


def test_claims_whose_tokens_each_process_counts_stand_where_they_are():
    story = Story()
    story.claims("w2.1", "Receipt(intake=1, generation=1, token=2)", "a")
    story.claims("w1.1", "Receipt(intake=1, generation=1, token=1)", "a")
    assert in_token_order(story.events) == story.events


def test_a_span_is_settled_message_by_message():
    given = [Done((7, 3, 5)), Done((8, 1))]
    assert message_by_message(given) == [Done((7, n)) for n in (3, 4, 5)] + [Done((8, 1))]


def test_a_run_is_worth_what_it_shows():
    tally = Tally(rounds=2)
    tally.hits.update(dict.fromkeys(FAULTS, 1))
    tally.unknown["least: no claim ever succeeded"] = 1
    assert verdict_of(tally, FAULTS) == "valid", "it did in the other round"
    tally.unknown["least: no claim ever succeeded"] = 2
    assert verdict_of(tally, FAULTS) == "unknown"
    tally.unknown.clear()
    del tally.hits["pause"]
    assert verdict_of(tally, FAULTS) == "unknown"
    assert list(reasons(tally, FAULTS)) == ["the fault 'pause' never hit"]
    tally.anomalies.append(("round-0", "least", Anomaly("lost", "a")))
    assert verdict_of(tally, FAULTS) == "invalid"
    broken = Tally(complaints=["a worker ended with 3"])
    assert verdict_of(broken, FAULTS) == "invalid"
