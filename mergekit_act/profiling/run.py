"""From an abilities file to profiles on disk: what the command ``profile`` does."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from mergekit_act.abilities import AbilitiesFile, AbilitySamples, Tokenizers, collect_samples
from mergekit_act.artifacts import Profile, save_inputs, save_profile
from mergekit_act.files import check_free, check_writable, remove_leftovers
from mergekit_act.profiling.criteria import ENGINES, profile_without_data
from mergekit_act.profiling.pair import ModelPair, open_pair
from mergekit_act.profiling.scoring import identity_of, measure_pair
from mergekit_act.profiling.settings import ProfilingSettings
from mergekit_act.runs.folders import claimed
from mergekit_act.runs.processes import Processes, join_processes
from mergekit_act.runs.state import check_settings, is_complete

__all__ = ["WrittenProfiles", "write_profiles"]

LOG = logging.getLogger(__name__)

_STATE = "profile.state"
_INPUTS = "fit/inputs.safetensors"  # apart from profiles, whose names a glob lists


@dataclass(frozen=True)
class WrittenProfiles:
    """What ``write_profiles`` made.

    Attributes:
        profiles: path -> what is in it; empty in all processes but the first.
        inputs: the file of inputs, if one was written.
    """

    profiles: Mapping[Path, Profile]
    inputs: Path | None = None


def write_profiles(
    file: AbilitiesFile, out_dir: Path, settings: ProfilingSettings | None = None, *, overwrite: bool = False
) -> WrittenProfiles:
    """Profile the file's pair; write a profile per ability, or one for a criterion without data.

    A run over samples keeps its state beside the profiles, ``profile.state``, until they are written; the same call
    goes on from there. Processes that ``torchrun`` or ``accelerate launch`` started share the samples; the first one
    writes.

    Args:
        file: the abilities file.
        out_dir: where ``<ability>.safetensors`` are written.
        settings: how.
        overwrite: replace profiles that exist, and the state of a run with other settings.

    Raises:
        FileExistsError: a profile exists and ``overwrite`` is false; told before anything is loaded.
        BlockingIOError: another run is at work in the folder.
        FileNotFoundError: a model or data set does not exist.
        ValueError: as ``open_pair``, ``collect_samples`` and ``profile_pair``; or there is the state of an unfinished
            run with other settings.
    """
    settings = settings or ProfilingSettings()
    by_data = settings.criterion in ENGINES
    paths = [out_dir / f"{name}.safetensors" for name in (file.abilities if by_data else [settings.criterion])]
    inputs = out_dir / _INPUTS if settings.inputs else None
    roles = {name: ability.role for name, ability in file.abilities.items()}
    if inputs is not None and "recover" not in roles.values():
        raise ValueError('inputs are of abilities to recover, and none of the file has "role: recover"')
    if inputs is not None and "keep" not in roles.values():
        LOG.warning('no ability has "role: keep": merges with these inputs need fit_keep: 0')
    with join_processes() as processes:
        check_writable(out_dir)
        # A run that was ended while it wrote its profiles has some of them, and its state.
        if processes.rank == 0 and not any(is_complete(state) for state in _states(out_dir)):
            check_free([*paths, *([inputs] if inputs else [])], overwrite=overwrite)
        settings = settings.resolved(processes)
        with _one_after_the_other(processes):  # the first one fetches the models from the Hub and merges a LoRA
            pair = open_pair(
                file.target,
                file.ability_model,
                exclude=settings.exclude,
                lora_merge_cache=settings.lora_merge_cache,
                trust_remote_code=settings.trust_remote_code,
            )
        abilities = []
        if by_data:  # first, so that what is wrong with the data is told, whatever the models are
            tokenizers = Tokenizers(file.target, file.ability_model, settings.trust_remote_code)
            abilities = [collect_samples(file, name, tokenizers) for name in file.abilities]
        if pair.target.fingerprint == pair.ability_model.fingerprint:
            raise ValueError(f"{file.target} and {file.ability_model} are the same model; there is nothing to transfer")
        if by_data:
            own_roles = roles if inputs else None
            profiles = _profile_by_data(pair, abilities, own_roles, settings, processes, paths, overwrite=overwrite)
        elif processes.rank == 0:
            profiles = [profile_without_data(pair, settings.criterion, random_seed=settings.random_seed)]
            save_profile(profiles[0], paths[0], overwrite=overwrite)
        return WrittenProfiles(dict(zip(paths, profiles, strict=True)) if processes.rank == 0 else {}, inputs)


def _profile_by_data(
    pair: ModelPair,
    abilities: Sequence[AbilitySamples],
    roles: Mapping[str, str] | None,
    settings: ProfilingSettings,
    processes: Processes,
    paths: Sequence[Path],
    *,
    overwrite: bool,
) -> list[Profile]:
    """Profile and write, in a folder that is claimed until the state of the run is no longer needed."""
    out_dir = paths[0].parent
    with claimed(out_dir / _STATE) if processes.rank == 0 else nullcontext():
        state = _own_state(out_dir, processes)
        if processes.rank == 0:
            if not any(is_complete(found) for found in _states(out_dir)):
                outputs = [*paths, *([out_dir / _INPUTS] if roles else [])]
                check_free(outputs, overwrite=overwrite)  # again: another run may have ended since
            for found in _states(out_dir):
                check_settings(found, identity_of(pair, abilities, settings, roles, processes), overwrite=overwrite)
        processes.wait()
        profiles, inputs = measure_pair(pair, abilities, settings, roles=roles, state=state, processes=processes)
        if processes.rank == 0:
            if inputs is not None:
                (out_dir / _INPUTS).parent.mkdir(exist_ok=True)
                remove_leftovers(out_dir / _INPUTS)
                save_inputs(inputs, out_dir / _INPUTS, overwrite=True)
            for profile, path in zip(profiles, paths, strict=True):
                remove_leftovers(path)
                save_profile(profile, path, overwrite=True)
        processes.wait()  # a state may go when the profiles are there
        state.unlink(missing_ok=True)
        return profiles


@contextmanager
def _one_after_the_other(processes: Processes) -> Iterator[None]:
    """The first process is through before the others begin."""
    if processes.rank > 0:
        processes.wait()
    yield
    if processes.rank == 0:
        processes.wait()


def _own_state(out_dir: Path, processes: Processes) -> Path:
    """Where this process keeps its state."""
    part = f"profile-{processes.rank}-of-{processes.count}.state"
    return out_dir / (part if processes.count > 1 else _STATE)


def _states(out_dir: Path) -> list[Path]:
    """The states of unfinished runs: one file, or one per process."""
    return sorted((*out_dir.glob(_STATE), *out_dir.glob("profile-*-of-*.state")))
