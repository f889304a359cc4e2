"""``duly erase`` and its options."""

from __future__ import annotations

import click


@click.command()
@click.argument("app", metavar="MODULE:APP")
@click.option("--key", metavar="KEY", help="Messages with this key.")
@click.option("--id", "id", metavar="ID", help="Messages with this id.")
@click.option("--source", metavar="APP", help="With --id: who published it; else this app.")
@click.option("--topic", metavar="NAME", help="Only of this topic.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def erase(
    app: str,
    key: str | None,
    id: str | None,
    source: str | None,
    topic: str | None,
    yes: bool,
    as_json: bool,
) -> int:
    """Remove a person's messages from the log, dead letters, what waits and the outbox.

    Incidents stay, without their identity and what they said. Identities that an exactly-once
    topic remembers become hashes, so that a repeat is dropped as before. What handlers wrote is
    theirs to remove. Again is harmless; interrupted, run it again.
    """
    from duly.cli.erasing import erase_messages

    return erase_messages(app, key, id, source, topic, yes=yes, as_json=as_json)
