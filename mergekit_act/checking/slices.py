"""The output's config where slices leave layers out, repeat or reorder them."""

from __future__ import annotations

from typing import Any

__all__ = ["follow_layers"]


def follow_layers(planner: Any) -> None:
    """Give the output's layers the types of the layers they come from.

    mergekit sets the number of layers alone. A config that lists a type per layer then does not fit, and Transformers
    refuses to save it, after the merge.

    Args:
        planner: a ``MergePlanner`` that has planned; its output config is changed.
    """
    base = planner.config.base_model
    out = planner.out_model_config.get_text_config()
    slices = [part for module in planner.config.modules.values() for part in module.slices]
    if base is None or len(planner.config.modules) != 1:
        return
    layers = [layer for part in slices for layer in range(*part.sources[0].layer_range)]
    source = base.config(planner.options.trust_remote_code).get_text_config()
    for key, kinds in vars(source).items():
        fits = key.endswith("layer_types") and isinstance(kinds, list) and len(kinds) == source.num_hidden_layers
        if fits and layers != list(range(len(kinds))):
            setattr(out, key, [kinds[layer] for layer in layers])
