"""Profile a pair by samples: a pass through the models, sums, scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_act.abilities import AbilitySamples
from mergekit_act.abilities.batches import cut_batches
from mergekit_act.artifacts import Inputs, Profile
from mergekit_act.devices import dtype_name
from mergekit_act.models import check_samples_fit
from mergekit_act.profiling.criteria import ENGINES
from mergekit_act.profiling.inputs import InputSample
from mergekit_act.profiling.pair import ModelPair
from mergekit_act.profiling.passes import Pass
from mergekit_act.profiling.progress import Gathered
from mergekit_act.profiling.settings import ProfilingSettings
from mergekit_act.profiling.sums import ChannelSums
from mergekit_act.runs.processes import Processes
from mergekit_act.runs.state import StateFile
from mergekit_act.wording import enumerate_some

__all__ = ["identity_of", "measure_pair", "profile_pair"]


def profile_pair(
    pair: ModelPair,
    abilities: Sequence[AbilitySamples],
    settings: ProfilingSettings | None = None,
    *,
    state: Path | None = None,
    processes: Processes | None = None,
) -> list[Profile]:
    """The profiles of a pair, one per ability; arguments and errors as of ``measure_pair``."""
    return measure_pair(pair, abilities, settings, state=state, processes=processes)[0]


def measure_pair(
    pair: ModelPair,
    abilities: Sequence[AbilitySamples],
    settings: ProfilingSettings | None = None,
    *,
    roles: Mapping[str, str] | None = None,
    state: Path | None = None,
    processes: Processes | None = None,
) -> tuple[list[Profile], Inputs | None]:
    """The profiles of a pair, one per ability, and a sample of inputs; all abilities go through the models in one pass.

    Args:
        pair: the models.
        abilities: their samples.
        settings: how, and by which criterion.
        roles: ability -> ``recover`` or ``keep``, to sample inputs of the target's modules; None samples none.
        state: file in which an unfinished run is kept, and from which it goes on; None keeps nothing.
        processes: those that share the samples; None for this one alone.

    Raises:
        ValueError: the device can't be used, samples do not fit a model's vocabulary or length, a module's output can't
            be observed, activations or gradients are NaN or infinite, or the memory does not hold a layer of both
            models and one micro-batch.
    """
    processes = processes or Processes()
    settings = (settings or ProfilingSettings()).resolved(processes)
    for ability in abilities:
        if not ability.answer_tokens:
            raise ValueError(f'ability "{ability.name}" has no answer tokens')
        for checkpoint in (pair.target, pair.ability_model):
            check_samples_fit(checkpoint, ability)
    engine = ENGINES[settings.criterion]
    for ability in abilities:
        if engine.scores_loss and not any(sample.is_answer[1:].any() for sample in ability.samples):
            raise ValueError(f'ability "{ability.name}" has no answer token behind another token, and so no loss')
    every = [(n, batch) for n, a in enumerate(abilities) for batch in cut_batches(a.samples, settings.batch_tokens)]
    batches = every[processes.rank :: processes.count]
    scratch: Tensor | None = None
    every_sums: list[ChannelSums] = []
    for _ in abilities:
        every_sums.append(ChannelSums(pair.layout, settings.place, scratch, engine.kinds))
        scratch = every_sums[0].scratch
    inputs = None if roles is None else InputSample(pair, abilities, roles, every)
    places = [] if inputs is None else inputs.places[processes.rank :: processes.count]
    saved = None if state is None else StateFile(state, identity_of(pair, abilities, settings, roles, processes))
    names = [ability.name for ability in abilities]
    own = replace(settings, quiet=settings.quiet or processes.rank > 0)
    gathered = Gathered(every_sums, inputs)
    Pass(engine, pair, own, batches, places, names, processes.local_count).run(gathered, saved)
    for sums in every_sums:
        sums.add_up(processes)
    profiles = [_profile(pair, ability, sums, settings) for ability, sums in zip(abilities, every_sums, strict=True)]
    return profiles, None if inputs is None else inputs.finished(processes)


def _seen_once(sums: ChannelSums, settings: ProfilingSettings) -> dict[str, list[int]]:
    """Module of experts -> answer tokens of each, which pass once for every point."""
    return {module: [count // settings.points for count in counts] for module, counts in sums.expert_tokens.items()}


def identity_of(
    pair: ModelPair,
    abilities: Sequence[AbilitySamples],
    settings: ProfilingSettings,
    roles: Mapping[str, str] | None,
    processes: Processes,
) -> dict[str, Any]:
    """All that a run's results depend on: one that is continued must have the same."""
    return settings.identity(pair, abilities, processes) | ({} if roles is None else {"inputs": dict(roles)})


def _profile(pair: ModelPair, ability: AbilitySamples, sums: ChannelSums, settings: ProfilingSettings) -> Profile:
    unscored = [module for module, count in sums.counts.items() if not count]
    if unscored:
        raise ValueError(
            f'ability "{ability.name}": {len(unscored)} modules with channels were not scored: '
            f"{enumerate_some(unscored)}"
        )
    return Profile(
        scores=sums.means(),
        layout=pair.layout,
        damage=sums.means(1) if len(sums.vector) > 1 else {},
        criterion=settings.criterion,
        ability=ability.name,
        target=pair.target.describe(),
        ability_model=pair.ability_model.describe(),
        samples=len(ability.samples),
        answer_tokens=ability.answer_tokens,
        dtype=dtype_name(settings.torch_dtype),
        data=ability.data
        | {"batch_tokens": settings.batch_tokens}
        | settings.of_criterion()
        | ({"exclude": list(pair.exclude)} if pair.exclude else {})
        | ({"expert_tokens": _seen_once(sums, settings)} if sums.expert_tokens else {}),
        shared_rows=pair.shared_rows,
    )
