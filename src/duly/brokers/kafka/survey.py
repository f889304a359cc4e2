"""What a cluster's settings make of the promises: for the contract and the doctor.

What loses messages against a topic's word is a peril, and so is a setting with which nothing would
work. What a promise takes for granted is a limit: that a disk lasts, that a consumer comes before
Kafka deletes. A topic that is not there yet is judged by what it would be made with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from duly.brokers.kafka.address import Address
from duly.brokers.kafka.looking import Layout, Seen, Settings
from duly.brokers.kafka.names import Names
from duly.contract.setting import duration, plural, size
from duly.inspection.survey import Peril, Survey
from duly.message import Topic

NOTES_BYTES = 4096
"""What is committed beside a position needs so much (`duly.brokers.kafka.notes`)."""

_SHORT_S = 86_400.0
_FOREVER = -1
# What a topic is made with that says nothing else, by the brokers' name for it.
_INHERITED: Mapping[str, str] = {
    "cleanup.policy": "log.cleanup.policy",
    "retention.ms": "log.retention.ms",
    "retention.bytes": "log.retention.bytes",
    "min.insync.replicas": "min.insync.replicas",
    "unclean.leader.election.enable": "unclean.leader.election.enable",
    "flush.messages": "log.flush.interval.messages",
}


def survey_of(
    address: Address,
    names: Names,
    seen: Seen,
    topics: Mapping[str, tuple[Topic[Any], Settings]],
    subscriptions: Mapping[str, Sequence[str]],
) -> Survey:
    """What was found. ``topics``: by name, with the settings that each would be made with."""
    judge = _Judge(address, names, seen, subscriptions)
    perils: list[Peril] = []
    limits: list[Peril] = []
    for found in chain(
        *(judge.of_topic(topic, made_with) for topic, made_with in topics.values()),
        judge.of_own(),
        judge.of_groups(),
        judge.of_brokers(),
    ):
        (perils if found[0] else limits).append(found[1])
    return Survey(perils, judge.notes(), seen.unseen, limits=limits)


def wanted(
    names: Names, topics: Sequence[str], subscriptions: Mapping[str, Sequence[str]]
) -> tuple[Sequence[str], Sequence[str]]:
    """The topics and groups to look at."""
    again = [names.again(subscription) for subscription in subscriptions]
    own = [names.records, names.letters, _POSITIONS]
    groups = [names.group(subscription) for subscription in subscriptions]
    return [*(names.topic(topic) for topic in topics), *again, *own], groups


_POSITIONS = "__consumer_offsets"
_VERIFIES = "transaction.partition.verification.enable"

_Judged = tuple[bool, Peril]
"""Whether it is a peril and not a limit, and what was found."""


class _Judge:
    def __init__(
        self,
        address: Address,
        names: Names,
        seen: Seen,
        subscriptions: Mapping[str, Sequence[str]],
    ) -> None:
        self._address = address
        self._names = names
        self._seen = seen
        self._subscriptions = subscriptions
        self._kept: dict[str, list[str]] = {}

    def notes(self) -> Sequence[str]:
        """What was looked at, and what holds for everything here."""
        cluster = f"Kafka cluster {self._seen.cluster}, {plural(self._seen.count, 'broker')}"
        notes = [f"{cluster}: copies, settings and what this login may do were looked at"]
        notes += [
            f"{', '.join(sorted(topics))}: {kept}" for kept, topics in sorted(self._kept.items())
        ]
        if self._seen.transactions is not None:
            notes.append(
                f"transactions of the cluster have version {self._seen.transactions} "
                "(transaction.version, KIP-890), those of the driver version 1: a producer that "
                "has lost a connection is followed by another"
            )
        minutes = self._least("offsets.retention.minutes")
        if minutes is not None:
            notes.append(
                f"the position of a consumer that has had no worker for {duration(minutes * 60)} "
                "is forgotten (offsets.retention.minutes), and the next worker ends and says so"
            )
        return notes

    # --- topics

    def of_topic(self, topic: Topic[Any], made_with: Settings) -> Iterator[_Judged]:
        """One that the app declares."""
        name, shown = self._names.topic(topic.name), f"topic {topic.name!r}"
        settings = self._settings_of(name, made_with)
        copies = self._copies_of(name)
        if settings is not None:
            yield from self._of_copies(topic.name, None, name, copies, settings)
            yield from self._of_retention(topic, name, settings)
            yield from self._of_size(topic, name, settings)
        elif copies == 1:
            yield _limit(topic.name, None, *_one_copy(shown, {}))
        for subscription, read in self._subscriptions.items():
            if topic.name in read:
                yield from self._denied(name, ("READ",), topic.name, subscription)
        if not any(topic.name in read for read in self._subscriptions.values()):
            yield from self._denied(name, ("WRITE",), topic.name, None)

    def of_own(self) -> Iterator[_Judged]:
        """Duly's own topics, as far as they are there."""
        for subscription in self._subscriptions:
            name = self._names.again(subscription)
            yield from self._of_kept(name, subscription)
            yield from self._denied(name, ("READ", "WRITE"), None, subscription)
        for name, lost in (
            (self._names.records, "what was promised, and which positions there have been"),
            (self._names.letters, "dead letters"),
        ):
            settings = self._seen.topics.get(name)
            if settings is None:
                continue
            yield from self._of_copies(None, None, name, self._copies_of(name), settings)
            if _policies(settings) != {"compact"}:
                yield _peril(
                    None, None,
                    f"cleanup.policy={settings.get('cleanup.policy')} of topic {name!r}: {lost} "
                    "would be deleted by time or size",
                    _alter(name, "cleanup.policy=compact"),
                )  # fmt: skip

    def _of_kept(self, name: str, subscription: str) -> Iterator[_Judged]:
        """Where retries wait, for as long as they have to."""
        settings = self._seen.topics.get(name)
        if settings is None:
            return
        yield from self._of_copies(None, subscription, name, self._copies_of(name), settings)
        kept = {"retention.ms": "-1", "retention.bytes": "-1", "cleanup.policy": "delete"}
        wrong = {key: value for key, value in kept.items() if settings.get(key, value) != value}
        for key, value in wrong.items():
            yield _peril(
                None, subscription,
                f"{key}={settings[key]} of topic {name!r}: what is to be tried again would be "
                "deleted before it is",
                _alter(name, f"{key}={value}"),
            )  # fmt: skip

    def _of_copies(
        self,
        topic: str | None,
        subscription: str | None,
        name: str,
        copies: int | None,
        settings: Settings,
    ) -> Iterator[_Judged]:
        shown = f"topic {name!r}"
        least = _number(settings, "min.insync.replicas")
        if copies is None or least is None:
            return
        if least > copies:
            yield _limit(
                topic, subscription,
                f"{shown} has {_copies(copies)} and min.insync.replicas={least}: some brokers go "
                "by the copies that there are, older ones confirm nothing",
                f"more copies (kafka-reassign-partitions.sh), or "
                f"{_alter(name, f'min.insync.replicas={max(1, copies - 1)}')}",
            )  # fmt: skip
        if copies == 1:
            yield _limit(topic, subscription, *_one_copy(shown, settings))
        elif least == 1:
            yield _limit(
                topic, subscription,
                f"{shown} has {_copies(copies)} and min.insync.replicas=1: where the other "
                "brokers are behind or away, one alone has what was confirmed, and its disk's loss "
                "loses it",
                _alter(name, "min.insync.replicas=2"),
            )  # fmt: skip
        if copies > 1 and settings.get("unclean.leader.election.enable") == "true":
            yield _limit(
                topic, subscription,
                f"unclean.leader.election.enable=true of {shown}: a broker that was behind may "
                "lead it, and what it had not copied is lost",
                _alter(name, "unclean.leader.election.enable=false"),
            )  # fmt: skip

    def _of_retention(self, topic: Topic[Any], name: str, settings: Settings) -> Iterator[_Judged]:
        policies = _policies(settings)
        if "compact" in policies:
            yield _peril(
                topic.name, None,
                f"cleanup.policy={settings['cleanup.policy']} of topic {name!r}: of each key only "
                "the last message is kept, whether the others were handled or not, and one without "
                "a key is refused",
                f"{_alter(name, 'cleanup.policy=delete')}, or declare the topic at-most-once",
            )  # fmt: skip
        if "delete" not in policies:
            return
        kept_ms, kept_bytes = (_number(settings, f"retention.{each}") for each in ("ms", "bytes"))
        if kept_bytes is not None and kept_bytes != _FOREVER:
            yield _limit(
                topic.name, None,
                f"of topic {name!r} Kafka deletes the oldest beyond {size(kept_bytes)} a partition "
                "(retention.bytes), handled or not",
                _alter(name, "retention.bytes=-1"),
            )  # fmt: skip
        if kept_ms is None or kept_ms == _FOREVER:
            return
        kept_s = kept_ms / 1000
        found = f"Kafka deletes it {duration(kept_s)} after publishing, handled or not"
        if topic.retention_s > kept_s:
            yield _peril(
                topic.name, None,
                f"it is declared with retention_s={topic.retention_s:.0f}, and {found} "
                f"(retention.ms of {name!r})",
                f"{_alter(name, f'retention.ms={int(topic.retention_s * 1000)}')}, or declare less",
            )  # fmt: skip
        elif kept_s < _SHORT_S:
            yield _limit(
                topic.name, None,
                f"topic {name!r}: {found} (retention.ms)",
                _alter(name, "retention.ms=<longer than consumers may be away>"),
            )  # fmt: skip
        else:
            self._kept.setdefault(f"{found} (retention.ms)", []).append(topic.name)

    def _of_size(self, topic: Topic[Any], name: str, settings: Settings) -> Iterator[_Judged]:
        most = _number(settings, "max.message.bytes")
        wanted_bytes = self._address.batch_of(topic.max_body_bytes)
        if most is not None and most < wanted_bytes:
            fits = max(0, most - self._address.batch_of(0))
            yield _limit(
                topic.name, None,
                f"topic {name!r} takes {size(most)} at once (max.message.bytes): bodies of up to "
                f"{size(fits)} surely fit, larger ones may be MessageTooLarge",
                f"{_alter(name, f'max.message.bytes={wanted_bytes}')}, or declare "
                f"max_body_bytes={fits}",
            )  # fmt: skip

    def _copies_of(self, name: str) -> int | None:
        layout = self._seen.layouts.get(name)
        if layout is not None:
            return layout.copies
        asked = self._address.replication
        return asked if asked > 0 else self._least("default.replication.factor")

    def _settings_of(self, name: str, made_with: Settings) -> Settings | None:
        if name in self._seen.layouts:
            return self._seen.topics.get(name)
        if not self._seen.brokers:
            return None
        first = self._seen.brokers[min(self._seen.brokers)]
        inherited = {ours: first[theirs] for ours, theirs in _INHERITED.items() if theirs in first}
        if "retention.ms" not in inherited:
            inherited["retention.ms"] = str(_retention_ms(first))
        return {**inherited, **made_with}

    def _denied(
        self, name: str, needed: Sequence[str], topic: str | None, subscription: str | None
    ) -> Iterator[_Judged]:
        may = self._seen.layouts.get(name, Layout(0)).may
        if not may:  # not there, or not told
            return
        for operation in needed:
            if operation not in may:
                named = operation.title()
                yield _peril(
                    topic, subscription,
                    f"this login has no right to {operation.lower()} topic {name!r} ({named})",
                    "kafka-acls.sh --add --allow-principal User:... "
                    f"--operation {named} --topic {name}",
                )  # fmt: skip

    # --- groups and brokers

    def of_groups(self) -> Iterator[_Judged]:
        """Those of the app's consumers."""
        for subscription in self._subscriptions:
            name = self._names.group(subscription)
            may = self._seen.groups.get(name, frozenset())
            if may and "READ" not in may:
                yield _peril(
                    None, subscription,
                    f"this login has no right to commit positions of group {name!r} (Read)",
                    f"kafka-acls.sh --add --allow-principal User:... --operation Read --group "
                    f"{name}",
                )  # fmt: skip

    def of_brokers(self) -> Iterator[_Judged]:
        """What every consumer depends on."""
        for subscription in self._subscriptions:
            yield from self._of_notes(subscription)
            yield from self._of_session(subscription)
        positions = self._seen.layouts.get(_POSITIONS)
        if positions is not None and positions.copies == 1 and self._seen.count > 1:
            yield _limit(
                None, None,
                f"positions of consumers have one copy (topic {_POSITIONS!r}): the loss of its "
                "broker's disk loses them, and workers end and say so",
                f"kafka-reassign-partitions.sh for {_POSITIONS}, with three copies",
            )  # fmt: skip
        asked, most = self._address.transaction_timeout_s, self._least("transaction.max.timeout.ms")
        if most is not None and most < asked * 1000:
            yield _limit(
                None, None,
                f"transactions last for up to {asked:g} s here (transaction.timeout.ms), and the "
                f"brokers take {most} ms (transaction.max.timeout.ms): nothing would be relayed "
                "from an outbox",
                f"transaction.timeout.ms={most} in the URL",
            )  # fmt: skip
        if any(each.get(_VERIFIES, "false") != "true" for each in self._seen.brokers.values()):
            yield _limit(
                None, None,
                f"a broker does not verify that a record's transaction is open ({_VERIFIES}): one "
                "that comes late may open a transaction that nobody ends, and readers of what is "
                "committed stay before it",
                f"set {_VERIFIES}=true in the brokers' server.properties; Kafka before 3.6 has no "
                "such setting",
            )  # fmt: skip
        minutes = self._least("offsets.retention.minutes")
        if minutes is not None and minutes * 60 < _SHORT_S:
            yield _limit(
                None, None,
                f"positions of consumers without a worker are forgotten after "
                f"{duration(minutes * 60)} (offsets.retention.minutes)",
                "set offsets.retention.minutes=10080 in the brokers' server.properties",
            )  # fmt: skip

    def _of_notes(self, subscription: str) -> Iterator[_Judged]:
        room = self._least("offset.metadata.max.bytes")
        if room is not None and room < NOTES_BYTES:
            yield _peril(
                None, subscription,
                f"offset.metadata.max.bytes={room} of the brokers: what is committed beside a "
                f"position needs {NOTES_BYTES}, and no position could be committed",
                f"set offset.metadata.max.bytes={NOTES_BYTES} in the brokers' server.properties",
            )  # fmt: skip

    def _of_session(self, subscription: str) -> Iterator[_Judged]:
        if self._address.is_new_protocol:
            return  # the brokers say how long a session lasts
        asked = self._address.session_timeout_ms
        least = self._greatest("group.min.session.timeout.ms")
        most = self._least("group.max.session.timeout.ms")
        if least is not None and most is not None and not least <= asked <= most:
            yield _peril(
                None, subscription,
                f"session.timeout.ms is {asked}, and the brokers take {least} to {most} "
                "(group.min.session.timeout.ms, group.max.session.timeout.ms): no worker could "
                "join",
                f"session.timeout.ms={min(max(asked, least), most)} in the URL",
            )  # fmt: skip

    def _least(self, name: str) -> int | None:
        return min(self._numbers(name), default=None)

    def _greatest(self, name: str) -> int | None:
        return max(self._numbers(name), default=None)

    def _numbers(self, name: str) -> list[int]:
        found = [_number(settings, name) for settings in self._seen.brokers.values()]
        return [number for number in found if number is not None]


def _one_copy(shown: str, settings: Settings) -> tuple[str, str]:
    # Unless told otherwise a broker confirms what is in its memory: the copies are what lasts.
    synced = settings.get("flush.messages") == "1"
    power = "" if synced else ", and a power failure may lose what was confirmed last"
    found = f"{shown} has one copy: the loss of its broker's disk loses what is in it{power}"
    remedy = (
        "three brokers or more, replication=3 in the URL for topics that are made "
        "(kafka-reassign-partitions.sh for one that is there), and min.insync.replicas=2"
    )
    return found, remedy


def _peril(topic: str | None, subscription: str | None, found: str, remedy: str) -> _Judged:
    return True, Peril(topic, subscription, found, remedy)


def _limit(topic: str | None, subscription: str | None, found: str, remedy: str) -> _Judged:
    return False, Peril(topic, subscription, found, remedy)


def _alter(name: str, setting: str) -> str:
    return (
        f"kafka-configs.sh --alter --entity-type topics --entity-name {name} --add-config {setting}"
    )


def _policies(settings: Settings) -> set[str]:
    return {part.strip() for part in settings.get("cleanup.policy", "delete").split(",")}


def _copies(count: int) -> str:
    return "1 copy" if count == 1 else f"{count} copies"


def _number(settings: Settings, name: str) -> int | None:
    text = settings.get(name, "")
    return int(text) if text.removeprefix("-").isdecimal() else None


def _retention_ms(settings: Settings) -> int:
    """Of brokers that say it in minutes or in hours."""
    for name, unit_ms in (("log.retention.minutes", 60_000), ("log.retention.hours", 3_600_000)):
        number = _number(settings, name)
        if number is not None:
            return _FOREVER if number < 0 else number * unit_ms
    return _FOREVER
