"""Many callers that write and read for themselves, while the connection is cut, hangs or closes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from duly.broker import Outcome, Published
from duly.brokers.rabbitmq import RabbitMQBroker
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
