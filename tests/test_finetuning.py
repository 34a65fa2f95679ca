"""Fine-tuning: the updates of a plain Adam loop, going on after a kill, divergence, full disks, folders."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_act.abilities import Tokenizers, collect_samples, load_abilities
from mergekit_act.checkpoints import open_checkpoint
from mergekit_act.cli import main
from mergekit_act.devices import default_device, default_dtype
from mergekit_act.finetuning import Recipe
from mergekit_act.finetuning.saving import Saving, bytes_needed, check_room

KEYS = "    prompt: q\n    answer: a\n"
PLAIN = ["--dtype", "float32", "--device", "cpu", "--batch-size", "4", "--learning-rate", "1e-3"]


@pytest.fixture
def given(pair_of, abilities_yml, sums_file):
    """(model, abilities file)."""
    target, ability = pair_of("qwen2")
    return target, abilities_yml(target, ability, sums_file, ability_keys=KEYS)


def finetune(given, out, *arguments):
    return CliRunner().invoke(main, ["finetune", *map(str, given), str(out), *PLAIN, "--quiet", *arguments])


def started(given, out, *arguments, before=""):
    """The command in a process of its own, with Python code to run before it."""
    code = f"{before}\nfrom mergekit_act.cli import main\nmain()"
    command = [sys.executable, "-c", code, "finetune", *map(str, given), str(out), *PLAIN, "--quiet", *arguments]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_updates_are_those_of_a_plain_adam(given, tmp_path):
    arguments = ["--scheduler", "constant", "--epochs", "1", "--batch-size", "12", "--micro-batch", "3"]
    done = finetune(given, tmp_path / "out", *arguments)
    assert done.exit_code == 0, done.output
    # one update of all samples: their order does not matter
    file = load_abilities(given[1])
    samples = collect_samples(file, "sums", Tokenizers(file.target, file.ability_model)).samples
    model = AutoModelForCausalLM.from_pretrained(given[0])
    loss = torch.zeros(())
    for sample in samples:
        logits = model(input_ids=sample.input_ids[None]).logits[0, :-1]
        answers = sample.is_answer[1:]
        loss = loss + torch.nn.functional.cross_entropy(logits[answers], sample.input_ids[1:][answers], reduction="sum")
    loss = loss / sum(int(sample.is_answer.sum()) for sample in samples)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.Adam(model.parameters(), lr=1e-3).step()
    trained = load_file(tmp_path / "out" / "model.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=0, atol=2e-5)
    (row,) = csv.DictReader((tmp_path / "out" / "loss.csv").open())
    assert float(row["loss"]) == pytest.approx(loss.item(), rel=1e-3)


def test_what_is_written(given, tmp_path):
    out = tmp_path / "out"
    assert finetune(given, out).exit_code == 0
    assert AutoModelForCausalLM.from_pretrained(out).config.eos_token_id == 2
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(given[0]).chat_template
    card = (out / "README.md").read_text()
    assert "learning rate 0.001" in card
    assert "| sums |" in card
    assert {"loss.csv", "loss.svg", "loss.png", "finetune.json"} <= {path.name for path in out.iterdir()}
    assert not {"checkpoints", ".saving", "training_args.bin"} & {path.name for path in out.iterdir()}
    assert json.loads((out / "finetune.json").read_text())["recipe"]["learning_rate"] == 1e-3


def test_a_model_leaves_in_the_dtype_that_it_came_in(given, tmp_path):
    AutoModelForCausalLM.from_pretrained(given[0], dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(given[0]).save_pretrained(tmp_path / "half")
    done = finetune((tmp_path / "half", given[1]), tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_killed_run_goes_on_to_the_same_weights(given, tmp_path):
    arguments = ["--epochs", "4", "--save-steps", "2"]
    assert finetune(given, tmp_path / "whole", *arguments).exit_code == 0
    out = tmp_path / "out"
    run = started(given, out, *arguments)
    while run.poll() is None and not (out / "checkpoints" / "checkpoint-4" / "trainer_state.json").exists():
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert not (out / "model.safetensors").exists()
    (out / "checkpoints" / "checkpoint-99").mkdir()  # of a checkpoint that was being written
    done = finetune(given, out, *arguments)
    assert done.exit_code == 0, done.output
    whole, gone_on = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", out))
    assert all(torch.equal(whole[name], gone_on[name]) for name in whole)
    assert (out / "loss.csv").read_text() == (tmp_path / "whole" / "loss.csv").read_text()


def test_a_run_that_diverges_says_at_which_step(given, tmp_path):
    arguments = ["--learning-rate", "1e30", "--save-steps", "1", "--epochs", "4"]
    done = finetune(given, tmp_path / "out", *arguments)
    assert done.exit_code == 1
    assert "at step 2 of 12" in done.output
    assert "--learning-rate below 1e+30" in done.output
    assert "Traceback" not in done.output
    assert "no checkpoint yet" in done.output  # the one after the first update holds what diverged
    assert not list((tmp_path / "out" / "checkpoints").glob("checkpoint-*"))


def test_nan_weights_are_told(given, tmp_path):
    model = changed_model(given[0], tmp_path / "nan", lambda weights: weights["model.norm.weight"].fill_(float("nan")))
    done = finetune((model, given[1]), tmp_path / "out")
    assert done.exit_code == 1
    assert '"model.norm.weight" has values that are NaN' in done.output
    assert not (tmp_path / "out" / "loss.csv").exists()


@pytest.mark.parametrize("share", [0.5, 1.4])  # of the model's size: in its weights, and in the optimizer's
def test_a_full_disk_loses_nothing(given, tmp_path, share):
    out = tmp_path / "out"
    size = int(os.path.getsize(given[0] / "model.safetensors") * share)
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    run = started(given, out, "--save-steps", "2", before=limit)
    _, errors = run.communicate()
    assert run.returncode == 1
    assert "checkpoint-2 could not be written" in errors
    assert "Traceback" not in errors
    done = finetune(given, out, "--save-steps", "2")
    assert done.exit_code == 0, done.output


def test_folders_of_other_recipes_are_refused(given, tmp_path):
    out = tmp_path / "out"
    assert finetune(given, out).exit_code == 0
    again = finetune(given, out)
    assert again.exit_code == 1
    assert "finished already" in again.output
    other = finetune(given, out, "--epochs", "2")
    assert other.exit_code == 1
    assert "recipe.epochs was 1.0, is 2.0" in other.output
    assert finetune(given, out, "--epochs", "2", "--overwrite").exit_code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    done = finetune(given, tmp_path / "mine")
    assert done.exit_code == 1
    assert "something else" in done.output


def test_defaults_train_wherever_they_run(given, tmp_path):
    """bfloat16 where it is native, the accelerator if there is one, the paper's batch, an epoch."""
    command = ["finetune", *map(str, given), str(tmp_path / "out"), "--quiet"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    recipe = json.loads((tmp_path / "out" / "finetune.json").read_text())["recipe"]
    assert (recipe["learning_rate"], recipe["epochs"], recipe["batch_size"]) == (2e-5, 1.0, 16)
    assert recipe["dtype"] == str(default_dtype(default_device())).removeprefix("torch.")


def test_processes_share_an_update(given, tmp_path):
    arguments = ["--micro-batch", "2", "--epochs", "2", "--learning-rate", "1e-4"]
    assert finetune(given, tmp_path / "one", *arguments).exit_code == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "-m",
        "mergekit_act",
        "finetune",
        *map(str, given),
        str(tmp_path / "two"),
        *PLAIN,
        "--quiet",
        *arguments,
    ]
    done = subprocess.run(
        command, text=True, capture_output=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)


def changed_model(source, folder, change):
    """A copy of a model whose stored weights are changed."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_models_that_lack_weights_are_refused(given, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    model = changed_model(given[0], tmp_path / "model", lambda weights: weights.pop(name))
    done = finetune((model, given[1]), tmp_path / "out")
    assert done.exit_code == 1
    assert f"lacks {name}" in done.output


def test_the_model_itself_is_never_overwritten(given, tmp_path):
    assert finetune(given, tmp_path / "out").exit_code == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    done = finetune((tmp_path / "out", given[1]), tmp_path / "out", "--overwrite")
    assert done.exit_code == 1
    assert "is the model itself" in done.output
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_a_model_without_a_tokenizer_leaves_with_the_targets(given, tmp_path):
    shutil.copytree(given[0], tmp_path / "model", ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    done = finetune((tmp_path / "model", given[1]), tmp_path / "out")
    assert done.exit_code == 0, done.output
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", given[0]))
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template


@pytest.mark.parametrize("broken", ["{", '{"global_step": 3}'])
def test_a_checkpoint_that_is_cut_off_is_passed_over(given, tmp_path, broken):
    out = tmp_path / "out"
    run = started(given, out, "--epochs", "4", "--save-steps", "2")
    while run.poll() is None and not (out / "checkpoints" / "checkpoint-6" / "trainer_state.json").exists():
        time.sleep(0.002)
    run.kill()
    run.communicate()
    (out / "checkpoints" / "checkpoint-6" / "trainer_state.json").write_text(broken)
    assert (out / "checkpoints" / "checkpoint-4").is_dir()
    done = finetune(given, out, "--epochs", "4", "--save-steps", "2")
    assert done.exit_code == 0, done.output
    assert len((out / "loss.csv").read_text().splitlines()) == 13


def test_devices_that_cannot_be_chosen(given, tmp_path):
    for device in ("nonsense", "cuda:1"):
        done = finetune(given, tmp_path / "out", "--device", device)
        assert done.exit_code == 1
        assert f'device "{device}" cannot be chosen' in done.output


def test_batches_that_cannot_be_divided(given, tmp_path):
    done = finetune(given, tmp_path / "out", "--micro-batch", "3")
    assert done.exit_code == 1
    assert "cannot be divided" in done.output
    assert not (tmp_path / "out").exists()


def changed_file(source, folder, name, **keys):
    """A copy of a model with other keys in one of its JSON files."""
    shutil.copytree(source, folder)
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | keys))
    return folder


def test_a_generation_config_that_transformers_refuses_is_copied(given, tmp_path, caplog):
    refused = {"do_sample": False, "temperature": 0.6}
    model = changed_file(given[0], tmp_path / "model", "generation_config.json", **refused)
    done = finetune((model, given[1]), tmp_path / "out", "--save-steps", "2")
    assert done.exit_code == 0, done.output
    assert "it is copied as it is" in caplog.text
    name = "generation_config.json"
    assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()


def test_how_an_older_config_generates_is_kept(given, tmp_path):
    model = changed_file(given[0], tmp_path / "model", "config.json", do_sample=False, temperature=0.6)
    (model / "generation_config.json").unlink()
    done = finetune((model, given[1]), tmp_path / "out")
    assert done.exit_code == 0, done.output
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (kept["do_sample"], kept["temperature"], kept["eos_token_id"]) == (False, 0.6, 2)


def test_a_picture_that_cannot_be_drawn_is_told_before_the_training(given, tmp_path, monkeypatch):
    package = tmp_path / "packages" / "matplotlib"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('built for another numpy')")
    monkeypatch.syspath_prepend(str(package.parent))
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    done = finetune(given, tmp_path / "out")
    assert done.exit_code == 1
    assert "matplotlib cannot draw the picture (ImportError: built for another numpy)" in done.output
    assert not (tmp_path / "out").exists()


def saving_of(given):
    return Saving(open_checkpoint(str(given[0])), AutoTokenizer.from_pretrained(given[0]))


def test_weights_that_cannot_be_saved_are_told_before_the_training(given, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(given[0])
    saving_of(given).try_out(model, tmp_path / "trial")
    first, second = model.model.layers
    first.mlp.up_proj.weight = second.mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"the weights of .* could not be saved .* Nothing was trained"):
        saving_of(given).try_out(model, tmp_path / "trial")
    assert not (tmp_path / "trial").exists()


def test_room_on_the_disk_is_needed_for_three_checkpoints_at_once(tmp_path):
    recipe = Recipe(master_dtype="float32")
    # the weights, and for each checkpoint the weights and Adam's two means
    assert bytes_needed(1000, recipe, updates=100, save_steps=0) == 4000
    assert bytes_needed(1000, recipe, updates=100, save_steps=60) == 4000 + 2 * 12000
    assert bytes_needed(1000, recipe, updates=100, save_steps=10) == 4000 + 3 * 12000
    free = shutil.disk_usage(tmp_path).free
    check_room(tmp_path, free // 2)
    with pytest.raises(OSError, match=r"has room for .* GB; the model and its checkpoints take up to .*--save-steps 0"):
        check_room(tmp_path, free * 2)


def test_a_run_that_is_killed_behind_its_training_makes_the_rest(given, tmp_path):
    out = tmp_path / "out"
    arguments = ["--epochs", "2", "--save-steps", "2"]
    assert finetune(given, out, *arguments).exit_code == 0
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    # killed while the checkpoints were removed, after the model was in its place
    (out / ".finished" / "checkpoint-6").mkdir(parents=True)
    for name in ("README.md", "loss.png"):
        (out / name).unlink()
    done = finetune(given, out, *arguments)
    assert done.exit_code == 0, done.output
    assert done.output.split() == [str(out / name) for name in ("README.md", "loss.svg", "loss.png")]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    assert "finished already" in finetune(given, out, *arguments).output


def test_a_run_that_is_killed_while_it_saves_goes_on(given, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    arguments = ["--epochs", "2", "--save-steps", "2"]
    kill = (
        "import os\nmove = os.replace\n"
        "os.replace = lambda a, b: os.kill(os.getpid(), 9) if str(b).endswith('out/config.json') else move(a, b)"
    )
    run = started(given, out, *arguments, before=kill)
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    assert (out / "chat_template.jinja").exists()
    (out / "loss.csv").unlink()
    for folder in (out, whole):
        done = finetune(given, folder, *arguments)
        assert done.exit_code == 0, done.output
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (out / "loss.csv").read_text() == (whole / "loss.csv").read_text()


def test_a_run_that_is_killed_before_its_first_step_is_not_finished(given, tmp_path):
    out = tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True)  # before its settings were written
    assert finetune(given, out).exit_code == 0
    (out / "model.safetensors").unlink()
    done = finetune(given, out)
    assert done.exit_code == 0, done.output
    assert (out / "model.safetensors").exists()


def test_an_ability_that_is_named_twice_counts_once(given, tmp_path):
    done = finetune(given, tmp_path / "out", "--ability", "sums", "--ability", "sums")
    assert done.exit_code == 0, done.output
    assert len(list(csv.DictReader((tmp_path / "out" / "loss.csv").open()))) == 3  # 12 samples in fours
