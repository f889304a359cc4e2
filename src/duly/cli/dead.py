"""``duly dead``: what consumers gave up on, to be looked at, brought back or removed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import click
import msgspec

from duly.app import App
from duly.cli.asking import ask, progress
from duly.cli.loading import load_app
from duly.cli.tables import ago, print_json, print_table, printable
from duly.errors import ConfigurationError
from duly.inspection import DeadLetter, Selection
from duly.mending import Mender


@dataclass(frozen=True, slots=True)
class Meant:
    """Which dead letters a command is about: by number, or by what they have in common."""

    numbers: Sequence[int]
    which: Selection
    every: bool = False

    @property
    def says_which(self) -> bool:
        """Whether anything narrows it."""
        return bool(self.numbers) or self.which != Selection()


def selection(
    consumer: str | None,
    topic: str | None,
    id: str | None,
    error: str | None,
    older_s: float | None,
    newer_s: float | None,
) -> Selection:
    """The options as a selection, ages reckoned from now."""
    now_ms = int(time.time() * 1000)
    return Selection(
        consumer,
        topic,
        id,
        error,
        since_ms=None if newer_s is None else now_ms - int(newer_s * 1000),
        before_ms=None if older_s is None else now_ms - int(older_s * 1000),
    )


def list_dead(spec: str, which: Selection, *, limit: int, as_json: bool) -> int:
    """Print the latest of those that are meant."""
    with _mender(load_app(spec)) as mender:
        letters = mender.select(which, limit)
    if as_json:
        print_json([_fields(letter) for letter in letters])
        return 0
    if not letters:
        click.echo("no dead letters", err=True)
        return 0
    rows = [
        (
            str(letter.number),
            letter.subscription,
            letter.message.topic,
            letter.message.id,
            str(letter.attempts),
            str(letter.replays),
            ago(letter.dead_ms),
            letter.error.strip().partition("\n")[0],
        )
        for letter in letters
    ]
    head = ("number", "consumer", "topic", "id", "attempts", "replays", "died", "error")
    print_table(head, rows)
    if len(letters) == limit:
        click.echo(f"the latest {limit}; there may be more (--limit)", err=True)
    return 0


def show_dead(spec: str, number: int, *, as_json: bool) -> int:
    """Print all that is known of one: message, error, and what a replay would come to."""
    with _mender(load_app(spec)) as mender:
        letter = _by_number(mender, number)
        fields = {**_fields(letter), **_message(letter)}
        fields["replay"] = mender.outlook(letter.subscription)
    if as_json:
        print_json(fields)
        return 0
    width = max(map(len, fields))
    for name, value in fields.items():
        lines = str(value).splitlines() if name in ("error", "body") else [_plain(value)]
        for at, line in enumerate(lines or [""]):
            click.echo(f"{name if not at else '':{width}}  {printable(line)}".rstrip())
    return 0


def replay_dead(spec: str, meant: Meant, *, yes: bool, as_json: bool) -> int:
    """Bring them back, after asking."""
    return _mend(spec, meant, "replay", yes=yes, as_json=as_json)


def discard_dead(spec: str, meant: Meant, *, yes: bool, as_json: bool) -> int:
    """Remove them for good, after asking."""
    return _mend(spec, meant, "discard", yes=yes, as_json=as_json)


def _mend(spec: str, meant: Meant, how: str, *, yes: bool, as_json: bool) -> int:
    if not (meant.says_which or meant.every):
        raise click.UsageError(f"say which to {how}: their numbers, an option, or --all")
    if meant.numbers and (meant.every or meant.which != Selection()):
        raise click.UsageError("give numbers or options, not both")
    with _mender(load_app(spec)) as mender:
        which, counts = _count(mender, meant)
        if how == "replay":
            mender.refuse_useless(counts)
        for consumer, count in counts.items():
            outlook = f": {mender.outlook(consumer)}" if how == "replay" else ""
            click.echo(f"{count:,} of consumer {consumer}{outlook}", err=True)
        total = sum(counts.values())
        if total:
            ask(f"{how} {total:,} dead letter{'s'[: total != 1]}?", yes=yes)
        mend = mender.replay if how == "replay" else mender.discard
        done = _mend_all(mender, mend, meant, which, total)
    verb = "replayed" if how == "replay" else "discarded"
    if as_json:
        print_json({verb: done, "consumers": counts})
    else:
        click.echo(f"{verb} {done:,}" if total else "no dead letters match")
    return 0 if done == total and total else 1


def _count(mender: Mender, meant: Meant) -> tuple[Selection, Mapping[str, int]]:
    """How many there are of each consumer; and the selection, bounded by the newest of them."""
    counts: dict[str, int] = {}
    which = meant.which
    for letters in _portions(mender, meant, which):
        if which.below is None:  # what dies from now on was not asked about
            which = replace(which, below=letters[0].number + 1)
        for letter in letters:
            counts[letter.subscription] = counts.get(letter.subscription, 0) + 1
    return which, counts


def _portions(mender: Mender, meant: Meant, which: Selection) -> Iterator[Sequence[DeadLetter]]:
    if meant.numbers:
        yield [_by_number(mender, number) for number in dict.fromkeys(meant.numbers)]
    else:
        yield from mender.walk(which)


def _mend_all(
    mender: Mender,
    mend: Callable[[Sequence[DeadLetter]], int],
    meant: Meant,
    which: Selection,
    total: int,
) -> int:
    done = 0
    with progress("dead letters", total) as advance:
        for letters in _portions(mender, meant, which) if total else ():
            mended = mend(letters)
            done += mended
            advance(mended)
    return done


@contextmanager
def _mender(app: App) -> Iterator[Mender]:
    with app:
        yield Mender.of(app.backends(), app.consumers)


def _by_number(mender: Mender, number: int) -> DeadLetter:
    found = mender.select(Selection(below=number + 1), 1)
    if not found or found[0].number != number:
        raise ConfigurationError(f"there is no dead letter {number} (any more): see duly dead list")
    return found[0]


def _fields(letter: DeadLetter) -> dict[str, Any]:
    return {
        "number": letter.number,
        "consumer": letter.subscription,
        "topic": letter.message.topic,
        "source": letter.message.source,
        "id": letter.message.id,
        "attempts": letter.attempts,
        "replays": letter.replays,
        "died": letter.died.isoformat(timespec="milliseconds"),
        "error": letter.error,
    }


def _message(letter: DeadLetter) -> dict[str, Any]:
    message = letter.message
    return {
        "key": message.key,
        "published": message.time.isoformat(timespec="milliseconds"),
        "headers": dict(message.headers),
        "bytes": len(message.body),
        "body": message.body.decode(errors="replace"),
    }


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
