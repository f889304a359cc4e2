"""What each guarantee promises, checked on what a database holds; complaints, not exceptions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable

from tests.faults.program import POISON, UNREADABLE
from tests.faults.scene import Scene, State

FAULTY = frozenset({POISON, UNREADABLE})


def exactly_once(
    scene: Scene, numbers: Iterable[int], faulty: Collection[int] = FAULTY
) -> list[str]:
    """Each message: both tables and the output once; or dead, with none of them."""
    state = scene.state()
    if not scene.orders.get("relay", True):
        state.outputs += state.on_their_way
        state.on_their_way.clear()
    complaints = _leftovers(state)
    for n in numbers:
        wanted = (0, 0, 0, 1) if n in faulty else (1, 1, 1, 0)
        if state.taken(n) != wanted:
            complaints.append(
                f"{n}: effects, ledger, outputs, dead letters are {state.taken(n)}, not {wanted} "
                f"{state.why_dead.get(n, '')}"
            )
    return complaints


def at_least_once(
    scene: Scene, numbers: Iterable[int], faulty: Collection[int] = FAULTY
) -> list[str]:
    """Each message: a start that returned; or dead in sight."""
    state = scene.state()
    complaints = _leftovers(state)
    ended = scene.noted("end")
    for n in numbers:
        if n in faulty and state.dead[n] != 1:
            complaints.append(f"{n}: must be dead once, is {state.dead[n]} times")
        if n not in faulty and state.dead[n]:
            complaints.append(f"{n}: is dead: {state.why_dead[n]}")
        if n not in faulty and not ended[n]:
            complaints.append(f"{n}: lost, no start of it returned")
    return complaints


def at_most_once(
    scene: Scene, numbers: Iterable[int], unsettled: Collection[int], lost: int
) -> list[str]:
    """No start repeated; what had not been settled when somebody died is not lost.

    ``unsettled``: those at the time of the last death; ``lost``: how many of the others that
    death may have cost.
    """
    state = scene.state()
    complaints = _leftovers(state)
    started = scene.noted("start")
    complaints += [f"{n}: started {times} times" for n, times in started.items() if times > 1]
    fit = set(numbers) - {UNREADABLE}
    gone = fit - set(started)
    complaints += [f"{n}: lost without a cause" for n in sorted(gone & set(unsettled))]
    if len(gone) > lost:
        complaints.append(f"{sorted(gone)} are lost, a death may cost {lost}")
    return complaints


def repeats(scene: Scene, explained: Counter[int]) -> list[str]:
    """At-least-once: no message started oftener than its failures and the deaths explain."""
    started = scene.noted("start")
    return [
        f"{n}: started {times} times, explained are {explained[n] or 1}"
        for n, times in started.items()
        if times > (explained[n] or 1)
    ]


def _leftovers(state: State) -> list[str]:
    return [
        *(f"{n}: neither settled nor dead" for n in sorted(state.unsettled)),
        *(f"{n}: its output is still in the outbox" for n in sorted(state.on_their_way)),
    ]


Judge = Callable[..., list[str]]
