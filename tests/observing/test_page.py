"""docs/observing.md names every metric and every span, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

import duly
import duly.metrics

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs/observing.md").read_text(encoding="utf-8")


def test_the_page_has_every_metric():
    registry = CollectorRegistry()
    app = duly.App("city", broker="memory://")
    duly.metrics.watch(app, registry)
    helped = re.findall(r"^# TYPE (\w+) (\w+)$", generate_latest(registry).decode(), re.MULTILINE)
    # Each counter says as a gauge when it was made.
    there = {name for name, _ in helped if not name.endswith("_created")}
    app.close()
    tables = "\n".join(line for line in PAGE.splitlines() if line.startswith("| `duly_"))
    assert set(re.findall(r"`(duly_\w+)`", tables)) == there


def test_the_page_has_every_span():
    source = ast.parse((ROOT / "src/duly/tracing.py").read_text(encoding="utf-8"))
    about = [
        node.args[0].value
        for node in ast.walk(source)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "self._about"
        and isinstance(node.args[0], ast.Constant)
    ]
    assert set(re.findall(r"^\| `(\w+) TOPIC`", PAGE, re.MULTILINE)) == set(about)
