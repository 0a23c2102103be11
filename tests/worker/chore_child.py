"""A child of a chore that behaves as its config.json says."""

import json
import os
import signal
import sys
import time
from pathlib import Path

folder = Path(sys.argv[2])
behaviour = json.loads((folder / "config.json").read_text())["behaviour"]
(folder / "pid").write_text(str(os.getpid()))
events = folder / "events.jsonl"
result = folder / "result.json"


def fail(code: str, message: str) -> None:
    row = {"seq": 1, "time": 1.0, "kind": "failed", "code": code, "message": message, "param": None}
    events.write_text(json.dumps(row) + "\n")
    sys.exit(20)


# The bounds arrive from outside, as the process starts.
while (
    behaviour in ("grow", "flood", "big_log")
    and "Max file size             1048576" not in Path("/proc/self/limits").read_text()
):
    time.sleep(0.01)
if behaviour == "hang":
    time.sleep(60)
if behaviour == "refuse":
    fail("dataset_invalid", "line 3 is bad")
if behaviour == "crash":
    sys.exit(3)
if behaviour == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "grow":
    try:
        held = bytearray(4 * 2**30)
    except MemoryError:
        fail("out_of_memory", "MemoryError")
if behaviour == "flood":
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    result.write_bytes(b"x" * 2**24)
if behaviour == "big_log":
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    while True:
        os.write(2, b"x" * 2**16)
if behaviour == "half_result":
    result.write_text('{"half":')
if behaviour == "list_result":
    result.write_text("[]")
if behaviour == "succeed":
    result.write_text(json.dumps({"nice": os.getpriority(os.PRIO_PROCESS, 0)}))
