"""``channels``, ``profile``, ``mask`` and ``report``: from two models to a mask."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_act.cli import options
from mergekit_act.cli.framework import command, common, echo, packed, repeat_command
from mergekit_act.criteria import CRITERIA

if TYPE_CHECKING:
    from mergekit_act.profiling import ProfilingSettings
    from mergekit_act.selection import Retention


@command()
@click.argument("model")
@options.trust
@common
def channels(model: str, trust_remote_code: bool, quiet: bool) -> None:
    """List channels by module kind.

    Needs only the config of MODEL, not its weights.

    MODEL is a local folder or a Hub id (user/repo@revision).
    """
    from mergekit_act.channels import channel_layout
    from mergekit_act.checkpoints import read_config
    from mergekit_act.report import list_channels

    config = read_config(model, trust_remote_code=trust_remote_code)
    echo(list_channels(channel_layout(config, trust_remote_code=trust_remote_code)))


@command()
@click.argument("abilities_file", metavar="ABILITIES.yml", type=click.Path(path_type=Path))
@click.argument("out_dir", metavar="OUT_DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--criterion",
    type=click.Choice(CRITERIA),
    default="activation",
    show_default=True,
    help="activation: difference of the models' activations on the samples, as in the paper. local: change of a "
    "channel's output in the target when its weights move. attribution: what the loss of the answers then falls by, "
    "and what it costs abilities to keep. Controls without data: weight (l2 norm of the change of what a channel "
    "owns), random.",
)
@click.option(
    "--points",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="For --criterion attribution: average so many points on the line from the target to the ability model.",
)
@click.option(
    "--inputs",
    is_flag=True,
    help="Keep a sample of what the target's modules receive too, OUT_DIR/fit/inputs.safetensors, for merges with fit.",
)
@click.option(
    "--center-logits/--no-center-logits",
    default=None,
    help="Take off from a token's differences of logits their mean, which softmax ignores.  [default: only for "
    "--criterion local]",
)
@click.option("--device", help="Where the models run, such as cuda or cpu.  [default: the accelerator, if any]")
@options.dtype
@options.batch_tokens
@click.option(
    "--memory-budget",
    type=options.Bytes(),
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
@options.lora_merge_cache
@options.trust
@options.overwrite
@common
@packed("mergekit_act.profiling", "ProfilingSettings", "settings")
def profile(abilities_file: Path, out_dir: Path, overwrite: bool, settings: ProfilingSettings) -> None:
    """Score every channel of a pair.

    Writes one profile per ability of ABILITIES.yml to OUT_DIR, and a README.md for the Hub, except in the working
    directory.

    A run that is interrupted, even killed, goes on when the same command is given again; with other settings it is
    refused, and --overwrite starts anew. With several GPUs:

      torchrun --nproc-per-node N -m mergekit_act profile ABILITIES.yml OUT_DIR
    """
    # What a cluster sends before it takes a machine away ends the run as Ctrl+C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from mergekit_act.abilities import load_abilities
    from mergekit_act.profiling import write_profiles
    from mergekit_act.report import list_expert_tokens

    written = write_profiles(load_abilities(abilities_file), out_dir, settings, overwrite=overwrite)
    for path, made in written.profiles.items():
        echo(path)
        if "expert_tokens" in made.data:
            echo(list_expert_tokens(made))
    if written.profiles and written.inputs is not None:
        echo(written.inputs)
    if written.profiles:  # by this process
        _describe(out_dir)


@command()
@click.argument("profiles", metavar="PROFILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", "out", metavar="MASK", required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--density",
    required=True,
    type=float,
    metavar="P",
    help="Fraction of the channels that take part which each profile keeps: 0.01 for the top 1 %.",
)
@options.exclude
@click.option(
    "--retain",
    metavar="PROFILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Spare an ability of the target: prefer channels that differ little on it, of attributions those that damage "
    "it little. Repeatable. Not in the paper.",
)
@click.option(
    "--retain-ranking",
    type=click.Choice(["difference", "ratio", "score"]),
    help="By what channels are ranked, s being their score and r the largest on an ability to retain, of attributions "
    "the largest damage. difference: s - strength * r. ratio: s / (r + median r). score: s, as without --retain.  "
    "[default: ratio for attributions, else difference]",
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
@options.overwrite
@common
@packed(__name__, "Retained", "retained")
def mask(
    profiles: tuple[Path, ...],
    out: Path,
    density: float,
    exclude: tuple[str, ...],
    overwrite: bool,
    quiet: bool,
    retained: Retained,
) -> None:
    """Select the top channels of profiles.

    Keeps the top channels of each PROFILE and writes their union as a mask, and beside it a README.md for the Hub,
    except in the working directory.
    """
    from mergekit_act.artifacts import save_mask
    from mergekit_act.files import check_free
    from mergekit_act.report import list_mask
    from mergekit_act.report.listings import head_warning
    from mergekit_act.selection import mask_of_files

    check_free([out], overwrite=overwrite)  # before profiles are read
    made = mask_of_files(profiles, density, exclude=exclude, retain=retained.load())
    selected = {module: int(chosen.sum()) for module, chosen in made.channels.items()}
    remedy = "Without them: " + repeat_command("--exclude {head} --overwrite")
    if any(source["criterion"] == "activation" for source in made.sources):
        remedy = f"profile --center-logits takes off what all logits of a token have in common. {remedy}"
    warning = head_warning(made.layout, "the mask", selected, remedy)
    if warning:
        echo(f"warning: {warning}", err=True)
    save_mask(made, out, overwrite=overwrite)
    echo(list_mask(made))
    for readme in _describe(out.parent):
        echo(f"described for the Hub: {readme}")


@dataclass(frozen=True)
class Retained:
    """What ``mask`` is told of abilities to retain."""

    retain: tuple[Path, ...]
    retain_ranking: str | None
    retain_strength: float | None
    retain_density: float | None

    def load(self) -> Retention | None:
        """Their profiles; None if there are none.

        Raises:
            ValueError: something is told that has no effect.
        """
        from mergekit_act.selection import Retention

        settings = {"ranking": self.retain_ranking, "strength": self.retain_strength, "density": self.retain_density}
        given = {name: value for name, value in settings.items() if value is not None}
        if given and not self.retain:
            raise ValueError(
                f"--retain-{next(iter(given))} needs --retain PROFILE, the abilities whose channels are spared"
            )
        if not self.retain:
            return None
        retention = Retention.of_files(self.retain, **given)
        if "strength" in given and retention.rule != "difference":
            raise ValueError(f"--retain-strength belongs to the ranking by difference, not by {retention.rule}")
        return retention


def _describe(folder: Path) -> Sequence[Path]:
    """Write a folder's card for the Hub; the working directory may be for other things, and gets none unasked."""
    from mergekit_act.cards.files import write_folder_card

    return () if folder.resolve() == Path.cwd() else write_folder_card(folder).files


@command()
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
@options.exclude
@options.overwrite
@common
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
        echo("\n\n".join(list_essentials(path, density=density, exclude=exclude) for path in files))
        return
    from mergekit_act.report.page import write_report

    written = write_report(files, out_dir, density=density, exclude=exclude, overwrite=overwrite, quiet=quiet)
    for warning in written.warnings:
        echo(f"warning: {warning}")
    echo(written.page)
