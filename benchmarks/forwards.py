"""Profiling against the bare forward passes that it cannot do without, in one run, alternating.

    python benchmarks/forwards.py [--model 100m] [--device cpu] [--dtype float32] [--rounds 7]

Makes a random pair in memory-mapped files, and times, over the same padded batches: two bare forwards with the head at
answer positions, two bare forwards with the full head, and the profiler by each criterion. The yardstick runs in
inference mode without cache. Prints medians and ratios.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import click
import torch
from random_pair import CONFIGS, make_pair, random_ability
from torch import Tensor, nn

from mergekit_act.abilities.batches import MicroBatch, cut_batches
from mergekit_act.profiling import open_pair
from mergekit_act.profiling.criteria import ENGINES
from mergekit_act.profiling.engine import Work
from mergekit_act.profiling.sums import ChannelSums
from mergekit_act.streaming.hidden import HiddenStates
from mergekit_act.streaming.loading import ModelWeights
from mergekit_act.streaming.memory import MemoryPlan
from mergekit_act.streaming.segments import SegmentedModel
from mergekit_act.streaming.weights import PairWeights
from mergekit_act.wording import table


def bare_forward(model: nn.Module, batch: MicroBatch, *, full_head: bool) -> Tensor:
    """The model's own forward, with its head at all positions or at the answer's."""
    if full_head:
        return model(input_ids=batch.input_ids, use_cache=False).logits
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return model.get_output_embeddings()(hidden[batch.sample_of, batch.position_of])


@click.command()
@click.option("--model", type=click.Choice(list(CONFIGS)), default="100m", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--samples", default=16, show_default=True)
@click.option("--tokens", default=256, show_default=True)
@click.option("--batch-tokens", default=4096, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--criterion", "criteria", multiple=True, default=tuple(ENGINES), show_default=True)
def main(model, device, dtype, samples, tokens, batch_tokens, rounds, criteria) -> None:
    kind = getattr(torch, dtype)
    with tempfile.TemporaryDirectory() as folder:
        pair = open_pair(*map(str, make_pair(model, Path(folder), kind)))
        ability = random_ability(samples, tokens, pair.vocabulary)
        batches = [batch.to(device) for batch in cut_batches(ability.samples, batch_tokens)]

        def settle(engine):
            """The engine with all weights in memory, and its models."""
            models = tuple(
                ModelWeights(SegmentedModel(skeleton), checkpoint, kind, device)
                for skeleton, checkpoint in zip(pair.skeletons(), (pair.target, pair.ability_model), strict=True)
            )
            point = 0.0 if engine.by_differences else None
            weights = PairWeights(models, pair.layout.channel_shape("lm_head")[0], point)
            weights.settle(MemoryPlan())
            weights.route = engine.route(weights.pieces)
            return engine(weights, pair.layout, pair.vocabulary, device, batch_tokens), models

        made = {name: settle(engine) for name, engine in ENGINES.items() if name in criteria}
        models = [model.segmented.model for model in settle(ENGINES["activation"])[1]]

        def profile(criterion: str) -> None:
            engine, _ = made[criterion]
            with engine.observing():
                sums = ChannelSums(pair.layout, device, kinds=engine.kinds)
                for batch in batches:
                    engine.run([Work(batch, sums)], HiddenStates("device", device))

        @torch.inference_mode()
        def forwards(full_head: bool) -> None:
            for batch in batches:
                for one in models:
                    bare_forward(one, batch, full_head=full_head)

        runs = {
            "two bare forwards, head at answers": lambda: forwards(False),
            "two bare forwards, full head": lambda: forwards(True),
            **{f"profile, {name}": partial(profile, name) for name in made},
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for name in list(runs) * (rounds + 1):
            started = time.perf_counter()
            runs[name]()
            if device != "cpu":
                torch.accelerator.synchronize()
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first round warms up
    yardstick, full, *_ = medians.values()
    rows = [
        [name, f"{median:.3f}", f"{median / yardstick:.3f}", f"{median / full:.3f}"] for name, median in medians.items()
    ]
    print(
        f"{model}, {dtype}, {device}, {samples} samples of {tokens} tokens, half answer, medians of {rounds} "
        "alternating rounds"
    )
    print(table(["", "seconds", "to answers' head", "to full head"], rows))


if __name__ == "__main__":
    main()
