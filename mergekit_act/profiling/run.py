"""From an abilities file to profiles on disk: what the command ``profile`` does."""

from __future__ import annotations

from pathlib import Path

import torch

from mergekit_act.abilities import AbilitiesFile, Tokenizers, collect_samples
from mergekit_act.artifacts import Profile, save_profile
from mergekit_act.files import check_free
from mergekit_act.profiling.controls import profile_without_data
from mergekit_act.profiling.pair import open_pair
from mergekit_act.profiling.profiler import profile_pair, usable_device

__all__ = ["write_profiles"]


def write_profiles(
    file: AbilitiesFile,
    out_dir: Path,
    *,
    criterion: str = "activation",
    device: str | None = None,
    dtype: str | None = None,
    batch_tokens: int = 4096,
    random_seed: int = 0,
    lora_merge_cache: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[Path, Profile]:
    """Profile the file's pair and write one profile per ability, or one for a criterion without data.

    Args:
        file: the abilities file.
        out_dir: where ``<ability>.safetensors`` are written.
        criterion: what scores are: ``activation`` differences, ``weight`` change, or ``random``.
        device: as for ``profile_pair``.
        dtype: name of the dtype in which the models run.
        batch_tokens: as for ``profile_pair``.
        random_seed: for the criterion ``random``.
        lora_merge_cache: folder for merged models, for references of the form ``model+lora``.
        trust_remote_code: allow the models' own code from the Hub.
        overwrite: replace profiles that exist.
        quiet: show no progress.

    Returns:
        The files written, and what is in them.

    Raises:
        FileExistsError: a profile exists and ``overwrite`` is false; told before anything is loaded.
        FileNotFoundError: a model or data set does not exist.
        ValueError: as ``open_pair``, ``collect_samples`` and ``profile_pair``.
    """
    names = list(file.abilities) if criterion == "activation" else [criterion]
    paths = [out_dir / f"{name}.safetensors" for name in names]
    check_free(paths, overwrite=overwrite)
    device = usable_device(device)
    pair = open_pair(
        file.target, file.ability_model, lora_merge_cache=lora_merge_cache, trust_remote_code=trust_remote_code
    )
    if pair.target.fingerprint == pair.ability_model.fingerprint:
        raise ValueError(f"{file.target} and {file.ability_model} are the same model; there is nothing to transfer")
    if criterion == "activation":
        tokenizers = Tokenizers(file.target, file.ability_model, trust_remote_code)
        abilities = [collect_samples(file, name, tokenizers) for name in file.abilities]
        chosen = None if dtype is None else getattr(torch, dtype)
        profiles = profile_pair(pair, abilities, device=device, dtype=chosen, batch_tokens=batch_tokens, quiet=quiet)
    else:
        profiles = [profile_without_data(pair, criterion, random_seed=random_seed)]
    for profile, path in zip(profiles, paths, strict=True):
        save_profile(profile, path, overwrite=overwrite)
    return dict(zip(paths, profiles, strict=True))
