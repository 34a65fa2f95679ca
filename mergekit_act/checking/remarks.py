"""What is no mistake of a merge but worth knowing before it, a sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import AutoTokenizer

from mergekit_act.checking.forwards import forward_differences
from mergekit_act.planning import Plan, PlannedTensor
from mergekit_act.wording import one_line

__all__ = ["plan_remarks"]


def plan_remarks(plan: Plan) -> list[str]:
    """All remarks on a plan."""
    lengths = [remark for tensor in plan.tensors for remark in _lengths(tensor, plan)]
    return [
        *_other_pairs(plan),
        *_other_forwards(plan),
        *_left_to_the_target(plan),
        *lengths,
        *_trimmed_rows(plan),
        *_promotions(plan),
    ]


def _lengths(tensor: PlannedTensor, plan: Plan) -> Iterator[str]:
    """What happens to the rows that not all models have."""
    if not tensor.by_tokens or plan.has_tokenizer:
        return
    axis = tensor.weight.vocabulary_axis
    found = ((model, tensor.headers[model]) for model in tensor.sources)
    rows = {model: header.shape[axis] for model, header in found if header is not None and header.shape}
    if len(set(rows.values())) < 2:
        return
    shown = ", ".join(f"{model} has {count:,}" for model, count in rows.items())
    end = "rows behind the shorter one stay the target's"
    if plan.options.unsafe_truncate_embeddings:
        end = f"--unsafe-truncate-embeddings cuts the output to {min(rows.values()):,}; without it the target's stay"
    yield f'"{tensor.name}": {shown} rows of token ids; {end}'


def _trimmed_rows(plan: Plan) -> Iterator[str]:
    """Rows of the target that mergekit's tokenizer section cuts: padding that its tokenizer has no tokens for."""
    if not plan.has_tokenizer:
        return
    tokens = _token_count(plan.target, trust_remote_code=plan.options.trust_remote_code)
    for tensor in plan.tensors:
        header = tensor.headers[plan.target]
        if tensor.by_tokens and header is not None and header.shape[0] > tokens:
            yield (
                f'"{tensor.name}" of {plan.target} has {header.shape[0]:,} rows and its tokenizer {tokens:,} tokens: '
                f'with a "tokenizer:" section the output has {tokens} rows. Leave the section out to keep all of them; '
                "vocabularies may differ in length"
            )


def _token_count(model: Any, *, trust_remote_code: bool) -> int:
    """How many tokens a model's tokenizer has, added ones included: to so many rows mergekit cuts its vocabulary.

    Raises:
        ValueError: the model has no tokenizer that can be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.model.path, revision=model.model.revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # Transformers and tokenizers raise many kinds
        reason = one_line(error, 300)
        raise ValueError(f"the tokenizer of {model} cannot be loaded: {reason}") from error
    return len(tokenizer.get_vocab())


def _promotions(plan: Plan) -> Iterator[str]:
    dtypes = plan.dtypes()
    if plan.config.dtype or plan.config.out_dtype or dtypes is None or dtypes[0] == dtypes[1]:
        return
    ours, promoted = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    factor = dtypes[1].itemsize // dtypes[0].itemsize
    size = f", {factor} times the target's size" if factor > 1 else ""
    yield (
        f"the target is in {ours}, the models together need {promoted}: the output is in {promoted}{size}. Add "
        f'"dtype: {ours}" to keep the target\'s'
    )


def _left_to_the_target(plan: Plan) -> Iterator[str]:
    """Selected modules whose outputs are made without their ability model: in other slices, by other modules."""
    for setting, files in plan.masks.items():
        reached = plan.names_of(setting.model)
        idle = [module for module in files.channels if not reached & set(files.names_of(module))]
        if idle:
            yield (
                f'mask "{setting.mask}" of {setting.model}: nothing of {len(idle)} modules will be moved, such as '
                f'"{idle[0]}"; their outputs are made without this model'
            )


def _other_pairs(plan: Plan) -> Iterator[str]:
    for setting, files in plan.masks.items():
        here = (plan.checkpoints[plan.target].fingerprint, plan.checkpoints[setting.model].fingerprint)
        if all(here) and any(None not in pair and pair != here for pair in files.pairs):
            yield (
                f'mask "{setting.mask}" was made from another pair of models than {plan.target} and {setting.model}; '
                "it is used as it is"
            )


def _other_forwards(plan: Plan) -> Iterator[str]:
    ours = plan.checkpoints[plan.target].config
    for model in plan.models:
        for key, mine, other in forward_differences(ours, plan.checkpoints[model].config):
            yield (
                f"{plan.target} and {model} differ in {key}: {mine} and {other}; the merged model runs with the "
                "target's"
            )
