"""Profiles and masks on disk: bytes, validation, atomicity."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mergekit_act.artifacts import ArtifactError, Mask, Profile, load_mask, load_profile, save_mask, save_profile
from mergekit_act.channels import Layout

LAYOUT = Layout(
    parameters={"b.linear": (("b.linear.weight", 0), ("b.linear.bias", 0)), "a.norm": (("a.norm.weight", 0),)},
    tied=(),
    shapes={"b.linear.weight": (4, 3), "b.linear.bias": (4,), "a.norm.weight": (3,)},
)


def profile(**changes) -> Profile:
    values = {
        "scores": {"b.linear": torch.tensor([4.0, 3.0, 2.0, 1.0]), "a.norm": torch.tensor([0.5, 0.0, 2.5])},
        "layout": LAYOUT,
        "criterion": "activation",
        "ability": "science-en",
        "target": {"model": "t", "revision": None, "fingerprint": "00"},
        "ability_model": {"model": "a", "revision": None, "fingerprint": "11"},
        "samples": 3,
        "answer_tokens": 17,
        "dtype": "bfloat16",
        "data": {"seed": 0},
    }
    return Profile(**values | changes)


def mask() -> Mask:
    chosen = {"b.linear": torch.tensor([True, False, False, True]), "a.norm": torch.zeros(3, dtype=torch.bool)}
    return Mask(channels=chosen, layout=LAYOUT, sources=({"ability": "science-en", "density": 0.3},))


def test_profile_round_trip(tmp_path):
    save_profile(profile(), tmp_path / "new" / "p.safetensors")
    loaded = load_profile(tmp_path / "new" / "p.safetensors")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["p.safetensors"]  # no temporary file
    assert list(loaded.scores) == ["b.linear", "a.norm"]  # the layout's order, not safetensors'
    assert loaded.scores["a.norm"].tolist() == [0.5, 0.0, 2.5]
    assert loaded.layout == LAYOUT
    assert (loaded.ability, loaded.samples, loaded.answer_tokens, loaded.dtype) == ("science-en", 3, 17, "bfloat16")
    assert loaded.target == profile().target


def test_file_follows_the_format(tmp_path):
    save_profile(profile(), tmp_path / "p.safetensors")
    with safe_open(tmp_path / "p.safetensors", "pt") as file:
        assert list(file.metadata()) == ["mergekit_act"]
        text = file.metadata()["mergekit_act"]
    metadata = json.loads(text)
    assert text == json.dumps(metadata, sort_keys=True)
    assert metadata["kind"] == "profile"
    assert metadata["format_version"] == 1
    assert metadata["modules"] == ["b.linear", "a.norm"]
    assert metadata["parameters"]["b.linear"] == [["b.linear.weight", 0], ["b.linear.bias", 0]]
    assert set(metadata["versions"]) == {"mergekit-act", "torch", "transformers"}


def test_mask_keeps_only_modules_with_a_selected_channel(tmp_path):
    save_mask(mask(), tmp_path / "m.safetensors")
    loaded = load_mask(tmp_path / "m.safetensors")
    assert list(loaded.channels) == ["b.linear"]
    assert loaded.channels["b.linear"].tolist() == [True, False, False, True]
    assert loaded.sources == ({"ability": "science-en", "density": 0.3},)


def test_equal_content_gives_equal_bytes(tmp_path):
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_profile(profile(), first)
    turned = dict(reversed(profile().scores.items()))
    save_profile(profile(scores=turned), second)
    assert first.read_bytes() == second.read_bytes()


def test_existing_file_is_kept_unless_overwritten(tmp_path):
    path = tmp_path / "p.safetensors"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"p\.safetensors exists\. Choose another name or say --overwrite\."):
        save_profile(profile(), path)
    assert path.read_text() == "mine"
    save_profile(profile(), path, overwrite=True)
    assert load_profile(path).ability == "science-en"


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_profile(profile(), tmp_path / "p.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_written_files_have_the_usual_permissions(tmp_path):
    save_profile(profile(), tmp_path / "p.safetensors")
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "p.safetensors").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


def rewrite(path: Path, change) -> None:
    """Change a file's metadata."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = json.loads(file.metadata()["mergekit_act"])
    change(metadata, tensors)
    save_file(tensors, path, metadata={"mergekit_act": json.dumps(metadata, sort_keys=True)})


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"p\.safetensors does not exist\."):
        load_profile(tmp_path / "p.safetensors")


def test_truncated_file(tmp_path):
    path = tmp_path / "p.safetensors"
    save_profile(profile(), path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ArtifactError, match="not a complete safetensors file"):
        load_profile(path)


def test_foreign_file(tmp_path):
    path = tmp_path / "p.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(
        ArtifactError, match='is not a profile or mask of mergekit-act: it has no "mergekit_act" metadata'
    ):
        load_profile(path)


def test_newer_version_is_named(tmp_path):
    path = tmp_path / "p.safetensors"
    save_profile(profile(), path)
    rewrite(path, lambda metadata, _: metadata.update(format_version=2))
    with pytest.raises(ArtifactError, match=r"has format version 2; this mergekit-act .* reads version 1"):
        load_profile(path)


def test_profile_and_mask_are_not_confused(tmp_path):
    save_profile(profile(), tmp_path / "p.safetensors")
    save_mask(mask(), tmp_path / "m.safetensors")
    with pytest.raises(ArtifactError, match="is a mask; expected a profile"):
        load_profile(tmp_path / "m.safetensors")
    with pytest.raises(ArtifactError, match="is a profile; expected a mask"):
        load_mask(tmp_path / "p.safetensors")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_scores_that_are_no_scores(tmp_path, bad):
    path = tmp_path / "p.safetensors"
    save_profile(profile(), path)

    def spoil(_, tensors):
        tensors["a.norm"][1] = bad

    rewrite(path, spoil)
    with pytest.raises(ArtifactError, match=r'module "a\.norm" has (scores that are NaN or infinite|negative scores)'):
        load_profile(path)


def test_all_problems_of_a_file_are_listed(tmp_path):
    path = tmp_path / "m.safetensors"
    save_mask(mask(), path)

    def spoil(_, tensors):
        tensors["b.linear"] = torch.ones(5, dtype=torch.bool)
        tensors["c.unknown"] = torch.ones(5, dtype=torch.bool)

    rewrite(path, spoil)
    with pytest.raises(ArtifactError) as caught:
        load_mask(path)
    assert 'module "b.linear" has 5 channels, its parameters say 4' in str(caught.value)
    assert 'module "c.unknown" is not in its list of modules' in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": {"b.linear": [["b.linear.weight", 7]], "a.norm": [["a.norm.weight", 0]]}},
        {"parameters": {}},
        {"shapes": 5},
        {"shapes": {"b.linear.weight": [4, 3]}},
        {"sources": ["a"]},
        {"sources": None},
        {"tied": 3},
        {"modules": None},
    ],
    ids=str,
)
def test_metadata_of_another_form(tmp_path, change):
    path = tmp_path / "m.safetensors"
    save_mask(mask(), path)
    rewrite(path, lambda metadata, _: metadata.update(change))
    with pytest.raises(ArtifactError, match=r"m\.safetensors is not a valid file of mergekit-act: its "):
        load_mask(path)


def test_a_file_with_the_common_metadata_alone_is_enough(tmp_path):
    """Others may write masks by the format's description, which does not ask for parameter shapes."""
    path = tmp_path / "m.safetensors"
    save_mask(mask(), path)

    def strip(metadata, _):
        for key in set(metadata) - {"kind", "format_version", "modules", "parameters", "tied"}:
            del metadata[key]

    rewrite(path, strip)
    assert load_mask(path).channels["b.linear"].tolist() == [True, False, False, True]
