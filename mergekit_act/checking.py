"""The planner seam: what can be known before the first tensor is read is checked here, all problems in one message.

A merge method sees one tensor at a time and only the output's name. mergekit's planners know the rest: which source
tensor of which model becomes which output. Right after a planner has planned a merge with one of our methods, the
plan is checked as a whole, and each tensor's ``mask`` setting is replaced by what the masks select of that tensor.
"""

from __future__ import annotations

import difflib
import functools
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ImmutableMap, ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.registry import get

from mergekit_act import merging
from mergekit_act.checkpoints import Checkpoint, TensorHeader
from mergekit_act.merging import MaskFiles, TensorSelection, find_mask_files, is_ours, load_mask_files

__all__ = ["MergeConfigError", "wrap_flat_planner", "wrap_merge", "wrap_planner"]

LOG = logging.getLogger(__name__)


class MergeConfigError(click.ClickException, ValueError):
    """A merge that would fail or do something else than it says; mergekit's commands print it and exit with 1."""

    def __init__(self, problems: Sequence[str]) -> None:
        shown = sorted(set(problems))
        if len(shown) == 1:
            super().__init__(shown[0])
        else:
            more = [f"… and {len(shown) - 10} more"] if len(shown) > 10 else []
            super().__init__("\n  - ".join([f"{len(shown)} problems:", *shown[:10], *more]))


def wrap_merge() -> None:
    """Complete ``mergekit.merge``: what a config alone tells is checked before models are fetched."""
    module: Any = sys.modules["mergekit.merge"]
    get_architecture_info = module.get_architecture_info

    @functools.wraps(get_architecture_info)
    def checked_architecture(config: Any, options: Any) -> Any:
        if not is_ours(config.merge_method):
            return get_architecture_info(config, options)
        written = config.model_dump(mode="json")
        problems = _unknown_parameters(written, get(config.merge_method).spec)
        for key, value in _parameters(written):
            problems += [problem for text in _texts(value) for problem in _missing_files(text)] if key == "mask" else []
        kinds = {m: m.config(options.trust_remote_code).architectures for m in config.referenced_models()}
        if len({tuple(names or ()) for names in kinds.values()}) > 1 and not options.allow_crimes:
            shown = ", ".join(sorted(f"{model} is {' '.join(names or ())}" for model, names in kinds.items()))
            problems.append(f"the models differ in architecture: {shown}; ACT needs models of one backbone")
        if problems:
            raise MergeConfigError(problems)
        return get_architecture_info(config, options)

    module.get_architecture_info = checked_architecture


def wrap_planner() -> None:
    """Complete ``mergekit.plan.MergePlanner``: check and resolve plans that use one of our methods."""
    planner = sys.modules["mergekit.plan"].MergePlanner
    if not hasattr(planner, "_plan"):
        merging.refuse_to_run("mergekit.plan.MergePlanner has no method _plan")
        return
    plan = planner._plan

    @functools.wraps(plan)
    def checked_plan(self: Any) -> None:
        if not is_ours(self.config.merge_method):
            plan(self)
            return
        try:
            plan(self)
        except Exception as error:  # what mergekit says of a wrong value comes as many kinds of error
            raise MergeConfigError([f"mergekit cannot plan this merge: {error}"]) from error
        check = _PlanCheck(self.config, self.options)
        self._tensors = [(weight, check.resolve(weight, task)) for weight, task in self._tensors]
        check.finish()

    planner._plan = checked_plan


def wrap_flat_planner() -> None:
    """Complete ``mergekit.scripts.merge_raw_pytorch``: check its configs that use one of our methods."""
    module: Any = sys.modules["mergekit.scripts.merge_raw_pytorch"]
    if not hasattr(module, "plan_flat_merge"):
        merging.refuse_to_run("mergekit.scripts.merge_raw_pytorch has no function plan_flat_merge")
        return
    plan = module.plan_flat_merge

    @functools.wraps(plan)
    def checked_plan(config: Any, *args: Any, **kwargs: Any) -> Any:
        if is_ours(config.merge_method):
            problems = _unknown_parameters(config.model_dump(mode="json"), get(config.merge_method).spec)
            for model in config.models:
                if model.model != config.base_model:
                    settings = {**(config.parameters or {}), **(model.parameters or {})}
                    problems += _setting_problems(model.model, settings.get("mask"), settings.get("mask_density"))
            if problems:
                raise MergeConfigError(problems)
        return plan(config, *args, **kwargs)

    module.plan_flat_merge = checked_plan


@dataclass
class _PlanCheck:
    """Walks a plan once, collecting problems."""

    config: Any
    options: Any
    problems: list[str] = field(default_factory=list)
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
        for model in self.models:
            if not any(key[0] == model for key in self.masks):
                self.problems.append(f'{model} has no "mask"; name a mask or profile in its parameters')
            for base in self.bases:
                if _ties(self._config(base)) and not _ties(self._config(model)):
                    self.problems.append(
                        f"{base} ties its head to its embedding and {model} does not; there is no one matrix to "
                        "transfer to. Untie the target first"
                    )
        for (model, setting, _), files in self.masks.items():
            if files is None:
                continue
            names = {m: [n for n, _ in files.layout.parameters[m]] for m in files.channels}
            for module, owned in names.items():
                if not any(tied in self.outputs for name in owned for tied in files.layout.tied_names(name)):
                    self.problems.append(f'mask "{setting}" of {model}: no output tensor matches module "{module}"')
        if self.problems:
            raise MergeConfigError(self.problems)
        self._tell_other_pairs()

    def _mask_files(self, model: ModelReference, setting: str | None, density: float | None) -> MaskFiles | None:
        if setting is None:
            return None
        key = (model, setting, density)
        if key not in self.masks:
            self.masks[key] = None
            problems = _setting_problems(str(model), setting, density)
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
            if header is not None and length != _channels_along(axis, header.shape):
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
                self.problems.append(
                    f'{model} has no tensor "{source.name}", which mergekit expects of this architecture; '
                    "task_arithmetic cannot merge it either"
                )
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


def _channels_along(axis: int, shape: Sequence[int]) -> int:
    if axis >= len(shape):
        return 0
    return shape[axis] * (shape[0] if len(shape) == 3 else 1)


def _ties(config: Any) -> bool:
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def _names(source: Any) -> set[str]:
    return {source.name, *(source.aliases or ())}


def _setting_problems(model: str, setting: Any, density: Any) -> list[str]:
    if setting is None:
        return [f'{model} has no "mask"; name a mask or profile in its parameters']
    try:
        load_mask_files(setting, density)
    except (ValueError, OSError) as error:
        return [f"{model}: {error}"]
    return []


def _unknown_parameters(config: Any, spec: Any) -> list[str]:
    """mergekit ignores parameters that a method does not have; so a misspelled one would do nothing, in silence."""
    known = [parameter.name for parameter in spec.parameters]
    problems = []
    for key, _ in _parameters(config):
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"expected {', '.join(known)}"
            problems.append(f'merge method {spec.name} has no parameter "{key}" ({hint})')
    return problems


def _parameters(config: Any) -> Iterator[tuple[str, Any]]:
    """Every (parameter, setting) anywhere in a config."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key == "parameters" and isinstance(value, Mapping):
                yield from value.items()
            else:
                yield from _parameters(value)
    elif isinstance(config, list):
        for item in config:
            yield from _parameters(item)


def _texts(setting: Any) -> Iterator[str]:
    """The strings of a setting: itself, a gradient's, a filter's values."""
    if isinstance(setting, str):
        yield setting
    elif isinstance(setting, Mapping):
        yield from _texts(setting.get("value"))
    elif isinstance(setting, list):
        for item in setting:
            yield from _texts(item)


def _missing_files(setting: str) -> list[str]:
    try:
        find_mask_files(setting)
    except FileNotFoundError as error:
        return [str(error)]
    return []
