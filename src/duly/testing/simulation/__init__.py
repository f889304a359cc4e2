"""Deterministic simulation: workers and publishers, stepped in a random order under faults.

One thread and one seed decide everything, so that a schedule that breaks a promise is replayed
by one command (``python -m duly.testing.simulation``) and shrunk until little is left of it.
"""

from duly.testing.simulation.plan import Drawn, Given, Hit, Plan
from duly.testing.simulation.run import Outcome, run
from duly.testing.simulation.scenario import Scenario, any_scenario, scenario_of

__all__ = [
    "Drawn",
    "Given",
    "Hit",
    "Outcome",
    "Plan",
    "Scenario",
    "any_scenario",
    "run",
    "scenario_of",
]
