"""``duly pause|resume|rewind|drop``: where subscriptions stand, changed by a person."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Literal

import click

from duly.cli.asking import ask, progress
from duly.cli.loading import load_app
from duly.cli.tables import print_json
from duly.inspection import Observing
from duly.inspection.steering import REMOVING, REWINDING
from duly.operating.steering import Rewind, Steerer


def pause_or_resume(spec: str, subscription: str, *, pause: bool, as_json: bool) -> int:
    """Do the one or the other; once more does no harm."""
    with _steerer(spec) as steerer:
        change = steerer.pause if pause else steerer.resume
        changed = change(subscription)
    state = "paused" if pause else "resumed"
    if as_json:
        print_json({"subscription": subscription, state: changed})
    else:
        click.echo(f"{state} {subscription}" if changed else f"{subscription}: {_WAS[pause]}")
    return 0


_WAS = {True: "it was paused already", False: "it was not paused"}


def rewind_subscription(
    spec: str,
    subscription: str,
    to: datetime | int | Literal["earliest"],
    epoch: str | None,
    *,
    yes: bool,
    as_json: bool,
) -> int:
    """Take it back, after saying what comes again and asking."""
    with _steerer(spec) as steerer:
        plan = steerer.plan(subscription, None if to == "earliest" else to, epoch)
        unfinished = steerer.is_under_way(subscription, REWINDING)
        for target in plan.targets:
            click.echo(f"{target.topic}: {target.messages:,} from {target.position} on", err=True)
        if plan.messages or unfinished:
            ask(_question(plan, unfinished=unfinished), yes=yes)
        with progress("rewinding") as advance:
            done = steerer.rewind(plan, advance)
    if as_json:
        print_json(
            {
                "subscription": subscription,
                "rewound": done,
                "messages": plan.messages if done else 0,
                "epoch": epoch,
                "targets": plan.targets,
            }
        )
    elif done and unfinished and not plan.messages:
        click.echo(f"rewound {subscription}: what was begun before is finished")
    elif done:
        click.echo(f"rewound {subscription}: {plan.messages:,} messages come again")
    elif plan.targets:
        click.echo(f"{subscription}: epoch {epoch!r} was begun before; nothing was done")
    else:
        click.echo(f"{subscription}: nothing is kept between there and where it stands")
    return 0 if done else 1


def _question(plan: Rewind, *, unfinished: bool) -> str:
    if unfinished:
        return f"finish the rewind of {plan.subscription} that was begun before?"
    return f"{plan.messages:,} messages come again to {plan.subscription}: {plan.meaning}. Rewind?"


def drop_subscription(spec: str, subscription: str, *, yes: bool, as_json: bool) -> int:
    """Remove it, after saying who holds what and asking."""
    with _steerer(spec) as steerer:
        unfinished = steerer.is_under_way(subscription, REMOVING)
        if not unfinished or subscription in steerer.broker.recorded():
            meaning = steerer.check(subscription)
            _tell_holders(steerer.broker, subscription)
            ask(f"remove subscription {subscription} ({meaning})?", yes=yes)
        with progress("removing") as advance:
            done = steerer.drop(subscription, advance)
    if as_json:
        print_json({"subscription": subscription, "dropped": done})
    else:
        click.echo(f"dropped {subscription}")
    return 0 if done else 1


def _tell_holders(broker: Any, subscription: str) -> None:
    if not isinstance(broker, Observing):
        return
    for holder in broker.holders():
        if holder.subscription == subscription and holder.alive:
            click.echo(
                f"worker {holder.worker} is at work on {holder.messages:,} messages of it", err=True
            )


@contextmanager
def _steerer(spec: str) -> Iterator[Steerer]:
    with load_app(spec) as app:
        yield Steerer.of(app.backends(), app.consumers)
