"""What the README and the documentation say has to be true."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from mergekit.merge_methods import get
from mergekit.scripts.run_yaml import main as mergekit_yaml
from merges import state_of
from safetensors.torch import save_file
from tiny import make_model, tiny_config

from mergekit_act.abilities import AbilitiesFile
from mergekit_act.checking.configs import config_problems
from mergekit_act.cli import main
from mergekit_act.planning import MergeConfigError

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))
}
README = PAGES[Path("README.md")]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Words of each line of the shell's blocks."""
    lines = "".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_readme_is_short():
    assert len(README.splitlines()) <= 250


def test_ci_runs_the_readmes_test_command():
    (command,) = re.findall(r"^pip install -e .*pytest.*$", README, re.MULTILINE)
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_and_options_exist(page):
    transcripts = re.findall(r"^ *\$ (.+)$", PAGES[page], re.MULTILINE)
    for words in (*commands(PAGES[page]), *map(str.split, transcripts)):
        ours = next((n for n, word in enumerate(words) if word in ("mergekit-act", "mergekit_act")), None)
        if ours is not None and words[ours + 1] != "merge":
            command = main.commands[words[ours + 1]]
            known = {name for option in command.params for name in option.opts}
            assert {word.split("=")[0] for word in words[ours:] if word.startswith("--")} <= known, words


def test_every_command_is_in_the_readme():
    for command in main.commands:
        assert f"mergekit-act {command}" in README


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"""(?:\]\(|src="|srcset=")([^)"#]+)""", PAGES[page]):
        assert target.startswith("http") or (ROOT / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_yaml_is_valid(page):
    for block in blocks(PAGES[page], "yaml"):
        content = yaml.safe_load(block)
        if isinstance(content, dict) and "merge_method" in content:
            assert config_problems(content, get(content["merge_method"]).spec) == [
                f'mask "{content["models"][0]["parameters"]["mask"]}" does not exist (relative to {Path.cwd()})'
            ]
        elif isinstance(content, dict) and "target" in content:
            AbilitiesFile.model_validate(content)
        elif isinstance(content, dict) and "mask" in content:  # of a model's parameters
            config = {"merge_method": "act", "base_model": "t", "models": [{"model": "a", "parameters": content}]}
            (problem,) = config_problems(config, get("act").spec)
            assert problem.startswith(f'mask "{content["mask"]}" could not be fetched: ')


def test_the_message_in_the_docs_is_the_one_that_is_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"wieght": 1, "weight": 1, "mask": "masks/scince.safetensors"}
    config = {"base_model": "t", "models": [{"model": "a", "parameters": settings}], "parameters": {"densty": 1}}
    message = f"Error: {MergeConfigError(config_problems(config, get('act').spec)).message}"
    assert message.replace(str(tmp_path), "/home/me/merges") in PAGES[Path("docs/reference/merging.md")]


@pytest.fixture
def working_directory(tmp_path, monkeypatch):
    """The models and data that the README names, tiny, where mergekit looks before it asks the Hub."""
    monkeypatch.chdir(tmp_path)
    for size in ("1.5B", "7B"):
        target, ability = (tmp_path / f"Qwen/Qwen2.5-{name}{size}-Instruct" for name in ("Math-", ""))
        for seed, folder in enumerate((target, ability)):
            make_model(tiny_config("qwen2"), folder, seed=seed)
        # So near to the target that nothing which is kept breaks.
        mixed = {name: tensor.lerp(state_of(ability)[name], 0.02) for name, tensor in state_of(target).items()}
        save_file(mixed, ability / "model.safetensors", metadata={"format": "pt"})
    subjects = ("physics", "chemistry", "biology")
    rows = [{"question": f"{n}+{n}", "answer": str(2 * n), "subject": subjects[n % 3]} for n in range(36)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "MegaScience").mkdir()
    (tmp_path / "MegaScience/MegaScience").mkdir()
    (tmp_path / "MegaScience/MegaScience/train.jsonl").write_text("".join(lines))
    (tmp_path / "science.jsonl").write_text("".join(lines[:18]))
    (tmp_path / "math.jsonl").write_text("".join(lines[18:]))
    (tmp_path / "openai/gsm8k").mkdir(parents=True)
    for split, some in (("train", lines[18:27]), ("test", lines[27:])):
        (tmp_path / f"openai/gsm8k/{split}.jsonl").write_text("".join(some))
    example = (ROOT / "example_configs/abilities-evaluation.yml").read_text()
    example = re.sub(r"^ *name: main\n", "", example, flags=re.MULTILINE)
    (tmp_path / "abilities-evaluation.yml").write_text(re.sub(r"samples: \d+", "samples: 6", example))
    for block in blocks(README, "yaml"):
        block = block.replace(" Qwen/", f" {tmp_path}/Qwen/")  # mergekit would ask the Hub for it
        name = "abilities.yml" if block.startswith("target:") else "act.yml"
        (tmp_path / name).write_text(
            block.replace("samples: 1500", "samples: 6\n    evaluate: {samples: 6, max_new_tokens: 4}")
        )
    config = yaml.safe_load((tmp_path / "act.yml").read_text())
    config["models"][0]["parameters"] |= {"mask": "profiles/science-en.safetensors", "mask_density": 0.05}
    (tmp_path / "act-profiles.yml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_the_paths_that_the_readme_and_the_guide_show(working_directory):
    """Word for word: the whole path as one command and in steps, and what comes after it."""
    guide = [PAGES[Path(f"docs/guide/{name}.md")] for name in ("criteria", "choosing", "report", "sharing")]
    shown = [words for text in (README, *guide) for words in commands(text)]
    run = []
    for words in shown:
        if words[0] == "mergekit-yaml":
            result = CliRunner().invoke(mergekit_yaml, words[1:])
        elif words[0] == "mergekit-act" and words[1] != "demo":
            words = [
                file for word in words for file in (sorted(map(str, Path().glob(word))) if "*" in word else [word])
            ]
            result = CliRunner().invoke(main, words[1:])
        else:
            continue
        assert result.exit_code == 0, (words, result.output, result.exception)
        run.append(words[1])
    guides = ["profile", "mask", "evaluate", "sweep", "finetune", "report", "card"]
    assert run == ["transfer", "profile", "mask", "act.yml", *guides]


def test_python_runs(working_directory, capsys):
    """The blocks one after another, in a folder with the README's files."""
    names: dict[str, object] = {}
    for page in ("python", "files"):
        shutil.rmtree(working_directory / "masks", ignore_errors=True)
        for block in blocks(PAGES[Path(f"docs/reference/{page}.md")], "python"):
            exec(compile(block, "block", "exec"), names)
    told = capsys.readouterr().out
    assert f"{names['moved'].selected} of {names['moved'].channels} channels\n" in told
    assert names["done"].judgement in told
    assert "merged science-en " in told


def test_the_notebook_runs(working_directory):
    """Its cells, with tiny models and data; a budget that tiny models fit anyway."""
    notebook = json.loads((ROOT / "notebooks/transfer.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and not source.startswith("%pip"):
            for there, here in (
                ("samples: 300", "samples: 6"),
                ("samples: 100", "samples: 6"),
                ("10_000_000_000", "1_000_000_000"),
            ):
                source = source.replace(there, here)
            source = re.sub(r"    name: main\n|, max_new_tokens: 256", "", source).replace(
                '"batch_tokens": 2048', '"batch_tokens": 2048, "keep_within": 0.9, "dtype": "float32"'
            )
            exec(compile(source, "cell", "exec"), names)
    assert (working_directory / "science/merged/model.safetensors").exists()
    assert names["done"].judgement.startswith("It recovers ")
