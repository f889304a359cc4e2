"""Workers that stand still past their session and wake up when others have gone on, of every
guarantee and by every way in which groups are dealt out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import pytest

from tests.kafka.copier import THERE, copier
from tests.kafka.copying import Process, check_copied, publish, read
from tests.kafka.zombie import CONSUMERS
from tests.waiting import eventually


class Zombies:
    """Workers of these consumers, and what became of what they handled."""

    def __init__(self, broker: str, folder: Path, consumers: Sequence[str]) -> None:
        self._broker = broker + "&transaction.timeout.ms=4000"
        self._folder = folder
        self._consumers = consumers
        self._stack = ExitStack()
        self.published = 0
        with copier(self._broker) as app:
            app.backends()[0].declare([THERE])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def publish(self, count: int) -> None:
        publish(self._broker, count, self.published)
        self.published += count

    def worker(self, *, stops: bool = False) -> Process:
        """Another process."""
        return self._stack.enter_context(
            Process(
                self._broker, self._folder,
                module="zombie",
                ZOMBIE_FOLDER=str(self._folder),
                ZOMBIE_CONSUMERS=" ".join(self._consumers),
                ZOMBIE_STOPS="1" if stops else "",
            )
        )  # fmt: skip

    def handled(self, consumer: str) -> list[int]:
        """What took effect, as often as it did."""
        if consumer == "copy":
            return [int(each.body) for each in read(self._broker)]
        path = self._folder / consumer
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def are_done(self, *consumers: str) -> None:
        """Wait until these have handled all."""
        eventually(
            lambda: all(len({*self.handled(each)}) >= self.published for each in consumers),
            f"{consumers} have handled {self.published}",
            lambda: str({each: len({*self.handled(each)}) for each in consumers}) + self.told, 150,
        )  # fmt: skip

    @property
    def told(self) -> str:
        return "\n".join(
            f"{log.name}\n{log.read_text()[-3000:]}" for log in sorted(self._folder.glob("worker*"))
        )

    def check(self) -> None:
        """Nothing is lost but what was sent once, and nothing is there twice that may not be."""
        for consumer in self._consumers:
            times = Counter(self.handled(consumer))
            twice = {number: n for number, n in times.items() if n > 1}
            if consumer != "noted":
                assert not twice, f"{consumer}: {twice}"
            if consumer != "lossy":
                assert sorted(times) == list(range(self.published)), consumer
        if "copy" in self._consumers:
            check_copied(read(self._broker), self.published)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_who_wakes_up_in_an_empty_group_moves_nothing_back(dealt_url: str, tmp_path: Path):
    """Of a client that is no member of its group Kafka takes any position while nobody is."""
    with Zombies(dealt_url, tmp_path, CONSUMERS) as zombies:
        zombies.publish(1000)
        zombie = zombies.worker()
        eventually(lambda: len(zombies.handled("lossy")) > 50, "it works", lambda: zombies.told, 90)
        zombie.stop()
        with zombies.worker() as other:
            zombies.are_done("noted", "copy")
            other.end()
        zombie.go_on()
        zombies.publish(20)
        zombies.are_done("noted", "copy")
        zombie.end()
        with zombies.worker() as other:
            zombies.publish(20)
            zombies.are_done("noted", "copy")
            other.end()
        zombies.check()


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("consumer", ["lossy", "copy"])
def test_who_is_late_with_the_first_position_moves_nothing_back(
    dealt_url: str, tmp_path: Path, consumer: str
):
    """It has seen that there is none, and stands still until all is handled and nobody is left."""
    with Zombies(dealt_url, tmp_path, [consumer]) as zombies:
        zombies.publish(50)
        zombie = zombies.worker(stops=True)
        eventually(lambda: zombie.stopped, "it stands still", lambda: zombie.told, 90)
        with zombies.worker() as other:
            zombies.are_done(consumer)
            other.end()
        zombie.go_on()
        zombies.publish(20)
        zombies.are_done(consumer)
        zombie.end()
        zombies.check()
