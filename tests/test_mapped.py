"""Mapped tensors: what is read, what is shared, and that a target's file never changes."""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path

import pytest
import torch
from merges import act_config, merged, random_mask, state_of
from safetensors.torch import save_file

from mergekit_act.checkpoints import read_headers
from mergekit_act.merging import TensorSelection, transfer
from mergekit_act.merging.mapped import copy_on_write, map_tensor, will_need


@pytest.fixture
def stored(tmp_path):
    """A file with tensors that begin anywhere in a page."""
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 7),
        "b": torch.randn(300, 3000).bfloat16(),
        "c": torch.randn(5).half(),
        "d": torch.arange(4),
        "e": torch.empty(0, 3),
    }
    save_file(tensors, tmp_path / "t.safetensors")
    return tmp_path / "t.safetensors", tensors


def is_mapped(tensor, path) -> bool:
    """Whether a tensor's memory is a file's."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(number, 16) for number in line.split()[0].split("-"))
        if first <= address < last:
            return line.endswith(str(path))
    return False


def load(path, name):
    return map_tensor(path, read_headers(path)[name])


def test_a_mapped_tensor_is_the_stored_one(stored):
    path, tensors = stored
    for name in "abc":
        assert torch.equal(load(path, name), tensors[name])
        assert load(path, name).dtype == tensors[name].dtype
    assert load(path, "d") is None  # mergekit casts what is no floating point
    assert load(path, "e") is None


def test_a_copy_shares_pages_and_changes_nothing_else(stored):
    path, tensors = stored
    before = path.read_bytes()
    tensor = load(path, "b")
    copy = copy_on_write(tensor)
    copy[7] = 1.0
    assert torch.equal(tensor, tensors["b"])
    assert torch.equal(copy[8:], tensors["b"][8:])
    assert (copy[7] == 1).all()
    assert path.read_bytes() == before
    assert copy_on_write(tensors["b"]) is None


def test_requests_to_read_change_nothing(stored):
    path, tensors = stored
    tensor = load(path, "b")
    will_need(load(path, "a"), [2], of=3)
    will_need(tensor, [0, 17, 299], of=300)
    will_need(tensor)
    will_need(tensors["b"], [1], of=300)
    assert torch.equal(tensor, tensors["b"])


def test_rows_of_experts_share_too(tmp_path):
    save_file({"w": torch.randn(4, 300, 600)}, tmp_path / "t.safetensors")
    base = load(tmp_path / "t.safetensors", "w")
    chosen = torch.zeros(4, 300, dtype=torch.bool)
    chosen[2, 5] = chosen[3, 299] = True
    result = transfer(base, [(torch.zeros_like(base), 1.0, TensorSelection({1: chosen}))])
    assert torch.equal(result[~chosen], base[~chosen])
    assert not result[chosen].any()
    assert is_mapped(result, tmp_path / "t.safetensors")


@pytest.mark.parametrize(("rows", "is_shared"), [(3, True), (200, False)])
def test_few_rows_share_the_rest_with_the_file(stored, rows, is_shared):
    path, tensors = stored
    base = load(path, "b")
    chosen = torch.zeros(300, dtype=torch.bool)
    chosen[torch.randperm(300)[:rows]] = True
    result = transfer(base, [(torch.zeros_like(base), 1.0, TensorSelection({0: chosen}))])
    assert torch.equal(result[~chosen], tensors["b"][~chosen])
    assert not result[chosen].any()
    assert torch.equal(base, tensors["b"])
    assert is_mapped(result, path) == is_shared
    again = transfer(result, [(torch.ones_like(base), 1.0, TensorSelection({0: chosen.roll(1)}))])
    assert not again[chosen & ~chosen.roll(1)].any()  # the first transfer's
    assert (again[chosen.roll(1)] == 1).all()


def test_mapped_tensors_hold_no_descriptors_and_leave_no_memory(stored):
    path, _ = stored
    before = len(list(Path("/proc/self/fd").iterdir()))
    tensors = [load(path, "b") for _ in range(50)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert all(is_mapped(tensor, path) for tensor in tensors)
    del tensors
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_tensor_that_was_changed_is_not_taken_for_its_files(stored):
    path, _ = stored
    tensor = load(path, "b")
    tensor[0] = 1.0
    assert copy_on_write(tensor) is None


def test_merges_leave_their_models_alone(pair_of, tmp_path):
    folders = pair_of("qwen2")
    random_mask(*folders, tmp_path / "m.safetensors")
    files = [path for folder in folders for path in folder.glob("*.safetensors")]
    hashes = [hashlib.sha256(path.read_bytes()).digest() for path in files]
    parameters = {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}
    for name in ("act", "act_ties"):
        result = merged(act_config(folders[0], (folders[1], parameters), merge_method=name), tmp_path / name)
        assert any(not torch.equal(result[key], tensor) for key, tensor in state_of(folders[0]).items())
    assert [hashlib.sha256(path.read_bytes()).digest() for path in files] == hashes
