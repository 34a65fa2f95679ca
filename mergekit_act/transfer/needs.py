"""What a transfer takes: disk, memory, and what is fetched first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergekit.options import MergeOptions

from mergekit_act.abilities import AbilitiesFile
from mergekit_act.checkpoints import parse_reference
from mergekit_act.planning import only_headers
from mergekit_act.planning.models import open_loaded

__all__ = ["Needs", "estimate_needs"]


@dataclass(frozen=True)
class Needs:
    """Bytes.

    Attributes:
        disk: for what is written.
        model: of the target's weights, which a sweep and an evaluation hold in memory.
        remarks: what is fetched first, a sentence each.
    """

    disk: int
    model: int
    remarks: Sequence[str]


def estimate_needs(file: AbilitiesFile, *, finetune: bool, lora_merge_cache: str | None, trust: bool) -> Needs:
    """Look at the headers of both models' files.

    Raises:
        FileNotFoundError: a model has no weights, or the Hub is out of reach.
    """
    target, ability_model = (parse_reference(model) for model in (file.target, file.ability_model))
    options = MergeOptions(lora_merge_cache=lora_merge_cache, trust_remote_code=trust)
    with only_headers({target, ability_model}, options) as remarks:
        size = sum(header.size for header in open_loaded(target, trust_remote_code=trust).headers.values())
    # A training keeps a checkpoint with Adam's means besides the model it writes.
    return Needs(disk=size * (6 if finetune else 1), model=size, remarks=remarks)
