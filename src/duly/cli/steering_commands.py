"""The commands that steer subscriptions, and their options."""

from __future__ import annotations

from typing import Any

import click

from duly.cli.times import Place

APP = click.argument("app", metavar="MODULE:APP")
NAME = click.argument("subscription")
JSON = click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
YES = click.option("--yes", is_flag=True, help="Do not ask.")


@click.command()
@APP
@NAME
@JSON
def pause(app: str, subscription: str, as_json: bool) -> int:
    """Let no worker claim for a consumer any more, until it is resumed.

    What is claimed already goes on to its end. The pause is kept where the messages are: it
    holds for every worker, whenever it is started.
    """
    from duly.cli.steering import pause_or_resume

    return pause_or_resume(app, subscription, pause=True, as_json=as_json)


@click.command()
@APP
@NAME
@JSON
def resume(app: str, subscription: str, as_json: bool) -> int:
    """Let a paused consumer be worked again."""
    from duly.cli.steering import pause_or_resume

    return pause_or_resume(app, subscription, pause=False, as_json=as_json)


@click.command()
@APP
@NAME
@click.option(
    "--to", type=Place(), required=True, help="earliest, 2h (ago), an ISO time, or a position."
)
@click.option("--new-epoch", metavar="NAME", help="Declares that exactly-once effects repeat.")
@YES
@JSON
def rewind(
    app: str, subscription: str, to: Any, new_epoch: str | None, yes: bool, as_json: bool
) -> int:
    """Take a consumer back: what is kept from there on comes again, to it and to no other.

    Only what the topic still keeps can come again (Topic(retention_s=...)), and dead letters
    from there on. Who works on one of these messages now can neither settle nor commit it any
    more. Interrupted, nothing is claimed until the same command was run again.

    An exactly-once consumer is refused without --new-epoch: its effects happen again. Each
    name begins one life of a consumer: a second run with it does nothing, exit status 1.
    """
    from duly.cli.steering import rewind_subscription

    return rewind_subscription(app, subscription, to, new_epoch, yes=yes, as_json=as_json)


@click.command()
@APP
@NAME
@YES
@JSON
def drop(app: str, subscription: str, yes: bool, as_json: bool) -> int:
    """Remove a subscription: its place, its claims, what waits and its dead letters.

    Its topics keep their messages for others. A worker that still runs it claims nothing any
    more and says why; one that is started anew makes it again, from its consumer's start on.
    """
    from duly.cli.steering import drop_subscription

    return drop_subscription(app, subscription, yes=yes, as_json=as_json)


COMMANDS = (pause, resume, rewind, drop)
