"""From an abilities file to profiles on disk: what the command ``profile`` does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from mergekit_act.abilities import AbilitiesFile, Tokenizers, collect_samples
from mergekit_act.artifacts import Profile, save_profile
from mergekit_act.devices import default_dtype, usable_device
from mergekit_act.files import check_free, check_writable, remove_leftovers
from mergekit_act.profiling.activation import profile_pair, run_settings
from mergekit_act.profiling.controls import profile_without_data
from mergekit_act.profiling.pair import open_pair
from mergekit_act.profiling.state import check_settings, is_complete
from mergekit_act.runs.folders import claimed
from mergekit_act.runs.processes import Processes, join_processes

__all__ = ["write_profiles"]

_STATE = "profile.state"


def write_profiles(
    file: AbilitiesFile,
    out_dir: Path,
    *,
    criterion: str = "activation",
    device: str | None = None,
    dtype: str | None = None,
    batch_tokens: int = 4096,
    memory_budget: int | None = None,
    save_every: float = 60.0,
    random_seed: int = 0,
    exclude: Sequence[str] = (),
    lora_merge_cache: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[Path, Profile]:
    """Profile the file's pair; write a profile per ability, or one for a criterion without data.

    An activation run keeps its state beside the profiles, ``profile.state``, until they are written; the same call
    goes on from there. Processes that ``torchrun`` or ``accelerate launch`` started share the samples; the first one
    writes.

    Args:
        file: the abilities file.
        out_dir: where ``<ability>.safetensors`` are written.
        criterion: what scores are: ``activation`` differences, ``weight`` change, or ``random``.
        device: as for ``profile_pair``.
        dtype: name of the dtype in which the models run.
        batch_tokens: as for ``profile_pair``.
        memory_budget: as for ``profile_pair``.
        save_every: as for ``profile_pair``.
        random_seed: for the criterion ``random``.
        exclude: as for ``open_pair``.
        lora_merge_cache: folder for merged models, for references of the form ``model+lora``.
        trust_remote_code: allow the models' own code from the Hub.
        overwrite: replace profiles that exist, and the state of a run with other settings.
        quiet: show no progress.

    Returns:
        The files written, and what is in them; empty in all processes but the first.

    Raises:
        FileExistsError: a profile exists and ``overwrite`` is false; told before anything is loaded.
        BlockingIOError: another run is at work in the folder.
        FileNotFoundError: a model or data set does not exist.
        ValueError: as ``open_pair``, ``collect_samples`` and ``profile_pair``; or there is the state of an unfinished
            run with other settings.
    """
    names = list(file.abilities) if criterion == "activation" else [criterion]
    paths = [out_dir / f"{name}.safetensors" for name in names]
    with join_processes() as processes:
        check_writable(out_dir)
        # A run that was ended while it wrote its profiles has some of them, and its state.
        if processes.rank == 0 and not any(is_complete(state) for state in _states(out_dir)):
            check_free(paths, overwrite=overwrite)
        device = usable_device(device, processes.local_rank if processes.count > 1 else None)
        if processes.rank > 0:
            processes.wait()  # the first one fetches the models from the Hub and merges a LoRA
        pair = open_pair(
            file.target,
            file.ability_model,
            exclude=exclude,
            lora_merge_cache=lora_merge_cache,
            trust_remote_code=trust_remote_code,
        )
        if processes.rank == 0:
            processes.wait()
        abilities = []
        if criterion == "activation":  # first, so that what is wrong with the data is told, whatever the models are
            tokenizers = Tokenizers(file.target, file.ability_model, trust_remote_code)
            abilities = [collect_samples(file, name, tokenizers) for name in file.abilities]
        if pair.target.fingerprint == pair.ability_model.fingerprint:
            raise ValueError(f"{file.target} and {file.ability_model} are the same model; there is nothing to transfer")
        if criterion != "activation":
            if processes.rank > 0:
                return {}
            made = profile_without_data(pair, criterion, random_seed=random_seed)
            save_profile(made, paths[0], overwrite=overwrite)
            return {paths[0]: made}
        with claimed(out_dir / _STATE) if processes.rank == 0 else nullcontext():
            chosen = default_dtype(device) if dtype is None else getattr(torch, dtype)
            state = _own_state(out_dir, processes)
            if processes.rank == 0:
                settings = run_settings(pair, abilities, device, chosen, batch_tokens, processes)
                for found in _states(out_dir):
                    check_settings(found, settings, overwrite=overwrite)
            processes.wait()
            profiles = profile_pair(
                pair,
                abilities,
                device=device,
                dtype=chosen,
                batch_tokens=batch_tokens,
                memory_budget=memory_budget,
                state=state,
                save_every=save_every,
                processes=processes,
                quiet=quiet,
            )
            if processes.rank == 0:
                for profile, path in zip(profiles, paths, strict=True):
                    remove_leftovers(path)
                    save_profile(profile, path, overwrite=True)
            processes.wait()  # a state may go when the profiles are there
            state.unlink(missing_ok=True)
            return dict(zip(paths, profiles, strict=True)) if processes.rank == 0 else {}


def _own_state(out_dir: Path, processes: Processes) -> Path:
    """Where this process keeps its state."""
    part = f"profile-{processes.rank}-of-{processes.count}.state"
    return out_dir / (part if processes.count > 1 else _STATE)


def _states(out_dir: Path) -> list[Path]:
    """The states of unfinished runs: one file, or one per process."""
    return sorted((*out_dir.glob(_STATE), *out_dir.glob("profile-*-of-*.state")))
