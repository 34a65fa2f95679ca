"""What is no mistake of a merge's config but worth knowing before the merge, a sentence each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_act.checking.models import forward_differences
from mergekit_act.checking.outputs import token_count

if TYPE_CHECKING:
    from mergekit_act.checking.plans import PlanCheck

__all__ = ["plan_remarks"]


def plan_remarks(check: PlanCheck) -> list[str]:
    """All remarks on a plan that has been walked."""
    return [
        *_other_pairs(check),
        *_other_forwards(check),
        *_left_to_the_target(check),
        *check.lengths,
        *_trimmed_rows(check),
        *_promotions(check),
    ]


def _trimmed_rows(check: PlanCheck) -> list[str]:
    """Rows of the target that mergekit's tokenizer section cuts: padding that its tokenizer has no tokens for."""
    if not check.has_tokenizer:
        return []
    (base, *_) = check.bases
    tokens = token_count(base, trust_remote_code=check.options.trust_remote_code)
    headers = {tensor.name: next(iter(tensor.headers.values())) for tensor in check.tensors if tensor.by_tokens}
    return [
        f'"{name}" of {base} has {header.shape[0]:,} rows and its tokenizer {tokens:,} tokens: with a "tokenizer:" '
        f"section the output has {tokens} rows. Leave the section out to keep all of them; vocabularies may differ in "
        "length"
        for name, header in headers.items()
        if header is not None and header.shape[0] > tokens
    ]


def _promotions(check: PlanCheck) -> list[str]:
    dtypes = check.dtypes()
    if check.config.dtype or check.config.out_dtype or dtypes is None or dtypes[0] == dtypes[1]:
        return []
    ours, promoted = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    factor = dtypes[1].itemsize // dtypes[0].itemsize
    size = f", {factor} times the target's size" if factor > 1 else ""
    return [
        f"the target is in {ours}, the models together need {promoted}: the output is in {promoted}{size}. Add "
        f'"dtype: {ours}" to keep the target\'s'
    ]


def _left_to_the_target(check: PlanCheck) -> list[str]:
    """Selected modules whose outputs are made without their ability model: in other slices, by other modules."""
    found = []
    for (model, setting, _), files in check.masks.items():
        reached = check.parameters.get(model, set())
        modules = files.channels if files is not None else ()
        idle = [module for module in modules if files is not None and not reached & set(files.names_of(module))]
        if idle:
            found.append(
                f'mask "{setting}" of {model}: nothing of {len(idle)} modules will be moved, such as "{idle[0]}"; '
                "their outputs are made without this model"
            )
    return found


def _other_pairs(check: PlanCheck) -> list[str]:
    found = []
    for (model, setting, _), files in check.masks.items():
        for base in check.bases:
            here = (check.checkpoint_of(base).fingerprint, check.checkpoint_of(model).fingerprint)
            pairs = files.pairs if files is not None and all(here) else ()
            if any(None not in pair and pair != here for pair in pairs):
                found.append(
                    f'mask "{setting}" was made from another pair of models than {base} and {model}; it is used '
                    "as it is"
                )
    return found


def _other_forwards(check: PlanCheck) -> list[str]:
    return [
        f"{base} and {model} differ in {key}: {ours} and {theirs}; the merged model runs with the target's"
        for base in check.bases
        for model in check.models
        for key, ours, theirs in forward_differences(check.config_of(base), check.config_of(model))
    ]
