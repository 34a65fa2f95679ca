"""Fitted rows against the formula written down: whole matrices in float64, row by row."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from merges import act_config, check, merged, random_mask, refusal
from samples import as_ability, random_samples
from tiny import make_model, tiny_config

from mergekit_act.abilities import AbilitySamples
from mergekit_act.artifacts import Inputs, load_inputs, save_inputs
from mergekit_act.channels import Layout
from mergekit_act.cli import main
from mergekit_act.profiling import ProfilingSettings, open_pair
from mergekit_act.profiling.scoring import measure_pair

SETTINGS = {"device": "cpu", "dtype": "float32", "batch_tokens": 40, "quiet": True}
ROLES = {"one": "recover", "two": "keep"}


def two_abilities() -> list[AbilitySamples]:
    return [as_ability(random_samples(), "one"), as_ability(random_samples(1), "two")]


def inputs_of(target, ability, **changes) -> Inputs:
    pair = open_pair(str(target), str(ability))
    return measure_pair(pair, two_abilities(), ProfilingSettings(**SETTINGS | changes), roles=ROLES)[1]


def parameters_of(folder) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return dict(model.named_parameters(remove_duplicate=False))


def plain_fit(change, recovered, kept, keep: float, ridge: float, tokens: tuple[int, int]):
    """δ = ΔW G_rec (G_rec + μ G_keep + λ)⁻¹ for rows ``[rows, width]``; inputs of an expert are 0 for other tokens."""
    recovered, kept = recovered.double(), kept.double()
    first, second = (x.T @ x / count for x, count in zip((recovered, kept), tokens, strict=True))
    damping = ridge * first.diagonal().mean() * torch.eye(len(first), dtype=torch.float64)
    return change.double() @ first @ torch.linalg.inv(first + keep * second + damping)


def expected_change(
    inputs: Inputs, layout: Layout, module: str, name: str, change: torch.Tensor, keep: float, ridge: float
) -> torch.Tensor:
    """What all of a parameter changes by, were all of its channels selected."""
    axis = dict(layout.parameters[module])[name]
    source = inputs.sources[module]
    recovered, kept = (inputs.rows(f"{role}.{source}").double() for role in ("recover", "keep"))
    tokens = tuple(inputs.roles[role]["rows"] for role in ("recover", "keep"))
    if name.endswith("bias"):
        return change.double() / (1 + keep + ridge)
    if recovered.ndim == 1:
        shares = recovered / (recovered + keep * kept + ridge * recovered.mean())
        return change.double() * (shares if change.ndim == 1 else shares[:, None])
    if change.ndim == 3:
        which = [inputs.tensors[f"{role}.{source}.expert"] for role in ("recover", "keep")]
        rows = change.movedim(axis, 1)
        fitted = torch.stack(
            [
                plain_fit(rows[e], recovered[which[0] == e], kept[which[1] == e], keep, ridge, tokens)
                if (which[0] == e).any()
                else torch.zeros_like(rows[e]).double()
                for e in range(len(rows))
            ]
        )
        return fitted.movedim(1, axis)
    return plain_fit(change.movedim(axis, 0), recovered, kept, keep, ridge, tokens).movedim(0, axis)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma2", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("keep", [1.0, 0.25])
def test_fitted_merges_equal_the_formula_row_by_row(pair_of, tmp_path, name, keep):
    target, ability = pair_of(name)
    tied = name in ("gpt2", "gemma2")
    options = {"exclude": ["lm_head"]} if tied else {}
    mask = random_mask(target, ability, tmp_path / "m.safetensors", **options)
    inputs = inputs_of(target, ability)
    save_inputs(inputs, tmp_path / "inputs.safetensors")
    settings = {"weight": 0.7, "mask": str(tmp_path / "m.safetensors"), "fit": str(tmp_path / "inputs.safetensors")}
    settings |= {"fit_keep": keep, "fit_ridge": 0.1}
    merged(act_config(target, (ability, settings)), tmp_path / "out")
    ours, theirs, result = map(parameters_of, (target, ability, tmp_path / "out"))
    seen = 0
    for module, chosen in mask.channels.items():
        for parameter, axis in mask.layout.parameters[module]:
            change = theirs[parameter] - ours[parameter]
            fitted = expected_change(inputs, mask.layout, module, parameter, change, keep, 0.1)
            shape = [1] * change.ndim
            shape[axis] = chosen.shape[-1]
            if chosen.ndim == 2:
                shape[0] = len(chosen)
            cells = chosen.reshape(shape).expand(change.shape)
            expected = torch.where(cells, ours[parameter].double() + 0.7 * fitted, ours[parameter].double())
            largest = fitted.abs().max().item()
            torch.testing.assert_close(result[parameter].double(), expected, rtol=1e-5, atol=1e-4 * largest, msg=module)
            assert torch.equal(result[parameter][~cells], ours[parameter][~cells])
            seen += 1
    assert seen > 10


@pytest.mark.parametrize("criterion", ["activation", "local", "attribution"])
def test_inputs_are_the_same_whatever_runs(pair_of, criterion, tmp_path):
    """Whatever the criterion, the micro-batches, and whether models are streamed."""
    target, ability = pair_of("qwen3")
    plain = plain_inputs(target)
    found = inputs_of(target, ability, criterion=criterion, batch_tokens=1 if criterion == "local" else 64)
    streamed = inputs_of(target, ability, criterion=criterion, memory_budget=1_700_000)
    for module in ("model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj", "lm_head"):
        for role in ("recover", "keep"):
            name = f"{role}.{found.sources[module]}"
            torch.testing.assert_close(found.rows(name), streamed.rows(name))
            rows = plain[module][role]
            near = torch.cdist(found.rows(name).double(), rows).min(1)
            assert (near.values < 0.05 * rows.norm(dim=1).mean()).all()  # each is one of the inputs, in eight bits
            assert len(set(near.indices.tolist())) == len(near.indices)  # and none twice
    assert found.sources["model.layers.1.self_attn.v_proj"] == "model.layers.1.self_attn.q_proj"
    assert {role: said["abilities"] for role, said in found.roles.items()} == {"recover": ["one"], "keep": ["two"]}
    norm = torch.stack([row.square() for row in plain["model.norm"]["keep"]]).mean(0)
    torch.testing.assert_close(found.tensors["keep.model.norm"].double(), norm, rtol=1e-4, atol=1e-6)


def plain_inputs(target) -> dict[str, dict[str, torch.Tensor]]:
    """Module -> role -> all of its inputs, of a norm what its weight multiplies; one sample at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    names = ["model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj", "lm_head", "model.norm"]
    seen: dict[str, list[torch.Tensor]] = {}
    for name in names:

        def note(module, arguments, output, name=name):
            rows = output / module.weight if name == "model.norm" else arguments[0]
            seen.setdefault(name, []).append(rows[0].double())

        model.get_submodule(name).register_forward_hook(note)
    found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    for ability in two_abilities():
        seen.clear()
        with torch.no_grad():
            for sample in ability.samples:
                model(input_ids=sample.input_ids[None], use_cache=False)
        for name in names:
            found[name][ROLES[ability.name]] = torch.cat(seen[name])
    return found


@pytest.fixture
def profiled(pair_of, tmp_path, monkeypatch):
    """A folder with models, an ability to recover and one to keep, and their profiles with inputs."""

    def make(name: str = "qwen2"):
        target, ability = pair_of(name)
        monkeypatch.chdir(tmp_path)
        rows = [{"q": f"{a}+{b}", "a": str(a + b)} for a in range(8) for b in range(8)]
        (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = "dataset: sums.jsonl, prompt: q, answer: a, samples: 12, evaluate: {samples: 4, max_new_tokens: 3}"
        (tmp_path / "abilities.yml").write_text(
            f"target: {target}\nability_model: {ability}\nabilities:\n"
            f"  gained: {{{data}}}\n  kept: {{role: keep, seed: 5, {data}}}\n"
        )
        run("profile", "abilities.yml", "profiles", "--criterion", "attribution", "--inputs", "--dtype", "float32")
        return target, ability

    return make


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_from_profile_to_fitted_merge_and_sweep(profiled, tmp_path):
    """The commands in the order of a user; the sweep's best merge has the very likelihoods of its score."""
    target, ability = profiled()
    said = run(
        *("mask", "profiles/gained.safetensors", "-o", "mask.safetensors", "--density", "0.3"),
        *("--retain", "profiles/kept.safetensors"),
    )
    assert "expected at weight 1, not fitted: the loss of gained falls by" in said
    assert "of kept rises by" in said
    run("report", "mask.safetensors")
    settings = {"weight": 1.0, "mask": "mask.safetensors", "fit": "profiles/fit/inputs.safetensors"}
    fitted = merged(act_config(target, (ability, settings), dtype="float32"), tmp_path / "fitted")
    plain = merged(
        act_config(target, (ability, {k: v for k, v in settings.items() if k != "fit"}), dtype="float32"),
        tmp_path / "plain",
    )
    assert not all(torch.equal(fitted[name], plain[name]) for name in plain)
    said = check(act_config(target, (ability, settings), dtype="float32"), tmp_path).output
    assert re.search(
        r"note: the selected rows of \d+ tensors of .* are fitted, with \d+ inputs to \w+ and \d+ inputs", said
    )
    run("card", "fitted")
    (copied,) = (tmp_path / "fitted/fit").iterdir()
    assert copied.read_bytes() == (tmp_path / "profiles/fit/inputs.safetensors").read_bytes()
    own = yaml.safe_load((tmp_path / "fitted/act.yml").read_text())["models"][0]["parameters"]
    assert own["fit"] == f"fit/{copied.name}"
    card = (tmp_path / "fitted/README.md").read_text()
    assert "--criterion attribution" in card
    assert "the loss of gained falls by" in card
    follow(card, tmp_path / "fitted", tmp_path / "away")
    again = tmp_path / "away/again/model.safetensors"
    assert again.read_bytes() == (tmp_path / "fitted/model.safetensors").read_bytes()
    assert (tmp_path / "away/fit" / copied.name).read_bytes() == copied.read_bytes()
    ties = merged(
        act_config(target, (ability, settings | {"density": 1.0}), merge_method="act_ties"), tmp_path / "ties"
    )
    for name, tensor in fitted.items():  # of one model, untrimmed, ties adds what act adds
        torch.testing.assert_close(ties[name], tensor, rtol=1e-5, atol=1e-6)
    run("profile", "abilities.yml", "local", "--criterion", "local", "--dtype", "float32")
    own = {"weight": 1.0, "mask": "profiles/gained.safetensors, local/gained.safetensors", "mask_density": 0.1}
    (tmp_path / "act.yml").write_text(yaml.safe_dump(act_config(target, (ability, own), dtype="float32")))
    axes = ("--criterion", "local", "--criterion", "attribution", "--fit", "profiles/fit/inputs.safetensors")
    grid = ("--density", "0.2", "--density", "0.5", "--weight", "0.7", "--keep-within", "1")
    said = run("sweep", "act.yml", "abilities.yml", "swept", *axes, *grid, "--device", "cpu")
    rows = list(csv.DictReader((tmp_path / "swept/sweep.csv").open()))
    assert len(rows) == 1 + 2 * 2 * 2
    assert {(row["criterion"], row["fit"].partition("#")[0]) for row in rows[1:]} == {
        (criterion, fit) for criterion in ("local", "attribution") for fit in ("", "profiles/fit/inputs.safetensors")
    }
    best = yaml.safe_load((tmp_path / "swept/best.yml").read_text())
    merged(best, tmp_path / "best")
    said = json.loads(
        run(
            "evaluate",
            str(tmp_path / "best"),
            "--abilities",
            "abilities.yml",
            "--json",
            "-",
            "--device",
            "cpu",
            "--dtype",
            "float32",
        )
    )
    nll = {one["ability"]: one["nll"]["value"] for one in said["results"]}
    own = best["models"][0]["parameters"]
    row = next(
        r
        for r in rows
        if (r["density"], r["fit"].partition("#")[0]) == (str(own["mask_density"]), own.get("fit", ""))
        and r["criterion"] in own["mask"].replace("profiles/", "attribution/")
    )
    assert nll["gained"] == pytest.approx(float(row["nll:gained"]), rel=1e-5)


def follow(card: str, folder: Path, away: Path) -> None:
    """What a card says, in a folder that has the files it names and nothing else."""
    lines = [line for block in card.split("```sh\n")[1:] for line in block.split("```")[0].splitlines()]
    assert "role: keep" in (folder / "abilities.yml").read_text()
    away.mkdir()
    for path in (folder / "act.yml", folder / "abilities.yml", folder.parent / "sums.jsonl"):
        shutil.copy(path, away / path.name)
    for line in lines[1:]:
        command = [sys.executable, "-m", *line.replace("mergekit-act", "mergekit_act").split()]
        if line.startswith("mergekit-yaml"):
            command[2:3] = ["mergekit_act", "merge"]
        done = subprocess.run(line.split() if line.split()[0] in ("mkdir", "cp") else command, cwd=away, check=False)
        assert done.returncode == 0, line


def test_what_is_wrong_with_a_fit_is_told_before_the_first_tensor(profiled, pair_of, tmp_path):
    target, ability = profiled()
    random_mask(target, ability, tmp_path / "m.safetensors")
    own = {"weight": 1.0, "mask": "m.safetensors", "fit": "profiles/fit/inputs.safetensors"}

    def said(**changes) -> str:
        return refusal(act_config(target, (ability, own | changes)), tmp_path / "out")

    assert 'fit "nowhere.safetensors" does not exist' in said(fit="nowhere.safetensors")
    assert "is a mask; expected inputs" in said(fit="m.safetensors")
    assert "fit_ridge is 0; expected a number above 0" in said(fit_ridge=0)
    assert "fit_keep is -1; expected a number of at least 0" in said(fit_keep=-1)
    inputs = load_inputs(tmp_path / "profiles/fit/inputs.safetensors")
    for name, changed, what in (
        ("keep", replace(inputs, roles={"recover": inputs.roles["recover"]}), "or set fit_keep: 0"),
        (
            "recover",
            replace(inputs, roles={"keep": inputs.roles["keep"]}),
            'no inputs of abilities with "role: recover"',
        ),
        ("pair", replace(inputs, target={"model": "other", "fingerprint": "x"}), "has inputs of another target, other"),
        (
            "module",
            replace(inputs, sources={m: s for m, s in inputs.sources.items() if "up_proj" not in m}),
            'has no inputs for "model.layers.0.mlp.up_proj.weight"',
        ),
    ):
        save_inputs(changed, tmp_path / f"{name}.safetensors")
        assert what in said(fit=f"{name}.safetensors")
    tied, other = pair_of("qwen2-tied")
    random_mask(tied, other, tmp_path / "tied.safetensors")
    save_inputs(inputs_of(tied, other), tmp_path / "tied-inputs.safetensors")
    config = act_config(tied, (other, own | {"mask": "tied.safetensors", "fit": "tied-inputs.safetensors"}))
    assert "a fit needs one of them excluded" in refusal(config, tmp_path / "out")


def test_scores_of_a_sweep_are_of_what_the_file_of_inputs_holds(profiled, tmp_path):
    target, ability = profiled()
    own = {"weight": 1.0, "mask": "profiles/gained.safetensors", "mask_density": 0.1}
    (tmp_path / "act.yml").write_text(yaml.safe_dump(act_config(target, (ability, own), dtype="float32")))
    command = ["sweep", "act.yml", "abilities.yml", "swept", "--density", "0.5", "--weight", "1", "--no-generate"]
    fit = tmp_path / "profiles/fit/inputs.safetensors"
    run(*command, "--fit", str(fit), "--device", "cpu")
    inputs = load_inputs(fit)
    changed = {n: t * 2 if n.endswith("down_proj.scale") else t for n, t in inputs.tensors.items()}
    changed |= {n: t * 3 for n, t in inputs.tensors.items() if n.startswith("keep") and n.endswith(".scale")}
    save_inputs(replace(inputs, tensors=changed), fit, overwrite=True)
    run(*command, "--fit", str(fit), "--device", "cpu")
    rows = list(csv.DictReader((tmp_path / "swept/sweep.csv").open()))
    assert len(rows) == 4  # the target, one without a fit, one for each state of the file
    assert len({row["nll:gained"] for row in rows}) == 4
    (tmp_path / "own.yml").write_text(yaml.safe_dump(act_config(target, (ability, own | {"fit": str(fit)}))))
    said = run("sweep", "own.yml", "abilities.yml", "other", "--fit", str(fit), code=1)
    assert 'own.yml sets "fit" itself; leave it out, --fit sets it' in said
    fit.write_bytes(fit.read_bytes()[:-1] + b"\x7b")
    assert "their checksum is another" in run(*command, "--fit", str(fit), code=1)


def test_a_templates_tokens_are_taken_once_with_their_weight(pair_of):
    """Twenty tokens that three samples begin with: each stands for three; the means are those over all inputs."""
    target, ability = pair_of("llama")
    generator = torch.Generator().manual_seed(3)
    common = torch.randint(3, 128, (20,), generator=generator).tolist()
    own = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (5, 9, 7)]
    own[0][0], own[1][0] = 4, 5
    samples = [([*common, *tokens], [False] * 20 + [True] * len(tokens)) for tokens in own]
    pair = open_pair(str(target), str(ability))
    settings = ProfilingSettings(**SETTINGS)
    inputs = measure_pair(pair, [as_ability(samples, "one")], settings, roles={"one": "recover"})[1]
    taken = {"abilities": ["one"], "data": {"one": {}}, "samples": 3, "tokens": 41, "rows": 41}
    assert inputs.roles["recover"] == taken
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    seen: dict[str, list[torch.Tensor]] = {"up": [], "norm": []}
    layer = model.model.layers[1]
    layer.mlp.up_proj.register_forward_hook(lambda _, given, out: seen["up"].append(given[0][0].double()))
    layer.input_layernorm.register_forward_hook(lambda m, _, out: seen["norm"].append((out / m.weight)[0].double()))
    with torch.no_grad():
        for ids, _ in samples:
            model(input_ids=torch.tensor([ids]), use_cache=False)
    every, normed = (torch.cat(seen[name]) for name in ("up", "norm"))
    rows = inputs.rows(f"recover.{inputs.sources['model.layers.1.mlp.up_proj']}").double()
    expected = every.T @ every / len(every)
    near = 0.02 * expected.diagonal().mean().item()
    torch.testing.assert_close(rows.T @ rows / len(rows), expected, rtol=0.1, atol=near)
    squares = inputs.tensors["recover.model.layers.1.input_layernorm"].double()
    torch.testing.assert_close(squares, normed.square().mean(0), rtol=1e-4, atol=1e-6)
    shares = torch.bincount(torch.cat([torch.tensor(ids) for ids, _ in samples]), minlength=128) / 81
    torch.testing.assert_close(inputs.tensors["recover.model.embed_tokens"], shares)


@pytest.mark.parametrize(("width", "rows"), [(16, range(64, 65)), (256, range(65, 512))])
def test_a_file_of_inputs_has_a_tenth_of_the_models_bytes_but_some_rows_at_least(tmp_path, width, rows):
    config = tiny_config("llama", hidden_size=width, intermediate_size=2 * width)
    pair = open_pair(*(str(make_model(config, tmp_path / str(seed), seed=seed)) for seed in (1, 2)))
    samples = [sample for seed in range(12) for sample in random_samples(seed)]
    roles = {"one": "recover"}
    inputs = measure_pair(pair, [as_ability(samples, "one")], ProfilingSettings(**SETTINGS), roles=roles)[1]
    taken = inputs.roles["recover"]
    assert taken["tokens"] > 512
    assert taken["rows"] in rows
    written = sum(tensor.nbytes for tensor in inputs.tensors.values() if tensor.dtype == torch.float8_e4m3fn)
    model = sum(header.size for header in pair.target.headers.values())
    assert width == 16 or 0.09 * model < written < 0.1 * model


def test_profiles_and_inputs_of_other_settings_are_refused(profiled, tmp_path):
    profiled()
    said = run("profile", "abilities.yml", "profiles", "--criterion", "attribution", "--inputs", code=1)
    assert "profiles/gained.safetensors" in said
    for wrong in (("--criterion", "weight"), ("--criterion", "attribution", "--points", "2")):
        said = run("profile", "abilities.yml", "other", "--inputs", *wrong, code=1)
        assert "inputs are the target's on samples" in said
    assert "expected a profile or a mask" in run("report", "profiles/fit/inputs.safetensors", code=1)
