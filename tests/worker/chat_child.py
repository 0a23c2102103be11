"""A model that answers as its name says."""

import itertools
import json
import sys
import time
from pathlib import Path

folder = Path(sys.argv[2])
name = json.loads((folder / "config.json").read_text())["model"]["name"].removeprefix("local/")
numbers = itertools.count(1)


def tell(kind: str, **more: object) -> None:
    row = {"seq": next(numbers), "time": time.time(), "kind": kind, **more}
    with (folder / "events.jsonl").open("a") as events:
        events.write(json.dumps(row) + "\n")


if name == "crash":
    sys.exit(3)
if name == "refuse":
    tell("failed", code="model_unsupported", message="It has no layers.", param="model")
    sys.exit(20)
tell("listening", port=9)
if name != "silent":
    tell("answering")
if name == "brief":
    while not (folder / "enough").exists():
        time.sleep(0.01)
    tell("idle")
time.sleep(60)
