"""Scores beyond the paper's against plain implementations: whole models, weight gradients, one sample at a time."""

from __future__ import annotations

import csv
import itertools
import shutil
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from oracle import plain_attribution, plain_local, plain_local_experts
from safetensors.torch import load_file, save_file
from samples import ARCHITECTURES, as_ability, random_samples
from tiny import make_model, tiny_config

from mergekit_act.artifacts import ArtifactError, load_profile, save_profile
from mergekit_act.cli import main
from mergekit_act.profiling import ProfilingSettings, open_pair, profile_pair
from mergekit_act.selection import select_channels

EXPERTS = ("qwen3_moe", "mixtral", "gpt_oss")


def settings(criterion: str, **changes) -> ProfilingSettings:
    return ProfilingSettings(**{"criterion": criterion, "device": "cpu", "dtype": "float32"} | changes)


def assert_near(found, expected, tolerance=1e-4):
    """Relative to the largest of a module: single products of gradients may cancel out to nothing."""
    for module, values in expected.items():
        largest = values.abs().max().item()
        torch.testing.assert_close(found[module].double(), values.double(), rtol=1e-3, atol=tolerance * largest)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *EXPERTS])
def test_attribution_and_damage_equal_gradients_of_the_weights(pair_of, name):
    target, ability = pair_of(name)
    pair = open_pair(str(target), str(ability))
    samples = random_samples()
    batch_tokens = {"qwen2": 1, "llama": 64, "gpt2": 70}.get(name, 4096)
    (profile,) = profile_pair(pair, [as_ability(samples)], settings("attribution", batch_tokens=batch_tokens))
    gains, damages = plain_attribution(target, ability, samples, pair.layout)
    assert_near(profile.scores, gains)
    assert_near(profile.damage, damages)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_local_scores_equal_both_models_modules_on_the_targets_inputs(pair_of, name):
    target, ability = pair_of(name)
    pair = open_pair(str(target), str(ability))
    samples = random_samples()
    (profile,) = profile_pair(pair, [as_ability(samples)], settings("local"))
    assert_near(profile.scores, plain_local(target, ability, samples, pair.layout.modules))


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_scored_for_the_tokens_that_the_targets_router_gives_them(pair_of, name):
    target, ability = pair_of(name)
    pair = open_pair(str(target), str(ability))
    samples = random_samples()
    (profile,) = profile_pair(pair, [as_ability(samples)], settings("local", batch_tokens=64))
    assert_near(profile.scores, plain_local_experts(target, ability, samples))
    answers = 8 + 4 + 30 + 1 + 4
    assert [sum(counts) for counts in profile.data["expert_tokens"].values()] == [2 * answers] * 2


@pytest.mark.parametrize("points", [2, 3])
def test_points_on_the_line_are_averaged(pair_of, points):
    target, ability = pair_of("qwen2-tied")
    pair = open_pair(str(target), str(ability))
    samples = random_samples()
    (profile,) = profile_pair(pair, [as_ability(samples)], settings("attribution", points=points))
    line = [(n + 0.5) / points for n in range(points)]
    each = [plain_attribution(target, ability, samples, pair.layout, point) for point in line]
    for found, kind in ((profile.scores, 0), (profile.damage, 1)):
        assert_near(found, {m: sum(one[kind][m] for one in each) / points for m in pair.layout.modules})
    assert profile.data["points"] == points


def test_untied_target_with_tied_ability_model(pair_of):
    """The ability model's one matrix differs from the target's two."""
    target, ability = pair_of("qwen2")[0], pair_of("qwen2-tied")[1]
    pair = open_pair(str(target), str(ability))
    samples = random_samples()
    (attribution,) = profile_pair(pair, [as_ability(samples)], settings("attribution"))
    assert_near(attribution.scores, plain_attribution(target, ability, samples, pair.layout)[0])
    (local,) = profile_pair(pair, [as_ability(samples)], settings("local"))
    assert_near(local.scores, plain_local(target, ability, samples, pair.layout.modules))


def test_the_loss_counts_vocabulary_rows_that_only_the_target_has(tmp_path):
    longer = make_model(tiny_config("llama", vocab_size=144), tmp_path / "target", seed=1)
    shorter = make_model(tiny_config("llama"), tmp_path / "ability", seed=2)
    pair = open_pair(str(longer), str(shorter))
    samples = random_samples()
    (profile,) = profile_pair(pair, [as_ability(samples)], settings("attribution"))
    gains, damages = plain_attribution(longer, shorter, samples, pair.layout)
    assert_near(profile.scores, gains)
    assert_near(profile.damage, damages)
    assert (profile.scores["lm_head"][128:] == 0).all()


def test_centered_logits_leave_out_what_softmax_ignores(pair_of, tmp_path):
    """Adding one vector to all rows of a head changes no probability, and no centered score."""
    target, ability = pair_of("qwen2")
    state = load_file(ability / "model.safetensors")
    state["lm_head.weight"] += torch.randn(32, generator=torch.Generator().manual_seed(0))
    shifted = shutil.copytree(ability, tmp_path / "shifted")
    save_file(state, shifted / "model.safetensors", metadata={"format": "pt"})
    samples, scores = [as_ability(random_samples())], {}
    for criterion in ("activation", "local"):
        for name, folder in (("plain", ability), ("shifted", shifted)):
            pair = open_pair(str(target), str(folder))
            (profile,) = profile_pair(pair, samples, settings(criterion, center_logits=True))
            scores[name] = profile.scores
            assert profile.data["center_logits"] is True
        torch.testing.assert_close(scores["shifted"]["lm_head"], scores["plain"]["lm_head"], rtol=1e-4, atol=1e-5)
    (paper,) = profile_pair(pair, samples, settings("activation"))
    assert "center_logits" not in paper.data
    assert paper.scores["lm_head"].mean() > 3 * scores["plain"]["lm_head"].mean()


def test_a_broken_gradient_is_told_with_module_and_sample(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    state = load_file(ability / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.inf
    broken = shutil.copytree(ability, tmp_path / "broken")
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    pair = open_pair(str(target), str(broken))
    with pytest.raises(
        ValueError, match=r'gradients or activations of 1 modules .*"model\.layers\.1\.mlp\.up_proj"; the'
    ):
        profile_pair(pair, [as_ability(random_samples())], settings("attribution"))


def test_settings_of_other_criteria_are_refused(pair_of):
    pair = open_pair(*map(str, pair_of("qwen2")))
    for wrong, said in (
        (settings("local", points=2), "points belong to the criterion attribution, not to local"),
        (settings("attribution", center_logits=False), "logits are centered for the criteria activation and local"),
    ):
        with pytest.raises(ValueError, match=said):
            profile_pair(pair, [as_ability(random_samples())], wrong)


def test_a_report_of_several_criteria(pair_of, tmp_path):
    """A section for each, and how much of an ability's channels they share."""
    pair = open_pair(*map(str, pair_of("qwen2")))
    abilities = [as_ability(random_samples(), "one"), as_ability(random_samples(1), "two")]
    profiles, paths = {}, []
    for criterion in ("activation", "local", "attribution"):
        for profile in profile_pair(pair, abilities, settings(criterion)):
            path = tmp_path / f"{criterion}-{profile.ability}.safetensors"
            save_profile(profile, path)
            profiles[criterion, profile.ability] = load_profile(path)
            paths.append(str(path))
    density = 0.1
    report = [*paths, "-o", str(tmp_path / "report"), "--density", str(density), "--quiet"]
    done = CliRunner().invoke(main, ["report", *report])
    assert done.exit_code == 0, (done.output, done.exception)
    rows = {
        (row["ability"], row["pair"].rpartition(", ")[2], row["other_pair"].rpartition(", ")[2]): row
        for row in csv.DictReader((tmp_path / "report/consistency.csv").open())
    }
    for first, second in itertools.combinations(("activation", "local", "attribution"), 2):
        ours, theirs = (select_channels(profiles[criterion, "one"], density) for criterion in (first, second))
        common = sum(int((ours[module] & theirs[module]).sum()) for module in ours if module in theirs)
        assert int(rows["one", first, second]["channels"]) == common
    (signs,) = (tmp_path / "report").glob("attribution-*.csv")
    (one, _) = csv.DictReader(signs.open())
    scores = torch.cat([part.flatten() for part in profiles["attribution", "one"].scores.values()])
    damage = torch.cat([part.flatten() for part in profiles["attribution", "one"].damage.values()])
    assert float(one["share_helping"]) == pytest.approx(float((scores > 0).float().mean()))
    assert float(one["sum_helping"]) == pytest.approx(float(scores[scores > 0].sum()), rel=1e-5)
    assert float(one["sum_damage"]) == pytest.approx(float(damage.sum()), rel=1e-5)
    said = CliRunner().invoke(main, ["report", str(tmp_path / "attribution-one.safetensors")]).output
    assert "of the channels help, by" in said


def test_damage_in_a_file_is_checked(pair_of, tmp_path):
    pair = open_pair(*map(str, pair_of("qwen2")))
    (profile,) = profile_pair(pair, [as_ability(random_samples())], settings("attribution"))
    first = next(iter(profile.damage))
    for changed, what in (
        (replace(profile, damage={}), "has no damage"),
        (replace(profile, damage={**profile.damage, first: -profile.damage[first]}), "has negative damage"),
        (replace(profile, criterion="local"), "it has damage, which the criterion local has not"),
        (replace(profile, criterion="other"), 'criterion "other" is none of'),
    ):
        with pytest.raises(ArtifactError, match=what):
            save_profile(changed, tmp_path / "p.safetensors")


def test_an_ability_without_a_loss_is_told(pair_of):
    pair = open_pair(*map(str, pair_of("qwen2")))
    alone = as_ability([([5, 6, 7], [True, False, False])])
    with pytest.raises(ValueError, match='"x" has no answer token behind another token, and so no loss'):
        profile_pair(pair, [alone], settings("attribution"))
