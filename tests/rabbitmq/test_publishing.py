"""Many callers that write and read for themselves, while the connection is cut, hangs or closes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from amqp.transport import TCPTransport

from duly.broker import Outcome, Published
from duly.brokers.rabbitmq import RabbitMQBroker, turn
from duly.brokers.rabbitmq import publisher as publishing
from duly.errors import BrokerUnavailable, PublishFailed, PublishUnknown
from duly.testing.chaos.link import Cut, Frames, Link
from tests.postgres.proxy import Proxy
from tests.rabbitmq.work import broker_at, lane_of, message, publish, work_off
from tests.servers.postgres import free_port, named_after
from tests.servers.rabbitmq import RabbitMQNode, in_namespace
from tests.waiting import eventually

CALLERS = 12
# Who waits for that has missed what it waited for.
LONG_S = 600.0


@pytest.fixture
def url(rabbit_node: RabbitMQNode, request: pytest.FixtureRequest) -> str:
    return in_namespace(named_after(request.node.name), rabbit_node.url)


@pytest.fixture
def proxy(rabbit_node: RabbitMQNode) -> Iterator[Proxy]:
    with Proxy(rabbit_node.port) as proxy:
        yield proxy


class Callers:
    """Threads that publish, each on its own; what became of it, by caller and in order."""

    def __init__(self, call: Callable[[int], Iterator[tuple[str, Outcome]]]) -> None:
        self.outcomes: list[list[tuple[str, Outcome]]] = [[] for _ in range(CALLERS)]
        self._call = call
        self._threads = [
            threading.Thread(target=self._run, args=(number,)) for number in range(CALLERS)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        for told in self._call(number):
            self.outcomes[number].append(told)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a caller hangs"

    def ended(self, kind: type[Any]) -> set[str]:
        return {id for told in self.outcomes for id, each in told if isinstance(each, kind)}


def each_once(broker: RabbitMQBroker) -> Callable[[int], Iterator[tuple[str, Outcome]]]:
    def call(number: int) -> Iterator[tuple[str, Outcome]]:
        yield str(number), broker.publish([message(str(number), id=str(number))])[0]

    return call


@pytest.mark.parametrize("cut", ["before publish", "after publish"])
def test_cut_among_many_callers_each_is_told_as_it_is(
    rabbit_node: RabbitMQNode, url: str, cut: Cut
):
    """And what one of them published in turn comes in turn."""
    cuts: list[Cut] = []
    link = Link("127.0.0.1", rabbit_node.port, cuts.append, Frames)
    try:
        through = url.replace(f":{rabbit_node.port}/", f":{link.port}/")
        with broker_at(url) as consuming, broker_at(through, deadline_s=20.0) as broker:
            done = threading.Event()

            def call(number: int) -> Iterator[tuple[str, Outcome]]:
                turn = 0
                while not done.is_set():
                    ids = [f"{number}:{turn + n}" for n in range(1 + number % 3)]
                    turn += len(ids)
                    yield from zip(
                        ids, broker.publish([message(i, id=i) for i in ids]), strict=True
                    )

            callers = Callers(call)
            for times in range(1, 4):
                link.cut(cut)
                eventually(partial(lambda n: len(cuts) == n, times), "it was cut")
                enough = len(callers.ended(Published)) + 3 * CALLERS
                eventually(
                    partial(lambda n: len(callers.ended(Published)) > n, enough), "they go on"
                )
            done.set()
            callers.join()
            published = callers.ended(Published)
            assert callers.ended(PublishUnknown), "nobody was in doubt"
            handled = work_off(lane_of(consuming), published.issubset, 500)
    finally:
        link.close()
    failed = callers.ended(PublishFailed)
    assert not failed & set(handled)
    for number in range(CALLERS):
        turns = [int(id.partition(":")[2]) for id in handled if id.startswith(f"{number}:")]
        assert turns == sorted(set(turns)), "out of turn, or twice"


def test_lost_while_many_wait_each_is_in_doubt(proxy: Proxy, url: str):
    with broker_at(proxy.url(url), deadline_s=LONG_S) as broker:
        publish(broker, "before")
        proxy.mute(to_server=False)
        callers = Callers(each_once(broker))
        eventually(lambda: len(broker._publisher._unconfirmed) == CALLERS, "all of it is sent")
        for link in (broker._publisher.link, broker.link):
            link.cut()
        callers.join()
        assert callers.ended(PublishUnknown) == {str(number) for number in range(CALLERS)}
        publish(broker, "after")
        assert not broker._publisher._unconfirmed


def test_closed_while_many_wait_each_is_told(proxy: Proxy, url: str):
    with broker_at(proxy.url(url), deadline_s=LONG_S) as broker:
        publish(broker, "before")
        proxy.stall(to_client=True)
        callers = Callers(each_once(broker))
        eventually(lambda: len(broker._publisher._unconfirmed) == CALLERS, "all of it is sent")
        closing = threading.Thread(target=broker.close)
        closing.start()
        eventually(lambda: broker.link._closing, "it is being closed")
        proxy.go_on()
        closing.join(30)
        callers.join()
    told = callers.ended(Published) | callers.ended(PublishUnknown)
    assert told == {str(number) for number in range(CALLERS)}


def test_while_the_network_takes_nothing_nobody_hangs(proxy: Proxy, url: str):
    """More than all buffers on the way hold; each caller would write it itself."""
    with broker_at(proxy.url(url), deadline_s=0.5) as broker:
        lane = lane_of(broker)
        publish(broker, "before")
        proxy.stall(to_server=True)
        body = "x" * 500_000

        def call(number: int) -> Iterator[tuple[str, Outcome]]:
            for part in range(4):
                id = f"{number}:{part}"
                yield id, broker.publish([message(body, id=id)])[0]

        callers = Callers(call)
        callers.join()
        assert not callers.ended(Published)
        assert callers.ended(PublishFailed), "what was not even sent is not in doubt"
        proxy.go_on()
        eventually(
            lambda: isinstance(broker.publish([message("after", id="after")])[0], Published),
            "publishing goes on",
        )
        assert "after" in work_off(lane, {"after"}.issubset)


@pytest.mark.parametrize("where", ["_take_confirmations", "_next"])
def test_interrupted_half_way_the_connection_ends_and_others_are_told(
    url: str, monkeypatch: pytest.MonkeyPatch, where: str
):
    """By Ctrl-C: what was read or numbered just then, nobody knows."""
    with broker_at(url, deadline_s=LONG_S) as broker:
        publish(broker, "before")
        publisher = broker._publisher
        of: Any = publisher if where == "_next" else publisher.link
        do = getattr(of, where)
        interrupted = threading.Event()

        def then(*args: Any) -> Any:
            result = do(*args)
            if not interrupted.is_set() and threading.current_thread().name == "interrupted":
                interrupted.set()
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(of, where, then)
        raised: list[BaseException] = []

        def call() -> None:
            try:
                while not interrupted.is_set():
                    broker.publish([message("one", id="one")])
            except KeyboardInterrupt as error:
                raised.append(error)

        caller = threading.Thread(target=call, name="interrupted")
        caller.start()
        callers = Callers(each_once(broker))
        caller.join(60)
        callers.join()
        assert len(raised) == 1
        told = callers.ended(Published) | callers.ended(PublishUnknown)
        assert told == {str(number) for number in range(CALLERS)}, callers.outcomes
        eventually(
            lambda: isinstance(broker.publish([message("after", id="after")])[0], Published),
            "publishing goes on",
        )
        assert not publisher._unconfirmed


def test_published_while_the_links_thread_writes_is_sent_all_the_same(
    url: str, monkeypatch: pytest.MonkeyPatch
):
    """A heartbeat, and written to the end just when the caller has seen that it is not."""
    with broker_at(url, deadline_s=LONG_S) as broker:
        publish(broker, "before")
        publisher = broker._publisher
        writes, seen, written = threading.Event(), threading.Event(), threading.Event()
        write, send_some = TCPTransport.write, publisher._send_some

        def slowly(transport: Any, some: Any) -> None:
            if threading.current_thread() is publisher.link._thread and not seen.is_set():
                writes.set()
                assert seen.wait(30)
            write(transport, some)

        def beat(connection: Any) -> None:
            connection.send_heartbeat()
            written.set()

        def seeing() -> bool:
            sent = send_some()
            if threading.current_thread() is not publisher.link._thread:
                seen.set()
                assert written.wait(30)
            return sent

        monkeypatch.setattr(TCPTransport, "write", slowly)
        monkeypatch.setattr(publisher, "_send_some", seeing)
        publisher.link.post(beat)
        assert writes.wait(30)
        callers = Callers(lambda number: each_once(broker)(number) if number == 0 else iter(()))
        callers.join()
        assert callers.ended(Published) == {"0"}


def test_what_a_caller_reads_too_late_confirms_nothing_of_the_next_connection(
    proxy: Proxy, url: str, monkeypatch: pytest.MonkeyPatch
):
    """It was stopped while it read, for so long that the link's thread went on without it. Channels
    and tags of the next connection begin with the same numbers.
    """
    with broker_at(proxy.url(url), deadline_s=LONG_S) as broker:
        publisher = broker._publisher
        link = publisher.link
        read, goes_on = threading.Event(), threading.Event()
        take = link._take_confirmations

        def slowly(connection: Any, transport: Any) -> bool:
            at_hand = len(transport._held) > transport._at
            if threading.current_thread().name == "stopped" and at_hand:
                read.set()
                assert goes_on.wait(60)
            return take(connection, transport)

        monkeypatch.setattr(link, "_take_confirmations", slowly)
        outcomes: dict[str, Outcome | BaseException] = {}

        def call(id: str) -> None:
            try:
                outcomes[id] = broker.publish([message(id, id=id)])[0]
            except Exception as error:
                outcomes[id] = error

        def until_it_reads() -> None:
            while not read.is_set():  # the link's thread may be the quicker
                call("first")

        first = threading.Thread(target=until_it_reads, name="stopped")
        first.start()
        assert read.wait(30)
        monkeypatch.setattr(turn, "_KEPT_S", 0.05)
        before = publisher._way
        link.post(lambda _: None)
        eventually(lambda: publisher._way not in (None, before), "it has another connection")
        proxy.stall(to_client=True)
        second = threading.Thread(target=call, args=("second",))
        second.start()
        eventually(lambda: len(publisher._unconfirmed) == 1, "the next is sent")
        goes_on.set()
        first.join(30)
        assert isinstance(outcomes["first"], PublishUnknown)
        assert len(publisher._unconfirmed) == 1, "nothing was confirmed"
        proxy.go_on()
        second.join(30)
        assert isinstance(outcomes["second"], Published)
        assert link.is_up
        assert publisher._way is not before


def test_a_forked_child_publishes_nothing_by_its_parents_connection(url: str):
    """The parent would take a confirmation of the child's for one of its own."""
    with broker_at(url, deadline_s=LONG_S) as broker:
        publish(broker, "before")
        if (child := os.fork()) == 0:
            try:
                broker.publish([message("child", id="child")])
            except BrokerUnavailable as error:
                os._exit(0 if "forked" in str(error) else 2)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        publish(broker, "after")
        handled = work_off(lane_of(broker), {"before", "after"}.issubset)
        assert "child" not in handled


def test_more_than_the_window_is_sent_in_turn(url: str, monkeypatch: pytest.MonkeyPatch):
    """The rest by whoever reads what makes room for it."""
    monkeypatch.setattr(publishing, "_WINDOW", 7)
    with broker_at(url) as broker:
        bodies: Sequence[str] = [str(number) for number in range(200)]
        publish(broker, *bodies)
        assert work_off(lane_of(broker), set(bodies).issubset, 500) == bodies


def test_what_is_closed_or_never_came_up_leaves_no_file_open(rabbit_node: RabbitMQNode, url: str):
    def files() -> int:
        return len(list(Path("/dev/fd").iterdir()))

    nowhere = url.replace(f":{rabbit_node.port}/", f":{free_port()}/")
    before = None
    for _ in range(3):
        with broker_at(url) as broker:
            publish(broker, "a")
            broker._publisher.link.cut()
        with pytest.raises(BrokerUnavailable):
            RabbitMQBroker(nowhere)
        # What the first of all opens and keeps is not looked at.
        before = before or files()
    assert files() == before


def test_what_is_never_answered_keeps_no_place_from_others(
    url: str, monkeypatch: pytest.MonkeyPatch
):
    """As by a queue that has lost its majority."""
    monkeypatch.setattr(publishing, "_WINDOW", 3)
    answered = publishing.Publisher._answered
    silent = True

    def hear(self: publishing.Publisher, *args: Any) -> None:
        if not silent:
            answered(self, *args)

    monkeypatch.setattr(publishing.Publisher, "_answered", hear)
    with broker_at(url, deadline_s=1.0) as broker:
        lane = lane_of(broker)
        outcomes = broker.publish([message(f"{n}", id=f"{n}") for n in range(3)])
        assert [type(each) for each in outcomes] == [PublishUnknown] * 3
        silent = False
        publish(broker, "next")
        assert {"next"} <= set(work_off(lane, {"next"}.issubset))
