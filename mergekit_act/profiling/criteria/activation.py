"""Profile a pair: feed both models the same samples and average how far each channel's activations differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mergekit_act.abilities import AbilitySamples
from mergekit_act.abilities.batches import cut_batches
from mergekit_act.artifacts import Profile
from mergekit_act.devices import dtype_name
from mergekit_act.models import check_samples_fit
from mergekit_act.profiling.pair import ModelPair
from mergekit_act.profiling.passes import Pass
from mergekit_act.profiling.settings import ProfilingSettings
from mergekit_act.profiling.sums import DifferenceSums
from mergekit_act.runs.processes import Processes
from mergekit_act.runs.state import StateFile
from mergekit_act.wording import enumerate_some

__all__ = ["profile_pair"]


def profile_pair(
    pair: ModelPair,
    abilities: Sequence[AbilitySamples],
    settings: ProfilingSettings | None = None,
    *,
    state: Path | None = None,
    processes: Processes | None = None,
) -> list[Profile]:
    """The activation profiles of a pair, one per ability; all abilities go through the models in one pass.

    Args:
        pair: the models.
        abilities: their samples.
        settings: how.
        state: file in which an unfinished run is kept, and from which it goes on; None keeps nothing.
        processes: those that share the samples; None for this one alone.

    Raises:
        ValueError: the device can't be used, samples do not fit a model's vocabulary or length, a module's output can't
            be observed, activations are NaN or infinite, or the memory does not hold a layer of both models and one
            micro-batch.
    """
    processes = processes or Processes()
    settings = (settings or ProfilingSettings()).resolved(processes)
    for ability in abilities:
        if not ability.answer_tokens:
            raise ValueError(f'ability "{ability.name}" has no answer tokens')
        for checkpoint in (pair.target, pair.ability_model):
            check_samples_fit(checkpoint, ability)
    batches = [(n, batch) for n, a in enumerate(abilities) for batch in cut_batches(a.samples, settings.batch_tokens)]
    batches = batches[processes.rank :: processes.count]
    every_sums = [DifferenceSums(pair.layout, settings.place)]
    every_sums += [DifferenceSums(pair.layout, settings.place, every_sums[0].scratch) for _ in abilities[1:]]
    saved = None if state is None else StateFile(state, settings.identity(pair, abilities, processes))
    names = [ability.name for ability in abilities]
    own = replace(settings, quiet=settings.quiet or processes.rank > 0)
    Pass(pair, own, batches, names, processes.local_count).run(every_sums, saved)
    for sums in every_sums:
        sums.add_up(processes)
    return [_profile(pair, ability, sums, settings) for ability, sums in zip(abilities, every_sums, strict=True)]


def _profile(pair: ModelPair, ability: AbilitySamples, sums: DifferenceSums, settings: ProfilingSettings) -> Profile:
    unscored = [module for module, count in sums.counts.items() if not count]
    if unscored:
        raise ValueError(
            f'ability "{ability.name}": {len(unscored)} modules with channels were not scored: '
            f"{enumerate_some(unscored)}"
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
        dtype=dtype_name(settings.torch_dtype),
        data=ability.data
        | {"batch_tokens": settings.batch_tokens}
        | ({"exclude": list(pair.exclude)} if pair.exclude else {})
        | ({"expert_tokens": sums.expert_tokens} if sums.expert_tokens else {}),
        shared_rows=pair.shared_rows,
    )
