"""Declaring consumers: the decorators that `App` and `Group` share.

The type of a decorator says what a handler may take. Its trick is one `ParamSpec`: what follows
the message (and ``tx``) in the handler's parameters must be callable with nothing, because the
decorator is called with nothing more, so it can only be keywords that have defaults; and the
decorated name keeps its whole type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, overload

from duly.consumer import Consumer, ConsumerOptions, Options
from duly.errors import ConfigurationError
from duly.guarantees import guarantee_of
from duly.handlers import handler_of
from duly.message import Message, Topic, check_name
from duly.schedules import Timetable
from duly.store import Transaction

if TYPE_CHECKING:
    from typing_extensions import Unpack

A = TypeVar("A")
B = TypeVar("B")
D = TypeVar("D")
C = TypeVar("C")
P = ParamSpec("P")
R = TypeVar("R")
T_co = TypeVar("T_co", covariant=True)
Payload = TypeVar("Payload")
Whole = TypeVar("Whole")
F = TypeVar("F", bound=Callable[..., Any])


class Stream(Protocol[T_co]):
    """A topic seen from a consumer, where only what comes out of it matters."""

    def decode(self, body: bytes) -> T_co:
        """The payload these bytes hold."""
        ...


# Up to three topics of different types are told apart; of a longer or computed list the type
# checkers know no payload type, and duly itself checks at declaration.
OneToThree = Stream[A] | tuple[Stream[A], Stream[B]] | tuple[Stream[A], Stream[B], Stream[D]]
WithoutTransaction = Literal["at-most-once", "at-least-once"]
WithTransaction = Literal["exactly-once"]


class Decorator(Protocol[Payload, Whole]):
    """Takes a handler of a payload or a whole message, and returns it unchanged."""

    @overload
    def __call__(
        self, handler: Callable[Concatenate[Payload, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Callable[Concatenate[Payload, P], R]: ...
    @overload
    def __call__(
        self, handler: Callable[Concatenate[Whole, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Callable[Concatenate[Whole, P], R]: ...


class TransactionDecorator(Protocol[Payload, Whole]):
    """The same for exactly-once, whose handlers take the transaction too."""

    @overload
    def __call__(
        self,
        handler: Callable[Concatenate[Payload, Transaction[C], P], R],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Callable[Concatenate[Payload, Transaction[C], P], R]: ...
    @overload
    def __call__(
        self,
        handler: Callable[Concatenate[Whole, Transaction[C], P], R],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Callable[Concatenate[Whole, Transaction[C], P], R]: ...


class Declarations:
    """Consumers by name, in the order declared."""

    def __init__(self) -> None:
        self._consumers: dict[str, Consumer] = {}

    @property
    def consumers(self) -> Sequence[Consumer]:
        """Every declared consumer, in the order declared."""
        return tuple(self._consumers.values())

    @overload
    def consumer(
        self,
        topic: OneToThree[A, B, D],
        /,
        *,
        name: str,
        guarantee: WithTransaction,
        **options: Unpack[ConsumerOptions],
    ) -> TransactionDecorator[A | B | D, Message[A | B | D]]: ...
    @overload
    def consumer(
        self,
        topic: OneToThree[A, B, D],
        /,
        *,
        name: str,
        guarantee: WithoutTransaction,
        **options: Unpack[ConsumerOptions],
    ) -> Decorator[A | B | D, Message[A | B | D]]: ...
    @overload
    def consumer(
        self,
        topic: Sequence[Topic[Any]],
        /,
        *,
        name: str,
        guarantee: WithTransaction,
        **options: Unpack[ConsumerOptions],
    ) -> TransactionDecorator[Any, Message[Any]]: ...
    @overload
    def consumer(
        self,
        topic: Sequence[Topic[Any]],
        /,
        *,
        name: str,
        guarantee: WithoutTransaction,
        **options: Unpack[ConsumerOptions],
    ) -> Decorator[Any, Message[Any]]: ...
    def consumer(
        self,
        topic: Any,
        /,
        *,
        name: str | None = None,
        guarantee: str | None = None,
        **options: Any,
    ) -> Any:
        """Declare the decorated function as the handler of a topic, or of a tuple of topics.

        ``name`` is the subscription's name: every consumer of a topic sees all its messages,
        workers of one consumer share them. ``guarantee`` has no default. The options are those
        of `Options`. Handlers take the payload or, annotated so, `Message`; for exactly-once
        and only then ``tx: duly.Transaction[C]`` follows; then keywords with
        ``duly.use(...)``. Raises `ConfigurationError`.
        """
        return self._decorator(topic, name, guarantee, options, batch=False)

    @overload
    def batch_consumer(
        self,
        topic: OneToThree[A, B, D],
        /,
        *,
        name: str,
        guarantee: WithTransaction,
        **options: Unpack[ConsumerOptions],
    ) -> TransactionDecorator[list[A | B | D], list[Message[A | B | D]]]: ...
    @overload
    def batch_consumer(
        self,
        topic: OneToThree[A, B, D],
        /,
        *,
        name: str,
        guarantee: WithoutTransaction,
        **options: Unpack[ConsumerOptions],
    ) -> Decorator[list[A | B | D], list[Message[A | B | D]]]: ...
    @overload
    def batch_consumer(
        self,
        topic: Sequence[Topic[Any]],
        /,
        *,
        name: str,
        guarantee: WithTransaction,
        **options: Unpack[ConsumerOptions],
    ) -> TransactionDecorator[list[Any], list[Message[Any]]]: ...
    @overload
    def batch_consumer(
        self,
        topic: Sequence[Topic[Any]],
        /,
        *,
        name: str,
        guarantee: WithoutTransaction,
        **options: Unpack[ConsumerOptions],
    ) -> Decorator[list[Any], list[Message[Any]]]: ...
    def batch_consumer(
        self,
        topic: Any,
        /,
        *,
        name: str | None = None,
        guarantee: str | None = None,
        **options: Any,
    ) -> Any:
        """Like `consumer`, for a handler that takes up to ``batch=`` messages as a list.

        They succeed or fail together.
        """
        return self._decorator(topic, name, guarantee, options, batch=True)

    def _decorator(
        self,
        topic: Any,
        name: str | None,
        guarantee: str | None,
        options: Mapping[str, Any],
        *,
        batch: bool,
    ) -> Callable[[F], F]:
        if name is None:
            raise ConfigurationError(
                "a consumer needs name=...: it names the subscription, outlives the code and "
                "tells workers which messages are theirs"
            )
        check_name("consumer", name)
        where = f"consumer {name!r}"
        topics = topics_of(topic, where)
        promise = guarantee_of(guarantee, where)
        chosen = Options.of(where, options)

        def declare(function: F) -> F:
            handler = handler_of(function, topics, promise, batch=batch, where=where)
            self._add(Consumer(name, topics, promise, handler, chosen))
            return function

        return declare

    def _add(self, consumer: Consumer) -> None:
        if consumer.name in self._consumers:
            raise ConfigurationError(
                f"consumer {consumer.name!r} is declared twice. A name is one subscription: "
                "give the second one another name, and it sees every message too."
            )
        self._consumers[consumer.name] = consumer


class Group(Declarations, Timetable):
    """Consumers and schedules declared in a module of their own, for `App.include`."""

    def __init__(self) -> None:
        Declarations.__init__(self)
        Timetable.__init__(self)

    def __repr__(self) -> str:
        return f"<duly.Group of {', '.join([*self._consumers, *self._schedules]) or 'nothing'}>"


def topics_of(topic: Any, where: str) -> tuple[Topic[Any], ...]:
    """One topic or several as a tuple. Raises `ConfigurationError`."""
    topics = (topic,) if isinstance(topic, Topic) else topic
    if isinstance(topics, (list, tuple)) and topics and all(isinstance(t, Topic) for t in topics):
        names = [each.name for each in topics]
        if len(set(names)) < len(names):
            raise ConfigurationError(f"{where}: the same topic twice: {', '.join(names)}")
        return tuple(topics)
    raise ConfigurationError(
        f"{where}: {topic!r} is no topic. Give a duly.Topic, or a tuple or list of them."
    )
