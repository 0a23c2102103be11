"""All that is claimed about speed and quality, in one table: figure, bar, met or not.

    python benchmarks/bench.py [--full] [--out FOLDER]

Without `--full`, in half an hour on two cores: `limit`, `peers`, `service`, a case of `estimates`, and one task of `same_clock` with the learning
rates stored in docs/evidence. With it, everything, resumable where a program keeps rows. Each program runs as a process of its
own and leaves its JSON in the folder, so that one that fails costs no other's result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT, table

EVIDENCE = ROOT / "docs" / "evidence"
STORED = str(EVIDENCE / "same-clock.jsonl")
QUICK: dict[str, list[str]] = {
    "limit": ["--steps", "6", "--quick"],
    "peers": ["--steps", "80", "--libraries", "HF Trainer"],
    "service": ["--quick"],
    "estimates": ["--only", "balanced", "--seconds", "8"],
    "same_clock": ["run", "--only", "demo/far", "--rates", STORED, "--arms", "dense", "SAT balanced", "SAT fast", "LoRA rank 32", "--seeds", "0", "1"],
}  # fmt: skip
FULL: dict[str, list[str]] = {
    "limit": ["--steps", "20", "--plot", str(EVIDENCE / "limit.png")],
    "peers": ["--steps", "120", "--plot", str(EVIDENCE / "peers.png")],
    "service": [],
    "estimates": ["--md", str(EVIDENCE / "estimates.md")],
    "same_clock": ["run", "--jsonl", STORED],
}


def run(name: str, arguments: list[str], out: Path, *, full: bool) -> list[dict[str, Any]]:
    """The figures of one program; none where it failed, which its output has said."""
    result = out / f"{name}.json"
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments]
    if name == "same_clock":
        command += ["--work", str(out / "same-clock")]
        if not full:
            rows = out / "same-clock-rows.jsonl"
            rows.unlink(missing_ok=True)
            command += ["--jsonl", str(rows)]
    started = time.monotonic()
    print(f"\n== {name} {' '.join(arguments)}", flush=True)
    code = subprocess.run([*command, "--json", str(result)], check=False, cwd=ROOT).returncode
    print(f"== {name}: {time.monotonic() - started:.0f} s, exit {code}", flush=True)
    return json.loads(result.read_text())["figures"] if code == 0 else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all of it; hours")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", nargs="*", choices=list(QUICK), help="programs to run")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    programs = FULL if args.full else QUICK
    found = {
        name: run(name, arguments, args.out, full=args.full)
        for name, arguments in programs.items()
        if not args.only or name in args.only
    }
    print()
    print(table([f for figures in found.values() for f in figures if f["bar"] is not None]))
    sys.exit(not all(found.values()))


if __name__ == "__main__":
    main()
