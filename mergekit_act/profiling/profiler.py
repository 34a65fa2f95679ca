"""Profile a pair: feed both models the same samples and average how far each channel's activations differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from mergekit_act.abilities import AbilitySamples
from mergekit_act.artifacts import Profile
from mergekit_act.checkpoints import load_weights
from mergekit_act.profiling.batches import MicroBatch, cut_batches
from mergekit_act.profiling.experts import ExpertOutput
from mergekit_act.profiling.outputs import KeptOutput, OutputForms, find_output_forms
from mergekit_act.profiling.pair import ModelPair
from mergekit_act.profiling.segments import SegmentedModel
from mergekit_act.profiling.sums import DifferenceSums

__all__ = ["add_differences", "default_device", "default_dtype", "profile_pair", "usable_device"]

# The head is compared in blocks of rows, so that its logits never need more than this on each side.
_HEAD_BYTES = 1 << 28


def default_device() -> str:
    """The accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None else "cpu"


def usable_device(device: str | None) -> str:
    """The device, or the default one for None.

    Raises:
        ValueError: PyTorch can't use it here.
    """
    device = device or default_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f'device "{device}" cannot be used here: {reason}; the default is {default_device()}'
        ) from error
    return device


def default_dtype(device: str) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32: by capability, so runs can be repeated."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if kind == "cpu":
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.float32


def profile_pair(
    pair: ModelPair,
    abilities: Sequence[AbilitySamples],
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    batch_tokens: int = 4096,
    quiet: bool = False,
) -> list[Profile]:
    """The activation profiles of a pair, one per ability; all abilities go through the models in one pass.

    Args:
        pair: the models.
        abilities: their samples.
        device: where the models run; None takes the accelerator if there is one.
        dtype: in which they run; None takes bfloat16 where the device multiplies it natively, else float32.
        batch_tokens: tokens in a micro-batch, padding included.
        quiet: show no progress.

    Raises:
        ValueError: the device can't be used, a token id is not in both vocabularies, a sample is longer than the
            models' position embeddings, a module's output can't be observed, or activations are NaN or infinite.
    """
    device = usable_device(device)
    dtype = dtype or default_dtype(device)
    _check_samples(abilities, pair)
    models = []
    for skeleton, checkpoint in zip(pair.skeletons(), (pair.target, pair.ability_model), strict=True):
        load_weights(skeleton, checkpoint, dtype=dtype, device=device)
        models.append(SegmentedModel(skeleton))
    target, ability_model = models
    modules = pair.layout.modules
    tokens = sum(len(sample.input_ids) for ability in abilities for sample in ability.samples)
    with (
        torch.no_grad(),  # not inference mode, in which tensors don't count their changes
        target.observing(modules),
        ability_model.observing(modules),
        tqdm(total=tokens, unit="tok", unit_scale=True, desc="Profiling", disable=quiet) as progress,
    ):
        forms = find_output_forms(target, pair.layout, pair.vocabulary, device)
        profiles = []
        for ability in abilities:
            sums = DifferenceSums(pair.layout, device)
            for batch in cut_batches(ability.samples, batch_tokens):
                add_differences(target, ability_model, batch.to(device), forms, sums)
                progress.update(batch.tokens)
            profiles.append(_profile(pair, ability, sums, dtype))
    return profiles


def add_differences(
    target: SegmentedModel, ability_model: SegmentedModel, batch: MicroBatch, forms: OutputForms, sums: DifferenceSums
) -> None:
    """Run one micro-batch through both models, segment by segment, and add up the differences."""
    kept: dict[str, list[KeptOutput]] = {}

    def keep(module: str, output: Tensor | ExpertOutput) -> None:
        kept.setdefault(module, []).append(forms.keep(module, output, batch))

    def compare(module: str, output: Tensor | ExpertOutput) -> None:
        rows = kept[module].pop(0).read(module)
        if isinstance(output, ExpertOutput):
            sums.add_experts(module, rows, output.at(batch.answer_places), answers=len(batch.sample_of))
        else:
            sums.add(module, rows, batch.answer_rows(output, forms.token_axes[module]))

    def keep_rows(module: str, output: Tensor) -> None:
        kept.setdefault(module, []).append(KeptOutput([output]))

    def compare_rows(module: str, output: Tensor) -> None:
        sums.add(module, kept[module].pop(0).read(module), [output])

    first = target.embed(batch.input_ids, keep)
    second = ability_model.embed(batch.input_ids, compare)
    for index in range(len(target.layers)):
        target.layer(index, first, keep)
        ability_model.layer(index, second, compare)
    heads = ((target, target.normalise(first, keep)), (ability_model, ability_model.normalise(second, compare)))
    rows, other_rows = (torch.cat(batch.answer_rows(hidden, 1)) for _, hidden in heads)
    block = max(1, _HEAD_BYTES // (target.head.out_features * rows.element_size()))
    for some, others in zip(torch.split(rows, block), torch.split(other_rows, block), strict=True):
        target.run_head(some, keep_rows)
        ability_model.run_head(others, compare_rows)


def _check_samples(abilities: Sequence[AbilitySamples], pair: ModelPair) -> None:
    vocabulary = pair.vocabulary
    for ability in abilities:
        if not ability.answer_tokens:
            raise ValueError(f'ability "{ability.name}" has no answer tokens')
        for place, sample in enumerate(ability.samples):
            if pair.positions is not None and len(sample.input_ids) > pair.positions:
                raise ValueError(
                    f'ability "{ability.name}": sample {place} has {len(sample.input_ids)} tokens; the models have '
                    f"{pair.positions} positions. Set max_length to {pair.positions} or less"
                )
            low, high = int(sample.input_ids.min()), int(sample.input_ids.max())
            if low < 0 or high >= vocabulary:
                raise ValueError(
                    f'ability "{ability.name}": sample {place} has token id {low if low < 0 else high}; '
                    f"both models have the ids 0 to {vocabulary - 1}"
                )


def _profile(pair: ModelPair, ability: AbilitySamples, sums: DifferenceSums, dtype: torch.dtype) -> Profile:
    scores = sums.means()
    spoilt = [module for module, column in scores.items() if not torch.isfinite(column).all()]
    if spoilt:
        raise ValueError(
            f'ability "{ability.name}": activations of {len(spoilt)} modules are NaN or infinite in {dtype} (the first '
            f'is "{spoilt[0]}"); try --dtype float32, and see whether the models\' weights are finite'
        )
    return Profile(
        scores=scores,
        layout=pair.layout,
        criterion="activation",
        ability=ability.name,
        target=pair.target.describe(),
        ability_model=pair.ability_model.describe(),
        samples=len(ability.samples),
        answer_tokens=ability.answer_tokens,
        dtype=str(dtype).removeprefix("torch."),
        data=ability.data | ({"expert_tokens": sums.expert_tokens} if sums.expert_tokens else {}),
        shared_rows=pair.shared_rows,
    )
