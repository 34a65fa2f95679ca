"""mergekit-act merge: what fails inside mergekit is one sentence and exit code 1."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from merges import act_config, random_mask


def merge(config: dict, folder: Path, *options: str, blocks: int) -> subprocess.CompletedProcess[str]:
    """Run it where no file can be longer than so many KiB, as on a full disk."""
    (folder / "act.yml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "mergekit_act", "merge", "act.yml", "out", "--quiet", *options]
    limited = ["bash", "-c", f'ulimit -f {blocks}; exec "$@"', "bash", *command]
    return subprocess.run(limited, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("part", ["weights", "tokenizer"])
def test_a_disk_that_is_full(pair_of, tmp_path, part):
    target = tmp_path / "target"
    shutil.copytree(pair_of("qwen2")[0], target)
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    (target / "tokenizer.json").write_text(json.dumps(tokenizer) + " " * 100_000)
    ability = pair_of("qwen2")[1]
    random_mask(target, ability, tmp_path / "m.safetensors")
    config = act_config(target, (ability, {"weight": 0.4, "mask": "m.safetensors"}))
    options = ["--out-shard-size", "10000"] if part == "tokenizer" else []
    result = merge(config, tmp_path, *options, blocks=60)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr
    if part == "weights":
        assert last.startswith("Error: the merge failed: ")
        assert "incomplete; mend that, remove it and give the command again" in last
    else:
        assert last.startswith(
            "Error: the weights are written, but not all beside them: Failed to copy tokenizer ([Errno 27] File too large"
        )
        assert (tmp_path / "out/model.safetensors.index.json").exists()
