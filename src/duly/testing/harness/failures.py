"""What went wrong in handlers, and how a test is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from duly.errors import Reject, Retry
from duly.inspection import DeadLetter
from duly.message import Message


@dataclass(frozen=True, slots=True)
class Failure:
    """A handler raised. ``retry_in_s`` is None where the message was given up on."""

    consumer: str
    message: Message[Any]
    attempt: int
    error: BaseException
    retry_in_s: float | None

    def __str__(self) -> str:
        then = "dead" if self.retry_in_s is None else f"again in {self.retry_in_s:.1f} s"
        return (
            f"consumer {self.consumer!r} failed on message {self.message.id!r} "
            f"(attempt {self.attempt}, {then}): {self.error!r}"
        )


class DeadLettered(AssertionError):
    """A message was given up on without its handler having failed: it could not be decoded, its
    id was used before, ... Look at ``t.dead()``; if it is what the test expects, say so:
    ``t.drain(failures="expected")``.
    """


class NotDrained(AssertionError):
    """Something is left to do and does not get done; the text says what."""


class Failures:
    """The failures of a run, and which of them a test has not been told of."""

    def __init__(self, is_made: Callable[[BaseException], bool]) -> None:
        self.all: list[Failure] = []
        self._is_made = is_made
        self._told = 0
        self._letters: set[tuple[str, str, str, str, int]] = set()

    def tell(self) -> None:
        """Raise the first failure that the test was not told of, as its handler raised it."""
        new = self.all[self._told :]
        self._told = len(self.all)
        accidents = [each for each in new if not self._is_expected(each.error)]
        if not accidents:
            return
        first, *others = accidents
        first.error.add_note(f"duly: {first}")
        for other in others[:3]:
            first.error.add_note(f"duly: also {other}")
        first.error.add_note(
            'duly: where a test expects this, t.drain(failures="expected") goes on; t.failures '
            "keeps every one"
        )
        raise first.error

    def pass_over(self) -> None:
        """What failed so far was expected."""
        self._told = len(self.all)

    def tell_of_letters(self, letters: Sequence[DeadLetter], *, expected: bool) -> None:
        """Raise `DeadLettered` for the first new dead letter that no failure explains."""
        explained = {
            (each.consumer, *_identity(each.message))
            for each in self.all
            if each.retry_in_s is None
        }
        for letter in letters:
            identity = _identity(letter.message)
            name = (letter.subscription, *identity, letter.dead_ms)
            new = name not in self._letters
            self._letters.add(name)
            if new and not expected and (letter.subscription, *identity) not in explained:
                raise DeadLettered(
                    f"consumer {letter.subscription!r} gave up on message "
                    f"{letter.message.id!r} of topic {letter.message.topic!r}: {letter.error}"
                )

    def _is_expected(self, error: BaseException) -> bool:
        # Retry and Reject are a handler's own words for how a message ends, no accidents.
        return isinstance(error, Retry | Reject) or self._is_made(error)


def _identity(message: Message[Any]) -> tuple[str, str, str]:
    return (message.topic, message.source, message.id)
