"""What a merge config alone tells: misspelled parameters, missing files, settings that do not fit together."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from mergekit_act.merging import find_mask_files, load_mask_files

__all__ = ["MergeConfigError", "missing_files", "setting_problems", "unknown_parameters"]


class MergeConfigError(click.ClickException, ValueError):
    """A merge that would fail or do something else than it says; mergekit's commands print it and exit with 1."""

    def __init__(self, problems: Sequence[str]) -> None:
        shown = sorted(set(problems))
        if len(shown) == 1:
            super().__init__(shown[0])
        else:
            more = [f"… and {len(shown) - 10} more"] if len(shown) > 10 else []
            super().__init__("\n  - ".join([f"{len(shown)} problems:", *shown[:10], *more]))


def unknown_parameters(config: Any, spec: Any) -> list[str]:
    """mergekit ignores parameters that a method does not have; so a misspelled one would do nothing, in silence."""
    known = [parameter.name for parameter in spec.parameters]
    problems = []
    for key, _ in _parameters(config):
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"expected {', '.join(known)}"
            problems.append(f'merge method {spec.name} has no parameter "{key}" ({hint})')
    return problems


def missing_files(config: Any) -> list[str]:
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
        return [f'{model} has no "mask"; name a mask or profile in its parameters']
    try:
        load_mask_files(setting, density)
    except (ValueError, OSError) as error:
        return [f"{model}: {error}"]
    return []


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
