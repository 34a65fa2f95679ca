"""What of mergekit's inside the plugin depends on: without any of it our methods refuse to run."""

from __future__ import annotations

import sys

import mergekit.merge
import mergekit.scripts.merge_raw_pytorch
import mergekit.scripts.multimerge  # noqa: F401
import pytest
from mergekit.merge_methods.registry import get, registered_methods

from mergekit_act import checking
from mergekit_act.planning.internals import REQUIRED, unknown

GUARDS = {
    "mergekit.plan": checking.guard_planner,
    "mergekit.merge": checking.guard_merge,
    "mergekit.scripts.multimerge": checking.guard_multimerge,
    "mergekit.scripts.merge_raw_pytorch": checking.guard_flat_planner,
}
NAMES = [(completed, name) for completed, names in REQUIRED.items() for name in names]


@pytest.fixture
def allowed_again():
    """Our methods run again after a test in which they refused."""
    yield
    for method in registered_methods():
        vars(method).pop("validate_inputs", None)


def owner_of(name):
    *owners, attribute = name.name.split(".")
    home = sys.modules[name.module]
    for owner in owners:
        home = getattr(home, owner)
    return home, attribute


def assert_refused(completed: str, sentence: str) -> None:
    assert any(sentence in problem for problem in unknown(completed))
    GUARDS[completed]()
    with pytest.raises(RuntimeError, match=r"does not fit mergekit-act.*mergekit 0\.1\.5 works") as caught:
        get("act").validate_inputs(["a", "b"], "a")
    assert sentence in str(caught.value)


def test_mergekit_as_it_is_installed_is_known():
    assert [problem for completed in REQUIRED for problem in unknown(completed)] == []


@pytest.mark.parametrize(("completed", "name"), NAMES, ids=[name.name for _, name in NAMES])
def test_a_name_that_is_missing(completed, name, monkeypatch, allowed_again):
    home, attribute = owner_of(name)
    if attribute in vars(home):
        monkeypatch.delattr(home, attribute)
    # A field of a class.
    monkeypatch.delitem(home.__annotations__ if isinstance(home, type) else {}, attribute, raising=False)
    is_inherited = hasattr(home, attribute)  # from a class that takes other arguments
    assert_refused(completed, f"{name.module}.{name.name} takes " if is_inherited else f"has no {name.name}")


FUNCTIONS = [(completed, name) for completed, name in NAMES if name.parameters]


@pytest.mark.parametrize(("completed", "name"), FUNCTIONS, ids=[name.name for _, name in FUNCTIONS])
def test_a_function_of_another_signature(completed, name, monkeypatch, allowed_again):
    home, attribute = owner_of(name)
    monkeypatch.setattr(home, attribute, lambda something_new: None)
    assert_refused(completed, f"{name.module}.{name.name} takes something_new; expected {', '.join(name.parameters)}")
