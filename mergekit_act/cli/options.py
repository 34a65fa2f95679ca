"""Options that several commands have, and the types of their values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

__all__ = ["Bytes", "printable"]


class Bytes(click.ParamType):  # type: ignore[type-arg]
    """A size with a unit."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:  # noqa: D102
        if isinstance(value, int):
            return value
        from mergekit_act.streaming.memory import parse_bytes

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


def printable(kind: str, text: str) -> Callable[..., Any]:
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


trust = click.option("--trust-remote-code", is_flag=True, help="Run model code from the Hub (danger).")
overwrite = click.option("--overwrite", is_flag=True, help="Replace output files that exist.")
keep_within = click.option(
    "--keep-within",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    metavar="SHARE",
    help="How much of the kept abilities may be lost: of the likelihood of an answer token.",
)
batch_tokens = click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Tokens in a micro-batch, padding included. The last digits of the results depend on it.",
)
lora_merge_cache = click.option(
    "--lora-merge-cache", help="Folder for merged models, for references of the form model+lora."
)
evaluation_device = click.option(
    "--device", help="Where models run: cuda, cpu, or auto to spread one over all there is.  [default: the accelerator]"
)
exclude = click.option(
    "--exclude",
    metavar="MODULE-GLOB",
    multiple=True,
    help="Leave modules out, in the ranking and in the count, such as lm_head. Repeatable.",
)
dtype = click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="In which the models run.  [default: bfloat16 where the device multiplies it natively, else float32]",
)
