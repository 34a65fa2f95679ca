"""Transfers from the Hub and to it."""

from __future__ import annotations

import sys

import yaml
from hub import run_there


def push(tmp_path, name, *more):
    """A transfer that uploads."""
    command = [sys.executable, "-m", "mergekit_act", "transfer", "abilities.yml", "out", "--push-to-hub", name]
    return run_there(tmp_path, *command, *more, HF_TOKEN="hf_x")


def test_models_that_cannot_be_reached(abilities, tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "abilities.yml").write_text(yaml.safe_dump(abilities() | {"ability_model": "me/private"}))
    command = [sys.executable, "-m", "mergekit_act", "transfer", "abilities.yml", "out"]
    done, asked = run_there(tmp_path, *command)
    assert done.returncode == 1
    assert "Error: me/private has no config that can be loaded: " in done.stderr
    assert f", and there is no such folder in {tmp_path}\n" in done.stderr
    assert any("/me/private/" in path for path in asked)
    done, _ = run_there(tmp_path, *command, HF_HUB_OFFLINE="1")  # as without a network
    assert "Error: me/private has no config that can be loaded: We couldn't connect to" in done.stderr
    assert not (tmp_path / "out").exists()


def test_push_to_the_hub(abilities, tmp_path):
    (tmp_path / "hub").mkdir()
    done, asked = push(tmp_path, "me/sums", "--density", "0.2", "--weight", "0.5", "--yes")
    assert done.returncode == 0, done.stderr
    assert "$ hf upload me/sums out/merged --private" in done.stdout
    for name in ("model.safetensors", "README.md", "act.yml"):
        assert (tmp_path / "hub/me/sums" / name).read_bytes() == (tmp_path / "out/merged" / name).read_bytes()
    assert sum("/api/repos/create" in path for path in asked) >= 1
    (tmp_path / "hub/me/public").mkdir()
    for name, seen_by in (("me/public", "public"), ("me/new", "new, private")):
        done, asked = push(tmp_path, name)
        assert done.returncode == 1
        assert f"Upload the result to {name} ({seen_by}), if it is worth it? [y/N]" in done.stdout
        assert not any("create" in path for path in asked)
    (tmp_path / "hub/others/there").mkdir(parents=True)
    for name in ("others/sums", "others/there"):
        done, _ = push(tmp_path, name, "--yes")
        assert done.returncode == 1
        assert f"Error: {name} cannot be written to: " in done.stderr
        assert "403" in done.stderr


def test_what_is_not_worth_it_is_not_uploaded(abilities, tmp_path):
    """All weights are moved, away from the ability model."""
    (tmp_path / "hub").mkdir()
    done, _ = push(tmp_path, "me/sums", "--density", "1", "--weight", "-3", "--yes")
    assert done.returncode == 0, done.stderr
    assert "do not publish." in done.stdout
    assert "Not uploaded, as it is not worth it. This would:\n$ hf upload me/sums out/merged --private" in done.stdout
    assert list((tmp_path / "hub/me/sums").iterdir()) == []
