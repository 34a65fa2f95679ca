"""A sample of the inputs that the target's modules receive, by role of the abilities: what a fit is solved with.

Which tokens are taken is settled before the models run: each has a row of its own in every buffer. So what is taken
depends on neither chunks nor processes, and a chunk that runs twice writes the same rows again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_act.abilities import AbilitySamples
from mergekit_act.abilities.batches import MicroBatch, by_length
from mergekit_act.artifacts import EXPERT, Inputs
from mergekit_act.channels import is_norm
from mergekit_act.profiling.changes import multiplied
from mergekit_act.profiling.pair import ModelPair
from mergekit_act.runs.processes import Processes
from mergekit_act.streaming.experts import ExpertOutput
from mergekit_act.streaming.segments import Observer

__all__ = ["InputSample", "TokenPlaces"]

_ROWS = 512  # for each role
_LEAST_ROWS = 64  # that a file keeps, however small the model
# Twice as many rows are worth more than digits: that many inputs are fitted, and the noise is that of a small ridge.
_DTYPE = torch.float8_e4m3fn
_SHARE = 0.1  # of the model's bytes that a file may have


@dataclass(frozen=True)
class TokenPlaces:
    """Which tokens of a micro-batch are taken.

    Attributes:
        role: of their ability.
        tokens: int64 ``[taken]``: their places in the flattened batch.
        rows: int64 ``[taken]``: their rows.
    """

    role: str
    tokens: Tensor
    rows: Tensor

    def to(self, device: str) -> TokenPlaces:
        """The same on a device."""
        return TokenPlaces(self.role, self.tokens.to(device), self.rows.to(device))


class InputSample:
    """Rows of inputs, filled as micro-batches pass through the target.

    Tokens that all samples of an ability begin with, a template's, are taken from one sample: they are all the same.
    They get the weight that they have among all tokens.

    Args:
        pair: the models.
        abilities: their samples; all of a role share its rows.
        roles: ability -> ``recover`` or ``keep``.
        batches: all micro-batches, of all processes, each with the place of its ability.

    Attributes:
        places: for each micro-batch the tokens that are taken.
        buffers: ``<role>.<source>`` -> float32 ``[rows, width]``, on the CPU.
    """

    def __init__(
        self,
        pair: ModelPair,
        abilities: Sequence[AbilitySamples],
        roles: Mapping[str, str],
        batches: Sequence[tuple[int, MicroBatch]],
    ) -> None:
        self._pair = pair
        self._sources: dict[str, str] = {}  # module -> the first one that has the same input
        self._segment: list[tuple[Tensor, str]] = []
        self._squares: set[str] = set()  # norms: what their weights multiply, squared
        self._rows_of: set[str] = set()  # embeddings of other things than words: which row a token takes
        self.buffers: dict[str, Tensor] = {}
        self.roles: dict[str, dict[str, Any]] = {}
        self._is_common: dict[str, Tensor] = {}  # role -> whether its rows are of tokens that all samples have
        self._totals: dict[str, tuple[int, int]] = {}  # role -> how many tokens such rows stand for, and the others
        rows: dict[tuple[int, int, int], int] = {}  # (ability, sample, position) -> row
        for role in dict.fromkeys(roles.values()):
            own = [(place, ability) for place, ability in enumerate(abilities) if roles[ability.name] == role]
            common, tokens = [], []
            for place, ability in own:
                start = _common_start(ability)
                common += [(place, 0, position) for position in range(start)]
                tokens += [(place, *token) for token in _own_tokens(ability, start)]
            generator = torch.Generator().manual_seed(0)
            order = torch.randperm(len(common), generator=generator).tolist()
            first = [common[n] for n in order[: _ROWS // 4]]
            order = torch.randperm(len(tokens), generator=generator).tolist()
            chosen = _interleaved(first, [tokens[n] for n in order[: _ROWS - len(first)]])
            is_common = torch.tensor([token in set(first) for token in chosen])
            self._is_common[role] = is_common
            self._totals[role] = (sum(len(abilities[place].samples) for place, _, _ in common), len(tokens))
            rows |= {token: row for row, token in enumerate(chosen)}
            self.roles[role] = {
                "abilities": [ability.name for _, ability in own],
                "data": {ability.name: ability.data for _, ability in own},
                "samples": sum(len(ability.samples) for _, ability in own),
                "tokens": len(common) + len(tokens),
                "rows": len(chosen),
            }
        self.places = _places(abilities, roles, batches, rows)
        self._shares, self._embedded = _word_shares(pair, abilities, roles)

    def watching(
        self,
        model: nn.Module,
        axes: Mapping[str, int | None],
        batch: MicroBatch,
        places: TokenPlaces,
        observer: Observer,
    ) -> Observer:
        """An observer that takes inputs, and does what another one does.

        Args:
            model: the target.
            axes: module -> where token positions are in its output, as ``OutputForms`` has them.
            batch: the micro-batch.
            places: the tokens that are taken of it.
            observer: the other one.
        """
        self._segment = []
        busy = False

        def see(module: str, output: Any, inputs: Any) -> Any:
            nonlocal busy
            if busy:  # a norm runs again to see what its weights multiply
                return None
            busy = True
            if isinstance(output, ExpertOutput):
                self._take_experts(module, ExpertOutput(inputs.detach(), output.tokens, output.ends), batch, places)
            else:
                self._take(module, model.get_submodule(module), inputs, axes[module], batch, places)
            busy = False
            return observer(module, output, inputs)

        return see

    def take_rows(self, module: str, hidden: Tensor, places: TokenPlaces) -> None:
        """Take a module's inputs ``[batch, tokens, width]``; they are its own."""
        self._sources[module] = module
        self._write(module, hidden.detach().flatten(0, -2)[places.tokens], places)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a run that goes on needs: buffers, and what is known of modules."""
        known = {"sources": self._sources, "squares": sorted(self._squares), "rows_of": sorted(self._rows_of)}
        return self.buffers, known

    def resume(self, buffers: Mapping[str, Tensor], known: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.buffers, self._sources = dict(buffers), dict(known["sources"])
        self._squares, self._rows_of = set(known["squares"]), set(known["rows_of"])

    def finished(self, processes: Processes) -> Inputs:
        """What the file has: no more than a tenth of the target's bytes, but some rows in any case."""
        shapes: dict[str, torch.Size] = {}
        own = ({name: buffer.shape for name, buffer in self.buffers.items()}, self.state()[1])
        for found, known in processes.gather(own):
            shapes |= found
            self._sources |= known["sources"]
            self._squares |= set(known["squares"])
            self._rows_of |= set(known["rows_of"])
        for name in sorted(shapes):
            self.buffers[name] = processes.add(self.buffers.get(name, torch.zeros(shapes[name])))
        row_bytes = sum(
            buffer.shape[1:].numel() + 4
            for name, buffer in self.buffers.items()
            if name.partition(".")[2] not in self._squares | self._rows_of
        )
        allowed = _SHARE * sum(header.size for header in self._pair.target.headers.values())
        most = max(_LEAST_ROWS, int(allowed / max(1, row_bytes)))
        roles = {role: said | {"rows": min(said["rows"], most)} for role, said in self.roles.items()}
        tensors = dict(self._shares)
        for name, buffer in self.buffers.items():
            role, _, source = name.partition(".")
            rows = buffer[: roles[role]["rows"]]
            if source in self._rows_of:
                ids, weights = buffer.flatten().long(), self._shares_of(role, len(buffer))
                tensors[name] = torch.bincount(ids, weights, self._embedded[source]).float() / len(buffer)
            elif source in self._squares:
                tensors[name] = (buffer * self._shares_of(role, len(buffer))[:, None]).mean(0)
            elif source.endswith(EXPERT):
                tensors[name] = rows.flatten().to(torch.int32)
            else:
                flat = rows.reshape(-1, rows.shape[-1])
                weights = self._shares_of(role, len(rows)).repeat_interleave(len(flat) // len(rows))
                scale = (flat.abs().amax(1) / torch.finfo(_DTYPE).max).clamp(min=torch.finfo(torch.float32).tiny)
                tensors[name], tensors[f"{name}.scale"] = (flat / scale[:, None]).to(_DTYPE), scale * weights.sqrt()
        sources = {module: self._sources[module] for module in self._pair.layout.modules}
        return Inputs(tensors, self._pair.layout, sources, self._pair.target.describe(), roles)

    def _shares_of(self, role: str, rows: int) -> Tensor:
        """float32 ``[rows]``: the weights of a role's first rows, 1 in the mean."""
        is_common = self._is_common[role][:rows]
        weights = torch.zeros(rows)
        for chosen, total in zip((is_common, ~is_common), self._totals[role], strict=True):
            weights[chosen] = total / max(1, int(chosen.sum()))
        return weights / weights.mean()

    def _take(
        self,
        module: str,
        owner: nn.Module,
        inputs: Any,
        axis: int | None,
        batch: MicroBatch,
        places: TokenPlaces,
    ) -> None:
        arguments, keywords = inputs
        given = next(value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor))
        if isinstance(owner, nn.Embedding):
            self._sources[module] = module
            if f"{places.role}.{module}" not in self._shares:
                ids = given.expand(batch.input_ids.shape).flatten()[places.tokens]
                self._rows_of.add(module)
                self._write(module, ids[:, None], places)
        elif is_norm(owner):
            self._sources[module] = module
            self._squares.add(module)
            rows = batch.by_token(multiplied(owner, arguments, keywords), axis)
            rows = rows.expand(len(batch.input_ids), *rows.shape[1:]).flatten(0, 1)[places.tokens]
            self._write(
                module, rows.float().square().flatten(1, -2).mean(1) if rows.ndim > 2 else rows.square(), places
            )
        else:
            if module not in self._sources:
                self._sources[module] = next((name for tensor, name in self._segment if tensor is given), module)
                self._segment.append((given, self._sources[module]))
            if self._sources[module] == module:
                self._write(module, given.detach().flatten(0, -2)[places.tokens], places)

    def _take_experts(self, module: str, inputs: ExpertOutput, batch: MicroBatch, places: TokenPlaces) -> None:
        self._sources[module] = module
        row_of = torch.full((batch.input_ids.numel(),), -1, device=inputs.tokens.device)
        row_of[places.tokens] = places.rows
        taken = inputs.at(row_of)  # by expert, and the rows of a token one behind the other when sorted by token
        order = torch.argsort(taken.tokens, stable=True)
        experts = torch.repeat_interleave(
            torch.arange(len(taken.ends), device=order.device), torch.tensor(taken.counts(), device=order.device)
        )
        chosen = len(order) // len(places.tokens)
        self._write(module, taken.rows[order].reshape(-1, chosen, taken.rows.shape[1]), places, sort=True)
        self._write(module + EXPERT, experts[order].reshape(-1, chosen), places, sort=True)

    def _write(self, source: str, rows: Tensor, places: TokenPlaces, *, sort: bool = False) -> None:
        """Put rows into their places.

        Args:
            source: whose they are.
            rows: ``[taken, …]``.
            places: where they go.
            sort: whether they come in the order of the places, instead of the tokens'.
        """
        name, where = f"{places.role}.{source}", places.rows.sort().values if sort else places.rows
        if name not in self.buffers:
            self.buffers[name] = torch.zeros(self.roles[places.role]["rows"], *rows.shape[1:])
        self.buffers[name][where.cpu()] = rows.float().cpu()


def _interleaved(first: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """All of both, every fourth of the first as long as there are others: so are the leading ones, however many."""
    found: list[Any] = []
    left, right = list(first), list(others)
    while left or right:
        found += [left.pop(0)] if left else []
        found += right[:3]
        del right[:3]
    return found


def _common_start(ability: AbilitySamples) -> int:
    """How many tokens all samples begin with; none if there is just one sample."""
    samples = ability.samples
    shortest = min(len(sample.input_ids) for sample in samples)
    first = torch.stack([sample.input_ids[:shortest] for sample in samples])
    return int((first == first[0]).all(0).cumprod(0).sum()) if len(samples) > 1 else 0


def _own_tokens(ability: AbilitySamples, start: int) -> list[tuple[int, int]]:
    """(sample, position) of all tokens behind those that all samples begin with."""
    return [(place, t) for place, sample in enumerate(ability.samples) for t in range(start, len(sample.input_ids))]


def _places(
    abilities: Sequence[AbilitySamples],
    roles: Mapping[str, str],
    batches: Sequence[tuple[int, MicroBatch]],
    rows: Mapping[tuple[int, int, int], int],
) -> list[TokenPlaces]:
    """What is taken of each micro-batch; these have an ability's samples in the order in which they were cut."""
    left = [iter(by_length(ability.samples)) for ability in abilities]
    found = []
    for ability, batch in batches:
        places, own = [], []
        length = batch.input_ids.shape[1]
        for line in range(len(batch.input_ids)):
            sample = next(left[ability])
            for position in range(len(abilities[ability].samples[sample].input_ids)):
                row = rows.get((ability, sample, position))
                if row is not None:
                    places.append(line * length + position)
                    own.append(row)
        role = roles[abilities[ability].name]
        found.append(TokenPlaces(role, torch.tensor(places, dtype=torch.long), torch.tensor(own, dtype=torch.long)))
    return found


def _word_shares(
    pair: ModelPair, abilities: Sequence[AbilitySamples], roles: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """``<role>.<embedding>`` -> float32 ``[rows]``, of words; and embedding -> its rows, of all."""
    skeleton: Any = pair.skeletons()[0]
    every = {name: owner for name, owner in skeleton.named_modules() if isinstance(owner, nn.Embedding)}
    embeddings = {name: owner for name, owner in every.items() if name in pair.layout.parameters}
    found = {}
    for module in (name for name, owner in embeddings.items() if owner is skeleton.get_input_embeddings()):
        for role in dict.fromkeys(roles.values()):
            own = [ability for ability in abilities if roles[ability.name] == role]
            ids = torch.cat([sample.input_ids for ability in own for sample in ability.samples])
            found[f"{role}.{module}"] = torch.bincount(ids, minlength=embeddings[module].num_embeddings) / len(ids)
    return found, {name: owner.num_embeddings for name, owner in embeddings.items()}
