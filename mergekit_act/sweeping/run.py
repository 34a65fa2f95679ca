"""Score every point of a grid and write the best one as a merge config: what the command ``sweep`` does."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from mergekit_act.abilities import AbilitiesFile, Tokenizers
from mergekit_act.checking.guards import check_before_planning
from mergekit_act.checking.summary import count_moved
from mergekit_act.checkpoints import Checkpoint, open_checkpoint, parse_reference
from mergekit_act.devices import dtype_name, usable_device
from mergekit_act.evaluation import HeldOut, NotFiniteError, collect_held_out, generate_answers, score_answers
from mergekit_act.files import check_free, check_writable, write_atomically
from mergekit_act.logs import muted
from mergekit_act.models import check_samples_fit, load_model
from mergekit_act.planning import plan_merge
from mergekit_act.runs.folders import claimed
from mergekit_act.runs.settings import has_settings, keep_settings
from mergekit_act.sweeping.config import SweptConfig
from mergekit_act.sweeping.grid import Point
from mergekit_act.sweeping.patching import PatchedModel
from mergekit_act.sweeping.scores import Roles, Score, ScoreFile, best_point, frontier
from mergekit_act.versions import installed_versions

__all__ = ["SweepResult", "SweepSettings", "run_sweep"]

LOG = logging.getLogger(__name__)

FILES = ("sweep.json", "sweep.csv", "frontier.json", "best.yml", "sweep.svg", "sweep.png")


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    Attributes:
        target: the target's own score.
        scores: of all points that are scored in the folder.
        frontier: those that none surpasses, in the order of what they keep.
        exact_match: density and weights -> ability -> share of right greedy answers, for the frontier and the target.
        best: what was written to ``best.yml``; None if every point loses more than allowed, or recovers nothing.
        roles: the abilities.
        channels: of the model.
        parameters: of the model.
    """

    target: Score
    scores: Sequence[Score]
    frontier: Sequence[Score]
    exact_match: Mapping[Point | None, Mapping[str, float]]
    best: Score | None
    roles: Roles
    channels: int
    parameters: int


@dataclass(frozen=True)
class SweepSettings:
    """How points are scored and compared.

    Attributes:
        keep_within: share of the likelihood of a kept answer token that may be lost for the best point.
        generate: whether points on the frontier are scored by generation too.
        device: where the target runs; None takes the accelerator if there is one.
        batch_tokens: tokens in a micro-batch.
        lora_merge_cache: folder for merged models, for references of the form ``model+lora``.
        trust_remote_code: allow the models' own code from the Hub.
        quiet: show no progress.
    """

    keep_within: float = 0.05
    generate: bool = True
    device: str | None = None
    batch_tokens: int = 4096
    lora_merge_cache: str | None = None
    trust_remote_code: bool = False
    quiet: bool = False


def run_sweep(
    config: SweptConfig,
    file: AbilitiesFile,
    out_dir: Path,
    grid: Sequence[Point],
    settings: SweepSettings | None = None,
    *,
    overwrite: bool = False,
) -> SweepResult:
    """Score the target and every point of a grid on held-out samples, by the likelihood of their answers.

    The target is loaded once, in the dtype of the merge; a point's rows are put into it and taken out again. Scores
    are added to ``sweep.csv`` as they come, and a rerun goes on from there, with a larger grid too.

    Args:
        config: of the merge.
        file: the abilities file, with the abilities to recover and to keep.
        out_dir: where everything is written.
        grid: the points.
        settings: how.
        overwrite: discard what another sweep has left in the folder.

    Raises:
        FileNotFoundError: a model, profile or data set does not exist.
        MergeConfigError: the merge would fail.
        FileExistsError: the folder has files of these names that are of no sweep.
        BlockingIOError: another sweep is at work in the folder.
        ValueError: no ability is to be recovered, the folder is of another sweep, or the target's likelihoods are NaN.
    """
    settings = settings or SweepSettings()
    trust, cache = settings.trust_remote_code, settings.lora_merge_cache
    roles = _roles(file)
    check_writable(out_dir)
    if settings.quiet:
        disable_progress_bar()
    options = MergeOptions(lora_merge_cache=cache, trust_remote_code=trust, quiet=True)
    config.check([point.criterion for point in grid if point.criterion], fits=any(point.fit for point in grid))
    for point in {point.mask: point for point in grid}.values():
        check_before_planning(MergeConfiguration.model_validate(config.at(point)), options)
    for point in {(point.criterion, point.fit): point for point in grid if point.fit}.values():
        with muted("mergekit_act.checking"):  # what is wrong with a fit is told before hours of scoring
            plan_merge(MergeConfiguration.model_validate(config.at(point)), options)
    held_out = collect_held_out(file, Tokenizers(file.target, file.ability_model, trust))
    target, *abilities = (
        open_checkpoint(model, lora_merge_cache=cache, trust_remote_code=trust)
        for model in (config.target, *config.models)
    )
    for one in held_out:
        one.check(generate=settings.generate)
        check_samples_fit(target, one.data, one.tokenizer.backend_tokenizer)
    dtype = config.dtype or _common_dtype([target, *abilities])
    device = usable_device(settings.device)
    with claimed(out_dir / FILES[0]):
        run = {"dtype": dtype_name(dtype), "device": torch.device(device).type, "batch_tokens": settings.batch_tokens}
        _claim(out_dir, _identity([target, *abilities], config, held_out) | run, overwrite)
        model = load_model(target, device=device, dtype=dtype, trust_remote_code=trust)
        sweep = _Sweep(config, held_out, PatchedModel(model, dtype), options, settings)
        scores = ScoreFile(out_dir / "sweep.csv", roles)
        kept = _read_matches(out_dir / "frontier.json")
        own = sweep.score_target(scores)
        if settings.generate:  # of the target first: a model that can't generate is told before hours of scoring
            sweep.generate_all(out_dir / "frontier.json", kept, [own], quiet=True)
        sweep.score_all(scores, grid)
        found = [score for score in scores.scores if score.point is not None]  # of smaller grids before too
        best, front = best_point(found, own, settings.keep_within), frontier(found)
        if best is not None and best.point is not None:
            text = yaml.safe_dump(config.at(best.point), sort_keys=False, allow_unicode=True)
            write_atomically(out_dir / "best.yml", text.encode(), overwrite=True)
        else:
            (out_dir / "best.yml").unlink(missing_ok=True)
        matches = sweep.generate_all(out_dir / "frontier.json", kept, [own, *front]) if settings.generate else {}
        return SweepResult(
            own, found, front, matches, best, roles, config.layout.channel_count(), config.layout.parameter_count()
        )


class _Sweep:
    """The target in memory, and what is measured of it."""

    def __init__(
        self,
        config: SweptConfig,
        held_out: Sequence[HeldOut],
        patched: PatchedModel,
        options: MergeOptions,
        settings: SweepSettings,
    ) -> None:
        self.config, self.held_out, self.patched = config, held_out, patched
        self.options, self.settings = options, settings
        self._mask: tuple[float, str, str] | None = None
        self._moved = (0, 0)
        self._models = [parse_reference(model) for model in config.models]

    def score_target(self, scores: ScoreFile) -> Score:
        """The target's own score, measured if it is not there yet."""
        own = scores.find(None)
        if own is not None:
            return own
        started = time.monotonic()
        try:
            nll = self._nll()
        except NotFiniteError as error:
            raise ValueError(f"{self.config.target}: {error}") from error
        return scores.add(None, nll, channels=0, parameters=0, seconds=time.monotonic() - started)

    def score_all(self, scores: ScoreFile, grid: Sequence[Point]) -> None:
        """Score what is not scored yet."""
        todo = [point for point in grid if scores.find(point) is None]
        with tqdm(total=len(todo), unit="point", desc="sweep", disable=self.settings.quiet or None) as bar:
            for point in todo:
                started = time.monotonic()
                with self._at(point) as (channels, parameters):
                    try:
                        nll = self._nll()
                    except NotFiniteError:  # a merge that has gone out of a dtype's range: as bad as can be
                        nll = dict.fromkeys((one.ability for one in self.held_out), float("inf"))
                seconds = time.monotonic() - started
                score = scores.add(point, nll, channels=channels, parameters=parameters, seconds=seconds)
                bar.update()
                bar.set_postfix(recover=f"{score.recover:.3f}", keep=f"{score.keep or 0:.3f}")

    def generate_all(
        self, path: Path, kept: dict[str, dict[str, float]], scores: Sequence[Score], *, quiet: bool = False
    ) -> dict[Point | None, dict[str, float]]:
        """Exact match of greedy answers for points; what is kept of them is in a file."""
        found = {}
        for score in tqdm(scores, unit="point", desc="generation", disable=quiet or self.settings.quiet or None):
            point = score.point
            key = "target" if point is None else f"{point.density!r} {point.weights!r}"
            key += "" if point is None else "".join(f" {part}" for part in (point.criterion, point.fit_key) if part)
            if key not in kept:
                if point is None:
                    kept[key] = self._matches()
                else:
                    with self._at(point):
                        kept[key] = self._matches()
                write_atomically(path, (json.dumps(kept, indent=2) + "\n").encode(), overwrite=True)
            found[point] = kept[key]
        return found

    @contextmanager
    def _at(self, point: Point) -> Iterator[tuple[int, int]]:
        """The target with a point's merge in it; yields how many channels and parameters that changes."""
        if point.mask != self._mask:
            written = self.config.at(point)
            # What the planner remarks of a config holds for all densities: once is enough.
            with nullcontext() if self._mask is None else muted("mergekit_act.checking"):
                plan = plan_merge(MergeConfiguration.model_validate(written), self.options)
            self.patched.take(plan)
            self._mask, self._moved = point.mask, count_moved(plan)
        with self.patched.patched(dict(zip(self._models, point.weights, strict=True))):
            yield self._moved

    def _nll(self) -> dict[str, float]:
        found = {}
        for one in self.held_out:
            loss, tokens = score_answers(self.patched.model, one.samples, batch_tokens=self.settings.batch_tokens)
            found[one.ability] = float(loss.sum() / tokens.sum())
        return found

    def _matches(self) -> dict[str, float]:
        found = {}
        for one in self.held_out:
            answers = generate_answers(self.patched.model, one, batch_tokens=self.settings.batch_tokens)
            found[one.ability] = sum(answer.is_right for answer in answers) / len(answers)
        return found


def _identity(checkpoints: Sequence[Checkpoint], config: SweptConfig, held_out: Sequence[HeldOut]) -> dict[str, Any]:
    """What is scored: all that scores depend on, but for the grid and how the target runs."""
    target, *abilities = checkpoints
    return {
        "config": config.without_point(),
        "target": target.fingerprint,
        "ability_models": [checkpoint.fingerprint for checkpoint in abilities],
        "profiles": sorted(config.profiles.values()),
        **({"fits": config.fits} if config.fits else {}),
        "abilities": {
            one.ability: {
                "role": one.role,
                "fingerprint": one.data.data["fingerprint"],
                "extract": None if one.extract is None else one.extract.pattern,
                "max_new_tokens": one.max_new_tokens,
            }
            for one in held_out
        },
        "versions": installed_versions("mergekit", "torch", "transformers"),
    }


def _read_matches(path: Path) -> dict[str, dict[str, float]]:
    """What was generated before."""
    try:
        kept: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if any(not isinstance(matches, dict) for matches in kept.values()):
            raise ValueError("a point has no matches")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it, and it is made again") from error
    return kept


def _roles(file: AbilitiesFile) -> Roles:
    roles = Roles(*(tuple(n for n, a in file.abilities.items() if a.role == role) for role in ("recover", "keep")))
    if not roles.recover:
        raise ValueError('the abilities file has no ability with "role: recover"; a sweep measures what is recovered')
    if not roles.keep:
        LOG.warning('no ability has "role: keep"; the sweep sees what is recovered, not what it costs')
    return roles


def _claim(out_dir: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """See that a folder has nothing of these names, or a sweep with these settings."""
    paths = [out_dir / name for name in FILES]
    check_free(paths, overwrite=True)  # none is a folder
    if overwrite and not has_settings(paths[0], settings):
        for path in paths:
            path.unlink(missing_ok=True)
    if not paths[0].exists():
        check_free(paths, overwrite=False)
    keep_settings(paths[0], settings)


def _common_dtype(checkpoints: Sequence[Checkpoint]) -> torch.dtype:
    """In which mergekit merges without a dtype, if that is one for all tensors."""
    headers = (header for checkpoint in checkpoints for header in checkpoint.headers.values())
    dtypes = {dtype for header in headers if (dtype := header.torch_dtype) is not None}
    if len(dtypes) != 1:
        shown = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(f'the models hold {shown}; say "dtype" in the config, in which they are merged')
    return dtypes.pop()
