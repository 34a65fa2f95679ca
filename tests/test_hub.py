"""Models from the Hub, with its own client and a server on the loopback address."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml
from hub import COMMIT, run_there
from merges import act_config, assert_merged, random_mask, state_of
from tiny import make_model, tiny_config

from mergekit_act.artifacts import Mask, load_profile
from mergekit_act.selection import select_channels, unite


def test_a_pair_is_profiled_from_hub_ids_with_a_revision(sums_file, tmp_path):
    for name, seed in (("target", 0), ("ability", 1)):
        make_model(tiny_config("qwen2"), tmp_path / "hub" / "someone" / name, seed=seed)
    (tmp_path / "a.yml").write_text(
        "target: someone/target@v1\nability_model: someone/ability\n"
        f"abilities:\n  sums: {{dataset: {sums_file}, prompt: q, answer: a, samples: 4}}\n"
    )
    done, asked = run_there(
        tmp_path, sys.executable, "-m", "mergekit_act", "profile", "a.yml", "out", "--quiet", "--dtype", "float32"
    )
    assert done.returncode == 0, (done.stderr[-2000:], asked)
    profile = load_profile(tmp_path / "out" / "sums.safetensors")
    assert (profile.target["model"], profile.target["revision"]) == ("someone/target", COMMIT)
    assert (profile.ability_model["model"], profile.ability_model["revision"]) == ("someone/ability", COMMIT)
    assert any("/someone/target/" in path and "v1" in path for path in asked), asked

    # Switched off, the Hub's cache is enough for a profile and for plain mergekit-yaml.
    done, asked = run_there(
        tmp_path,
        *(sys.executable, "-m", "mergekit_act", "profile", "a.yml", "again", "--quiet", "--dtype", "float32"),
        HF_HUB_OFFLINE="1",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "again/sums.safetensors").read_bytes() == (tmp_path / "out/sums.safetensors").read_bytes()
    parameters = {"weight": 0.5, "mask": "again/sums.safetensors", "mask_density": 0.3}
    config = act_config(tmp_path, ("someone/ability", parameters)) | {"base_model": "someone/target@v1"}
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    script = str(Path(sys.executable).parent / "mergekit-yaml")
    done, asked = run_there(tmp_path, script, "c.yml", "merged", "--quiet", HF_HUB_OFFLINE="1")
    assert (done.returncode, asked) == (0, []), done.stderr[-2000:]
    assert (tmp_path / "merged/tokenizer.json").is_file()
    chosen = select_channels(profile, 0.3)
    folders = [tmp_path / "hub/someone" / name for name in ("target", "ability")]
    states = [state_of(tmp_path / "merged"), *map(state_of, folders)]
    assert_merged(states[0], states[1], [(states[2], 0.5, Mask(chosen, profile.layout))], tied=False)


def test_masks_come_from_the_hub_and_then_from_its_cache(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    masks = [
        random_mask(target, ability, tmp_path / "hub" / "someone" / "masks" / f"{name}.safetensors", seed=seed)
        for seed, name in enumerate(("science", "code"))
    ]
    script = str(Path(sys.executable).parent / "mergekit-yaml")

    def merge(setting, out, **environment):
        config = act_config(target, (ability, {"weight": 0.5, "mask": setting}))
        (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
        return run_there(tmp_path, script, "c.yml", out, "--quiet", **environment)

    done, asked = merge("hf://someone/masks@v1/science.safetensors", "one")
    assert done.returncode == 0, (done.stderr[-2000:], asked)
    assert any("/someone/masks/resolve/v1/science.safetensors" in path for path in asked)
    assert_merged(state_of(tmp_path / "one"), state_of(target), [(state_of(ability), 0.5, masks[0])], tied=False)

    done, _ = merge("hf://someone/masks@v1/science.safetensors", "again", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr[-2000:]

    done, asked = merge("hf://someone/masks/*.safetensors", "both")
    assert done.returncode == 0, (done.stderr[-2000:], asked)
    both = Mask(unite(mask.channels for mask in masks), masks[0].layout)
    assert_merged(state_of(tmp_path / "both"), state_of(target), [(state_of(ability), 0.5, both)], tied=False)


def test_masks_that_are_not_on_the_hub(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    random_mask(target, ability, tmp_path / "hub" / "someone" / "masks" / "science.safetensors")
    script = str(Path(sys.executable).parent / "mergekit-yaml")
    settings = {
        "hf://someone/masks/scince.safetensors": 'mask "hf://someone/masks/scince.safetensors" could not be fetched',
        "hf://no/body/science.safetensors": 'mask "hf://no/body/science.safetensors" could not be fetched',
        "hf://someone/masks/*.bin": 'mask "hf://someone/masks/*.bin" matches no file',
        "hf://someone/masks": 'mask "hf://someone/masks" names a repository; add a file',
        "hf://science.safetensors": "expected hf://user/repo[@revision]/file.safetensors",
    }
    config = act_config(target, *((ability, {"weight": 0.5, "mask": setting}) for setting in settings))
    for place, model in enumerate(config["models"][1:]):
        (tmp_path / f"m{place}").symlink_to(ability)
        model["model"] = str(tmp_path / f"m{place}")
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    done, _ = run_there(tmp_path, script, "c.yml", "out", "--quiet")
    assert done.returncode == 1
    for words in settings.values():
        assert words in done.stderr
    assert "Traceback" not in done.stderr
