"""Profiles against an independent implementation, for every architecture, batch size, padding and budget.

    python benchmarks/matrix.py                                                alone
    torchrun --nproc-per-node 2 benchmarks/matrix.py                           two processes

Tiny random pairs; the second implementation (tests/oracle.py) runs whole forwards with hooks, one sample at a time,
with padding on the left or none. Prints for each architecture the largest difference of a channel's score, as a share
of its module's mean score.
"""

from __future__ import annotations

import itertools
import re
import sys
import tempfile
from pathlib import Path

import click
import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from oracle import plain_experts, plain_profile
from samples import ARCHITECTURES, as_ability, random_samples
from tiny import make_model, tiny_config

from mergekit_act.profiling import ProfilingSettings, open_pair, profile_pair
from mergekit_act.runs.processes import join_processes
from mergekit_act.streaming.memory import parse_bytes
from mergekit_act.wording import table

BATCH_TOKENS = (1, 40, 4096)
PADDING = (0, 6)


def least_budget(pair, abilities, **settings) -> int:
    try:
        profile_pair(pair, abilities, ProfilingSettings(memory_budget=1, **settings))
    except ValueError as refusal:
        number, unit = re.search(r"need about ([\d.]+ [MG]B)", str(refusal))[1].split()
        return int(parse_bytes(number + unit) * 1.006)
    return 1  # a process without samples needs nothing


@click.command()
def main() -> None:
    samples = random_samples() + random_samples(1)
    with join_processes() as processes, tempfile.TemporaryDirectory() as folder:
        rows = []
        for name in (*ARCHITECTURES, "qwen3_moe", "mixtral", "gpt_oss"):
            shared = [folder]
            if processes.count > 1:
                distributed.broadcast_object_list(shared)
            folders = [Path(shared[0]) / name / str(seed) for seed in (1, 2)]
            for seed, path in enumerate(folders if processes.rank == 0 else (), start=1):
                make_model(tiny_config(name), path, seed=seed)
            processes.wait()
            pair = open_pair(*map(str, folders))
            of_experts = [m for m in pair.layout.modules if "experts" in m or m.endswith((".gate", ".router"))]
            plain = [module for module in pair.layout.modules if module not in of_experts]
            expected = {pad: plain_profile(*folders, samples, plain, pad_left=pad) for pad in PADDING}
            for scores in expected.values() if of_experts else ():
                scores |= plain_experts(*folders, samples)
            worst, count, same = 0.0, 0, True
            for batch_tokens in BATCH_TOKENS:
                settings = {"device": "cpu", "dtype": "float32", "batch_tokens": batch_tokens, "quiet": True}
                ability = [as_ability(samples)]
                resident, streamed = (
                    profile_pair(
                        pair, ability, ProfilingSettings(memory_budget=budget, **settings), processes=processes
                    )[0].scores
                    for budget in (10**12, least_budget(pair, ability, **settings))
                )
                same &= all(torch.equal(resident[module], streamed[module]) for module in resident)
                for scores, pad in itertools.product((resident, streamed), PADDING):
                    count += 1
                    for module, column in expected[pad].items():
                        difference = (scores[module].double() - column).abs().max() / column.mean()
                        worst = max(worst, float(difference))
            rows.append([name, str(count), f"{worst:.1e}", "yes" if same else "NO"])
        if processes.rank == 0:
            print(f"{processes.count} processes, micro-batches of {BATCH_TOKENS} tokens, left padding {PADDING}")
            print(table(["", "comparisons", "largest difference", "streamed = resident, to the bit"], rows))
            sys.exit(any(row[-1] == "NO" or float(row[-2]) > 1e-5 for row in rows))


if __name__ == "__main__":
    main()
