"""RabbitMQ for tests: one node a session, or one of a test's own that it may kill.

``DULY_TEST_RABBITMQ=URL`` names another for the first; its user must be allowed to declare, write
and read everything in its virtual host.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import amqp
import pytest

from duly.testing.conformance.plugin import in_ci
from tests.servers.postgres import free_port
from tests.waiting import alive, eventually

OTHER = "DULY_TEST_RABBITMQ"
_PROGRAMS = Path("/usr/lib/rabbitmq/bin")
# Busy waiting is for machines that do nothing else.
_ERLANG = "+sbwt none +sbwtdcpu none +sbwtdio none -kernel inet_dist_use_interface {127,0,0,1}"


def missing(reason: str) -> NoReturn:
    """Skip on a laptop, fail in CI: there what is not tested is not promised."""
    if in_ci():
        pytest.fail(f"{reason}, and CI is set: make servers", pytrace=False)
    pytest.skip(f"{reason}. Install it with: make servers (or set {OTHER}=URL)")


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


class RabbitMQNode:
    """A node of the tests' own, from `start` until `close`: its name, ports, folder, cookie and
    port mapper are its own, and all listen on the loopback interface. ``settings`` are lines of
    rabbitmq.conf; ``managed``: with the management interface, at ``management_port``; ``plugins``
    are others. ``beside`` another it has the same cookie and port mapper, as a cluster needs.
    """

    def __init__(
        self,
        *settings: str,
        managed: bool = False,
        plugins: Sequence[str] = (),
        beside: RabbitMQNode | None = None,
    ) -> None:
        if not os.access(_PROGRAMS / "rabbitmq-server", os.X_OK) or shutil.which("epmd") is None:
            missing("no RabbitMQ server is installed")
        self.port = free_port()
        self.management_port = free_port() if managed else None
        self.folder = Path(tempfile.mkdtemp(prefix="duly-rabbitmq-"))
        self._mapper_port: int = free_port() if beside is None else beside._mapper_port
        self._cookie: str = secrets.token_hex(16) if beside is None else beside._cookie
        self._beside = beside
        self.name = f"duly{secrets.token_hex(4)}@localhost"
        self._log = self.folder / "log.txt"
        self._node_process: subprocess.Popen[Any] | None = None
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
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": _ERLANG,
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
        self._node_process = self._popen(_PROGRAMS / "rabbitmq-server")
        eventually(self._answers, "RabbitMQ answers", self.log, 60.0)
        return self

    def start_again(self) -> None:
        """Start, unless it runs."""
        if not self.is_running:
            self.start()

    @property
    def is_running(self) -> bool:
        """Whether it was started, and not killed since."""
        return self._node_process is not None

    def _answers(self) -> bool:
        assert self._node_process is not None
        assert self._node_process.poll() is None, f"RabbitMQ ended:\n{self.log()[-4000:]}"
        with contextlib.suppress(OSError, amqp.exceptions.AMQPError):
            connection = amqp.Connection(f"127.0.0.1:{self.port}", connect_timeout=5)
            connection.connect()
            connection.close()
            return True
        return False

    def kill(self) -> None:
        """kill -9 of the node, and of its helpers."""
        assert self._node_process is not None, "the node runs"
        group = self._node_process.pid
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        self._node_process.wait(30)
        self._node_process = None
        eventually(lambda: not alive(group), "the node is gone")

    def remembers(self, queue: str) -> bool:
        """Whether a quorum queue is on disk. This version writes down its name and its term some
        seconds after it has answered that it is declared; killed before, it comes back with a
        queue that answers nothing.
        """
        files = [path.read_bytes() for path in self.folder.glob("mnesia/*/quorum/*/*.dets")]
        # What says that a file is whole: the third word of its header.
        whole = all(int.from_bytes(file[8:12]) == 1 for file in files)
        return whole and any(queue.encode() in file for file in files)

    def stop(self) -> None:
        """Shut down, as an operator does."""
        if self._node_process is not None:
            self.control("stop")
            self._node_process.wait(60)
            self._node_process = None

    def restart(self) -> Self:
        """Shut down and start."""
        self.stop()
        return self.start()

    def control(self, *command: str) -> str:
        """What ``rabbitmqctl`` says to this."""
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
        assert done.returncode == 0, done.stdout + done.stderr
        return str(done.stdout)

    def log(self) -> str:
        """What the node has written so far."""
        parts = [path for path in (self.folder / "out.txt", self._log) if path.exists()]
        return "\n".join(path.read_text(errors="replace") for path in parts)

    def close(self) -> None:
        """End it at once, and remove its data."""
        if self._node_process is not None:
            self.kill()
        if self._mapper is not None:
            self._mapper.kill()
            self._mapper.wait(30)
            self._mapper = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


@functools.cache
def shared_url() -> str:
    """The virtual host that tests share, each in a namespace of its own; skips where there is
    none.
    """
    if named := os.environ.get(OTHER):
        return named
    return RabbitMQNode().start().url


def in_namespace(name: str, url: str = "") -> str:
    """The shared virtual host, as one test has it for itself."""
    url = url or shared_url()
    mark = "&" if "?" in url else "?"
    return f"{url}{mark}namespace={name}"


@contextlib.contextmanager
def channel(url: str = "") -> Iterator[Any]:
    """A channel of a test's own, to look at what duly made and to be a stranger."""
    from duly.brokers.rabbitmq.address import address_of

    address = address_of(url or shared_url(), "the tests' URL")
    host, port = address.hosts[0]
    connection = amqp.Connection(
        f"{host}:{port}",
        userid=address.user,
        password=address.password,
        virtual_host=address.vhost,
        ssl=address.tls_for(host),
    )
    connection.connect()
    try:
        yield connection.channel()
    finally:
        connection.close()
