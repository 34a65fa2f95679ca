"""``reproduce.json``: what a program needs to make a merge again, and to see that it has the same files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit.options import MergeOptions

from mergekit_act.cards.masks import MaskFile
from mergekit_act.files import file_hash
from mergekit_act.versions import installed_versions

__all__ = ["OPTIONS", "describe_reproduction"]

# Options of mergekit-yaml without which the merge fails or gives other weights.
OPTIONS = (
    "random_seed",
    "lora_merge_cache",
    "lora_merge_dtype",
    "trust_remote_code",
    "allow_crimes",
    "unsafe_truncate_embeddings",
)


def describe_reproduction(
    path: Path,
    config: Mapping[str, Any],
    masks: Sequence[MaskFile],
    fits: Mapping[str, tuple[Path, str]],
    options: MergeOptions,
) -> str:
    """JSON: the config with copied files, their SHA-256, the models with the fingerprints they were profiled with.

    Args:
        path: of the file; the versions that it names stay, unless the merge is younger.
        config: of the merge, as ``act.yml`` has it.
        masks: that it names.
        fits: setting -> the file of inputs and its copy.
        options: of the merge; those that count are told, but for where merged adapters are kept.
    """
    models = {}
    for source in (source for mask in masks for source in mask.sources):
        for role in ("target", "ability_model"):
            if isinstance(source.get(role), dict):
                models[source[role]["model"]] = source[role]
    merged_at = (path.parent / "mergekit_config.yml").stat().st_mtime
    is_of_this = path.is_file() and path.stat().st_mtime >= merged_at
    versions = json.loads(path.read_text(encoding="utf-8")).get("versions") if is_of_this else None
    files = {mask.copy: mask.sha256 for mask in masks} | {copy: file_hash(source) for source, copy in fits.values()}
    given = {name: getattr(options, name, None) for name in OPTIONS if name != "lora_merge_cache"}
    content = {
        "format_version": 1,
        "config": config,
        "options": {name: value for name, value in given.items() if value is not None and value is not False},
        "files": dict(sorted(files.items())),
        "models": [models[name] for name in sorted(models)],
        "versions": versions or installed_versions("mergekit", "torch", "transformers", "safetensors"),
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
