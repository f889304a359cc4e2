"""Consumers that share a process with one whose message kills it, again and again."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cli.conftest import Place, end
from tests.waiting import eventually

# The slow one is always under way when the process dies, unless it has the process to itself.
TWO = """
import os, pathlib, signal, sqlite3, threading
import duly

never, slow_runs = threading.Event(), threading.Event()
parcels = duly.Topic("parcels", str, guarantee="at-least-once")
letters = duly.Topic("letters", str, guarantee="{guarantee}")
app = duly.App("office", broker="sqlite:///office.db")
options = {{"retry": duly.RetryPolicy(attempts=3, first_s=0.01), "batch": 1, "lease_s": 60}}

def note(what):
    with open("notes", "a") as notes:
        notes.write(f"{{what}}\\n")

@app.consumer(parcels, name="weighing", guarantee="at-least-once", **options)
def weigh(parcel: str) -> None:
    note("poison starts")
    slow_runs.wait(1.0)
    os.kill(os.getpid(), signal.SIGKILL)
    never.wait()

@app.consumer(letters, name="reading", guarantee="{guarantee}", **options)
{colour} read(letter: str{tx}) -> None:
    note(f"{{letter}} starts")
    slow_runs.set()
    {wait}
    note(f"{{letter}} ends")
"""

VARIANTS = {
    "def": ("at-least-once", "def", "", "never.wait(0.4)"),
    "async def": ("at-least-once", "async def", "", "await __import__('asyncio').sleep(0.4)"),
    "exactly-once": (
        "exactly-once", "def", ", tx: duly.Transaction[sqlite3.Connection]", "never.wait(0.4)",
    ),
}  # fmt: skip

FILL = """
from office import app, letters, parcels
app.publish(parcels, "poison")
app.publish_many(letters, ["first", "second"])
"""

CHARGED = """
    select distinct subscription from duly_incidents
    where kind = 'redelivery' and detail like '%, charged'
"""


@pytest.mark.parametrize("variant", VARIANTS)
def test_who_ran_beside_a_message_that_kills_its_process_pays_nothing(place: Place, variant: str):
    guarantee, colour, tx, wait = VARIANTS[variant]
    place.write("office.py", TWO.format(guarantee=guarantee, colour=colour, tx=tx, wait=wait))
    place.write("fill.py", FILL)
    subprocess.run([sys.executable, "fill.py"], cwd=place.path, check=True)
    log = place.path / "log"
    with log.open("w") as err:
        process = place.start("run", "office:app", "--processes", "1", stderr=err)
        notes = place.path / "notes"

        def over() -> bool:
            said = notes.read_text() if notes.exists() else ""
            dead = place.rows("select 1 from duly_dead", database="office.db")
            return bool(dead) and "first ends" in said and "second ends" in said

        eventually(over, "the poison is dead, the others read", log.read_text, timeout_s=90)
        end(process)
    dead = place.rows("select topic, attempts - 1 from duly_dead", database="office.db")
    assert dead == [("parcels", 3)], "and nobody else is given up on"
    assert place.rows(CHARGED, database="office.db") == [("weighing",)]
    # Two deaths tell nobody the culprit: of all that was claimed, and of whom was alone in that.
    assert notes.read_text().count("poison starts") <= 3 + 2
