"""A plain script: it publishes, works what it published, and ends. No server, no second process.

Whatever is interrupted is gone on with by the next run of the script. Nobody supervises this
process: use `duly run` where a handler may hang.

    python ex07_script.py
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import duly
from duly.worker import Worker

names = duly.Topic("names", str, guarantee="exactly-once")
app = duly.App("greetings", broker="sqlite:///greetings.db")
done = threading.Event()


@app.consumer(names, name="greet", guarantee="at-least-once")
def greet(name: str) -> None:
    with Path("greetings.txt").open("a", encoding="utf-8") as file:
        file.write(f"hello {name}\n")
    if name == "the end":
        done.set()


def main() -> int:
    with app:
        for name in (*sys.argv[1:], "the end"):
            print(app.publish(names, name))
        with Worker(app):  # leaving the block drains it
            return 0 if done.wait(30) else 1


if __name__ == "__main__":
    sys.exit(main())
