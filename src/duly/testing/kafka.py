"""A Kafka node of one's own, for tests that may kill it.

    with PrivateNode() as node:
        duly.App("shop", broker=node.url)

Its programs are the jars of an installed Kafka, which ``KAFKA_HOME`` names, or those that duly's
own tests have fetched (``make servers``), run by the machine's Java. Ports and folder are its own,
and all listen on the loopback interface.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from duly.errors import ConfigurationError
from duly.testing.chaos.processes import alive, eventually, free_port

HOME = "KAFKA_HOME"

_STARTS_S = 180.0
# Starts in two seconds, and stays below 400 MB.
_JAVA = (
    *("-Xms96m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData"),
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
transaction.abort.timed.out.transaction.cleanup.interval.ms=500
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
# Here, and no louder, stands which partitions an end of a transaction was not told to.
logger.transactions.name = kafka.coordinator.transaction
logger.transactions.level = info
"""
_WHOLE = re.compile(r"kafka-(\d+)\.(\d+)\.(\d+)")


class NoNode(ConfigurationError):
    """Kafka cannot be started here."""


def jars() -> Path | None:
    """The folder of Kafka's jars; None: there is none."""
    if named := os.environ.get(HOME):
        folder = Path(named) / "libs"
        return folder if folder.is_dir() else None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "duly-tests"
    found = [(match, path) for path in cache.glob("kafka-*") if (match := _version(path))]
    return max(found)[1] if found else None


def _version(path: Path) -> tuple[int, ...]:
    """Of what was fetched as a whole; empty for anything else."""
    match = _WHOLE.fullmatch(path.name)
    return tuple(map(int, match.groups())) if match else ()


def is_installed() -> bool:
    """Whether the programs are there."""
    return shutil.which("java") is not None and jars() is not None


def new_cluster() -> str:
    """An id for a cluster."""
    return f"A{base64.urlsafe_b64encode(secrets.token_bytes(16)).decode()[1:22]}"


class PrivateNode:
    """A node from `start` until `close`, broker and controller in one.

    ``settings`` are further lines of its properties, which may name {port}, {control} and {folder};
    of two for one name the later counts. ``cluster`` is the id of the cluster that it is one of.
    ``making`` are further arguments for the program that makes its storage. With many clients it
    needs more heap. Raises `NoNode` where
    no Kafka is installed.
    """

    def __init__(
        self,
        *settings: str,
        cluster: str = "",
        making: Sequence[str] = (),
        heap_mb: int = 256,
    ) -> None:
        found = jars()
        if shutil.which("java") is None:
            raise NoNode("no Java is installed: install one (Debian: default-jre-headless)")
        if found is None:
            raise NoNode(f"no Kafka is installed: install one, and name its folder in {HOME}")
        self._jars: Path = found
        self._cluster = cluster or new_cluster()
        self._making = making
        self._heap = f"-Xmx{heap_mb}m"
        self.port, self.control_port = free_port(), free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="duly-kafka-"))
        self._process: subprocess.Popen[Any] | None = None
        given = "\n".join([_SETTINGS, *settings, ""]).format(
            port=self.port, control=self.control_port, folder=self.folder
        )
        (self.folder / "server.properties").write_text(given)
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
                ["java", *_JAVA, self._heap, logging, "-cp", f"{self._jars}/*", *command],
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                start_new_session=True,
            )

    def start(self) -> Self:
        """Start, on the same port and with the same data as before; returns when it answers."""
        self.begin()
        eventually(self.answers, "Kafka answers", self.log, _STARTS_S)
        return self

    def begin(self) -> None:
        """Start, and do not wait: one of several answers when most of them are there."""
        properties = str(self.folder / "server.properties")
        if not (self.folder / "data").exists():
            making = ("format", "--cluster-id", self._cluster, "--config", properties)
            formatting = self._popen("kafka.tools.StorageTool", *making, *self._making)
            if formatting.wait(_STARTS_S) != 0:
                raise NoNode(f"Kafka's storage cannot be made:\n{self.log()[-2000:]}")
        self._process = self._popen("kafka.Kafka", properties)

    def answers(self) -> bool:
        """Whether it is registered and serves: only then it listens."""
        assert self._process is not None, "it was started"
        if self._process.poll() is not None:
            raise NoNode(f"Kafka ended:\n{self.log()[-2000:]}")
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """Kill -9."""
        process = self._leave()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
        eventually(lambda: not alive(process.pid), "the node is gone")

    def stop(self, within_s: float = 60.0) -> None:
        """Shut down, as an operator does; and be killed when that takes for too long, as by his
        supervisor.
        """
        process = self._leave()
        process.terminate()
        try:
            process.wait(within_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)

    def _leave(self) -> subprocess.Popen[Any]:
        assert self._process is not None, "the node runs"
        process, self._process = self._process, None
        return process

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

    def leave(self) -> None:
        """End it at once; its data stay, also behind the end of this process."""
        self._end()
        atexit.unregister(self.close)

    def _end(self) -> None:
        if self._process is not None:
            self.kill()

    def close(self) -> None:
        """End it at once, and remove its data."""
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()
