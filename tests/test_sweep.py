"""Sweeps: points are merges to the bit, the target comes back to the bit, results stream and go on."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from itertools import product

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from merges import merged
from safetensors.torch import load_file
from tiny import make_model, tiny_config
from transformers import AutoModelForCausalLM

from mergekit_act.artifacts import save_profile
from mergekit_act.cli import main
from mergekit_act.planning import plan_merge
from mergekit_act.profiling import open_pair, profile_without_data
from mergekit_act.sweeping import Grid, PatchedModel, Point
from mergekit_act.sweeping.scores import Score, best_point, frontier


@pytest.fixture
def swept(pair_of, tmp_path, sums_file):
    """Architecture -> (config, abilities file), of a pair with two abilities, one to recover and one to keep."""

    def make(name, *, dtype="float32", models=1, keep=True):
        target, ability = pair_of(name)
        abilities = [ability]
        if models == 2:
            abilities.append(make_model(tiny_config(name), tmp_path / "third", seed=9))
        listed = []
        for place, model in enumerate(abilities):
            profile = profile_without_data(open_pair(str(target), str(model)), "random", random_seed=place)
            path = tmp_path / f"p{place}.safetensors"
            save_profile(profile, path)
            parameters = {"weight": 0.3, "mask": str(path), "mask_density": 0.5}
            listed.append({"model": str(model), "parameters": parameters})
        config = {"merge_method": "act", "base_model": str(target), "models": listed, "dtype": dtype}
        (tmp_path / "act.yml").write_text(yaml.safe_dump(config, sort_keys=False))
        data = f"dataset: {sums_file}, prompt: q, answer: a, samples: 4, evaluate: {{samples: 5, max_new_tokens: 3}}"
        other = f"  kept: {{role: keep, seed: 5, {data}}}\n" if keep else ""
        (tmp_path / "abilities.yml").write_text(
            f"target: {target}\nability_model: {ability}\nabilities:\n  gained: {{{data}}}\n{other}"
        )
        return tmp_path / "act.yml", tmp_path / "abilities.yml"

    return make


def sweep(config, abilities, out, *arguments):
    return CliRunner().invoke(main, ["sweep", str(config), str(abilities), str(out), "--device", "cpu", *arguments])


def state(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters(remove_duplicate=False)}


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name].view(torch.int8), second[name].view(torch.int8)) for name in first)


@pytest.mark.parametrize(
    ("name", "dtype", "models"),
    [("qwen2", "float32", 2), ("qwen2-tied", "bfloat16", 2), ("gpt2", "float32", 1), ("qwen3_moe", "bfloat16", 1)],
)
def test_the_scored_weights_are_those_that_mergekit_writes(swept, pair_of, tmp_path, name, dtype, models):
    config, _ = swept(name, dtype=dtype, models=models)
    written = yaml.safe_load(config.read_text())
    model = AutoModelForCausalLM.from_pretrained(pair_of(name)[0], dtype=getattr(torch, dtype))
    before = state(model)
    patched = PatchedModel(model, getattr(torch, dtype))
    for density, weight in product((0.1, 0.6), (0.4, -1.5)):
        for place, entry in enumerate(written["models"]):
            entry["parameters"] |= {"weight": weight / (place + 1), "mask_density": density}
        weights = {m.model: weight / (p + 1) for p, m in enumerate(MergeConfiguration.model_validate(written).models)}
        patched.take(plan_merge(MergeConfiguration.model_validate(written), MergeOptions()))
        merged(written, tmp_path / "merged")
        expected = state(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=getattr(torch, dtype)))
        with patched.patched(weights) as inside:
            assert same(state(inside), expected)
            assert not same(state(inside), before)
        assert same(state(model), before)


def test_pickles_and_a_tied_ability_model_under_an_untied_target(swept, pair_of, tmp_path):
    config, _ = swept("qwen2")
    tied = make_model(tiny_config("qwen2-tied"), tmp_path / "tied", seed=4)
    weights = load_file(tied / "model.safetensors")
    torch.save(weights, tied / "pytorch_model.bin")
    (tied / "model.safetensors").unlink()
    written = yaml.safe_load(config.read_text())
    written["models"][0] |= {"model": str(tied)}
    ability = MergeConfiguration.model_validate(written).models[0].model
    model = AutoModelForCausalLM.from_pretrained(pair_of("qwen2")[0])
    patched = PatchedModel(model, torch.float32)
    patched.take(plan_merge(MergeConfiguration.model_validate(written), MergeOptions()))
    merged(written, tmp_path / "merged")
    with patched.patched({ability: 0.3}) as inside:
        assert same(state(inside), state(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")))


def test_a_hundred_points_leave_the_target_as_it_was(swept, pair_of):
    config, _ = swept("qwen2-tied", dtype="bfloat16")
    written = yaml.safe_load(config.read_text())
    model = AutoModelForCausalLM.from_pretrained(pair_of("qwen2-tied")[0], dtype=torch.bfloat16)
    before = state(model)
    patched = PatchedModel(model, torch.bfloat16)
    ability = MergeConfiguration.model_validate(written).models[0].model
    for place in range(100):
        if place % 20 == 0:
            written["models"][0]["parameters"]["mask_density"] = (place + 1) / 100
            patched.take(plan_merge(MergeConfiguration.model_validate(written), MergeOptions()))
        with patched.patched({ability: (place - 50.5) * 10}):
            pass
    assert same(state(model), before)


def test_an_error_at_a_point_leaves_the_target_as_it_was(swept, pair_of):
    config, _ = swept("qwen2")
    written = MergeConfiguration.model_validate(yaml.safe_load(config.read_text()))
    model = AutoModelForCausalLM.from_pretrained(pair_of("qwen2")[0])
    before, ability = state(model), written.models[0].model
    patched = PatchedModel(model, torch.float32)
    patched.take(plan_merge(written, MergeOptions()))
    with pytest.raises(KeyboardInterrupt), patched.patched({ability: 0.5}):
        raise KeyboardInterrupt
    assert same(state(model), before)


def test_the_command_scores_what_it_writes(swept, tmp_path):
    config, abilities = swept("qwen2")
    grid = ["--density", "0.1", "--density", "0.4", "--weight", "0.5", "--weight", "1.5"]
    done = sweep(config, abilities, tmp_path / "out", *grid, "--keep-within", "1")
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader((tmp_path / "out" / "sweep.csv").open()))
    assert [(row["density"], row["weight"]) for row in rows] == [
        ("", ""), ("0.1", "0.5"), ("0.1", "1.5"), ("0.4", "0.5"), ("0.4", "1.5")
    ]  # fmt: skip
    for row in rows:
        assert float(row["recover"]) == pytest.approx(math.exp(-float(row["nll:gained"])))
        assert float(row["keep"]) == pytest.approx(math.exp(-float(row["nll:kept"])))
    best = yaml.safe_load((tmp_path / "out" / "best.yml").read_text())
    parameters = best["models"][0]["parameters"]
    (row,) = [
        r for r in rows if (r["density"], r["weight"]) == (str(parameters["mask_density"]), str(parameters["weight"]))
    ]
    assert float(row["recover"]) == max(float(r["recover"]) for r in rows[1:])
    # evaluated as a merged model, it has the very score of the sweep
    merged(best, tmp_path / "merged")
    arguments = ["--abilities", str(abilities), "--json", "--no-generate", "--dtype", "float32"]
    evaluated = CliRunner().invoke(main, ["evaluate", str(tmp_path / "merged"), *arguments])
    results = json.loads(evaluated.stdout)["results"]
    assert {r["ability"]: r["nll"]["value"] for r in results} == {
        name: float(row[f"nll:{name}"]) for name in ("gained", "kept")
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"sweep.csv", "best.yml", "sweep.svg", "sweep.png"}
    assert "best.yml" in done.output


def test_a_rerun_goes_on(swept, tmp_path):
    config, abilities = swept("qwen2")
    out = tmp_path / "out"
    assert sweep(config, abilities, out, "--density", "0.1", "--weight", "0.5", "--no-generate").exit_code == 0
    first = (out / "sweep.csv").read_text()
    with (out / "sweep.csv").open("a") as file:
        file.write("0.2,0.5,12,")  # a kill while a line was written
    done = sweep(config, abilities, out, "--density", "0.1", "--density", "0.2", "--weight", "0.5", "--no-generate")
    assert done.exit_code == 0, done.output
    text = (out / "sweep.csv").read_text()
    assert text.startswith(first)
    assert [row["density"] for row in csv.DictReader(text.splitlines())] == ["", "0.1", "0.2"]
    best = (out / "best.yml").read_text() if (out / "best.yml").exists() else None
    assert sweep(config, abilities, out, "--density", "0.1", "--weight", "0.5", "--no-generate").exit_code == 0
    assert ((out / "best.yml").read_text() if (out / "best.yml").exists() else None) == best  # of all that is scored


def test_files_of_others_are_not_written_over(swept, tmp_path):
    config, abilities = swept("qwen2")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "best.yml").write_text("mine")
    done = sweep(config, abilities, tmp_path / "mine", "--density", "0.1", "--weight", "0.5")
    assert done.exit_code == 1
    assert "best.yml exists" in done.output
    assert (tmp_path / "mine" / "best.yml").read_text() == "mine"


def test_other_settings_are_refused_by_name(swept, tmp_path):
    config, abilities = swept("qwen2")
    grid = ["--density", "0.1", "--weight", "0.5", "--no-generate"]
    assert sweep(config, abilities, tmp_path / "out", *grid).exit_code == 0
    abilities.write_text(abilities.read_text().replace("seed: 5", "seed: 6"))
    done = sweep(config, abilities, tmp_path / "out", *grid)
    assert done.exit_code == 1
    assert "abilities.kept.fingerprint was" in done.output
    assert sweep(config, abilities, tmp_path / "out", *grid, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(merge_method="act_ties"), "a sweep varies the settings of act"),
        (lambda c: c.update(tokenizer={"source": "base"}), 'sets "tokenizer"'),
        (lambda c: c["models"][0]["parameters"].update(weight=[0.1, 0.5]), "gradient or filter"),
        (lambda c: c["models"][0]["parameters"].pop("mask"), 'has no "mask"'),
        (lambda c: c["models"][0]["parameters"].update(mask="nowhere.safetensors"), "does not exist"),
        (lambda c: c["models"].clear(), "models"),
        (lambda c: c["models"][0]["parameters"].update(densty=3), 'no parameter "densty"'),
    ],
)
def test_configs_that_cannot_be_swept(swept, tmp_path, change, message):
    config, abilities = swept("qwen2")
    written = yaml.safe_load(config.read_text())
    change(written)
    config.write_text(yaml.safe_dump(written))
    done = sweep(config, abilities, tmp_path / "out")
    assert done.exit_code == 1
    assert message in done.output
    assert not (tmp_path / "out").exists()


def test_masks_are_refused_they_have_no_density(swept, tmp_path):
    config, abilities = swept("qwen2")
    profile, made = str(tmp_path / "p0.safetensors"), str(tmp_path / "mask.safetensors")
    assert CliRunner().invoke(main, ["mask", profile, "-o", made, "--density", "0.1"]).exit_code == 0
    config.write_text(config.read_text().replace(profile, made))
    done = sweep(config, abilities, tmp_path / "out")
    assert done.exit_code == 1
    assert "needs profiles" in done.output.replace("\n", " ")


def test_without_abilities_to_recover(swept, tmp_path):
    config, abilities = swept("qwen2", keep=False)
    abilities.write_text(abilities.read_text().replace("gained: {", "gained: {role: keep, "))
    done = sweep(config, abilities, tmp_path / "out")
    assert done.exit_code == 1
    assert "role: recover" in done.output


def test_a_target_with_nan_weights_is_told_before_any_point(swept, pair_of, tmp_path):
    config, abilities = swept("qwen2")
    model = AutoModelForCausalLM.from_pretrained(pair_of("qwen2")[0])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    config.write_text(config.read_text().replace(f"base_model: {pair_of('qwen2')[0]}", f"base_model: {tmp_path}/nan"))
    done = sweep(config, abilities, tmp_path / "out")
    assert done.exit_code == 1
    assert f"{tmp_path}/nan: its weights are broken" in done.output
    assert "model.layers.0.mlp.up_proj.weight" in done.output


def test_overwriting_keeps_what_is_of_the_same_settings(swept, tmp_path):
    """Scores have the seconds that they took, so that none is the same twice."""
    config, abilities = swept("qwen2")
    grid = ("--density", "0.2", "--weight", "0.5")
    scored = []
    for more in ((), ("--overwrite",), ("--overwrite", "--batch-tokens", "64")):
        assert sweep(config, abilities, tmp_path / "out", *grid, *more).exit_code == 0
        scored.append((tmp_path / "out/sweep.csv").read_bytes())
    assert scored[0] == scored[1]
    assert scored[0] != scored[2]


def test_a_full_disk_says_so_and_the_same_command_goes_on(swept, tmp_path):
    config, abilities = swept("qwen2")
    command = ["sweep", str(config), str(abilities), str(tmp_path / "out"), "--device", "cpu", "--no-generate"]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))"
    code = f"import mergekit_act.sweeping\n{limit}\nfrom mergekit_act.cli import main\nmain()"  # PyTorch writes, too
    done = subprocess.run([sys.executable, "-c", code, *command], text=True, capture_output=True, check=False)
    assert done.returncode == 1
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 0, again.output
    assert len((tmp_path / "out" / "sweep.csv").read_text().splitlines()) == 18


def test_scores_that_lost_their_header_are_written_anew_or_refused(swept, tmp_path):
    config, abilities = swept("qwen2")
    out, grid = tmp_path / "out", ["--density", "0.1", "--weight", "0.5", "--no-generate"]
    assert sweep(config, abilities, out, *grid).exit_code == 0
    (out / "sweep.csv").write_text("density,wei")  # a kill while the header was written
    assert sweep(config, abilities, out, *grid).exit_code == 0
    assert sweep(config, abilities, out, *grid).exit_code == 0
    assert len(list(csv.DictReader((out / "sweep.csv").open()))) == 2
    (out / "sweep.csv").write_text("something else\n")
    done = sweep(config, abilities, out, *grid)
    assert done.exit_code == 1
    assert "no list of this sweep's scores" in done.output


def test_an_ability_model_with_nan_weights_gives_no_best_point(swept, pair_of, tmp_path):
    config, abilities = swept("qwen2", keep=False)
    model = AutoModelForCausalLM.from_pretrained(pair_of("qwen2")[1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    config.write_text(config.read_text().replace(f"model: {pair_of('qwen2')[1]}", f"model: {tmp_path}/nan"))
    done = sweep(config, abilities, tmp_path / "out", "--density", "0.2", "--weight", "1")
    assert done.exit_code == 0, done.output
    assert "no best.yml" in done.output
    assert not (tmp_path / "out" / "best.yml").exists()


def test_weights_per_model(swept, tmp_path):
    config, abilities = swept("qwen2", models=2)
    grid = ["--density", "0.2", "--weight", "0.5", "--weight", "1", "--per-model", "--keep-within", "1"]
    done = sweep(config, abilities, tmp_path / "out", *grid)
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader((tmp_path / "out" / "sweep.csv").open()))
    assert [row["weight"] for row in rows] == ["", "0.5;0.5", "0.5;1.0", "1.0;0.5", "1.0;1.0"]
    assert len({row["nll:gained"] for row in rows}) == 5


def test_a_point_out_of_range_is_the_worst_not_the_end(swept, tmp_path):
    config, abilities = swept("qwen2", dtype="float16")
    grid = ["--density", "1", "--weight", "1e6", "--weight", "0.1", "--no-generate"]
    done = sweep(config, abilities, tmp_path / "out", *grid)
    assert done.exit_code == 0, done.output
    rows = {row["weight"]: row for row in csv.DictReader((tmp_path / "out" / "sweep.csv").open())}
    assert rows["1000000.0"]["recover"] == "0.0"
    assert float(rows["0.1"]["recover"]) > 0


def test_grids():
    paper = Grid("paper").points(1)
    assert len(paper) == 252
    assert {point.density for point in paper} >= {0.01, 0.1, 0.15, 1.0}
    assert len(Grid().points(2)) == 16
    assert Grid(densities=[0.2], weights=[0.5]).points(2) == [Point(0.2, (0.5, 0.5))]
    assert len(Grid(densities=[0.2], weights=[0.5, 1.0], per_model=True).points(3)) == 8
    with pytest.raises(ValueError, match="weight is 0"):
        Grid(weights=[0.0]).points(1)
    with pytest.raises(ValueError, match="density is 2"):
        Grid(densities=[2.0]).points(1)


def score(keep, recover, point=None):
    return Score(point, {}, recover, keep, 0, 0, 0.0)


def test_frontier_and_best_point_by_hand():
    target = score(0.8, 0.1)
    scores = [score(0.79, 0.3), score(0.7, 0.5), score(0.75, 0.2), score(0.6, 0.5), score(0.2, 0.9)]
    assert [(s.keep, s.recover) for s in frontier(scores)] == [(0.79, 0.3), (0.7, 0.5), (0.2, 0.9)]
    assert best_point(scores, target, 0.05) == scores[0]  # 0.76 is the limit
    assert best_point(scores, target, 0.15) == scores[1]
    assert best_point(scores, target, 0.25) == scores[1]  # as much recovered, more kept
    assert best_point(scores, target, 0.0) is None
    assert best_point(scores, target, 1.0) == scores[4]
    assert best_point([score(None, 0.3), score(None, 0.4)], score(None, 0.1), 0.0).recover == 0.4
    assert best_point(scores[2:3], score(0.8, 0.2), 1.0) is None  # recovers nothing


@pytest.mark.parametrize("name", ["best.yml", "sweep.svg"])
def test_folders_in_the_place_of_outputs_are_told_before_the_sweep(swept, tmp_path, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    given = swept("qwen2")
    for options in ([], ["--overwrite"]):
        done = sweep(*given, tmp_path / "out", *options)
        assert done.exit_code == 1
        assert f"{name}: a folder, which no file can replace" in done.output
    assert not (tmp_path / "out" / "sweep.csv").exists()


def test_what_is_generated_is_tried_before_the_points(swept, tmp_path):
    config, abilities = swept("qwen2")
    out, grid = tmp_path / "out", ["--density", "0.1", "--weight", "0.5"]
    assert sweep(config, abilities, out, *grid).exit_code == 0
    kept = json.loads((out / "frontier.json").read_text())
    assert "target" in kept
    (out / "frontier.json").write_text("{")
    done = sweep(config, abilities, out, *grid, "--density", "0.2")
    assert done.exit_code == 1
    assert "frontier.json cannot be read" in done.output
    assert len(list(csv.DictReader((out / "sweep.csv").open()))) == 2  # no point was scored before
    (out / "frontier.json").unlink()
    assert sweep(config, abilities, out, *grid).exit_code == 0
    assert json.loads((out / "frontier.json").read_text()) == kept
