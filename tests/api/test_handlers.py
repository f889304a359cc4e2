"""What a handler may look like, and what is said of one that may not."""

from __future__ import annotations

import contextlib
import functools
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NewType, Protocol

import pytest

import duly
from duly.consumer import Handler

if typing.TYPE_CHECKING:
    from duly.broker import Delivery as Elsewhere


@dataclass
class Ride:
    ride: str


@dataclass
class NightRide(Ride):
    lamp: bool = True


@dataclass
class Checkout:
    order: str


class Db: ...


RideAlias = Annotated[Ride, "a note"]
RideId = NewType("RideId", Ride)

rides = duly.Topic("rides", Ride, guarantee="at-least-once")
checkouts = duly.Topic("checkouts", Checkout, guarantee="exactly-once")
numbers = duly.Topic("numbers", int, guarantee="at-least-once")
objects = duly.Topic("objects", dict[str, Any], guarantee="at-least-once")
open_ended = duly.Topic("open", Any, guarantee="at-least-once")


def session() -> Iterator[Db]:
    yield Db()


async def asession() -> Db:
    return Db()


def declare(
    function: Any, topic: Any = rides, *, guarantee: Any = "at-least-once", batch: bool = False
) -> Handler:
    """The handler as the app keeps it."""
    app = duly.App("test")
    decorate: Any = app.batch_consumer if batch else app.consumer
    assert decorate(topic, name="c", guarantee=guarantee)(function) is function
    (consumer,) = app.consumers
    assert consumer.handler.function is function
    return consumer.handler


def refused(function: Any, topic: Any = rides, **how: Any) -> str:
    with pytest.raises(duly.ConfigurationError) as error:
        declare(function, topic, **how)
    assert "consumer 'c'" in str(error.value)
    return str(error.value)


class TestRight:
    def test_a_payload(self):
        def handle(ride: Ride) -> None: ...

        assert declare(handle) == Handler(handle, False, False, False, False, {})

    def test_a_message_async(self):
        async def handle(ride: duly.Message[Ride]) -> None: ...

        assert declare(handle) == Handler(handle, True, False, True, False, {})

    def test_a_transaction(self):
        def handle(order: duly.Message[Any], tx: duly.Transaction[Any]) -> None: ...

        handler = declare(handle, checkouts, guarantee="exactly-once")
        assert (handler.wants_message, handler.wants_tx) == (True, True)

    def test_batches(self):
        def payloads(rides: list[Ride]) -> None: ...
        def messages(rides: Sequence[duly.Message[Ride]]) -> None: ...
        def bare(rides) -> None: ...

        assert not declare(payloads, batch=True).wants_message
        assert declare(messages, batch=True).wants_message
        assert declare(bare, batch=True).is_batch

    def test_dependencies_are_found(self):
        def handle(ride: Ride, *, db: Db = duly.use(session), copies: int = 2) -> None: ...

        assert list(declare(handle).uses) == ["db"]

    @pytest.mark.parametrize(
        "annotation",
        [Ride, object, Any, RideAlias, RideId, "Ride", Ride | Checkout, "Elsewhere", "nonsense("],
    )
    def test_annotations_that_may_be_right(self, annotation):
        def handle(ride): ...

        handle.__annotations__["ride"] = annotation
        assert not declare(handle).wants_message

    @pytest.mark.parametrize(
        "annotation",
        ["Message[Elsewhere]", "duly.Message[Elsewhere]", "Message", "'duly.Message[Elsewhere]'"],
    )
    def test_a_message_whose_type_cannot_be_resolved(self, annotation):
        def handle(ride): ...

        handle.__annotations__["ride"] = annotation
        assert declare(handle).wants_message

    def test_a_list_of_messages_whose_type_cannot_be_resolved(self):
        def handle(rides: list[duly.Message[Elsewhere]]) -> None: ...

        assert declare(handle, batch=True).wants_message

    def test_a_subclass_and_the_numeric_tower(self):
        def any_ride(ride: Ride) -> None: ...
        def number(number: float) -> None: ...
        def mapping(given: typing.Mapping[str, Any]) -> None: ...

        declare(any_ride, duly.Topic("night", NightRide, guarantee="at-least-once"))
        declare(number, numbers)
        declare(mapping, objects)
        declare(any_ride, open_ended)

    def test_several_topics(self):
        def handle(event: duly.Message[Ride] | duly.Message[Checkout]) -> None: ...

        assert declare(handle, (rides, checkouts)).wants_message

    def test_callables_of_every_kind(self):
        class Called:
            def __call__(self, ride: Ride) -> None: ...

        class Async:
            async def __call__(self, ride: duly.Message[Ride]) -> None: ...

            async def method(self, ride: Ride) -> None: ...

        def with_db(db: Db, ride: Ride, *, copies: int) -> None: ...

        def noted(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                return function(*args, **kwargs)

            return wrapper

        @noted
        def wrapped(ride: duly.Message[Ride]) -> None: ...

        assert not declare(Called()).is_async
        assert declare(Async()).is_async
        assert declare(Async()).wants_message
        assert declare(Async().method).is_async
        declare(functools.partial(with_db, Db(), copies=2))
        assert declare(wrapped).wants_message

    def test_a_partial_of_an_async_def(self):
        async def handle(ride: Ride, *, copies: int) -> None: ...

        assert declare(functools.partial(handle, copies=1)).is_async


class TestWrong:
    def test_tx_without_exactly_once(self):
        def handle(ride: Ride, tx: duly.Transaction[Any]) -> None: ...

        assert "only exactly-once has" in refused(handle)

    def test_no_tx(self):
        def handle(order: Checkout) -> None: ...

        text = refused(handle, checkouts, guarantee="exactly-once")
        assert "takes no transaction" in text
        assert "tx: duly.Transaction" in text

    def test_tx_of_another_type(self):
        def handle(order: Checkout, tx: Db) -> None: ...

        assert "tx.connection" in refused(handle, checkouts, guarantee="exactly-once")

    def test_another_payload(self):
        def handle(order: Checkout) -> None: ...

        text = refused(handle)
        assert "Checkout" in text
        assert "Ride" in text

    def test_a_message_of_another_type(self):
        def handle(order: duly.Message[Checkout]) -> None: ...

        assert "Checkout" in refused(handle)

    def test_another_payload_beside_an_annotation_that_cannot_be_resolved(self):
        def handle(order: Checkout, *, db: Elsewhere | Db = duly.use(session)) -> None: ...

        assert "Checkout" in refused(handle)

    def test_one_of_two_topics(self):
        def handle(ride: Ride) -> None: ...

        assert "'checkouts'" in refused(handle, (rides, checkouts))

    def test_batch_and_single(self):
        def one(ride: Ride) -> None: ...
        def many(rides: list[Ride]) -> None: ...
        def messages(rides: list[duly.Message[Ride]]) -> None: ...

        assert "takes list" in refused(one, batch=True)
        refused(many)
        assert "batch_consumer" in refused(messages)
        refused(many, checkouts, batch=True)

    def test_no_parameters(self):
        assert "no message" in refused(lambda: None)

    def test_a_positional_dependency(self):
        def handle(ride: Ride, db: Db = duly.use(session)) -> None: ...

        assert "keyword-only" in refused(handle)

    def test_a_parameter_that_nothing_fills(self):
        def positional(ride: Ride, db: Db) -> None: ...
        def keyword(ride: Ride, *, db: Db) -> None: ...

        assert "keyword-only" in refused(positional)
        assert "duly.use" in refused(keyword)

    def test_hidden_parameters(self):
        def handle(*args: Any, **kwargs: Any) -> None: ...

        assert "functools.wraps" in refused(handle)

    def test_an_async_dependency_of_a_def(self):
        def nested(*, db: Db = duly.use(asession)) -> Db:
            return db

        def direct(ride: Ride, *, db: Db = duly.use(asession)) -> None: ...
        def indirect(ride: Ride, *, db: Db = duly.use(nested)) -> None: ...

        assert "async" in refused(direct)
        assert "async" in refused(indirect)

    def test_a_generator(self):
        def handle(ride: Ride) -> Iterator[None]:
            yield

        async def ahandle(ride: Ride) -> typing.AsyncIterator[None]:
            yield

        assert "yield" in refused(handle)
        assert "yield" in refused(ahandle)

    def test_an_async_def_inside_a_def(self):
        async def handle(ride: Ride) -> None: ...

        @functools.wraps(handle)
        def wrapper(ride: Ride) -> Any:
            return handle(ride)

        assert "wrapper" in refused(wrapper)

    def test_no_function(self):
        refused(7)
        refused(Ride)


class TestDeclaration:
    def test_no_guarantee_explains_the_three(self):
        app: Any = duly.App("test")
        with pytest.raises(duly.ConfigurationError) as error:
            app.consumer(rides, name="c")
        for word in ("at-most-once", "at-least-once", "exactly-once"):
            assert word in str(error.value)

    def test_no_name(self):
        app: Any = duly.App("test")
        with pytest.raises(duly.ConfigurationError, match="name="):
            app.consumer(rides, guarantee="at-least-once")

    @pytest.mark.parametrize("name", ["", "with space", "ü", "x" * 129, 7])
    def test_names_no_broker_could_carry(self, name):
        with pytest.raises(duly.ConfigurationError):
            duly.App("t").consumer(rides, name=name, guarantee="at-least-once")
        with pytest.raises(duly.ConfigurationError):
            duly.App(name)
        with pytest.raises(duly.ConfigurationError):
            duly.Topic(name, Ride, guarantee="at-least-once")

    def test_an_unknown_option_names_those_there_are(self):
        app: Any = duly.App("test")
        with pytest.raises(duly.ConfigurationError, match=r"'prefetch'.*lanes"):
            app.consumer(rides, name="c", guarantee="at-least-once", prefetch=3)

    @pytest.mark.parametrize("topic", ["rides", None, [], (rides, "x"), (rides, rides)])
    def test_what_is_no_topic(self, topic):
        with pytest.raises(duly.ConfigurationError, match="consumer 'c'"):
            duly.App("t").consumer(topic, name="c", guarantee="at-least-once")

    def test_the_same_name_twice(self):
        app = duly.App("test")

        @app.consumer(rides, name="c", guarantee="at-least-once")
        def first(ride: Ride) -> None: ...

        with pytest.raises(duly.ConfigurationError, match="twice"):

            @app.consumer(rides, name="c", guarantee="at-least-once")
            def second(ride: Ride) -> None: ...

    def test_groups_join(self):
        app, group = duly.App("test"), duly.Group()

        @group.consumer(rides, name="one", guarantee="at-least-once", lanes=3)
        def one(ride: Ride) -> None: ...

        @group.batch_consumer(checkouts, name="two", guarantee="exactly-once")
        def two(orders: list[Checkout], tx: duly.Transaction[Any]) -> None: ...

        app.include(group)
        assert [consumer.name for consumer in app.consumers] == ["one", "two"]
        assert app.consumers[0].options.lanes == 3
        assert {topic.name for topic in app.topics} == {"rides", "checkouts"}
        with pytest.raises(duly.ConfigurationError, match="'one'"):
            app.include(group)
        with pytest.raises(duly.ConfigurationError, match=r"duly\.Group"):
            app.include(typing.cast("duly.Group", app))

    def test_a_group_with_a_taken_name_leaves_the_app_as_it_was(self):
        app, group = duly.App("test"), duly.Group()
        for owner, name in ((app, "b"), (group, "a"), (group, "b")):
            owner.consumer(rides, name=name, guarantee="at-least-once")(lambda ride: None)
        with pytest.raises(duly.ConfigurationError):
            app.include(group)
        assert [consumer.name for consumer in app.consumers] == ["b"]

    def test_two_topics_of_one_name(self):
        app = duly.App("test")
        other = duly.Topic("rides", Checkout, guarantee="at-least-once")
        app.consumer(rides, name="a", guarantee="at-least-once")(lambda ride: None)
        app.consumer(other, name="b", guarantee="at-least-once")(lambda ride: None)
        with pytest.raises(duly.ConfigurationError, match="two topics named 'rides'"):
            _ = app.topics

    def test_a_lifespan_is_a_context_manager_of_the_app(self):
        entered: list[duly.App] = []

        def plain(app: duly.App) -> Iterator[None]:
            entered.append(app)
            yield

        @contextlib.contextmanager
        def managed(app: duly.App) -> Iterator[None]:
            entered.append(app)
            yield

        async def asynchronous(app: duly.App) -> typing.AsyncIterator[None]:
            yield

        for lifespan in (plain, managed):
            app = duly.App("test", lifespan=lifespan)
            assert app.lifespan is not None
            around = app.lifespan(app)
            assert isinstance(around, contextlib.AbstractContextManager)
            with around:
                assert entered.pop() is app
        app = duly.App("test", lifespan=asynchronous)
        assert app.lifespan is not None
        assert isinstance(app.lifespan(app), contextlib.AbstractAsyncContextManager)

    @pytest.mark.parametrize("lifespan", [7, "setup", asession])
    def test_what_is_no_lifespan(self, lifespan: Any):
        with pytest.raises(duly.ConfigurationError, match="lifespan"):
            duly.App("test", lifespan=lifespan)

    def test_from_env(self, monkeypatch):
        monkeypatch.delenv("DULY_BROKER", raising=False)
        with pytest.raises(duly.ConfigurationError, match="DULY_BROKER"):
            duly.App.from_env("shop")
        monkeypatch.setenv("DULY_BROKER", "memory://")
        with duly.App.from_env("shop") as app:
            assert isinstance(app.publish(rides, Ride("r-1")), duly.Published)


def test_a_protocol_of_ones_own_is_for_the_type_checkers_to_judge() -> None:
    class HasConnection(Protocol):
        @property
        def connection(self) -> Any: ...

    def handle(number: int, tx: HasConnection) -> None: ...

    app = duly.App("shop")
    numbers: duly.Topic[int] = duly.Topic("numbers", int, guarantee="exactly-once")
    app.consumer(numbers, name="c", guarantee="exactly-once")(handle)
    assert app.consumers[0].handler.wants_tx


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate_per_s": float("nan")},
        {"rate_per_s": "x"},
        {"start": "middle"},
        {"max_run_s": float("nan")},
        {"lease_s": float("inf")},
        {"order_by_key": "yes"},
        {"retry": 5},
        {"batch": 2.5},
        {"lanes": 1.5},
        {"tx_s": "1"},
    ],
)
def test_an_option_that_would_not_be_honoured_is_refused(wrong: dict[str, Any]) -> None:
    app = duly.App("shop")
    numbers: duly.Topic[int] = duly.Topic("numbers", int, guarantee="exactly-once")
    with pytest.raises(duly.ConfigurationError, match=next(iter(wrong))):
        app.consumer(numbers, name="c", guarantee="exactly-once", **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"partitions": 2.5},
        {"partitions": "x"},
        {"identity_retention_s": float("nan")},
        {"key": "x"},
        {"may_go_unheard": "yes"},
        {"dedup_by": ""},
        {"dedup_by": 7},
        {"without_identity": "drop"},
        {"max_body_bytes": 10.0},
    ],
)
def test_a_topic_that_would_not_be_honoured_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(duly.ConfigurationError, match="topic 'numbers'"):
        duly.Topic("numbers", int, guarantee="exactly-once", **wrong)


def test_the_connection_that_a_handler_wants_is_known():
    def rows(order: Checkout, tx: duly.Transaction[Db]) -> None: ...
    def none(order: Checkout, tx: duly.Transaction[None]) -> None: ...
    def anything(order: Checkout, tx: duly.Transaction[Any]) -> None: ...
    def unsaid(order: Checkout, tx) -> None: ...
    def other(order: Checkout, tx: typing.Annotated[duly.Transaction[Db], "a note"]) -> None: ...

    found = [
        declare(each, checkouts, guarantee="exactly-once").connection
        for each in (rows, none, anything, unsaid, other)
    ]
    assert found == [Db, None, None, None, Db]
