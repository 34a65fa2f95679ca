"""Profiles and masks on disk: bytes, validation, atomicity."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import LAYOUT, profile

from mergekit_act.artifacts import (
    ArtifactError,
    Mask,
    load_artifact,
    load_mask,
    load_profile,
    save_mask,
    save_profile,
)
from mergekit_act.selection import make_mask


def mask() -> Mask:
    chosen = {"b.linear": torch.tensor([True, False, False, True]), "a.norm": torch.zeros(3, dtype=torch.bool)}
    return Mask(channels=chosen, layout=LAYOUT, sources=({"ability": "science-en", "density": 0.3},))


def plain_checksum(tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].numpy()
        digest.update(json.dumps([name, f"torch.{array.dtype}", list(array.shape)]).encode() + array.tobytes())
    return digest.hexdigest()


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
    assert metadata["format_version"] == 2
    assert metadata["checksum"] == plain_checksum(profile().scores)
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
    rewrite(path, lambda metadata, _: metadata.update(format_version=3))
    with pytest.raises(ArtifactError, match=r"has format version 3; this mergekit-act .* reads versions 1 and 2"):
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
        {"modules": []},
        {"modules": ["b.linear", "a.norm", "b.linear"]},
        {"modules": ["b.linear"]},
        {"modules": ["b.linear", "a.norm", "c"]},
        {"parameters": {"b.linear": [["b.linear.weight", math.inf]], "a.norm": [["a.norm.weight", 0]]}},
        {"parameters": {"b.linear": [["b.linear.weight", True]], "a.norm": [["a.norm.weight", 0]]}},
        {"parameters": {"b.linear": [["a.norm.weight", 0]], "a.norm": [["a.norm.weight", 0]]}},
        {"parameters": {"b.linear": [], "a.norm": [["a.norm.weight", 0]]}},
        {"shapes": {"b.linear.weight": [4, 0], "b.linear.bias": [4], "a.norm.weight": [3]}},
        {"shapes": {"b.linear.weight": [4, 3], "b.linear.bias": [5], "a.norm.weight": [3]}},
        {"shapes": {"b.linear.weight": [4, 1e400], "b.linear.bias": [4], "a.norm.weight": [3]}},
        {"tied": [["b.linear.weight", "a.norm.weight"]]},
        {"tied": [["b.linear.weight"], ["b.linear.weight"]]},
        {"sources": [{"exclude": 2}]},
        {"sources": [{"density": "0.1"}]},
        {"sources": [{"target": "text"}]},
        {"sources": [{"target": {"model": []}}]},
        {"sources": [{"retain": {"abilities": [{"ability": 3}]}}]},
        {"counts": []},
        {"counts": None},
        {"counts": {"channels_taking_part": None}},
        {"counts": {"channels": 3}},
        {"counts": {"parameters": 3}},
        {"counts": {"channels_total": 3}},
        {"counts": {"channels_taking_part": 1}},
        {"checksum": None},
        {"checksum": "00"},
        {"data\ud800": 1},
        {"nested": json.loads("[" * 60 + "]" * 60)},
        {"modules": ["b.linear", "a\x1b[2J"], "parameters": {"b.linear": [["w", 0]], "a\x1b[2J": [["v", 0]]}},
    ],
    ids=lambda change: repr(change)[:90],
)
def test_metadata_of_another_form(tmp_path, change):
    path = tmp_path / "m.safetensors"
    save_mask(mask(), path)
    rewrite(path, lambda metadata, _: metadata.update(change))
    with pytest.raises(ArtifactError, match=r"m\.safetensors is not a valid file of mergekit-act: its ") as caught:
        load_mask(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "change",
    [
        *({key: None} for key in ("criterion", "target", "samples", "data", "shared_rows")),
        {"samples": "3"},
        {"samples": -1},
        {"answer_tokens": 2.5},
        {"data": []},
        {"data": {"expert_tokens": {"a": 3}}},
        *({"shared_rows": rows} for rows in ([], {"a.norm": "2"}, {"a.norm": -1}, {"a.norm": 4}, {"nope": 1})),
    ],
    ids=str,
)
def test_what_a_profile_says_of_another_type(tmp_path, change):
    path = tmp_path / "p.safetensors"
    save_profile(profile(), path)
    rewrite(path, lambda metadata, _: metadata.update(change))
    with pytest.raises(ArtifactError, match=rf"p\.safetensors is not a valid file.*{next(iter(change))}"):
        load_profile(path)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[" * 100_000 + "]" * 100_000,
        '{"format_version": ' + "9" * 5000 + "}",
        '{"kind": "mask", "kind": "profile"}',
    ],
    ids=lambda text: text[:30],
)
def test_metadata_that_is_not_json_of_ours(tmp_path, text):
    save_file({}, tmp_path / "p.safetensors", metadata={"mergekit_act": text})
    with pytest.raises(ArtifactError, match=r"p\.safetensors is not a valid file of mergekit-act: its metadata is n"):
        load_profile(tmp_path / "p.safetensors")


@pytest.mark.parametrize("kind", [None, 3, [], {}, "state\x1b[2J"])
def test_another_kind_of_file(tmp_path, kind):
    save_mask(mask(), tmp_path / "m.safetensors")
    rewrite(tmp_path / "m.safetensors", lambda metadata, _: metadata.update(kind=kind))
    with pytest.raises(
        ArtifactError, match=r'm\.safetensors is a ".*"; expected a profile, a mask or inputs'
    ) as caught:
        load_mask(tmp_path / "m.safetensors")
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("save", [save_profile, save_mask])
def test_a_flipped_bit_of_a_tensor_is_noticed(tmp_path, save):
    path = tmp_path / "f.safetensors"
    save(profile() if save is save_profile else mask(), path)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="their checksum is another"):
        load_artifact(path)


def test_version_1_is_read_and_its_counts_are_compared(tmp_path):
    path = tmp_path / "m.safetensors"
    save_mask(make_mask([profile()], 0.3), path)

    def first_version(metadata, _):
        del metadata["checksum"]
        metadata["format_version"] = 1

    rewrite(path, first_version)
    assert load_mask(path).channels["b.linear"].tolist() == [True, True, False, False]

    def select_more(_, tensors):
        tensors["b.linear"][3] = True

    rewrite(path, select_more)
    with pytest.raises(
        ArtifactError, match='its "counts" say 2 channels, its tensors 3; its "counts" say 8 parameters'
    ):
        load_mask(path)


def test_a_byte_that_is_no_boolean(tmp_path):
    path = tmp_path / "m.safetensors"
    save_mask(mask(), path)
    path.write_bytes(path.read_bytes()[:-1] + b"\x02")
    with pytest.raises(ArtifactError, match=r'module "b\.linear" has bytes that are neither true nor false'):
        load_mask(path)


def test_what_cannot_be_loaded_is_not_saved(tmp_path):
    with pytest.raises(ArtifactError, match='its "counts" say 9 channels, its tensors 2'):
        save_mask(replace(mask(), counts={"channels": 9}), tmp_path / "m.safetensors")
    with pytest.raises(ArtifactError, match=r'shared_rows of "a\.norm" are 4; it has 3 channels'):
        save_profile(profile(shared_rows={"a.norm": 4}), tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())


def test_pipes_and_folders_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match=r"is no regular file; name a file|is a folder"):
            load_profile(path)
    with pytest.raises(OSError, match="pipe is no regular file"):
        save_profile(profile(), tmp_path / "pipe", overwrite=True)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_replaced_only_when_told_and_what_it_leads_to_stays(tmp_path, there):
    path, other = tmp_path / "p.safetensors", tmp_path / "other"
    if there:
        other.write_text("mine")
    path.symlink_to(other)
    with pytest.raises(FileExistsError, match=r"p\.safetensors exists\. Choose another name or say --overwrite"):
        save_profile(profile(), path)
    save_profile(profile(), path, overwrite=True)
    assert not path.is_symlink()
    assert load_profile(path).ability == "science-en"
    assert other.exists() == there
    assert not there or other.read_text() == "mine"


def test_a_file_with_the_common_metadata_alone_is_enough(tmp_path):
    """Others may write masks by the format's description, which does not ask for parameter shapes."""
    path = tmp_path / "m.safetensors"
    save_mask(mask(), path)

    def strip(metadata, _):
        for key in set(metadata) - {"kind", "format_version", "modules", "parameters", "tied"}:
            del metadata[key]
        metadata["format_version"] = 1

    rewrite(path, strip)
    assert load_mask(path).channels["b.linear"].tolist() == [True, False, False, True]
