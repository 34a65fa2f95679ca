"""The commands of a transfer, the files between them, and what is to be known before the first of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from mergekit_act.abilities import AbilitiesFile, Tokenizers
from mergekit_act.channels import channel_layout
from mergekit_act.checkpoints import parse_reference, read_config
from mergekit_act.devices import default_dtype, usable_device
from mergekit_act.evaluation import collect_held_out
from mergekit_act.files import write_atomically
from mergekit_act.logs import muted
from mergekit_act.selection import validate_density
from mergekit_act.sweeping import Grid
from mergekit_act.transferring.needs import estimate_needs, estimate_seconds
from mergekit_act.transferring.parts import check_apart, split_held_out
from mergekit_act.transferring.steps import Step
from mergekit_act.wording import escape, show_bytes, show_seconds
from mergekit_act.yaml_files import read_yaml

__all__ = ["TransferPlan", "TransferSettings"]


_DENSITIES = (0.01, 0.05, 0.2, 0.5)


@dataclass(frozen=True)
class TransferSettings:
    """How an ability is transferred.

    Attributes:
        criterion: by which channels are scored.
        density: of each profile; None lets a sweep choose, as for the weight.
        weight: on the changes.
        keep_within: share of the likelihood of a kept answer token that the sweep's choice may lose.
        finetune: whether the merged model is fine-tuned on the profiled samples.
        push_to_hub: the repository that the result is uploaded to; None for none.
        device: where models run; None takes the accelerator if there is one.
        dtype: in which they are profiled and evaluated; None as the commands choose.
        batch_tokens: tokens in a micro-batch.
        memory_budget: bytes of the device's memory that profiling may use.
        lora_merge_cache: folder for merged models, for references of the form ``model+lora``.
        trust_remote_code: allow the models' own code from the Hub.
    """

    criterion: str = "attribution"
    density: float | None = None
    weight: float | None = None
    keep_within: float = 0.05
    finetune: bool = False
    push_to_hub: str | None = None
    device: str | None = None
    dtype: str | None = None
    batch_tokens: int = 4096
    memory_budget: int | None = None
    lora_merge_cache: str | None = None
    trust_remote_code: bool = False


class TransferPlan:
    """The steps, and the files between them.

    Args:
        path: of the abilities file.
        file: its content.
        out: folder for everything.
        settings: how.

    Attributes:
        target: the target, as the commands name it.
        ability_model: likewise.
        config: the merge config that is merged.
        merged: the merged model.
        tuned: that one, fine-tuned.
        result: the one of both that is wanted.
    """

    def __init__(self, path: Path, file: AbilitiesFile, out: Path, settings: TransferSettings) -> None:
        self.path, self.file, self.out, self.settings = path, file, out, settings
        self.target, self.ability_model = map(_unmistakable, (file.target, file.ability_model))
        self.swept = settings.density is None
        # Fitting rows spares what is kept where many move; whether that is better here, the sweep finds out.
        kept = any(one.role == "keep" for one in file.abilities.values())
        self.fitted = self.swept and kept and settings.criterion == "attribution"
        self.inputs = out / "profiles" / "fit" / "inputs.safetensors"
        self.profiles = {name: out / "profiles" / f"{name}.safetensors" for name in file.abilities}
        self.recovered = [self.profiles[name] for name, one in file.abilities.items() if one.role == "recover"]
        self.config = out / "sweep" / "best.yml" if self.swept else out / "merge.yml"
        self.measured = out / "measure.yml" if self.swept else path
        self.merged, self.tuned = out / "merged", out / "tuned"
        self.result = self.tuned if settings.finetune else self.merged

    def check(self) -> None:
        """What would fail after hours is told now."""
        if (self.settings.density is None) != (self.settings.weight is None):
            raise ValueError("density and weight go together: give both, or neither to let a sweep choose")
        if self.settings.density is not None:
            validate_density(self.settings.density)
        if not self.recovered:
            raise ValueError(f'{self.path}: no ability has "role: recover", so there is nothing to transfer')
        if _places_of(self.target) == _places_of(self.ability_model):
            raise ValueError(f"{self.path}: target and ability_model are the same model")
        if self.settings.finetune and find_spec("trl") is None:
            raise ValueError('fine-tuning needs TRL: pip install "mergekit-act[finetune]"')
        for model in (self.target, self.ability_model):
            read_config(model, trust_remote_code=self.settings.trust_remote_code)
        parts = split_held_out(self.file, read_yaml(self.path, "abilities file"))
        tokenizers = Tokenizers(self.target, self.ability_model, self.settings.trust_remote_code)
        with muted("mergekit_act"):  # the steps tell what there is to tell
            choose, measure = (collect_held_out(AbilitiesFile(**part), tokenizers) for part in parts)
            for one in (*choose, *measure):
                one.check(generate=True)
        if self.swept:
            check_apart(choose, measure)
        self._parts = parts
        s = self.settings
        self.needs = estimate_needs(
            self.file, finetune=s.finetune, lora_merge_cache=s.lora_merge_cache, trust=s.trust_remote_code
        )
        existing = next(folder for folder in (self.out, *self.out.resolve().parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        if self.needs.disk > free and not self.merged.exists():
            raise OSError(
                f"{escape(existing)} has {show_bytes(free)} free, and {show_bytes(self.needs.disk)} are needed; choose "
                "another place"
            )

    def describe_needs(self) -> str:
        """Time, memory and disk, for people."""
        s = self.settings
        choose, measure = (AbilitiesFile.model_validate(part) for part in self._parts)
        seconds = estimate_seconds(
            self.needs,
            (self.file, choose, measure),
            points=len(Grid(densities=_DENSITIES).points(1)) * (2 if self.fitted else 1) if self.swept else 0,
            finetune=s.finetune,
            criterion=s.criterion,
            device=s.device,
            dtype=s.dtype,
            trust=s.trust_remote_code,
        )
        device = usable_device(s.device)
        width = (getattr(torch, s.dtype) if s.dtype else default_dtype(device)).itemsize
        minutes = ", ".join(f"{name} {show_seconds(value)}" for name, value in seconds.items() if value)
        lines = [
            f"time: about {show_seconds(sum(seconds.values()))} on {device} ({minutes}), and what loading models and "
            "generating answers takes",
            f"memory: {show_bytes(self.needs.parameters * width)} for the target in a sweep and an evaluation; a "
            "profile takes what is free, down to a layer of both models",
            f"disk: {show_bytes(self.needs.disk)}",
        ]
        return "\n".join([*lines, *self.needs.remarks])

    def write_inputs(self) -> None:
        """Files that the steps read and nobody else writes."""
        _write_yaml(self.out / "choose.yml", self._parts[0])
        _write_yaml(self.out / "measure.yml", self._parts[1])
        own: dict[str, Any] = {"weight": 1.0 if self.swept else self.settings.weight}
        own["mask"] = ",".join(map(str, self.recovered)) if self.swept else str(self.out / "mask.safetensors")
        own |= {"mask_density": 0.01} if self.swept else {}
        models = [{"model": self.ability_model, "parameters": own}]
        config = {"merge_method": "act", "base_model": self.target, "models": models}
        _write_yaml(self.out / "merge.yml", config)

    def steps(self) -> Iterator[Step]:
        """In the order in which they are taken."""
        s, out, models = self.settings, self.out, (self.target, self.ability_model)
        weights = [path for model in models for path in _paths_of(model)]
        data = [one.dataset for one in self.file.abilities.values()]
        data += [self.file.chat_template] if self.file.chat_template else []
        held_out = [*data, *filter(None, (one.evaluate.dataset for one in self.file.abilities.values()))]
        trust: tuple[str, ...] = ("--trust-remote-code",) if s.trust_remote_code else ()
        trust += ("--lora-merge-cache", s.lora_merge_cache) if s.lora_merge_cache else ()
        device = ("--device", s.device) if s.device else ()
        batch = ("--batch-tokens", s.batch_tokens) if s.batch_tokens != 4096 else ()
        dtype = ("--dtype", s.dtype) if s.dtype else ()
        profiles = tuple(self.profiles.values())

        excluded = tuple(word for module in self._vocabulary() for word in ("--exclude", module))
        memory = ("--memory-budget", f"{s.memory_budget / 1e9:.12g}GB") if s.memory_budget else ()
        inputs = ("--inputs",) if self.fitted else ()
        words = ("profile", self.path, out / "profiles", "--criterion", s.criterion, *inputs, *excluded)
        words += (*device, *dtype, *batch, *memory, *trust)
        made = (*profiles, self.inputs) if self.fitted else profiles
        yield _ours("profile", words, (*data, *weights), made, again="ends", content=self._profiled())
        if self.swept:
            words = ("sweep", out / "merge.yml", out / "choose.yml", out / "sweep")
            words += tuple(word for density in _DENSITIES for word in ("--density", density))
            words += ("--fit", self.inputs) if self.fitted else ()
            reads: tuple[Any, ...] = (out / "merge.yml", out / "choose.yml", *made, *held_out, *weights)
            words += (*device, *batch, *trust)
            chooses = ("--keep-within", f"{s.keep_within:g}")
            yield _ours("sweep", words, reads, (out / "sweep" / "sweep.csv",), again="resumes", chooses=chooses)
        else:
            words = ("mask", *self.recovered, "-o", out / "mask.safetensors", "--density", s.density)
            yield _ours("mask", words, profiles, (out / "mask.safetensors",))
        merge = ("mergekit-yaml", str(self.config), str(self.merged), *trust)
        reads = (self.config, *made, out / "mask.safetensors", *weights)
        yield Step("merge", merge, reads, (self.merged / "config.json",))
        found, results = out / "evaluation.json", (self.merged, *((self.tuned,) if s.finetune else ()))
        made = tuple(self.merged / name for name in ("README.md", "reproduce.json"))
        if s.finetune:  # whose card takes over what this one says of the transfer
            yield _ours("card", ("card", self.merged, *trust), (self.config, self.merged), made, again="resumes")
            words = ("finetune", self.merged, self.path, self.tuned, *device, *dtype, *trust)
            reads, tuned = (self.merged, *data), (self.tuned / "config.json",)
            yield _ours("finetune", words, reads, tuned, again="ends", content=self._profiled())
        words = ("evaluate", *models, *results, "--abilities", self.measured, "--json", found)
        words += (*device, *dtype, *batch, *trust)
        yield _ours("evaluate", words, (self.measured, *held_out, *weights, *results), (found,))
        if s.finetune:
            words, made = ("card", self.tuned, "--evaluation", found), (self.tuned / "README.md",)
            yield _ours("card of tuned", words, (found, self.tuned), made, again="resumes")
        else:
            words = ("card", self.merged, "--evaluation", found, *trust)
            yield _ours("card", words, (self.config, found, self.merged), made, again="resumes")
        if find_spec("matplotlib") is not None:
            words = ("report", *profiles, "-o", out / "report")
            yield _ours("report", words, profiles, (out / "report" / "report.html",))

    def upload(self) -> Step | None:
        """The last step, if there is one: a result that is worth it goes to the Hub."""
        if not self.settings.push_to_hub:
            return None
        words = ("hf", "upload", self.settings.push_to_hub, str(self.result), "--private")
        return Step("upload", words, (self.result, self.result / "README.md"), ())

    def _profiled(self) -> dict[str, Any]:
        """The abilities file without what is held out."""
        content = self.file.model_dump(mode="json")
        for own in content["abilities"].values():
            del own["evaluate"]
        return content

    def _vocabulary(self) -> Sequence[str]:
        """The head and the embedding, whose rows and columns would crowd out the layers."""
        if self.settings.criterion == "activation":
            return ()
        trust = self.settings.trust_remote_code
        config = read_config(self.file.target, trust_remote_code=trust)
        return channel_layout(config, trust_remote_code=trust).vocabulary_modules


def _unmistakable(model: str) -> str:
    """A folder's name that mergekit cannot take for one of the Hub."""
    return f"./{model}" if Path(model).is_dir() and not model.startswith((".", "/")) else model


def _places_of(model: str) -> list[str]:
    """What tells a reference from another one, however its folders are written."""
    parsed = parse_reference(model)
    parts = [part for part in (parsed.model, parsed.lora) if part is not None]
    return [str(Path(one.path).resolve()) if Path(one.path).is_dir() else repr(one) for one in parts]


def _paths_of(model: str) -> Iterator[str]:
    """Of a reference such as ``model+lora``."""
    parsed = parse_reference(model)
    yield from (part.path for part in (parsed.model, parsed.lora) if part is not None)


def _ours(name: str, words: Sequence[Any], reads: Sequence[Any], writes: Sequence[Path], **more: Any) -> Step:
    return Step(name, ("mergekit-act", *map(str, words)), reads, writes, **more)


def _write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text.encode(), overwrite=True)
