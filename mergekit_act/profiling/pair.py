"""A target model and an ability model that fit together: same modules, known vocabularies, tied heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mergekit_act.channels import Layout, build_skeleton, layout_of_model
from mergekit_act.checkpoints import Checkpoint, open_checkpoint
from mergekit_act.selection import excluded_modules
from mergekit_act.wording import enumerate_some

__all__ = ["ModelPair", "open_pair"]


@dataclass(frozen=True)
class ModelPair:
    """Two checkpoints of one architecture.

    Attributes:
        target: the model to improve.
        ability_model: the model that is good at the abilities.
        layout: the target's channels.
        ability_layout: the ability model's; it may tie its head where the target does not.
        vocabulary: length of the vocabulary (embedding rows) that both have.
        exclude: globs of the modules that were left out of the layout.
        shared_rows: head module -> number of its leading channels that both have, where the ability model's is shorter.
    """

    target: Checkpoint
    ability_model: Checkpoint
    layout: Layout
    ability_layout: Layout
    vocabulary: int
    shared_rows: dict[str, int]
    trust_remote_code: bool = False
    exclude: tuple[str, ...] = ()

    def skeletons(self) -> tuple[nn.Module, nn.Module]:
        """Both models without weights, each under its own config."""
        target, ability_model = (
            build_skeleton(checkpoint.config, trust_remote_code=self.trust_remote_code)
            for checkpoint in (self.target, self.ability_model)
        )
        return target, ability_model


def open_pair(
    target: str,
    ability_model: str,
    *,
    exclude: Sequence[str] = (),
    lora_merge_cache: str | None = None,
    trust_remote_code: bool = False,
) -> ModelPair:
    """Open both model references and see that they can be profiled together, before any weight is read.

    Args:
        target: a model reference as mergekit takes it.
        ability_model: likewise.
        exclude: globs of modules that get no scores, such as a vision tower that text does not reach.
        lora_merge_cache: folder for merged models, for references of the form ``model+lora``.
        trust_remote_code: allow the models' own code from the Hub.

    Raises:
        FileNotFoundError: a model folder, its config or its weights are missing.
        ValueError: a glob matches no module, the models differ in their modules, the target ties its head and the
            ability model does not, or a model is quantised.
    """
    first, second = (
        open_checkpoint(reference, lora_merge_cache=lora_merge_cache, trust_remote_code=trust_remote_code)
        for reference in (target, ability_model)
    )
    models = [build_skeleton(checkpoint.config, trust_remote_code=trust_remote_code) for checkpoint in (first, second)]
    layouts = [layout_of_model(model) for model in models]
    heads = [_vocabulary_parameters(model) for model in models]
    differences = layouts[0].differences(layouts[1], ignore_vocabulary=heads[0])
    if differences:
        shown = enumerate_some(differences, "; ")
        raise ValueError(
            f"{target} ({first.config.model_type}) and {ability_model} ({second.config.model_type}) differ in their "
            f"modules; ACT needs two models of one backbone: {shown}"
        )
    if layouts[0].tied and not layouts[1].tied:
        raise ValueError(
            f"{target} ties its head to its embedding ({' = '.join(layouts[0].tied[0])}) and {ability_model} does not; "
            "there is no one matrix to transfer to. Untie the target first"
        )
    rows = [model.get_input_embeddings().weight.shape[0] for model in models]
    head = next((name for name, module in models[0].named_modules() if module is models[0].get_output_embeddings()), "")
    head_rows = [int(model.get_output_embeddings().weight.shape[0]) for model in models] if head else [0, 0]
    shared = {head: head_rows[1]} if head_rows[1] < head_rows[0] else {}
    left_out = excluded_modules(layouts[0], exclude)
    layout, ability_layout = (layout.without(left_out) for layout in layouts)
    shared = {module: rows for module, rows in shared.items() if module not in left_out}
    return ModelPair(first, second, layout, ability_layout, min(rows), shared, trust_remote_code, tuple(exclude))


def _vocabulary_parameters(model: Any) -> list[str]:
    """Names of the parameters whose first dimension is token ids."""
    owners = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    return [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if any(module is owner for owner in owners)
        for parameter, _ in module.named_parameters(recurse=False)
    ]
