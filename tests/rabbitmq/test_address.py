"""AMQP URIs as people write them; secrets are shown nowhere."""

from __future__ import annotations

import ssl
from pathlib import Path
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
        # As they are found in configurations.
        ("AMQP://One", [("One", 5672)], "/"),
        ("amqp://one:/shop", [("one", 5672)], "shop"),
        ("amqp://:1234", [("localhost", 1234)], "/"),
        ("amqp://one//", [("one", 5672)], "/"),
        ("amqp://one/a/b", [("one", 5672)], "a/b"),
        ("amqp://[fe80::1]", [("fe80::1", 5672)], "/"),
        ("amqp://one, two:7/shop", [("one", 5672), ("two", 7)], "shop"),
        ("amqp://one/shop%20floor", [("one", 5672)], "shop floor"),
        ("amqp://one?heartbeat=30", [("one", 5672)], "/"),
        ("amqp://ann@one/shop\n", [("one", 5672)], "shop"),
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


@pytest.mark.parametrize(
    ("url", "password"),
    [
        ("amqp://ann:s@cret@one", "s@cret"),
        ("amqp://ann:s:cret@one", "s:cret"),
        ("amqp://ann:s,cret@one", "s,cret"),
        ("amqp://ann:s%2Fc%23ret@one", "s/c#ret"),
        ("amqp://ann:s+cret@one", "s+cret"),
        ("amqp://ann:s%c3%a9cret@one", "s\u00e9cret"),
    ],
)
def test_passwords_as_they_come(url: str, password: str):
    address = read(url)
    assert (address.user, address.password, [*address.hosts]) == ("ann", password, [("one", 5672)])


def test_tls_is_verified_unless_the_uri_says_otherwise(tmp_path: Path):
    a_file = tmp_path / "a.pem"
    a_file.touch()
    assert read("amqp://one").tls_for("one") is False
    told = read(f"amqps://one?cacertfile={a_file}&certfile={a_file}&keyfile={a_file}").tls_for(
        "one"
    )
    assert told == {
        "server_hostname": "one",
        "cert_reqs": ssl.CERT_REQUIRED,
        "ca_certs": str(a_file),
        "certfile": str(a_file),
        "keyfile": str(a_file),
    }
    assert read("amqps://one?server_name_indication=x").tls_for("one")["server_hostname"] == "x"
    assert read("amqps://one?verify=verify_none").tls_for("one")["cert_reqs"] == ssl.CERT_NONE


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("amqp://u:secret@one?speed=9", "no option 'speed'"),
        ("amqp://u:secret@one?heartbeat=no", "heartbeat"),
        ("amqp://u:secret@one:port", "port"),
        ("amqp://u:secret@one:99999", "65535"),
        ("amqp://u:secret@one:-1", "65535"),
        ("amqp://u:sec/ret@one", "in a password, write / as %2F"),
        ("amqp://u:sec#ret@one", "write '#' as %23"),
        ("amqp://u:sec?ret@one", "not a proper URL"),
        ("amqp://u:secret@one,u:secret@two", "write the login once"),
        ("amqp://u:secret@one?heartbeat=0", "heartbeat"),
        ("amqp://u:secret@one?ssl=true", "no option 'ssl'"),
        ("pyamqp://u:secret@one", "no broker is named"),
        ("amqps://u:secret@one?auth_mechanism=magic", "auth_mechanism=plain, external"),
        ("amqp://u:secret@one?management=yes", "management is a port"),
        ("amqp://u:secret@one?management=99999", "management is a port"),
        ("amqp://u:secret@one?management=0", "management is a port"),
        ("amqp://u:secret@one?management=http://one:0", "management is a port"),
        ("amqp://u:secret@one?management=http://one:99999", "management is a port"),
        ("amqp://u:secret@one?management=ftp://one", "management is a port"),
        ("amqp://u:secret@one?management=http://one:x", "management is a port"),
        ("amqps://u:secret@one?management=http://one", "unencrypted"),
        ("amqp://u:secret@one?consumer_timeout=soon", "consumer_timeout"),
        ("amqp://u:secret@one?cacertfile=/ca.pem", "amqps://"),
        ("amqps://u:secret@one?verify=perhaps", "verify"),
        ("amqp://u:secret@one?namespace=a/b", "namespace"),
    ],
)
def test_what_is_no_address(url: str, complaint: str):
    with pytest.raises(ConfigurationError, match=complaint) as refusal:
        open_broker(url)
    assert "secret" not in str(refusal.value)
    assert "sec/ret" not in str(refusal.value)
    assert "ret@" not in str(refusal.value)


@pytest.mark.parametrize(
    ("said", "places"),
    [
        ("15672", [("http", "one", 15672, ""), ("http", "two", 15672, "")]),
        ("http://mon", [("http", "mon", 15672, "")]),
        ("https://mon", [("https", "mon", 15671, "")]),
        ("https://mon:1/rabbit/api/", [("https", "mon", 1, "/rabbit")]),
        ("http://[::1]:7", [("http", "::1", 7, "")]),
    ],
)
def test_where_the_management_interface_is(said: str, places: Any):
    management = read(f"amqp://ann:s3cret@one,two/shop?management={said}").management
    assert management is not None
    assert [*management.places] == places
    assert (management.user, management.password) == ("ann", "s3cret")
    assert "s3cret" not in repr(management)


def test_it_may_have_a_login_of_its_own():
    given = "http%3A%2F%2Fmon%3As3cr%2540t%40mon"
    management = read(f"amqp://ann:other@one?management={given}").management
    assert management is not None
    assert (management.user, management.password) == ("mon", "s3cr@t")
    for url in (given, "http://mon:s3cr%2540t@mon"):
        assert "s3cr" not in redacted(f"amqp://ann:other@one?management={url}")


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
    login, _, place = shared_url().rpartition("@")
    RabbitMQBroker(f"{login}@127.0.0.1:{free_port()},{place}").close()


def test_it_is_no_store():
    broker = open_broker(shared_url())
    try:
        assert open_store(None, broker) is None
        with pytest.raises(ConfigurationError, match="name a database as the store"):
            open_store("amqp://one", broker)
    finally:
        broker.close()
