"""A consumer as a value: a handler, its stable name, its guarantee and its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, TypedDict

from duly.broker import Start
from duly.errors import ConfigurationError
from duly.guarantees import Guarantee, RetryPolicy
from duly.message import Topic, is_number

# Each has a cursor in the store, and a claim looks at all of them.
MAX_KEY_LANES = 128


class ConsumerOptions(TypedDict, total=False):
    """The options of `app.consumer` and `app.batch_consumer`; `Options` documents each."""

    batch: int
    batch_bytes: int
    lanes: int
    concurrency: int
    key_lanes: int
    rate_per_s: float | None
    lease_s: float
    max_run_s: float
    retry: RetryPolicy
    order_by_key: bool
    hold_key_on_dead: bool
    start: Start
    tx_s: float | None
    inbox_retention_s: float
    pipeline: bool


@dataclass(frozen=True, slots=True)
class Options:
    """How a consumer works, whatever its guarantee.

    - ``batch``: messages claimed together, and for exactly-once committed together.
    - ``batch_bytes``: bodies claimed together hold at most this many bytes.
    - ``lanes``: how many claims a worker process works side by side. Each lane runs its
      messages one after the other.
    - ``concurrency``: ``async def`` handlers in flight at once in one lane (not exactly-once:
      there the messages of a transaction run in order).
    - ``key_lanes``: where the source is a log (Kafka), exactly-once transactions of a partition run
      one after the other; cut into so many lanes by the messages' keys, those of several lanes run
      side by side, as many as there are ``lanes``. What has no key is dealt out. The number stays
      as it is once the consumer has begun; other brokers need none.
    - ``rate_per_s``: handler starts a second and worker process, None: no limit. Each message of
      a batch is a start, and so is each that starts again; what is given back unstarted is none.
    - ``lease_s``: a claim is another worker's to take when it was not renewed for this long.
    - ``max_run_s``: how long one handler may run. An ``async def`` one is cancelled and retried;
      the process of a ``def`` one is killed by its supervisor.
    - ``retry``: how often and how soon a failed message is tried again.
    - ``order_by_key``: messages of one key are handled one after the other, in order.
    - ``hold_key_on_dead``: with ``order_by_key``, a key waits behind its dead letter.
    - ``start``: where a new subscription begins.
    - ``tx_s``: a transaction starts no further handler after this long; None: the store's own.
    - ``inbox_retention_s``: how long the inbox remembers, where admission is by inbox.
    - ``pipeline``: handlers' statements are sent without waiting for one another's answers, where
      the store can. Then ``rowcount`` is -1 until something is fetched, and an error of one
      handler's statement is raised in a later handler: the batch is rolled back and comes again
      without.
    """

    batch: int = 100
    batch_bytes: int = 8 * 1024 * 1024
    lanes: int = 1
    concurrency: int = 1
    key_lanes: int = 1
    rate_per_s: float | None = None
    lease_s: float = 30.0
    max_run_s: float = 60.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    order_by_key: bool = False
    hold_key_on_dead: bool = False
    start: Start = "earliest"
    tx_s: float | None = None
    inbox_retention_s: float = 7 * 86400.0
    pipeline: bool = False

    def __post_init__(self) -> None:
        self._check_counts()
        for name, shortest in (("lease_s", 0.2), ("max_run_s", 0.01), ("inbox_retention_s", 0.0)):
            value = getattr(self, name)
            if not is_number(value) or value < shortest:
                raise ConfigurationError(f"{name}={value!r}: give {shortest:g} seconds or more")
        for name in ("rate_per_s", "tx_s"):
            value = getattr(self, name)
            if value is not None and (not is_number(value) or value <= 0):
                raise ConfigurationError(f"{name}={value!r}: give a number over 0, or None")
        for name in ("order_by_key", "hold_key_on_dead", "pipeline"):
            if type(getattr(self, name)) is not bool:
                raise ConfigurationError(f"{name}={getattr(self, name)!r}: True or False")
        if self.start not in ("earliest", "latest") and not isinstance(self.start, datetime):
            raise ConfigurationError(f'start={self.start!r}: "earliest", "latest" or a datetime')
        if not isinstance(self.retry, RetryPolicy):
            raise ConfigurationError(f"retry={self.retry!r}: give a duly.RetryPolicy")
        if self.hold_key_on_dead and not self.order_by_key:
            raise ConfigurationError("hold_key_on_dead=True needs order_by_key=True")

    def _check_counts(self) -> None:
        for name in ("batch", "batch_bytes", "lanes", "concurrency", "key_lanes"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigurationError(f"{name}={value!r}: give a whole number from 1 on")
        if self.key_lanes > MAX_KEY_LANES:
            raise ConfigurationError(f"key_lanes={self.key_lanes}: give {MAX_KEY_LANES} at most")

    @classmethod
    def of(cls, where: str, given: Mapping[str, Any]) -> Options:
        """Options from keywords; an unknown or wrong one is a `ConfigurationError`."""
        known = {f.name for f in fields(cls)}
        for name in given:
            if name not in known:
                raise ConfigurationError(
                    f"{where}: there is no option {name!r}; there are {', '.join(sorted(known))}"
                )
        try:
            return cls(**given)
        except ConfigurationError as error:
            raise ConfigurationError(f"{where}: {error}") from None


@dataclass(frozen=True, slots=True)
class Handler:
    """A handler function and what its signature asks for, decided once at declaration."""

    function: Callable[..., Any]
    is_async: bool
    is_batch: bool
    wants_message: bool
    wants_tx: bool
    uses: Mapping[str, Any]
    """Keyword parameters whose default is `duly.use(...)`."""
    connection: Any = None
    """C, where the handler is annotated ``tx: duly.Transaction[C]``; None where it says nothing."""


@dataclass(frozen=True, slots=True)
class Consumer:
    """A declared consumer. ``name`` is its subscription."""

    name: str
    topics: tuple[Topic[Any], ...]
    guarantee: Guarantee
    handler: Handler
    options: Options
