"""Streamed profiling against resident: time and memory, each run in a process of its own, alternating.

    python benchmarks/streaming.py [--model qwen2.5-1.5b] [--budget 1.5GB] [--device cpu] [--rounds 3]

Makes a random pair in bfloat16 and profiles it with both models in memory and within each budget. Memory is what the
process has above the interpreter with torch imported, read from /proc every 10 ms: RssAnon, RssFile (mapped weights
count) and their largest sum; on CUDA also the device's. Prints medians of time and the largest of memory.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def memory_of(pid: int | str) -> tuple[int, int]:
    """(RssAnon, RssFile) of a process in bytes."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024, int(lines["RssFile"].split()[0]) * 1024


def child(settings: dict) -> None:
    """Profile once; print the memory before and the seconds."""
    import torch

    before = memory_of("self")
    print(json.dumps({"before": before}), flush=True)
    from random_pair import random_ability

    from mergekit_act.profiling import ProfilingSettings, open_pair, profile_pair

    pair = open_pair(*settings["folders"])
    ability = random_ability(settings["samples"], settings["tokens"], pair.vocabulary)
    started = time.perf_counter()
    (profile,) = profile_pair(
        pair,
        [ability],
        ProfilingSettings(
            device=settings["device"],
            dtype=settings["dtype"],
            batch_tokens=settings["batch_tokens"],
            memory_budget=settings["budget"],
            criterion=settings.get("criterion", "activation"),
            quiet=True,
        ),
    )
    seconds = time.perf_counter() - started
    device = torch.cuda.max_memory_allocated() if settings["device"].startswith("cuda") else 0
    digest = sum(float(scores.double().sum()) for scores in profile.scores.values())
    print(json.dumps({"seconds": seconds, "device": device, "digest": digest, "dtype": profile.dtype}))


def measure(settings: dict, script: str | Path = __file__) -> dict:
    """Run a script's child; returns what it says, and its peaks above what it had before."""
    process = subprocess.Popen(
        [sys.executable, str(script), "--child", json.dumps(settings)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    if not first:
        raise SystemExit(f"the run with {settings} failed")
    anonymous, mapped = json.loads(first)["before"]
    peaks = [0, 0, 0]
    while process.poll() is None:
        try:
            now = memory_of(process.pid)
        except (FileNotFoundError, KeyError):
            break
        above = (now[0] - anonymous, now[1] - mapped)
        peaks = [max(pair) for pair in zip(peaks, (*above, sum(above)), strict=True)]
        time.sleep(0.01)
    said = process.stdout.read()
    if process.wait() != 0:
        raise SystemExit(f"the run with {settings} failed")
    return json.loads(said) | {"anonymous": peaks[0], "mapped": peaks[1], "both": peaks[2]}


def peaks_of(results: list[dict]) -> list[str]:
    """The largest RssAnon, RssFile, sum of both and device memory of some runs, in GB."""
    return [
        f"{max(result[kind] for result in results) / 1e9:.2f}" for kind in ("anonymous", "mapped", "both", "device")
    ]


def main() -> None:
    import click
    from random_pair import CONFIGS, pair_in

    from mergekit_act.streaming.memory import parse_bytes
    from mergekit_act.wording import table

    @click.command()
    @click.option("--model", type=click.Choice(list(CONFIGS)), default="qwen2.5-1.5b", show_default=True)
    @click.option("--folder", help="Where the pair is made, or is from an earlier run.  [default: a temporary one]")
    @click.option("--budget", multiple=True, default=["1.5GB"], show_default=True)
    @click.option("--device", default="cpu", show_default=True)
    @click.option("--dtype", type=click.Choice(["float32", "bfloat16"]))
    @click.option("--criterion", default="activation", show_default=True)
    @click.option("--samples", default=32, show_default=True)
    @click.option("--tokens", default=256, show_default=True)
    @click.option("--batch-tokens", default=4096, show_default=True)
    @click.option("--rounds", default=3, show_default=True)
    def run(model, folder, budget, device, dtype, criterion, samples, tokens, batch_tokens, rounds) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            common = {
                "folders": pair_in(Path(folder or temporary), model), "device": device, "dtype": dtype,
                "criterion": criterion, "samples": samples, "tokens": tokens, "batch_tokens": batch_tokens,
            }  # fmt: skip
            modes = {"resident": 10**15} | {f"budget {text}": parse_bytes(text) for text in budget}
            results: dict[str, list[dict]] = {name: [] for name in modes}
            for _ in range(rounds):
                for name, size in modes.items():
                    results[name].append(measure(common | {"budget": size}))
        assert len({result["digest"] for each in results.values() for result in each}) == 1, "the scores differ"
        resident = statistics.median(result["seconds"] for result in results["resident"])
        rows = []
        for name, each in results.items():
            seconds = statistics.median(result["seconds"] for result in each)
            peaks = peaks_of(each)
            rows.append([name, f"{seconds:.1f}", f"{seconds / resident:.2f}", *peaks])
        print(
            f"{model}, {criterion}, {results['resident'][0]['dtype']} from bfloat16 files, {device}, {samples} samples "
            f"of {tokens} tokens, half answer, micro-batches of {batch_tokens} tokens, {rounds} alternating rounds; GB"
        )
        print(table(["", "seconds", "to resident", "RssAnon", "RssFile", "their sum", "device"], rows))

    run()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    else:
        main()
