"""The commands as functions."""

from __future__ import annotations

import pytest
import yaml
from merges import act_config, state_of

import mergekit_act


def test_the_path_in_python(pair_of, sums_file, abilities_yml, tmp_path):
    target, ability = pair_of("qwen2")
    keys = "    prompt: q\n    answer: a\n    evaluate: {samples: 8, max_new_tokens: 4}\n"
    abilities = abilities_yml(target, ability, sums_file, ability_keys=keys)
    profiles = mergekit_act.profile(abilities, tmp_path / "profiles", criterion="local", dtype="float32", quiet=True)
    assert profiles["sums"].samples == 12
    mask = mergekit_act.make_mask(list(profiles.values()), 0.2)
    mergekit_act.save_mask(mask, tmp_path / "mask.safetensors")

    own = {"weight": 1.0, "mask": str(tmp_path / "profiles/sums.safetensors"), "mask_density": 0.1}
    (tmp_path / "sweep.yml").write_text(yaml.safe_dump(act_config(target, (ability, own))))
    found = mergekit_act.sweep(
        tmp_path / "sweep.yml", abilities, tmp_path / "sweep", densities=[0.2], weights=[0.5, 1.0], generate=False
    )
    assert [score.point.weights for score in found.scores] == [(0.5,), (1.0,)]

    own = {"weight": 0.5, "mask": str(tmp_path / "mask.safetensors")}
    (tmp_path / "act.yml").write_text(yaml.safe_dump(act_config(target, (ability, own))))
    summary = mergekit_act.merge(tmp_path / "act.yml", tmp_path / "merged", quiet=True)
    assert summary.selected == mask.counts["channels"]
    assert any((tensor != state_of(target)[name]).any() for name, tensor in state_of(tmp_path / "merged").items())
    evaluation = mergekit_act.evaluate(
        [str(target), str(tmp_path / "merged")], abilities, generate=False, dtype="float32"
    )
    assert evaluation.results[1].nll.value == pytest.approx(float(found.scores[0].nll["sums"]), abs=1e-4)
