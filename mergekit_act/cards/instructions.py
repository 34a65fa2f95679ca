"""How the masks of a merge are made again from data: abilities files, commands, versions."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mergekit_act.artifacts import Inputs, Mask
from mergekit_act.cards.markdown import Source
from mergekit_act.cards.masks import MaskFile
from mergekit_act.criteria import WITHOUT_DATA
from mergekit_act.data.schema import AbilitiesFile, Ability
from mergekit_act.versions import installed_versions
from mergekit_act.wording import escape

__all__ = ["Instructions", "requirements", "shell_line"]


def shell_line(words: Sequence[str]) -> str:
    r"""A command on one line, for bash and zsh; control characters are written out.

    >>> print(shell_line(["echo", "two words", "two\nlines"]))
    echo 'two words' $'two\nlines'
    """
    return " ".join(shlex.quote(word) if word == escape(word) else _written_out(word) for word in words)


def _written_out(word: str) -> str:
    return "$'" + escape(word.replace("\\", "\\\\").replace("'", "\\'")) + "'"


def requirements() -> list[str]:
    """What pip installs to have the versions that are installed here."""
    versions = installed_versions("mergekit", "torch", "transformers")
    return [f"{name}=={version.partition('+')[0]}" for name, version in versions.items()]


@dataclass
class _ProfileCall:
    """Profiles that one call of ``mergekit-act profile`` makes.

    Attributes:
        head: the abilities file but for its abilities.
        options: of the command.
        abilities: name -> settings; empty for profiles without data.
        kept: which of them are to be kept.
        inputs: whether it keeps inputs.
    """

    head: dict[str, Any]
    options: list[str]
    abilities: dict[str, Any] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    inputs: bool = False


class Instructions:
    """How masks are made again, as far as they say how they were made.

    Attributes:
        files: name -> abilities file.
        local: models, data and chat templates that are no Hub ids, as the files name them.
    """

    def __init__(
        self,
        masks: Sequence[MaskFile],
        target: str = "",
        ability_models: Sequence[str] = (),
        fits: Mapping[str, Inputs] | None = None,
    ) -> None:
        """Find the profiles that masks were made of.

        Args:
            masks: as they lie in the merge's folder.
            target: the merge's; a profile's target of the same name is written likewise.
            ability_models: the merge's, likewise.
            fits: the files of inputs that rows are fitted to, as they lie in the merge's folder -> what they hold.
        """
        self._masks = {mask.copy: mask.artifact for mask in masks}
        self._models = {"target": _by_name([target]), "ability_model": _by_name(ability_models)}
        self._runs: list[_ProfileCall] = []
        self._run_of: dict[str, int] = {}
        self.local: list[str] = []
        for mask in masks:
            for source in mask.sources:
                self._add(source)
                for profile in _retained(source):
                    self._runs[self._add(profile)].kept.add(str(profile.get("ability")))
        self._fits = {
            copy: self._add_inputs(inputs, [str(target), *map(str, ability_models[:1])])
            for copy, inputs in (fits or {}).items()
            if any(said.get("data") for said in inputs.roles.values())  # or it does not say how it was made
        }
        self._folders = _numbered("profiles", "", len(self._runs))
        with_data = [run for run in self._runs if run.abilities]
        self.files = dict(
            zip(_numbered("abilities", ".yml", len(with_data)), map(_abilities_file, with_data), strict=True)
        )
        self._file_of = dict(zip(map(id, with_data), self.files, strict=True))

    def commands(self, *flags: str) -> str:
        """The commands, a line each; empty if the masks do not say.

        Args:
            flags: more options of ``mergekit-act profile``.
        """
        lines = []
        for run, folder in zip(self._runs, self._folders, strict=True):
            if not run.abilities and "--criterion" not in run.options:
                continue  # an older mask does not say how its profiles were made
            # The criteria without data need the two models and nothing else of the file.
            file = next((self._file_of[id(other)] for other in (run, *self._runs) if self._serves(other, run)), None)
            if file is None:
                lines.append(["#", "ABILITIES.yml:", "any", "abilities", "file", "of", *run.head.values()])
            kept = ["--inputs"] if run.inputs else []
            lines.append(["mergekit-act", "profile", file or "ABILITIES.yml", folder, *run.options, *kept, *flags])
        if any(not isinstance(mask, Mask) for mask in self._masks.values()):
            lines.append(["mkdir", "-p", "masks"])
        for path, mask in self._masks.items():
            if not isinstance(mask, Mask):
                lines.append(["cp", self._profile(mask.described()), path])
            elif mask.sources:
                lines.append(self._mask_command(path, mask))
        if self._fits:
            lines.append(["mkdir", "-p", "fit"])
        lines += [["cp", f"{self._folders[place]}/fit/inputs.safetensors", copy] for copy, place in self._fits.items()]
        return "\n".join(escape(" ".join(line)) if line[0] == "#" else shell_line(line) for line in lines)

    def _serves(self, other: _ProfileCall, run: _ProfileCall) -> bool:
        """Whether another run's abilities file is of the same two models."""
        return id(other) in self._file_of and all(other.head[role] == run.head[role] for role in self._models)

    def _add(self, source: Source) -> int:
        """Put a profile into the run that made it, or may have; says which one."""
        data = source.get("data") or {}
        head: dict[str, Any] = {role: self._reference(role, source.get(role) or {}) for role in self._models}
        settings: dict[str, Any] = {}
        if source.get("criterion") not in WITHOUT_DATA and "dataset" in data:
            head |= {key: data[key] for key in AbilitiesFile.model_fields if key in data}
            settings = _settings(data)
        options, name = _options(source), str(source.get("ability"))
        fits = (
            place
            for place, run in enumerate(self._runs)
            if run.head == head and run.options == options and run.abilities.get(name, settings) == settings
        )
        place = next(fits, len(self._runs))
        if place == len(self._runs):
            self._runs.append(_ProfileCall(head, options))
        if settings:
            self._take(place, name, data)
        self._run_of[_key(source)] = place
        return place

    def _take(self, place: int, name: str, data: Mapping[str, Any]) -> None:
        self._runs[place].abilities[name] = _settings(data)
        self.local += [data["dataset"]] if not data.get("on_hub") else []
        self.local += [data["chat_template"]] if data.get("chat_template") else []

    def _add_inputs(self, inputs: Inputs, models: Sequence[str]) -> int:
        """Have a run keep inputs: one that has some of their abilities, if there is one; says which one.

        Which tokens are taken depends on the order of a role's abilities.
        """
        data = {name: one for said in inputs.roles.values() for name, one in said.get("data", {}).items()}
        settings = {name: _settings(one) for name, one in data.items()}

        def serves(run: _ProfileCall) -> bool:
            common = settings.keys() & run.abilities.keys()
            return bool(common) and all(run.abilities[name] == settings[name] for name in common)

        place = next((place for place, run in enumerate(self._runs) if serves(run)), len(self._runs))
        if place == len(self._runs):
            head: dict[str, Any] = dict(zip(self._models, models, strict=False))
            common: Mapping[str, Any] = next(iter(data.values()), {})
            head |= {key: common[key] for key in AbilitiesFile.model_fields if key in common}
            self._runs.append(_ProfileCall(head, []))
        run = self._runs[place]
        others, run.abilities = run.abilities, {}
        for name, one in data.items():
            self._take(place, name, one)
        run.abilities |= {name: own for name, own in others.items() if name not in data}
        run.kept |= set(inputs.roles.get("keep", {}).get("abilities", ()))
        run.kept -= set(inputs.roles.get("recover", {}).get("abilities", ()))
        run.inputs = True
        return place

    def _mask_command(self, path: str, mask: Mask) -> list[str]:
        """The command that made a mask: its sources share all settings."""
        first = mask.sources[0]
        command = ["mergekit-act", "mask", *(self._profile(source) for source in mask.sources), "-o", path]
        command += ["--density", str(first.get("density"))]
        for glob in first.get("exclude") or ():
            command += ["--exclude", glob]
        retain = first.get("retain") or {}
        for other in retain.get("abilities") or ():
            command += ["--retain", self._profile(other)]
        for option in ("ranking", "strength", "density") if retain else ():
            unused = option == "strength" and retain.get("ranking") != "difference"
            if retain.get(option) is not None and not unused:
                command += [f"--retain-{option}", str(retain[option])]
        return command

    def _profile(self, source: Source) -> str:
        return f"{self._folders[self._run_of[_key(source)]]}/{source.get('ability')}.safetensors"

    def _reference(self, role: str, model: Mapping[str, Any]) -> str:
        """As a reference of mergekit; a local model as the merge's config names it."""
        name, revision = str(model.get("model")), model.get("revision")
        if not revision:
            reference = self._models[role].get(name, f"./{name}")
            self.local.append(reference)
            return reference
        base, plus, lora = name.partition("+")
        return f"{base}@{revision}{plus}{lora}"


def _by_name(references: Sequence[str]) -> dict[str, str]:
    """The name under which a profile knows a local model -> its reference, where no two have it."""
    names = ["+".join(Path(part).name for part in reference.split("+")) for reference in references]
    return {name: one for name, one in zip(names, references, strict=True) if names.count(name) == 1}


def _numbered(stem: str, suffix: str, count: int) -> list[str]:
    return [f"{stem}{f'-{place + 1}' if place else ''}{suffix}" for place in range(count)]


def _abilities_file(run: _ProfileCall) -> str:
    abilities = {name: {"role": "keep"} | own if name in run.kept else own for name, own in run.abilities.items()}
    return yaml.safe_dump(run.head | {"abilities": abilities}, sort_keys=False, allow_unicode=True, width=100)


def _settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """What an abilities file says of an ability whose data were resolved; what is a default is left out."""
    defaults = {key: one.get_default(call_default_factory=True) for key, one in Ability.model_fields.items()}
    return {key: data[key] for key in defaults if key in data and data[key] != defaults[key]}


def _key(source: Source) -> str:
    """What tells profiles apart."""
    return repr([source.get(name) for name in ("ability", "criterion", "target", "ability_model", "dtype", "data")])


def _options(source: Source) -> list[str]:
    data = source.get("data") or {}
    options = [part for glob in data.get("exclude") or () for part in ("--exclude", glob)]
    criterion = str(source.get("criterion"))
    if criterion in WITHOUT_DATA:
        seed = ["--random-seed", str(data["random_seed"])] if "random_seed" in data else []
        return ["--criterion", criterion, *seed, *options]
    if criterion in ("local", "attribution"):
        options = ["--criterion", criterion, *options]
    if data.get("points", 1) != 1:
        options += ["--points", str(data["points"])]
    centered = bool(data.get("center_logits"))
    if centered != (criterion == "local") and criterion != "attribution":
        options.append("--center-logits" if centered else "--no-center-logits")
    if "batch_tokens" in data:
        options += ["--batch-tokens", str(data["batch_tokens"])]
    return ["--dtype", str(source["dtype"]), *options] if source.get("dtype") else options


def _retained(source: Source) -> Sequence[Source]:
    """The profiles of the abilities that were spared when another was ranked."""
    return (source.get("retain") or {}).get("abilities") or ()
