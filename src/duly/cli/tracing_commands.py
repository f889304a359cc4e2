"""The commands that tell of messages, and their options."""

from __future__ import annotations

from typing import Any

import click

from duly.cli.times import Place

APP = click.argument("app", metavar="MODULE:APP")


@click.command()
@APP
@click.argument("id")
@click.option("--source", metavar="APP", help="Who published it; this app unless given.")
@click.option("--topic", metavar="NAME", help="Only on this topic.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def trace(app: str, id: str, source: str | None, topic: str | None, as_json: bool) -> int:
    """Tell the life of a message: when it was published, what it met, where it stands.

    Plain success is not recorded for each message: for a consumer that handled it without
    incident nothing is kept but that it is done. Exit status 1 where nothing is kept at all.
    """
    from duly.cli.tracing import trace_message

    return trace_message(app, id, source, topic, as_json=as_json)


@click.command()
@APP
@click.argument("topic")
@click.option("--from", "start", type=Place(), help="earliest, 2h (ago) or an ISO time; else now.")
@click.option("--no-follow", is_flag=True, help="End with what is there.")
@click.option("--limit", type=click.IntRange(1), help="End after so many.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def tail(
    app: str, topic: str, start: Any, no_follow: bool, limit: int | None, as_json: bool
) -> int:
    """Print what is published to a topic, without a subscription and without claiming it.

    Only what the topic still keeps: where every subscription is done with a message at once,
    it may be gone before it is looked at, and that is counted on standard error.
    """
    from duly.cli.tracing import tail_topic

    return tail_topic(app, topic, start, follow=not no_follow, limit=limit, as_json=as_json)


COMMANDS = (trace, tail)
