"""A merge plan, walked once: are all tensors there, do the masks fit them, and what do they select of each?"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ImmutableMap, ModelReference
from mergekit.io.tasks import LoaderCache

from mergekit_act.checking.configs import MergeConfigError, setting_problems
from mergekit_act.checkpoints import Checkpoint, TensorHeader, read_headers
from mergekit_act.merging import MaskFiles, TensorSelection, channels_along, load_mask_files

__all__ = ["FlatPlanCheck", "PlanCheck"]

LOG = logging.getLogger(__name__)


@dataclass
class PlanCheck:
    """Walks a plan once, collecting problems."""

    config: Any
    options: Any
    problems: list[str] = field(default_factory=list)
    missing: dict[ModelReference, list[str]] = field(default_factory=dict)
    masks: dict[tuple[ModelReference, str, float | None], MaskFiles | None] = field(default_factory=dict)
    outputs: set[str] = field(default_factory=set)
    bases: set[ModelReference] = field(default_factory=set)
    models: set[ModelReference] = field(default_factory=set)
    unweighted: set[ModelReference] = field(default_factory=set)
    checkpoints: dict[ModelReference, Checkpoint] = field(default_factory=dict)

    def resolve(self, weight: Any, task: Any) -> Any:
        """The task with each model's mask setting replaced by what it selects of this tensor."""
        sources = self._sources(task)
        base = task.base_model
        self.bases.add(base)
        self.outputs |= _names(sources[base])
        self._check_presence(weight, sources)
        parameters = dict(task.input_parameters.items())
        for model in task.model_order:
            if model == base:
                continue
            self.models.add(model)
            settings = dict(parameters[model].items())
            if settings["weight"] is None:
                self.unweighted.add(model)
            files = self._mask_files(model, settings["mask"], settings["mask_density"])
            settings["mask"] = self._select(weight, sources, base, model, files) if files else None
            parameters[model] = ImmutableMap(settings)
        return task.model_copy(update={"input_parameters": ImmutableMap(parameters)})

    def finish(self) -> None:
        """Raise all problems, or tell what is worth telling.

        Raises:
            MergeConfigError: there are problems.
        """
        self._check_models()
        self._check_matches()
        if self.problems:
            raise MergeConfigError(self.problems)
        self._tell_other_pairs()

    def _check_models(self) -> None:
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
            f"{model} has no tensor {names}, which mergekit expects of this architecture; its other methods cannot "
            "merge this checkpoint either"
        )

    def _check_matches(self) -> None:
        """Every module that a mask selects has to be somewhere in the output."""
        for (model, setting, _), files in self.masks.items():
            if files is None:  # could not be loaded, which is told already
                continue
            for module in files.channels:
                names = [tied for name, _ in files.layout.parameters[module] for tied in files.layout.tied_names(name)]
                if not self.outputs & set(names):
                    self.problems.append(f'mask "{setting}" of {model}: no output tensor matches module "{module}"')

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
        self,
        weight: Any,
        sources: Mapping[ModelReference, Any],
        base: ModelReference,
        model: ModelReference,
        files: MaskFiles,
    ) -> TensorSelection | None:
        names = {weight.name, *(weight.aliases or ())} if weight.name == sources[base].name else set()
        names |= _names(sources[base])
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
        header = self._header(base, sources[base])
        for axis, chosen in selection.slices.items():
            fits = header is None or axis < len(header.shape)
            if header is not None and fits:
                fits = tuple(chosen.shape) == channels_along(axis, header.shape, chosen.ndim)
            if header is not None and not fits:
                shown = ", ".join(map(str, files.files))
                self.problems.append(
                    f'mask {shown} has {chosen.numel()} channels for "{weight.name}"; the target\'s tensor is '
                    f"{list(header.shape)} (axis {axis}). Profile this pair again with mergekit-act profile"
                )
            if axis == weight.vocabulary_axis:
                self._check_vocabulary(weight)
        return selection

    def _check_vocabulary(self, weight: Any) -> None:
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

    def _check_presence(self, weight: Any, sources: Mapping[ModelReference, Any]) -> None:
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
            if header is None and not weight.optional and not self._convertible(model, source):
                self.missing.setdefault(model, []).append(f'"{source.name}"')
        if any(shape != next(iter(shapes.values())) for shape in shapes.values()):
            shown = ", ".join(f"{shape} in {model}" for model, shape in shapes.items())
            self.problems.append(f'"{weight.name}" is {shown}; ACT needs models of one backbone')
        if len(set(rows.values())) > 1:
            self._check_lengths(weight, rows)

    def _check_lengths(self, weight: Any, rows: Mapping[ModelReference, int]) -> None:
        aligned = self.config.tokenizer is not None or self.config.tokenizer_source is not None
        if not aligned and not self.options.unsafe_truncate_embeddings:
            shown = ", ".join(f"{model} has {count}" for model, count in rows.items())
            self.problems.append(
                f'vocabularies of "{weight.name}" differ: {shown} rows. Add "tokenizer: {{source: base}}" to the config'
            )

    def _sources(self, task: Any) -> dict[ModelReference, Any]:
        """model -> which of its tensors goes into an output."""
        gather = getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)
        return dict(gather.weight_info.items())

    def _ties(self, model: ModelReference, _files: MaskFiles | None = None) -> bool:
        return bool(getattr(self._config(model).get_text_config(), "tie_word_embeddings", False))

    def _convertible(self, model: ModelReference, source: Any) -> bool:
        keys = set(self._checkpoint(model).headers)
        return bool(can_convert_checkpoint_keys(self._config(model).model_type, keys, source.name))

    def _header(self, model: ModelReference, source: Any) -> TensorHeader | None:
        headers = self._checkpoint(model).headers
        names = (source.name, *(source.aliases or ()), *(source.tied_names or ()))
        return next((headers[name] for name in names if name in headers), None)

    def _config(self, model: ModelReference) -> Any:
        return self._checkpoint(model).config

    def _checkpoint(self, model: ModelReference) -> Checkpoint:
        """The model's files as mergekit's loader has opened them."""
        if model not in self.checkpoints:
            folder = Path(LoaderCache().get(model).index.base_path)
            self.checkpoints[model] = Checkpoint(model, folder, model.config(self.options.trust_remote_code))
        return self.checkpoints[model]

    def _tell_other_pairs(self) -> None:
        for (model, setting, _), files in self.masks.items():
            for base in self.bases:
                here = (self._checkpoint(base).fingerprint, self._checkpoint(model).fingerprint)
                if files is not None and any(None not in pair and pair != here for pair in files.pairs):
                    LOG.warning(
                        'mask "%s" was made from another pair of models than %s and %s; it is used as it is',
                        setting, base, model,
                    )  # fmt: skip


class FlatPlanCheck(PlanCheck):
    """The same for the plans of ``mergekit-pytorch``: each model is one weight file, and there is no config."""

    def _sources(self, task: Any) -> dict[ModelReference, Any]:
        return {model: WeightInfo(name=load.tensor_name) for model, load in task.gather_tensors.tensors.items()}

    def _ties(self, model: ModelReference, files: MaskFiles | None = None) -> bool:
        """A file that holds one of the names that a mask's model ties holds the matrix of both."""
        groups = files.layout.tied if files is not None else ()
        return any(len(set(group) & set(self._checkpoint(model).headers)) == 1 for group in groups)

    def _convertible(self, model: ModelReference, source: Any) -> bool:
        return False

    def find_left_out(self) -> None:
        """mergekit-pytorch plans the tensors of the listed models only; what just the target has would be lost."""
        for base in self.bases:
            left_out = sorted(set(self._checkpoint(base).headers) - self.outputs)
            if left_out:
                self.problems.append(
                    f"{len(left_out)} tensors of {base} are in no ability model and would be left out, such as "
                    f'"{left_out[0]}"; say --tensor-intersection if that is meant'
                )

    def _missing_sentence(self, model: ModelReference, names: str) -> str:
        return f"{model} has no tensor {names}, which another model has; say --tensor-intersection to leave it out"

    def _checkpoint(self, model: ModelReference) -> Checkpoint:
        if model not in self.checkpoints:
            file = Path(model.model.path)
            self.checkpoints[model] = _WeightFile(model, file.parent, None, file.name)
        return self.checkpoints[model]

    def _tell_other_pairs(self) -> None:
        """A weight file has no fingerprint that a profile would know."""


@dataclass(frozen=True)
class _WeightFile(Checkpoint):
    """A checkpoint that is one file."""

    file: str = ""

    @cached_property
    def headers(self) -> Mapping[str, TensorHeader]:
        """Name -> header of every stored tensor."""
        return read_headers(self.folder / self.file)


def _names(source: Any) -> set[str]:
    return {source.name, *(source.aliases or ())}
