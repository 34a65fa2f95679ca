"""``mergekit-yaml`` run by us: what goes wrong in mergekit ends in a sentence and exit code 1."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click
from pydantic import ValidationError

from mergekit_act.checking.configs import value_problems
from mergekit_act.wording import enumerate_some, one_line, shorten

__all__ = ["run_mergekit_yaml"]


def run_mergekit_yaml(arguments: Sequence[str]) -> None:
    """Run mergekit's command with these arguments; ``-v`` among them shows tracebacks.

    Raises:
        click.ClickException: the merge failed, or a part of the output that mergekit takes for dispensable did.
        SystemExit: as the command exits.
    """
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    verbose = any(argument == "--verbose" or argument.startswith("-v") for argument in arguments)
    with _logged_failures() as failures:
        try:
            mergekit_yaml.main(args=list(arguments), prog_name="mergekit-act merge")
        except SystemExit as ended:
            if ended.code or not failures:
                raise
        except click.ClickException:
            raise
        except ValidationError as error:
            raise click.ClickException(enumerate_some(value_problems(error), "; ")) from error
        except Exception as error:  # mergekit lets through what files, safetensors, pydantic and torch raise
            if verbose:
                raise
            raise click.ClickException(
                f"the merge failed: {_one_line(error)}. What the output folder holds is incomplete; mend that, remove "
                "it and give the command again (-v shows where)"
            ) from error
    if failures:
        told = "; ".join(failures)
        raise click.ClickException(
            f"the weights are written, but not all beside them: {told}. Mend that and give the command again, or copy "
            "the files from the target's folder"
        )


@contextmanager
def _logged_failures() -> Iterator[list[str]]:
    """What mergekit logs as an error and goes on: a tokenizer that could not be copied."""
    failures: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR:
            return True
        cause = record.exc_info[1] if record.exc_info else None
        what = record.getMessage().partition(". ")[0]
        failures.append(what if cause is None else f"{what} ({_one_line(cause)})")
        return False

    log = logging.getLogger("mergekit.merge")
    log.addFilter(note)
    try:
        yield failures
    finally:
        log.removeFilter(note)


def _one_line(error: BaseException) -> str:
    return shorten(one_line(error), 500) or type(error).__name__
