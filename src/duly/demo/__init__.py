"""``duly demo``: the three guarantees at work while worker processes are killed.

::

    publisher ──> shop.db ──> workers (killed) ──> effects
        │                                             │
        └──> published.db ─────> verdict <────────────┘

`shop` is the application, `crew` its worker processes, `publisher` and `killer` what happens to
it, in step by `pace`. `book` records what was asked for; `evidence` and `verdict` compare it with
what is there. `run` is the course of it all, `view` and `command` what a person sees of it.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run ``duly demo`` with these arguments; returns the exit status. Raises click's errors."""
    from duly.demo.command import demo

    status = demo.main(list(arguments), "duly demo", standalone_mode=False)
    return status if isinstance(status, int) else 0
