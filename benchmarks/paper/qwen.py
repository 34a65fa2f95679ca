"""The setting `qwen`: the paper's models and data, for whoever has a GPU and the Hub.

Targets are Qwen2.5-Math-7B-Instruct and -1.5B-Instruct, ability models the Instruct models of the same sizes; to be
recovered is science, to be kept mathematics. The paper's translations into ten languages are not public; this takes
the English data. Of the Hub it loads 70 GB of models and 8 GB of data; a merge is written for each point of mergekit's
own methods and each fine-tuning, 15 GB at a time. It has not been run: that takes a GPU of 80 GB, and some days.
"""

from __future__ import annotations

import os
from pathlib import Path

import yaml
from experiment import Experiment, Setting

from mergekit_act.devices import default_device
from mergekit_act.finetuning import Recipe

__all__ = ["make_setting"]

ABOUT = """Qwen2.5-Math-7B-Instruct and Qwen2.5-Math-1.5B-Instruct are the targets, Qwen2.5-7B-Instruct and
Qwen2.5-1.5B-Instruct the ability models, as in the paper; to be recovered is science (MegaScience: physics, chemistry,
biology), to be kept mathematics (MetaMathQA), to be looked at besides is code (OpenCodeInstruct), all in English.
Answers are long, so that only their likelihood is told; MetaMathQA rewrites each question many times, and some of the
held-out ones have a sibling among those profiled."""
SAMPLES, HELD_OUT = 1500, 390
DATA = {
    "science": {
        "dataset": "MegaScience/MegaScience",
        "prompt": "question",
        "answer": "answer",
        "where": {"subject": ["physics", "chemistry", "biology"]},
        "balance": "subject",
    },
    "math": {"dataset": "meta-math/MetaMathQA", "prompt": "query", "answer": "response"},
    "code": {"dataset": "nvidia/OpenCodeInstruct", "prompt": "input", "answer": "output"},
}


def make_setting(folder: Path, *, quick: bool = False) -> Setting:
    """Write the abilities files; models and data come from the Hub.

    To be tried with stand-ins: ``QWEN_MODELS`` names a folder that has the models' folders, ``QWEN_DATA`` one with
    ``science.jsonl`` and so on, of the same columns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    experiments, pairs = [], []
    for size in ("1.5B", "7B"):
        target, ability = f"Qwen2.5-Math-{size}-Instruct", f"Qwen2.5-{size}-Instruct"
        file = _write(folder, f"math-{size}", target, ability, {"science": "recover", "math": "keep"}, quick)
        others = _write(folder, f"math-{size}-others", target, ability, {"code": "recover"}, quick)
        recipe = Recipe(master_dtype="bfloat16")
        experiments.append(Experiment(f"math-{size}", f"math, {size}", (file,), (others,), recipe))
    every = dict.fromkeys(DATA, "recover")
    for target in ("Math", "Coder"):
        name, models = f"{target.lower()}-and-general", (f"Qwen2.5-{target}-7B-Instruct", "Qwen2.5-7B-Instruct")
        pairs.append(Experiment(name, "pairs", (_write(folder, name, *models, every, quick),)))
    return Setting(
        name="qwen",
        about=ABOUT,
        experiments=tuple(experiments),
        specialists=None,
        pairs=tuple(pairs),
        exclude=("lm_head", "model.embed_tokens"),
        dtype="bfloat16",
        device=default_device(),
        short=False,
    )


def _write(folder: Path, name: str, target: str, ability: str, roles: dict[str, str], quick: bool) -> Path:
    models = os.environ.get("QWEN_MODELS", "Qwen")
    abilities = {}
    for own, role in roles.items():
        data = dict(DATA[own])
        if "QWEN_DATA" in os.environ:
            data["dataset"] = str(Path(os.environ["QWEN_DATA"]) / f"{own}.jsonl")
        samples, held_out = (12, 15) if quick else (SAMPLES, HELD_OUT)
        abilities[own] = {
            "role": role,
            **data,
            "samples": samples,
            "evaluate": {"samples": held_out},
        }
    written = {"target": f"{models}/{target}", "ability_model": f"{models}/{ability}", "abilities": abilities}
    path = folder / f"{name}.yml"
    path.write_text(yaml.safe_dump(written, sort_keys=False))
    return path
