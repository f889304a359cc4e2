"""A process that supervises copies of `worker.py`, for tests that send it signals.

    python parent.py '{"journal": ..., "behaviour": [...], "processes": 2, "patience": {...}}'

Exits with the supervisor's status; a second line of JSON on standard output tells the refusal.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

from duly.supervisor import Patience, Supervisor


def show(lines: bytes) -> None:
    os.write(1, lines)


def main() -> int:
    given = json.loads(sys.argv[1])
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    worker = Path(__file__).with_name("worker.py")
    supervisor = Supervisor(
        [*given["run_by"], sys.executable, str(worker), given["journal"], *given["behaviour"]],
        given["processes"],
        Patience(**given["patience"]),
        show=show if given["show"] else None,
    )
    status = supervisor.run()
    if supervisor.refusal is not None:
        os.write(1, f"{supervisor.refusal}\n".encode())
    return status


if __name__ == "__main__":
    sys.exit(main())
