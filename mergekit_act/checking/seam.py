"""Where mergekit's planners are wrapped, so that merges with our methods are checked as a whole.

A merge method sees one tensor at a time and only the output's name. mergekit's planners know the rest: which source
tensor of which model becomes which output. So the config is checked before models are fetched, and the plan before a
tensor is read; each tensor's ``mask`` setting is then replaced by what the masks select of that very tensor.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_OFFLINE
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.registry import get
from pydantic import ValidationError

from mergekit_act.checking.completion import record_calls
from mergekit_act.checking.configs import (
    MergeConfigError,
    config_problems,
    file_problems,
    layer_problems,
    model_problems,
    path_remarks,
    plain,
)
from mergekit_act.checking.flat import FlatPlanCheck
from mergekit_act.checking.headers import HeaderLoader
from mergekit_act.checking.outputs import drop_quantisation, follow_layers, name_dtype
from mergekit_act.checking.plans import PlanCheck
from mergekit_act.checkpoints import local_folder, merged_model
from mergekit_act.merging import is_ours, refuse_to_run
from mergekit_act.merging.hub import look_again

__all__ = ["wrap_flat_planner", "wrap_merge", "wrap_multimerge", "wrap_planner"]

LOG = logging.getLogger(__name__)

_MARK = "completed_by_mergekit_act"


def wrap_merge() -> None:
    """Complete ``mergekit.merge``: what a config alone tells is checked before models are fetched."""

    def wrap(get_architecture_info: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(get_architecture_info)
        def checked_architecture(config: Any, options: Any) -> Any:
            if is_ours(config.merge_method):
                spec = get(config.merge_method).spec
                problems = config_problems(plain(config), spec)
                problems += model_problems(config.referenced_models(), options)
                problems = problems or layer_problems(config, options)
                if problems:
                    raise MergeConfigError(problems)
                for remark in path_remarks(_local_paths(config)):
                    LOG.warning(remark)
                with _one_sentence():
                    _refresh(config.referenced_models(), options)
            return get_architecture_info(config, options)

        return checked_architecture

    def wrap_run(run_merge: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run_merge)
        def run_anew(*args: Any, **kwargs: Any) -> Any:
            look_again()
            return run_merge(*args, **kwargs)

        return run_anew

    _wrap("mergekit.merge", None, "get_architecture_info", wrap)
    _wrap("mergekit.merge", None, "run_merge", wrap_run)
    _wrap("mergekit.common", "ModelReference", "local_path", _from_the_cache)


def _from_the_cache(local_path: Callable[..., str]) -> Callable[..., str]:
    """mergekit asks the Hub which files a model has even where it is switched off; the cache answers then."""

    @functools.wraps(local_path)
    def cached_path(self: Any, cache_dir: str | None = None, ignore_lora: bool = False) -> str:
        if not HF_HUB_OFFLINE or os.path.exists(self.model.path):
            return local_path(self, cache_dir, ignore_lora)
        return str(local_folder(self, cache_dir))

    return cached_path


def wrap_multimerge() -> None:
    """Complete ``mergekit.scripts.multimerge``: no merge begins while a later one is known to fail."""

    def wrap(make_tasks: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make_tasks)
        def checked_tasks(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(make_tasks).bind(*args, **kwargs).arguments
            problems = []
            made = [str(Path(given["intermediate_dir"]) / other) for other in given["merge_configs"] if other]
            for remark in path_remarks(made):
                LOG.warning(remark)
            for name, config in given["merge_configs"].items():
                if is_ours(config.merge_method):
                    there = [m for m in config.referenced_models() if str(Path(m.model.path)) not in made]
                    found = [
                        f'mergekit-multi can\'t write "{model}" down: rename it without spaces and quotes'
                        for model in config.referenced_models()
                        if set(' "') & set(str(model))
                    ]
                    found += config_problems(plain(config), get(config.merge_method).spec)
                    found += model_problems(there, given["merge_options"])
                    problems += [f"{name or 'the unnamed merge'}: {problem}" for problem in found]
            if problems:
                raise MergeConfigError(problems)
            return make_tasks(*args, **kwargs)

        return checked_tasks

    _wrap("mergekit.scripts.multimerge", None, "make_tasks", wrap)


def wrap_planner() -> None:
    """Complete ``mergekit.plan.MergePlanner``: check and resolve plans that use one of our methods."""

    def wrap(plan: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plan)
        def checked_plan(self: Any) -> None:
            if not is_ours(self.config.merge_method):
                plan(self)
                return
            with _one_sentence():
                check = self.mergekit_act_check = PlanCheck(self.config, self.options)
                check.refuse_quantised()
                with record_calls(self, check.located) as calls:
                    plan(self)
                check.complete(self, calls)
                resolved = [(weight, check.resolve(weight, task)) for weight, task in self._tensors]
                self._tensors = [(weight, task) for weight, task in resolved if task is not None]
                follow_layers(self)
                name_dtype(self, check.dtypes())
                drop_quantisation(self)
                check.finish()

        return checked_plan

    _wrap("mergekit.plan", "MergePlanner", "_plan", wrap)


def wrap_flat_planner() -> None:
    """Complete ``mergekit.scripts.merge_raw_pytorch``: check and resolve plans that use one of our methods."""

    def wrap(plan: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plan)
        def checked_plan(config: Any, *args: Any, **kwargs: Any) -> Any:
            if not is_ours(config.merge_method):
                return plan(config, *args, **kwargs)
            written = plain(config)
            problems = config_problems(written, get(config.merge_method).spec) + file_problems(config)
            if problems:
                raise MergeConfigError(problems)
            with _one_sentence():
                *saves, finalize = plan(config, *args, **kwargs)
                check = FlatPlanCheck(config, None)
                resolved = tuple(
                    save.model_copy(
                        update={"tensor_task": check.resolve(save.tensor_task.output_weight, save.tensor_task)}
                    )
                    for save in saves
                )
                if not inspect.signature(plan).bind(config, *args, **kwargs).arguments["tensor_intersection"]:
                    check.find_left_out()
                check.finish()
            return [*resolved, finalize.model_copy(update={"tensor_save_tasks": resolved})]

        return checked_plan

    _wrap("mergekit.scripts.merge_raw_pytorch", None, "plan_flat_merge", wrap)


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


def _local_paths(config: Any) -> list[str]:
    return sorted(model.model.path for model in config.referenced_models() if Path(model.model.path).exists())


def _wrap(module: str, owner: str | None, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function of mergekit by its wrapped self, once; if it is not there, our methods refuse to run."""
    home = sys.modules[module] if owner is None else getattr(sys.modules[module], owner, None)
    function = getattr(home, name, None)
    if function is None:
        refuse_to_run(f"{'.'.join(filter(None, (module, owner)))} has no {name}")
    elif not hasattr(function, _MARK):
        wrapped = wrap(function)
        setattr(wrapped, _MARK, True)
        setattr(home, name, wrapped)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """What mergekit, pydantic and files say of a wrong value comes as many kinds of error; users get one kind."""
    try:
        yield
    except MergeConfigError:
        raise
    except ValidationError as error:
        shown = "; ".join(f"{detail['msg']}, got {detail['input']!r}" for detail in error.errors())
        raise MergeConfigError([f"a parameter has a wrong value: {shown}"]) from error
    except (ValueError, RuntimeError, OSError) as error:
        raise MergeConfigError([" ".join(str(error).split())]) from error
