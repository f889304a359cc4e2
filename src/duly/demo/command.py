"""``duly demo``: options, the folder it runs in, and how it reports."""

from __future__ import annotations

import io
import json
import re
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click
from rich.console import Console, RenderableType

TEMPORARY = "-"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--messages", type=click.IntRange(0, 10_000_000), default=50_000,
    help="How many payments are published, and as many readings and ride updates.",
)  # fmt: skip
@click.option("--kills", type=click.IntRange(0, 10_000), default=20, help="SIGKILLs, spread out.")
@click.option("--processes", type=click.IntRange(1, 64), default=4, help="Worker processes.")
@click.option("--seed", type=int, default=1, help="For what is published, and who is killed.")
@click.option(
    "--keep", is_flag=False, flag_value=TEMPORARY, default=None, metavar="[FOLDER]",
    help="Keep the database and the files beside it, in this new or empty folder.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option(
    "--picture", type=click.Path(dir_okay=False, writable=True, path_type=Path), default=None,
    metavar="FILE", help="Also write the last screen as an SVG.",
)  # fmt: skip
def demo(
    messages: int,
    kills: int,
    processes: int,
    seed: int,
    keep: str | None,
    as_json: bool,
    picture: Path | None,
) -> int:
    """Watch the three guarantees hold while worker processes are killed.

    A small shop on one SQLite file: sensor readings at-most-once, ride updates at-least-once
    (with a handler that is idempotent and one that is not), payments exactly-once. Its worker
    processes are killed with SIGKILL, most of them with work in their hands. Whether every
    promise was kept is then read from the database alone.

    \b
    Exit status:
      0  every promise was kept
      1  a promise was broken
      2  wrong use
      3  unknown: too few kills hit their aim to show it
    """
    from duly.demo import view
    from duly.demo.run import Settings, run

    console = Console(stderr=as_json)
    with _interruptible(), _folder(keep) as folder:
        with view.watching(console) as watch:
            result = run(folder, Settings(messages, kills, processes, seed), watch)
        if as_json:
            click.echo(json.dumps(result.as_json(), indent=2))
        else:
            console.print(view.verdict(result))
        if picture is not None:
            _draw(view.verdict(result), picture)
        if keep is not None:
            console.print(f"Kept: {folder}", highlight=False, soft_wrap=True)
    return result.exit_status


def _draw(screen: RenderableType, picture: Path) -> None:
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
    console.print(screen)
    # Without the fonts it would fetch from elsewhere: any monospaced one does.
    svg = re.sub(
        r"@font-face \{.*?\}\s*", "", console.export_svg(title="duly demo"), flags=re.DOTALL
    )
    picture.write_text(svg, encoding="utf-8")


@contextmanager
def _folder(keep: str | None) -> Iterator[Path]:
    """Where the run takes place; gone afterwards unless it is to be kept."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="duly-demo-") as name:
            yield Path(name).resolve()
        return
    if keep == TEMPORARY:
        yield Path(tempfile.mkdtemp(prefix="duly-demo-")).resolve()
        return
    folder = Path(keep).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise click.BadParameter(f"{folder} is not empty: every run needs its own")
    yield folder


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does: workers and files are cleaned up."""

    def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise KeyboardInterrupt

    # SIGINT too, which a shell's background jobs are started to ignore.
    before = {each: signal.signal(each, interrupt) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
