"""Makes the environment of a peer that wants other drivers than duly: ``apart.py quixstreams``.

It is beside the one that this runs in, with what rows and servers need. Where the package index
cannot be asked it is not made, and the rows that need it are left out.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from rows import python_with

NEEDED = ("msgspec", "psycopg[binary]", "psycopg-pool", "pytest", "amqp")


def main() -> int:
    for package in sys.argv[1:]:
        python = Path(python_with(package))
        mark = python.parent.parent / ".made"
        if mark.exists():
            continue
        venv.create(python.parent.parent, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "--quiet", package, *NEEDED]
        if subprocess.run(command, check=False, timeout=600).returncode:
            python.unlink()
            print(f"{package} is not measured: it could not be installed", file=sys.stderr)
            continue
        mark.touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
