"""The settings of a run that is kept in a folder: written down, so that it goes on only with the same ones."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_act.files import write_atomically
from mergekit_act.wording import enumerate_some

__all__ = ["changed_settings", "has_settings", "keep_settings"]


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two settings, in words; empty if nothing does.

    Args:
        before: settings as they were read from JSON.
        now: settings that JSON can write.
    """
    old, new = dict(_flat(before)), dict(_flat(json.loads(json.dumps(now))))
    changed = [
        f"{name} was {_short(old.get(name, 'not there'))}, is {_short(new.get(name, 'not there'))}"
        for name in (*new, *(name for name in old if name not in new))
        if old.get(name, ...) != new.get(name, ...)
    ]
    return enumerate_some(changed, "; ", most=5)


def has_settings(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a JSON file holds these settings and no others."""
    try:
        return not changed_settings(json.loads(path.read_text(encoding="utf-8")), settings)
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def keep_settings(path: Path, settings: Mapping[str, Any]) -> bool:
    """See that a folder is of a run with these settings, or write them down.

    Args:
        path: a JSON file in the folder.
        settings: all that the folder's content depends on.

    Returns:
        Whether it was there already: the work goes on.

    Raises:
        ValueError: they are others, and what differs; or the file is none of settings.
    """
    if not path.exists():
        write_atomically(path, (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())
        return False
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = changed_settings(before, settings)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); say --overwrite to start anew") from error
    if changed:
        raise ValueError(
            f"{path.parent} is of a run with other settings: {changed}. Choose another folder, go on with the settings "
            "it had, or say --overwrite to start anew"
        )
    return True


def _short(value: Any) -> str:
    """A value for people: of a fingerprint the beginning."""
    text = str(value)
    return f"{text[:12]}…" if re.fullmatch(r"[0-9a-f]{64}", text) else text


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found
