"""The command line: help, the command mask, and how mistakes are told."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from tiny import make_model, profile, tiny_config

import mergekit_act
from mergekit_act.artifacts import load_mask, load_profile, save_profile
from mergekit_act.cli import main
from mergekit_act.profiling import open_pair, profile_without_data
from mergekit_act.selection import select_channels


def invoke(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom mergekit_act.cli import main\n"
        "try: main(['profile', '--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'mergekit', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--batch-tokens" in done.stdout
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize("command", main.commands)
def test_every_command_says_what_its_arguments_are(command):
    """A sentence, every argument by its name, and a text for each option that its name does not explain."""
    result = invoke(command, "--help") if command != "merge" else invoke("--help")
    assert result.exit_code == 0
    made = main.commands[command]
    assert made.help.partition("\n")[0].endswith(".")
    for parameter in made.params if command != "merge" else ():
        if isinstance(parameter, click.Argument):
            assert parameter.make_metavar(click.Context(made)) in result.output
        else:
            plain = {"out", "file", "learning_rate", "epochs", "gradient_checkpointing"}
            assert parameter.help or parameter.name in plain, parameter.name


def test_public_names_are_found():
    assert len(mergekit_act.__all__) <= 10
    for name in mergekit_act.__all__:
        assert callable(getattr(mergekit_act, name))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = mergekit_act.nothing


def test_mask_unites_profiles_and_says_what_it_selected(tmp_path):
    scores = profile().scores
    save_profile(profile(), tmp_path / "one.safetensors")
    turned = {module: scores[module].flip(0) for module in scores}
    save_profile(profile(scores=turned, ability="two"), tmp_path / "two.safetensors")
    out = tmp_path / "masks" / "m.safetensors"
    result = invoke("mask", tmp_path / "one.safetensors", tmp_path / "two.safetensors", "-o", out, "--density", 0.3)
    assert result.exit_code == 0, result.output
    assert load_mask(out).channels["b.linear"].tolist() == [True, True, True, True]
    lines = [line.split() for line in result.output.splitlines()]
    assert ["b.linear", "1", "4", "100.00", "%", "100.00", "%", "16"] in lines
    assert "4 of 7 channels (57.14 %)" in result.output
    assert "16 of 19 parameters (84.21 %)" in result.output
    again = invoke("mask", tmp_path / "one.safetensors", "-o", out, "--density", 0.3)
    assert again.exit_code == 1
    assert again.output == f"Error: {out} exists. Choose another name or say --overwrite.\n"
    replaced = invoke(
        "mask", tmp_path / "one.safetensors", "-o", out, "--density", 0.3, "--overwrite", "--exclude", "a.*"
    )
    assert replaced.exit_code == 0
    assert "1 of 7 channels (14.29 %)" in replaced.output
    assert "25.00 % of the 4 channels that were not excluded" in replaced.output


def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path):
    save_profile(profile(), tmp_path / "p.safetensors")
    out = tmp_path / "m.safetensors"
    for arguments, words in (
        (["--density", "0"], "density is 0.0; expected a fraction in (0, 1]"),
        (["--density", "0.5", "--exclude", "head*"], 'no module matches "head*"; there are b.linear, a.norm'),
    ):
        result = invoke("mask", tmp_path / "p.safetensors", "-o", out, *arguments)
        assert result.exit_code == 1
        assert result.output.count("\n") == 1
        assert words in result.output
    assert "does not exist" in invoke("mask", tmp_path / "none.safetensors", "-o", out, "--density", 0.5).output
    assert invoke("mask", tmp_path / "p.safetensors", "-o", out).exit_code == 2  # no density
    assert not out.exists()


def test_control_characters_never_reach_the_terminal(tmp_path, caplog):
    path = tmp_path / "a\x1b[2J\n.safetensors"
    save_profile(profile(ability="\x1b]0;title\x07", target={"model": "t\nwarning: none"}), path)
    shown = invoke("report", path)
    assert shown.exit_code == 0, shown.output
    assert 'a\\x1b[2J\\n.safetensors: profile of "\\x1b]0;title\\x07"' in shown.output
    assert "into t\\nwarning: none (target)" in shown.output
    refused = invoke("mask", path, "-o", tmp_path / "m.safetensors", "--density", 0.5, "--exclude", "\x9bm")
    assert refused.output.startswith('Error: no module matches "\\u009bm"; there are')
    unknown = invoke("mask", path, "--no\x1b[2J")
    assert unknown.exit_code == 2
    assert "\x1b" not in shown.output + refused.output + unknown.output


def test_messages_are_never_longer_than_a_screen(tmp_path):
    save_profile(profile(), tmp_path / "p.safetensors")
    refused = invoke("report", tmp_path / "p.safetensors", "--exclude", "x" * 100_000)
    assert len(refused.output) < 2100
    assert refused.output.endswith("there are b.linear, a.norm\n")


@pytest.mark.parametrize(
    ("error", "told"), [(MemoryError(), "memory does not suffice"), (RecursionError(), "nested too deep to be read")]
)
def test_what_a_machine_lacks_is_a_sentence(tmp_path, monkeypatch, error, told):
    def lacks(*_):
        raise error

    monkeypatch.setattr("mergekit_act.selection.load_profile", lacks)
    refused = invoke("mask", tmp_path / "p.safetensors", "-o", tmp_path / "m.safetensors", "--density", 0.5)
    assert (refused.exit_code, refused.output.count("\n"), told in refused.output) == (1, 1, True)


def test_a_reader_that_is_gone_ends_a_command_quietly():
    """As head is when it has its lines."""
    code = "import sys\nfrom mergekit_act.cli.framework import echo\nsys.stdin.read()\nfor i in range(9): echo('x' * 100_000)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as running:
        running.stdout.close()
        running.stdin.close()
        assert (running.stderr.read(), running.wait()) == (b"", 141)


def test_profile_refuses_before_it_loads_models(tmp_path, sums_file):
    target, ability = (make_model(tiny_config("qwen2"), tmp_path / name, seed=i) for i, name in enumerate("ta"))
    (tmp_path / "a.yml").write_text(
        f"target: {target}\nability_model: {ability}\nabilities:\n  x: {{dataset: {sums_file}, prompt: q, answer: a}}\n"
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.safetensors").write_text("mine")
    result = invoke("profile", tmp_path / "a.yml", tmp_path / "out")
    assert result.exit_code == 1
    assert result.output == f"Error: {tmp_path}/out/x.safetensors exists. Choose another name or say --overwrite.\n"
    assert (tmp_path / "out" / "x.safetensors").read_text() == "mine"
    result = invoke("profile", tmp_path / "a.yml", tmp_path / "new", "--criterion", "weight")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["README.md", "weight.safetensors"]
    result = invoke("profile", tmp_path / "a.yml", tmp_path / "other", "--device", "nonsense")
    assert result.output.startswith('Error: device "nonsense" cannot be used here: ')
    same = (tmp_path / "a.yml").read_text().replace(str(ability), str(target))
    (tmp_path / "same.yml").write_text(same)
    result = invoke("profile", tmp_path / "same.yml", tmp_path / "other")
    assert result.output == f"Error: {target} and {target} are the same model; there is nothing to transfer\n"
    assert not (tmp_path / "other").exists()


def test_masks_that_spare_abilities_say_so(pair_of, tmp_path):
    for seed in range(2):
        profile = profile_without_data(open_pair(*map(str, pair_of("qwen2"))), "random", random_seed=seed)
        save_profile(profile, tmp_path / f"{seed}.safetensors")
    first, second = (str(tmp_path / f"{seed}.safetensors") for seed in range(2))
    made = tmp_path / "mask.safetensors"
    arguments = ["mask", first, "-o", str(made), "--density", "0.2"]
    done = CliRunner().invoke(main, [*arguments, "--retain", second, "--retain-density", "0.5"])
    assert done.exit_code == 0, done.output
    mask = load_mask(made)
    (retain,) = (source["retain"] for source in mask.sources)
    assert (retain["ranking"], retain["density"]) == ("difference", 0.5)
    spared = select_channels(load_profile(second), 0.5)
    assert not any((chosen & spared[module]).any() for module, chosen in mask.channels.items() if module in spared)
    done = CliRunner().invoke(main, [*arguments, "--overwrite", "--retain-density", "0.5"])
    assert done.exit_code == 1
    assert "needs --retain PROFILE" in done.output


def test_masks_are_made_without_mergekit(tmp_path):
    """It takes as long to import as all the rest."""
    save_profile(profile(), tmp_path / "p.safetensors")
    command = [
        "mask",
        str(tmp_path / "p.safetensors"),
        "-o",
        str(tmp_path / "masks" / "m.safetensors"),
        "--density",
        "0.5",
    ]
    code = f"import sys\nfrom mergekit_act.cli import main\nmain({command!r}, standalone_mode=False)\n"
    code += "print([name for name in ('mergekit', 'datasets') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[]", done
    assert (tmp_path / "masks" / "README.md").is_file()
