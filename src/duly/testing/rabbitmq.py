"""A RabbitMQ node of one's own, for tests that may kill it.

    with PrivateNode() as node:
        duly.App("shop", broker=node.url)

Its programs are those that are installed (Debian: rabbitmq-server); name, ports, folder, cookie and
port mapper are its own, and all listen on the loopback interface. Nothing of a node that the
machine itself runs is touched.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from duly.brokers.rabbitmq.address import address_of
from duly.brokers.rabbitmq.link import Link
from duly.errors import BrokerError, ConfigurationError
from duly.testing.chaos.processes import alive, eventually, free_port

_PROGRAMS = Path("/usr/lib/rabbitmq/bin")
_STARTS_S = 60.0
# Busy waiting is for machines that do nothing else.
_ERLANG = "+sbwt none +sbwtdcpu none +sbwtdio none -kernel inet_dist_use_interface {127,0,0,1}"


class NoNode(ConfigurationError):
    """RabbitMQ cannot be started here."""


def is_installed() -> bool:
    """Whether the programs are there."""
    return os.access(_PROGRAMS / "rabbitmq-server", os.X_OK) and shutil.which("epmd") is not None


@functools.cache
def _user() -> pwd.struct_passwd | None:
    """Whom to run as; None: as who asks."""
    if os.geteuid() != 0:
        return None
    for name in ("rabbitmq", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    return None


def _run_as() -> dict[str, Any]:
    user = _user()
    return {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


class PrivateNode:
    """A node from `start` until `close`. ``settings`` are lines of rabbitmq.conf, ``arguments``
    those of its virtual machine; ``managed``: with the management interface, at
    ``management_port``; ``plugins`` are others. ``beside`` another it has the same cookie and port
    mapper, as a cluster needs. Raises `NoNode` where no server is installed.
    """

    def __init__(
        self,
        *settings: str,
        arguments: str = "",
        managed: bool = False,
        plugins: Sequence[str] = (),
        beside: PrivateNode | None = None,
    ) -> None:
        if not is_installed():
            raise NoNode("no RabbitMQ server is installed: install one (Debian: rabbitmq-server)")
        self.port = free_port()
        self.management_port = free_port() if managed else None
        self.folder = Path(tempfile.mkdtemp(prefix="duly-rabbitmq-"))
        self._arguments = f"{_ERLANG} {arguments}"
        self._mapper_port: int = free_port() if beside is None else beside._mapper_port
        self._cookie: str = secrets.token_hex(16) if beside is None else beside._cookie
        self._beside = beside
        self.name = f"duly{secrets.token_hex(4)}@localhost"
        self._log = self.folder / "log.txt"
        self._process: subprocess.Popen[Any] | None = None
        self._mapper: subprocess.Popen[Any] | None = None
        self._write(settings, plugins)
        atexit.register(self.close)

    def _write(self, settings: Sequence[str], plugins: Sequence[str]) -> None:
        lines = [f"listeners.tcp.1 = 127.0.0.1:{self.port}", "log.file.level = warning", *settings]
        if self.management_port is not None:
            plugins = ["rabbitmq_management", *plugins]
            lines += [
                "management.tcp.ip = 127.0.0.1",
                f"management.tcp.port = {self.management_port}",
            ]
        (self.folder / "rabbitmq.conf").write_text("\n".join([*lines, ""]))
        cookie = self.folder / ".erlang.cookie"
        cookie.write_text(self._cookie)
        cookie.chmod(0o400)
        (self.folder / "plugins").write_text(f"[{','.join(plugins)}].\n")
        user = _user()
        if user is not None:
            for path in (self.folder, *self.folder.iterdir()):
                os.chown(path, user.pw_uid, user.pw_gid)

    @property
    def url(self) -> str:
        """The default virtual host, as the user that may come from loopback only."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    @property
    def is_running(self) -> bool:
        """Whether it was started, and not killed since."""
        return self._process is not None

    def _environment(self) -> dict[str, str]:
        nowhere, folder = str(self.folder / "none"), self.folder
        return {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            "LANG": "C.UTF-8",
            "HOME": str(folder),
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_CONF_ENV_FILE": nowhere,
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": nowhere,
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_LOGS": str(self._log),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": self._arguments,
            "ERL_EPMD_PORT": str(self._mapper_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }

    def _popen(self, *command: Any) -> subprocess.Popen[Any]:
        with (self.folder / "out.txt").open("ab") as out:
            return subprocess.Popen(
                command,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                env=self._environment(),
                start_new_session=True,
                **_run_as(),
            )

    def start(self) -> Self:
        """Start, on the same port and with the same data as before; returns when it answers."""
        if self._mapper is None and self._beside is None:
            self._mapper = self._popen("epmd")
        self._process = self._popen(_PROGRAMS / "rabbitmq-server")
        eventually(self._answers, "RabbitMQ answers", self.log, _STARTS_S)
        return self

    def _answers(self) -> bool:
        assert self._process is not None, "it was started"
        if self._process.poll() is not None:
            raise NoNode(f"RabbitMQ ended:\n{self.log()[-2000:]}")
        try:
            with self.connected():
                return True
        except BrokerError:
            return False

    @contextlib.contextmanager
    def connected(self) -> Iterator[Link]:
        """A connection of one's own, to look around. Raises `BrokerError`."""
        link = Link(address_of(self.url, self.url), "looking", lambda _: None, lambda: None)
        link.start()
        try:
            yield link
        finally:
            link.close()

    def kill(self) -> None:
        """Kill -9 of the node, and of its helpers."""
        assert self._process is not None, "the node runs"
        group = self._process.pid
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        self._process.wait(30)
        self._process = None
        eventually(lambda: not alive(group), "the node is gone")

    def stop(self) -> None:
        """Shut down, as an operator does."""
        if self._process is not None:
            self.control("stop")
            self._process.wait(60)
            self._process = None

    def control(self, *command: str) -> str:
        """What ``rabbitmqctl`` says to this. Raises `RuntimeError`."""
        done = subprocess.run(
            [_PROGRAMS / "rabbitmqctl", "--node", self.name, "--quiet", *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd=self.folder,
            env=self._environment(),
            **_run_as(),
        )
        if done.returncode != 0:
            raise RuntimeError(f"rabbitmqctl {' '.join(command)}: {done.stdout}{done.stderr}")
        return str(done.stdout)

    def messages(self) -> Mapping[str, int]:
        """How many messages are in each queue, claimed or not. Of quorum queues they are counted
        every few seconds only (``-rabbit quorum_tick_interval`` milliseconds, an argument).
        """
        told = self.control("list_queues", "--no-table-headers", "name", "messages")
        lines = [line.rpartition("\t") for line in told.splitlines() if "\t" in line]
        return {name: int(count) for name, _, count in lines}

    def is_settled(self) -> bool:
        """Whether every quorum queue is on disk. This version writes down its name and its term
        some seconds after it has answered that it is declared; killed before, it comes back with a
        queue that answers nothing.
        """
        [place] = self.folder.glob("mnesia/*/quorum/*")
        names = [path.name.encode() for path in place.iterdir() if path.is_dir()]
        files = [path.read_bytes() for path in place.glob("*.dets")]
        return all(name in file for name in names for file in files)

    def log(self) -> str:
        """What the node has written so far."""
        parts = [path for path in (self.folder / "out.txt", self._log) if path.exists()]
        return "\n".join(path.read_text(errors="replace") for path in parts)

    def leave(self) -> None:
        """End it at once; its data stay, also behind the end of this process."""
        self._end()
        atexit.unregister(self.close)

    def _end(self) -> None:
        if self._process is not None:
            self.kill()
        if self._mapper is not None:
            self._mapper.kill()
            self._mapper.wait(30)
            self._mapper = None

    def close(self) -> None:
        """End it at once, and remove its data."""
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()
