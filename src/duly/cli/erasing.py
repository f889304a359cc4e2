"""``duly erase``: a person's messages removed from wherever an app keeps them."""

from __future__ import annotations

import click

from duly.cli.asking import ask, progress
from duly.cli.loading import load_app
from duly.cli.tables import print_json
from duly.operating.erasing import erasers, out_of_reach, whose_messages


def erase_messages(
    spec: str,
    key: str | None,
    id: str | None,
    source: str | None,
    topic: str | None,
    *,
    yes: bool,
    as_json: bool,
) -> int:
    """Remove them, after saying how many there are and asking. None there is success too."""
    with load_app(spec) as app:
        whose = whose_messages(key, id, source or app.name, topic)
        places = erasers(app.backends())
        total = sum(place.holdings(whose) for place in places)
        if total:
            ask(f"erase {total:,} cop{'y' if total == 1 else 'ies'} for good?", yes=yes)
        done = 0
        with progress("erasing", total) as advance:
            # Also where nothing was found: incidents may still tell of them.
            for place in places:
                for count in place.erase(whose):
                    done += count
                    advance(count)
        left = out_of_reach(app.backends())
    if as_json:
        print_json({"erased": done} if left is None else {"erased": done, "out_of_reach": left})
        return 0
    click.echo(f"erased {done:,}")
    if left is not None:
        click.echo(left, err=True)
    return 0
