"""Merging with act against mergekit's own methods: time, memory and bytes read, alternating, cold and warm files.

    python benchmarks/merge.py [--model qwen2.5-1.5b] [--density 0.01] [--density 0.05] [--density 0.2] [--rounds 5]

Makes a random pair in bfloat16 and masks of random channels, so that every tensor has selected rows. Each merge runs in
a process of its own; time is that of mergekit's run_merge, imports excluded. Disks of rented machines write fast until
a burst is spent: each round begins with another merge, and there is a pause before each. Cold: the models' files are
dropped from the page cache before, as far as the kernel follows. Memory is RssAnon above what the process had with
mergekit imported, read every 10 ms; bytes read are those from storage, as /proc/PID/io counts them.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from streaming import measure, memory_of

METHODS = ("passthrough", "task_arithmetic", "ties")


def storage_reads() -> int:
    lines = dict(line.split(":") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def child(settings: dict) -> None:
    """Merge once; print the memory before and the seconds."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(device=settings["device"], quiet=True, write_model_card=False, copy_tokenizer=False)
    config = MergeConfiguration.model_validate(settings["config"])
    print(json.dumps({"before": memory_of("self")}), flush=True)
    started, read = time.perf_counter(), storage_reads()
    run_merge(config, settings["out"], options)
    print(json.dumps({"seconds": time.perf_counter() - started, "read": storage_reads() - read}))


def drop_from_cache(folders: list[str]) -> None:
    os.sync()
    for folder in folders:
        for path in Path(folder).glob("*.safetensors"):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(folders: list[str]) -> None:
    for folder in folders:
        for path in Path(folder).glob("*.safetensors"):
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def configs(folders: list[str], densities: tuple[float, ...], root: Path) -> dict[str, dict]:
    """Name -> merge config; writes the masks."""
    from mergekit_act.artifacts import save_mask
    from mergekit_act.profiling import open_pair, profile_without_data
    from mergekit_act.selection import make_mask

    target, ability = folders
    common = {"base_model": target, "dtype": "bfloat16"}
    profile = profile_without_data(open_pair(target, ability), "random")
    made: dict[str, dict] = {}
    for method in METHODS:
        parameters = {"weight": 0.4} | ({"density": 0.5} if method == "ties" else {})
        models = [{"model": ability, "parameters": parameters}]
        if method == "passthrough":
            made[method] = {"merge_method": method, "models": [{"model": target}], "dtype": "bfloat16"}
        else:
            made[method] = common | {"merge_method": method, "models": models}
    for density in densities:
        path = root / f"{density}.safetensors"
        save_mask(make_mask([profile], density), path, overwrite=True)
        models = [{"model": ability, "parameters": {"weight": 0.4, "mask": str(path)}}]
        made[f"act, {density:.0%}"] = common | {"merge_method": "act", "models": models}
    return made


def main() -> None:
    import click
    from random_pair import CONFIGS, pair_in

    from mergekit_act.wording import table

    @click.command()
    @click.option("--model", type=click.Choice(list(CONFIGS)), default="qwen2.5-1.5b", show_default=True)
    @click.option("--folder", help="Keep the models here.")
    @click.option("--density", type=float, multiple=True, default=[0.01, 0.05, 0.2], show_default=True)
    @click.option("--device", default="cpu", show_default=True)
    @click.option("--rounds", default=5, show_default=True)
    @click.option("--pause", default=10.0, show_default=True, help="Seconds before each merge.")
    @click.option("--skip", type=click.Choice(METHODS), multiple=True, help="Leave a slow one out.")
    def run(model, folder, density, device, rounds, pause, skip) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            folders = pair_in(Path(folder or temporary), model)
            made = {n: c for n, c in configs(folders, density, Path(temporary)).items() if n not in skip}
            print(f"{model}, bfloat16, {device}, medians of {rounds} alternating rounds; GB")
            for state, prepare in (("cold", drop_from_cache), ("warm", read_through)):
                results: dict[str, list[dict]] = {name: [] for name in made}
                for turn in range(rounds):
                    first = turn * len(made) // rounds
                    for name in [*made, *made][first : first + len(made)]:
                        out = Path(temporary) / "out"
                        shutil.rmtree(out, ignore_errors=True)
                        os.sync()
                        time.sleep(pause)
                        prepare(folders)
                        settings = {"config": made[name], "out": str(out), "device": device}
                        results[name].append(measure(settings, Path(__file__)))
                print(show(state, results, table))

    run()


def show(state: str, results: dict[str, list[dict]], table) -> str:
    """A row per merge: seconds, ratios to the yardsticks, memory and bytes read."""
    seconds = {name: statistics.median(result["seconds"] for result in each) for name, each in results.items()}
    yardsticks = [name for name in ("passthrough", "task_arithmetic") if name in seconds]
    rows = []
    for name, each in results.items():
        ratios = [f"{seconds[name] / seconds[yardstick]:.2f}" for yardstick in yardsticks]
        memory = max(result["anonymous"] for result in each) / 1e9
        read = statistics.median(result["read"] for result in each) / 1e9
        rows.append([name, f"{seconds[name]:.1f}", *ratios, f"{memory:.2f}", f"{read:.2f}"])
    return table([state, "seconds", *(f"to {name}" for name in yardsticks), "RssAnon", "read"], rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    else:
        main()
