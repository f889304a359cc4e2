"""The command line.

Exit statuses of every command: 0 done, 1 it did not succeed (the text says what did), 2 wrong
use or configuration (nothing was started), 130 interrupted. Those of ``duly run`` are in its help.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from duly.cli.commands import duly
from duly.errors import ConfigurationError, DulyError

WRONG_USE = 2


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``duly`` with these arguments (the process's own) and exit."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status. A user's mistake costs one line, no traceback."""
    try:
        status = duly.main(
            None if arguments is None else list(arguments), "duly", standalone_mode=False
        )
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except ConfigurationError as error:
        click.echo(f"duly: {error}", err=True)
        return WRONG_USE
    except DulyError as error:
        click.echo(f"duly: {type(error).__name__}: {error}", err=True)
        return 1
    return status if isinstance(status, int) else 0
