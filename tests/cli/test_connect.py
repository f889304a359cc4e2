"""URLs to brokers and stores, and what of a URL is ever shown."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duly.connect import open_broker, open_store, redacted
from duly.errors import BrokerError, ConfigurationError

CANARY = "hunter2-canary"


def test_the_same_file_is_one_database(db_url: str):
    broker = open_broker(db_url)
    for named in (None, db_url):
        store = open_store(named, broker)
        assert store is not None
        assert store.capabilities.database == broker.capabilities.database
        store.close()
    broker.close()


def test_another_file_is_another_database(db_url: str, tmp_path: Path):
    broker = open_broker(db_url)
    store = open_store(f"sqlite:///{tmp_path}/effects.db", broker)
    assert store is not None
    assert store.capabilities.database != broker.capabilities.database
    assert store.capabilities.outbox
    store.close()
    broker.close()


def test_a_namespace_is_a_database_of_its_own_in_the_same_file(db_url: str):
    production, staging = open_broker(db_url), open_broker(f"{db_url}?namespace=staging")
    assert production.capabilities.database != staging.capabilities.database
    for named in (
        None,
        f"{db_url}?namespace=staging",
        f"{db_url}?foreign_keys=on&namespace=staging",
    ):
        store = open_store(named, staging)
        assert store is not None
        assert store.capabilities.database == staging.capabilities.database
        store.close()
    with pytest.raises(
        ConfigurationError, match=r"'staging' and the store under ''.*both the same"
    ):
        open_store(db_url, staging)
    production.close()
    staging.close()


@pytest.mark.parametrize(
    "namespace",
    ["Staging", "1st", "a__b", "a_", "_a", "a-b", "a.b", "ü", "a" * 25, "a;drop", "a%20b", ""],
)
def test_what_is_no_namespace_is_refused(db_url: str, db_path: Path, namespace: str):
    with pytest.raises(ConfigurationError, match="namespace"):
        open_broker(f"{db_url}?namespace={namespace}")
    assert not db_path.exists()


def test_three_slashes_are_relative_and_four_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    open_broker("sqlite:///shop.db").close()
    open_broker(f"sqlite:///{tmp_path}/a%20b%23.db").close()
    assert {"shop.db", "a b#.db"} <= set(os.listdir(tmp_path))  # noqa: PTH208


@pytest.mark.parametrize("kind", ["database", "log", "queue"])
def test_memory(kind: str):
    broker = open_broker(f"memory://?kind={kind}")
    store = open_store(None, broker)
    assert store is not None
    assert broker.capabilities.is_log == (kind == "log")
    same = broker.capabilities.database == store.capabilities.database
    assert same == (kind == "database")
    store.close()
    broker.close()


def test_memory_for_both_is_one_database():
    broker = open_broker("memory://")
    store = open_store("memory://", broker)
    assert store is not None
    assert store.capabilities.database == broker.capabilities.database


def test_open_ones_pass_through():
    broker = open_broker("memory://")
    store = open_store(None, broker)
    assert open_broker(broker) is broker
    assert open_store(store, broker) is store


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nats://host", "there are sqlite://, postgresql://"),
        ("shop.db", "sqlite:///shop.db"),
        ("", "there are sqlite://"),
        ("sqlite://shop.db", "three slashes"),
        ("sqlite:///", "three slashes"),
        ("sqlite:///:memory:", "memory://"),
        ("sqlite:///shop.db?timeout=5", "no option 'timeout'; there are namespace"),
        ("sqlite:///shop.db#1", "%23"),
        ("memory://?kind=tape", "there are database, log, queue"),
        ("memory://?size=5", "no option 'size'; there are kind"),
        ("memory://?kind=log&kind=queue", "given twice"),
        ("memory://name", "has no name"),
        (None, "give a URL"),
        (42, "give a URL"),
    ],
)
def test_a_wrong_broker_is_refused_in_one_line(url, said: str):
    with pytest.raises(ConfigurationError) as refused:
        open_broker(url)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory://?kind=log", "no option 'kind'"),
        ("oracle://host", "no store is named"),
        (42, "give a URL"),
    ],
)
def test_a_wrong_store_is_refused(url, said: str):
    with pytest.raises(ConfigurationError, match=said):
        open_store(url, open_broker("memory://"))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ann:{}@db.example/shop",
        "postgresql://ann:{}@db.example/shop?sslmode=require",
        "amqp://ann:x{}/y#z@host/vhost",
        "amqp://ann:{}@x@host",
        "amqp://{}@host",
        "kafka://host?sasl_password={}&acks=all",
        "sqs://host?secret_access_key={}",
        "sqs://host?X-Token={}",
        "sqlite://ann:{}@shop.db",
        "sqlite:///shop.db?password={}",
        "memory://ann:{}@",
        "memory://?kind=log&token={}",
        "sqlite:///shop.db?a=1;password={}",
        "postgresql:ann:{}@host",
        "https://[ann:{}@host",
        "amqp://ann:{}@[::1",
        "amqp://ann:{}@host:port/",
    ],
)
def test_a_password_is_never_shown(url: str):
    named = url.format(CANARY)
    assert CANARY not in redacted(named)
    for call in (open_broker, lambda it: open_store(it, open_broker("memory://"))):
        # A proper URL of PostgreSQL names a host that nobody answers for.
        with pytest.raises((ConfigurationError, BrokerError)) as refused:
            call(named)
        error: BaseException | None = refused.value
        while error is not None:
            assert CANARY not in repr(error)
            error = error.__context__ if not error.__suppress_context__ else error.__cause__


@given(password=st.text("ab/@#?&=:;%[] ", min_size=1).map(lambda text: f"{CANARY}{text}{CANARY}"))
def test_no_password_shows_through(password: str):
    assert CANARY not in redacted(f"postgresql://ann:{password}@host/db")


def test_what_is_no_secret_stays_readable():
    assert redacted("sqlite:////data/shop.db") == "sqlite:////data/shop.db"
    assert redacted("memory://?kind=log") == "memory://?kind=log"
    assert redacted("amqp://ann:x@host/v") == "amqp://ann:***@host/v"
