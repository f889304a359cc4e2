"""Tidiness that no linter knows: each check is a function, tried on a planted fault below.

A check takes files as a mapping of path (relative to the root) to text and returns its complaints.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import ModuleType

import pytest

import duly

ROOT = Path(__file__).parent.parent
THIS = "tests/test_tidy.py"
MAX_LINES = 500

Files = Mapping[str, str]
Check = Callable[[Files], list[str]]


def tree() -> dict[str, str]:
    """Every text file that git has or would take; without git, every file in known places."""
    git = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if git.returncode == 0:
        names = [name for name in git.stdout.split("\0") if name]
    else:
        places = ("src", "tests", "docs", "examples", "benchmarks")
        paths = [path for place in places for path in (ROOT / place).rglob("*")]
        names = [str(path.relative_to(ROOT)) for path in paths if "__pycache__" not in path.parts]
    return {name: text for name in names if (text := read(ROOT / name)) is not None}


def read(path: Path) -> str | None:
    """The text of a file; None for what is no text, or just gone."""
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
        return None


def python(files: Files, *places: str) -> Iterator[tuple[str, str]]:
    """The Python files below the given places."""
    for name, text in files.items():
        if name.endswith(".py") and name.startswith(places):
            yield name, text


def matches(files: Files, pattern: str) -> list[str]:
    return [
        f"{name}:{text.count(chr(10), 0, found.start()) + 1}: {found.group()!r}"
        for name, text in files.items()
        for found in re.finditer(pattern, text)
    ]


# --- the checks -----------------------------------------------------------------------------------


def nothing_left_to_do(files: Files) -> list[str]:
    return matches(files, r"\b(?:TO[D]O|FIX[M]E|XX[X])\b")


def no_machine_paths_or_hosts(files: Files) -> list[str]:
    """Nothing here knows whose machine it was written on, or where packages come from."""
    paths = r"(?<![\w.~*}])/(?:work|home|root|Users)/\w+|\b[A-Z]:\\Users\b"
    hosts = r"\b(?:pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)|crates\.io|deb\.debian\.org)"
    return matches(files, f"{paths}|{hosts}")


def files_are_short(files: Files) -> list[str]:
    return [
        f"{name}: {lines} lines, make it a folder of the same public name"
        for name, text in python(files, "src/")
        if (lines := len(text.splitlines())) > MAX_LINES
    ]


def modules_say_what_they_are(files: Files) -> list[str]:
    return [
        f"{name}: no module docstring"
        for name, text in python(files, "src/", "examples/", "benchmarks/", "tests/")
        if not ast.get_docstring(ast.parse(text))
    ]


def names_are_nouns_one_can_guess(files: Files) -> list[str]:
    modules = {"util", "utils", "common", "helper", "helpers", "core", "base", "misc", "manager"}
    classes = re.compile(r"(Manager|Helper|Base)$|^Base[A-Z]")
    complaints = []
    for name, text in python(files, "src/"):
        parts = PurePosixPath(name).with_suffix("").parts
        complaints += [f"{name}: module {part}" for part in parts if part.strip("_") in modules]
        complaints += [
            f"{name}:{node.lineno}: class {node.name}"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.ClassDef) and classes.search(node.name)
        ]
    return complaints


def nothing_sleeps_in_tests(files: Files) -> list[str]:
    """They wait for a condition with a deadline, or drive step()."""
    return [
        f"{name}:{node.lineno}: sleeps"
        for name, text in python(files, "tests/")
        for node in ast.walk(ast.parse(text))
        if (isinstance(node, ast.Call) and ast.unparse(node.func) == "time.sleep")
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "time"
            and any(alias.name == "sleep" for alias in node.names)
        )
    ]


def backends_are_in_their_contract(files: Files) -> list[str]:
    """import-linter holds apart only the brokers and stores it was told of."""
    if "pyproject.toml" not in files:
        return []
    contracts = tomllib.loads(files["pyproject.toml"])["tool"]["importlinter"]["contracts"]
    told = " ".join(layer for contract in contracts for layer in contract.get("layers", []))
    return [
        f"{name}: not in the contract of its room in pyproject.toml"
        for name, _ in python(files, "src/duly/brokers/", "src/duly/stores/")
        if (parts := PurePosixPath(name).with_suffix("").parts)[3] != "__init__"
        and f"({'.'.join(parts[1:4])})" not in told
    ]


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        (nothing_left_to_do, {"docs/a.md": "x\n# TO" + "DO: later"}),
        (nothing_left_to_do, {"src/duly/a.py": "pass  # FIX" + "ME"}),
        (no_machine_paths_or_hosts, {"README.md": "see /" + "home/ann/duly"}),
        (no_machine_paths_or_hosts, {"a.toml": "url = 'https://py" + "pi.org/simple'"}),
        (files_are_short, {"src/duly/a.py": "x\n" * (MAX_LINES + 1)}),
        (modules_say_what_they_are, {"src/duly/a.py": "# not a docstring"}),
        (names_are_nouns_one_can_guess, {"src/duly/sql/_utils.py": ""}),
        (names_are_nouns_one_can_guess, {"src/duly/core/a.py": ""}),
        (names_are_nouns_one_can_guess, {"src/duly/a.py": "class LaneManager: ..."}),
        (names_are_nouns_one_can_guess, {"src/duly/a.py": "class BaseBroker: ..."}),
        (nothing_sleeps_in_tests, {"tests/a.py": "def test():\n    time.sleep(1)"}),
        (nothing_sleeps_in_tests, {"tests/deep/a.py": "from time import monotonic, sleep"}),
        (
            backends_are_in_their_contract,
            {
                "src/duly/brokers/pigeon.py": "",
                "pyproject.toml": "[[tool.importlinter.contracts]]\nlayers = ['(duly.brokers.x)']",
            },
        ),
    ],
)
def test_each_check_finds_a_planted_fault(check: Check, fault: Files):
    assert len(check(fault)) == 1


@pytest.mark.parametrize(
    "check",
    [
        nothing_left_to_do,
        no_machine_paths_or_hosts,
        files_are_short,
        modules_say_what_they_are,
        names_are_nouns_one_can_guess,
        nothing_sleeps_in_tests,
        backends_are_in_their_contract,
    ],
)
def test_the_tree_is_tidy(check: Check):
    files = tree()
    assert THIS in files
    assert "src/duly/__init__.py" in files
    assert not check(files)


# --- what duly exports ----------------------------------------------------------------------------


def exports(module: ModuleType) -> list[str]:
    return list(getattr(module, "__all__", []))


def isort_style(name: str) -> tuple[int, str]:
    """CONSTANTS, Classes, functions: the order that ruff keeps too."""
    if name.isupper() and len(name) > 1:
        return (0, name)
    return (1 if name[0].isupper() else 2, name)


def wrong_exports(module: ModuleType) -> list[str]:
    """__all__ names what is there, all of it, in order."""
    names = exports(module)
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", "") != "__future__"
    }
    complaints = [f"{name}: in __all__, not there" for name in names if not hasattr(module, name)]
    complaints += [f"{name}: there, not in __all__" for name in sorted(public - set(names))]
    if names != sorted(set(names), key=isort_style):
        complaints.append("__all__ is not sorted, or repeats itself")
    return complaints


def undocumented(module: ModuleType) -> list[str]:
    """Exported classes and functions, and the public methods of the classes, without docstring."""
    complaints = []
    for name in exports(module):
        value = getattr(module, name, None)
        if inspect.isclass(value):
            complaints += [] if has_docstring(value) else [name]
            complaints += [
                f"{name}.{method}"
                for method, body in vars(value).items()
                if not method.startswith("_") and is_undocumented_method(body)
            ]
        elif inspect.isfunction(value) and not value.__doc__:
            complaints.append(name)
    return complaints


def has_docstring(cls: type) -> bool:
    """Written by a person: a dataclass gives itself its signature as docstring."""
    text = cls.__dict__.get("__doc__") or ""
    return bool(text) and not text.startswith(f"{cls.__name__}(")


def is_undocumented_method(body: object) -> bool:
    if isinstance(body, staticmethod | classmethod):
        body = body.__func__
    if isinstance(body, property):
        body = body.fget
    return inspect.isfunction(body) and not body.__doc__


def test_duly_exports_what_it_says():
    assert not wrong_exports(duly)


def test_every_public_name_is_documented():
    assert not undocumented(duly)


def planted(source: str) -> ModuleType:
    module = ModuleType("planted")
    exec(source, vars(module))
    return module


@pytest.mark.parametrize(
    "source",
    [
        "__all__ = ['gone']",
        "__all__ = []\ndef forgotten(): 'Documented.'",
        "__all__ = ['b', 'a']\na = b = 1",
        "__all__ = ['lane', 'Lane']\nlane = Lane = 1",
    ],
)
def test_wrong_exports_are_found(source: str):
    assert len(wrong_exports(planted(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "__all__ = ['f']\ndef f(): pass",
        "__all__ = ['C']\nclass C: pass",
        "__all__ = ['C']\nclass C:\n  'Here.'\n  def f(self): pass",
        "__all__ = ['C']\nclass C:\n  'Here.'\n  @classmethod\n  def f(cls): pass",
        "__all__ = ['C']\nclass C:\n  'Here.'\n  @property\n  def f(self): pass",
        "__all__ = ['C']\nfrom dataclasses import make_dataclass\nC = make_dataclass('C', ['x'])",
    ],
)
def test_missing_docstrings_are_found(source: str):
    assert len(undocumented(planted(source))) == 1


def test_right_exports_pass():
    module = planted(
        "__all__ = ['LIMIT', 'Lane', 'f']\nLIMIT = 1\nclass Lane: 'A lane.'\ndef f(): 'F.'"
    )
    assert not wrong_exports(module)
    assert not undocumented(module)
