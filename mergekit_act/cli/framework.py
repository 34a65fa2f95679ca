"""What all commands share: errors as sentences, text without control characters, ``-v`` and ``--quiet``."""

from __future__ import annotations

import functools
import importlib
import io
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import click

from mergekit_act.wording import escape, shorten

__all__ = ["Group", "command", "common", "echo", "packed", "repeat_command"]


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


def echo(text: object = "", *, err: bool = False) -> None:
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


def _of_rank() -> str:
    """Which of several processes says it."""
    if not os.environ.get("RANK"):
        return ""
    from mergekit_act.runs.processes import rank_and_count

    rank, count = rank_and_count()
    return f"process {rank}: " if count > 1 else ""


def repeat_command(*more: str) -> str:
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


class Group(click.Group):
    """Lists its commands in the order in which they were added, which is that of the work."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: D102
        return list(self.commands)


def common(function: Callable[..., Any]) -> Callable[..., Any]:
    """``-v`` and ``--quiet``, on every command."""

    @click.option("-v", "--verbose", count=True, help="Say more; tracebacks of errors too.")
    @click.option("--quiet", is_flag=True, help="No progress bars, as where the output is no terminal.")
    @functools.wraps(function)
    def command(verbose: int, quiet: bool, **arguments: Any) -> Any:
        level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Lines("%(levelname)s: %(message)s"))
        handler.addFilter(lambda record: not record.name.startswith("huggingface_hub"))  # has a handler of its own
        logging.basicConfig(level=level, handlers=[handler])
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # what a terminal's encoding lacks
        quiet = quiet or not sys.stderr.isatty()  # bars fill log files
        if quiet:
            for library in ("HUB", "DATASETS"):  # Transformers does as the first one
                os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")
        return function(quiet=quiet, **arguments)

    return command


def packed(home: str, name: str, into: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options that are fields of a dataclass reach the function as one object.

    Args:
        home: module of the dataclass, imported when the command runs.
        name: of the dataclass.
        into: the function's parameter.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(**arguments: Any) -> Any:
            kind = getattr(importlib.import_module(home), name)
            own = {field.name: arguments.pop(field.name) for field in fields(kind) if field.name in arguments}
            return function(**arguments, **{into: kind(**own)})

        return command

    return decorate


def command(**settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """A command of ``mergekit-act``, named after its function; ``settings`` are click's."""
    return click.command(cls=_Command, **settings)
