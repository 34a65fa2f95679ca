"""A merge plan, walked once: are all tensors there, do the masks fit them, and what do they select of each?"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ImmutableMap, ModelReference
from mergekit.io.tasks import LoaderCache

from mergekit_act.checking.configs import MergeConfigError, setting_problems
from mergekit_act.checkpoints import Checkpoint, TensorHeader
from mergekit_act.merging import MaskFiles, TensorSelection, load_mask_files

__all__ = ["PlanCheck"]

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
    checkpoints: dict[ModelReference, Checkpoint] = field(default_factory=dict)

    def resolve(self, weight: Any, task: Any) -> Any:
        """The task with each model's mask setting replaced by what it selects of this tensor."""
        gather = getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)
        sources: dict[ModelReference, Any] = dict(gather.weight_info.items())
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
                self.problems.append(f'{model} has no "mask"; name a mask or profile in its parameters')
            for base in self.bases:
                if _ties(self._config(base)) and not _ties(self._config(model)):
                    self.problems.append(
                        f"{base} ties its head to its embedding and {model} does not; there is no one matrix to "
                        "transfer to. Untie the target first"
                    )
        for model, names in self.missing.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            self.problems.append(
                f"{model} has no tensor {', '.join(names[:3])}{more}, which mergekit expects of this architecture; its "
                "other methods cannot merge this checkpoint either"
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
        if _ties(self._config(base)):
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
            length = chosen.numel()
            if header is not None and length != _channels_along(axis, header.shape, chosen.ndim):
                shown = ", ".join(map(str, files.files))
                self.problems.append(
                    f'mask {shown} has {length} channels for "{weight.name}"; the target\'s tensor is '
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
        rows = {}
        for model, source in sources.items():
            header = self._header(model, source)
            if header is not None and weight.vocabulary_axis is not None and header.shape:
                rows[model] = header.shape[weight.vocabulary_axis]
            if header is None and not weight.optional and not self._convertible(model, source):
                self.missing.setdefault(model, []).append(f'"{source.name}"')
        aligned = self.config.tokenizer is not None or self.config.tokenizer_source is not None
        if len(set(rows.values())) > 1 and not aligned and not self.options.unsafe_truncate_embeddings:
            shown = ", ".join(f"{model} has {count}" for model, count in rows.items())
            self.problems.append(
                f'vocabularies of "{weight.name}" differ: {shown} rows. Add "tokenizer: {{source: base}}" to the config'
            )

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


def _channels_along(axis: int, shape: Sequence[int], dimensions: int) -> int:
    """Number of channels of a tensor; a mask of two dimensions is one of experts, which come first."""
    if axis >= len(shape):
        return 0
    return shape[axis] * (shape[0] if dimensions == 2 else 1)


def _ties(config: Any) -> bool:
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def _names(source: Any) -> set[str]:
    return {source.name, *(source.aliases or ())}
