"""A short chaos run on every run of the tests, and runs with planted bugs, which it must name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from duly.testing import kafka, postgres, rabbitmq
from duly.testing.chaos.__main__ import main
from duly.testing.chaos.setup import STRIKES
from duly.testing.postgres import OTHER, binaries, children_of
from tests.servers.kafka import missing as missing_kafka
from tests.servers.postgres import missing
from tests.servers.rabbitmq import missing as missing_node
from tests.waiting import alive, eventually

ROOT = Path(__file__).parent.parent.parent
# A round comes to rest by itself, however slow the machine is; this ends one that does not.
HANGS_S = 600
# What takes a node seconds, in which nothing else befalls anybody. Killing it comes first.
SPARED = [
    option
    for kind in ("kill node", "stop node", "memory alarm", "disk alarm")
    for option in ("--without", kind)
]
SPARED_ON_KAFKA = [
    option
    for kind in ("kill node", "stop node", "freeze node", "pause", "silence")
    for option in ("--without", kind)
]


def chaos(*options: str, private: bool = False) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "duly.testing.chaos", *options],
        cwd=ROOT,
        env=without_a_named_server() if private else None,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS_S,
    )


@pytest.mark.parametrize("number", [0, 1])
def test_a_short_run_breaks_nothing(tmp_path: Path, number: int):
    """On a small disk and on a real one. Too short for every fault to hit: it may be unknown what
    it shows, but never invalid.
    """
    ended = chaos("--folder", str(tmp_path / "chaos"), "--round", str(number), "--faults-s", "4")
    said = ended.stdout + ended.stderr
    assert ended.returncode in (0, 2), said
    assert "0 anomalies: " in said
    assert not (tmp_path / "chaos").exists(), "what was good is not kept"


@pytest.mark.parametrize(("broker", "store"), [("postgres", "sqlite"), ("sqlite", "postgres")])
def test_a_short_run_on_a_server_breaks_nothing(tmp_path: Path, broker: str, store: str):
    """A private one, which is killed: effects in its schema, and beside a file, both ways."""
    if binaries() is None:
        missing("no PostgreSQL server is installed")
    ended = chaos(
        *("--folder", str(tmp_path / "chaos"), "--round", "1", "--faults-s", "3"),
        *("--broker", broker, "--store", store),
        private=True,
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode in (0, 2), said
    assert f"messages in {broker}, effects there and in {store}" in said
    assert "kill server" in said
    assert "0 anomalies: " in said


@pytest.mark.timeout(HANGS_S)
def test_a_short_run_on_a_node_breaks_nothing(tmp_path: Path):
    """A private one, which is struck as well. What takes the node seconds is left to longer runs,
    and so is a server beside it.
    """
    if not rabbitmq.is_installed():
        missing_node("no RabbitMQ server is installed")
    ended = chaos(
        *("--folder", str(tmp_path / "chaos"), "--round", "1", "--faults-s", "3"),
        *("--broker", "rabbitmq"),
        *SPARED[2:],
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode in (0, 2), said
    assert "messages in rabbitmq, effects in sqlite" in said
    assert "cut before ack" in said
    assert "0 anomalies: " in said


@pytest.mark.long
@pytest.mark.timeout(HANGS_S)
def test_a_short_run_on_kafka_breaks_nothing(tmp_path: Path):
    """A private node, by whose link messages go; what takes it seconds is left to longer runs."""
    if not kafka.is_installed():
        missing_kafka("no Kafka is installed")
    ended = chaos(
        *("--folder", str(tmp_path / "chaos"), "--round", "1", "--faults-s", "10"),
        *("--broker", "kafka"),
        *SPARED_ON_KAFKA,
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode in (0, 2), said
    assert "messages in kafka, effects in sqlite" in said
    assert "copied-ordered" in said
    assert "0 anomalies: " in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--broker", "postgres"], "no PostgreSQL server is installed"),
        (["--store", "postgres"], "no PostgreSQL server is installed"),
        (["--broker", "rabbitmq"], "no RabbitMQ server is installed"),
        (["--broker", "kafka"], "no Kafka is installed"),
        (["--broker", "mysql"], "'mysql' is none of sqlite, postgres, rabbitmq, kafka, postgresql"),
        (["--store", "rabbitmq"], "'rabbitmq' is none of sqlite, postgres, postgresql://"),
        (["--broker", "amqp://a:secret@127.0.0.1:1/x"], "a private one, --broker rabbitmq"),
        (["--broker", "kafka://a:secret@127.0.0.1:1"], "a private one, --broker kafka"),
        (
            ["--broker", "postgresql://a/x", "--store", "postgresql://b/x"],
            "name two servers: a run has one",
        ),
        (["--broker", "postgresql://a:secret@127.0.0.1:1/x"], "127.0.0.1"),
    ],
)
def test_a_server_that_is_not_there_is_told_in_a_sentence(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv(OTHER, raising=False)
    monkeypatch.setattr(postgres, "binaries", lambda: None)
    monkeypatch.setattr(rabbitmq, "is_installed", lambda: False)
    monkeypatch.setattr(kafka, "jars", lambda: None)
    ended = CliRunner().invoke(main, [*options, "--round", "0", "--faults-s", "1"])
    assert ended.exit_code == 2, ended.output
    assert said in ended.output
    assert "secret" not in ended.output
    assert len(ended.output.strip().splitlines()) == 1


def test_the_server_goes_with_who_asked_for_it(tmp_path: Path):
    """Ended from outside in the middle of a round."""
    if binaries() is None:
        missing("no PostgreSQL server is installed")
    rounds = tmp_path / "rounds"
    with subprocess.Popen(
        [*(sys.executable, "-m", "duly.testing.chaos"), *("--folder", rounds, "--store=postgres")],
        cwd=tmp_path,
        env=without_a_named_server(),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as run:
        histories = rounds / "round-0/histories"
        eventually(lambda: len(list(histories.glob("*.jsonl"))) > 3, "processes are at work")
        servers = [pid for pid in children_of(run.pid) if "bin/postgres" in command_of(pid)]
        os.kill(run.pid, signal.SIGTERM)
        assert run.wait(60) != 0
    [server] = servers
    assert not alive(server)


def command_of(pid: int) -> str:
    with suppress(OSError):  # it is gone
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def without_a_named_server() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != OTHER}


def at_work_in(folder: Path) -> list[str]:
    """The processes whose working directory this is."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "cwd").readlink() == folder:
                found.append(process.name)
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_from_outside_it_leaves_no_process_and_no_disk(tmp_path: Path, number: int):
    """As by Ctrl-C, which reaches the whole group, in the middle of a round."""
    rounds = tmp_path / "rounds"
    command = [sys.executable, "-m", "duly.testing.chaos", "--folder", str(rounds)]
    with subprocess.Popen(
        command, cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL
    ) as run:
        histories = rounds / "round-0/histories"
        eventually(
            lambda: len(at_work_in(tmp_path)) > 5 < len(list(histories.glob("*.jsonl"))),
            "processes are at work",
        )
        os.killpg(run.pid, number)
        assert run.wait(60) != 0
    try:
        eventually(lambda: not at_work_in(tmp_path), "nobody is left")
    finally:
        for pid in at_work_in(tmp_path):
            os.kill(int(pid), signal.SIGKILL)
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


def test_a_run_of_which_every_fault_is_left_out_shows_nothing(tmp_path: Path):
    left_out = [option for kind in STRIKES for option in ("--without", kind)]
    ended = chaos("--folder", str(tmp_path / "chaos"), "--round", "1", "--faults-s", "2", *left_out)
    said = ended.stdout + ended.stderr
    assert ended.returncode in (0, 2), said
    assert "0 anomalies" in said


@pytest.mark.slow
def test_what_is_settled_in_the_wrong_order_is_named(tmp_path: Path):
    ended = chaos(
        *("--folder", str(tmp_path / "chaos")),
        *("--round", "1", "--faults-s", "4", "--seed", "4"),
        *("--before", "tests.chaos.planted:settled_in_the_wrong_order"),
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode == 1, said
    for name in ("premature settle", "start before settle", "duplicate effect"):
        assert name in " ".join(said.split()), said
    assert "--seed 4" in said
    assert list((tmp_path / "chaos/round-1/histories").iterdir()), "it is kept"
    again = chaos("--judge", str(tmp_path / "chaos/round-1"))
    assert again.returncode == 1, again.stdout + again.stderr


@pytest.mark.long
def test_what_a_queue_leaves_open_is_named_where_it_is_taken_for_done(tmp_path: Path):
    if not rabbitmq.is_installed():
        missing_node("no RabbitMQ server is installed")
    said, wanted = "", {"premature settle", "duplicate effect", "lost"}
    for seed in ("4", "5", "6"):  # a round may happen to show not all of them
        ended = chaos(
            *("--folder", str(tmp_path / f"chaos{seed}"), "--broker", "rabbitmq"),
            *("--round", "1", "--faults-s", "6", "--seed", seed),
            *SPARED,
            *("--before", "tests.chaos.planted:what_a_queue_leaves_open_is_taken_for_done"),
        )
        said += " ".join((ended.stdout + ended.stderr).split())
        assert ended.returncode == 1, said
        if not {name for name in wanted if name not in said}:
            return
    assert not {name for name in wanted if name not in said}, said
    assert "--broker rabbitmq" in said


@pytest.mark.long
@pytest.mark.timeout(HANGS_S)
def test_what_a_log_leaves_open_is_named_where_it_is_taken_for_done(tmp_path: Path):
    if not kafka.is_installed():
        missing_kafka("no Kafka is installed")
    ended = chaos(
        *("--folder", str(tmp_path / "chaos"), "--broker", "kafka"),
        *("--round", "1", "--faults-s", "15", "--seed", "4"),
        *SPARED_ON_KAFKA,
        *("--before", "tests.chaos.planted:what_a_log_leaves_open_is_taken_for_done"),
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode == 1, said
    for name in ("premature settle", "duplicate effect", "torn effect"):
        assert name in " ".join(said.split()), said
    assert "--broker kafka" in said
