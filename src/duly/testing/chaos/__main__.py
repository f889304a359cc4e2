"""``python -m duly.testing.chaos``: real processes, real files and servers, real faults, and a
verdict.

Messages are in a SQLite file, or by ``--broker postgres`` on a PostgreSQL server; some effects
are beside them, others where ``--store`` says, with an outbox. The server is a private one that is
killed as well, started from what is installed, or the one that a URL or ``DULY_TEST_POSTGRES``
names, which is not. By ``--broker rabbitmq`` or ``kafka`` messages are on a private node, and all
effects where ``--store`` says, but those that Kafka's own transactions publish.

Ends with 1 where a promise was broken, and with 2 where the run does not show whether it was: a
fault never hit, or something never succeeded. A round that broke something is kept, histories,
logs and database files; ``--judge`` judges it again.
"""

from __future__ import annotations

import itertools
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from duly.connect import redacted
from duly.errors import BrokerError, ConfigurationError
from duly.testing.chaos.kafka import KafkaNode
from duly.testing.chaos.node import Node
from duly.testing.chaos.processes import Nursery
from duly.testing.chaos.report import report, shown, verdict_of
from duly.testing.chaos.round import Round
from duly.testing.chaos.server import Server
from duly.testing.chaos.setup import (
    BROKERS,
    STORES,
    STRIKES,
    BrokerKind,
    Setup,
    StoreKind,
    schema_of_round,
)
from duly.testing.chaos.verdict import Tally, judged
from duly.testing.wrong_use import (
    Command,
    Seconds,
    WrongUse,
    check_together,
    function_named,
    writable_file,
    writable_folder,
)

PROGRAM = "duly.testing.chaos.program:run"
EXIT = {"valid": 0, "invalid": 1, "unknown": 2}
FAULTS_S = 12.0
# A node that is taken down is away for seconds; on Kafka all groups come together again then.
FAULTS_ON_A_NODE_S: Mapping[str, float] = {"rabbitmq": 25.0, "kafka": 120.0}
OF_ONE_ROUND = (
    *("only", "seed", "faults_s", "folder", "without", "before", "no_mount", "keep"),
    *("broker", "store", "save"),
)
# What every process needs of a server, imported once for all.
MODULES = ("duly.brokers.postgres", "duly.stores.postgres", "duly.testing.chaos.schema")
NODE_MODULES: Mapping[str, Sequence[str]] = {
    "rabbitmq": ("duly.brokers.rabbitmq", "duly.testing.chaos.queues"),
    "kafka": ("duly.brokers.kafka", "duly.testing.chaos.groups"),
}
POSTGRES = ("postgresql://", "postgres://")


@click.command(cls=Command, help=__doc__)
@click.option(
    "--broker",
    default="sqlite",
    show_default=True,
    metavar="sqlite|postgres|rabbitmq|kafka|URL",
    help="Where messages are.",
)
@click.option(
    "--store",
    metavar="sqlite|postgres|URL",
    help="Where effects apart from them are; left out, likewise (beside a node: sqlite).",
)
@click.option("--minutes", type=Seconds(), default=1.0, show_default=True)
@click.option("--seed", type=int, default=None, help="Of all that is random; left out, any.")
@click.option(
    "--round",
    "only",
    type=click.IntRange(min=0),
    default=None,
    help="Play this round of the seed only.",
)
@click.option(
    "--faults-s",
    type=Seconds(),
    help=f"Seconds of each round; left out, {FAULTS_S:g}, "
    + ", ".join(f"with {broker} {seconds:g}" for broker, seconds in FAULTS_ON_A_NODE_S.items())
    + ".",
)
@click.option("--folder", type=click.Path(path_type=Path), help="Where rounds are played.")
@click.option(
    "--without", multiple=True, type=click.Choice(list(STRIKES)), help="Leave out such strikes."
)
@click.option(
    "--before",
    metavar="MODULE:FUNCTION",
    help="Called in every process first, to break something and see it found.",
)
@click.option("--no-mount", is_flag=True, help="Mount no disk; limit the size of files instead.")
@click.option("--keep", is_flag=True, help="Keep rounds in which nothing was broken too.")
@click.option("--save", type=click.Path(path_type=Path), help="Keep what was shown, as JSON.")
@click.option(
    "--judge",
    "kept",
    type=click.Path(path_type=Path),
    help="Judge a round that was kept, and play none.",
)
@click.pass_context
def main(
    ctx: click.Context,
    /,
    minutes: float,
    seed: int | None,
    only: int | None,
    faults_s: float | None,
    folder: Path | None,
    without: tuple[str, ...],
    before: str | None,
    no_mount: bool,
    keep: bool,
    kept: Path | None,
    **more: Any,
) -> None:
    """Play rounds until the time is over, judge each, print the table."""
    console = Console(soft_wrap=True)
    began = time.monotonic()
    broker: str = more["broker"]
    store: str = more["store"] or ("sqlite" if broker in NODE_MODULES else broker)
    save: Path | None = more["save"]
    if kept is not None:
        check_together(ctx, ["kept"], "where a round that was kept is judged")
        tally = judged(_kept(kept))
        report(console, tally, (), time.monotonic() - began)
        sys.exit(EXIT[verdict_of(tally, ())])
    if faults_s is None:
        faults_s = FAULTS_ON_A_NODE_S.get(broker, FAULTS_S)
    seed = int(time.time()) % 1_000_000 if seed is None else seed
    if only is not None:
        check_together(ctx, OF_ONE_ROUND, "where one round is played")
    if before is not None:
        function_named(before)
    if save is not None:
        writable_file(save)
    place = _of_its_own(folder) if folder else Path(tempfile.mkdtemp(prefix="duly-chaos-"))
    # As Ctrl-C does, so that no process, no server and no mounted disk is left behind.
    over = threading.Event()

    def end(*_: object) -> None:
        # Raised within a callback of the interpreter's own, it is ignored.
        over.set()
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    kept_too = keep
    with _setup(broker, store, keep=lambda: kept_too) as setup:
        profile = setup.profile(without)
        console.print(f"{setup}; seed {seed}, rounds in {place}", highlight=False)
        campaign = Campaign(
            console, place, seed, setup, faults_s, without, before, not no_mount, over
        )
        whole = campaign.run(minutes * 60, only)
        if over.is_set():
            sys.exit(128 + signal.SIGTERM)
        report(console, whole, profile, time.monotonic() - began)
        if save is not None:
            save.write_bytes(shown(whole, str(setup), profile, time.monotonic() - began))
        kept_too = keep or not whole.is_good
        if not whole.is_good:
            has_server = setup.server is not None or setup.node is not None
            where = f" --broker {broker} --store {store}" if has_server else ""
            console.print(
                f"kept in {_places(place, setup)}; again, though never quite the same: "
                f"python -m duly.testing.chaos --seed {seed} --minutes {minutes:g}"
                f"{redacted(where)}",
                highlight=False,
            )
        elif not keep:
            shutil.rmtree(place, ignore_errors=True)
    sys.exit(EXIT[verdict_of(whole, profile)])


@contextmanager
def _setup(broker: str, store: str, keep: Callable[[], bool]) -> Iterator[Setup]:
    """Where messages and effects are to be, with a server and a node where they are needed."""
    there, apart = _broker_kind(broker), _store_kind(store)
    urls = {each for each in (broker, store) if each.startswith(POSTGRES)}
    if len(urls) > 1:
        raise WrongUse("--broker and --store name two servers: a run has one")
    with ExitStack() as running:
        server = node = None
        try:
            if "postgres" in (there, apart):
                server = Server(*urls)
                server.check()
                running.callback(lambda: server.close(keep=keep()))
            if there in NODE_MODULES:
                node = Node() if there == "rabbitmq" else KafkaNode()
                running.callback(partial(_close, node, keep))
        except (ConfigurationError, BrokerError) as error:
            raise WrongUse(str(error)) from None
        yield Setup(there, apart, server, node)


def _close(node: Node | KafkaNode, keep: Callable[[], bool]) -> None:
    node.close(keep=keep())


def _broker_kind(named: str) -> BrokerKind:
    for scheme, kind in (("amqp", "rabbitmq"), ("kafka://", "kafka")):
        if named.startswith(scheme):
            raise WrongUse(f"--broker: a node is struck by a run: a private one, --broker {kind}")
    if named.startswith(POSTGRES):
        return "postgres"
    for kind in BROKERS:
        if named == kind:
            return kind
    raise _wrong_kind("--broker", named, BROKERS)


def _store_kind(named: str) -> StoreKind:
    if named.startswith(POSTGRES):
        return "postgres"
    for kind in STORES:
        if named == kind:
            return kind
    raise _wrong_kind("--store", named, STORES)


def _wrong_kind(option: str, named: str, kinds: Sequence[str]) -> WrongUse:
    return WrongUse(
        f"{option}: {redacted(named)!r} is none of {', '.join(kinds)}, postgresql://..."
    )


def _places(place: Path, setup: Setup) -> str:
    there = [each.folder for each in (setup.server, setup.node) if each is not None]
    return " and ".join([str(place), *map(redacted, there)])


def _of_its_own(folder: Path) -> Path:
    """A folder with nothing in it but rounds: it is removed where all went well."""
    others = [each.name for each in writable_folder(folder).iterdir() if each.name[:6] != "round-"]
    if others:
        raise WrongUse(f"{folder}: {min(others)!r} is in it: give the rounds a folder of their own")
    return folder


def _kept(folder: Path) -> Path:
    if not any((folder / "histories").glob("*.jsonl")):
        raise WrongUse(f"{folder}: no round that was kept: there is no history in it to judge")
    return folder


@dataclass(frozen=True, slots=True)
class Campaign:
    """Rounds, one after the other."""

    console: Console
    place: Path
    seed: int
    setup: Setup
    faults_s: float
    without: tuple[str, ...]
    before: str | None
    mount: bool
    over: threading.Event

    def run(self, seconds: float, only: int | None) -> Tally:
        """Play rounds until the time is over, or only one."""
        whole, until = Tally(), time.monotonic() + seconds
        modules = [*MODULES] if self.setup.server is not None else []
        modules += NODE_MODULES.get(self.setup.broker, ())
        nursery = Nursery(PROGRAM, modules=modules)
        try:
            for number in itertools.count() if only is None else [only]:
                whole.add(self._play(nursery, number))
                if time.monotonic() >= until or self.over.is_set():
                    break
        finally:
            nursery.close()
        return whole

    def _play(self, nursery: Nursery, number: int) -> Tally:
        folder = self.place / f"round-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        round_ = Round(
            nursery,
            folder,
            self.seed * 1_000_003 + number,
            setup=self.setup,
            name=schema_of_round(number),
            faults_s=self.faults_s,
            # In turn: what may be full, and what is synced.
            on_disk="real" if number % 2 else "small" if self.mount else "limited",
            without=self.without,
            before=self.before,
        )
        played = round_.play()
        tally = judged(folder)
        tally.struck.update(played.struck)
        tally.complaints += [f"round-{number}: {each}" for each in played.complaints]
        self.console.print(
            f"round {number}: {played.seconds:.1f} s, {sum(tally.starts.values()):,} handlers "
            f"started, {sum(tally.hits.values())} faults hit, {len(tally.anomalies)} anomalies",
            highlight=False,
        )
        if tally.is_good:
            shutil.rmtree(folder / "histories", ignore_errors=True)
            round_.drop()
        return tally


if __name__ == "__main__":
    main()
