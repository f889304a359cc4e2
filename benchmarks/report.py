"""The results as a page: one table a section, aims beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rows import Above, Aim, Below, Ratio, Row
from workload import Sample

BEGIN = "<!-- results: begin -->"
END = "<!-- results: end -->"


@dataclass
class Result:
    """All that is known of one row."""

    row: Row
    samples: list[Sample] = field(default_factory=list)
    counted: Sample | None = None
    failure: str | None = None

    @property
    def per_s(self) -> float:
        return median(sample.per_s for sample in self.samples)

    def figure(self, name: str) -> float | None:
        values = [sample.figures[name] for sample in self.samples if name in sample.figures]
        return median(values) if values else None


Results = Mapping[str, Result]


def ratios(
    results: Results, result: Result, against: tuple[str, ...]
) -> tuple[list[float], str] | None:
    """How fast beside the fastest of the others, round by round."""
    others = [results[name] for name in against if name in results and results[name].samples]
    if not others or not result.samples:
        return None
    best = max(others, key=lambda other: other.per_s)
    pairs = zip(result.samples, best.samples, strict=False)
    return [mine.per_s / its.per_s for mine, its in pairs], best.row.name


def judged(results: Results, result: Result, aim: Aim) -> tuple[str, bool | None]:
    """What was reached, in words, and whether the aim is met (None: cannot say)."""
    match aim:
        case Ratio(against, least):
            reached = ratios(results, result, against)
            if reached is None:
                return f"{against[0]}: not measured", None
            shares, name = reached
            share, wide = median(shares), f"{min(shares):.2f} to {max(shares):.2f}"
            text = f"{share:.2f} ({wide}) of “{name}” (aim {least:g})"
            return text, share >= least
        case Below(figure, limit):
            value = result.figure(figure)
            if value is None:
                return f"{figure}: not measured", None
            return f"{figure} {number(value)} (aim < {limit:g})", value < limit
        case Above(figure, limit):
            value = result.figure(figure)
            if value is None:
                return f"{figure}: not measured", None
            return f"{figure} {number(value)} (aim {limit:g})", value >= limit


def number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def each(count: float | None, messages: int) -> str:
    if count is None:
        return "n/a"
    share = count / messages
    return f"{share:.2f}" if share >= 0.1 else f"{share:.4f}"


def line(results: Results, result: Result, names: Sequence[str]) -> str:
    """One row of a table; ``names``: what was counted."""
    if result.failure is not None:
        return f"| {result.row.name} | failed: {result.failure.splitlines()[-1][:160]} | | | | | |"
    verdicts = [judged(results, result, aim) for aim in result.row.aims]
    words = {True: "met", False: "**missed**", None: "unknown"}
    counted = result.counted
    cells = [
        result.row.name,
        *speed_cells(result),
        "<br>".join(f"{text}: {words[met]}" for text, met in verdicts),
        *(
            each(counted.figures.get(name), counted.messages) if counted else "n/a"
            for name in names
        ),
    ]
    return f"| {' | '.join(cells)} |"


def speed_cells(result: Result) -> tuple[str, str, str]:
    if result.row.paced:
        return "", "", ""
    speeds = [sample.per_s for sample in result.samples]
    middle = median(speeds)
    return (
        f"{middle:,.0f}",
        f"{1e6 / middle:.3g}",
        f"{min(speeds):,.0f} to {max(speeds):,.0f}",
    )


def head_of(names: Sequence[str]) -> str:
    counted = "".join(f" {name} a message |" for name in names)
    rule = "--:|" * len(names)
    return (
        f"| row | messages/s | µs a message | slowest to fastest | aim |{counted}\n"
        f"|---|--:|--:|--:|---|{rule}"
    )


def figures(result: Result) -> list[str]:
    """The further figures of a row, as list items."""
    names = dict.fromkeys(name for sample in result.samples for name in sample.figures)
    shown = [
        f"{name} {number(value)}" for name in names if (value := result.figure(name)) is not None
    ]
    return [f"- {result.row.name}: {', '.join(shown)}"] if shown else []


def page(results: Results, head: Sequence[str], names: Sequence[str]) -> str:
    """Everything between the markers; ``names``: what was counted."""
    parts = ["\n".join(head)]
    for section in dict.fromkeys(result.row.section for result in results.values()):
        members = [result for result in results.values() if result.row.section == section]
        table = "\n".join([head_of(names), *(line(results, result, names) for result in members)])
        details = [text for result in members for text in figures(result)]
        parts.append(f"## {section[0].upper()}{section[1:]}\n\n{table}")
        if details:
            parts.append("\n".join(details))
    return "\n\n".join(parts)


def write(path: Path, text: str) -> None:
    """Put the text between the markers of the file, keeping what is around them."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
