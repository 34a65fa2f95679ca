"""Profile a pair: feed both models the same samples and average how far each channel's activations differ."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mergekit_act import __version__
from mergekit_act.abilities import AbilitySamples
from mergekit_act.artifacts import Profile
from mergekit_act.profiling.batches import MicroBatch, cut_batches
from mergekit_act.profiling.chunks import ChunkCutter
from mergekit_act.profiling.devices import default_dtype, usable_device
from mergekit_act.profiling.differences import Engine, Work, activation_bytes
from mergekit_act.profiling.hidden import HiddenStates, Place
from mergekit_act.profiling.memory import MemoryPlan, free_memory, plan_memory, show_bytes
from mergekit_act.profiling.pair import ModelPair
from mergekit_act.profiling.processes import Processes
from mergekit_act.profiling.segments import SegmentedModel
from mergekit_act.profiling.state import RunState
from mergekit_act.profiling.sums import DifferenceSums, scratch_bytes
from mergekit_act.profiling.weights import ModelWeights, PairWeights

__all__ = ["profile_pair", "run_settings"]

LOG = logging.getLogger(__name__)

# Where nothing is loaded between micro-batches, each is a chunk.
_WHOLE: tuple[int, Place] = (1, "device")


def profile_pair(
    pair: ModelPair,
    abilities: Sequence[AbilitySamples],
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    batch_tokens: int = 4096,
    memory_budget: int | None = None,
    state: Path | None = None,
    save_every: float = 60.0,
    processes: Processes | None = None,
    quiet: bool = False,
) -> list[Profile]:
    """The activation profiles of a pair, one per ability; all abilities go through the models in one pass.

    Args:
        pair: the models.
        abilities: their samples.
        device: where the models run; None takes the accelerator if there is one.
        dtype: in which they run; None takes bfloat16 where the device multiplies it natively, else float32.
        batch_tokens: tokens in a micro-batch, padding included.
        memory_budget: bytes of the device's memory to use; None takes what is free, with a margin. What of the models
            does not fit is loaded once per chunk of micro-batches. The profiles do not depend on it.
        state: file in which an unfinished run is kept, and from which it goes on; None keeps nothing.
        save_every: seconds after which the state is saved, at the end of a chunk.
        processes: those that share the samples; None for this one alone.
        quiet: show no progress.

    Raises:
        ValueError: the device can't be used, a token id is not in both vocabularies, a sample is longer than the
            models' position embeddings, a module's output can't be observed, activations are NaN or infinite, or the
            memory does not hold a layer of both models and one micro-batch.
    """
    processes = processes or Processes()
    device = usable_device(device, processes.local_rank if processes.count > 1 else None)
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    dtype = dtype or default_dtype(device)
    _check_samples(abilities, pair)
    batches = [(place, batch) for place, a in enumerate(abilities) for batch in cut_batches(a.samples, batch_tokens)]
    batches = batches[processes.rank :: processes.count]
    run = _Run(pair, device, dtype, abilities, batches, memory_budget, processes)
    every_sums = [DifferenceSums(pair.layout, device, run.scratch) for _ in abilities]
    settings = run_settings(pair, abilities, device, dtype, batch_tokens, processes)
    saved = None if state is None else RunState(state, settings)
    run.add_differences(every_sums, saved, save_every, quiet=quiet or processes.rank > 0)
    processes.add_up(every_sums)
    return [_profile(pair, ability, sums, dtype) for ability, sums in zip(abilities, every_sums, strict=True)]


def run_settings(
    pair: ModelPair,
    abilities: Sequence[AbilitySamples],
    device: str,
    dtype: torch.dtype,
    batch_tokens: int,
    processes: Processes,
) -> dict[str, Any]:
    """All that sums depend on: a run that is continued must have the same."""
    return {
        "target": pair.target.fingerprint,
        "ability_model": pair.ability_model.fingerprint,
        "abilities": {ability.name: ability.data for ability in abilities},
        "device": torch.device(device).type,
        "dtype": str(dtype).removeprefix("torch."),
        "batch_tokens": batch_tokens,
        "processes": processes.count,
        "versions": {"mergekit-act": __version__}
        | {name: version(name) for name in ("mergekit", "torch", "transformers")},
    }


@dataclass
class _Run:
    """A pass of this process's micro-batches through the pair."""

    pair: ModelPair
    device: str
    dtype: torch.dtype
    abilities: Sequence[AbilitySamples]
    batches: Sequence[tuple[int, MicroBatch]]  # with the place of their ability
    budget: int | None
    processes: Processes

    def __post_init__(self) -> None:
        size = scratch_bytes(self.pair.layout, self.device) // 4
        self.scratch = torch.empty(size, device=self.device)

    def add_differences(
        self, every_sums: Sequence[DifferenceSums], saved: RunState | None, save_every: float, *, quiet: bool
    ) -> None:
        """Add up the differences of all micro-batches that a saved state does not have yet."""
        done = saved.resume(every_sums) if saved is not None else 0
        if done == len(self.batches):
            return
        with self._settled() as (weights, plan):
            cutter = self._cutter(plan, saved)
            engine = Engine(weights, self.pair.layout, self.pair.vocabulary, self.device, self._most_tokens)
            with (
                engine.observing(),
                _progress(self.batches, done, plan, len(weights.pieces), quiet) as progress,
                _kept_on_error(saved, every_sums, len(self.batches)) as reached,
            ):
                saved_at = time.monotonic()
                while done < len(self.batches):
                    reached(done)
                    count, place = _WHOLE if cutter is None else cutter.cut([b for _, b in self.batches[done:]])
                    chunk = self.batches[done : done + count]
                    started, waited = time.monotonic(), weights.waited
                    with ExitStack() as stack:
                        for ability in {ability for ability, _ in chunk}:
                            stack.enter_context(every_sums[ability].undone_on_error())
                        hidden = HiddenStates(place, self.device, saved.path.parent if saved is not None else None)
                        stack.callback(hidden.close)
                        works = [Work(batch.to(self.device), every_sums[ability]) for ability, batch in chunk]
                        more = done + count < len(self.batches)
                        engine.run(works, hidden, more=more, on_progress=progress)
                        for ability in {ability for ability, _ in chunk}:
                            _check_finite(every_sums[ability], self.abilities[ability], self.dtype)
                    done += count
                    if cutter is not None:
                        cutter.learn(time.monotonic() - started, weights.waited - waited)
                    if saved is not None and time.monotonic() - saved_at >= save_every:
                        saved.save(every_sums, done, len(self.batches))
                        saved_at = time.monotonic()
                reached(done)
                if saved is not None:
                    saved.save(every_sums, done, len(self.batches))

    @contextmanager
    def _settled(self) -> Iterator[tuple[PairWeights, MemoryPlan]]:
        """The pair's weights, as much of them in memory as the budget holds."""
        pair, layout = self.pair, self.pair.layout
        skeletons = pair.skeletons()
        models = (
            ModelWeights(SegmentedModel(skeletons[0]), pair.target, self.dtype, self.device),
            ModelWeights(SegmentedModel(skeletons[1]), pair.ability_model, self.dtype, self.device),
        )
        head = models[0].segmented.head_name
        weights = PairWeights(models, pair.shared_rows.get(head, layout.channel_shape(head)[0]))
        try:
            tokens = self._most_tokens
            sums = 8 * layout.channel_count() * (len(self.abilities) + 1) + scratch_bytes(layout, self.device)
            longest = max(batch.input_ids.shape[1] for _, batch in self.batches)
            working = sums + activation_bytes(weights, layout, tokens, longest)
            budget = free_memory(self.device, self.processes.local_count) if self.budget is None else self.budget
            pieces = [weights.size(piece) for piece in weights.pieces]
            # On a CPU the file that is copied from is mapped into the same memory.
            mapped = max(pieces) // 2 if torch.device(self.device).type == "cpu" else 0
            plan = plan_memory(
                pieces,
                budget=budget,
                whole=weights.whole,
                working=working,
                outside=weights.outside + mapped,
                hidden=2 * self._token_bytes * tokens,
                all_hidden=2 * self._token_bytes * sum(batch.input_ids.numel() for _, batch in self.batches),
            )
            if isinstance(plan, int):
                raise ValueError(
                    f"a layer of both models and a micro-batch of {tokens} tokens need about {show_bytes(plan)} on "
                    f"{self.device}; {'what is free is' if self.budget is None else '--memory-budget says'} "
                    f"{show_bytes(budget)}. Say a smaller --batch-tokens, or a larger --memory-budget"
                )
            LOG.info("%s, of %s", _describe(plan, len(weights.pieces)), show_bytes(budget))
            try:
                weights.settle(plan)
                yield weights, plan
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"out of memory on {self.device}; say a --memory-budget below {show_bytes(budget)}, so that fewer "
                    "weights stay"
                ) from error
        finally:
            weights.close()

    @property
    def _most_tokens(self) -> int:
        return max(batch.input_ids.numel() for _, batch in self.batches)

    @property
    def _token_bytes(self) -> int:
        """Bytes of a token's hidden states in both models."""
        width: int = self.pair.target.config.get_text_config().hidden_size
        return 2 * width * self.dtype.itemsize

    def _cutter(self, plan: MemoryPlan, saved: RunState | None) -> ChunkCutter | None:
        if plan.everything:
            return None
        return ChunkCutter(
            plan.hidden,
            self._token_bytes,
            self.pair.vocabulary,
            on_host=torch.device(self.device).type != "cpu",
            processes=self.processes.local_count,
            folder=saved.path.parent if saved is not None else None,
        )


@contextmanager
def _kept_on_error(
    saved: RunState | None, every_sums: Sequence[DifferenceSums], total: int
) -> Iterator[Callable[[int], None]]:
    """If the run is interrupted or fails, save what it has reached.

    Yields:
        A function that is told how many micro-batches are done.
    """
    done = 0

    def reached(count: int) -> None:
        nonlocal done
        done = count

    try:
        yield reached
    except BaseException as error:
        if saved is None or not done:
            raise
        try:
            saved.save(every_sums, done, total)
        except Exception as failure:
            LOG.warning("the state of the run could not be saved: %s", failure)
            raise error from None
        if isinstance(error, KeyboardInterrupt):
            message = f"Interrupted. {saved.path} keeps what is done; the same command goes on from there."
            raise KeyboardInterrupt(message) from error
        raise


@contextmanager
def _progress(
    batches: Sequence[tuple[int, MicroBatch]], done: int, plan: MemoryPlan, pieces: int, quiet: bool
) -> Iterator[Callable[[float], None]]:
    """A bar, moved on by the function that is yielded."""
    tokens = [batch.tokens for _, batch in batches]
    streamed = "" if plan.everything else f" ({len(plan.streamed)} of {pieces} pieces streamed)"
    with tqdm(
        total=sum(tokens),
        initial=sum(tokens[:done]),
        unit="tok",
        unit_scale=True,
        desc=f"Profiling{streamed}",
        disable=quiet,
    ) as bar:
        end = float(sum(tokens))

        def move(moved: float) -> None:
            bar.update(moved if bar.n + moved < end - 1e-3 else end - bar.n)  # rounding must not carry it past its end

        yield move


def _describe(plan: MemoryPlan, pieces: int) -> str:
    if plan.everything:
        return "both models stay in memory"
    return (
        f"{pieces - len(plan.streamed)} of {pieces} pieces of the models stay in memory, the others are loaded once "
        f"per chunk of samples into {plan.buffers} buffers"
    )


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


def _check_finite(sums: DifferenceSums, ability: AbilitySamples, dtype: torch.dtype) -> None:
    if torch.isfinite(sums.vector).all():
        return
    spoilt = [module for module, column in sums.sums.items() if not torch.isfinite(column).all()]
    raise ValueError(
        f'ability "{ability.name}": activations of {len(spoilt)} modules are NaN or infinite in {dtype} (the first '
        f'is "{spoilt[0]}"); try --dtype float32, and see whether the models\' weights are finite'
    )


def _profile(pair: ModelPair, ability: AbilitySamples, sums: DifferenceSums, dtype: torch.dtype) -> Profile:
    return Profile(
        scores=sums.means(),
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
