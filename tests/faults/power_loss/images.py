"""What the disk may hold after a power loss: all that was synced, and any of the rest.

What was written since the last sync of its file may be there or not, in any order, torn at
sectors of 512 bytes. Names come and go in the order in which they were given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.faults.power_loss.recording import Name, Recording, Write

SECTOR = 512

Keep = Callable[[Write, Random], list[Write]]
"""What of an unsynced write is on the disk."""


def nothing(write: Write, random: Random) -> list[Write]:
    return []


def everything(write: Write, random: Random) -> list[Write]:
    return [write]


def some_writes(write: Write, random: Random) -> list[Write]:
    return [write] if random.random() < 0.5 else []


def some_sectors(write: Write, random: Random) -> list[Write]:
    if write.cut:
        return some_writes(write, random)
    kept = [piece for piece in sectors(write) if random.random() < 0.7]
    random.shuffle(kept)  # they do not overlap
    return kept


def sectors(write: Write) -> list[Write]:
    """A write cut where the sectors of the disk begin."""
    pieces = []
    start = 0
    while start < len(write.data):
        end = min(len(write.data), start + SECTOR - (write.offset + start) % SECTOR)
        pieces.append(
            Write(
                write.inode, write.began, write.ended, write.offset + start, write.data[start:end]
            )
        )
        start = end
    return pieces


@dataclass(frozen=True)
class Image:
    """One possible disk: the moment at which the power went, and what became of the rest."""

    moment: int
    how: str
    seed: int


HOWS = ("dropped", "kept", "prefix", "some writes", "some sectors", "log only", "database only")


def build(recording: Recording, image: Image, folder: Path) -> None:
    """Write the files of this image into the folder."""
    random = Random(f"{image}")
    synced = _Synced(recording, image.moment)
    written = [write for write in recording.writes if write.began <= image.moment]
    loose = [write for write in written if not synced.covers(write)]
    kept = _kept(image, recording, loose, random)
    contents: dict[int, bytearray] = {}
    for write in written:
        file = contents.setdefault(write.inode, bytearray())
        for piece in kept.get(id(write), [write]):
            _apply(file, piece)
    for name, inode in synced.names(random).items():
        (folder / name).write_bytes(contents.get(inode, b""))


def _kept(
    image: Image, recording: Recording, loose: list[Write], random: Random
) -> dict[int, list[Write]]:
    # A write that the power cut short is never whole.
    cut_short = {id(write) for write in loose if write.ended > image.moment}
    kept: dict[int, list[Write]] = {}
    logs = {name.inode for name in recording.names if name.name.endswith("-wal")}
    until = random.randint(0, len(loose))
    for index, write in enumerate(loose):
        keep: Keep
        match image.how:
            case "dropped":
                keep = nothing
            case "kept":
                keep = everything
            case "prefix":
                keep = everything if index < until else some_sectors if index == until else nothing
            case "some writes":
                keep = some_writes
            case "log only":
                keep = everything if write.inode in logs else nothing
            case "database only":
                keep = nothing if write.inode in logs else everything
            case _:
                keep = some_sectors
        if id(write) in cut_short and keep is everything:
            keep = some_sectors
        kept[id(write)] = keep(write, random)
    return kept


class _Synced:
    """What certainly was on the disk at a moment."""

    def __init__(self, recording: Recording, moment: int) -> None:
        self._recording = recording
        self._moment = moment
        self._last: dict[int | None, int] = {}
        for sync in recording.syncs:
            if sync.ended <= moment:
                self._last[sync.inode] = max(self._last.get(sync.inode, -1), sync.began)

    def covers(self, write: Write) -> bool:
        return write.ended < self._last.get(write.inode, -1)

    def names(self, random: Random) -> dict[str, int]:
        """The names there are: those synced, and some of the later changes, in order."""
        changes = [name for name in self._recording.names if name.ended <= self._moment]
        certain = [name for name in changes if name.ended < self._last.get(None, -1)]
        loose = changes[len(certain) :]
        found: dict[str, int] = {}
        for change in certain + loose[: random.randint(0, len(loose))]:
            _rename(found, change)
        return found


def _rename(names: dict[str, int], change: Name) -> None:
    if change.inode is None:
        names.pop(change.name, None)
    else:
        names[change.name] = change.inode


def _apply(file: bytearray, write: Write) -> None:
    if write.cut:
        del file[write.offset :]
        file.extend(bytes(write.offset - len(file)))
        return
    end = write.offset + len(write.data)
    if len(file) < end:
        file.extend(bytes(end - len(file)))
    file[write.offset : end] = write.data


def choose(recording: Recording, count: int, seed: int) -> list[Image]:
    """Images at moments spread over the recording, of every kind; the same for one seed.

    Half of the moments are those right after something was promised to the world: when a
    promise is broken, that shows there.
    """
    random = Random(seed)
    began = min(write.began for write in recording.writes)
    promised = [ended for ended, _, _ in recording.notes if ended >= began]
    images = []
    for index in range(count):
        moment = random.choice(promised) if index % 2 else random.randint(began, recording.end)
        images.append(Image(moment, HOWS[index % len(HOWS)], seed * 1_000_000 + index))
    return images
