"""The steps of a transfer: profile, sweep or mask, merge, evaluate, card and report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from mergekit_act.abilities import AbilitiesFile, load_abilities
from mergekit_act.channels import channel_layout
from mergekit_act.checkpoints import parse_reference, read_config
from mergekit_act.files import check_writable, write_atomically
from mergekit_act.report.listings import head_module
from mergekit_act.runs.folders import claimed
from mergekit_act.transfer.judgement import judge, list_results
from mergekit_act.transfer.needs import estimate_needs
from mergekit_act.transfer.parts import split_held_out
from mergekit_act.transfer.steps import Echo, Run, Step, Steps
from mergekit_act.wording import escape, show_bytes
from mergekit_act.yaml_files import read_yaml

__all__ = ["Transfer", "TransferSettings", "run_transfer"]


@dataclass(frozen=True)
class TransferSettings:
    """How an ability is transferred.

    Attributes:
        criterion: by which channels are scored.
        density: of each profile; None lets a sweep choose, as for the weight.
        weight: on the changes.
        keep_within: share of the likelihood of a kept answer token that the sweep's choice may lose.
        finetune: whether the merged model is fine-tuned on the profiled samples.
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
    device: str | None = None
    dtype: str | None = None
    batch_tokens: int = 4096
    memory_budget: int | None = None
    lora_merge_cache: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Transfer:
    """What a transfer left.

    Attributes:
        model: folder of the result; None if no point of the sweep recovers anything within the limit.
        evaluation: what ``evaluate --json`` writes.
        results: the table of it.
        judgement: a sentence.
    """

    model: Path | None
    evaluation: Mapping[str, Any]
    results: str
    judgement: str


def run_transfer(
    path: Path, out: Path, settings: TransferSettings, *, run: Run, echo: Echo, plan_only: bool = False
) -> Transfer | None:
    """Take the whole path; what an earlier run has done on the same files is not done again.

    Args:
        path: the abilities file.
        out: folder for everything.
        settings: how.
        run: runs a command, given its words.
        echo: prints a line.
        plan_only: print the commands, and run none.

    Returns:
        What came of it; None if it was only planned.

    Raises:
        FileNotFoundError: the file, a model or a data set does not exist.
        BlockingIOError: another transfer is at work in the folder.
        OSError: the disk is too small.
        ValueError: the models are one, there are too few held-out rows, or the folder is of another pair.
    """
    file = load_abilities(path)
    planned = _Plan(path, file, out, settings)
    planned.check()
    if plan_only:
        for step in planned.steps():
            echo(f"$ {step}")
        return None
    check_writable(out)
    with claimed(out / "transfer.json"):
        _claim(out, file)
        planned.write_inputs()
        steps = Steps(out / "transfer.json", run, echo)
        for step in planned.steps():
            if step.name == "merge" and not planned.config.exists():
                break  # no point of the sweep is good enough
            steps.take(step)
    return planned.result()


class _Plan:
    """The steps, and the files between them."""

    def __init__(self, path: Path, file: AbilitiesFile, out: Path, settings: TransferSettings) -> None:
        self.path, self.file, self.out, self.settings = path, file, out, settings
        self.swept = settings.density is None
        self.profiles = {name: out / "profiles" / f"{name}.safetensors" for name in file.abilities}
        self.recovered = [self.profiles[name] for name, one in file.abilities.items() if one.role == "recover"]
        self.config = out / "sweep" / "best.yml" if self.swept else out / "merge.yml"
        self.measured = out / "measure.yml" if self.swept else path
        self.merged, self.tuned = out / "merged", out / "tuned"

    def check(self) -> None:
        """What would fail after hours is told now."""
        if (self.settings.density is None) != (self.settings.weight is None):
            raise ValueError("density and weight go together: give both, or neither to let a sweep choose")
        if not self.recovered:
            raise ValueError(f'{self.path}: no ability has "role: recover", so there is nothing to transfer')
        target, ability_model = (parse_reference(model) for model in (self.file.target, self.file.ability_model))
        if target == ability_model:
            raise ValueError(f"{self.path}: target and ability_model are the same model")
        if self.settings.finetune and find_spec("trl") is None:
            raise ValueError('fine-tuning needs TRL: pip install "mergekit-act[finetune]"')
        self._parts = split_held_out(self.file, read_yaml(self.path, "abilities file"))
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

    def write_inputs(self) -> None:
        """Files that the steps read and nobody else writes."""
        _write_yaml(self.out / "choose.yml", self._parts[0])
        _write_yaml(self.out / "measure.yml", self._parts[1])
        own: dict[str, Any] = {"weight": 1.0 if self.swept else self.settings.weight}
        own["mask"] = ",".join(map(str, self.recovered)) if self.swept else str(self.out / "mask.safetensors")
        own |= {"mask_density": 0.01} if self.swept else {}
        models = [{"model": self.file.ability_model, "parameters": own}]
        config = {"merge_method": "act", "base_model": self.file.target, "models": models}
        _write_yaml(self.out / "merge.yml", config)

    def steps(self) -> Iterator[Step]:
        """In the order in which they are taken."""
        s, out, target, ability_model = self.settings, self.out, self.file.target, self.file.ability_model
        models, data = (target, ability_model), [one.dataset for one in self.file.abilities.values()]
        trust: tuple[str, ...] = ("--trust-remote-code",) if s.trust_remote_code else ()
        trust += ("--lora-merge-cache", s.lora_merge_cache) if s.lora_merge_cache else ()
        device = ("--device", s.device) if s.device else ()
        batch = ("--batch-tokens", s.batch_tokens) if s.batch_tokens != 4096 else ()
        dtype = ("--dtype", s.dtype) if s.dtype else ()
        profiles = tuple(self.profiles.values())

        excluded = tuple(word for module in self._outer_modules() for word in ("--exclude", module))
        memory = ("--memory-budget", s.memory_budget) if s.memory_budget else ()
        words = ("profile", self.path, out / "profiles", "--criterion", s.criterion, *excluded)
        words += (*device, *dtype, *batch, *memory, *trust)
        yield _ours("profile", words, (*data, *models), profiles, resumes=True, content=self._profiled())
        if self.swept:
            words = ("sweep", out / "merge.yml", out / "choose.yml", out / "sweep", "--keep-within", s.keep_within)
            reads: tuple[Any, ...] = (out / "merge.yml", out / "choose.yml", *profiles, *data, *models)
            words += (*device, *batch, *trust)
            yield _ours("sweep", words, reads, (out / "sweep" / "sweep.csv",), resumes=True)
        else:
            words = ("mask", *self.recovered, "-o", out / "mask.safetensors", "--density", s.density)
            yield _ours("mask", words, profiles, (out / "mask.safetensors",))
        merge = ("mergekit-yaml", str(self.config), str(self.merged), *trust)
        reads = (self.config, *self.recovered, out / "mask.safetensors", *models)
        yield Step("merge", merge, reads, (self.merged / "config.json",))
        if s.finetune:
            words = ("finetune", self.merged, self.path, self.tuned, *device[:2], *dtype, *trust)
            reads, tuned = (self.merged, *data), (self.tuned / "config.json",)
            yield _ours("finetune", words, reads, tuned, resumes=True, content=self._profiled())
        found, results = out / "evaluation.json", (self.merged, *((self.tuned,) if s.finetune else ()))
        words = ("evaluate", *models, *results, "--abilities", self.measured, "--json", found)
        words += (*device, *dtype, *batch, *trust)
        yield _ours("evaluate", words, (self.measured, *data, *models, *results), (found,))
        words = ("card", self.merged, "--evaluation", found, *trust)
        yield _ours("card", words, (self.config, found), (self.merged / "README.md",), resumes=True)
        if find_spec("matplotlib") is not None:
            words = ("report", *profiles, "-o", out / "report")
            yield _ours("report", words, profiles, (out / "report" / "report.html",))

    def _profiled(self) -> dict[str, Any]:
        """The abilities file without what is held out."""
        content = self.file.model_dump(mode="json")
        for own in content["abilities"].values():
            del own["evaluate"]
        return content

    def _outer_modules(self) -> list[str]:
        """The head and the embedding: what they own moves all tokens, and crowds out the layers."""
        trust = self.settings.trust_remote_code
        layout = channel_layout(read_config(self.file.target, trust_remote_code=trust), trust_remote_code=trust)
        head = head_module(layout)
        if head is None or self.settings.criterion == "activation":
            return []
        shape = (layout.shapes or {})[layout.parameters[head][0][0]]
        owned = {module: [(layout.shapes or {})[name] for name, _ in own] for module, own in layout.parameters.items()}
        return [module for module, shapes in owned.items() if shape in shapes]

    def result(self) -> Transfer:
        """What the steps have left."""
        if not self.config.exists():
            words = "No point of the sweep recovers anything within the limit: there is nothing to publish."
            return Transfer(None, {}, "", words)
        evaluation = json.loads((self.out / "evaluation.json").read_text(encoding="utf-8"))
        last = self.tuned if self.settings.finetune else self.merged
        names = {self.file.target: "target", self.file.ability_model: "ability model", str(self.merged): "merged"}
        names |= {str(self.tuned): "tuned"} if self.settings.finetune else {}
        judgement = judge(evaluation, self.file.target, self.file.ability_model, str(last))
        return Transfer(last, evaluation, list_results(evaluation, names), judgement)


def _ours(name: str, words: Sequence[Any], reads: Sequence[Any], writes: Sequence[Path], **more: Any) -> Step:
    return Step(name, ("mergekit-act", *map(str, words)), reads, writes, **more)


def _write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text.encode(), overwrite=True)


def _claim(out: Path, file: AbilitiesFile) -> None:
    """See that a folder is of a transfer between these models, or of none.

    Raises:
        FileExistsError: it has files of something else.
        ValueError: it is of another pair.
    """
    before = out / "merge.yml"
    if not (out / "transfer.json").exists():
        if any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise FileExistsError(f"{escape(out)} has files of something else; name another folder")
        return
    written = yaml.safe_load(before.read_text(encoding="utf-8")) if before.exists() else {}
    own = (file.target, file.ability_model)
    if written and (written["base_model"], written["models"][0]["model"]) != own:
        raise ValueError(
            f"{escape(out)} is of a transfer from {written['models'][0]['model']} into {written['base_model']}; name "
            "another folder"
        )
