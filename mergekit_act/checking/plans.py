"""A merge plan, walked once: are all tensors there, do the masks fit them, and what do they select of each?"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ImmutableMap, ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.registry import get

from mergekit_act.channels import Layout
from mergekit_act.checking.completion import PlannedCall, plan_left_out
from mergekit_act.checking.configs import MergeConfigError, setting_problems
from mergekit_act.checking.headers import HeaderLoader
from mergekit_act.checking.loads import CONVERTED, CopyOf, load_less
from mergekit_act.checking.outputs import promoted_dtype
from mergekit_act.checking.remarks import plan_remarks
from mergekit_act.checkpoints import Checkpoint, TensorHeader, quantisation
from mergekit_act.merging import MaskFiles, TensorSelection, channels_along, load_mask_files
from mergekit_act.wording import enumerate_some

__all__ = ["PlanCheck", "PlannedTensor"]

LOG = logging.getLogger(__name__)

Sources = Mapping[ModelReference, WeightInfo]


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor, as planned.

    Attributes:
        name: in the output.
        sources: all names that a mask may have for the target's tensor that it is made of.
        headers: of each model's tensor, the target's first; None where a model lacks an optional one.
        selections: ability model -> what is selected of it, where anything is.
        settings: ability model -> the method's parameters for this tensor.
        by_tokens: whether one of its axes is token ids.
    """

    name: str
    sources: frozenset[str]
    headers: Mapping[ModelReference, TensorHeader | None]
    selections: Mapping[ModelReference, TensorSelection]
    settings: Mapping[ModelReference, Mapping[str, Any]]
    by_tokens: bool = False


@dataclass
class PlanCheck:
    """Walks a plan once, collecting problems."""

    config: Any
    options: Any
    problems: list[str] = field(default_factory=list)
    tensors: list[PlannedTensor] = field(default_factory=list)
    missing: dict[ModelReference, list[str]] = field(default_factory=dict)
    masks: dict[tuple[ModelReference, str, float | None], MaskFiles | None] = field(default_factory=dict)
    parameters: dict[ModelReference, set[str]] = field(default_factory=dict)
    resolved: dict[str, Any] = field(default_factory=dict)
    bases: dict[ModelReference, None] = field(default_factory=dict)
    models: dict[ModelReference, None] = field(default_factory=dict)
    unweighted: set[ModelReference] = field(default_factory=set)
    checkpoints: dict[ModelReference, Checkpoint] = field(default_factory=dict)
    headers: dict[tuple[ModelReference, str], TensorHeader | None] = field(default_factory=dict)
    lengths: list[str] = field(default_factory=list)

    @cached_property
    def spec(self) -> Any:
        """What mergekit knows of the method."""
        return get(self.config.merge_method).spec

    @property
    def layouts(self) -> list[Layout]:
        """Of the masks' models."""
        return [files.layout for files in self.masks.values() if files is not None]

    def refuse_quantised(self) -> None:
        """Refuse quantised models, whose other names and shapes would be so many problems more.

        Raises:
            MergeConfigError: a model is quantised.
        """
        found = {model: quantisation(self.checkpoint_of(model)) for model in self.config.referenced_models()}
        problems = [
            f"{model} is quantised ({how}); expected float32, float16 or bfloat16 weights"
            for model, how in found.items()
            if how is not None
        ]
        if problems:
            raise MergeConfigError(problems)

    def located(self, model: ModelReference, source: WeightInfo) -> WeightInfo:
        """A model's tensor, with the name under which its files have it among its aliases, if that is another one."""
        checkpoint = self.checkpoint_of(model)
        names = (source.name, *(source.aliases or ()), *(source.tied_names or ()))
        if any(name in checkpoint.headers for name in names):
            return source
        stored = checkpoint.stored_name(source.name)
        if stored is None and model != self.config.base_model:
            stored = checkpoint.tied_name(source.name)
        if stored is None:
            return source
        return source.model_copy(update={"aliases": (*(source.aliases or ()), stored)})

    def complete(self, planner: Any, calls: Sequence[PlannedCall]) -> None:
        """Plan what the target has and mergekit's definition of its architecture lacks."""
        base = self.config.base_model
        if base is not None:
            self.problems += plan_left_out(planner, calls, base, self.checkpoint_of(base))

    def resolve(self, weight: WeightInfo, task: Any) -> Any:
        """The task with each model's mask setting replaced by what it selects of this tensor.

        None for a tensor that the target does not have and its config does not ask for: the output is the target's.
        """
        sources = self._sources(task)
        base = task.base_model
        self.bases[base] = None
        absent = self._header(base, sources[base]) is None
        if absent and (weight.optional or not self.checkpoint_of(base).expects(sources[base].name)):
            return None
        self._check_presence(weight, base, sources)
        given = dict(task.input_parameters.items())
        settings = {model: dict(given[model].items()) for model in task.model_order if model != base and model in given}
        selections = {}
        for model in settings:
            self.models[model] = None
            if settings[model].get("weight", 0) is None:
                self.unweighted.add(model)
            files = self._mask_files(model, settings[model]["mask"], settings[model]["mask_density"])
            selection = self._select(weight, sources, base, model, files) if files else None
            settings[model]["mask"] = selection
            if selection is not None and selection.any() and settings[model].get("weight") != 0:
                selections[model] = selection
        headers = {model: self._header(model, source) for model, source in sources.items()}
        names = frozenset(self._names_of(base, sources[base]))
        for model in sources:
            self.parameters.setdefault(model, set()).update(names)
        headers = {base: headers[base]} | headers
        self._check_dtype(weight, headers[base])
        by_tokens = weight.vocabulary_axis is not None
        self.tensors.append(PlannedTensor(weight.name, names, headers, selections, settings, by_tokens))
        parameters = dict(task.input_parameters.items()) | {m: ImmutableMap(s) for m, s in settings.items()}
        task = task.model_copy(update={"input_parameters": ImmutableMap(parameters)})
        twin = self._twin(weight, base)
        if selections and twin is not None:
            return CopyOf(source=twin)
        self.resolved[weight.name] = load_less(task, selections, list(headers.values()))
        return self.resolved[weight.name]

    def _twin(self, weight: WeightInfo, base: ModelReference) -> Any:
        """The task that already makes the same matrix under another name, if the target ties the two."""
        names = set(weight.tied_names or ()) if self._ties(base) else set()
        for files in self.masks.values():
            if files is not None and self._ties(base, files):
                names.update(files.layout.tied_names(weight.name))
        return next((self.resolved[name] for name in sorted(names) if name in self.resolved), None)

    def finish(self) -> None:
        """Raise all problems, or tell what is worth telling.

        Raises:
            MergeConfigError: there are problems.
        """
        self._check_models()
        self._check_matches()
        self._check_unmatched()
        if self.problems:
            raise MergeConfigError(self.problems)
        for line in self.remarks():
            LOG.warning(line)

    def remarks(self) -> list[str]:
        """What is no mistake but worth knowing before the merge."""
        return plan_remarks(self)

    @property
    def has_tokenizer(self) -> bool:
        """Whether mergekit makes vocabulary tensors anew for a tokenizer."""
        return self.config.tokenizer is not None or self.config.tokenizer_source is not None

    def dtypes(self) -> tuple[torch.dtype, torch.dtype] | None:
        """The target's dtype and the output's, where the config names none."""
        return promoted_dtype(tensor.headers.values() for tensor in self.tensors)

    def _check_models(self) -> None:
        if not self.models:
            self.problems.append(f"the config names no ability model; {self.spec.name} needs one besides the target")
        for model in self.models:
            if not any(key[0] == model for key in self.masks):
                self.problems.append(f'{model} has no "mask"; name a mask or profile under its "parameters:"')
            if model in self.unweighted:
                self.problems.append(f'{model} has no "weight"; give the factor on its changes under its "parameters:"')
            for base in self.bases:
                if self._ties(base) and not self._ties(model):
                    self.problems.append(
                        f"{base} ties its head to its embedding and {model} does not; there is no one matrix to "
                        "transfer to. Untie the target first"
                    )
        for model, names in self.missing.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            self.problems.append(self._missing_sentence(model, ", ".join(names[:3]) + more))

    def _missing_sentence(self, model: ModelReference, names: str) -> str:
        return (
            f"{model} has no tensor {names}, which its config asks for; fetch or save it again, or it is of another "
            "backbone"
        )

    def _check_matches(self) -> None:
        """Every module that a mask selects has to be somewhere in the output."""
        outputs = set().union(*self.parameters.values())
        for (model, setting, _), files in self.masks.items():
            if files is None:  # could not be loaded, which is told already
                continue
            unmatched = [module for module in files.channels if not outputs & set(files.names_of(module))]
            if unmatched:
                named = enumerate_some((f'"{module}"' for module in unmatched), most=3)
                options = enumerate_some((f"--exclude '{module}'" for module in unmatched), " ", most=3)
                self.problems.append(
                    f'mask "{setting}" of {model}: no output tensor matches {named}. If that is left out on purpose, '
                    f"make the mask with {options}"
                )

    def _check_unmatched(self) -> None:
        """What just the ability model has of a module would be missing beside the rows that are moved."""
        for (model, _, _), files in self.masks.items():
            theirs = set(self.checkpoint_of(model).headers).difference(
                *(self.checkpoint_of(b).headers for b in self.bases)
            )
            if files is None or not theirs:
                continue
            known = files.layout.owned_names
            names = sorted({self.checkpoint_of(model).parameter_name(stored) for stored in theirs} - known)
            lone = [name for name in names if name.rpartition(".")[0] in files.channels]
            if lone:
                self.problems.append(
                    f'{model} has {len(lone)} tensors that the target lacks, such as "{lone[0]}": rows of their '
                    "modules are selected and would be moved without them; ACT needs models of one backbone"
                )

    def _mask_files(self, model: ModelReference, setting: str | None, density: float | None) -> MaskFiles | None:
        if setting is None:
            return None
        key = (model, setting, density)
        if key not in self.masks:
            self.masks[key] = None
            problems = setting_problems(str(model), setting, density)
            self.problems += problems
            if not problems:
                self.masks[key] = load_mask_files(setting, density)
        return self.masks[key]

    def _select(
        self, weight: WeightInfo, sources: Sources, base: ModelReference, model: ModelReference, files: MaskFiles
    ) -> TensorSelection | None:
        names = self._names_of(base, sources[base])
        if weight.name == sources[base].name:
            names |= self._names_of(base, weight)
        if self._ties(base, files):
            names |= {tied for name in names for tied in files.layout.tied_names(name)}
        selection = files.selection(sorted(names), weight.vocabulary_axis)
        if selection is None:
            return None
        if sources[model].name != sources[base].name:
            self.problems.append(
                f'"{weight.name}" is made of "{sources[base].name}" of {base} and "{sources[model].name}" of {model}; '
                "channels can only be moved between the same layers"
            )
        if weight.optional and self._header(model, sources[model]) is None:
            self.missing.setdefault(model, []).append(f'"{sources[model].name}"')
        header = self._header(base, sources[base])
        for axis, chosen in selection.slices.items():
            if header is not None and not _fits(axis, chosen, header.shape):
                shown = ", ".join(map(str, files.files))
                self.problems.append(
                    f'mask {shown} has {chosen.numel()} channels for "{weight.name}"; the target\'s tensor is '
                    f"{list(header.shape)} (axis {axis}). Profile this pair again with mergekit-act profile"
                )
            if axis == weight.vocabulary_axis and chosen.any():
                self._check_vocabulary(weight)
        return selection

    def _check_vocabulary(self, weight: WeightInfo) -> None:
        """Row i of a vocabulary tensor has to be the target's token id i."""
        tokenizer = self.config.tokenizer
        source = tokenizer.source if tokenizer is not None else self.config.tokenizer_source
        if source not in (None, "base"):
            self.problems.append(
                f'rows of "{weight.name}" are selected and the tokenizer\'s source is "{source}", which moves rows; '
                'expected "source: base", or a mask made with --exclude for this module'
            )
        if tokenizer is not None and tokenizer.pad_to_multiple_of:
            self.problems.append(
                f'rows of "{weight.name}" are selected and pad_to_multiple_of refills rows with a mean; leave one out'
            )

    def _check_presence(self, weight: WeightInfo, base: ModelReference, sources: Sources) -> None:
        """Are the tensors there, and of one shape?"""
        rows = {}
        shapes = {}
        for model, source in sources.items():
            header = self._header(model, source)
            if header is not None:
                shape = list(header.shape)
                if weight.vocabulary_axis is not None and shape:
                    rows[model] = shape.pop(weight.vocabulary_axis)
                shapes[model] = shape
            needed = model == base or not weight.optional
            if header is None and needed:
                self.missing.setdefault(model, []).append(f'"{source.name}"')
        if any(shape != next(iter(shapes.values())) for shape in shapes.values()):
            shown = ", ".join(f"{shape} in {model}" for model, shape in shapes.items())
            self.problems.append(f'"{weight.name}" is {shown}; ACT needs models of one backbone')
        self._note_lengths(weight, rows)

    def _check_dtype(self, weight: WeightInfo, header: TensorHeader | None) -> None:
        """mergekit copies what are no floating-point numbers, but writes them in ``out_dtype`` as well."""
        out_dtype = self.config.out_dtype
        if out_dtype and header is not None and header.torch_dtype is None:
            self.problems.append(
                f'"{weight.name}" is {header.dtype}: out_dtype would make {out_dtype} of it; say "dtype: {out_dtype}" '
                "instead"
            )

    def _note_lengths(self, weight: WeightInfo, rows: Mapping[ModelReference, int]) -> None:
        """What happens to the rows that not all models have."""
        if len(set(rows.values())) < 2 or self.has_tokenizer:
            return
        shown = ", ".join(f"{model} has {count:,}" for model, count in rows.items())
        end = "rows behind the shorter one stay the target's"
        if self.options.unsafe_truncate_embeddings:
            end = (
                f"--unsafe-truncate-embeddings cuts the output to {min(rows.values()):,}; without it the target's stay"
            )
        self.lengths.append(f'"{weight.name}": {shown} rows of token ids; {end}')

    def _names_of(self, base: ModelReference, source: WeightInfo) -> set[str]:
        """All names that a mask may have for a tensor of the target."""
        names = {source.name, *(source.aliases or ())}
        if any(name in (layout.shapes or layout.owned_names) for layout in self.layouts for name in names):
            return names  # Transformers takes half a second to tell its renamings
        return names | {self.checkpoint_of(base).parameter_name(name) for name in names}

    def _sources(self, task: Any) -> dict[ModelReference, WeightInfo]:
        """model -> which of its tensors goes into an output."""
        gather = getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)
        return dict(gather.weight_info.items())

    def _ties(self, model: ModelReference, files: MaskFiles | None = None) -> bool:
        """Whether a model's head is its embedding; Transformers asks the outer config of a vision-language model."""
        return bool(getattr(self.config_of(model), "tie_word_embeddings", False))

    def _header(self, model: ModelReference, source: WeightInfo) -> TensorHeader | None:
        """What a model has of a tensor; None if it lacks it."""
        key = (model, source.name)
        if key not in self.headers:
            stored = self.checkpoint_of(model).headers
            names = (source.name, *(source.aliases or ()), *(source.tied_names or ()))
            found = next((stored[name] for name in names if name in stored), None)
            self.headers[key] = found or self._converted(model, source.name)
        return self.headers[key]

    def _converted(self, model: ModelReference, name: str) -> TensorHeader | None:
        """The header that a tensor has once mergekit has converted it from an older layout."""
        checkpoint = self.checkpoint_of(model)
        if not can_convert_checkpoint_keys(self.config_of(model).model_type, set(checkpoint.headers), name):
            return None
        shape = checkpoint.shape(name)
        largest = max(checkpoint.headers.values(), key=lambda header: header.size)
        return None if shape is None else TensorHeader(largest.dtype, shape, CONVERTED)

    def config_of(self, model: ModelReference) -> Any:
        """A model's Transformers config."""
        return self.checkpoint_of(model).config

    def checkpoint_of(self, model: ModelReference) -> Checkpoint:
        """The model's files as mergekit's loader has opened them."""
        if model not in self.checkpoints:
            loader = LoaderCache().get(model)
            if isinstance(loader, HeaderLoader):
                self.checkpoints[model] = loader.checkpoint
            else:
                config = model.config(self.options.trust_remote_code)
                self.checkpoints[model] = Checkpoint(model, Path(loader.index.base_path), config)
        return self.checkpoints[model]


def _fits(axis: int, chosen: Any, shape: Sequence[int]) -> bool:
    return axis < len(shape) and tuple(chosen.shape) == channels_along(axis, shape, chosen.ndim)
