"""The startup hook in fresh processes, as users have it."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from conftest import make_model, tiny_config
from test_merging import act_config, assert_merged, random_mask, state_of

from mergekit_act import autoload
from mergekit_act.cli import main

SCRIPTS = Path(sys.executable).parent


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def test_starting_python_imports_nothing_heavy():
    code = "import sys; print(sorted(m for m in sys.modules if m.partition('.')[0] in "
    code += "{'mergekit_act', 'mergekit', 'torch', 'transformers', 'click', 'importlib.abc'}))"
    assert run(sys.executable, "-c", code).stdout == "['mergekit_act', 'mergekit_act.autoload']\n"


def test_the_switch_turns_the_hook_off():
    code = "import sys; print(any('_Finder' in type(f).__name__ for f in sys.meta_path))"
    assert run(sys.executable, "-c", code).stdout == "True\n"
    assert run(sys.executable, "-c", code, MERGEKIT_ACT_AUTOLOAD="0").stdout == "False\n"


def test_importing_our_side_first_registers_too():
    code = "import mergekit_act.merging, mergekit.merge_methods as m; print(m.get('act').spec.pretty_name)"
    done = run(sys.executable, "-W", "error::RuntimeWarning", "-c", code)
    assert done.stdout == "ACT\n", done.stderr


def test_completing_twice_changes_nothing(merge_inputs, tmp_path):
    """As when mergekit-act merge runs where mergekit is imported already."""
    autoload.install()
    autoload.install()
    root = merge_inputs[0]
    result = CliRunner().invoke(main, ["merge", str(root / "config.yml"), str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 0, (result.output, result.exception)
    check(tmp_path / "out", merge_inputs)


def test_importing_the_methods_brings_the_checks(merge_inputs, tmp_path):
    """Also where the hook is off: there is no act without them."""
    _, target, ability = merge_inputs
    config = act_config(target, (ability, {"weight": 1.0, "mask": "m.safetensors", "wieght": 1}))
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    code = (
        "import sys, mergekit_act.merging\nfrom mergekit.scripts.run_yaml import main\n"
        f"main([{str(tmp_path / 'c.yml')!r}, {str(tmp_path / 'out')!r}])"
    )
    done = run(sys.executable, "-c", code, MERGEKIT_ACT_AUTOLOAD="0")
    assert done.returncode == 1
    assert 'has no parameter "wieght"' in done.stderr


def test_a_failure_becomes_one_warning():
    code = (
        "import mergekit_act.autoload as a, mergekit_act, sys\n"
        "a._COMPLETIONS['mergekit.merge_methods'] = ('mergekit_act.nowhere', 'f')\n"
        "import mergekit.merge_methods as m\n"
        "print([x.spec.name for x in m.registered_methods() if x.spec.name in ('act', 'ties')])\n"
    )
    done = run(sys.executable, "-c", code)
    assert done.stdout == "['ties']\n"
    assert done.stderr.count("RuntimeWarning: mergekit-act could not complete mergekit.merge_methods") == 1
    strict = run(sys.executable, "-W", "error::RuntimeWarning", "-c", code)
    assert (strict.returncode, strict.stdout) == (0, "['ties']\n")


@pytest.fixture(scope="module")
def merge_inputs(tmp_path_factory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("merge")
    target, ability = (make_model(tiny_config("qwen2"), root / name, seed=i) for i, name in enumerate(("t", "a")))
    random_mask(target, ability, root / "mask.safetensors")
    config = act_config(target, (ability, {"weight": 0.4, "mask": str(root / "mask.safetensors")}))
    (root / "config.yml").write_text(yaml.safe_dump(config))
    return root, target, ability


def check(out: Path, merge_inputs) -> None:
    from mergekit_act.artifacts import load_mask

    root, target, ability = merge_inputs
    mask = load_mask(root / "mask.safetensors")
    assert_merged(state_of(out), state_of(target), [(state_of(ability), 0.4, mask)], tied=False)


def test_plain_mergekit_yaml_knows_act(merge_inputs):
    root = merge_inputs[0]
    done = run(str(SCRIPTS / "mergekit-yaml"), str(root / "config.yml"), str(root / "out"))
    assert done.returncode == 0, done.stderr
    check(root / "out", merge_inputs)
    card = (root / "out" / "README.md").read_text()
    assert "[ACT](https://arxiv.org/abs/2601.09398)" in card


def test_mergekit_act_merge_needs_no_hook(merge_inputs):
    root = merge_inputs[0]
    arguments = [str(root / "config.yml"), str(root / "out2")]
    off = {"MERGEKIT_ACT_AUTOLOAD": "0"}
    done = run(str(SCRIPTS / "mergekit-yaml"), *arguments, **off)
    assert "Unimplemented merge method act" in done.stderr
    done = run(str(SCRIPTS / "mergekit-act"), "merge", *arguments, **off)
    assert done.returncode == 0, done.stderr
    check(root / "out2", merge_inputs)


def test_mergekit_multi_knows_act(merge_inputs, tmp_path):
    """Two steps: act, then a copy of its result."""
    root = merge_inputs[0]
    first = (root / "config.yml").read_text() + "name: step\n"
    second = "merge_method: passthrough\nmodels:\n  - model: step\n"
    (tmp_path / "c.yml").write_text(f"{first}---\n{second}")
    command = [str(tmp_path / "c.yml"), "-I", str(tmp_path / "steps"), "--out-path", str(tmp_path / "out")]
    done = run(str(SCRIPTS / "mergekit-multi"), *command)
    assert done.returncode == 0, done.stderr
    check(tmp_path / "steps" / "step", merge_inputs)
    check(tmp_path / "out", merge_inputs)


def test_mergekit_pytorch_knows_act(merge_inputs, tmp_path):
    _, target, ability = merge_inputs
    config = yaml.safe_load((merge_inputs[0] / "config.yml").read_text())
    config["base_model"] = str(target / "model.safetensors")
    config["models"][0]["model"] = str(ability / "model.safetensors")
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    done = run(str(SCRIPTS / "mergekit-pytorch"), str(tmp_path / "c.yml"), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    check(tmp_path / "out", merge_inputs)


def test_the_hook_is_part_of_the_installed_package():
    """So that uninstalling takes it away."""
    files = [str(path) for path in importlib.metadata.files("mergekit-act") or ()]
    assert "mergekit_act.pth" in files


def test_a_refused_merge_is_one_sentence_and_exit_code_1(merge_inputs, tmp_path):
    _, target, ability = merge_inputs
    config = act_config(target, (ability, {"weight": 0.4, "mask": "gone.safetensors"}))
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    done = run(str(SCRIPTS / "mergekit-yaml"), str(tmp_path / "c.yml"), str(tmp_path / "out"), "--quiet")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith('Error: mask "gone.safetensors" does not exist')
    assert not (tmp_path / "out").exists()
