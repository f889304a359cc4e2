"""What pytest shows of the suite: how many tests each subject had; in CI none may be skipped.

pytest loads this module by itself where duly is installed, so it imports next to nothing.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator

import pytest

PROPERTY = "duly conformance"
# How pytest's reports are filed, in the order in which a reader wants to know.
OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")


def in_ci() -> bool:
    """Whether this run is one whose result counts."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false", "no")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note whose test it is; a test that was skipped in CI has failed."""
    report = yield
    subject = getattr(getattr(item, "cls", None), "conformance_subject", None)
    if subject is None:
        return report
    report.user_properties = [*report.user_properties, (PROPERTY, subject)]
    if report.skipped and in_ci():
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} was skipped, and CI is set: what is not tested is not promised. "
            f"Provide what it needs. ({_reason(report)})"
        )
    return report


def _reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2]
    return str(getattr(report, "wasxfail", None) or report.longrepr)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests each subject had, and how they ended."""
    counts: dict[str, Counter[str]] = {}
    for outcome in OUTCOMES:
        for report in terminalreporter.stats.get(outcome, ()):
            for name, subject in getattr(report, "user_properties", ()):
                if name == PROPERTY:
                    counts.setdefault(str(subject), Counter())[outcome] += 1
    if not counts:
        return
    terminalreporter.section("duly conformance")
    width = max(map(len, counts))
    for subject in sorted(counts):
        told = ", ".join(f"{counts[subject][each]} {each}" for each in counts[subject])
        terminalreporter.line(f"{subject:<{width}}  {told}")
