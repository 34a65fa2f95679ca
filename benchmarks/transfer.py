"""The whole path as one command against its steps as commands of their own, and killed at random moments.

    mergekit-act demo DEMO && python benchmarks/transfer.py DEMO [--kills 10] [--rounds 3] [--seed 0]

Both run on the demo's models and abilities, alternating. Killed is one process with all that it has begun; the same
command is given again, and what it leaves must be the bytes of an uninterrupted run (times aside).
"""

from __future__ import annotations

import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click

ACT = [sys.executable, "-m", "mergekit_act"]
WHOLE = [*ACT, "transfer", "abilities.yml", "out", "--dtype", "float32", "--keep-within", "0.2"]
TIMED = {"sweep.csv", "transfer.json"}  # say how long something took


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name not in TIMED}


def alone(steps: list[list[str]]) -> None:
    for program, *words in steps:
        run([*ACT, *(["merge"] if program == "mergekit-yaml" else []), *words])


@click.command()
@click.argument("demo", type=click.Path(path_type=Path, exists=True))
@click.option("--kills", default=10, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(demo: Path, kills: int, rounds: int, seed: int) -> None:
    os.chdir(demo)
    out, chance = Path("out"), random.Random(seed)
    seconds: dict[str, list[float]] = {"transfer": [], "its commands": []}
    whole: dict[str, bytes] = {}
    for _ in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        started = time.monotonic()
        told = run(WHOLE)
        seconds["transfer"].append(time.monotonic() - started)
        whole = contents(out)
        steps = [shlex.split(line[2:]) for line in told.splitlines() if line.startswith("$ ")]
        given = {name: (out / name).read_bytes() for name in ("choose.yml", "measure.yml", "merge.yml")}
        shutil.rmtree(out)
        out.mkdir()
        for name, content in given.items():
            (out / name).write_bytes(content)
        started = time.monotonic()
        alone(steps)
        seconds["its commands"].append(time.monotonic() - started)
    for name, some in seconds.items():
        print(f"{name:13} {statistics.median(some):6.1f} s")
    same = 0
    for _ in range(kills):
        shutil.rmtree(out, ignore_errors=True)
        moment = chance.uniform(0, statistics.median(seconds["transfer"]))
        process = subprocess.Popen(WHOLE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(moment)
        os.killpg(process.pid, 9)
        process.wait()
        run(WHOLE)
        found = contents(out)
        other = sorted(name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name))
        same += not other
        print(f"killed after {moment:.1f} s: {'same bytes' if not other else ', '.join(other)}", flush=True)
    print(f"{same} of {kills} killed transfers gave the same bytes")
    sys.exit(same != kills)


if __name__ == "__main__":
    main()
