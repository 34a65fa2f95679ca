"""Scores of a sweep's points: streamed to a file as they come, read again by a rerun, and compared."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_act.files import write_atomically
from mergekit_act.sweeping.grid import Point
from mergekit_act.wording import as_csv

__all__ = ["Roles", "Score", "ScoreFile", "best_point", "frontier"]


@dataclass(frozen=True)
class Roles:
    """Which abilities are to be recovered, and which kept."""

    recover: tuple[str, ...]
    keep: tuple[str, ...]

    def of(self, values: Mapping[str, float]) -> tuple[float, float | None]:
        """The means over the abilities to recover and to keep; None if there are none to keep."""

        def mean(names: Sequence[str]) -> float:
            return math.fsum(values[name] for name in names) / len(names)

        return mean(self.recover), mean(self.keep) if self.keep else None


@dataclass(frozen=True)
class Score:
    """What one point, or the target, was measured to be.

    Attributes:
        point: None for the target itself.
        nll: ability -> negative log-likelihood of its answers per token, in nats.
        recover: likelihood of an answer token, the geometric mean over the abilities to recover: exp(−mean nll).
        keep: likewise over the abilities to keep; None if there are none.
        channels: how many were transferred.
        parameters: how many numbers these own.
        seconds: that patching, scoring and restoring took.
    """

    point: Point | None
    nll: Mapping[str, float]
    recover: float
    keep: float | None
    channels: int
    parameters: int
    seconds: float


class ScoreFile:
    """A csv file to which each score is added when it is known.

    Args:
        path: of the file; what a run that was killed has left of a line is dropped.
        roles: the abilities.
    """

    def __init__(self, path: Path, roles: Roles) -> None:
        self.path, self._roles = path, roles
        self._abilities = (*roles.recover, *roles.keep)
        self._header = ["density", "weight", "criterion", "fit", "channels", "parameters", "recover", "keep", "seconds"]
        self._header += [f"nll:{name}" for name in self._abilities]
        self.scores: list[Score] = []
        if path.exists():
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                write_atomically(path, whole.encode(), overwrite=True)
            rows = csv.DictReader(io.StringIO(whole))
            if whole and rows.fieldnames != self._header:
                raise ValueError(f"{path} is no list of this sweep's scores; say --overwrite to start anew")
            try:
                self.scores = [self._read(row) for row in rows]
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path} cannot be read ({error}); say --overwrite to start anew") from error

    def find(self, point: Point | None) -> Score | None:
        """What was measured before."""
        return next((score for score in self.scores if score.point == point), None)

    def add(self, point: Point | None, nll: Mapping[str, float], **measured: float) -> Score:
        """Write a score down.

        Raises:
            OSError: the disk is full, or the file can't be written.
        """
        score = self._score(point, nll, **measured)
        row: list[object] = ["", "", "", ""]
        if point is not None:
            row = [repr(point.density), ";".join(map(repr, point.weights)), point.criterion, point.fit_key]
        row += [score.channels, score.parameters]
        row += [repr(score.recover), "" if score.keep is None else repr(score.keep), f"{score.seconds:.3f}"]
        rows: list[list[object]] = [[*row, *(repr(nll[name]) for name in self._abilities)]]
        if not self.path.exists() or not self.path.stat().st_size:
            rows.insert(0, [*self._header])
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(as_csv(rows))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(
                f"{self.path} could not be written: {reason}. Mend that and give the same command again"
            ) from error
        self.scores.append(score)
        return score

    def _read(self, row: Mapping[str, str]) -> Score:
        nll = {name: float(row[f"nll:{name}"]) for name in self._abilities}
        weights = tuple(map(float, filter(None, row["weight"].split(";"))))
        fit, _, fit_hash = row["fit"].rpartition("#")
        point = Point(float(row["density"]), weights, row["criterion"], fit, fit_hash) if row["density"] else None
        return self._score(
            point, nll, channels=int(row["channels"]), parameters=int(row["parameters"]), seconds=float(row["seconds"])
        )

    def _score(self, point: Point | None, nll: Mapping[str, float], **measured: float) -> Score:
        recover, keep = self._roles.of(nll)
        return Score(
            point,
            dict(nll),
            recover=math.exp(-recover),
            keep=None if keep is None else math.exp(-keep),
            channels=int(measured["channels"]),
            parameters=int(measured["parameters"]),
            seconds=measured["seconds"],
        )


def frontier(scores: Iterable[Score]) -> list[Score]:
    """The scores that no other one surpasses in what is recovered without falling behind in what is kept."""
    best: list[Score] = []
    finite = (score for score in scores if math.isfinite(math.fsum(score.nll.values())))
    for score in sorted(finite, key=lambda score: (-_kept(score), -score.recover)):
        if not best or score.recover > best[-1].recover:
            best.append(score)
    return best


def best_point(scores: Sequence[Score], target: Score, keep_within: float) -> Score | None:
    """The point that recovers most while the kept abilities lose at most a share of the target's likelihood.

    Returns:
        None if every point loses more, or recovers nothing.
    """
    enough = _kept(target) * (1 - keep_within)
    allowed = [score for score in scores if _kept(score) >= enough and score.recover > target.recover]
    return max(allowed, key=lambda score: (score.recover, _kept(score)), default=None)


def _kept(score: Score) -> float:
    return 0.0 if score.keep is None else score.keep
