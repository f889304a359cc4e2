"""What a URL asks of the driver is looked at when the broker is opened, not when it is needed."""

from __future__ import annotations

import pytest

from duly.brokers.kafka import KafkaBroker
from duly.errors import ConfigurationError

WRONG = [
    ("group.protocol=nonsense", "nonsense"),
    ("partition.assignment.strategy=nonsense", "Unsupported partition.assignment.strategy"),
    ("session.timeout.ms=999999999", "outside allowed range"),
    ("fetch.max.bytes=10", "fetch.max.bytes"),
    ("security.protocol=sasl_ssl&ssl.ca.location=/nowhere", "ssl.ca.location"),
    ("compression.type=foo", "foo"),
    ("linger.ms=60000", "linger.ms"),
    ("batch.size=0", "batch.size"),
    ("heartbeat.interval.ms=15000", "below session.timeout.ms (15000)"),
    ("session.timeout.ms=6000&heartbeat.interval.ms=6000", "below session.timeout.ms (6000)"),
    ("group.protocol=consumer&session.timeout.ms=6000", "the brokers say"),
    ("group.protocol=consumer&partition.assignment.strategy=range", "the brokers say"),
    ("namespace=duly", "duly's own topics"),
    ("namespace=duly.x", "duly's own topics"),
]


@pytest.mark.parametrize(("options", "said"), WRONG)
def test_what_the_driver_would_refuse_later_is_refused_at_once(options: str, said: str):
    with pytest.raises(ConfigurationError) as refused:
        KafkaBroker(f"kafka://user:secret@127.0.0.1:1?{options}", shown="kafka://here")
    assert "'kafka://here'" in str(refused.value)
    assert said in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "options",
    [
        "group.protocol=consumer",
        "session.timeout.ms=6000&heartbeat.interval.ms=1000",
        "partition.assignment.strategy=range",
        "linger.ms=5&compression.type=lz4",
    ],
)
def test_what_it_takes_is_passed_on(options: str):
    KafkaBroker(f"kafka://127.0.0.1:1?{options}").close()


def test_a_host_has_no_spaces():
    with pytest.raises(ConfigurationError, match="'a b' is no name of a host"):
        KafkaBroker("kafka://a b:9092")
