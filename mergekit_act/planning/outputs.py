"""The output's config, where mergekit's copy of the target's does not say what the output is."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["drop_quantisation", "follow_layers", "name_dtype"]


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


def name_dtype(planner: Any, dtypes: tuple[torch.dtype, torch.dtype] | None) -> None:
    """Let the output's config name the dtype that its tensors have, where the merge config names none.

    mergekit leaves the target's, in which Transformers would then load tensors that were promoted to a wider one.

    Args:
        planner: a ``MergePlanner`` that has planned; its output config is changed.
        dtypes: the target's and the output's, as ``Plan.dtypes`` has them.
    """
    config = planner.config
    if dtypes is not None and config.dtype is None and config.out_dtype is None and dtypes[0] != dtypes[1]:
        planner.out_model_config.dtype = dtypes[1]


def drop_quantisation(planner: Any) -> None:
    """Take a ``quantization_config`` out of the output's config: the target's weights have been found to be plain.

    Transformers would refuse them, or quantise them while it loads them.
    """
    if getattr(planner.out_model_config, "quantization_config", None) is not None:
        del planner.out_model_config.quantization_config
