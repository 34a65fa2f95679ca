"""How long a report of many profiles takes, and how much memory: beside reading the same files.

python benchmarks/report.py                   # 20 profiles with the shapes of Qwen2.5-7B
python benchmarks/report.py --profiles 2      # quicker
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from mergekit_act.artifacts import Profile, save_profile
from mergekit_act.channels import channel_layout
from mergekit_act.wording import table

READ = (
    "import sys; from mergekit_act.artifacts import load_profile; print(len([load_profile(p) for p in sys.argv[1:]]))"
)


def make_profiles(folder: Path, count: int) -> list[Path]:
    """Random heavy-tailed scores; names as of two domains in several languages."""
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    config = transformers.Qwen2Config(**sizes, num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False)
    layout = channel_layout(config)
    shared = {module: torch.randn(layout.channel_shape(module)) for module in layout.modules}
    models = (
        {"model": f"someone/{name}", "revision": None, "fingerprint": name} for name in ("target", "ability-model")
    )
    target, ability_model = models
    paths = []
    for place in range(count):
        name = f"{'math' if place % 2 else 'science'}-l{place // 2}"
        scores = {module: torch.exp(part + torch.randn_like(part)) for module, part in shared.items()}
        paths.append(folder / f"{name}.safetensors")
        save_profile(Profile(scores, layout, "activation", name, target, ability_model, 1500, 400_000), paths[-1])
    print(f"{count} profiles of {layout.channel_count():,} channels, {os.cpu_count()} cores, medians of", end=" ")
    return paths


def run(command: list[str]) -> tuple[float, float]:
    """Seconds, and the process's peak memory in GB."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command[:4])} … failed")
    return time.monotonic() - started, usage.ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        paths = [str(path) for path in make_profiles(Path(scratch), arguments.profiles)]
        print(f"{arguments.rounds} alternating rounds")
        out = ["-o", str(Path(scratch) / "report"), "--overwrite"]
        commands = {
            "reading the profiles": [sys.executable, "-c", READ, *paths],
            "report": [sys.executable, "-m", "mergekit_act", "report", *paths, *out, "--quiet"],
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(arguments.rounds):
            for name, command in commands.items():
                found[name].append(run(command))
        seconds = {name: statistics.median(second for second, _ in rounds) for name, rounds in found.items()}
        rows = []
        for name, rounds in found.items():
            ratio = seconds[name] / seconds["reading the profiles"]
            rows.append([name, f"{seconds[name]:.1f}", f"{ratio:.1f}", f"{max(memory for _, memory in rounds):.2f}"])
        print(table(["", "seconds", "to reading", "peak memory, GB"], rows))


if __name__ == "__main__":
    main()
