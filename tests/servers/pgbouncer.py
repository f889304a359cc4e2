"""PgBouncer for tests: one of a test's own in front of a server, to be killed and started again."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import psycopg
from psycopg.conninfo import conninfo_to_dict

from tests.servers.postgres import free_port, missing, run_as
from tests.waiting import eventually

# It refuses to run as root, as the server does, and is not on everybody's path.
_PROGRAM = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"


@functools.cache
def version() -> tuple[int, ...]:
    """Of the installed one; skips where there is none."""
    if not os.access(_PROGRAM, os.X_OK):
        missing("PgBouncer is not installed")
    said = subprocess.run([_PROGRAM, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"(\d+(?:\.\d+)+)", said.stdout)
    assert found is not None, said.stdout
    return tuple(map(int, found[1].split(".")))


class PgBouncer:
    """A pooler in front of the server that ``url`` names, from `start` until `stop`.

    ``sessions`` are all that it has of the server's; ``settings`` are those of pgbouncer.ini.
    """

    def __init__(
        self,
        url: str,
        *,
        mode: Literal["transaction", "session"] = "transaction",
        sessions: int = 4,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        version()
        named = conninfo_to_dict(url)
        self.port = free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="duly-pgbouncer-"))
        self._folder.chmod(0o755)
        self._log = self._folder / "log"
        self._process: subprocess.Popen[Any] | None = None
        self._database = str(named["dbname"])
        self._user = str(named["user"])
        users = self._folder / "users"
        users.write_text(f'"{self._user}" ""\n')
        all_settings: dict[str, object] = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "trust",
            "auth_file": users,
            "pool_mode": mode,
            "default_pool_size": sessions,
            "max_client_conn": 200,
            # What the tests' own connections say; duly's say nothing of the kind.
            "ignore_startup_parameters": "options",
            **(settings or {}),
        }
        lines = [f"{name} = {value}" for name, value in all_settings.items()]
        target = f"* = host={named['host']} port={named['port']}"
        self._ini = self._folder / "pgbouncer.ini"
        self._ini.write_text("\n".join(["[databases]", target, "[pgbouncer]", *lines, ""]))

    @property
    def url(self) -> str:
        """The same database, by way of this pooler."""
        return f"postgresql://{self._user}@127.0.0.1:{self.port}/{self._database}"

    def start(self) -> Self:
        """Start, on the same port as before; returns when it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [_PROGRAM, self._ini], stdout=log, stderr=log, cwd="/", **run_as()
            )
        eventually(self._answers, "PgBouncer answers", self.log)
        return self

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None, "it runs"
        self._process.kill()
        self._process.wait(30)
        self._process = None

    def log(self) -> str:
        """What it has written so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"PgBouncer ended:\n{self.log()}"
        with contextlib.suppress(psycopg.OperationalError):
            psycopg.connect(self.url, connect_timeout=5).close()
            return True
        return False
