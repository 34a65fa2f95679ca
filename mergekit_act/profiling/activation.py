"""Profile a pair: feed both models the same samples and average how far each channel's activations differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mergekit_act.abilities import AbilitySamples
from mergekit_act.abilities.batches import cut_batches
from mergekit_act.artifacts import Profile
from mergekit_act.devices import default_dtype, usable_device
from mergekit_act.profiling.pair import ModelPair
from mergekit_act.profiling.passes import Pass
from mergekit_act.profiling.state import RunState
from mergekit_act.profiling.sums import DifferenceSums
from mergekit_act.runs.processes import Processes
from mergekit_act.versions import installed_versions

__all__ = ["profile_pair", "run_settings"]


def profile_pair(
    pair: ModelPair,
    abilities: Sequence[AbilitySamples],
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    batch_tokens: int = 4096,
    memory_budget: int | None = None,
    state: Path | None = None,
    save_every: float = 60.0,
    processes: Processes | None = None,
    quiet: bool = False,
) -> list[Profile]:
    """The activation profiles of a pair, one per ability; all abilities go through the models in one pass.

    Args:
        pair: the models.
        abilities: their samples.
        device: where the models run; None takes the accelerator if there is one.
        dtype: in which they run; None takes bfloat16 where the device multiplies it natively, else float32.
        batch_tokens: tokens in a micro-batch, padding included.
        memory_budget: bytes of the device's memory to use; None takes what is free, with a margin. What of the models
            does not fit is loaded once per chunk of micro-batches. The profiles do not depend on it.
        state: file in which an unfinished run is kept, and from which it goes on; None keeps nothing.
        save_every: seconds after which the state is saved, at the end of a chunk.
        processes: those that share the samples; None for this one alone.
        quiet: show no progress.

    Raises:
        ValueError: the device can't be used, a token id is not in both vocabularies, a sample is longer than the
            models' position embeddings, a module's output can't be observed, activations are NaN or infinite, or the
            memory does not hold a layer of both models and one micro-batch.
    """
    processes = processes or Processes()
    device = usable_device(device, processes.local_rank if processes.count > 1 else None)
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    dtype = dtype or default_dtype(device)
    _check_samples(abilities, pair)
    batches = [(place, batch) for place, a in enumerate(abilities) for batch in cut_batches(a.samples, batch_tokens)]
    batches = batches[processes.rank :: processes.count]
    every_sums = [DifferenceSums(pair.layout, device)]
    every_sums += [DifferenceSums(pair.layout, device, every_sums[0].scratch) for _ in abilities[1:]]
    settings = run_settings(pair, abilities, device, dtype, batch_tokens, processes)
    saved = None if state is None else RunState(state, settings)
    names = [ability.name for ability in abilities]
    share = Pass(pair, device, dtype, batches, names, memory_budget, processes.local_count)
    share.run(every_sums, saved, save_every, quiet=quiet or processes.rank > 0)
    for sums in every_sums:
        sums.add_up(processes)
    return [
        _profile(pair, ability, sums, dtype, batch_tokens) for ability, sums in zip(abilities, every_sums, strict=True)
    ]


def run_settings(
    pair: ModelPair,
    abilities: Sequence[AbilitySamples],
    device: str,
    dtype: torch.dtype,
    batch_tokens: int,
    processes: Processes,
) -> dict[str, Any]:
    """All that sums depend on: a run that is continued must have the same."""
    return {
        "target": pair.target.fingerprint,
        "ability_model": pair.ability_model.fingerprint,
        "exclude": list(pair.exclude),
        "abilities": {ability.name: ability.data for ability in abilities},
        "order": [ability.name for ability in abilities],
        "device": torch.device(device).type,
        "dtype": str(dtype).removeprefix("torch."),
        "batch_tokens": batch_tokens,
        "processes": processes.count,
        "versions": installed_versions("mergekit", "torch", "transformers"),
    }


def _check_samples(abilities: Sequence[AbilitySamples], pair: ModelPair) -> None:
    vocabulary = pair.vocabulary
    for ability in abilities:
        if not ability.answer_tokens:
            raise ValueError(f'ability "{ability.name}" has no answer tokens')
        for place, sample in enumerate(ability.samples):
            if pair.positions is not None and len(sample.input_ids) > pair.positions:
                raise ValueError(
                    f'ability "{ability.name}": sample {place} has {len(sample.input_ids)} tokens; the models have '
                    f"{pair.positions} positions. Set max_length to {pair.positions} or less"
                )
            low, high = int(sample.input_ids.min()), int(sample.input_ids.max())
            if low < 0 or high >= vocabulary:
                raise ValueError(
                    f'ability "{ability.name}": sample {place} has token id {low if low < 0 else high}; '
                    f"both models have the ids 0 to {vocabulary - 1}"
                )


def _profile(
    pair: ModelPair, ability: AbilitySamples, sums: DifferenceSums, dtype: torch.dtype, batch_tokens: int
) -> Profile:
    unscored = [module for module, count in sums.counts.items() if not count]
    if unscored:
        raise ValueError(
            f'ability "{ability.name}": {len(unscored)} modules with channels were not scored: '
            f"{', '.join(unscored[:10])}"
        )
    return Profile(
        scores=sums.means(),
        layout=pair.layout,
        criterion="activation",
        ability=ability.name,
        target=pair.target.describe(),
        ability_model=pair.ability_model.describe(),
        samples=len(ability.samples),
        answer_tokens=ability.answer_tokens,
        dtype=str(dtype).removeprefix("torch."),
        data=ability.data
        | {"batch_tokens": batch_tokens}
        | ({"exclude": list(pair.exclude)} if pair.exclude else {})
        | ({"expert_tokens": sums.expert_tokens} if sums.expert_tokens else {}),
        shared_rows=pair.shared_rows,
    )
