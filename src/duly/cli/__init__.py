"""The command line.

Exit statuses of every command: 0 done, 1 it did not succeed (the text says what did), 2 wrong
use or configuration (nothing was started), 130 interrupted. Those of ``duly run`` are in its help.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import NoReturn

import click

from duly.cli.commands import duly
from duly.errors import ConfigurationError, DulyError

WRONG_USE = 2


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``duly`` with these arguments (the process's own) and exit."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # started without one (>&-): then nobody reads it
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115, PTH123 - to the end
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status. A user's mistake costs one line, no traceback."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        _check_text(given)
        status = duly.main(given, "duly", standalone_mode=False)
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.ClickException as error:
        where = getattr(error, "ctx", None)
        also = f" See {where.command_path} --help." if where is not None else ""
        click.echo(f"duly: {error.format_message().rstrip()}{also}", err=True)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except ConfigurationError as error:
        click.echo(f"duly: {error}", err=True)
        return WRONG_USE
    except (DulyError, OSError) as error:  # also an output that cannot be written
        click.echo(f"duly: {type(error).__name__}: {error}", err=True)
        return 1
    return status if isinstance(status, int) else 0


def _check_text(arguments: Sequence[str]) -> None:
    """Raise `ConfigurationError` for bytes that are no text: no id, key or name holds any.

    A file may be called by whatever bytes it likes.
    """
    for before, argument in pairwise(["", *arguments]):
        if before == "--from" or argument.startswith("--from="):
            continue
        try:
            argument.encode()
        except UnicodeEncodeError:
            shown = argument.encode(errors="surrogateescape")
            raise ConfigurationError(f"argument {shown!r} is no text in UTF-8") from None
