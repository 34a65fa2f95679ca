"""Where mergekit's functions are wrapped, so that merges with our methods are planned and checked as a whole.

A merge method sees one tensor at a time and only the output's name. mergekit's planners know the rest: which source
tensor of which model becomes which output. So the config is checked before models are fetched, and the plan before a
tensor is read; each tensor's ``mask`` setting is then replaced by what the masks select of that very tensor. What is
checked, the callers say.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import click
from huggingface_hub.constants import HF_HUB_OFFLINE
from mergekit.common import ModelReference
from pydantic import ValidationError

from mergekit_act.checkpoints import Checkpoint, local_folder, merged_model
from mergekit_act.merging import is_ours
from mergekit_act.merging.hub import look_again
from mergekit_act.planning.headers import HeaderLoader
from mergekit_act.planning.internals import LoaderCache, refuse_unless_known, wrap
from mergekit_act.planning.loads import take_held
from mergekit_act.planning.models import Checkpoints, open_loaded, open_weight_file
from mergekit_act.planning.plan import Plan, complete_plan, make_plan
from mergekit_act.wording import enumerate_some, escape, one_line, shorten

__all__ = ["MergeConfigError", "wrap_flat_planner", "wrap_merge", "wrap_multimerge", "wrap_planner"]


class MergeConfigError(click.ClickException, ValueError):
    """A merge that would fail or do something else than it says; mergekit's commands print it and exit with 1."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = shown = sorted({escape(problem) for problem in problems})
        if len(shown) == 1:
            super().__init__(shorten(shown[0]))
        else:
            super().__init__(f"{len(shown)} problems:\n  - " + enumerate_some(shown, "\n  - "))


def wrap_merge(check: Callable[[Any, Any], None]) -> None:
    """Complete ``mergekit.merge``: a config is checked before models are fetched, and models are read as they are now.

    Args:
        check: given a config and the options, raises what is wrong.
    """

    def before_fetching(get_architecture_info: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(get_architecture_info)
        def checked(config: Any, options: Any) -> Any:
            if is_ours(config.merge_method):
                check(config, options)
                with _one_sentence():
                    _refresh(config.referenced_models(), options)
            return get_architecture_info(config, options)

        return checked

    def anew(run_merge: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run_merge)
        def run(*args: Any, **kwargs: Any) -> Any:
            look_again()
            return run_merge(*args, **kwargs)

        return run

    if refuse_unless_known("mergekit.merge"):
        wrap("mergekit.merge", "get_architecture_info", before_fetching)
        wrap("mergekit.merge", "run_merge", anew)


def wrap_multimerge(check: Callable[[Mapping[str, Any], str, Any], None]) -> None:
    """Complete ``mergekit.scripts.multimerge``: no merge begins while a later one is known to fail.

    Args:
        check: given name -> config, the folder of the models that are made, and the options, raises what is wrong.
    """

    def before_all(make_tasks: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make_tasks)
        def checked(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(make_tasks).bind(*args, **kwargs).arguments
            check(given["merge_configs"], given["intermediate_dir"], given["merge_options"])
            return make_tasks(*args, **kwargs)

        return checked

    if refuse_unless_known("mergekit.scripts.multimerge"):
        wrap("mergekit.scripts.multimerge", "make_tasks", before_all)


def wrap_planner(check_models: Callable[[Iterable[Checkpoint]], None], check_plan: Callable[[Plan], None]) -> None:
    """Complete ``mergekit.plan.MergePlanner``: plans that use one of our methods are ours, and checked.

    Args:
        check_models: given the models of the config, raises what is wrong before they are planned with.
        check_plan: given the plan, raises what is wrong with it.
    """

    def as_ours(plan: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plan)
        def checked(self: Any) -> None:
            if not is_ours(self.config.merge_method):
                plan(self)
                return
            with _one_sentence():
                checkpoints = Checkpoints(partial(open_loaded, trust_remote_code=self.options.trust_remote_code))
                check_models([checkpoints[model] for model in self.config.referenced_models()])
                self.mergekit_act_plan = complete_plan(self, partial(plan, self), checkpoints)
                check_plan(self.mergekit_act_plan)

        return checked

    def held(plan: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        @functools.wraps(plan)
        def taken(self: Any, *args: Any, **kwargs: Any) -> list[Any]:
            tasks = plan(self, *args, **kwargs)
            return take_held(tasks) if is_ours(self.config.merge_method) else tasks

        return taken

    if refuse_unless_known("mergekit.plan"):
        wrap("mergekit.plan", "MergePlanner._plan", as_ours)
        wrap("mergekit.plan", "MergePlanner.plan_to_disk", held)
        wrap("mergekit.common", "ModelReference.local_path", _from_the_cache)


def wrap_flat_planner(check: Callable[[Any], None], check_plan: Callable[[Plan, bool], None]) -> None:
    """Complete ``mergekit.scripts.merge_raw_pytorch``: plans that use one of our methods are ours, and checked.

    Args:
        check: given a config, raises what is wrong with it.
        check_plan: given the plan, and whether tensors that not all models have are left out on purpose, likewise.
    """

    def as_ours(plan: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plan)
        def checked(config: Any, *args: Any, **kwargs: Any) -> Any:
            if not is_ours(config.merge_method):
                return plan(config, *args, **kwargs)
            check(config)
            with _one_sentence():
                *saves, finalize = plan(config, *args, **kwargs)
                tasks = [(save.tensor_task.output_weight, save.tensor_task) for save in saves]
                made = make_plan(config, None, Checkpoints(open_weight_file), tasks)
                given = inspect.signature(plan).bind(config, *args, **kwargs).arguments
                check_plan(made, given["tensor_intersection"])
            ours = {tensor.name: tensor.task for tensor in made.tensors}
            saved = tuple(save.model_copy(update={"tensor_task": ours.get(save.tensor_name)}) for save in saves)
            return take_held([*saved, finalize.model_copy(update={"tensor_save_tasks": saved})])

        return checked

    if refuse_unless_known("mergekit.scripts.merge_raw_pytorch"):
        wrap("mergekit.scripts.merge_raw_pytorch", "plan_flat_merge", as_ours)


def _from_the_cache(local_path: Callable[..., str]) -> Callable[..., str]:
    """mergekit asks the Hub which files a model has even where it is switched off; the cache answers then."""

    @functools.wraps(local_path)
    def cached_path(self: Any, cache_dir: str | None = None, ignore_lora: bool = False) -> str:
        if not HF_HUB_OFFLINE or os.path.exists(self.model.path):
            return local_path(self, cache_dir, ignore_lora)
        return str(local_folder(self, cache_dir))

    return cached_path


def _refresh(models: Iterable[ModelReference], options: Any) -> None:
    """Let mergekit read models as they are now: what it has opened or merged with a LoRA before may be of older files.

    Models that only their headers stand for are not merged now.
    """
    for model in models:
        if isinstance(LoaderCache.loaders.get(model), HeaderLoader):
            continue
        LoaderCache.loaders.pop(model, None)
        if model.lora is not None:
            merged = merged_model(model, options.lora_merge_cache, options.lora_merge_dtype)
            merged.make(trust_remote_code=options.trust_remote_code)


def _wrong_value(detail: Mapping[str, Any]) -> str:
    """Ours name the parameter; pydantic does not know it."""
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    return f"a parameter has a wrong value: {detail['msg']}, got {detail['input']!r}"


@contextmanager
def _one_sentence() -> Iterator[None]:
    """What mergekit, pydantic and files say of a wrong value comes as many kinds of error; users get one kind."""
    try:
        yield
    except MergeConfigError:
        raise
    except ValidationError as error:
        raise MergeConfigError([_wrong_value(detail) for detail in error.errors()]) from error
    except (ValueError, RuntimeError, OSError) as error:
        raise MergeConfigError([one_line(error)]) from error
