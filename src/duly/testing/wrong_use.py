"""Options of the commands of this room, where they are wrong: one line, exit status 2."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click


class WrongUse(click.ClickException):
    """One line that says what is wrong and what to give instead."""

    exit_code = 2


class Command(click.Command):
    """A command whose wrong use is told in one line."""

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        """As click's, without the lines about usage."""
        try:
            return super().make_context(*args, **more)
        except click.UsageError as error:
            raise WrongUse(error.format_message()) from None


class Seconds(click.FloatRange):
    """A span of time that ends."""

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse what is no number, not above 0, or without end."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} never ends.", param, ctx)
        return number


def function_named(named: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` names, imported from where it is run."""
    module, _, name = named.partition(":")
    if not module or not name:
        raise WrongUse(f"{named!r}: give module:function, such as tests.planted:break_it")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # noqa: BLE001 - whatever the module does when it is imported
        raise WrongUse(
            f"{named!r}: importing {module!r} failed: {type(error).__name__}: {error}"
        ) from None
    if not callable(found):
        what = "has no" if found is None else "is no function:"
        raise WrongUse(f"{named!r}: module {module!r} {what} {name!r}")
    function: Callable[..., Any] = found
    return function


def writable_folder(folder: Path) -> Path:
    """A folder that is there, or can be made, to write in."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WrongUse(f"{folder}: no folder to write in: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise WrongUse(f"{folder}: no folder to write in: it is not writable")
    return folder


def writable_file(path: Path) -> Path:
    """A file that can be written when all is done, seen before anything is begun."""
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise WrongUse(f"{path}: no file that can be written; its folder has to be there")
    return path


def check_together(ctx: click.Context, allowed: Iterable[str], what: str) -> None:
    """Refuse options that were given and mean nothing for what the others ask for."""
    given = {
        name: parameter.opts[0]
        for parameter in ctx.command.params
        for name in [str(parameter.name)]
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    for name, option in given.items():
        if name not in {*allowed}:
            raise WrongUse(f"{option} means nothing {what}; leave it out")
