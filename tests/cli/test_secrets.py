"""A password in a URL or in the environment shows nowhere, and hostile names harm nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psycopg
import pytest

from duly.cli.commands import duly
from duly.cli.dead_commands import dead
from tests.cli.conftest import SHOP, Place, end, shop_on
from tests.postgres.test_broker_erasing import everything
from tests.servers.postgres import PostgresServer, Schema
from tests.waiting import eventually

ROOT = str(Path(__file__).parents[2])
CANARY = "canary-7f3a9e"
HOSTILE = [
    "'; drop table duly_messages; --",
    '" or 1=1 --',
    "%",
    "*",
    "../../etc/passwd",
    "{0.__class__}",
    "[bold red]x[/bold red]",
    "a\x1b[31mb",
    "\u202eevil",
    "x" * 10_000,
]

# What each command wants beside the app.
COMMANDS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("run",): (),
    ("contract",): (),
    ("status",): (),
    ("init",): (),
    ("doctor",): (),
    ("publish",): ("orders", "--from", "-", "--format", "jsonl", "--batch-name", "b"),
    ("pause",): ("billing",),
    ("resume",): ("billing",),
    ("rewind",): ("billing", "--to", "earliest", "--new-epoch", "e", "--yes"),
    ("drop",): ("billing", "--yes"),
    ("trace",): ("o-1",),
    ("tail",): ("orders", "--from", "earliest", "--no-follow"),
    ("erase",): ("--key", "k", "--yes"),
    ("dead", "list"): (),
    ("dead", "show"): ("1",),
    ("dead", "replay"): ("--all", "--yes"),
    ("dead", "discard"): ("--all", "--yes"),
}

URLS = {
    "an unknown scheme": f"mongodb://ann:{CANARY}@host/db",
    "no proper URL": f"sqlite://ann:{CANARY}@[host/db",
    "a host where none may be": f"sqlite://ann:{CANARY}@host/shop.db",
    "an unknown option": f"sqlite:///shop.db?password={CANARY}",
    "a broker that is none": f"redis+{CANARY}",
    "an option that libpq does not know": f"postgresql://ann:{CANARY}@127.0.0.1:1/shop?nosuch=1",
}


def test_every_command_is_tried():
    # adopt takes a URL and no app: below.
    single = duly.commands.keys() - {"dead", "demo", "adopt"}
    there = [*single, *(f"dead {name}" for name in dead.commands)]
    assert sorted(" ".join(command) for command in COMMANDS) == sorted(there)


EVERY_COMMAND = """
from duly.cli import run
from tests.cli.test_secrets import COMMANDS
for command, more in COMMANDS.items():
    print("STATUS", *command, run([*command, "shop:app", *more]), flush=True)
"""


@pytest.mark.parametrize("what", URLS)
@pytest.mark.parametrize("where", ["broker", "store"])
def test_a_password_shows_nowhere(place: Place, what: str, where: str):
    """Every command fails, in one line that says what is wrong, and writes it nowhere."""
    made, from_env = 'duly.App("shop", broker="sqlite:///shop.db")', 'duly.App.from_env("shop")'
    assert made in SHOP
    place.write("shop.py", SHOP.replace(made, from_env))
    place.write("every.py", EVERY_COMMAND)
    named = {"broker": "sqlite:///shop.db", "store": "", where: URLS[what]}
    environment = place.environment(
        DULY_BROKER=named["broker"], DULY_STORE=named["store"], TOKEN=CANARY, PYTHONPATH=ROOT
    )
    ended = subprocess.run(
        [sys.executable, "every.py"],
        cwd=place.path,
        env=environment,
        capture_output=True,
        text=True,
        input='{"order": "o", "cents": 1}',
        timeout=120,
        check=False,
    )
    said = ended.stdout + ended.stderr
    statuses = [line.split() for line in ended.stdout.splitlines() if line.startswith("STATUS")]
    assert len(statuses) == len(COMMANDS), said
    assert {status for *_, status in statuses} <= {"1", "2"}, said
    assert CANARY not in said
    assert "Traceback" not in said
    written = b"".join(path.read_bytes() for path in place.path.rglob("shop.db*") if path.is_file())
    assert CANARY.encode() not in written


EVERY_COMMAND_BUT_RUN = EVERY_COMMAND.replace(
    "in COMMANDS.items():", "in COMMANDS.items():\n    if command == ('run',): continue"
)


@pytest.mark.parametrize("how", ["each succeeds", "the role is unknown", "no server is there"])
def test_a_password_shows_nowhere_though_a_server_is_there(
    place: Place, pg_server: PostgresServer, how: str
):
    """It stands in no output, in no table, and in nothing that the server is told to run."""
    user = "nobody" if how == "the role is unknown" else "duly"
    url = pg_server.url_of("duly", user=f"{user}:{CANARY}")
    if how == "no server is there":
        url = f"postgresql://127.0.0.1:1/shop?user=ann&password={CANARY}"
    place.write("shop.py", shop_on(url))
    place.write("every.py", EVERY_COMMAND_BUT_RUN)
    ended = subprocess.run(
        [sys.executable, "every.py"],
        cwd=place.path,
        env=place.environment(PYTHONPATH=ROOT),
        capture_output=True,
        text=True,
        input='{"order": "o", "cents": 1}',
        timeout=300,
        check=False,
    )
    said = ended.stdout + ended.stderr
    statuses = [line.split() for line in ended.stdout.splitlines() if line.startswith("STATUS")]
    assert len(statuses) == len(COMMANDS) - 1, said
    # Nothing is dead to be shown, and none of the id is left to be traced.
    expected = {"0", "1", "2"} if how == "each succeeds" else {"1", "2"}
    assert {status for *_, status in statuses} <= expected, said
    assert CANARY not in said
    assert "Traceback" not in said
    if how == "each succeeds":
        assert statuses[0][-1] == statuses[1][-1] == "0", said
        assert CANARY not in everything(Schema(pg_server.url, ""), "duly")
        assert CANARY not in pg_server.log()


def test_a_worker_shows_no_password(place: Place, pg_server: PostgresServer):
    place.write("shop.py", shop_on(pg_server.url_of("duly", user=f"duly:{CANARY}")))
    process = place.start("run", "shop:app", "--processes", "1")
    with psycopg.connect(pg_server.url, autocommit=True) as connection:
        present = "select 1 from pg_tables where schemaname = 'duly' and tablename = 'attendance'"
        eventually(lambda: connection.execute(present).fetchall(), "the tables", timeout_s=60)
        attends = "select 1 from duly.attendance"
        eventually(lambda: connection.execute(attends).fetchall(), "it works", timeout_s=60)
    pg_server.stop()  # which it says, and goes on trying
    ended = end(process)
    assert CANARY not in ended.out + ended.err
    assert "Traceback" not in ended.err


def test_adopting_shows_no_password(place: Place):
    ended = subprocess.run(
        [sys.executable, "-m", "duly", "adopt", f"postgresql://duly:{CANARY}@127.0.0.1:1/shop"],
        cwd=place.path,
        env=place.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode in (1, 2), said
    assert "127.0.0.1" in said
    assert CANARY not in said
    assert "Traceback" not in said


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(f"{SHOP}\napp.declare(events, pings)\n")
    (tmp_path / "attack.py").write_text(ATTACK)
    return tmp_path


ATTACK = """
import sys
from duly.cli import run
from duly.cli.loading import load_app
from tests.cli.test_secrets import COMMANDS, HOSTILE
app = load_app("shop:app")
shop = sys.modules["shop"]
with app:
    app.publish(shop.orders, shop.Order("o-1", 1), id="o-1", key="k")
run(["init", "shop:app"])
statuses = set()
for text in HOSTILE:
    for command, more in (
        (("pause",), [text]), (("resume",), [text]), (("drop",), [text, "--yes"]),
        (("rewind",), [text, "--to", "earliest", "--yes"]),
        (("rewind",), ["billing", "--to", text, "--yes"]),
        (("rewind",), ["billing", "--to", "1s", "--new-epoch", text, "--yes"]),
        (("trace",), [text]), (("trace",), ["o-1", "--source", text]),
        (("trace",), ["o-1", "--topic", text]), (("tail",), [text, "--no-follow", "--from", "1s"]),
        (("erase",), ["--key", text, "--yes"]), (("erase",), ["--id", text, "--yes"]),
        (("erase",), ["--key", "k", "--topic", text, "--yes"]),
        (("publish",), [text, "--from", "-"]),
        (("dead", "list"), ["--consumer", text]), (("dead", "list"), ["--error", text]),
        (("dead", "discard"), ["--id", text, "--yes"]), (("run",), ["--consumers", text]),
    ):
        statuses.add(run([*command, "shop:app", *more]))
print("STATUSES", sorted(statuses))
with app:
    broker, _ = app.backends()
    print("LEFT", [(s.name, s.backlog) for s in broker.subscriptions()])
"""


def test_hostile_names_and_ids_pass_through_every_command_unharmed(shop: Path):
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [sys.executable, "attack.py"],
        cwd=shop,
        env={**kept, "PYTHONPATH": ROOT, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        input="",
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "STATUSES [0, 1, 2]" in ended.stdout
    assert "LEFT [('billing', 1)]" in ended.stdout
    assert "\x1b[31m" not in ended.stdout + ended.stderr
    assert "\u202e" not in ended.stdout + ended.stderr
