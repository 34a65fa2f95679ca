"""Tiny, seeded models and their tokenizer, made once for all tests."""

from __future__ import annotations

import os

# Before transformers and datasets are imported, in this process and those that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in as many processes as there are cores

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from tiny import make_model, tiny_config


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Architecture -> (target folder, ability model folder); each pair is made once. The target has its own rope."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            made[name] = (
                make_model(tiny_config(name), root / "target", seed=1),
                make_model(tiny_config(name), root / "ability", seed=2),
            )
        return made[name]

    return get


@pytest.fixture(scope="session")
def sums_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of twenty sums with answers of different lengths."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [
        {"q": f"{a}+{b}", "a": str(a + b), "kind": "even" if (a + b) % 2 == 0 else "odd"}
        for a in range(0, 100, 20)
        for b in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def abilities_yml(tmp_path: Path) -> Callable[..., Path]:
    """Write an abilities file: keys of the file, and of its only ability ``sums``."""

    def write(target: Path, ability: Path, dataset: Path, *, top: str = "", ability_keys: str = "") -> Path:
        path = tmp_path / "abilities.yml"
        path.write_text(
            f"target: {target}\nability_model: {ability}\n{top}\n"
            f"abilities:\n  sums:\n    dataset: {dataset}\n    samples: 12\n" + ability_keys
        )
        return path

    return write


@pytest.fixture
def two_abilities(pair_of, tmp_path) -> Path:
    """Two abilities of many small micro-batches."""
    target, ability = pair_of("qwen3")
    rows = [{"q": f"{a}+{b}", "a": str(a + b)} for a in range(100) for b in range(4)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset: {tmp_path}/sums.jsonl, prompt: q, answer: a"
    path = tmp_path / "abilities.yml"
    path.write_text(
        f"target: {target}\nability_model: {ability}\nabilities:\n"
        f"  one: {{{data}, samples: 200}}\n  two: {{{data}, samples: 100, seed: 3}}\n"
    )
    return path


@pytest.fixture(autouse=True)
def _fresh_loaders() -> Iterator[None]:
    """mergekit's loader cache lives as long as the process; a path may hold another model in the next test."""
    from mergekit.io.tasks import LoaderCache

    yield
    LoaderCache.loaders.clear()


@pytest.fixture
def abilities(pair_of, sums_file, tmp_path, monkeypatch):
    """Write abilities.yml with two abilities into the working directory; keys of the one that is recovered."""
    monkeypatch.chdir(tmp_path)
    target, ability_model = pair_of("qwen2")

    def write(**keys):
        own = {"dataset": str(sums_file), "prompt": "q", "answer": "a"}
        held_out = {"samples": 5, "max_new_tokens": 4}
        both = {
            "even": own | {"where": {"kind": "even"}, "samples": 5, "evaluate": held_out} | keys,
            "odd": own | {"where": {"kind": "odd"}, "samples": 5, "evaluate": held_out, "role": "keep"},
        }
        content = {"target": str(target), "ability_model": str(ability_model), "abilities": both}
        (tmp_path / "abilities.yml").write_text(yaml.safe_dump(content))
        return content

    write()
    return write
