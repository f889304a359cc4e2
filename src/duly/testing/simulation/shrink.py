"""From a schedule that breaks something to a smaller one that breaks the same."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from duly.testing.simulation.plan import Given, Hit
from duly.testing.simulation.run import Outcome, run
from duly.testing.simulation.scenario import Scenario

MOST_TRIES = 300


def shrink(failed: Outcome) -> Outcome:
    """Fewer faults, messages, workers and manners, as long as the same property is broken.

    Greedy: what can be left out is left out, until nothing can.
    """
    names = failed.judgement.names()
    smallest, tries = failed, 0
    improved = True
    while improved:
        improved = False
        for scenario, hits in _smaller(smallest.scenario, smallest.hits):
            tries += 1
            if tries > MOST_TRIES:
                return smallest
            found = run(scenario, failed.seed, Given(hits))
            if found.judgement.names() & names:
                smallest, improved = found, True
                break
    return smallest


def _smaller(
    scenario: Scenario, hits: tuple[Hit, ...]
) -> Iterator[tuple[Scenario, tuple[Hit, ...]]]:
    for number in range(len(hits)):
        yield scenario, hits[:number] + hits[number + 1 :]
    for simpler in _simpler(scenario):
        yield simpler, hits


def _simpler(scenario: Scenario) -> Iterator[Scenario]:
    if scenario.messages > 1:
        yield replace(scenario, messages=scenario.messages // 2)
        yield replace(scenario, messages=scenario.messages - 1)
    if scenario.workers > 1:
        yield replace(scenario, workers=scenario.workers - 1)
    if scenario.preempt:
        yield replace(scenario, preempt=0.0)
    for name in ("batch_handler", "within", "conflicts", "horizon", "hold"):
        if getattr(scenario, name):
            yield replace(scenario, **{name: False})
    for number, manner in enumerate(scenario.manners):
        if manner != "ok":
            manners = scenario.manners
            yield replace(scenario, manners=(*manners[:number], "ok", *manners[number + 1 :]))
    if len(scenario.manners) > 1 and set(scenario.manners) == {"ok"}:
        yield replace(scenario, manners=("ok",))


def command(outcome: Outcome) -> str:
    """What replays a schedule."""
    faults = ",".join(hit.text() for hit in outcome.hits) or "none"
    return (
        f"python -m duly.testing.simulation --seed {outcome.seed} "
        f"--scenario {outcome.scenario.text()} --faults {faults}"
    )
