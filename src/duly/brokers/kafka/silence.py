"""Why a cluster does not answer. Of a login or a certificate that is refused the driver says only
that the time is over; what it met on the way it tells to who listens.
"""

from __future__ import annotations

import time
from typing import Any

from confluent_kafka import KafkaError
from confluent_kafka import admin as driver

from duly.brokers.kafka.address import Address
from duly.brokers.kafka.client import settings

# Of a connection that is refused, or ended, the driver tells within milliseconds.
_LISTENS_S = 3.0
_AGAIN_S = 0.1

_NO_ANSWER = frozenset({KafkaError._TIMED_OUT, KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN})
# The most telling first.
_TELLS = (
    *(KafkaError._AUTHENTICATION, KafkaError._SSL, KafkaError._RESOLVE),
    KafkaError._TRANSPORT,
)


def is_silence(error: KafkaError) -> bool:
    """Whether it only says that there was no answer."""
    return error.code() in _NO_ANSWER


def reason(address: Address) -> KafkaError | None:
    """What a new client meets there; None: nothing that would keep it from being answered."""
    heard: list[KafkaError] = []
    client: Any = driver.AdminClient(settings(address.common, {"error_cb": heard.append}))
    until_s = time.monotonic() + _LISTENS_S
    # Of several brokers one may be down, and another refuse the login: that is the reason.
    while time.monotonic() < until_s and not any(map(_is_refusal, heard)):
        client.poll(_AGAIN_S)
    telling = [each for code in _TELLS for each in heard if each.code() == code]
    return telling[0] if telling else None


def _is_refusal(error: KafkaError) -> bool:
    return error.code() in (KafkaError._AUTHENTICATION, KafkaError._SSL)
