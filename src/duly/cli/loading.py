"""``module:app`` to the `App` it names. What is wrong with it is said in one line."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from duly.app import App
from duly.errors import ConfigurationError


def split(spec: str) -> tuple[str, str]:
    """The module and the attribute. Raises `ConfigurationError`."""
    module, colon, attribute = spec.partition(":")
    if colon and module and attribute:
        return module, attribute
    if spec.endswith(".py") or "/" in spec:
        dotted = spec.removesuffix(".py").strip("./").replace("/", ".")
        hint = f"give the module, not its file: {dotted}:app"
    else:
        hint = f"give module:attribute, such as {spec.strip(':') or 'shop'}:app"
    raise ConfigurationError(f"{spec!r} names no app: {hint}")


def load_app(spec: str) -> App:
    """Import the module, from the current directory too, and return its app.

    Raises `ConfigurationError` where there is none, or where importing fails: then it names
    the error and the line of the user's file.
    """
    name, attribute = split(spec)
    found: Any = _import(name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigurationError(
                f"{spec!r}: module {name!r} has no attribute {attribute!r}{_apps_in(name)}"
            )
        found = getattr(found, part)
    if not isinstance(found, App):
        raise ConfigurationError(
            f"{spec!r} is no duly.App but of type {type(found).__name__!r}{_apps_in(name)}"
        )
    return found


def _import(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise ConfigurationError(
                f"there is no module {error.name!r} in {here}, nor where Python is installed"
            ) from None
        raise ConfigurationError(_failed(name, error)) from error
    except ConfigurationError as error:
        raise ConfigurationError(f"{error}{_where(error)}") from error
    except Exception as error:
        raise ConfigurationError(_failed(name, error)) from error
    except SystemExit as error:
        raise ConfigurationError(
            f"importing {name!r} ended the program (sys.exit({error.code!r})){_where(error)}"
        ) from error


def _failed(name: str, error: Exception) -> str:
    if isinstance(error, SyntaxError):
        where = f" ({error.filename}, line {error.lineno})"
        return f"importing {name!r} failed: {type(error).__name__}: {error.msg}{where}"
    return f"importing {name!r} failed: {type(error).__name__}: {error}{_where(error)}"


def _where(error: BaseException) -> str:
    """The innermost line that is neither Python's import machinery nor duly itself."""
    package = str(Path(__file__).parent.parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((package, "<frozen", importlib.__file__))
    ]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _apps_in(name: str) -> str:
    names = [key for key, value in vars(sys.modules[name]).items() if isinstance(value, App)]
    return f"; its apps are {', '.join(f'{name}:{key}' for key in names)}" if names else ""
