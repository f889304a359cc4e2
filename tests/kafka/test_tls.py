"""A cluster that is reached by TLS and a login (SCRAM), on which a login may do what it needs."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import confluent_kafka.admin
import pytest

import duly
from duly.connect import redacted
from duly.contract import contract_on, render
from duly.errors import BrokerError, BrokerUnavailable, BrokerUnusable, ContractRefused
from tests.contract.subjects import DOCS
from tests.kafka.shop import Shop
from tests.kafka.work import OPTIONS, ORDERS, broker_at, message
from tests.servers.certificates import Authority
from tests.servers.kafka import KafkaNode
from tests.servers.postgres import free_port, named_after
from tests.waiting import eventually

# On a node of its own, and waiting for what does not answer.
pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]

KINDS: Any = confluent_kafka.admin  # the driver's types do not say what it has
CANARY = "canary-5b0e"
PASSWORD = "se/cret"
_SECURED = """
listeners=PLAINTEXT://127.0.0.1:{{port}},CONTROLLER://127.0.0.1:{{control}},SECURE://127.0.0.1:{port}
advertised.listeners=PLAINTEXT://127.0.0.1:{{port}},SECURE://localhost:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SECURE:SASL_SSL
sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.secure.scram-sha-512.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
ssl.keystore.type=PEM
ssl.keystore.location={keys}
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
"""


class Secured(NamedTuple):
    """A node with a certificate, and the user ``shop``, who may do nothing."""

    node: KafkaNode
    port: int
    ours: Authority
    theirs: Authority

    def url(self, host: str = "localhost", password: str = PASSWORD, **more: object) -> str:
        options = {"ssl.ca.location": self.ours.file, **more}
        said = "&".join(f"{name}={value}" for name, value in options.items() if value is not None)
        return f"kafka://shop:{password.replace('/', '%2F')}@{host}:{self.port}?{said}"


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("certificates")
    ours, theirs = Authority(folder, "ours"), Authority(folder, "theirs")
    certificate, key = ours.issue("server", hosts="DNS:localhost")
    keys = folder / "server-keys.pem"
    keys.write_text(key.read_text() + certificate.read_text())
    port = free_port()
    scram = ("--add-scram", f"SCRAM-SHA-512=[name=shop,password={PASSWORD}]")
    with KafkaNode(_SECURED.format(port=port, keys=keys), making=scram) as node:
        yield Secured(node, port, ours, theirs)


def rights() -> Iterator[tuple[str, str, list[str]]]:
    """The table of kafka.md: on what, by which name, which rights."""
    page = (DOCS / "kafka.md").read_text().partition("### Rights")[2].partition("\n## ")[0]
    for kind, name, named in re.findall(
        r"^\| ([a-z ]+) \| `([^`]+)` \| ([\w, ]+) \|", page, re.MULTILINE
    ):
        yield kind, name, named.split(", ")


def allow(node: KafkaNode, namespace: str) -> None:
    """Let the user do what the table says in a namespace."""
    found = []
    for kind, name, named in rights():
        for right in named:
            place = name.replace("staging", namespace)
            found.append(binding(kind, place, right, "ALLOW", exact=kind == "cluster"))
    assert len(found) > 6, "the table was read"
    bind(node, *found)


def binding(kind: str, name: str, right: str, permission: str, *, exact: bool) -> Any:
    return KINDS.AclBinding(
        KINDS.ResourceType[_KINDS[kind]],
        name,
        KINDS.ResourcePatternType["LITERAL" if exact else "PREFIXED"],
        "User:shop",
        "*",
        KINDS.AclOperation[re.sub(r"(?<=[a-z])(?=[A-Z])", "_", right).upper()],
        KINDS.AclPermissionType[permission],
    )


def bind(node: KafkaNode, *bindings: Any) -> None:
    client = KINDS.AdminClient({"bootstrap.servers": node.bootstrap})
    for future in client.create_acls([*bindings]).values():
        future.result(30)


_KINDS: Mapping[str, str] = {
    "cluster": "BROKER",
    "topic": "TOPIC",
    "group": "GROUP",
    "transactional id": "TRANSACTIONAL_ID",
}


def contract(url: str) -> str:
    app = duly.App("shop", broker=url)

    @app.consumer(ORDERS, name="sub", guarantee="at-least-once")
    def handle(order: str) -> None: ...

    with app:
        return " ".join(render(contract_on(*app.backends(), app.topics, app.consumers)).split())


def test_the_rights_that_are_listed_are_enough(
    secured: Secured, request: pytest.FixtureRequest, tmp_path: Path
):
    """At-least-once with a retry, exactly-once by cursor, the relay, and from Kafka to Kafka."""
    namespace = named_after(request.node.name)
    allow(secured.node, namespace)
    url = secured.url(namespace=namespace)
    orders = [str(n) for n in range(50)]
    with Shop(url, tmp_path, f"{secured.node.url}?namespace={namespace}") as shop:
        with broker_at(url) as broker:
            broker.publish([message(order, id=order, key=order) for order in orders])
        eventually(
            lambda: (
                set(shop.told) == set(orders)
                and len(shop.charged()) == len(orders)
                and shop.stored("receipts").total() == len(orders)
                and shop.stored("copies").total() == len(orders)
            ),
            "all is done",
            lambda: f"{len(shop.told)} {len(shop.charged())}",
            200.0,
        )
    found = contract(url)
    assert "1 broker: copies, settings and what this login may do were looked at" in found
    assert re.findall(r".{80}not looked at.{80}", found) == []


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("topic", "orders", "no right to read topic"),
        ("group", "sub", "no right to commit positions of group"),
    ],
)
def test_one_that_is_missing_is_refused(
    secured: Secured, request: pytest.FixtureRequest, kind: str, name: str, said: str
):
    namespace = named_after(request.node.name)
    allow(secured.node, namespace)
    bind(secured.node, binding(kind, f"{namespace}.{name}", "Read", "DENY", exact=True))
    # What is there already is described by who may not use it.
    with broker_at(f"{secured.node.url}?namespace={namespace}") as other:
        other.subscribe([ORDERS], "sub", OPTIONS).close()
    with pytest.raises(ContractRefused) as refusal:
        contract(secured.url(namespace=namespace))
    assert said in str(refusal.value)
    assert PASSWORD not in str(refusal.value)


@pytest.mark.parametrize(
    ("where", "options", "said", "kind"),
    [
        ({"password": CANARY}, {}, "invalid credentials with SASL mechanism", BrokerUnusable),
        ({}, {"ssl.ca.location": "theirs"}, "certificate verify failed", BrokerUnusable),
        ({}, {"ssl.ca.location": None}, "certificate verify failed", BrokerUnusable),
        ({"host": "127.0.0.1"}, {}, "certificate verify failed", BrokerUnusable),
        ({}, {"sasl.mechanism": "PLAIN"}, "Unsupported SASL mechanism", BrokerUnusable),
        ({"host": "nowhere.invalid"}, {}, "Failed to resolve", BrokerUnavailable),
    ],
    ids=["password", "other authority", "no authority", "host", "mechanism", "nowhere"],
)
def test_what_is_wrong_is_said_in_time(
    secured: Secured,
    where: dict[str, Any],
    options: dict[str, Any],
    said: str,
    kind: type[BrokerError],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
):
    caplog.set_level(logging.DEBUG)
    if "theirs" in options.values():
        options = {"ssl.ca.location": secured.theirs.file}
    where = {"password": PASSWORD, **where}
    url = secured.url(**where, **options)
    began = time.monotonic()
    with pytest.raises(kind, match=said) as refusal:
        contract(url)
    assert time.monotonic() - began < 40
    told = [redacted(url), caplog.text, *capfd.readouterr()]
    cause: BaseException | None = refusal.value
    while cause is not None:
        told += [str(cause), repr(cause)]
        cause = cause.__cause__ or cause.__context__
    assert where["password"] not in "".join(told)
