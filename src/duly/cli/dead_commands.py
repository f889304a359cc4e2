"""The commands of ``duly dead`` and their options."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import click

from duly.cli.times import Age

APP = click.argument("app", metavar="MODULE:APP")
# What a database can count, and one more.
NUMBER = click.IntRange(1, (1 << 63) - 2)


def which_options(command: Callable[..., int]) -> Callable[..., int]:
    """The options that say which dead letters are meant, as one argument ``which``."""

    @click.option("--consumer", metavar="NAME", help="Only of this consumer.")
    @click.option("--topic", metavar="NAME", help="Only of this topic.")
    @click.option("--id", metavar="ID", help="Only messages with this id.")
    @click.option("--error", metavar="TEXT", help="Only where the error contains this.")
    @click.option("--older", "older_s", type=Age(), help="Given up on longer ago: 90s, 2h, 7d.")
    @click.option("--newer", "newer_s", type=Age(), help="Given up on since then.")
    @functools.wraps(command)
    def with_selection(
        consumer: str | None,
        topic: str | None,
        id: str | None,
        error: str | None,
        older_s: float | None,
        newer_s: float | None,
        **others: Any,
    ) -> int:
        from duly.cli.dead import selection

        which = selection(consumer, topic, id, error, older_s, newer_s)
        return command(which=which, **others)

    return with_selection


JSON = click.option("--json", "as_json", is_flag=True, help="As JSON.")
YES = click.option("--yes", is_flag=True, help="Do not ask.")
NUMBERS = click.argument("numbers", nargs=-1, type=NUMBER, metavar="[NUMBER]...")
ALL = click.option("--all", "every", is_flag=True, help="All of them.")


@click.group()
def dead() -> None:
    """Look at what consumers gave up on; bring it back, or remove it."""


@dead.command("list")
@APP
@which_options
@click.option("--limit", type=NUMBER, default=100, show_default=True)
@JSON
def list_(app: str, which: Any, limit: int, as_json: bool) -> int:
    """List dead letters, the latest first."""
    from duly.cli.dead import list_dead

    return list_dead(app, which, limit=limit, as_json=as_json)


@dead.command()
@APP
@click.argument("number", type=NUMBER)
@JSON
def show(app: str, number: int, as_json: bool) -> int:
    """Show one with its message and error, and what a replay would come to."""
    from duly.cli.dead import show_dead

    return show_dead(app, number, as_json=as_json)


@dead.command()
@APP
@NUMBERS
@which_options
@ALL
@YES
@JSON
def replay(
    app: str, numbers: Sequence[int], which: Any, every: bool, yes: bool, as_json: bool
) -> int:
    """Deliver dead letters again, to the consumer that gave them up and to no other.

    A message keeps its identity and has all its attempts before it. In order by key it comes
    before the later ones of its key; where the store keeps the letters of a broker that keeps
    none (RabbitMQ, Kafka), behind what waits already. Exit status 1 where not all that were
    meant were there.
    """
    from duly.cli.dead import Meant, replay_dead

    return replay_dead(app, Meant(numbers, which, every), yes=yes, as_json=as_json)


@dead.command()
@APP
@NUMBERS
@which_options
@ALL
@YES
@JSON
def discard(
    app: str, numbers: Sequence[int], which: Any, every: bool, yes: bool, as_json: bool
) -> int:
    """Remove dead letters for good. A key that one of them held goes on."""
    from duly.cli.dead import Meant, discard_dead

    return discard_dead(app, Meant(numbers, which, every), yes=yes, as_json=as_json)
