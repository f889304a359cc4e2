"""``duly trace`` and ``duly tail``: one message's life, and what is published."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import click
import msgspec

from duly.cli.loading import load_app
from duly.cli.tables import print_json, printable
from duly.errors import ConfigurationError
from duly.inspection import KINDS
from duly.inspection.tracing import MEANING, Following, Logged, Standing
from duly.message import Message
from duly.operating.tracing import Life, Tracer, follower

_LOOK_EVERY_S = 0.2
_PORTION = 500


def trace_message(
    spec: str, id: str, source: str | None, topic: str | None, *, as_json: bool
) -> int:
    """Print all that is kept of it."""
    with load_app(spec) as app:
        publisher = source or app.name
        lives = Tracer.of(app.backends()).lives(id, publisher, topic)
    if as_json:
        print_json([_fields(life) for life in lives])
    elif not lives:
        click.echo(
            f"nothing is kept of {printable(id)} of {printable(publisher)}: it was never published "
            "under this source, or everybody is done with it and it met nothing, or it was erased",
            err=True,
        )
    for number, life in enumerate(() if as_json else lives):
        if number:
            click.echo()
        for line in _told(life):
            click.echo(line)
    return 0 if lives else 1


def _fields(life: Life) -> dict[str, Any]:
    trace = life.trace
    return {
        "topic": trace.topic,
        "source": trace.source,
        "id": trace.id,
        "position": trace.position,
        "message": None if trace.message is None else _message(trace.message),
        "stored": None if trace.stored is None else _time(trace.stored_ms),
        "standings": [
            {**_standing(standing), "effect": _time(life.effects_ms.get(standing.subscription))}
            for standing in trace.standings
        ],
        "incidents": [
            {"time": _time(i.time_ms), "kind": i.kind, "consumer": i.subscription,
             "count": i.count, "worker": i.worker, "detail": i.detail}
            for i in trace.incidents
        ],
        "published": [
            {"position": each.position, "topic": each.message.topic, "id": each.message.id}
            for each in life.followed
        ],
    }  # fmt: skip


def _standing(standing: Standing) -> dict[str, Any]:
    return {
        "consumer": standing.subscription,
        "state": standing.state,
        "attempt": standing.attempt,
        "worker": standing.worker,
        "at": _time(standing.at_ms),
        "error": standing.error,
        "replays": standing.replays,
    }


def _message(message: Message[Any]) -> dict[str, Any]:
    return {
        "made": _time(message.time_ms),
        "key": message.key,
        "due": _time(message.due_ms),
        "headers": dict(message.headers),
        "bytes": len(message.body),
        "body": message.body.decode(errors="replace"),
    }


def _told(life: Life) -> Iterator[str]:
    trace, message = life.trace, life.trace.message
    where = "position not kept" if trace.position is None else f"position {trace.position}"
    yield printable(f"{trace.topic}  {trace.id}  from {trace.source}  {where}")
    if message is None:
        yield "  the log keeps it no more"
    else:
        key = "" if message.key is None else f", key {message.key}"
        yield printable(f"  made {_time(message.time_ms)}, {len(message.body):,} bytes{key}")
        if message.due_ms is not None:
            yield f"  not before {_time(message.due_ms)}"
    if trace.stored_ms is not None:
        yield f"  stored {_time(trace.stored_ms)}"
    for incident in trace.incidents:
        whom = incident.subscription or incident.topic or ""
        by = "" if incident.worker is None else f" (worker {incident.worker})"
        detail = incident.detail.partition("\n")[0] or KINDS.get(incident.kind, "")
        yield printable(f"  {_time(incident.time_ms)}  {incident.kind}  {whom}  {detail}{by}")
    met = {incident.subscription for incident in trace.incidents}
    for standing in trace.standings:
        effect_ms = life.effects_ms.get(standing.subscription)
        there = effect_ms is not None or standing.subscription in met
        yield printable("  " + _where(standing, effect_ms, certain=there))
    for each in life.followed:
        yield printable(f"  published {each.message.topic} {each.message.id}")


def _where(standing: Standing, effect_ms: int | None, *, certain: bool) -> str:
    """``certain``: it came to this subscription, as what is kept of it shows."""
    said = f"{standing.subscription}: {MEANING[standing.state]}"
    if standing.state == "done":
        said = f"{standing.subscription}: done" if certain else said
        when = "when is not kept" if effect_ms is None else f"took effect {_time(effect_ms)}"
        return f"{said}; {when}"
    if standing.worker is not None:
        said += f" {standing.worker}"
    if standing.at_ms is not None:
        said += f", {_time(standing.at_ms)}"
    said += f", attempt {standing.attempt}"
    return said if standing.error is None else f"{said}: {standing.error.partition(chr(10))[0]}"


def _time(time_ms: int | None) -> str | None:
    if time_ms is None:
        return None
    try:
        return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError):
        return f"{time_ms} ms"


# --- tail


def tail_topic(
    spec: str,
    topic: str,
    start: datetime | int | Literal["earliest"] | None,
    *,
    follow: bool,
    limit: int | None,
    as_json: bool,
) -> int:
    """Print messages as they come, until interrupted."""
    if isinstance(start, int):
        raise ConfigurationError("--from: give earliest, an age (2h) or a time, not a position")
    if start is None and not follow:
        raise ConfigurationError("--no-follow ends with what is there: say --from where")
    with load_app(spec) as app:
        broker = follower(app.backends()[0])
        mark = broker.mark(topic, "latest" if start is None else start)
        shown = 0
        for some in _published(broker, topic, mark, follow=follow):
            for logged in some if limit is None else some[: limit - shown]:
                click.echo(_line(logged, as_json=as_json))
                shown += 1
            if shown == limit:
                break
    return 0


def _published(
    broker: Following, topic: str, mark: Any, *, follow: bool
) -> Iterator[Sequence[Logged]]:
    while True:
        followed = broker.follow(topic, mark, _PORTION)
        mark = followed.mark
        if followed.missed:
            click.echo(f"{followed.missed:,} were gone before they were looked at", err=True)
        if followed.messages:
            yield followed.messages
        elif follow:
            time.sleep(_LOOK_EVERY_S)
        else:
            return


def _line(logged: Logged, *, as_json: bool) -> str:
    message = logged.message
    if as_json:
        fields = {"position": logged.position, "topic": message.topic, "source": message.source,
                  "id": message.id, **_message(message)}  # fmt: skip
        return msgspec.json.encode(fields).decode()
    key = "" if message.key is None else f"  [{message.key}]"
    body = message.body[:2000].decode(errors="replace")
    return printable(f"{_time(message.time_ms)}  {message.id}{key}  {body}")
