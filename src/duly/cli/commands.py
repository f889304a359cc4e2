"""The commands and their options. What each does is imported when it is run."""

from __future__ import annotations

from collections.abc import Sequence

import click

from duly.cli.dead_commands import dead
from duly.cli.erasing_commands import erase
from duly.cli.steering_commands import COMMANDS as STEERING
from duly.cli.tracing_commands import COMMANDS as TRACING
from duly.logs import Format

APP = click.argument("app", metavar="MODULE:APP")
HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=HELP)
@click.version_option(package_name="duly", message="%(prog)s %(version)s")
def duly() -> None:
    """Messaging in which delivery semantics are declared, checked, kept and proven."""


@duly.command()
@APP
@click.option("--processes", type=click.IntRange(1, 1024), default=1, help="Worker processes.")
@click.option("--consumers", metavar="A,B", help="Work only these; the default is all.")
@click.option("--reload", is_flag=True, help="Start anew when a source file changes.")
@click.option(
    "--drain-s",
    type=click.FloatRange(0, 86400),
    default=30.0,
    help="Seconds that running handlers have to end once a signal came.",
)
@click.option(
    "--metrics",
    metavar="[HOST:]PORT",
    help="Serve Prometheus metrics; further processes on the next ports. Loopback by default.",
)
@click.option(
    "--log-format",
    type=click.Choice(["auto", "human", "json"]),
    default="auto",
    help="auto: human on a terminal, JSON lines elsewhere.",
)
def run(
    app: str,
    processes: int,
    consumers: str | None,
    reload: bool,
    drain_s: float,
    metrics: str | None,
    log_format: Format,
) -> int:
    """Work the consumers of an app until SIGTERM, SIGINT or SIGHUP.

    A worker that dies is started again, with growing pauses where it keeps dying; one that
    hangs is killed. The first signal drains: no handler starts any more, running ones may end,
    the rest is given back. The second stops at once.

    \b
    Exit status:
      0    drained: every handler that ran has ended
      1    drained, but handlers still ran after --drain-s; their messages come again
      2    wrong use, or the app, its configuration or its contract was refused
      128+ stopped at once by the signal of this number
    """
    from duly.cli.metering import place_of
    from duly.cli.running import RunOptions, run_app

    names = None if consumers is None else _names(consumers)
    place = None if metrics is None else place_of(metrics, processes)
    return run_app(RunOptions(app, processes, names, drain_s, log_format, reload, place))


def _names(text: str) -> Sequence[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise click.BadParameter(
            f"{text!r}: give names with commas between", param_hint="--consumers"
        )
    return names


@duly.command()
@APP
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
@click.option("--processes", type=click.IntRange(1, 1024), default=1, help="As for duly run.")
def contract(app: str, as_json: bool, processes: int) -> int:
    """Print what is promised for each topic and consumer, what keeps it, and its limits.

    Exit status 2 where something was asked for that cannot be kept, with the remedy.
    """
    from duly.cli.contract import print_contract

    return print_contract(app, as_json=as_json, processes=processes)


@duly.command()
@APP
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
@click.option("--watch", is_flag=True, help="Again every second, until interrupted.")
def status(app: str, as_json: bool, watch: bool) -> int:
    """Show what each consumer has before it, holds and gave up on, and who works.

    The counts of what was not plain success go back as far as incidents are kept.
    """
    from duly.cli.status import show_status, watch_status

    if watch and as_json:
        raise click.UsageError("--watch draws for people: leave out --json, or --watch")
    return watch_status(app) if watch else show_status(app, as_json=as_json)


@duly.command()
@APP
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def init(app: str, as_json: bool) -> int:
    """Make what an app needs (schema, topics, subscriptions), without working anything.

    A subscription begins where its consumer's start says: made now, it gets what is published
    from now on, also before the first worker starts.
    """
    from duly.cli.doctor import make_ready

    return make_ready(app, as_json=as_json)


@duly.command()
@APP
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def doctor(app: str, as_json: bool) -> int:
    """Look for what endangers the promises where an app runs. Exit status 1: something is wrong.

    Opens broker and store as a worker does (which makes what is missing), and changes nothing.
    """
    from duly.cli.doctor import examine_app

    return examine_app(app, as_json=as_json)


@duly.command()
@APP
@click.argument("topic")
@click.option("--from", "source", metavar="FILE|-", required=True, help="-: standard input.")
@click.option(
    "--format", "format_", type=click.Choice(["jsonl", "csv"]), help="Else by the file's name."
)
@click.option("--id", "id_field", metavar="FIELD", help="The field that identifies a line.")
@click.option("--key", "key_field", metavar="FIELD", help="The field to order by.")
@click.option("--batch-name", metavar="NAME", help="Stands for the file in ids; else its name.")
@click.option("--from-line", type=click.IntRange(1), default=1, help="Leave out the lines before.")
def publish(
    app: str,
    topic: str,
    source: str,
    format_: str | None,
    id_field: str | None,
    key_field: str | None,
    batch_name: str | None,
    from_line: int,
) -> int:
    """Publish the lines of a file (JSON lines or CSV) to a topic of the app.

    Each line is checked against the topic's type. A line that is wrong is reported with its
    number and reason and left out; the others are published, and the exit status is 1.

    Every line has an identity, so that an interrupted run can simply be started again: on an
    exactly-once topic, lines published before are dropped as repeats, as long as the topic
    remembers ids. The identity is the field named by --id, or else NAME:LINE, the file's name
    (without folders; or --batch-name) and the line's number. So do not insert or remove lines
    between two runs: mend wrong ones in place; and give a new day's data a new name. Lines that
    were changed after they were published are reported as identity conflicts, not published.

    On other topics nothing drops repeats: after an interruption, go on with --from-line.
    """
    from duly.cli.publishing import PublishOptions, publish_file

    return publish_file(
        PublishOptions(app, topic, source, format_, id_field, key_field, batch_name, from_line)
    )


@duly.command()
@click.argument("url")
def adopt(url: str) -> int:
    """Go on with a PostgreSQL log that was restored here from another cluster.

    After pg_restore or a logical migration duly refuses the log, because it may still be worked
    where it came from: then every message would be handled in both places. Make sure that it is
    not, and name the broker's URL once. Nothing that the log holds is lost; what had been handled
    since the dump was made is handled again.
    """
    from duly.connect import adopt as adopt_log

    adopt_log(url)
    click.echo("adopted: the log goes on in this cluster")
    return 0


@duly.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def demo(arguments: tuple[str, ...]) -> int:
    """Watch the three guarantees hold while worker processes are killed."""
    from duly.demo import main

    status = main(list(arguments))
    return status if isinstance(status, int) else 0


duly.add_command(dead)
for command in (*STEERING, *TRACING, erase):
    duly.add_command(command)
