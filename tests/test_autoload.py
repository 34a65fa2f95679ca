"""The startup hook in fresh processes, as users have it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import types
import zipfile
from importlib.machinery import PathFinder, SourceFileLoader
from importlib.util import spec_from_loader
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from merges import act_config, assert_merged, random_mask, state_of
from tiny import make_model, tiny_config

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
        "a.COMPLETIONS['mergekit.merge_methods'] = ('mergekit_act.nowhere', 'f')\n"
        "import mergekit.merge_methods as m\n"
        "print([x.spec.name for x in m.registered_methods() if x.spec.name in ('act', 'ties')])\n"
    )
    done = run(sys.executable, "-c", code)
    assert done.stdout == "['ties']\n"
    assert done.stderr.count("RuntimeWarning: mergekit-act could not complete mergekit.merge_methods") == 1
    strict = run(sys.executable, "-W", "error::RuntimeWarning", "-c", code)
    assert (strict.returncode, strict.stdout) == (0, "['ties']\n")


class OfOld:
    """A finder without find_spec, as Python 3.11 still asks them and later ones pass over."""

    def find_module(self, name, path=None):
        return None


class Raising:
    def find_spec(self, name, path=None, target=None):
        raise TypeError("not mine")


class Odd:
    """A finder that gives something that is no spec."""

    def find_spec(self, name, path=None, target=None):
        return "spec" if name == "completed" else None


class Frozen:
    """A finder whose specs and loaders cannot be changed."""

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name == "completed" else None
        return None if spec is None else Unchangeable(spec)


class Unchangeable:
    def __init__(self, spec):
        object.__setattr__(self, "_spec", spec)

    def __getattr__(self, name):
        return getattr(object.__getattribute__(self, "_spec"), name)

    def __setattr__(self, name, value):
        if name == "loader":
            raise AttributeError("cannot be changed")
        setattr(self._spec, name, value)


class LoaderOfOld:
    """A finder whose loader has no exec_module."""

    def find_spec(self, name, path=None, target=None):
        return spec_from_loader(name, self) if name == "completed" else None

    def load_module(self, name):
        module = sys.modules.get(name) or types.ModuleType(name)
        module.loaded = "of old"
        sys.modules[name] = module
        return module


@pytest.fixture
def hooked(tmp_path, monkeypatch):
    """The hook, waiting for a module "completed" that "home" completes; what was imported is forgotten."""
    (tmp_path / "home.py").write_text("import sys\ndef complete():\n    sys.modules['completed'].done = True\n")
    (tmp_path / "completed.py").write_text("loaded = 'from a file'\n")
    monkeypatch.setattr(autoload, "COMPLETIONS", {"completed": ("home", "complete")})
    monkeypatch.setattr(autoload, "failed", {})
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    yield autoload._Finder()
    for name in ("home", "completed"):
        sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore::ImportWarning", "error::RuntimeWarning")
def test_a_finder_of_old_is_passed_over(hooked, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [hooked, OfOld(), PathFinder])
    spec = hooked.find_spec("completed")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "completed", module)
    spec.loader.exec_module(module)
    assert (module.loaded, module.done) == ("from a file", True)
    assert type(module.__loader__) is type(module.__spec__.loader) is SourceFileLoader  # its own again


@pytest.mark.parametrize(("neighbour", "outcome"), [(Raising(), TypeError), (Odd(), AttributeError), (Frozen(), None)])
def test_finders_that_fail_do_so_by_themselves(hooked, monkeypatch, neighbour, outcome):
    """As they would without us; our side warns, and what could not be completed refuses to run."""
    refused: list[str] = []
    monkeypatch.setitem(sys.modules, "mergekit_act.merging", types.SimpleNamespace(refuse_to_run=refused.append))
    monkeypatch.setattr(sys, "meta_path", [hooked, neighbour, *sys.meta_path])
    ending = contextlib.nullcontext() if outcome is None else pytest.raises(outcome)
    with pytest.warns(RuntimeWarning, match="mergekit-act could not complete completed"), ending:
        importlib.import_module("completed")
    assert refused[0].startswith("completed could not be completed (")


def test_a_loader_of_old_and_a_zip(hooked, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "meta_path", [hooked, LoaderOfOld(), *sys.meta_path])
    module = importlib.import_module("completed")
    assert (module.loaded, module.done) == ("of old", True)
    sys.modules.pop("completed")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("completed.py", "loaded = 'from a zip'")
        archive.writestr("beside.py", "")
    monkeypatch.setattr(sys, "meta_path", [hooked, PathFinder])
    monkeypatch.setattr(sys, "path", [str(tmp_path / "a.zip"), *sys.path])
    module = importlib.import_module("completed")
    assert (module.loaded, module.done) == ("from a zip", True)
    del module.done
    sys.modules.pop("beside", None)
    importlib.import_module("beside")  # by the same loader
    assert not hasattr(module, "done")
    sys.modules.pop("beside")


def test_a_folder_without_a_module_and_no_module_at_all(hooked, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "meta_path", [hooked, PathFinder])
    (tmp_path / "completed.py").unlink()
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("completed")
    (tmp_path / "completed").mkdir()
    importlib.invalidate_caches()
    assert importlib.import_module("completed").__path__


def test_methods_refuse_where_a_part_could_not_be_completed():
    """Whatever comes first: mergekit's planner is imported, unseen, before the methods are."""
    code = (
        "import sys, warnings\nwarnings.simplefilter('ignore')\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'mergekit.plan' and not hasattr(self, 'asked'):\n"
        "            self.asked = True\n            raise OSError('a share that was gone')\n"
        "class OfOld:\n    def find_module(self, name, path=None): pass\n"
        "sys.meta_path[1:1] = [OfOld(), Finder()]\n"
        "import mergekit.plan, mergekit.merge_methods as m\n"
        "try: m.get('act').validate_inputs(['a', 'b'], 'a')\nexcept RuntimeError as error: print(error)\n"
    )
    done = run(sys.executable, "-c", code)
    assert "does not fit mergekit-act: mergekit.plan could not be completed (OSError('a share" in done.stdout, done


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
