"""What a merge config alone tells: misspelled parameters, missing files, settings that do not fit together."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from pydantic import BaseModel, ValidationError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mergekit_act.checkpoints import Checkpoint, read_config, read_headers
from mergekit_act.merging import find_mask_files
from mergekit_act.wording import enumerate_some, one_line, shorten
from mergekit_act.yaml_files import read_yaml

__all__ = [
    "config_problems",
    "file_problems",
    "layer_problems",
    "model_problems",
    "path_remarks",
    "plain",
    "read_merge_config",
    "value_problems",
]

_DTYPES = ("bfloat16", "float16", "float32", "float64")


def read_merge_config(path: str | Path) -> tuple[dict[str, Any], MergeConfiguration]:
    """Read a config for ``mergekit-yaml``.

    Returns:
        What is written, and what mergekit makes of it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no merge config.
        SeveralDocumentsError: it holds several, as for ``mergekit-multi``.
    """
    written = read_yaml(path, "merge config")
    try:
        return written, MergeConfiguration.model_validate(written)
    except ValidationError as error:
        raise ValueError(f"{path} is no merge config: {enumerate_some(value_problems(error), '; ')}") from error
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no merge config: {shorten(one_line(error), 1500)}") from error


def plain(config: Any) -> Any:
    """A config as plain data; mergekit's own way fails for models whose path has a space."""
    if isinstance(config, ModelReference):
        return str(config)
    if isinstance(config, BaseModel):
        return {name: plain(getattr(config, name)) for name in type(config).model_fields}
    if isinstance(config, Mapping):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [plain(value) for value in config]
    return config


def config_problems(config: Any, spec: Any) -> list[str]:
    """What is wrong with a config (as plain data) for a method of this spec, as far as it tells by itself."""
    problems = _unknown_parameters(config, spec) + _settings_of_the_target(config) + _missing_files(config)
    problems += _settings_without_a_fit(config)
    for key in ("dtype", "out_dtype"):
        if (config.get(key) or "float32").removeprefix("torch.") not in _DTYPES:
            problems.append(
                f'{key} "{config[key]}" is not one that models can be merged in; expected {", ".join(_DTYPES)}'
            )
    if config.get("base_model") is None:
        problems.append(f"{spec.name} needs base_model, the target; the config names none")
    return problems + _slices_without_the_target(config)


def value_problems(error: ValidationError) -> list[str]:
    """What is wrong with the values of a config, a sentence for each, as pydantic found it.

    A parameter may be of seven kinds, and pydantic tells of each why a value is none.
    """
    found: dict[str, str] = {}
    for detail in error.errors():
        loc = [str(part) for part in detail["loc"]]
        got = f"got {shorten(repr(detail['input']), 80)}"
        if "parameters" in loc[:-1]:
            place = loc.index("parameters") + 2
            where = ".".join(loc[:place])
            value = "null" if detail["input"] is None and len(loc) == place + 1 else got
            if value == "null":
                found[where] = f"{where} is null; give it a value or leave it out"
            else:
                expected = "expected a number, a text, a list of such (a gradient over layers), or filters with values"
                found.setdefault(where, f"{where} is nothing that a parameter can be; {expected}")
        else:
            where = ".".join(loc)
            missing = detail["type"] == "missing"
            found.setdefault(where, f"{where} is missing" if missing else f"{where}: {detail['msg']}, {got}")
    return list(found.values())


def model_problems(models: Iterable[ModelReference], options: Any) -> list[str]:
    """Models that are not there, are not whole, or differ in architecture."""
    problems = []
    architectures = {}
    for model in sorted(models, key=str):
        if model.lora is not None and Path(str(model)).exists():
            problems.append(
                f'"{model}" is a folder, but mergekit takes what stands behind "+" for a LoRA; write the model as a '
                f'mapping, {{model: {{path: "{model}"}}}}, or rename the folder'
            )
            continue
        try:
            config = read_config(model, trust_remote_code=options.trust_remote_code)
        except (OSError, ValueError) as error:
            problems.append(one_line(error))
        else:
            if config.architectures:
                architectures[model] = " ".join(config.architectures)
            else:
                likely = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "its class")
                problems.append(
                    f'config.json of {model} has no "architectures", by which mergekit knows models; add '
                    f'"architectures": ["{likely}"]'
                )
            problems += _broken_files(model) + _unusable_lora(model, options)
    if len(set(architectures.values())) > 1 and not options.allow_crimes:
        shown = ", ".join(f"{model} is {name}" for model, name in architectures.items())
        problems.append(f"the models differ in architecture: {shown}; ACT needs models of one backbone")
    return problems


def path_remarks(paths: Iterable[str]) -> list[str]:
    """Local folders that mergekit takes for repositories on the Hub while it writes the card, after the merge."""
    return [
        f'"{path}" could be a Hub id; mergekit asks the Hub after the merge, which fails offline. Write "./{path}"'
        for path in paths
        if path.count("/") < 2 and path[:1] not in tuple("./~")
    ]


def _unusable_lora(model: ModelReference, options: Any) -> list[str]:
    """Why a model's LoRA can't be merged into it."""
    if model.lora is None:
        return []
    folder = Path(model.lora.path)
    problems = [] if options.lora_merge_cache else [f"{model} has a LoRA; say --lora-merge-cache FOLDER"]
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        problems.append(f"{folder} has no adapter_config.json; expected a LoRA as PEFT saves it")
    elif not folder.exists() and model.lora.path.startswith((".", "/", "~")):
        problems.append(f"{folder} does not exist (relative to {os.getcwd()}); expected a LoRA or a Hub id")
    return problems


def file_problems(config: Any) -> list[str]:
    """Weight files of a ``mergekit-pytorch`` config that are not there or not whole."""
    problems = []
    for path in dict.fromkeys([config.base_model, *(model.model for model in config.models)]):
        if path is not None and not Path(path).is_file():
            problems.append(f"{path} is no file (relative to {os.getcwd()}); expected a weight file")
        elif path is not None:
            try:
                read_headers(Path(path))
            except ValueError as error:
                problems.append(str(error))
    return problems


def layer_problems(config: Any, options: Any) -> list[str]:
    """Slices that reach beyond a model's layers."""
    problems = []
    modules = [module.slices for module in (config.modules or {}).values()] if config.modules else [config.slices]
    sources = [source for slices in modules for part in slices or () for source in part.sources]
    for source in sources:
        layers = getattr(source.model.config(options.trust_remote_code).get_text_config(), "num_hidden_layers", None)
        last = source.layer_range[1]
        if layers is not None and last > layers and len(modules) == 1:
            problems.append(f"layer_range {list(source.layer_range)} of {source.model}: it has {layers} layers")
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
    for key, setting in _parameters(config):
        listed = setting if isinstance(setting, list) else []
        if key == "mask" and any(isinstance(item, str) for item in listed):
            problems.append(
                "mask is a list, which mergekit takes for a gradient over layers; write the files in one text, "
                f'separated by commas: "{", ".join(map(str, listed))}"'
            )
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"expected {', '.join(known)}"
            problems.append(f'merge method {spec.name} has no parameter "{key}" ({hint})')
    return problems


def _settings_without_a_fit(config: Any) -> list[str]:
    """How rows are fitted, where none are."""
    given = {key for key, _ in _parameters(config)}
    idle = sorted(given & {"fit_keep", "fit_ridge"}) if "fit" not in given else []
    return [f'{key} has no effect without "fit", the file of inputs' for key in idle]


def _missing_files(config: Any) -> list[str]:
    """Masks and inputs that a config names anywhere and that do not exist."""
    problems = []
    named = [(key, text) for key, value in _parameters(config) if key in ("mask", "fit") for text in _texts(value)]
    for key, text in named:
        try:
            find_mask_files(text, key)
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error))
    return problems


def _settings_of_the_target(config: Any, base: Any = None) -> list[str]:
    """A mask on the target's own entry, anywhere, would be passed over without a word."""
    if isinstance(config, list):
        return [problem for item in config for problem in _settings_of_the_target(item, base)]
    if not isinstance(config, Mapping):
        return []
    base = config.get("base_model") or base
    settings = config.get("parameters") if base is not None and config.get("model") == base else None
    return [
        *(f"{base} is the base_model, the target; it takes no {key}" for key in settings or ()),
        *(problem for value in config.values() for problem in _settings_of_the_target(value, base)),
    ]


def _slices_without_the_target(config: Mapping[str, Any]) -> list[str]:
    """mergekit adds the target to ``models:`` by itself, but not to the sources of slices."""
    listed = {"slices": config.get("slices")} | {
        f"modules.{name}.slices": (module or {}).get("slices") for name, module in (config.get("modules") or {}).items()
    }
    problems = []
    for where, slices in listed.items():
        for place, part in enumerate(slices or ()):
            base = config.get("base_model")
            if part.get("base_model") not in (None, base):
                problems.append(f"{where}[{place}] has another base_model than the config; ACT merges into one target")
            elif base is not None and base not in [source["model"] for source in part["sources"]]:
                problems.append(
                    f"{where}[{place}] lacks the base_model {base} among its sources; add it with its layer_range"
                )
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
