"""AMQP URIs as people write them; secrets are shown nowhere."""

from __future__ import annotations

import ssl
from typing import Any

import pytest

from duly.brokers.rabbitmq import RabbitMQBroker
from duly.brokers.rabbitmq.address import Address, address_of
from duly.connect import open_broker, open_store, redacted
from duly.errors import BrokerUnavailable, BrokerUnusable, ConfigurationError
from tests.servers.postgres import free_port
from tests.servers.rabbitmq import shared_url


def read(url: str) -> Address:
    return address_of(url, redacted(url))


@pytest.mark.parametrize(
    ("url", "hosts", "vhost"),
    [
        ("amqp://", [("localhost", 5672)], "/"),
        ("amqp://one", [("one", 5672)], "/"),
        ("amqp://one/", [("one", 5672)], "/"),
        ("amqp://one/%2F", [("one", 5672)], "/"),
        ("amqp://one/shop", [("one", 5672)], "shop"),
        ("amqp://one/a%2Fb", [("one", 5672)], "a/b"),
        ("amqps://one:1234/shop", [("one", 1234)], "shop"),
        ("amqps://one", [("one", 5671)], "/"),
        ("amqp://one:1,two,[::1]:3/shop", [("one", 1), ("two", 5672), ("::1", 3)], "shop"),
    ],
)
def test_where_it_is(url: str, hosts: Any, vhost: str):
    address = read(url)
    assert (list(address.hosts), address.vhost) == (hosts, vhost)


def test_who_asks():
    address = read("amqp://a%40b:s%2Fcret@one/shop")
    assert (address.user, address.password) == ("a@b", "s/cret")
    assert "s/cret" not in repr(address)
    assert (read("amqp://one").user, read("amqp://one").password) == ("guest", "guest")


def test_tls_is_verified_unless_the_uri_says_otherwise():
    assert read("amqp://one").tls_for("one") is False
    told = read("amqps://one?cacertfile=/ca.pem&certfile=/me.pem&keyfile=/me.key").tls_for("one")
    assert told == {
        "server_hostname": "one",
        "cert_reqs": ssl.CERT_REQUIRED,
        "ca_certs": "/ca.pem",
        "certfile": "/me.pem",
        "keyfile": "/me.key",
    }
    assert read("amqps://one?server_name_indication=x").tls_for("one")["server_hostname"] == "x"
    assert read("amqps://one?verify=verify_none").tls_for("one")["cert_reqs"] == ssl.CERT_NONE


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("amqp://u:secret@one?speed=9", "no option 'speed'"),
        ("amqp://u:secret@one?heartbeat=no", "heartbeat"),
        ("amqp://u:secret@one:port", "port"),
        ("amqp://u:secret@one?cacertfile=/ca.pem", "amqps://"),
        ("amqps://u:secret@one?verify=perhaps", "verify"),
        ("amqp://u:secret@one?namespace=a/b", "namespace"),
    ],
)
def test_what_is_no_address(url: str, complaint: str):
    with pytest.raises(ConfigurationError, match=complaint) as refusal:
        open_broker(url)
    assert "secret" not in str(refusal.value)


def test_a_wrong_password_is_shown_nowhere(caplog: pytest.LogCaptureFixture):
    host = shared_url().rpartition("@")[2]
    with pytest.raises(BrokerUnusable, match="refuses user 'guest'") as refusal:
        open_broker(f"amqp://guest:sesame@{host}")
    assert "sesame" not in str(refusal.value) + caplog.text


def test_nobody_listens():
    port = free_port()
    with pytest.raises(BrokerUnavailable, match=f"{port}.*cannot connect"):
        RabbitMQBroker(f"amqp://127.0.0.1:{port}")


def test_of_several_hosts_one_is_enough():
    place = shared_url().rpartition("@")[2]
    RabbitMQBroker(f"amqp://guest:guest@127.0.0.1:{free_port()},{place}").close()


def test_it_is_no_store():
    broker = open_broker(shared_url())
    try:
        assert open_store(None, broker) is None
        with pytest.raises(ConfigurationError, match="name a database as the store"):
            open_store("amqp://one", broker)
    finally:
        broker.close()
