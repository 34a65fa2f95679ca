"""The command ``mergekit-act``: argument parsing only. Heavy imports happen inside the commands."""

from __future__ import annotations

import functools
import io
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from mergekit_act import __version__
from mergekit_act.wording import escape, shorten


class _Command(click.Command):
    """Prints a user's mistake as one sentence; ``-v`` shows the traceback as well."""

    def make_context(self, *arguments: Any, **settings: Any) -> click.Context:
        with _told():
            return super().make_context(*arguments, **settings)

    def invoke(self, context: click.Context) -> Any:
        try:
            with _told():
                return super().invoke(context)
        except click.ClickException:
            raise
        except KeyboardInterrupt as error:
            click.echo(f"\n{error}" if error.args else "\nInterrupted.", err=True)
            context.exit(130)
        except (ValueError, OSError, MemoryError, RecursionError) as error:
            if context.params.get("verbose"):
                raise
            told = next((told for kind, told in _SENTENCES.items() if isinstance(error, kind)), str(error))
            raise click.ClickException(_of_rank() + _shown(told)) from error


_SENTENCES: dict[type[BaseException], str] = {
    MemoryError: "this machine's memory does not suffice. Close other programs, or ask for less at once (smaller "
    "files, --memory-budget, --batch-tokens)",
    RecursionError: "something in the input is nested too deep to be read",
}


@contextmanager
def _told() -> Iterator[None]:
    """Sentences of click's own errors may quote files and arguments as well."""
    try:
        yield
    except click.ClickException as error:
        error.message = _shown(error.message)  # type: ignore[misc]
        raise


def _shown(text: str) -> str:
    """At most a screen, without control characters: whatever names and files are in it."""
    return shorten(escape(text, keep="\n"))


def _echo(text: object = "", *, err: bool = False) -> None:
    """Print, quietly ending where nobody reads any more, as ``head`` does."""
    try:
        click.echo(escape(text, keep="\n"), err=err)
    except BrokenPipeError:
        # What is still in the buffer would be tried again, and told, when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


class _Lines(logging.Formatter):
    """Warnings name files and models too."""

    def format(self, record: logging.LogRecord) -> str:
        return escape(super().format(record), keep="\n")


class _Bytes(click.ParamType):  # type: ignore[type-arg]
    """A size with a unit."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        from mergekit_act.profiling.memory import parse_bytes

        try:
            return parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Table(click.ParamType):  # type: ignore[type-arg]
    """A file of one kind, or "-": another argument that comes by mistake behind the option is told."""

    name = "file"

    def __init__(self, suffix: str) -> None:
        self.suffix = suffix

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value != "-" and Path(value).suffix != self.suffix:
            self.fail(f'"{value}" does not end with {self.suffix}', param, ctx)
        return value


def _printable(kind: str, text: str) -> Callable[..., Any]:
    """An option whose value is a file; without a value it prints."""
    return click.option(
        f"--{kind}",
        f"{kind}_out",
        metavar="[FILE]",
        is_flag=False,
        flag_value="-",
        type=_Table(f".{kind}"),
        help=text,
    )


@contextmanager
def _quiet_checks() -> Iterator[None]:
    """No warnings while a merge is planned: what it would log is in the summary."""
    log = logging.getLogger("mergekit_act.checking")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _of_rank() -> str:
    """Which of several processes says it."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"process {os.environ['RANK']}: " if several and "RANK" in os.environ else ""


def _again(*more: str) -> str:
    """The command that runs, with more options."""
    context = click.get_current_context()
    words: list[str] = []
    for parameter in context.command.params:
        value = context.params[parameter.name or ""]
        if value is None or value is False or parameter.name in ("verbose", "quiet"):
            continue
        option = max(parameter.opts, key=len)
        if isinstance(parameter, click.Argument):
            words += value if isinstance(value, tuple) else [value]
        elif isinstance(value, tuple):
            words += [word for one in value for word in (option, one)]
        elif option not in " ".join(more):
            words += [option] if value is True else [option, value]
    return f"mergekit-act {context.info_name} {shlex.join(map(str, words))} {' '.join(more)}"


class _Group(click.Group):
    command_class = _Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of the work, not of the alphabet


def _common(function: Callable[..., Any]) -> Callable[..., Any]:
    """``-v`` and ``--quiet``, on every command."""

    @click.option("-v", "--verbose", count=True, help="Say more; tracebacks of errors too.")
    @click.option("--quiet", is_flag=True, help="No progress bars.")
    @functools.wraps(function)
    def command(verbose: int, quiet: bool, **arguments: Any) -> Any:
        level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Lines("%(levelname)s: %(message)s"))
        logging.basicConfig(level=level, handlers=[handler])
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # what a terminal's encoding lacks
        if quiet or not sys.stderr.isatty():
            os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        return function(quiet=quiet, **arguments)

    return command


_trust = click.option("--trust-remote-code", is_flag=True, help="Run model code from the Hub (danger).")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace output files that exist.")
_batch_tokens = click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Tokens in a micro-batch, padding included. The last digits of the results depend on it.",
)
_lora_merge_cache = click.option(
    "--lora-merge-cache", help="Folder for merged models, for references of the form model+lora."
)
_evaluation_device = click.option(
    "--device", help="Where models run: cuda, cpu, or auto to spread one over all there is.  [default: the accelerator]"
)
_dtype = click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="In which the models run.  [default: bfloat16 where the device multiplies it natively, else float32]",
)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mergekit-act")
def main() -> None:
    """Move one ability of a model into another: profile, mask, merge.

    ACT (arXiv 2601.09398) compares the activations of two models of one backbone on samples of an ability, ranks all
    channels by how far they differ, and moves only the top ones with mergekit (merge_method: act).
    """


@main.command()
@click.argument("model")
@_trust
@_common
def channels(model: str, trust_remote_code: bool, quiet: bool) -> None:
    """List channels by module kind.

    Needs only the config of MODEL, not its weights.

    MODEL is a local folder or a Hub id (user/repo@revision).
    """
    from mergekit_act.channels import channel_layout
    from mergekit_act.checkpoints import read_config
    from mergekit_act.report import list_channels

    config = read_config(model, trust_remote_code=trust_remote_code)
    _echo(list_channels(channel_layout(config, trust_remote_code=trust_remote_code)))


@main.command()
@click.argument("abilities_file", metavar="ABILITIES.yml", type=click.Path(path_type=Path))
@click.argument("out_dir", metavar="OUT_DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--criterion",
    type=click.Choice(["activation", "weight", "random"]),
    default="activation",
    show_default=True,
    help="activation: difference of activations on the samples. Controls without data: weight (l2 norm of the change "
    "of what a channel owns), random.",
)
@click.option("--device", help="Where the models run, such as cuda or cpu.  [default: the accelerator, if any]")
@_dtype
@_batch_tokens
@click.option(
    "--memory-budget",
    type=_Bytes(),
    help="Memory of the device that may be used, such as 10GB, 900MB or 8GiB; on a CPU besides the program itself. "
    "What of the models does not fit is loaded once per chunk of samples; the profiles are the same.  [default: what "
    "is free, with a margin]",
)
@click.option(
    "--save-every",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How often the state of the run is kept in OUT_DIR, from which the same command goes on.",
)
@click.option("--random-seed", type=int, default=0, show_default=True, help="For --criterion random.")
@click.option(
    "--exclude",
    metavar="MODULE-GLOB",
    multiple=True,
    help="Give modules no scores, such as a vision tower that text does not reach. Repeatable.",
)
@_lora_merge_cache
@_trust
@_overwrite
@_common
def profile(abilities_file: Path, out_dir: Path, criterion: str, quiet: bool, **options: Any) -> None:
    """Score every channel of a pair.

    Writes one profile per ability of ABILITIES.yml to OUT_DIR, and a README.md for the Hub.

    A run that is interrupted, even killed, goes on when the same command is given again; with other settings it is
    refused, and --overwrite starts anew. With several GPUs:

      torchrun --nproc-per-node N -m mergekit_act profile ABILITIES.yml OUT_DIR
    """
    # What a cluster sends before it takes a machine away ends the run as Ctrl+C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from mergekit_act.abilities import load_abilities
    from mergekit_act.profiling import write_profiles
    from mergekit_act.report import list_expert_tokens

    file = load_abilities(abilities_file)
    for path, made in write_profiles(file, out_dir, criterion=criterion, quiet=quiet, **options).items():
        _echo(path)
        if "expert_tokens" in made.data:
            _echo(list_expert_tokens(made))


@main.command()
@click.argument("profiles", metavar="PROFILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", "out", metavar="MASK", required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--density",
    required=True,
    type=float,
    metavar="P",
    help="Fraction of the channels that take part which each profile keeps: 0.01 for the top 1 %.",
)
@click.option(
    "--exclude",
    metavar="MODULE-GLOB",
    multiple=True,
    help="Leave modules out, in the ranking and in the count, such as lm_head. Repeatable.",
)
@click.option(
    "--retain",
    metavar="PROFILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Spare an ability of the target: prefer channels that differ little on it. Repeatable. Not in the paper.",
)
@click.option(
    "--retain-ranking",
    type=click.Choice(["difference", "ratio", "score"]),
    help="By what channels are ranked, s being their score and r the largest on an ability to retain. difference: "
    "s - strength * r. ratio: s / (r + median r). score: s, as without --retain.  "
    "[default: difference]",
)
@click.option(
    "--retain-strength",
    type=click.FloatRange(min=0),
    help="Of the ranking by difference: 0 is plain ACT, more spares more.  [default: 0.5]",
)
@click.option(
    "--retain-density",
    type=float,
    metavar="P",
    help="Besides, never select the top channels of an ability to retain.",
)
@_overwrite
@_common
def mask(
    profiles: tuple[Path, ...],
    out: Path,
    density: float,
    exclude: tuple[str, ...],
    retain: tuple[Path, ...],
    retain_ranking: Any,
    retain_strength: float | None,
    retain_density: float | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Select the top channels of profiles.

    Keeps the top channels of each PROFILE and writes their union as a mask, and beside it a README.md for the Hub if
    there is none.
    """
    given = {"ranking": retain_ranking, "strength": retain_strength, "density": retain_density}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not retain:
        raise ValueError(
            f"--retain-{next(iter(given))} needs --retain PROFILE, the abilities whose channels are spared"
        )
    if retain_strength is not None and retain_ranking not in (None, "difference"):
        raise ValueError(f"--retain-strength belongs to the ranking by difference, not by {retain_ranking}")
    from mergekit_act.artifacts import load_profile, save_mask
    from mergekit_act.cards.files import write_folder_card
    from mergekit_act.files import check_free, file_hash
    from mergekit_act.report import list_mask
    from mergekit_act.report.listings import head_warning
    from mergekit_act.selection import Retention, make_mask

    check_free([out], overwrite=overwrite)
    loaded = [load_profile(path) for path in profiles]
    spared = None
    if retain:
        spared = Retention([load_profile(path) for path in retain], [file_hash(path) for path in retain], **given)
    hashes = [file_hash(path) for path in profiles]
    made = make_mask(loaded, density, exclude=exclude, hashes=hashes, retain=spared)
    selected = {module: int(chosen.sum()) for module, chosen in made.channels.items()}
    warning = head_warning(made.layout, "the mask", selected, "Without them: " + _again("--exclude {head} --overwrite"))
    if warning:
        _echo(f"warning: {warning}", err=True)
    save_mask(made, out, overwrite=overwrite)
    readme = write_folder_card(out.parent)
    _echo(list_mask(made))
    if readme is not None:
        _echo(f"described for the Hub: {readme}")


@main.command(context_settings={"ignore_unknown_options": True}, options_metavar="[OPTIONS] [OPTIONS OF mergekit-yaml]")
@click.argument("arguments", metavar="CONFIG.yml", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, problems too.")
@_common
def check(arguments: tuple[str, ...], as_json: bool, quiet: bool) -> None:
    """Tell what a merge would do.

    Reads the config and the headers of the files it names, no weights: what is transferred, copied and has no
    channels, what the merge costs, and everything that would make it fail (exit code 1). Takes mergekit-yaml's
    options too; those that change the plan count.
    """
    import dataclasses
    import json

    from mergekit_act import autoload

    autoload.install()
    from mergekit_act.checking.configs import MergeConfigError
    from mergekit_act.checking.summary import check_config, parse_check_arguments
    from mergekit_act.report import list_check

    path, options = parse_check_arguments(arguments)
    try:
        with _quiet_checks():
            summary = check_config(path, options)
    except (ValueError, OSError) as error:
        if not as_json:
            raise
        problems = error.problems if isinstance(error, MergeConfigError) else [str(error)]
        _echo(json.dumps({"problems": problems}, indent=2))
        raise SystemExit(1) from error
    _echo(json.dumps(dataclasses.asdict(summary) | {"problems": []}, indent=2) if as_json else list_check(summary))


@main.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
    options_metavar="[OPTIONS OF mergekit-yaml]",
)
@click.argument("arguments", metavar="CONFIG.yml OUT", nargs=-1, type=click.UNPROCESSED)
def merge(arguments: tuple[str, ...]) -> None:
    """mergekit-yaml with the same arguments.

    For places where plain mergekit-yaml does not know the method act, because Python reads no .pth files there
    (pip --target, zipapps).
    """
    from mergekit_act import autoload

    autoload.install()
    from mergekit_act.checking.command import run_mergekit_yaml

    run_mergekit_yaml(arguments)


@main.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--abilities", "file", metavar="ABILITIES.yml", required=True, type=click.Path(path_type=Path))
@click.option("--ability", "names", metavar="NAME", multiple=True, help="Only this ability of the file. Repeatable.")
@click.option("--generate/--no-generate", default=True, show_default=True, help="Answers too, for exact match.")
@_evaluation_device
@_dtype
@_batch_tokens
@click.option("--random-seed", type=int, default=0, show_default=True, help="Of the bootstrap.")
@_printable("json", "All results as JSON, to a file, or instead of the table.")
@_printable("csv", "The table's numbers as csv, likewise.")
@click.option(
    "--predictions",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A JSON line per model and sample, with the generated text.",
)
@_lora_merge_cache
@_trust
@_overwrite
@_common
def evaluate(models: tuple[str, ...], file: Path, names: tuple[str, ...], **options: Any) -> None:
    """Measure models on held-out samples.

    For every MODEL and ability: negative log-likelihood of the answers per token, exact match of greedy answers, with
    95 % bootstrap intervals; every model against the first, on the same samples. Samples are those that "evaluate"
    names in ABILITIES.yml; by default 200 behind the profiled ones.

    Files are written after each model.
    """
    from mergekit_act.abilities import load_abilities
    from mergekit_act.evaluation.command import run_evaluation

    for line in run_evaluation(models, load_abilities(file), names or None, **options):
        _echo(line)


@main.command()
@click.argument("config_file", metavar="CONFIG.yml", type=click.Path(path_type=Path))
@click.argument("abilities_file", metavar="ABILITIES.yml", type=click.Path(path_type=Path))
@click.argument("out_dir", metavar="OUT_DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--grid",
    type=click.Choice(["default", "paper"]),
    default="default",
    show_default=True,
    help="default: densities 0.01, 0.02, 0.05, 0.1 by weights 0.2, 0.4, 0.7, 1. paper: 252 points, densities 0.01 to "
    "0.1 and 0.15 to 1 by weights 0.1 to 0.9.",
)
@click.option("--density", "densities", type=float, multiple=True, help="In place of the grid's. Repeatable.")
@click.option("--weight", "weights", type=float, multiple=True, help="In place of the grid's. Repeatable.")
@click.option("--per-model", is_flag=True, help="Every combination of weights, instead of one for all ability models.")
@click.option(
    "--keep-within",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    metavar="SHARE",
    help="How much of the kept abilities the best point may lose: of the likelihood of an answer token.",
)
@click.option("--generate/--no-generate", default=True, show_default=True, help="Exact match too, on the frontier.")
@click.option("--device", help="Where the target runs, such as cuda or cpu.  [default: the accelerator, if any]")
@_batch_tokens
@_lora_merge_cache
@_trust
@_overwrite
@_common
def sweep(
    config_file: Path,
    abilities_file: Path,
    out_dir: Path,
    grid: Any,
    densities: tuple[float, ...],
    weights: tuple[float, ...],
    per_model: bool,
    **options: Any,
) -> None:
    """Find a good density and weight.

    Merges every point of a grid in memory and scores it on the held-out samples of ABILITIES.yml: what the abilities
    with "role: recover" gain against what those with "role: keep" lose. CONFIG.yml is a merge config of act whose
    masks are profiles; its densities and weights are replaced.

    Writes sweep.csv, point by point, a picture, and best.yml, which mergekit-yaml merges to the very weights that were
    scored. The same command goes on after an interruption.
    """
    from mergekit_act.abilities import load_abilities
    from mergekit_act.report import can_draw, draw_sweep, list_sweep
    from mergekit_act.sweep import make_grid, run_sweep
    from mergekit_act.sweep.config import read_swept_config

    config = read_swept_config(config_file)
    points = make_grid(len(config.models), grid=grid, densities=densities, weights=weights, per_model=per_model)
    result = run_sweep(config, load_abilities(abilities_file), out_dir, points, **options)
    _echo(list_sweep(result))
    _echo(f"{len(result.frontier)} of {len(result.scores)} points, which no other surpasses; all are in sweep.csv")
    if result.best is None:
        limit = f"{options['keep_within']:.0%} of what is to be kept"
        _echo(f"every point loses more than {limit} or recovers nothing: no best.yml")
    written = [out_dir / name for name in ("sweep.csv", "best.yml") if (out_dir / name).exists()]
    if can_draw():
        written += draw_sweep(result, out_dir)
    else:
        _echo('for a picture: pip install "mergekit-act[plots]", and the same command again')
    for path in written:
        _echo(path)


@main.command()
@click.argument("model", metavar="MODEL")
@click.argument("abilities_file", metavar="ABILITIES.yml", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path, file_okay=False))
@click.option("--ability", "names", metavar="NAME", multiple=True, help="Only this ability of the file. Repeatable.")
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=2e-5, show_default=True)
@click.option("--epochs", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Samples of one update, in all."
)
@click.option(
    "--micro-batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Samples that a process computes at once; more is faster and takes more memory.",
)
@click.option(
    "--scheduler",
    type=click.Choice(["linear", "constant", "cosine"]),
    default="linear",
    show_default=True,
    help="How the learning rate goes on; the paper does not say.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="In which it computes.  [default: bfloat16 where the device multiplies it natively, else float32]",
)
@click.option(
    "--master-dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="In which weights and Adam's means are kept. bfloat16 takes half the memory, but rounds small updates away.",
)
@click.option("--gradient-checkpointing/--no-gradient-checkpointing", default=True, show_default=True)
@click.option(
    "--save-steps",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    help="Updates between checkpoints, from which the same command goes on; 0 for none.",
)
@click.option("--device", help="cpu, to leave an accelerator alone.  [default: the accelerator, if any]")
@click.option("--random-seed", type=int, default=0, show_default=True, help="Of the order of the samples.")
@_lora_merge_cache
@_trust
@_overwrite
@_common
def finetune(
    model: str,
    abilities_file: Path,
    out: Path,
    names: tuple[str, ...],
    save_steps: int,
    dtype: str | None,
    device: str | None,
    lora_merge_cache: str | None,
    trust_remote_code: bool,
    overwrite: bool,
    quiet: bool,
    **recipe: Any,
) -> None:
    """Fine-tune a model lightly.

    Full-parameter training of MODEL on the answer tokens of all samples of ABILITIES.yml, the ones it profiles, with
    TRL's SFTTrainer; the defaults are the paper's. Writes the model, its card, loss.csv and a picture to OUT. The same
    command goes on after an interruption. With several GPUs:

      accelerate launch --config_file fsdp.yaml -m mergekit_act finetune MODEL ABILITIES.yml OUT
    """
    from mergekit_act.abilities import load_abilities
    from mergekit_act.devices import default_dtype
    from mergekit_act.finetuning import Recipe, choose_device, finetune

    device = choose_device(device)
    chosen = Recipe(dtype=dtype or str(default_dtype(device)).removeprefix("torch."), **recipe)
    written = finetune(
        model,
        load_abilities(abilities_file),
        out,
        chosen,
        names=names,
        save_steps=save_steps,
        device=device,
        lora_merge_cache=lora_merge_cache,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        quiet=quiet,
    )
    for path in written:
        _echo(path)


@main.command()
@click.argument("files", metavar="PROFILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "out_dir",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write report.html there, each figure also as svg and png, each table also as csv.",
)
@click.option(
    "--density",
    type=float,
    metavar="P",
    help="Of the profiles' masks: 0.01 for the top 1 %.  [default: 0.01]",
)
@click.option(
    "--exclude",
    metavar="MODULE-GLOB",
    multiple=True,
    help="Leave modules out, in the ranking and in the count, such as lm_head. Repeatable.",
)
@_overwrite
@_common
def report(
    files: tuple[Path, ...],
    out_dir: Path | None,
    density: float | None,
    exclude: tuple[str, ...],
    overwrite: bool,
    quiet: bool,
) -> None:
    """Show profiles and masks.

    Without -o the essentials of each PROFILE, which may also be a mask, in a few lines.

    With -o one page that compares the profiles of a backbone: distributions of scores, overlap between abilities and
    between pairs, activations against weight changes (of a profile made with --criterion weight), where the channels
    sit, what each density would move. It needs no network; matplotlib draws it (extra "plots").
    """
    chosen = density is not None or bool(exclude)
    density = 0.01 if density is None else density
    if out_dir is None:
        from mergekit_act.artifacts import load_metadata
        from mergekit_act.report import list_essentials

        if chosen and all(load_metadata(path)["kind"] == "mask" for path in files):
            raise ValueError("the channels of a mask were chosen when it was made; leave out --density and --exclude")
        _echo("\n\n".join(list_essentials(path, density=density, exclude=exclude) for path in files))
        return
    from mergekit_act.report.page import write_report

    for warning in write_report(files, out_dir, density=density, exclude=exclude, overwrite=overwrite, quiet=quiet):
        _echo(f"warning: {warning}")
    _echo(out_dir / "report.html")


@main.command(context_settings={"ignore_unknown_options": True}, options_metavar="[OPTIONS] [OPTIONS OF mergekit-yaml]")
@click.argument("arguments", metavar="MERGED_DIR", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--evaluation",
    metavar="FILE.json",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Results of mergekit-act evaluate --json, for the card and the Hub's model-index.",
)
@click.option("--evaluated-as", metavar="MODEL", help="The merged model's name in that file, if not its path.")
@_overwrite
@_common
def card(arguments: tuple[str, ...], quiet: bool, **options: Any) -> None:
    """Say on a merge's model card what was moved.

    Extends the README.md that mergekit wrote to MERGED_DIR: method, models, abilities and their data, what was moved,
    how to make it again. Copies the masks into it, with act.yml and abilities.yml. Run it where the merge was run, with
    the options of mergekit-yaml that it was given. The same command again changes nothing; parts of the card that
    others wrote stay.
    """
    from mergekit_act import autoload

    autoload.install()
    from mergekit_act.cards.merged import write_merge_card
    from mergekit_act.checking.summary import parse_check_arguments

    merged_dir, merge_options = parse_check_arguments(arguments)
    with _quiet_checks():
        written = write_merge_card(Path(merged_dir), merge_options, **options)
    for remark in written.remarks:
        _echo(f"note: {remark}")
    for path in written.files:
        _echo(path)


@main.command()
@click.argument("out_dir", metavar="OUT_DIR", type=click.Path(path_type=Path, file_okay=False))
@_common
def demo(out_dir: Path, quiet: bool) -> None:
    """Run the whole path on tiny models.

    Trains them, lets one forget, and brings the forgotten ability back with ACT.
    Evaluates them, and fine-tunes lightly if TRL is installed. Needs no downloads and four to seven minutes on two CPU
    cores; all files stay in OUT_DIR.
    """
    from mergekit_act.demo import run_demo

    run_demo(out_dir, echo=_echo, quiet=quiet)
