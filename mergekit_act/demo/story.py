"""The demo's plot: train, forget, then run the very commands a user runs, and compare what came of it."""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, nullcontext, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from mergekit_act.artifacts import load_mask
from mergekit_act.demo.tasks import DOMAINS, LANGUAGES, Row, all_rows
from mergekit_act.demo.training import build_model, build_tokenizer, exact_match, train
from mergekit_act.transferring.commands import what_is_left_out
from mergekit_act.wording import table

__all__ = ["run_demo"]

Echo = Callable[[str], None]
Run = Callable[[Sequence[str]], None]

KEPT = ("latin", "greek")  # the target is trained on mathematics in these
RETAINED = tuple(f"math-{language}" for language in KEPT)
RECOVERED = tuple(f"facts-{language}" for language in LANGUAGES)
PROFILED = 32  # of a table's 64 facts; the others measure the recovery
DENSITY = 0.35  # of each profile; the union of the four is about half of the channels
BETTER = ("--density", "0.15", "--exclude", "lm_head", "--exclude", "model.embed_tokens")
THREADS = 2  # sums of floats depend on how many there are
FINETUNING = ("--epochs", "10", "--learning-rate", "2e-4", "--micro-batch", "16", "--no-gradient-checkpointing")
STEPS = {"base": 750, "ability": 80, "target": 300}


def run_demo(out_dir: Path, *, run: Run, echo: Echo, quiet: bool = False, steps: Mapping[str, int] = STEPS) -> None:
    """Make the models, run the commands, print accuracy per ability.

    Args:
        out_dir: where all files are left; it must not exist or be empty.
        run: runs a command of ours, given its words.
        echo: prints a line.
        quiet: show no progress bars.
        steps: in which each of the three models is trained.

    Raises:
        FileExistsError: ``out_dir`` has files in it.
        ValueError: mergekit's command failed; ``run`` raises what it will.
    """
    started = time.monotonic()
    disable_progress_bar()  # of Transformers, for loading and saving
    if out_dir.is_dir() and any(out_dir.iterdir()):
        raise FileExistsError(f"{out_dir} has files in it; name a folder that is empty or does not exist")
    out_dir.mkdir(parents=True, exist_ok=True)
    rows = all_rows()
    tokenizer = build_tokenizer()
    echo("Training a base, an ability model (all abilities) and a target (only mathematics, in two languages)")
    with _threads(THREADS):
        for name, model in _train_models(tokenizer, rows, steps, quiet).items():
            model.save_pretrained(out_dir / "models" / name)
            tokenizer.save_pretrained(out_dir / "models" / name)
        _write_inputs(out_dir, rows)
        with chdir(out_dir):
            _run_commands(run, echo)
        results = _results(out_dir, tokenizer, rows)
    echo(f"\nExact match on questions that were not profiled, after {time.monotonic() - started:.0f} s:\n")
    echo(results)
    channels, share = _moved(out_dir)
    echo(
        f"\nACT and the two controls moved {channels:,} channels each ({share}). All files are in {out_dir}: models/, "
        "abilities.yml, profiles/, attributions/, masks/, configs/, merged/, tuned/, evaluation.json and report/."
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train_models(tokenizer: Any, rows: Sequence[Row], steps: Mapping[str, int], quiet: bool) -> dict[str, Any]:
    shown = functools.partial(tqdm, unit="step", disable=quiet or None)
    base = build_model(tokenizer, rope_theta=1_000_000.0)
    train(base, tokenizer, rows, shown(range(steps["base"]), "base"), learning_rate=3e-3, seed=0)
    ability = copy.deepcopy(base)
    train(ability, tokenizer, rows, shown(range(steps["ability"]), "ability model"), learning_rate=5e-4, seed=1)
    # As Qwen2.5-Math does, the target has another rope_theta than its base.
    target = build_model(tokenizer, rope_theta=10_000.0)
    target.load_state_dict(base.state_dict())
    mathematics = [row for row in rows if row.domain == "math" and row.language in KEPT]
    train(target, tokenizer, mathematics, shown(range(steps["target"]), "target"), learning_rate=2e-3, seed=2)
    return {"base": base, "ability": ability, "target": target}


def _write_inputs(out_dir: Path, rows: Sequence[Row]) -> None:
    """The data set, the abilities file and the merge configs."""
    lines = [json.dumps(vars(row), ensure_ascii=False) for row in rows]
    (out_dir / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    abilities = "".join(
        f"""  {name}:
    role: {"recover" if name in RECOVERED else "keep"}
    dataset: questions.jsonl
    prompt: prompt
    answer: answer
    where: {{domain: {name.partition("-")[0]}, language: {name.partition("-")[2]}}}
    samples: {PROFILED}
    evaluate: {{samples: {PROFILED}, max_new_tokens: 4}}
"""
        for name in (*RECOVERED, *RETAINED)
    )
    head = "target: ./models/target\nability_model: ./models/ability\nabilities:\n"
    (out_dir / "abilities.yml").write_text(head + abilities, encoding="utf-8")
    (out_dir / "configs").mkdir()
    methods = {
        "act": "act\n{models}\n      weight: 1.0\n      mask: masks/act.safetensors",
        "random": "act\n{models}\n      weight: 1.0\n      mask: masks/random.safetensors",
        "weight": "act\n{models}\n      weight: 1.0\n      mask: masks/weight.safetensors",
        "attribution": "act\n{models}\n      weight: 1.0\n      mask: masks/attribution.safetensors",
        "sweep": "act\n{models}\n      weight: 1.0\n      mask: profiles/facts-*.safetensors\n      mask_density: 0.35",
        "task_arithmetic": "task_arithmetic\n{models}\n      weight: 0.5",
    }
    models = "base_model: ./models/target\nmodels:\n  - model: ./models/ability\n    parameters:"
    for name, text in methods.items():
        config = f"merge_method: {text.format(models=models)}\ndtype: float32\n"
        (out_dir / "configs" / f"{name}.yml").write_text(config, encoding="utf-8")


def _run_commands(run: Run, echo: Echo) -> None:
    """Profile, mask, merge, fine-tune and evaluate with the commands of a user, in the demo's folder."""

    def act(*words: str, show_output: bool = True) -> None:
        command = ["mergekit-act", *words]
        echo(f"\n$ {shlex.join(command)}")
        with nullcontext() if show_output else redirect_stdout(io.StringIO()):
            run(command)

    profiles = [f"profiles/{name}.safetensors" for name in RECOVERED]
    act("profile", "abilities.yml", "profiles", "--dtype", "float32")
    act("mask", *profiles, "-o", "masks/act.safetensors", "--density", str(DENSITY))
    counts = load_mask("masks/act.safetensors").counts
    same = (counts["channels"] + 0.5) / counts["channels_total"]  # as many channels for the controls
    for criterion in ("random", "weight"):
        act("profile", "abilities.yml", "profiles", "--criterion", criterion)
        control = [f"profiles/{criterion}.safetensors", "-o", f"masks/{criterion}.safetensors"]
        act("mask", *control, "--density", repr(same), show_output=False)
    act("profile", "abilities.yml", "attributions", "--criterion", "attribution", "--dtype", "float32")
    files = [f"attributions/{name}.safetensors" for name in RECOVERED]
    act("mask", *files, "-o", "masks/attribution.safetensors", *BETTER)
    for name in ("act", "attribution", "random", "weight", "task_arithmetic"):
        _run_mergekit(echo, [f"configs/{name}.yml", f"./merged/{name}", "--quiet"])
    if find_spec("trl") is not None:
        for source, name in (("models/target", "sft"), ("merged/act", "act-sft")):
            settings = [*FINETUNING, "--dtype", "float32"]
            act("finetune", f"./{source}", "abilities.yml", f"tuned/{name}", *settings, show_output=False)
    else:
        echo('\nFine-tuning is left out, it needs TRL: pip install "mergekit-act[finetune]"')
    tuned = [f"./tuned/{name}" for name in ("sft", "act-sft") if Path("tuned", name).is_dir()]
    models = ["./models/target", "./merged/act", *tuned]
    act("evaluate", *models, "--abilities", "abilities.yml", "--dtype", "float32", "--json", "evaluation.json")
    act("card", "./merged/act", "--evaluation", "evaluation.json", show_output=False)
    if (left_out := what_is_left_out()) is None:
        all_profiles = [f"profiles/{name}.safetensors" for name in (*RECOVERED, *RETAINED, "weight")]
        act("report", *all_profiles, "-o", "report", "--density", str(DENSITY))
    else:
        echo(f"\n{left_out}")


def _run_mergekit(echo: Echo, arguments: Sequence[str]) -> None:
    """``mergekit-yaml`` as it is installed, in a process of its own, or it would not be shown that it knows ``act``."""
    command = ["mergekit-yaml", *arguments]
    echo(f"\n$ {shlex.join(command)}")
    program = Path(sys.executable).with_name(command[0])
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run([program, *arguments], env=environment, text=True, capture_output=True, check=False)
    if done.returncode:
        raise ValueError(f"{shlex.join(command)} failed with exit code {done.returncode}:\n{done.stderr.rstrip()}")


def _results(out_dir: Path, tokenizer: Any, rows: Sequence[Row]) -> str:
    """Exact match of every model on every ability, on rows that no profile has seen."""
    folders = {
        "target": "models/target",
        "ability": "models/ability",
        "ACT": "merged/act",
        "attribution": "merged/attribution",
        "random": "merged/random",
        "weight": "merged/weight",
        "task arithmetic": "merged/task_arithmetic",
        "SFT": "tuned/sft",
        "ACT, SFT": "tuned/act-sft",
    }
    folders = {name: folder for name, folder in folders.items() if (out_dir / folder).is_dir()}
    profiled = _profiled_questions(out_dir)
    held_out = [row for row in rows if (row.language, row.prompt) not in profiled]
    scores: dict[str, dict[tuple[str, str], float]] = {}
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(out_dir / folder, dtype=torch.float32).eval()
        scores[name] = {
            (domain, language): exact_match(
                model, tokenizer, [row for row in held_out if (row.domain, row.language) == (domain, language)]
            )
            for domain in DOMAINS
            for language in LANGUAGES
        }
    groups = {
        "kept: math, two languages": [("math", language) for language in KEPT],
        "recovered: facts": [("facts", language) for language in LANGUAGES],
    }
    lines = [[f"{d}-{ln}", *(f"{scores[n][d, ln]:.2f}" for n in folders)] for d in DOMAINS for ln in LANGUAGES]
    for label, keys in groups.items():
        means = (sum(scores[name][key] for key in keys) / len(keys) for name in folders)
        lines.append([label, *(f"{mean:.2f}" for mean in means)])
    return table(["ability", *folders], lines)


def _profiled_questions(out_dir: Path) -> set[tuple[str, str]]:
    """(language, prompt) of every row that went into a profile."""
    from mergekit_act.abilities import load_abilities
    from mergekit_act.data.rows import load_rows, select_rows

    file = load_abilities(out_dir / "abilities.yml")
    seen = set()
    for name, ability in file.abilities.items():
        local = ability.model_copy(update={"dataset": str(out_dir / ability.dataset)})
        taken, _ = select_rows(name, local, load_rows(name, local), offset=0, samples=local.samples)
        seen |= {(row["language"], row["prompt"]) for row in taken}
    return seen


def _moved(out_dir: Path) -> tuple[int, str]:
    names = ("act", "random", "weight", "attribution")
    counts = [load_mask(out_dir / "masks" / f"{name}.safetensors").counts for name in names]
    if len({count["channels"] for count in counts[:3]}) != 1:
        raise ValueError(f"the masks have {[count['channels'] for count in counts]} channels, expected equal numbers")
    shares = (f"{100 * count['parameters'] / count['parameters_total']:.0f} %" for count in counts)
    return counts[0]["channels"], "of the parameters: ACT {}, random {}, weight {}; attribution {}".format(*shares)
