"""Wrong options of the commands of proof: one line that says what is wrong, exit status 2.

A run that was not the one asked for must not end as if it had shown something.
"""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from duly.testing.chaos.__main__ import main as chaos
from duly.testing.simulation.__main__ import main as simulation


def refused(command: click.Command, *options: str) -> str:
    """Run it, and see one line and status 2; that line."""
    ended = CliRunner().invoke(command, options)
    assert ended.exit_code == 2, ended.output
    assert isinstance(ended.exception, SystemExit)
    [line] = ended.stderr.splitlines()
    assert not ended.stdout, "nothing was begun"
    return line.removeprefix("Error: ")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--before", "nowhere:f"), "importing 'nowhere' failed: ModuleNotFoundError"),
        (("--before", "tests.chaos.planted"), "give module:function"),
        (("--before", ":f"), "give module:function"),
        (("--before", "tests.chaos.planted:"), "give module:function"),
        (("--before", "tests.chaos.planted:settle"), "'tests.chaos.planted' has no 'settle'"),
        (("--before", "tests.chaos.planted:__doc__"), "is no function: '__doc__'"),
        (("--minutes", "0"), "'--minutes': 0.0 is not in the range"),
        (("--minutes", "nan"), "'--minutes': nan never ends"),
        (("--minutes", "inf"), "never ends"),
        (("--minutes", "few"), "'few' is not a valid float"),
        (("--faults-s", "0"), "'--faults-s': 0.0"),
        (("--faults-s", "-3"), "'--faults-s': -3.0"),
        (("--round", "-1"), "'--round': -1"),
        (("--round", "1", "--minutes", "2"), "--minutes means nothing where one round is played"),
        (("--without", "rain"), "'rain' is not one of 'kill worker'"),
        (("--seed", "x"), "'x' is not a valid integer"),
        (("--folder", "/proc/there/is/none"), "no folder to write in"),
        (("--folder", __file__), "no folder to write in"),
        (("--folder", str(Path(__file__).parent)), "give the rounds a folder of their own"),
        (("--judge", "/there/is/none"), "no round that was kept"),
        (("--judge", str(Path(__file__).parent)), "there is no history in it"),
        (("--judge", ".", "--seed", "3"), "--seed means nothing where a round that was kept"),
        (("--loud",), "No such option"),
        (("more",), "unexpected extra argument"),
    ],
)
def test_chaos(options: tuple[str, ...], said: str):
    assert said in refused(chaos, *options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--kinds", "lgo"), "'lgo' is no kind; there are database, log"),
        (("--kinds", ""), "'' is no kind"),
        (("--scenario", "kind=log"), "--scenario means nothing in a campaign"),
        (("--faults", "w1@3=crash"), "--faults means nothing in a campaign"),
        (("--seed", "1", "--faults", "w1@3=crash"), "without the --scenario"),
        (("--seed", "1", "--scenario", "kind"), "'kind' is no scenario"),
        (("--seed", "1", "--scenario", "kind=lgo"), "'kind=lgo' is no scenario: Invalid enum"),
        (("--seed", "1", "--scenario", "size=3"), "unknown field `size`"),
        (("--seed", "1", "--scenario", "batch=1,batch=2"), "it says batch twice"),
        (("--seed", "1", "--scenario", "workers=0"), "workers is 1 or more"),
        (("--seed", "1", "--scenario", "preempt=2"), "preempt is a probability"),
        (("--seed", "1", "--scenario", "manners="), "no scenario"),
        (("--seed", "1", "--scenario", "kind=queue,ordered=True"), "a queue neither orders"),
        (
            ("--seed", "1", "--scenario", "kind=queue,guarantee=at-most-once"),
            "the contract refuses",
        ),
        (("--seed", "1", "--scenario", "kind=log", "--faults", "w1"), "written like w1@12=crash"),
        (("--seed", "1", "--enumerate"), "--enumerate means nothing where one schedule"),
        (("--seed", "1", "--save", "x.json"), "--save means nothing where one schedule"),
        (("--enumerate", "--scenario", "bad"), "'bad' is no scenario"),
        (("--enumerate", "--seconds", "3"), "--seconds means nothing where crashes"),
        (("--until", "losst"), "'losst' is no property; there are lost,"),
        (("--until", "lost", "--seed", "3"), "--seed means nothing while a property is hunted"),
        (("--seconds", "0"), "'--seconds': 0.0"),
        (("--seconds", "nan"), "never ends"),
        (("--schedules", "0"), "'--schedules': 0"),
        (("--schedules", "10", "--seconds", "3"), "--seconds means nothing with --schedules"),
        (("--processes", "-1"), "'--processes': -1"),
        (("--save", "/there/is/none.json"), "no file that can be written"),
        (("--save", "."), "no file that can be written"),
        (("--slow",), "No such option"),
    ],
)
def test_simulation(options: tuple[str, ...], said: str):
    assert said in refused(simulation, *options)


@pytest.mark.parametrize("fault", ["w1@3=kraken", "w1@30000=crash", "w9@3=crash"])
def test_a_replay_whose_fault_never_hits_shows_nothing(fault: str):
    options = ("--seed", "0", "--scenario", "kind=log", "--faults")
    ended = CliRunner().invoke(simulation, [*options, fault])
    assert ended.exit_code == 2
    assert ended.stdout.endswith(f"unknown: the fault {fault} never hit\nunknown\n")
    ended = CliRunner().invoke(simulation, [*options, "w1@3=crash"])
    assert ended.exit_code == 0, ended.output
