"""Runs killed at random moments, and resumed: the profiles must be the bytes of an uninterrupted run.

    python benchmarks/kills.py [--kills 20] [--seed 0]

A tiny pair and two abilities; each run is killed (SIGKILL) at a random moment from when it starts to when it would have
ended, resident or streamed by chance, and then the same command is given again.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tiny import make_model, tiny_config

NAMES = ("one.safetensors", "two.safetensors")


def command(root: Path, out: str, budget: str) -> list[str]:
    options = ["--batch-tokens", "30", "--dtype", "float32", "--save-every", "0", "--quiet", "--memory-budget", budget]
    return [sys.executable, "-m", "mergekit_act", "profile", str(root / "abilities.yml"), str(root / out), *options]


@click.command()
@click.option("--kills", default=20, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(kills: int, seed: int) -> None:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models = [make_model(tiny_config("qwen3"), root / name, seed=i) for i, name in enumerate(("target", "ability"))]
        lines = [json.dumps({"q": f"{a}+{b}", "a": str(a + b)}) for a in range(100) for b in range(9)]
        (root / "sums.jsonl").write_text("\n".join(lines))
        data = f"dataset: {root}/sums.jsonl, prompt: q, answer: a"
        (root / "abilities.yml").write_text(
            f"target: {models[0]}\nability_model: {models[1]}\nabilities:\n"
            f"  one: {{{data}, samples: 150}}\n  two: {{{data}, samples: 80, seed: 3}}\n"
        )
        started = time.monotonic()
        subprocess.run(command(root, "whole", "10GB"), check=True, stdout=subprocess.DEVNULL)
        length = time.monotonic() - started
        whole = [(root / "whole" / name).read_bytes() for name in NAMES]
        same = 0
        for number in range(kills):
            out, budget = f"killed-{number}", chance.choice(["10GB", "1.6MB"])
            process = subprocess.Popen(command(root, out, budget), stdout=subprocess.DEVNULL)
            moment = chance.uniform(0, length)
            time.sleep(moment)
            process.kill()
            process.wait()
            state = root / out / "profile.state"
            done = "nothing saved"
            if state.exists():
                with safe_open(state, framework="pt") as file:
                    metadata = json.loads(file.metadata()["mergekit_act"])
                done = f"{metadata['done']} of {metadata['total']} micro-batches"
            elif (root / out / NAMES[1]).exists():
                done = "all written"
            again = ["--overwrite"] if done == "all written" else []
            subprocess.run([*command(root, out, "10GB"), *again], check=True, stdout=subprocess.DEVNULL)
            files = sorted(path.name for path in (root / out).iterdir())
            equal = files == list(NAMES) and [(root / out / name).read_bytes() for name in NAMES] == whole
            same += equal
            said = "same bytes" if equal else "OTHER BYTES"
            print(f"killed after {moment:.1f} of {length:.1f} s, budget {budget}, {done}: {said}", flush=True)
        print(f"{same} of {kills} killed runs gave the same bytes")
        sys.exit(same != kills)


if __name__ == "__main__":
    main()
