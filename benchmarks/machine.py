"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
import sqlite3
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rows import python_with

_PACKAGES = {
    "sqlite": ("duly", "msgspec", "huey", "persist-queue"),
    "postgres": ("duly", "psycopg", "msgspec", "pgqueuer", "procrastinate"),
    "rabbitmq": ("duly", "amqp", "psycopg", "msgspec", "faststream", "dramatiq", "celery"),
    "kafka": (
        *("duly", "confluent-kafka", "psycopg", "msgspec"),
        *("faststream", "aiokafka"),
    ),
}

# In environments of their own, with the driver that they want.
_APART = {"kafka": ("quixstreams",)}


def machine(on: str, file_system: str) -> list[tuple[str, str]]:
    """The lines that head the results on ``sqlite``, ``postgres``, ``rabbitmq`` or ``kafka``."""
    return [
        ("processor", f"{cpu_model()}, {os.cpu_count()} cores"),
        ("memory", memory()),
        ("system", f"{platform.system()} {platform.release()}, {file_system}"),
        ("Python", f"{platform.python_implementation()} {platform.python_version()}"),
        *_servers(on),
        *((name, installed(name)) for name in _PACKAGES[on]),
        *((name, installed_apart(name)) for name in _APART.get(on, ())),
    ]


def _servers(on: str) -> list[tuple[str, str]]:
    if on == "sqlite":
        return [("SQLite", sqlite3.sqlite_version)]
    import postgres_place

    servers = [("PostgreSQL", postgres_place.server_version())]
    if on == "rabbitmq":
        import rabbitmq_place

        servers.append(("RabbitMQ", rabbitmq_place.server_version()))
    if on == "kafka":
        import kafka_place

        servers.append(("Kafka", kafka_place.server_version()))
    return [(name, f"{it}, its defaults, over TCP on this machine") for name, it in servers]


def cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory() -> str:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{pages / 2**30:.0f} GiB"


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def installed_apart(name: str) -> str:
    """The version of a peer in an environment of its own, and of its driver."""
    script = (
        f"from importlib.metadata import version as v; print(v({name!r}), v('confluent-kafka'))"
    )
    try:
        done = subprocess.run(
            [python_with(name), "-c", script], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "not installed"
    found, driver = done.stdout.split()
    return f"{found}, with confluent-kafka {driver}"


def load() -> float:
    """How many processes wanted a core in the last minute: over 1 at the start means noise."""
    return os.getloadavg()[0]
