"""Opening a database file: what is created, what is refused, and in which words."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from duly.errors import BrokerUnavailable, BrokerUnusable, ConfigurationError
from duly.sql.sqlite import DatabaseFile
from duly.sql.sqlite.place import filesystem
from tests.sqlite.programs import run


def test_a_missing_file_is_created_for_its_owner_only(db_path: Path):
    file = DatabaseFile.open(db_path)
    assert stat.S_IMODE(db_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.folder.stat().st_mode) == 0o700
    file.close()


def test_it_is_in_wal_mode_and_synced(db_path: Path):
    file = DatabaseFile.open(db_path)
    connection = file.connect(sqlite3.Connection)
    assert connection.execute("pragma journal_mode").fetchone() == ("wal",)
    assert connection.execute("pragma synchronous").fetchone() == (2,)
    connection.close()
    file.close()


def test_one_object_a_process_whatever_the_path_is_called(db_path: Path):
    (db_path.parent / "link").symlink_to(db_path)
    first = DatabaseFile.open(db_path)
    second = DatabaseFile.open(db_path.parent / "link")
    assert first is second
    first.close()
    assert second.changes() == second.changes(), "still open for the other user"
    second.close()
    assert DatabaseFile.open(db_path) is not first
    DatabaseFile.open(db_path).close()
    DatabaseFile.open(db_path).close()


def test_the_identity_is_the_databases_own(db_path: Path):
    file = DatabaseFile.open(db_path)
    identity = file.identity
    file.close()
    moved = db_path.with_name("moved.db")
    db_path.rename(moved)
    file = DatabaseFile.open(moved)
    other = DatabaseFile.open(db_path)
    assert file.identity == identity != other.identity
    file.close()
    other.close()


def test_processes_that_open_a_new_file_at_once_agree_on_it(db_path: Path):
    source = (
        "import sys; from duly.sql.sqlite import DatabaseFile; "
        "print(DatabaseFile.open(sys.argv[1]).identity)"
    )
    programs = [
        subprocess.Popen([sys.executable, "-c", source, db_path], stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    assert len({program.communicate(timeout=30)[0] for program in programs}) == 1


@pytest.mark.parametrize("path", ["", ":memory:"])
def test_what_is_no_file_is_refused(path: str):
    with pytest.raises(ConfigurationError, match="memory://"):
        DatabaseFile.open(path)


def test_a_missing_directory_is_named(tmp_path: Path):
    with pytest.raises(ConfigurationError, match=r"nowhere does not exist. Create it"):
        DatabaseFile.open(tmp_path / "nowhere" / "duly.db")


def test_a_directory_is_refused(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="is a directory"):
        DatabaseFile.open(tmp_path)


def test_a_file_that_is_no_database_is_refused_and_kept(db_path: Path):
    db_path.write_text("dear diary, " * 1000)
    with pytest.raises(BrokerUnusable, match="no SQLite database"):
        DatabaseFile.open(db_path)
    assert db_path.read_text() == "dear diary, " * 1000


def test_a_corrupt_header_is_refused(db_path: Path):
    DatabaseFile.open(db_path).close()
    content = bytearray(db_path.read_bytes())
    content[16:24] = b"\xff" * 8  # page size and format versions
    db_path.write_bytes(content)
    with pytest.raises(BrokerUnusable):
        DatabaseFile.open(db_path)


def test_a_corrupt_page_is_refused(db_path: Path):
    DatabaseFile.open(db_path).close()
    content = bytearray(db_path.read_bytes())
    content[100:200] = b"\xff" * 100  # the root of the schema
    db_path.write_bytes(content)
    with pytest.raises(BrokerUnusable, match="damaged"):
        DatabaseFile.open(db_path)


def test_a_newer_schema_is_refused_in_one_sentence(db_path: Path):
    DatabaseFile.open(db_path).close()
    foreign = sqlite3.connect(db_path)
    foreign.execute("update duly_meta set value = 99 where name in ('schema', 'oldest')")
    foreign.commit()
    foreign.close()
    with pytest.raises(BrokerUnusable, match=r"schema 99.*upgrade duly here and start it again"):
        DatabaseFile.open(db_path)


def test_an_applications_own_database_keeps_what_it_has(db_path: Path):
    foreign = sqlite3.connect(db_path)
    foreign.execute("create table theirs (a)")
    foreign.execute("pragma user_version = 7")
    foreign.commit()
    foreign.close()
    DatabaseFile.open(db_path).close()
    foreign = sqlite3.connect(db_path)
    assert foreign.execute("pragma user_version").fetchone() == (7,)
    assert foreign.execute("select count(*) from theirs").fetchone() == (0,)
    foreign.close()


def test_a_file_locked_by_a_foreign_program_is_unavailable_for_now(db_path: Path):
    foreign = sqlite3.connect(db_path, isolation_level=None)
    foreign.execute("begin exclusive")
    with pytest.raises(BrokerUnavailable, match="end it"):
        DatabaseFile.open(db_path, busy_s=0.1)
    foreign.close()
    DatabaseFile.open(db_path).close()


AS_NOBODY = """
    import os, sys
    from duly.errors import DulyError
    from duly.sql.sqlite import DatabaseFile
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    try:
        DatabaseFile.open(sys.argv[1])
    except DulyError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.parametrize(("directory_mode", "file_mode"), [(0o755, 0o444), (0o555, 0o666)])
def test_no_permission_is_refused_with_who_needs_what(
    tmp_path: Path, directory_mode: int, file_mode: int
):
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.getuid() and parent.stat().st_mode & 0o001 == 0:
            parent.chmod(parent.stat().st_mode | 0o011)
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "duly.db"
    path.touch()
    path.chmod(file_mode)
    tmp_path.chmod(0o755)
    folder.chmod(directory_mode)
    [said] = run(AS_NOBODY, path)
    assert said.startswith("BrokerUnusable")
    assert "needs to read and write the file and its directory" in said


def test_the_file_system_of_a_path_is_that_of_the_longest_mount(tmp_path: Path):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/a / ext4 rw 0 0\n"
        "server:/x /srv/data nfs4 rw 0 0\n"
        "/dev/b /srv/data/fast xfs rw 0 0\n"
        "/dev/c /with\\040space btrfs rw 0 0\n"
    )
    assert filesystem(Path("/srv/other/a.db"), mounts) == "ext4"
    assert filesystem(Path("/srv/data/a.db"), mounts) == "nfs4"
    assert filesystem(Path("/srv/data2/a.db"), mounts) == "ext4"
    assert filesystem(Path("/srv/data/fast/a.db"), mounts) == "xfs"
    assert filesystem(Path("/with space/a.db"), mounts) == "btrfs"
    assert filesystem(Path("/a.db"), tmp_path / "missing") == ""


def test_a_network_file_system_is_refused(db_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("duly.sql.sqlite.place.filesystem", lambda _: "nfs4")
    with pytest.raises(BrokerUnusable, match="local disk"):
        DatabaseFile.open(db_path)
    assert not db_path.exists()


def test_a_forked_child_can_neither_use_nor_open_what_its_parent_has_open(db_path: Path):
    said = run(
        """
        import os, sys
        from duly.errors import ConfigurationError
        from duly.sql.sqlite import DatabaseFile

        file = DatabaseFile.open(sys.argv[1])
        file.changes()
        if (child := os.fork()) == 0:
            for use in (
                lambda: file.write(lambda: iter(())),
                lambda: file.read(lambda: iter(())),
                file.changes,
                file.turn,
                lambda: file.worker,
                lambda: DatabaseFile.open(sys.argv[1]),
            ):
                try:
                    use()
                except ConfigurationError as error:
                    print("refused" if "after forking" in str(error) else error)
            file.close()
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        file.close()
        if (child := os.fork()) == 0:
            DatabaseFile.open(sys.argv[1]).close()
            print("opened after the parent closed it")
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        """,
        db_path,
    )
    assert said == ["refused"] * 6 + ["opened after the parent closed it"]
