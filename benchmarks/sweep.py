"""A sweep's point against an evaluation of its samples: patching and restoring should cost little.

    python benchmarks/sweep.py [--model qwen2.5-1.5b] [--density 0.05] [--samples 16] [--rounds 3] [--fit]

Makes a random pair in bfloat16 and a random profile, loads the target once, and alternates between scoring the samples
as they are and scoring them with the merge patched in. What is done once per mask is measured apart: planning, and with
--fit solving the rows that are selected.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import click
import torch
from random_pair import CONFIGS, pair_in, random_ability


@click.command()
@click.option("--model", type=click.Choice(list(CONFIGS)), default="qwen2.5-1.5b", show_default=True)
@click.option("--folder", help="Keep the models here.")
@click.option("--density", default=0.05, show_default=True)
@click.option("--samples", default=16, show_default=True)
@click.option("--tokens", default=256, show_default=True, help="Of a sample, half of them answer.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--fit", is_flag=True, help="Fit the selected rows.")
def main(model, folder, density, samples, tokens, device, rounds, fit) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_act.artifacts import save_inputs, save_profile
    from mergekit_act.checkpoints import open_checkpoint
    from mergekit_act.evaluation import score_answers
    from mergekit_act.models import load_model
    from mergekit_act.planning import plan_merge
    from mergekit_act.profiling import ProfilingSettings, open_pair, profile_without_data
    from mergekit_act.profiling.scoring import measure_pair
    from mergekit_act.sweeping import PatchedModel
    from mergekit_act.wording import table

    with tempfile.TemporaryDirectory() as temporary:
        target, ability = pair_in(Path(folder or temporary), model)
        profile = Path(temporary) / "profile.safetensors"
        # A head and the embedding it is tied to are not fitted at once.
        pair = open_pair(target, ability, exclude=("model.embed_tokens",) if fit else ())
        save_profile(profile_without_data(pair, "random"), profile)
        parameters = {"weight": 0.4, "mask": str(profile), "mask_density": density}
        if fit:
            abilities = [replace(random_ability(4, tokens, pair.vocabulary), name=role) for role in ("recover", "keep")]
            roles = {one.name: one.name for one in abilities}
            inputs = measure_pair(pair, abilities, ProfilingSettings(criterion="local", quiet=True), roles=roles)[1]
            save_inputs(inputs, Path(temporary) / "inputs.safetensors")
            parameters["fit"] = str(Path(temporary) / "inputs.safetensors")
        config = MergeConfiguration.model_validate(
            {
                "merge_method": "act",
                "base_model": target,
                "models": [{"model": ability, "parameters": parameters}],
                "dtype": "bfloat16",
            }
        )
        merged = config.models[0].model
        loaded = load_model(open_checkpoint(target), device=device, dtype=torch.bfloat16)
        given = random_ability(samples, tokens, loaded.config.vocab_size).samples
        patched = PatchedModel(loaded, torch.bfloat16)
        started = time.perf_counter()
        patched.take(plan_merge(config, MergeOptions()))
        planning = time.perf_counter() - started
        started = time.perf_counter()
        with patched.patched({merged: 0.4}):
            first = time.perf_counter() - started
        seconds: dict[str, list[float]] = {"evaluation": [], "point": [], "patch and restore": []}
        for turn in range(rounds + 1):  # the first is for warming up
            for what, times in seconds.items():
                started = time.perf_counter()
                if what == "evaluation":
                    score_answers(loaded, given)
                else:
                    with patched.patched({merged: 0.4}):
                        if what == "point":
                            score_answers(loaded, given)
                if torch.device(device).type == "cuda":
                    torch.cuda.synchronize()
                times += [time.perf_counter() - started] if turn else []
    medians = {what: statistics.median(times) for what, times in seconds.items()}
    print(
        f"{model}, bfloat16, {device}, density {density:g}, {samples} samples of {tokens} tokens, half answer, medians "
        f"of {rounds} alternating rounds; once per mask: planning {planning:.1f} s, first patch {first:.1f} s"
    )
    rows = [[what, f"{taken:.2f}", f"{taken / medians['evaluation']:.3f}"] for what, taken in medians.items()]
    print(table(["", "seconds", "to evaluation"], rows))


if __name__ == "__main__":
    main()
