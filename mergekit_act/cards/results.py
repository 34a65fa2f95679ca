"""Results of ``mergekit-act evaluate --json`` on a card: a table, and the Hub's ``model-index``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_act.cards.markdown import code, is_hub_dataset, link_dataset, plain, table

__all__ = ["Results", "read_results"]

_OURS = "(mergekit-act evaluate)"
_MEASURES = {
    "exact_match": "exact match of greedy answers",
    "nll": "negative log-likelihood per answer token",
}


class Results:
    """What was measured of a merged model, and of others on the same samples."""

    def __init__(self, content: Mapping[str, Any], name: str) -> None:
        self._results: Sequence[Mapping[str, Any]] = content["results"]
        self._abilities: Mapping[str, Mapping[str, Any]] = content["abilities"]
        self._versions: Mapping[str, str] = content["versions"]
        self._settings: Mapping[str, Any] = content["settings"]
        self._name = name

    def section(self) -> str:
        """Markdown: every model on every ability."""
        models = list(dict.fromkeys(result["model"] for result in self._results))
        abilities = list(dict.fromkeys(result["ability"] for result in self._results))
        by_key = {(result["model"], result["ability"]): result for result in self._results}
        titles = ["this model" if model == self._name else code(_short(model)) for model in models]
        parts = ["## Evaluation", ""]
        for measure, title in _MEASURES.items():
            if not any(result.get(measure) for result in self._results):
                continue
            rows = []
            for ability in abilities:
                found = [(by_key.get((model, ability)) or {}).get(measure) for model in models]
                first = next(result for result in self._results if result["ability"] == ability)
                data = link_dataset(self._abilities[ability])
                rows.append(
                    [
                        plain(ability),
                        plain(first["role"]),
                        data,
                        f"{first['samples']:,}",
                        *(_shown(measured) for measured in found),
                    ]
                )
            parts += [f"{title[0].upper()}{title[1:]}, with 95 % bootstrap intervals:", ""]
            parts += [table(["ability", "role", "data set", "held-out samples", *titles], rows, left=3), ""]
        made = ", ".join(plain(f"{name} {version}") for name, version in sorted(self._versions.items()))
        command = f"mergekit-act evaluate {' '.join(map(_short, models))} --abilities …"
        measured = f"{code(command)}, dtype {plain(self._settings.get('dtype'))}"
        return "\n".join([*parts, f"Measured by {measured} ({made})."])

    def add_to(self, index: Any, model_name: str) -> list[dict[str, Any]]:
        """A ``model-index`` with these results; results of an earlier run go, those of others stay.

        Args:
            index: the card's, or None.
            model_name: of the entry; one that has such results already keeps its name.

        Raises:
            ValueError: the card's is none.
        """
        if index is not None and not (isinstance(index, list) and all(isinstance(entry, dict) for entry in index)):
            raise ValueError("the card's model-index is no list of models; mend or remove it")
        entries = [dict(entry) for entry in index or []]
        own = next((entry for entry in entries if entry.get("name") == model_name or _has_ours(entry)), None)
        if own is None:
            own = {"name": model_name}
            entries.append(own)
        kept = [result for result in own.get("results") or [] if not _is_ours(result)]
        own["results"] = kept + [self._entry(result) for result in self._results if result["model"] == self._name]
        return entries

    def _entry(self, result: Mapping[str, Any]) -> dict[str, Any]:
        ability = str(result["ability"])
        data = self._abilities[ability]
        # The Hub's client takes a data set's type, config, split and revision for its identity, so the ability is in
        # the metric's name too.
        described = {"type": str(data.get("dataset", ability)), "name": ability}
        described |= {
            key: str(data[name])
            for key, name in (("config", "name"), ("split", "split"), ("revision", "revision"))
            if data.get(name) is not None
        }
        if not is_hub_dataset(data):
            described["type"] = ability
        metrics = [
            {"type": measure, "value": round(result[measure]["value"], 6), "name": f"{ability}: {title} {_OURS}"}
            for measure, title in _MEASURES.items()
            if result.get(measure)
        ]
        return {"task": {"type": "text-generation"}, "dataset": described, "metrics": metrics}


def read_results(path: Path, merged: Path, evaluated_as: str | None) -> Results:
    """Read what ``evaluate --json`` wrote and find the merged model in it.

    Args:
        path: the file.
        merged: the merged model's folder.
        evaluated_as: its name in the file; by default the one that leads to the folder, or has its name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, or the model is not in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; mergekit-act evaluate --json writes such a file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format_version"] != 1:
            raise ValueError(f"it has format version {content['format_version']!r}; this version reads 1")
        models = list(dict.fromkeys(result["model"] for result in content["results"]))
        found = [model for model in models if _is_it(model, merged, evaluated_as)]
        results = Results(content, found[0] if found else "")
        if found:
            results.section()
            results.add_to(None, "")
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        reason = f'"{error.args[0]}" is missing' if isinstance(error, KeyError) else str(error) or "it is incomplete"
        raise ValueError(f"{path} is not what mergekit-act evaluate --json writes: {reason}") from error
    if len(found) != 1:
        wanted = evaluated_as or str(merged)
        raise ValueError(
            f"{path} has {'no' if not found else 'several'} results of {wanted}; it has {', '.join(models)}. Say which "
            "with --evaluated-as"
        )
    return results


def _is_it(model: str, merged: Path, evaluated_as: str | None) -> bool:
    if evaluated_as is not None:
        return model == evaluated_as
    return Path(model).resolve() == merged.resolve()


def _has_ours(entry: Mapping[str, Any]) -> bool:
    results = entry.get("results")
    return any(map(_is_ours, results if isinstance(results, list) else []))


def _is_ours(result: Any) -> bool:
    metrics = result.get("metrics") if isinstance(result, dict) else None
    if not isinstance(metrics, list) or not metrics:
        return False
    return all(isinstance(metric, dict) and str(metric.get("name", "")).endswith(_OURS) for metric in metrics)


def _shown(measured: Mapping[str, Any] | None) -> str:
    if not measured:
        return ""
    low_high = measured.get("interval")
    interval = f" ({low_high[0]:.3f} to {low_high[1]:.3f})" if low_high else ""
    return f"{measured['value']:.3f}{interval}"


def _short(model: str) -> str:
    """A Hub id as it is, of a local path its last part."""
    return Path(model).name if model.startswith((".", "/", "~")) or Path(model).exists() else model
