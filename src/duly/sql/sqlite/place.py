"""Where a database file may lie, and what is wrong with where it does."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from pathlib import Path

from duly.errors import BrokerUnavailable, BrokerUnusable, ConfigurationError

log = logging.getLogger("duly.sqlite")

# WAL needs memory shared between all processes that use the file; these cannot give it.
_NETWORK = frozenset(
    {
        *("nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "afs", "ncpfs"),
        *("lustre", "gpfs", "ceph", "glusterfs", "fuse.glusterfs"),
        *("fuse.sshfs", "fuse.s3fs", "fuse.rclone"),
    }
)
_DOUBTFUL = frozenset({"9p", "virtiofs", "vboxsf"})


def prepare(path: str | os.PathLike[str]) -> Path:
    """The real path of a database file, which is created (for its owner only) when missing.

    Raises `ConfigurationError` or `BrokerUnusable` saying what is wrong with the place.
    """
    text = os.fspath(path)
    if not text or text == ":memory:" or "\0" in text:
        raise ConfigurationError(
            f"{text!r} is no file. SQLite as a broker needs one; for tests without a file "
            "there is the in-memory broker (memory://)."
        )
    real = Path(os.path.realpath(text))
    if not real.parent.is_dir():
        raise ConfigurationError(
            f"{real}: the directory {real.parent} does not exist. Create it, or mend the path."
        )
    _refuse_network(real)
    try:
        _create(real)
        mode = real.stat().st_mode
    except OSError as error:
        raise BrokerUnusable(f"{real}: {error.strerror}. {_who_may(real)}") from error
    if not stat.S_ISREG(mode):
        raise ConfigurationError(f"{real} is a directory or device; name a database file")
    if not os.access(real, os.R_OK | os.W_OK) or not os.access(real.parent, os.W_OK):
        raise BrokerUnusable(f"{real}: cannot be written by this user. {_who_may(real)}")
    return real


class Place:
    """Where a database file was when it was opened; whether it is still there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._name = str(path)
        self._file = _file_at(self._name)

    def check(self) -> None:
        """To be called before writing: SQLite goes on in a deleted file as if nothing were,
        and what it acknowledges there is gone with the last process that has it open.

        Raises `BrokerUnavailable` where the name stands for another file now, or for none.
        """
        if _file_at(self._name) != self._file:
            raise BrokerUnavailable(
                f"{self._path}: the file was deleted, moved or replaced while it is in use here; "
                "nothing was changed. Put it back, or restart this process to use what is there."
            )


def _file_at(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - the same a third faster, before every commit
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def lock_folder(path: Path) -> Path:
    """The directory of lock files beside the database, made when missing."""
    folder = path.with_name(path.name + "-duly")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise BrokerUnusable(
            f"{folder}: {error.strerror}. duly keeps its lock files there, beside the database: "
            "give this user write access to the directory."
        ) from error
    return folder


def _create(path: Path) -> None:
    if path.exists():
        return
    with contextlib.suppress(FileExistsError):  # another process was as quick
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _who_may(path: Path) -> str:
    return (
        f"User {os.getuid()} needs to read and write the file and its directory {path.parent} "
        "(SQLite keeps its log beside the file), on a disk that is not mounted read-only."
    )


def _refuse_network(path: Path) -> None:
    kind = filesystem(path)
    if kind in _NETWORK:
        raise BrokerUnusable(
            f"{path} lies on a network file system ({kind}), where SQLite's log loses and "
            "corrupts data. Use a local disk; to share between machines use a server."
        )
    if kind in _DOUBTFUL:
        log.warning(
            "%s lies on a %s file system: safe only while no other machine uses the file",
            path,
            kind,
        )


def is_doubtful(path: Path) -> str:
    """The type of its file system where that is safe for one machine only; else empty."""
    kind = filesystem(path)
    return kind if kind in _DOUBTFUL | _NETWORK else ""


def filesystem(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The type of the file system that holds ``path``; empty where the system does not say."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    best, kind = "", ""
    for line in lines:
        _, point, found, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        inside = point == "/" or path == Path(point) or str(path).startswith(point + "/")
        if inside and len(point) >= len(best):
            best, kind = point, found
    return kind
