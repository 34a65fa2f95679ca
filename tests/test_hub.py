"""Models from the Hub, with its own client and a server on the loopback address."""

from __future__ import annotations

import os
import subprocess
import sys

from conftest import make_model, tiny_config
from hub import COMMIT, serve_hub

from mergekit_act.artifacts import load_profile


def test_a_pair_is_profiled_from_hub_ids_with_a_revision(sums_file, tmp_path):
    for name, seed in (("target", 0), ("ability", 1)):
        make_model(tiny_config("qwen2"), tmp_path / "hub" / "someone" / name, seed=seed)
    (tmp_path / "a.yml").write_text(
        "target: someone/target@v1\nability_model: someone/ability\n"
        f"abilities:\n  sums: {{dataset: {sums_file}, prompt: q, answer: a, samples: 4}}\n"
    )
    with serve_hub(tmp_path / "hub") as (endpoint, asked):
        environment = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-m", "mergekit_act", "profile", "a.yml", "out", "--quiet", "--dtype", "float32"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stderr[-2000:], asked)
    profile = load_profile(tmp_path / "out" / "sums.safetensors")
    assert (profile.target["model"], profile.target["revision"]) == ("someone/target", COMMIT)
    assert (profile.ability_model["model"], profile.ability_model["revision"]) == ("someone/ability", COMMIT)
    assert any("/someone/target/" in path and "v1" in path for path in asked), asked
