"""What a person sees of a run: a live table while it lasts, and the verdict at the end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from duly.demo import shop
from duly.demo.result import Flow, Result
from duly.demo.run import Moment, Watch
from duly.demo.verdict import Verdict

# Between two lines where no terminal shows a live table.
LINE_S = 2.0
# Speeds are those of so long: shorter ones flicker, longer ones lag.
SPEED_S = 2.0

_COLOURS: dict[Verdict, str] = {"valid": "bold green", "invalid": "bold red", "unknown": "yellow"}
_GUARANTEE = {consumer.name: consumer.guarantee.value for consumer in shop.app.consumers}
_SAYS: dict[Verdict, str] = {
    "valid": "Every promise was kept.",
    "invalid": "A promise was broken.",
    "unknown": "This run does not show whether the promises hold.",
}


@contextmanager
def watching(console: Console) -> Iterator[Watch]:
    """A live table on a terminal, a line now and then elsewhere."""
    if console.is_terminal:
        speed = Speed()
        with Live(console=console, refresh_per_second=10, transient=True) as live:

            def show(moment: Moment) -> None:
                speed.note(moment)
                live.update(progress(moment, speed))

            yield show
    else:
        yield _lines(console)


def _lines(console: Console) -> Callable[[Moment], None]:
    last_s = -LINE_S

    def tell(moment: Moment) -> None:
        nonlocal last_s
        if moment.seconds - last_s >= LINE_S:
            last_s = moment.seconds
            done = "  ".join(f"{name} {each.settled:,}" for name, each in moment.reach.items())
            in_work = sum(kill.in_work for kill in moment.kills)
            console.print(
                f"{moment.seconds:5.1f} s  published {moment.published:,}  {done}  "
                f"killed {len(moment.kills)} ({in_work} in work)",
                highlight=False,
                soft_wrap=True,
            )

    return tell


class Speed:
    """Messages a second of each consumer over the last moments."""

    def __init__(self) -> None:
        self._moments: deque[Moment] = deque()

    def note(self, moment: Moment) -> None:
        """Take in how far everybody is now."""
        self._moments.append(moment)
        while moment.seconds - self._moments[0].seconds > SPEED_S:
            self._moments.popleft()

    def of(self, consumer: str) -> float:
        """Messages a second."""
        if not self._moments:
            return 0.0
        first, last = self._moments[0], self._moments[-1]
        done = _settled(last, consumer) - _settled(first, consumer)
        return done / (last.seconds - first.seconds) if last.seconds > first.seconds else 0.0


def progress(moment: Moment, speed: Speed) -> RenderableType:
    """The run as it stands."""
    total = moment.settings.messages
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True, expand=True)
    for name in ("consumer", "guarantee"):
        table.add_column(name, no_wrap=True)
    for name in ("published", "handled", "kills"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", ratio=1)
    table.add_column("per s", justify="right", min_width=6)
    for consumer, guarantee in _GUARANTEE.items():
        settled = _settled(moment, consumer)
        hits = sum(consumer in kill.held or consumer == kill.struck for kill in moment.kills)
        table.add_row(
            consumer,
            guarantee,
            f"{moment.published:,}",
            f"{settled:,}",
            Text(f"{hits}", style="red" if hits else "dim"),
            ProgressBar(total=max(total, 1), completed=settled),
            f"{speed.of(consumer):,.0f}",
        )
    return Group(_deaths_so_far(moment), table)


def _settled(moment: Moment, consumer: str) -> int:
    reach = moment.reach.get(consumer)
    return reach.settled if reach else 0


def _deaths_so_far(moment: Moment) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f"{moment.seconds:5.1f} s  {moment.phase}, {moment.settings.processes} workers, ")
    text.append(f"{len(moment.kills)} of {moment.settings.kills} killed\n", style="bold red")
    if moment.kills:
        last = moment.kills[-1]
        held = ", ".join(f"{count} of {name}" for name, count in last.held.items())
        where = "inside a transaction, " if last.in_transaction else ""
        text.append(f"         last: {last.worker.partition('-')[0]}, {where}holding {held}")
    return text


def verdict(result: Result) -> RenderableType:
    """The result as the last thing on the screen."""
    deaths = result.deaths
    head = Text.assemble(
        f"{deaths.kills} worker processes were killed with SIGKILL, ",
        (f"{deaths.in_work} with work in their hands", "bold"),
        f", {deaths.in_transaction} of them inside a transaction. {result.seconds:.1f} s.",
    )
    end = Text(_SAYS[result.verdict], style=_COLOURS[result.verdict])
    for reason in result.why:
        end.append(f"\n{reason[0].upper()}{reason[1:]}.", style="yellow")
    return Panel(
        Group(head, "", _numbers(result.flows), _sentences(result.flows, result.why), "", end),
        title="duly demo: what the database says",
        box=box.ROUNDED,
        padding=(1, 1),
    )


def _numbers(flows: Sequence[Flow]) -> Table:
    # As wide as a terminal of 80 columns allows: the guarantee goes below the flow's name.
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, expand=True)
    table.add_column("flow", no_wrap=True)
    for name in ("published", "handled", "lost", "twice", "per s"):
        table.add_column(name, justify="right")
    table.add_column("verdict", justify="right")
    for flow in flows:
        found = flow.judgement
        table.add_row(
            Text.assemble(found.name, "\n", (found.guarantee.value, "dim")),
            f"{found.published:,}",
            f"{found.handled:,}",
            _marked(found.lost),
            _marked(found.duplicated),
            f"{flow.messages_per_s:,.0f}",
            Text(flow.verdict, style=_COLOURS[flow.verdict]),
        )
    return table


def _marked(count: int) -> Text:
    return Text(f"{count:,}", style="bold" if count else "dim")


def _sentences(flows: Sequence[Flow], result_why: Sequence[str]) -> Table:
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(ratio=1)
    for flow in flows:
        found = flow.judgement
        if table.row_count:
            table.add_row()
        told = Text.assemble(("promised: ", "dim"), f"{found.promised}.\n", ("happened: ", "dim"))
        if found.broken:
            told.append("; ".join(found.broken) + ".", style=_COLOURS["invalid"])
        else:
            told.append(f"{found.happened}.")
        if own := [why for why in flow.why if flow.verdict == "unknown" and why not in result_why]:
            told.append(f" Unknown: {'; '.join(own)}.", style=_COLOURS["unknown"])
        name, _, manner = found.name.partition("-")
        table.add_row(f"{name}\n{manner}".rstrip(), told)
    return table
