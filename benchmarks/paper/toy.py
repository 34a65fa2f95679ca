"""The setting `toy`: the demo's invented languages, and tiny models that are trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from experiment import Experiment, Setting
from transformers import AutoModelForCausalLM

from mergekit_act.demo.tasks import DOMAINS, LANGUAGES, all_rows
from mergekit_act.demo.training import build_model, build_tokenizer, train
from mergekit_act.finetuning import Recipe

__all__ = ["make_setting"]

KEPT = ("latin", "greek")  # the target is trained on mathematics in these
PROFILED = 32
RECIPE = Recipe(epochs=10, learning_rate=2e-4, micro_batch=16, gradient_checkpointing=False, dtype="float32")
STEPS = {"base": 850, "ability": 80, "target": 300, "early": 400, "specialist": 150}
ABOUT = f"""Models of 0.8 M parameters in four invented languages and three domains (`mergekit-act demo`). From one
base, five times, with rows in other orders: an ability model that is good at all, and a target that was trained on
mathematics in two languages until it had forgotten the rest. To be recovered are facts in four languages, to be kept
mathematics in two; the others are logic in four and mathematics in the other two languages. The base was trained on
all rows, those of the test too: this is about what a model remembers. The specialists of table 4 are a base that
knows little of all three domains, trained on one each. Of each ability {PROFILED} samples are profiled; the
fine-tuning is ten epochs of those, with the learning rate 2e-4."""


def make_setting(folder: Path, *, quick: bool) -> Setting:
    """Train what is missing; a quick setting has one seed, models that know little, and no fine-tuning."""
    steps = {name: 2 if quick else count for name, count in STEPS.items()}
    tokenizer, rows = build_tokenizer(), all_rows()
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(vars(row), ensure_ascii=False) for row in rows]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if not (folder / "base").exists():
        base = build_model(tokenizer, rope_theta=1_000_000.0)
        train(base, tokenizer, rows, range(steps["base"]), learning_rate=3e-3, seed=0)
        _save(base, tokenizer, folder / "base")
    recipe = None if quick else RECIPE
    made = [_make(folder, seed, steps, recipe) for seed in range(1 if quick else 5)]
    return Setting(
        name="toy",
        about=ABOUT,
        experiments=tuple(made),
        specialists=_make_specialists(folder, steps),
        pairs=tuple(_pairs(folder, steps)),
        exclude=("lm_head", "model.embed_tokens"),
    )


def _make(folder: Path, seed: int, steps: dict[str, int], recipe: Recipe | None) -> Experiment:
    """An ability model and a target: the base, trained on all and on little, in the order that the seed says."""
    tokenizer, rows = build_tokenizer(), all_rows()
    target, ability = f"target-{seed}", f"ability-{seed}"
    if not (folder / target).exists():
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        _save(_forgetful(base, tokenizer, "math", steps["target"], seed=2 * seed + 1), tokenizer, folder / target)
    if not (folder / ability).exists():
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        train(base, tokenizer, rows, range(steps["ability"]), learning_rate=5e-4, seed=2 * seed + 2)
        _save(base, tokenizer, folder / ability)
    recovered = {f"facts-{language}": "recover" for language in LANGUAGES}
    kept = {f"math-{language}": "keep" for language in KEPT}
    others = {f"logic-{language}": "keep" for language in LANGUAGES}
    others |= {f"math-{language}": "keep" for language in LANGUAGES if language not in KEPT}
    file = _write(folder / f"math-{seed}.yml", folder, target, ability, recovered | kept)
    others_file = _write(folder / f"math-{seed}-others.yml", folder, target, ability, others)
    return Experiment(f"math-{seed}", "math", (file,), (others_file,), recipe)


def _forgetful(base: Any, tokenizer: Any, domain: str, steps: int, *, seed: int) -> Any:
    """A base after training on one domain in two languages; as Qwen2.5-Math does, it has another rope_theta."""
    target = build_model(tokenizer, rope_theta=10_000.0)
    target.load_state_dict(base.state_dict())
    rows = [row for row in all_rows() if row.domain == domain and row.language in KEPT]
    train(target, tokenizer, rows, range(steps), learning_rate=2e-3, seed=seed)
    return target


def _make_specialists(folder: Path, steps: dict[str, int]) -> Experiment:
    """One of each domain, from a base that was trained on all of them for a short while."""
    tokenizer, rows, files = build_tokenizer(), all_rows(), []
    if not (folder / "early").exists():
        early = build_model(tokenizer, rope_theta=1_000_000.0)
        train(early, tokenizer, rows, range(steps["early"]), learning_rate=3e-3, seed=0)
        _save(early, tokenizer, folder / "early")
    for seed, domain in enumerate(DOMAINS):
        name = f"specialist-{domain}"
        if not (folder / name).exists():
            model = AutoModelForCausalLM.from_pretrained(folder / "early")
            own = [row for row in rows if row.domain == domain]
            train(model, tokenizer, own, range(steps["specialist"]), learning_rate=3e-4, seed=seed)
            _save(model, tokenizer, folder / name)
        roles = {f"{domain}-{language}": "recover" for language in LANGUAGES}
        files.append(_write(folder / f"{name}.yml", folder, "early", name, roles))
    return Experiment("specialists", "specialists", tuple(files))


def _pairs(folder: Path, steps: dict[str, int]) -> Iterator[Experiment]:
    """The same abilities for two pairs: the ability model, and targets that were trained on other domains."""
    tokenizer = build_tokenizer()
    if not (folder / "logic").exists():
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        _save(_forgetful(base, tokenizer, "logic", steps["target"], seed=0), tokenizer, folder / "logic")
    every = {f"{domain}-{language}": "recover" for domain in ("math", "facts") for language in LANGUAGES}
    for name, target in (("math-and-ability", "target-0"), ("logic-and-ability", "logic")):
        yield Experiment(name, "pairs", (_write(folder / f"{name}.yml", folder, target, "ability-0", every),))


def _save(model: Any, tokenizer: Any, out: Path) -> None:
    """All of it or nothing."""
    part = out.with_name(f"{out.name}.part")
    tokenizer.save_pretrained(part)
    model.save_pretrained(part)
    part.rename(out)


def _write(path: Path, folder: Path, target: str, ability: str, roles: dict[str, str]) -> Path:
    abilities = {}
    for name, role in roles.items():
        domain, _, language = name.partition("-")
        abilities[name] = {
            "role": role,
            "dataset": str(folder / "questions.jsonl"),
            "prompt": "prompt",
            "answer": "answer",
            "where": {"domain": domain, "language": language},
            "samples": PROFILED,
            "evaluate": {"samples": PROFILED, "max_new_tokens": 4},
        }
    written = {"target": str(folder / target), "ability_model": str(folder / ability), "abilities": abilities}
    path.write_text(yaml.safe_dump(written, sort_keys=False))
    return path
