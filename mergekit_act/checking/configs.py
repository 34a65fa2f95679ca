"""What a merge config alone tells: misspelled parameters, missing files, settings that do not fit together."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from mergekit.common import ModelReference, dtype_from_name

from mergekit_act.checkpoints import Checkpoint, read_config
from mergekit_act.merging import find_mask_files, load_mask_files

__all__ = ["MergeConfigError", "config_problems", "model_problems", "setting_problems"]

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


def config_problems(config: Any, spec: Any) -> list[str]:
    """What is wrong with a config (as plain data) for a method of this spec, as far as it tells by itself."""
    return _unknown_parameters(config, spec) + _settings_of_the_target(config) + _missing_files(config)


def model_problems(config: Any, options: Any) -> list[str]:
    """Models of a config that are not there, are not whole, or differ in architecture."""
    problems = []
    architectures = {}
    for model in sorted(config.referenced_models(), key=str):
        try:
            names = read_config(str(model), trust_remote_code=options.trust_remote_code).architectures
        except (OSError, ValueError) as error:
            problems.append(" ".join(str(error).split()))
        else:
            architectures[model] = " ".join(names or ())
            problems += _broken_files(model)
        path = model.model.path
        if os.path.exists(path) and path.count("/") < 2 and path[0] not in "./~":
            LOG.warning(
                '"%s" could be a Hub id; mergekit asks the Hub after the merge, which fails offline. Write "./%s"',
                path,
                path,
            )
    if config.base_model is None and config.models:
        problems.append(f"{config.merge_method} needs base_model, the target; the config names none")
    for key in ("dtype", "out_dtype"):
        try:
            dtype_from_name(getattr(config, key))
        except RuntimeError:
            problems.append(f'{key} "{getattr(config, key)}" is not known; expected bfloat16, float16 or float32')
    if len(set(architectures.values())) > 1 and not options.allow_crimes:
        shown = ", ".join(f"{model} is {name}" for model, name in architectures.items())
        problems.append(f"the models differ in architecture: {shown}; ACT needs models of one backbone")
    return problems


def _broken_files(model: ModelReference) -> list[str]:
    """Why a local model's weight files can't be read; others are not there yet."""
    folder = Path(model.model.path)
    if folder.is_dir():
        try:
            _ = Checkpoint(model, folder, None).headers
        except (OSError, ValueError) as error:
            return [str(error)]
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


def _missing_files(config: Any) -> list[str]:
    """Mask files that a config names anywhere and that do not exist."""
    problems = []
    for text in (text for key, value in _parameters(config) if key == "mask" for text in _texts(value)):
        try:
            find_mask_files(text)
        except FileNotFoundError as error:
            problems.append(str(error))
    return problems


def setting_problems(model: str, setting: Any, density: Any) -> list[str]:
    """Why a model's ``mask`` and ``mask_density`` can't be loaded together, if so."""
    if setting is None:
        return []
    try:
        load_mask_files(setting, density)
    except (ValueError, OSError) as error:
        return [f"{model}: {error}"]
    return []


def _settings_of_the_target(config: Any) -> list[str]:
    """A mask on the target's own entry would be passed over without a word."""
    base = config.get("base_model")
    return [
        f"{base} is the base_model, the target; it takes no {key}"
        for entry in config.get("models") or ()
        if entry["model"] == base
        for key in entry.get("parameters") or ()
    ]


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
