"""``duly publish``: a file's lines as messages; every line has an identity."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from duly.app import App
from duly.broker import RepeatDropped
from duly.cli.lines import BadLine, Line, Reading, csv_lines, json_lines
from duly.cli.loading import load_app, split
from duly.errors import (
    ConfigurationError,
    IdentityConflict,
    PublishError,
    PublishIncomplete,
    PublishUnknown,
)
from duly.events import Event, PublishDropped
from duly.guarantees import Guarantee
from duly.message import Topic
from duly.publishing import Dropped

BATCH = 500
# How often a batch of unknown outcome is repeated under its ids, where repeats are dropped.
REPEATS = 5
# Each bad line is told until here; after that they are counted.
TOLD = 100


@dataclass(frozen=True, slots=True)
class PublishOptions:
    """The options of ``duly publish``."""

    app: str
    topic: str
    source: str
    format: str | None
    id_field: str | None
    key_field: str | None
    batch_name: str | None
    from_line: int


@dataclass(slots=True)
class Tally:
    """How the lines fared."""

    published: int = 0
    repeats: int = 0
    bad: int = 0
    dropped: int = 0
    last_line: int = 0
    why_stopped: str = ""

    def watch(self, event: Event) -> None:
        """Count what an at-most-once topic drops."""
        if isinstance(event, PublishDropped):
            self.dropped += event.count

    def refuse(self, line: BadLine) -> None:
        """Count a line that is not published, and say why."""
        self.bad += 1
        if self.bad <= TOLD:
            click.echo(f"line {line.number}: {line.reason}", err=True)
        elif self.bad == TOLD + 1:
            click.echo("... further bad lines are counted, not shown", err=True)


class Stopped(Exception):
    """The broker takes no more just now; the text says what it said."""


def publish_file(options: PublishOptions) -> int:
    """Publish the file; returns the exit status: 1 where a line was not published."""
    app = load_app(options.app)
    topic = topic_of(app, options)
    reading = reading_of(app, topic, options)
    tally = Tally()
    app.watchers.append(tally.watch)
    status = 0
    with app, opened(options.source) as file, Display.on(file, topic.name) as display:
        format_ = format_of(options)
        lines = (csv_lines if format_ == "csv" else json_lines)(file, reading)
        try:
            Publishing(app, topic, tally, display).all(lines, options.from_line)
        except KeyboardInterrupt:
            tally.why_stopped, status = "interrupted", 130
        except Stopped as error:
            tally.why_stopped, status = str(error), 1
    # After the app was closed: only then the buffer of an at-most-once topic is empty.
    summarize(tally, topic, options)
    return status or int(bool(tally.bad or tally.dropped))


@dataclass(slots=True)
class Publishing:
    """Lines on their way to the broker, in batches."""

    app: App
    topic: Topic[Any]
    tally: Tally
    display: Display

    def all(self, lines: Iterator[Line | BadLine], from_line: int) -> None:
        """Publish every good line from there on; tell of the bad ones. Raises `Stopped`."""
        wanted = (line for line in lines if line.number >= from_line)
        while batch := list(islice(wanted, BATCH)):
            good = [line for line in batch if isinstance(line, Line)]
            for line in batch:
                if isinstance(line, BadLine):
                    self.tally.refuse(line)
            if good:
                self.batch(good)
            self.tally.last_line = batch[-1].number
            self.display.update(self.tally)

    def batch(self, lines: Sequence[Line]) -> None:
        """Publish these; those of unknown outcome again where their repeats are dropped."""
        for _ in range(REPEATS):
            lines = self._once(lines)
            if not lines:
                return
        raise Stopped(f"line {lines[0].number} could not be published: its outcome stays unknown")

    def _once(self, lines: Sequence[Line]) -> Sequence[Line]:
        keys = None if all(line.key is None for line in lines) else [line.key for line in lines]
        outcomes: Sequence[Any]
        try:
            outcomes = self.app.publish_many(
                self.topic,
                [line.payload for line in lines],
                ids=[line.id for line in lines],
                keys=keys,
            )
        except PublishIncomplete as error:
            outcomes = error.outcomes
        again = [
            line
            for line, outcome in zip(lines, outcomes, strict=True)
            if self._again(line, outcome)
        ]
        if again and self.topic.promise is Guarantee.AT_MOST_ONCE:
            # The buffer was full; a file can wait until it is empty.
            self.tally.dropped -= len(again)
            self.app.close(timeout_s=30.0)
        return again

    def _again(self, line: Line, outcome: Any) -> bool:
        if isinstance(outcome, RepeatDropped):
            self.tally.repeats += 1
        elif isinstance(outcome, IdentityConflict):
            self.tally.refuse(BadLine(line.number, f"identity conflict: {outcome}"))
        elif isinstance(outcome, Dropped | PublishUnknown) and self._may_repeat(outcome):
            return True
        elif isinstance(outcome, PublishError):
            raise Stopped(f"line {line.number} could not be published: {outcome}")
        else:
            self.tally.published += 1
        return False

    def _may_repeat(self, outcome: Dropped | PublishUnknown) -> bool:
        # What was dropped before it was sent cannot become two.
        return isinstance(outcome, Dropped) or self.topic.promise is Guarantee.EXACTLY_ONCE


# --- what is read


def topic_of(app: App, options: PublishOptions) -> Topic[Any]:
    """The app's topic of this name, or one that its module has. Raises `ConfigurationError`."""
    found = {topic.name: topic for topic in _topics_in(split(options.app)[0])}
    found |= {topic.name: topic for topic in app.topics}
    if options.topic not in found:
        there = ", ".join(sorted(found)) or "none"
        raise ConfigurationError(f"there is no topic {options.topic!r} here; there are: {there}")
    return found[options.topic]


def _topics_in(module: str) -> Iterator[Topic[Any]]:
    # A topic that is only published to may not be known to the app before.
    return (value for value in vars(sys.modules[module]).values() if isinstance(value, Topic))


def reading_of(app: App, topic: Topic[Any], options: PublishOptions) -> Reading:
    """How lines become messages. Raises `ConfigurationError` where they have no identity."""
    name = options.batch_name
    if name is None and options.source != "-":
        name = Path(options.source).name
    if name is None and options.id_field is None:
        raise ConfigurationError(
            "lines of standard input have no identity: give --id FIELD, or --batch-name NAME, "
            "under which the same input is known when it is published again"
        )
    return Reading(topic, app.name, name, options.id_field, options.key_field)


def format_of(options: PublishOptions) -> str:
    """``jsonl`` or ``csv``, by the option or by the file's name."""
    if options.format is not None:
        return options.format
    return "csv" if options.source.lower().endswith(".csv") else "jsonl"


@contextmanager
def opened(source: str) -> Iterator[IO[bytes]]:
    """The file, or standard input. Raises `ConfigurationError` where it cannot be read."""
    if source == "-":
        if sys.stdin is None:
            raise ConfigurationError("there is no standard input to read: name a file")
        yield sys.stdin.buffer
        return
    try:
        file = Path(source).open("rb")  # noqa: SIM115 - only opening it is the user's mistake
    except OSError as error:
        raise ConfigurationError(f"{source}: {error.strerror}") from None
    with file:
        yield file


# --- what is shown


class Display:
    """A progress bar on a terminal, by the bytes read; elsewhere nothing."""

    def __init__(self, progress: Progress | None, file: IO[bytes], size: int | None) -> None:
        self._progress = progress
        self._file = file
        self._task = None if progress is None else progress.add_task("", total=size, shown="")

    @classmethod
    @contextmanager
    def on(cls, file: IO[bytes], topic: str) -> Iterator[Display]:
        """Show the progress of reading this file while it lasts."""
        if not sys.stderr.isatty():
            yield cls(None, file, None)
            return
        size = Path(f"/dev/fd/{file.fileno()}").stat().st_size if file.seekable() else None
        progress = Progress(
            TextColumn(f"publishing to {topic}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        with progress:
            yield cls(progress, file, size)

    def update(self, tally: Tally) -> None:
        """Show how far it is."""
        if self._progress is None or self._task is None:
            return
        shown = f"{tally.published + tally.repeats:,} lines"
        # The raw position: a text layer above forbids tell() while it is iterated.
        at = self._file.seek(0, 1) if self._file.seekable() else None
        self._progress.update(self._task, completed=at, shown=shown)


def summarize(tally: Tally, topic: Topic[Any], options: PublishOptions) -> None:
    """Say in a line or two how it went, and how to go on."""
    parts = [f"published {tally.published:,}"]
    parts += [f"{tally.repeats:,} were published before"] * bool(tally.repeats)
    parts += [f"{tally.bad:,} bad lines left out"] * bool(tally.bad)
    parts += [f"{tally.dropped:,} dropped"] * bool(tally.dropped)
    click.echo(f"topic {topic.name}: {', '.join(parts)}", err=True)
    if tally.why_stopped:
        how = (
            "run the same command again: what is published already is dropped as a repeat"
            if topic.promise is Guarantee.EXACTLY_ONCE
            else f"go on with --from-line {tally.last_line + 1}; some of the lines after "
            f"{tally.last_line} may be published already"
        )
        click.echo(f"stopped: {tally.why_stopped}\n{how}", err=True)
    elif topic.promise is not Guarantee.EXACTLY_ONCE and tally.published:
        click.echo(
            f"an {topic.guarantee} topic remembers no identities: run again, this would publish "
            "every line again",
            err=True,
        )
    if tally.bad and topic.promise is Guarantee.EXACTLY_ONCE and options.id_field is None:
        click.echo("mend the bad lines in place and run the same command again", err=True)
