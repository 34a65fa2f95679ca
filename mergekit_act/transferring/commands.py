"""The commands of a transfer, each with what it reads and writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mergekit_act.channels import channel_layout
from mergekit_act.checkpoints import parse_reference, read_config
from mergekit_act.transferring.plan import DENSITIES, TransferPlan
from mergekit_act.transferring.steps import Step

__all__ = ["list_steps", "upload", "what_is_left_out"]


def list_steps(plan: TransferPlan) -> Iterator[Step]:
    """In the order in which they are taken."""
    commands = _Commands(plan)
    yield commands.profile()
    yield commands.sweep() if plan.swept else commands.mask()
    yield commands.merge()
    if plan.settings.finetune:
        yield commands.card(name="card before")  # the tuned model's takes over what it says of the transfer
        yield commands.finetune()
    yield commands.evaluate()
    yield commands.card(plan.evaluation)
    if plan.settings.finetune:
        yield commands.card_of_tuned()
    if not what_is_left_out():
        yield commands.report()


def what_is_left_out() -> str | None:
    """A sentence on steps that this installation cannot take."""
    if find_spec("matplotlib") is not None:
        return None
    return 'The report is left out, it needs matplotlib: pip install "mergekit-act[plots]"'


def upload(plan: TransferPlan) -> Step | None:
    """The last step, if there is one: a result that is worth it goes to the Hub."""
    if not plan.settings.push_to_hub:
        return None
    words = ("hf", "upload", plan.settings.push_to_hub, str(plan.result), "--private")
    return Step("upload", words, (plan.result, plan.result / "README.md"), ())


class _Commands:
    """Makes the steps of a plan."""

    def __init__(self, plan: TransferPlan) -> None:
        self.plan, self.out, s = plan, plan.out, plan.settings
        self.models = (plan.target, plan.ability_model)
        self.weights = [path for model in self.models for path in _paths_of(model)]
        abilities = plan.file.abilities.values()
        self.data = [*(one.dataset for one in abilities), *filter(None, (plan.file.chat_template,))]
        self.held_out = [*self.data, *filter(None, (one.evaluate.dataset for one in abilities))]
        self.profiles = tuple(plan.profiles.values())
        self.made = (*self.profiles, plan.inputs) if plan.fitted else self.profiles

        self.trust: tuple[str, ...] = ("--trust-remote-code",) if s.trust_remote_code else ()
        self.trust += ("--lora-merge-cache", s.lora_merge_cache) if s.lora_merge_cache else ()
        self.device = ("--device", s.device) if s.device else ()
        self.dtype = ("--dtype", s.dtype) if s.dtype else ()
        self.batch = ("--batch-tokens", s.batch_tokens) if s.batch_tokens != 4096 else ()

    def profile(self) -> Step:
        s = self.plan.settings
        excluded = tuple(word for module in self._vocabulary() for word in ("--exclude", module))
        memory = ("--memory-budget", f"{s.memory_budget / 1e6:.12g}MB") if s.memory_budget else ()  # changes no profile
        words = (self.plan.path, self.out / "profiles", "--criterion", s.criterion)
        words += (*(("--inputs",) if self.plan.fitted else ()), *excluded)
        words += (*self.device, *self.dtype, *self.batch, *self.trust)
        reads = (*self.data, *self.weights)
        return _ours("profile", words, reads, self.made, again="ends", content=self._profiled(), aside=memory)

    def sweep(self) -> Step:
        config, abilities, folder = self.out / "merge.yml", self.out / "choose.yml", self.out / "sweep"
        words: tuple[Any, ...] = (config, abilities, folder)
        words += tuple(word for density in DENSITIES for word in ("--density", density))
        words += ("--fit", self.plan.inputs) if self.plan.fitted else ()
        words += (*self.device, *self.batch, *self.trust)
        reads = (config, abilities, *self.made, *self.held_out, *self.weights)
        chooses = ("--keep-within", f"{self.plan.settings.keep_within:g}")
        return _ours("sweep", words, reads, (self.plan.config,), again="resumes", more=chooses)

    def mask(self) -> Step:
        out = self.out / "mask.safetensors"
        words = (*self.plan.recovered, "-o", out, "--density", self.plan.settings.density)
        return _ours("mask", words, self.profiles, (out,))

    def merge(self) -> Step:
        plan = self.plan
        reads: tuple[str | Path, ...] = (plan.config, *self.made, self.out / "mask.safetensors", *self.weights)
        words = ("mergekit-yaml", str(plan.config), str(plan.merged), *self.trust)
        return Step("merge", words, reads, (plan.merged / "config.json",))

    def finetune(self) -> Step:
        plan = self.plan
        words = (plan.merged, plan.path, plan.tuned, *self.device, *self.dtype, *self.trust)
        reads, made = (plan.merged, *self.data), (plan.tuned / "config.json",)
        return _ours("finetune", words, reads, made, again="resumes", content=self._profiled())

    def evaluate(self) -> Step:
        plan = self.plan
        results = (plan.merged, plan.tuned) if plan.settings.finetune else (plan.merged,)
        words = (*self.models, *results, "--abilities", plan.measured, "--json", plan.evaluation)
        words += (*self.device, *self.dtype, *self.batch, *self.trust)
        reads = (plan.measured, *self.held_out, *self.weights, *results)
        return _ours("evaluate", words, reads, (plan.evaluation,))

    def card(self, *evaluation: Path, name: str = "card") -> Step:
        plan = self.plan
        words = (plan.merged, *(("--evaluation", *evaluation) if evaluation else ()), *self.trust)
        made = tuple(plan.merged / name for name in ("README.md", "reproduce.json"))
        return _ours("card", words, (plan.config, plan.merged, *evaluation), made, again="resumes", name=name)

    def card_of_tuned(self) -> Step:
        plan = self.plan
        words, reads = (plan.tuned, "--evaluation", plan.evaluation), (plan.evaluation, plan.tuned)
        return _ours("card", words, reads, (plan.tuned / "README.md",), again="resumes", name="card of tuned")

    def report(self) -> Step:
        folder = self.out / "report"
        return _ours("report", (*self.profiles, "-o", folder), self.profiles, (folder / "report.html",))

    def _profiled(self) -> dict[str, Any]:
        """The abilities file without what is held out."""
        content = self.plan.file.model_dump(mode="json")
        for own in content["abilities"].values():
            del own["evaluate"]
        return content

    def _vocabulary(self) -> Sequence[str]:
        """The head and the embedding, whose rows and columns would crowd out the layers."""
        if self.plan.settings.criterion == "activation":
            return ()
        trust = self.plan.settings.trust_remote_code
        config = read_config(self.plan.file.target, trust_remote_code=trust)
        return channel_layout(config, trust_remote_code=trust).vocabulary_modules


def _paths_of(model: str) -> Iterator[str]:
    """Of a reference such as ``model+lora``."""
    parsed = parse_reference(model)
    yield from (part.path for part in (parsed.model, parsed.lora) if part is not None)


def _ours(
    command: str, words: Sequence[Any], reads: Sequence[Any], writes: Sequence[Path], *, name: str = "", **more: Any
) -> Step:
    return Step(name or command, ("mergekit-act", command, *map(str, words)), reads, writes, **more)
