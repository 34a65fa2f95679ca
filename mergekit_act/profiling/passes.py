"""A pass of micro-batches through a pair: chunk by chunk, within a memory budget, kept on interruption."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from tqdm import tqdm

from mergekit_act.abilities.batches import MicroBatch
from mergekit_act.profiling.engine import Engine, Work, working_bytes
from mergekit_act.profiling.inputs import TokenPlaces
from mergekit_act.profiling.pair import ModelPair
from mergekit_act.profiling.progress import Gathered
from mergekit_act.profiling.settings import ProfilingSettings
from mergekit_act.profiling.sums import ChannelSums, scratch_bytes
from mergekit_act.runs.state import StateFile
from mergekit_act.streaming.chunks import ChunkCutter
from mergekit_act.streaming.hidden import HiddenStates, Place
from mergekit_act.streaming.loading import ModelWeights
from mergekit_act.streaming.memory import MemoryPlan, free_memory, plan_memory
from mergekit_act.streaming.segments import SegmentedModel
from mergekit_act.streaming.weights import PairWeights
from mergekit_act.wording import show_bytes

__all__ = ["Pass"]

LOG = logging.getLogger(__name__)

# Where nothing is loaded between micro-batches, each is a chunk.
_WHOLE: tuple[int, Place] = (1, "device")


@dataclass(frozen=True)
class Pass:
    """One process's share of a run.

    Attributes:
        engine: the criterion's.
        pair: the models.
        settings: how they run, resolved.
        batches: the micro-batches, each with the place of its ability.
        places: for each micro-batch the tokens whose inputs are kept; empty if none are.
        names: of the abilities.
        neighbours: how many processes share this machine.
    """

    engine: type[Engine]
    pair: ModelPair
    settings: ProfilingSettings
    batches: Sequence[tuple[int, MicroBatch]]
    places: Sequence[TokenPlaces]
    names: Sequence[str]
    neighbours: int

    def run(self, gathered: Gathered, saved: StateFile | None) -> None:
        """Add up the differences of all micro-batches that a saved state does not have yet.

        Args:
            gathered: what is added to.
            saved: where the state is kept.

        Raises:
            ValueError: the memory does not hold a layer of both models and one micro-batch, a module's output can't be
                observed, or activations are NaN or infinite.
        """
        points = self.settings.line_points if self.engine.by_differences else (None,)
        done = gathered.restore(saved) if saved is not None else 0
        total = len(points) * len(self.batches)
        reached = done
        with _kept_on_error(saved, gathered, total) as note:
            note(done)
            for place, point in enumerate(points):
                end = (place + 1) * len(self.batches)
                if reached < end:
                    self._run(point, gathered, saved, note, (reached, end, total))
                    reached = end

    def _run(
        self,
        point: float | None,
        gathered: Gathered,
        saved: StateFile | None,
        note: Callable[[int | None], None],
        progress_of: tuple[int, int, int],
    ) -> None:
        """All micro-batches with the models at one point of the line between them."""
        done, end, total = progress_of
        device, dtype = self.settings.place, self.settings.torch_dtype
        first = end - len(self.batches)
        with self._settled(point) as (weights, plan):
            cutter = self._cutter(plan)
            weights.route = self.engine.route(weights.pieces)
            engine = self.engine(
                weights,
                self.pair.layout,
                self.pair.vocabulary,
                device,
                self._most_tokens,
                center_logits=self.settings.center_logits or False,
            )
            shown = _progress(self.batches, done, total, plan, len(weights.pieces), self.settings.quiet)
            with engine.observing(), shown as progress:
                saved_at = time.monotonic()
                while done < end:
                    left = self.batches[done - first :]
                    count, place = _WHOLE if cutter is None else cutter.cut([b for _, b in left])
                    started, waited = time.monotonic(), weights.waited
                    hidden = HiddenStates(place, device)
                    chunk = left[:count]
                    with closing(hidden), _all_or_nothing(gathered.sums, chunk, note, done):
                        works = [Work(batch.to(device), gathered.sums[ability]) for ability, batch in chunk]
                        if gathered.inputs is not None:
                            for work, places in zip(works, self.places[done - first :], strict=False):
                                if len(places.rows):
                                    work.inputs = (gathered.inputs, places.to(device))
                        engine.run(works, hidden, more=done + count < end, on_progress=progress)
                        for work, (ability, batch) in zip(works, chunk, strict=True):
                            _check_finite(work, batch, self.names[ability], dtype)
                    done += count
                    if cutter is not None:
                        cutter.learn(time.monotonic() - started, weights.waited - waited)
                    if saved is not None and (done == total or time.monotonic() - saved_at >= self.settings.save_every):
                        gathered.store(saved, done, total)
                        saved_at = time.monotonic()

    @contextmanager
    def _settled(self, point: float | None) -> Iterator[tuple[PairWeights, MemoryPlan]]:
        """The pair's weights, as much of them in memory as the budget holds."""
        pair, layout, device, dtype = self.pair, self.pair.layout, self.settings.place, self.settings.torch_dtype
        skeletons = pair.skeletons()
        models = (
            ModelWeights(SegmentedModel(skeletons[0]), pair.target, dtype, device),
            ModelWeights(SegmentedModel(skeletons[1]), pair.ability_model, dtype, device),
        )
        weights = PairWeights(models, self._head_rows(models), point)
        try:
            tokens = self._most_tokens
            sums = 8 * layout.channel_count() * 2 * self.engine.kinds * len(self.names) + scratch_bytes(layout, device)
            longest = max(batch.input_ids.shape[1] for _, batch in self.batches)
            working = sums + working_bytes(self.engine, weights, layout, tokens, longest)
            given = self.settings.memory_budget
            budget = free_memory(device, self.neighbours) if given is None else given
            pieces = [weights.size(piece) for piece in weights.pieces]
            # On a CPU the file that is copied from is mapped into the same memory.
            mapped = max(pieces) // 2 if torch.device(device).type == "cpu" else 0
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
                    f"a layer of both models, or a slice of their heads, and a micro-batch of {tokens} tokens need "
                    f"about {show_bytes(plan)} on {device}; "
                    f"{'what is free is' if given is None else '--memory-budget says'} {show_bytes(budget)}. "
                    f"Say a smaller --batch-tokens, or a --memory-budget above {show_bytes(plan)}"
                )
            LOG.info("%s, of %s", _describe(plan, len(weights.pieces)), show_bytes(budget))
            try:
                weights.settle(plan)
                yield weights, plan
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"out of memory on {device}; say a --memory-budget below {show_bytes(budget)}, so that fewer "
                    "weights stay, or a smaller --batch-tokens"
                ) from error
        finally:
            weights.close()

    @property
    def _most_tokens(self) -> int:
        return max(batch.input_ids.numel() for _, batch in self.batches)

    @property
    def _token_bytes(self) -> int:
        """Bytes of a token's hidden states that wait, in all models that run."""
        text = self.pair.target.config.get_text_config()
        states: int = self.engine.states(text.num_hidden_layers) * text.hidden_size
        return states * self.settings.torch_dtype.itemsize

    def _head_rows(self, models: tuple[ModelWeights, ModelWeights]) -> int:
        """How many rows of the heads are needed: those both have, for a loss all of the target's."""
        head, rows = models[0].segmented.head_name, models[0].head.original.shape[0]
        if self.engine.scores_loss:
            return rows
        return self.pair.shared_rows.get(head, rows) if head in self.pair.layout.parameters else 0

    def _cutter(self, plan: MemoryPlan) -> ChunkCutter | None:
        if plan.everything:
            return None
        return ChunkCutter(
            plan.hidden,
            self._token_bytes,
            self.pair.vocabulary,
            on_host=torch.device(self.settings.place).type != "cpu",
            processes=self.neighbours,
        )


@contextmanager
def _kept_on_error(saved: StateFile | None, gathered: Gathered, total: int) -> Iterator[Callable[[int | None], None]]:
    """If the run is interrupted or fails, save what it has reached.

    Yields:
        A function that is told how many micro-batches the sums have; None while that is no whole number of chunks.
    """
    done: int | None = 0

    def reached(count: int | None) -> None:
        nonlocal done
        done = count

    try:
        yield reached
    except BaseException as error:
        if saved is None or not done:  # nothing to save, or no whole number of chunks: the file stays as it is
            raise
        try:
            gathered.store(saved, done, total)
        except Exception as failure:
            LOG.warning("the state of the run could not be saved: %s", failure)
            raise error from None
        if isinstance(error, KeyboardInterrupt):
            message = f"Interrupted. {saved.path} keeps what is done; the same command goes on from there."
            raise KeyboardInterrupt(message) from error
        raise


@contextmanager
def _all_or_nothing(
    every_sums: Sequence[ChannelSums],
    chunk: Sequence[tuple[int, MicroBatch]],
    reached: Callable[[int | None], None],
    done: int,
) -> Iterator[None]:
    """Within, a chunk is added up; if an error ends it, the sums are what they were when ``done`` were added."""
    undo = [every_sums[ability].remember() for ability in sorted({ability for ability, _ in chunk})]
    try:
        reached(None)
        yield
        reached(done + len(chunk))
    except BaseException:
        reached(None)
        for each in undo:
            each()
        reached(done)  # not if a second interruption came in between
        raise


@contextmanager
def _progress(
    batches: Sequence[tuple[int, MicroBatch]], done: int, total: int, plan: MemoryPlan, pieces: int, quiet: bool
) -> Iterator[Callable[[float], None]]:
    """A bar, moved on by the function that is yielded."""
    tokens = [batch.tokens for _, batch in batches] * (total // len(batches))
    streamed = "" if plan.everything else f" ({len(plan.streamed)} of {pieces} pieces streamed)"
    with tqdm(
        total=sum(tokens),
        initial=sum(tokens[:done]),
        unit="tok",
        unit_scale=True,
        desc=f"Profiling{streamed}",
        disable=quiet or None,
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
        f"per chunk of samples into {plan.buffers} {'buffer' if plan.buffers == 1 else 'buffers'}"
    )


def _check_finite(work: Work, batch: MicroBatch, ability: str, dtype: torch.dtype) -> None:
    sums = work.sums
    if torch.isfinite(sums.vector).all():
        return
    bad = ~torch.isfinite(sums.vector).all(0)
    spoilt = [module for module, part in sums.by_module(bad).items() if part.any()]
    what, where = "activations", ""
    if work.finite is not None:
        what = "gradients or activations"
        if not work.finite.all():
            sample = int((~work.finite).nonzero()[0])
            where = f"; the first such sample begins with the token ids {batch.input_ids[sample][:8].tolist()}"
    raise ValueError(
        f'ability "{ability}": {what} of {len(spoilt)} modules are NaN or infinite in {dtype} (the first '
        f'is "{spoilt[0]}"{where}); try --dtype float32, and see whether the models\' weights are finite'
    )
