"""A user's mistake costs one line that says what to do, exit status 2, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from duly.cli import run
from tests.cli.conftest import SHOP, Place

BROKEN = "import duly\nx = 1 / 0\n"
MISSING = "import duly\nimport pendulum_of_poe\n"
SYNTAX = "def broken(:\n    pass\n"
NO_GUARANTEE = 'import duly\norders = duly.Topic("orders", dict)\n'
NOT_AN_APP = "app = 42\nother = 1\n"


@pytest.mark.parametrize("command", [("run",), ("contract",), ("publish",)])
@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("shop", "give module:attribute, such as shop:app"),
        ("shop.py", "give the module, not its file: shop:app"),
        ("shop:", "such as shop:app"),
        ("gone:app", "there is no module 'gone'"),
        ("shop.sub:app", "there is no module 'shop.sub'"),
        ("shop:ap", "has no attribute 'ap'; its apps are shop:app"),
        ("shop:orders", "'shop:orders' is no duly.App but of type 'Topic'; its apps are shop:app"),
        ("broken:app", "importing 'broken' failed: ZeroDivisionError: division by zero"),
        ("broken:app", "broken.py, line 2"),
        ("missing:app", "No module named 'pendulum_of_poe'"),
        ("missing:app", "missing.py, line 2"),
        ("syntax:app", "syntax.py, line 1"),
        ("loose:app", "topic 'orders' has no guarantee"),
        ("loose:app", "loose.py, line 2"),
    ],
)
def test_naming_the_app(shop: Place, command: tuple[str, ...], spec: str, said: str):
    for name, text in (
        ("broken", BROKEN),
        ("missing", MISSING),
        ("syntax", SYNTAX),
        ("loose", NO_GUARANTEE),
    ):
        shop.write(f"{name}.py", text)
    more = ("orders", "--from", "-") if command == ("publish",) else ()
    ended = shop.duly(*command, spec, *more, input="")
    assert ended.status == 2
    # The supervisor's own log lines, JSON here, stand beside the one for people.
    (line, *table) = [line for line in ended.err.splitlines() if not line.startswith("{")]
    assert line.startswith("duly: ")
    assert said in "\n".join([line, *table])
    assert bool(table) == (spec == "loose:app")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "Missing argument 'MODULE:APP'"),
        (["run", "shop:app", "--processes", "0"], "0 is not in the range"),
        (["run", "shop:app", "--drain-s", "-1"], "is not in the range"),
        (["run", "shop:app", "--consumers", "billing,"], "names with commas between"),
        (["run", "shop:app", "--fast"], "No such option"),
        (["dance"], "No such command"),
        (["publish", "shop:app", "orders"], "Missing option '--from'"),
        (["run", "shop:app", "--consumers", "gone"], "no consumer 'gone'; there are billing"),
        (["publish", "shop:app", "gone", "--from", "x"], "no topic 'gone' here; there are: events"),
        (["publish", "shop:app", "orders", "--from", "x"], "x: No such file"),
        (["publish", "shop:app", "orders", "--from", "."], ".: Is a directory"),
        (["publish", "shop:app", "orders", "--from", "-"], "give --id FIELD, or --batch-name NAME"),
        (["trace", "shop:app", "\udcff"], r"argument b'\xff' is no text in UTF-8"),
        (["pause", "shop:app", "\udcff"], "is no text"),
        (["erase", "shop:app", "--key=\udcff", "--yes"], "is no text"),
        (["dead", "list", "shop:app", "--consumer", "\udcff"], "is no text"),
        (["dead", "list", "shop:app", "--limit", str(1 << 63)], "is not in the range"),
        (["dead", "show", "shop:app", str(1 << 63)], "is not in the range"),
        (["dead", "replay", "shop:app", str((1 << 63) - 1), "--yes"], "is not in the range"),
        (["publish", "shop:app", "orders", "--from", "\udcff"], "No such file"),
    ],
)
def test_options(shop: Place, arguments: list[str], said: str):
    ended = shop.duly(*arguments, input="")
    assert ended.status == 2
    assert said in ended.err


def test_a_refused_contract_is_said_once_by_run_and_by_contract(place: Place):
    refused = SHOP.replace('sqlite:///shop.db"', 'memory://?kind=log"').replace(
        'guarantee="exactly-once")\ndef', 'guarantee="exactly-once", inbox_retention_s=0)\ndef'
    )
    place.write("shop.py", refused)
    for command in (("contract", "shop:app"), ("run", "shop:app")):
        ended = place.duly(*command)
        assert ended.status == 2
        assert ended.err.count("refused to start on broker in-memory log") == 1
        assert ended.err.count("Remedy: ") == 1


def test_a_file_that_is_no_database(shop: Place):
    (shop.path / "shop.db").write_bytes(b"this is a letter to my aunt" * 1000)
    ended = shop.duly("run", "shop:app", "--processes", "3")
    assert ended.status == 2
    assert ended.err.count("duly: ") == 1
    assert "shop.db" in ended.err


def test_a_password_in_a_url_is_not_shown(place: Place):
    place.write("shop.py", SHOP.replace("sqlite:///shop.db", "mongodb://ann:hunter2@host/db"))
    for command in ("contract", "run"):
        ended = place.duly(command, "shop:app")
        assert ended.status == 2
        assert "mongodb://ann:***@host/db" in ended.err
        assert "hunter2" not in ended.err + ended.out


def test_reload_without_watchfiles(shop: Place):
    shop.write("watchfiles.py", "raise ModuleNotFoundError('gone', name='watchfiles')")
    ended = shop.duly("run", "shop:app", "--reload")
    assert ended.status == 2
    assert "pip install 'duly[reload]'" in ended.err


def test_version_and_help(place: Place):
    assert place.duly("--version").out.startswith("duly ")
    for command in ((), ("run",), ("contract",), ("publish",)):
        ended = place.duly(*command, "--help")
        assert ended.status == 0
        assert "Usage: duly" in ended.out


def test_the_command_is_installed(shop: Place):
    ended = subprocess.run(
        [os.path.join(os.path.dirname(sys.executable), "duly"), "contract", "shop:app"],  # noqa: PTH118, PTH120
        cwd=shop.path,
        env=shop.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "orders -> billing: exactly-once" in ended.stdout


SILENT = """
import duly
from duly.brokers.memory import MemoryQueue


class Silent:
    def __init__(self):
        self.inner = MemoryQueue()
        for name in ("capabilities", "declare", "publish", "subscribe", "close"):
            setattr(self, name, getattr(self.inner, name))


app = duly.App("shop", broker=Silent())
"""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("status",), "cannot look inside itself"),
        (("dead", "list"), "keeps no dead letters"),
        (("dead", "show", "1"), "keeps no dead letters"),
        (("dead", "replay", "--yes", "1"), "keeps no dead letters"),
        (("dead", "discard", "--yes", "1"), "keeps no dead letters"),
    ],
)
def test_a_broker_that_cannot_show_or_mend(shop: Place, command: tuple[str, ...], said: str):
    shop.write("silent.py", SILENT)
    verbs = command[:2] if command[0] == "dead" else command[:1]
    ended = shop.duly(*verbs, "silent:app", *command[len(verbs) :], input="")
    assert ended.status == 2, ended.err
    [line] = ended.err.splitlines()
    assert line.startswith("duly: ")
    assert said in line


def test_wrong_use_is_one_line(capsys: pytest.CaptureFixture[str]):
    for arguments in (["status"], ["status", "--nonsense"], ["nonsense"], ["rewind", "a:b", "c"]):
        assert run(arguments) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("duly: ")
        assert line.endswith("--help.")


STARTED_WITHOUT = """
import os, sys
os.chdir(sys.argv[1])
os.close(int(sys.argv[2]))
os.execv(sys.executable, [sys.executable, "-m", "duly", *sys.argv[3:]])
"""


@pytest.mark.parametrize(
    ("descriptor", "command", "status"),
    [
        (0, ["drop", "shop:app", "billing"], 2),
        (0, ["publish", "shop:app", "orders", "-"], 2),
        (1, ["status", "shop:app"], 0),
        (2, ["status", "nowhere:app"], 2),
    ],
)
def test_a_process_that_was_started_without_a_stream(
    tmp_path: Path, descriptor: int, command: list[str], status: int
):
    (tmp_path / "shop.py").write_text(SHOP)
    started = [sys.executable, "-m", "duly", "init", "shop:app"]
    subprocess.run(started, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    arguments = [sys.executable, "-c", STARTED_WITHOUT, str(tmp_path), str(descriptor), *command]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, "Traceback" in ended.stderr) == (status, False), ended.stderr
