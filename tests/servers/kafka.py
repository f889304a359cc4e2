"""Kafka for tests: one node a session, or one of a test's own that it may kill.

``DULY_TEST_KAFKA=host:port`` names another for the first. Its programs are the jars that
tests/servers/install fetched, run by the machine's Java.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import functools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, NoReturn, Self

import pytest

from duly.testing.chaos.processes import alive, eventually, free_port
from duly.testing.conformance.plugin import in_ci

OTHER = "DULY_TEST_KAFKA"

_STARTS_S = 60.0
# Starts in two seconds, and stays below 400 MB.
_JAVA = (
    *("-Xms96m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData"),
    *("-Xshare:auto", "-Djava.awt.headless=true", "-Djava.net.preferIPv4Stack=true"),
)
_SETTINGS = """
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{control}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{control}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={folder}/data
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
offsets.topic.segment.bytes=1048576
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=2
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=500
group.consumer.min.session.timeout.ms=500
group.consumer.min.heartbeat.interval.ms=100
log.message.timestamp.after.max.ms=9223372036854775807
num.network.threads=2
num.io.threads=4
num.recovery.threads.per.data.dir=2
log.cleaner.dedupe.buffer.size=8388608
background.threads=2
"""
_LOGGING = """
status = error
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = [%d] %p %m (%c)%n
rootLogger.level = warn
rootLogger.appenderRef.out.ref = out
"""


def missing(reason: str) -> NoReturn:
    """Skip on a laptop, fail in CI: there what is not tested is not promised."""
    if in_ci():
        pytest.fail(f"{reason}, and CI is set: make servers", pytrace=False)
    pytest.skip(f"{reason}. Install it with: make servers (or set {OTHER}=host:port)")


def _jars() -> Path:
    """Where install puts what tests/servers/kafka.xml names."""
    tree = ET.parse(Path(__file__).with_suffix(".xml"))
    version = tree.findtext(".//{*}dependency/{*}version")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "duly-tests" / f"kafka-{version}"


class KafkaNode:
    """A node from `start` until `close`, broker and controller in one; skips where there is none.
    ``settings`` are further lines of its properties.
    """

    def __init__(self, *settings: str) -> None:
        if shutil.which("java") is None:
            missing("no Java is installed")
        if not _jars().is_dir():
            missing("Kafka was not fetched")
        self.port, self._control_port = free_port(), free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="duly-kafka-"))
        self._process: subprocess.Popen[Any] | None = None
        given = _SETTINGS.format(port=self.port, control=self._control_port, folder=self.folder)
        (self.folder / "server.properties").write_text("\n".join([given, *settings, ""]))
        (self.folder / "log4j2.properties").write_text(_LOGGING)
        atexit.register(self.close)

    @property
    def bootstrap(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """The same as a broker URL."""
        return f"kafka://{self.bootstrap}"

    @property
    def is_running(self) -> bool:
        """Whether it was started, and not killed since."""
        return self._process is not None

    def _popen(self, *command: str) -> subprocess.Popen[Any]:
        with (self.folder / "log.txt").open("ab") as out:
            logging = f"-Dlog4j2.configurationFile={self.folder}/log4j2.properties"
            return subprocess.Popen(
                ["java", *_JAVA, logging, "-cp", f"{_jars()}/*", *command],
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                start_new_session=True,
            )

    def start(self) -> Self:
        """Start, on the same port and with the same data as before; returns when it answers."""
        properties = str(self.folder / "server.properties")
        if not (self.folder / "data").exists():
            id = f"A{base64.urlsafe_b64encode(secrets.token_bytes(16)).decode()[1:22]}"
            making = ("format", "--cluster-id", id, "--config", properties)
            formatting = self._popen("kafka.tools.StorageTool", *making)
            assert formatting.wait(60) == 0, self.log()[-2000:]
        self._process = self._popen("kafka.Kafka", properties)
        eventually(self._answers, "Kafka answers", self.log, _STARTS_S)
        return self

    def _answers(self) -> bool:
        assert self._process is not None, "it was started"
        assert self._process.poll() is None, f"Kafka ended:\n{self.log()[-2000:]}"
        try:
            # It listens only once it is registered and serves.
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """Kill -9."""
        assert self._process is not None, "the node runs"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        process, self._process = self._process, None
        eventually(lambda: not alive(process.pid), "the node is gone")

    def pause(self) -> None:
        """Stop it where it is: it keeps its connections and answers nothing."""
        assert self._process is not None, "the node runs"
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """The end of a pause."""
        assert self._process is not None, "the node runs"
        os.killpg(self._process.pid, signal.SIGCONT)

    def log(self) -> str:
        """What the node has written so far."""
        path = self.folder / "log.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def close(self) -> None:
        """End it at once, and remove its data."""
        if self._process is not None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


@functools.cache
def shared_url() -> str:
    """The node that tests share, each in a namespace of its own; skips where there is none."""
    if named := os.environ.get(OTHER):
        return f"kafka://{named}"
    return KafkaNode().start().url


def in_namespace(name: str, url: str = "", **options: object) -> str:
    """The shared node, as one test has it for itself."""
    more = "".join(f"&{option}={value}" for option, value in options.items())
    return f"{url or shared_url()}?namespace={name}{more}"
