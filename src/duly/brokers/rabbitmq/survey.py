"""What the server is, and what its policies do to duly's queues: for the contract and the doctor.

AMQP tells the version, and refuses to declare a queue that is there as another. Policies are told
by the management interface alone, and by nothing how long a message may be held: the server's
``consumer_timeout`` is in no interface, so the URL may say it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from duly.brokers.rabbitmq.address import CONSUMER_TIMEOUT_S, Address
from duly.brokers.rabbitmq.management import Forbidden, Management, Unseen
from duly.brokers.rabbitmq.topology import Names
from duly.errors import BrokerUnusable
from duly.inspection.survey import Hold, Peril, Survey

# Older ones know no dead-lettering that keeps a message until it is taken, and do not say so.
_OLDEST = (3, 10)
_HOLD_LONGER = (
    "raise consumer_timeout in the server's rabbitmq.conf, and say so in the URL "
    "(consumer_timeout=..., in ms)"
)


def version_of(told: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """The version of a server, by what it says of itself. Raises `BrokerUnusable` for one on which
    duly's guarantees do not hold.
    """
    product, version = str(told.get("product", "")), str(told.get("version", ""))
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if product != "RabbitMQ":
        raise BrokerUnusable(
            f"{where} speaks AMQP and is {product or 'unknown'!r}: what it keeps of quorum queues "
            "is not known; duly works with RabbitMQ"
        )
    if numbers < _OLDEST:
        raise BrokerUnusable(
            f"{where} is RabbitMQ {version}, which may lose what is dead-lettered: 3.10 or newer"
        )
    if not dict(told.get("capabilities") or {}).get("publisher_confirms"):
        raise BrokerUnusable(f"{where} confirms no publishing")
    return numbers


def survey_of(
    address: Address,
    names: Names,
    version: tuple[int, ...],
    subscriptions: Mapping[str, Sequence[str]],
    topics: Sequence[str],
) -> Survey:
    """What was found. Raises `ConfigurationError` where the management URL is wrong."""
    shown = f"RabbitMQ {'.'.join(map(str, version))}"
    said_s = address.consumer_timeout_s
    longest_s = said_s or CONSUMER_TIMEOUT_S
    # What is claimed may have waited here before, see `Address.keeps_s`.
    half_s = longest_s / 2
    hold = Hold(longest_s, said_s is not None, _HOLD_LONGER, in_order_s=half_s, claim_s=half_s)
    if address.management is None:
        unseen = (
            f"{shown}: policies were not looked at, and one can drop messages of these queues "
            "(message-ttl, expires, max-length): add management=15672 to the URL"
        )
        return Survey((), (), (unseen,), hold)
    try:
        looked = _Look(address.management, address.vhost, names)
        perils = [
            *looked.at_flags(),
            *looked.at_queues(subscriptions),
            *looked.at_exchanges(topics),
        ]
    except Unseen as error:
        return Survey((), (), (f"{shown}: policies were not looked at: {error}",), hold)
    seen = (f"{shown}: policies on {names.namespace}/ were looked at", *looked.harmless)
    return Survey(perils, seen, looked.unseen, hold)


class _Look:
    """Looks, and notes what is harmless and what could not be seen."""

    def __init__(self, management: Management, vhost: str, names: Names) -> None:
        self.harmless: list[str] = []
        self.unseen: list[str] = []
        self._management = management
        self._vhost = vhost
        self._names = names
        start = f"{names.namespace}/"
        self._remedy = f"remove it, or let its pattern leave out what begins with {start!r}"
        self._management.get("whoami")
        self._policies = self._sorted("policies")
        self._operators = self._sorted("operator-policies")

    def _sorted(self, kind: str) -> Sequence[Mapping[str, Any]] | None:
        """The policies of the virtual host, the strongest first; None: they may not be seen."""
        try:
            found = self._management.get(kind, self._vhost)
        except Forbidden as error:
            self.unseen.append(f"{error} (the tag policymaker may)")
            return None
        return sorted(found, key=lambda each: -int(each["priority"]))

    # --- the server

    def at_flags(self) -> Iterator[Peril]:
        """A server that was upgraded has new abilities once its operator says so."""
        try:
            flags = self._management.get("feature-flags")
        except Forbidden as error:
            self.unseen.append(str(error))
            return
        for flag in flags:
            if flag["name"] == "stream_queue" and flag["state"] != "enabled":
                yield Peril(
                    None,
                    None,
                    "the server's feature flag stream_queue is not enabled, without which it may "
                    "lose what is dead-lettered",
                    "rabbitmqctl enable_feature_flag stream_queue",
                )

    # --- queues

    def at_queues(self, subscriptions: Mapping[str, Sequence[str]]) -> Iterator[Peril]:
        """Those that are there, and those that are still to be declared."""
        there = {
            str(queue["name"]): queue
            for queue in self._management.pages(
                "queues",
                self._vhost,
                name=f"^{re.escape(self._names.namespace)}/",
                use_regex="true",
                disable_stats="true",
                enable_queue_totals="true",
            )
        }
        for subscription, topics in subscriptions.items():
            for topic in topics:
                for name in self._queues(topic, subscription, there):
                    yield from self._at(name, there.get(name), topic, subscription)
        for name, queue in there.items():
            if name.startswith(f"{self._names.onward}/") or name == self._names.unheard:
                yield from self._at(name, queue, None, None)
        yield from self._at_letters(there.get(self._names.letters))

    def _at_letters(self, stream: Mapping[str, Any] | None) -> Iterator[Peril]:
        """The stream of dead letters, where an app without a store has made it."""
        if stream is None:
            return
        named, definition = self._policy_on(self._names.letters, stream)
        for key in sorted({"max-age", "max-length-bytes"} & definition.keys()):
            yield Peril(
                None,
                None,
                f"the policy {named!r} sets {key} = {definition[key]} on the stream "
                f"{self._names.letters!r}: older dead letters are dropped",
                self._remedy,
            )

    def _queues(self, topic: str, subscription: str, there: Mapping[str, Any]) -> Sequence[str]:
        main = self._names.queue(topic, subscription)
        more = [self._names.alone(topic, subscription), self._names.dead(topic, subscription)]
        below = [name for name in there if name.startswith(f"{main}/")]
        return list(dict.fromkeys([main, *more, *below]))

    def _at(
        self,
        name: str,
        queue: Mapping[str, Any] | None,
        topic: str | None,
        subscription: str | None,
    ) -> Iterator[Peril]:
        named, definition = self._policy_on(name, queue)
        own = _arguments(queue, dead=name.endswith("/dead"))
        if own["queue-type"] != "quorum":
            yield Peril(
                topic, subscription, f"the queue {name!r} is no quorum queue",
                "remove it when it is empty",
            )  # fmt: skip
        for key, value in definition.items():
            found = f"the policy {named!r} sets {key} = {value} on the queue {name!r}"
            told = _losing(key, own, definition, dead=name.endswith("/dead"))
            if told is not None:
                yield Peril(topic, subscription, f"{found}: {told}", self._remedy)
            elif key in _LIMITS:
                self.harmless.append(f"{found}, {_LIMITS[key]}")

    def _policy_on(
        self, name: str, queue: Mapping[str, Any] | None
    ) -> tuple[str, Mapping[str, Any]]:
        """The names of the policies on a queue, and what they say together."""
        if queue is not None and "effective_policy_definition" in queue:
            names = [queue.get("policy"), queue.get("operator_policy")]
            return " and ".join(filter(None, names)), dict(queue["effective_policy_definition"])
        both = [_strongest(each, name, _QUEUES) for each in (self._policies, self._operators)]
        definition: dict[str, Any] = {}
        for each in both:
            definition |= each["definition"] if each else {}
        return " and ".join(str(each["name"]) for each in both if each), definition

    # --- exchanges

    def at_exchanges(self, topics: Sequence[str]) -> Iterator[Peril]:
        """What nobody takes has to be refused, and not to go elsewhere. The topic's own exchange
        was declared with an alternate, which goes before a policy's.
        """
        for topic in topics:
            name = self._names.due(topic)
            policy = _strongest(self._policies, name, _EXCHANGES)
            if policy and "alternate-exchange" in policy["definition"]:
                yield Peril(
                    topic,
                    None,
                    f"the policy {policy['name']!r} gives the exchange {name!r} an "
                    "alternate-exchange: what is due later and no subscription takes would be "
                    "confirmed, and be in no subscription",
                    self._remedy,
                )


_QUEUES = ("queues", "quorum_queues", "all")
_EXCHANGES = ("exchanges", "all")
_LIMITS = {
    "max-length": "beyond which publishing is refused",
    "max-length-bytes": "beyond which publishing is refused",
    "message-ttl": "after which a delay is over, however long it was meant to be",
    "delivery-limit": "after which a message that killed its workers is a dead letter",
}


def _strongest(
    policies: Sequence[Mapping[str, Any]] | None, name: str, kinds: Sequence[str]
) -> Mapping[str, Any] | None:
    """The one policy that a server applies to a name."""
    for policy in policies or ():
        if policy["apply-to"] in kinds and _matches(str(policy["pattern"]), name):
            return policy
    return None


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return True  # the server reads it in its own way; rather too much is told


def _arguments(queue: Mapping[str, Any] | None, *, dead: bool) -> Mapping[str, Any]:
    """What a queue was declared with, or will be."""
    if queue is None:
        more = {} if dead else {"overflow": "reject-publish", "dead-letter-exchange": ""}
        return {"queue-type": "quorum"} | more
    declared = queue.get("arguments") or {}
    found = {str(name).removeprefix("x-"): value for name, value in declared.items()}
    return {"queue-type": queue.get("type", "classic")} | found


def _losing(
    key: str, own: Mapping[str, Any], definition: Mapping[str, Any], *, dead: bool
) -> str | None:
    """How a setting of a policy's loses messages of a queue; None: it does not."""
    # Of this one a policy's word goes before the queue's own.
    overflow = definition.get("overflow", own.get("overflow", "drop-head"))
    drops = overflow != "reject-publish"
    value = definition[key]
    told: str | None = None
    match key:
        case "expires":
            told = "the queue is deleted with all that is in it when nobody uses it for so long"
        case "message-ttl" if "message-ttl" not in own:  # else a delay: it goes on, earlier
            told = "what is not handled by then is given up"
        case "max-length" | "max-length-bytes" if drops and value < own.get(key, math.inf):
            told = "beyond that the oldest are dropped"
        case "overflow" if drops and "dead-letter-exchange" in own:
            told = "what is dead-lettered may be lost on its way, for the server keeps it no longer"
        case "delivery-limit" if dead:
            told = "dead letters that were looked at so often are dropped"
        case _:
            pass
    return told
