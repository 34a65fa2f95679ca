"""Profile a pair: feed both models the same samples and average how far each channel's activations differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from mergekit_act.abilities import AbilitySamples
from mergekit_act.artifacts import Profile
from mergekit_act.channels import Layout
from mergekit_act.checkpoints import load_weights
from mergekit_act.profiling.batches import MicroBatch, cut_batches
from mergekit_act.profiling.pair import ModelPair
from mergekit_act.profiling.segments import SegmentedModel

__all__ = ["default_device", "default_dtype", "profile_pair", "usable_device"]

# The head is compared in blocks of rows, so that its logits never need more than this on each side.
_HEAD_BYTES = 1 << 28

TokenAxes = dict[str, int | None]


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
        torch.inference_mode(),
        target.observing(modules),
        ability_model.observing(modules),
        tqdm(total=tokens, unit="tok", unit_scale=True, desc="Profiling", disable=quiet) as progress,
    ):
        axes = _find_token_axes(target, pair, device)
        profiles = []
        for ability in abilities:
            sums = DifferenceSums(pair.layout, device)
            for batch in cut_batches(ability.samples, batch_tokens):
                _add_differences(target, ability_model, batch.to(device), axes, sums)
                progress.update(batch.tokens)
            profiles.append(_profile(pair, ability, sums, dtype))
    return profiles


class DifferenceSums:
    """Sums of absolute activation differences per channel, and how many were added: kept apart, wide."""

    def __init__(self, layout: Layout, device: str) -> None:
        sizes = [layout.channel_count([module]) for module in layout.modules]
        self.vector = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self.sums = dict(zip(layout.modules, torch.split(self.vector, sizes), strict=True))
        self.counts = dict.fromkeys(layout.modules, 0)

    def add(self, module: str, target: Tensor, ability_model: Tensor) -> None:
        """Add abs(ability_model − target), rows ``[rows, channels]``; of two vocabularies the part both have.

        The ability model's rows are overwritten if they are float32.
        """
        channels = min(target.shape[-1], ability_model.shape[-1])
        difference = ability_model[:, :channels].float().sub_(target[:, :channels]).abs_()
        self.sums[module][:channels] += difference.sum(0)
        self.counts[module] += len(difference)

    def means(self) -> dict[str, Tensor]:
        """module -> float32 ``[channels]``, on the CPU."""
        return {m: (total / self.counts[m]).float().cpu() for m, total in self.sums.items()}


def _add_differences(
    target: SegmentedModel, ability_model: SegmentedModel, batch: MicroBatch, axes: TokenAxes, sums: DifferenceSums
) -> None:
    """Run one micro-batch through both models, segment by segment, and add up the differences."""
    kept: dict[str, list[Tensor]] = {}

    def keep(module: str, output: Tensor) -> None:
        kept.setdefault(module, []).append(batch.answer_rows(output, axes[module]))

    def compare(module: str, output: Tensor) -> None:
        sums.add(module, kept[module].pop(0), batch.answer_rows(output, axes[module]))

    first = target.embed(batch.input_ids, keep)
    second = ability_model.embed(batch.input_ids, compare)
    for index in range(len(target.layers)):
        target.layer(index, first, keep)
        ability_model.layer(index, second, compare)
    rows = batch.answer_rows(target.normalise(first, keep), 1)
    other_rows = batch.answer_rows(ability_model.normalise(second, compare), 1)
    block = max(1, _HEAD_BYTES // (target.head.out_features * rows.element_size()))
    for some, others in zip(torch.split(rows, block), torch.split(other_rows, block), strict=True):
        target.run_head(some, lambda module, output: kept.setdefault(module, []).append(output))
        ability_model.run_head(others, lambda module, output: sums.add(module, kept[module].pop(0), output))


def _find_token_axes(model: SegmentedModel, pair: ModelPair, device: str) -> TokenAxes:
    """Which dimension of each module's output are token positions, from one small batch of an unmistakable shape.

    Raises:
        ValueError: a module with channels put nothing out, or its positions can't be told from its other dimensions.
    """
    unclear: dict[str, tuple[int, ...]] = {}
    for length in (7, 11, 13, 17):
        batch = 3
        shapes: dict[str, tuple[int, ...]] = {}

        def note(module: str, output: Tensor, shapes: dict[str, tuple[int, ...]] = shapes) -> None:
            if not isinstance(output, Tensor):
                raise ValueError(f'module "{module}" puts out a {type(output).__name__}, expected one tensor')
            shapes[module] = tuple(output.shape)

        ids = torch.arange(batch * length, device=device).reshape(batch, length) % pair.vocabulary
        carried = model.embed(ids, note)
        for index in range(len(model.layers)):
            model.layer(index, carried, note)
        model.run_head(model.normalise(carried, note), note)
        unseen = [module for module in pair.layout.modules if module not in shapes]
        if unseen:
            raise ValueError(
                f"{model.name}: {len(unseen)} modules with channels put nothing out that can be observed: "
                f"{', '.join(unseen[:10])}"
            )
        axes: TokenAxes = {}
        unclear = {}
        for module, shape in shapes.items():
            candidates = [axis for axis, size in enumerate(shape[:-1]) if size == length]
            if len(candidates) == 1 and shape[-1] == pair.layout.channel_shape(module)[0]:
                axes[module] = candidates[0]
            elif shape[0] == batch * length:
                axes[module] = None
            else:
                unclear[module] = shape
        if not unclear:
            return axes
    named = ", ".join(f'"{module}" {list(shape)}' for module, shape in list(unclear.items())[:10])
    raise ValueError(f"{model.name}: the token positions in these outputs cannot be told: {named}")


def _check_samples(abilities: Sequence[AbilitySamples], pair: ModelPair) -> None:
    vocabulary = pair.vocabulary
    for ability in abilities:
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
        data=ability.data,
        shared_rows=pair.shared_rows,
    )
