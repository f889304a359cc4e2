"""A PostgreSQL server of one's own, for tests that may kill it.

    with PrivateServer() as server:
        duly.App("shop", broker=server.url)

Its programs are those that are installed; its data lie in a folder of its own, which goes with
it. Nothing of a server that the machine itself runs is touched.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import psycopg

from duly.errors import ConfigurationError
from duly.testing.chaos.processes import alive, eventually, free_port

DATABASE = "duly"
OTHER = "DULY_TEST_POSTGRES"
"""Names the URL of another server, where tests need not kill it."""

PROGRAMS = "DULY_TEST_POSTGRES_PROGRAMS"
"""Names the folder of a server's programs, for another version than the newest installed."""

# initdb and postgres refuse to run as root.
_USERS = ("postgres", "nobody")


class NoServer(ConfigurationError):
    """PostgreSQL cannot be started here."""


@functools.cache
def binaries() -> Path | None:
    """The folder of the newest installed server's programs, or the one that is named."""
    if named := os.environ.get(PROGRAMS):
        if not _is_complete(Path(named)):
            raise NoServer(f"{PROGRAMS}={named}: initdb and postgres are not both in it")
        return Path(named)
    found = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if _is_complete(path)]
    if found:
        return max(found, key=lambda path: float(path.parent.name))
    return next(filter(_is_complete, _told_folders()), None)


def _told_folders() -> Iterator[Path]:
    if (pg_config := shutil.which("pg_config")) is not None:
        told = subprocess.run(
            [pg_config, "--bindir"], capture_output=True, text=True, check=False, timeout=30
        )
        yield Path(told.stdout.strip())
    if (postgres := shutil.which("postgres")) is not None:
        yield Path(postgres).resolve().parent


def _is_complete(folder: Path) -> bool:
    return all(os.access(folder / program, os.X_OK) for program in ("initdb", "postgres"))


@functools.cache
def _user() -> pwd.struct_passwd | None:
    """Whom to run as; None: as who asks."""
    if os.geteuid() != 0:
        return None
    for name in _USERS:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise NoServer("there is no unprivileged user to run PostgreSQL as, and it refuses root")


def run_as() -> dict[str, Any]:
    """What `subprocess` is told, so that the server's programs agree to run."""
    user = _user()
    return {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _folder() -> Path:
    """A folder that the server's user owns."""
    folder = Path(tempfile.mkdtemp(prefix="duly-postgres-"))
    user = _user()
    if user is not None:
        os.chown(folder, user.pw_uid, user.pw_gid)
    return folder


class PrivateServer:
    """A server from `start` until `close`, with the database ``duly``, on the loopback interface.

    Its superuser is ``duly``, without a password. ``settings`` are those of postgresql.conf.
    Raises `NoServer` where none is installed, or nobody is there to run it as.
    """

    def __init__(self, settings: Sequence[str] = ()) -> None:
        programs = binaries()
        if programs is None:
            raise NoServer(
                "no PostgreSQL server is installed: install one (Debian: postgresql), or name "
                f"another with {OTHER}=URL"
            )
        self.programs = programs
        self.folder = _folder()
        self.data = self.folder / "data"
        self.settings = tuple(settings)
        self.port = free_port()
        self._log = self.folder / "log"
        self._process: subprocess.Popen[Any] | None = None
        self._initialise()

    def _initialise(self) -> None:
        """Each server's data is made anew: a copy would be the same database by its identity."""
        made = subprocess.run(
            [
                *(self.programs / "initdb", "-D", self.data, "-U", "duly"),
                *("-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            cwd="/",
            **run_as(),
        )
        if made.returncode != 0:
            raise NoServer(f"initdb failed: {made.stderr.strip()}")

    @property
    def url(self) -> str:
        """The database ``duly``, over TCP."""
        return self.url_of(DATABASE)

    @property
    def near_url(self) -> str:
        """The same by its socket in the file system, which takes half as long."""
        return f"postgresql://duly@/{DATABASE}?host={self.folder}&port={self.port}"

    def url_of(self, database: str, *, user: str = "duly") -> str:
        """A database of this server."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    @property
    def pid(self) -> int:
        """The process that all others are children of."""
        assert self._process is not None, "the server runs"
        return self._process.pid

    def start(self) -> Self:
        """Start, on the same port and with the same data as before; returns when it answers."""
        options = [
            "listen_addresses=127.0.0.1",
            f"port={self.port}",
            f"unix_socket_directories={self.folder}",
            "max_connections=200",
            "log_line_prefix=%m [%p] %a ",
            *self.settings,
        ]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(self.programs / "postgres", "-D", self.data),
                    *(part for option in options for part in ("-c", option)),
                ],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
                **run_as(),
            )
        eventually(self._answers, "PostgreSQL answers", self.log)
        self._create()
        return self

    def _create(self) -> None:
        with psycopg.connect(self.url_of("postgres"), autocommit=True) as connection:
            if connection.execute("select pg_is_in_recovery()").fetchall() == [(True,)]:
                return
            known = connection.execute(
                "select 1 from pg_database where datname = %s", (DATABASE,)
            ).fetchall()
            if not known:
                connection.execute(f"create database {DATABASE}")

    def stop(self) -> None:
        """End every session and shut down, as an operator does."""
        self._end(signal.SIGINT)

    def abandon(self) -> None:
        """Shut down at once, as in ``pg_ctl stop -m immediate``: the next start recovers."""
        self._end(signal.SIGQUIT)

    def _end(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(60)
            self._process = None

    def kill(self) -> None:
        """Kill -9 of every process of the server."""
        assert self._process is not None, "the server runs"
        children = children_of(self._process.pid)
        # The first of them first, or it would notice the others' deaths and act.
        for pid in (self._process.pid, *children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(60)
        self._process = None
        # Until then the new one would be refused the memory that the old ones share.
        eventually(lambda: not any(map(alive, children)), "the server's processes are gone")

    def log(self) -> str:
        """What the server has written so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def close(self) -> None:
        """Stop it, and remove its data."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise NoServer(f"PostgreSQL ended:\n{self.log()[-2000:]}")
        try:
            psycopg.connect(self.url_of("postgres"), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True


def children_of(parent: int) -> list[int]:
    """The processes that this one has started and not buried yet."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, ppid = stat.read_text().rpartition(")")[2].split()[:2]
            if int(ppid) == parent and state not in "ZX":
                found.append(int(stat.parent.name))
    return found
