"""TLS against a server with certificates of the tests' own: who is trusted, and who is not."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import duly
from duly.broker import Published
from duly.brokers.rabbitmq import RabbitMQBroker
from duly.connect import open_broker, redacted
from duly.contract import contract_on, render
from duly.errors import BrokerUnavailable, BrokerUnusable, ConfigurationError, DulyError
from duly.guarantees import Done
from tests.postgres.proxy import Proxy
from tests.rabbitmq.work import (
    A_LOT,
    ORDERS,
    bodies,
    broker_at,
    lane_of,
    message,
    publish,
    work_off,
)
from tests.servers.certificates import Authority
from tests.servers.postgres import free_port, named_after
from tests.servers.rabbitmq import RabbitMQNode
from tests.waiting import eventually

# On servers of its own, and minutes in all.
pytestmark = pytest.mark.long

CANARY = "canary-5b0e"


class Secured(NamedTuple):
    """A server that wants a certificate of whoever connects."""

    node: RabbitMQNode
    port: int
    https: int
    ours: Authority
    certificate: tuple[Path, Path]
    worker: tuple[Path, Path]

    def url(self, place: str = "localhost", login: str = "guest:guest", **more: object) -> str:
        options: dict[str, object] = {
            "cacertfile": self.ours.file,
            "certfile": self.worker[0],
            "keyfile": self.worker[1],
            **more,
        }
        said = "&".join(f"{name}={value}" for name, value in options.items() if value is not None)
        return f"amqps://{login}@{place}:{self.port}/?{said}"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """One that the server may read: it runs as somebody else."""
    made = Path(tempfile.mkdtemp(prefix="duly-tls-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def secured(folder: Path) -> Iterator[Secured]:
    ours = Authority(folder, "ours")
    certificate = ours.issue("server", hosts="DNS:localhost")
    port, https = free_port(), free_port()
    files = [f"certfile = {certificate[0]}", f"keyfile = {certificate[1]}"]
    with RabbitMQNode(
        f"listeners.ssl.1 = 127.0.0.1:{port}",
        *(f"ssl_options.{line}" for line in files),
        f"ssl_options.cacertfile = {ours.file}",
        "ssl_options.verify = verify_peer",
        "ssl_options.fail_if_no_peer_cert = true",
        "auth_mechanisms.1 = PLAIN",
        "auth_mechanisms.2 = EXTERNAL",
        "ssl_cert_login_from = common_name",
        "management.ssl.ip = 127.0.0.1",
        f"management.ssl.port = {https}",
        *(f"management.ssl.{line}" for line in files),
        managed=True,
        plugins=["rabbitmq_auth_mechanism_ssl"],
    ) as node:
        node.control("add_user", "worker", "unused")
        node.control("set_permissions", "worker", ".*", ".*", ".*")
        yield Secured(node, port, https, ours, certificate, ours.issue("worker"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Authority:
    return Authority(folder, "theirs")


@pytest.fixture
def at(secured: Secured, request: pytest.FixtureRequest) -> Callable[..., str]:
    """URLs of the server, in a namespace of this test's own."""

    def url(*place: str, **more: Any) -> str:
        return secured.url(*place, namespace=named_after(request.node.name), **more)

    return url


def goes_through(url: str) -> None:
    with broker_at(url) as broker:
        publish(broker, "a")
        assert work_off(lane_of(broker), {"a"}.issubset) == ["a"]


def test_verified_messages_go_through(at: Callable[..., str]):
    goes_through(at())


@pytest.mark.parametrize(
    ("place", "more", "why"),
    [
        ("127.0.0.1", {}, "IP address mismatch"),
        ("localhost", {"server_name_indication": "elsewhere"}, "Hostname mismatch"),
        ("localhost", {"cacertfile": None}, "unable to get local issuer|self-signed"),
        ("localhost", {"cacertfile": "theirs"}, "self-signed|unable to get|signature failure"),
    ],
    ids=["another address", "another name", "the system's authorities", "another authority"],
)
def test_who_is_not_the_one_that_was_meant_is_refused(
    at: Callable[..., str], theirs: Authority, place: str, more: dict[str, str | None], why: str
):
    if more.get("cacertfile") == "theirs":
        more = {"cacertfile": str(theirs.file)}
    with pytest.raises(BrokerUnusable, match=why) as refusal:
        RabbitMQBroker(at(place, **more))
    assert "its certificate is refused" in str(refusal.value)
    assert "cacertfile" in str(refusal.value)


def test_an_expired_certificate_is_refused(at: Callable[..., str], secured: Secured):
    certificate, key = (path.read_bytes() for path in secured.certificate)
    expired = secured.ours.issue("expired", hosts="DNS:localhost", days=-1)
    try:
        for path, other in zip(secured.certificate, expired, strict=True):
            path.write_bytes(other.read_bytes())
        secured.node.control("eval", "ssl:clear_pem_cache().")
        with pytest.raises(BrokerUnusable, match="certificate has expired"):
            RabbitMQBroker(at())
    finally:
        secured.certificate[0].write_bytes(certificate)
        secured.certificate[1].write_bytes(key)
        secured.node.control("eval", "ssl:clear_pem_cache().")
    goes_through(at())


def test_unverified_only_where_the_uri_says_so(at: Callable[..., str]):
    goes_through(at("127.0.0.1", verify="verify_none", cacertfile=None))


def test_without_a_client_certificate(at: Callable[..., str]):
    with pytest.raises(BrokerUnavailable, match="cannot connect"):
        RabbitMQBroker(at(certfile=None, keyfile=None))


def test_a_client_certificate_of_another_authority(at: Callable[..., str], theirs: Authority):
    certificate, key = theirs.issue("worker")
    with pytest.raises(BrokerUnavailable, match="cannot connect"):
        RabbitMQBroker(at(certfile=certificate, keyfile=key))


def test_the_certificate_says_who_it_is(at: Callable[..., str]):
    url = at(auth_mechanism="external").replace("guest:guest@", "")
    with broker_at(url) as broker:
        publish(broker, "a")
        assert work_off(lane_of(broker), {"a"}.issubset) == ["a"]


@pytest.mark.parametrize("option", ["cacertfile", "certfile", "keyfile"])
def test_a_file_that_is_not_there_is_named(at: Callable[..., str], option: str):
    with pytest.raises(ConfigurationError, match=f"{option}=/nowhere.pem"):
        open_broker(at(**{option: "/nowhere.pem"}))


def test_the_management_interface_is_verified_too(at: Callable[..., str], secured: Secured):
    def text(**more: object) -> str:
        app = duly.App("shop", broker=at(**more))
        with app:
            return " ".join(render(contract_on(app.backends()[0], None, [ORDERS], [])).split())

    assert "were looked at" in text(management=secured.https)
    wrong = f"https://127.0.0.1:{secured.https}"
    assert "not looked at" in (found := text(management=wrong))
    assert "mismatch" in found
    with pytest.raises(ConfigurationError, match="unencrypted"):
        text(management=f"http://elsewhere:{secured.https}")


# --- what only TLS can get wrong


def test_many_at_once(at: Callable[..., str]):
    with broker_at(at(), deadline_s=10.0) as broker:
        lane = lane_of(broker)
        for round in range(3):
            names = [f"{round}/{n}" for n in range(2000)]
            outcomes = broker.publish([message(name, id=name) for name in names])
            assert all(isinstance(outcome, Published) for outcome in outcomes)
            got: list[str] = []

            def all_come(got: list[str] = got, count: int = len(names)) -> bool:
                held = lane.claim(500, A_LOT, 1.0)
                got.extend(bodies(held))
                lane.settle([Done(each.receipt) for each in held])
                return len(got) >= count

            eventually(all_come, "all come", timeout_s=20.0)


def test_half_open_it_is_noticed(at: Callable[..., str], secured: Secured):
    with Proxy(secured.port) as proxy:
        url = at().replace(f":{secured.port}/", f":{proxy.port}/") + "&heartbeat=1"
        with broker_at(url) as broker:
            lane = lane_of(broker)
            publish(broker, "a")
            [held] = lane.claim(1, A_LOT, 10.0)
            generation = lane.intake.generation
            proxy.mute()
            eventually(lambda: lane.intake.generation > generation, "the silence is noticed")
            eventually(lambda: broker.link.is_up, "it is connected again")
            assert list(lane.settle([Done(held.receipt)])) == [held.receipt]
            assert work_off(lane, {"a"}.issubset) == ["a"]


def test_cut_by_another_thread(at: Callable[..., str], caplog: pytest.LogCaptureFixture):
    with broker_at(at()) as broker, caplog.at_level(logging.ERROR):
        lane = lane_of(broker)
        for number in range(10):
            generation = lane.intake.generation
            broker.link.cut()
            cut = lambda was=generation: lane.intake.generation > was and broker.link.is_up  # noqa: E731
            eventually(cut, "connected again")
            publish(broker, str(number))
            assert str(number) in work_off(lane, {str(number)}.issubset)
    assert not caplog.records, "a lost connection is nothing unexpected"


# --- secrets


def test_no_password_in_anything_that_anybody_reads(
    at: Callable[..., str],
    secured: Secured,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
):
    caplog.set_level(logging.DEBUG)
    bad = [
        at(login=f"guest:{CANARY}"),
        at("127.0.0.1", login=f"guest:{CANARY}"),
        at("nowhere.invalid", login=f"guest:{CANARY}"),
        at(login=f"guest:{CANARY}", cacertfile="/nowhere.pem"),
        at(login=f"guest:{CANARY}", speed="9"),
        at(management=f"https://guest:{CANARY}@localhost:{secured.https}"),
        at(management=f"https%3A%2F%2Fguest%3A{CANARY}%40localhost%3A{secured.https}"),
    ]
    told = []
    for url in bad:
        told.append(redacted(url))
        app = duly.App("shop", broker=url)
        told.append(repr(app))
        try:
            with app:
                contract_on(app.backends()[0], None, [ORDERS], [])
        except DulyError as error:
            cause: BaseException | None = error
            while cause is not None:
                told += [str(cause), repr(cause)]
                cause = cause.__cause__ or cause.__context__
        else:
            pytest.fail(redacted(url))
    out, err = capfd.readouterr()
    for text in (*told, caplog.text, out, err):
        assert CANARY not in text


def test_of_several_hosts_the_first_is_dead(at: Callable[..., str]):
    goes_through(at().replace("@localhost", f"@localhost:{free_port()},localhost"))
