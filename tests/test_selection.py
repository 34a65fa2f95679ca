"""Ranking, density, union and overlap against hand-computed values."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_act.artifacts import Profile
from mergekit_act.channels import Layout
from mergekit_act.selection import (
    Retention,
    common_counts,
    make_mask,
    rank_channels,
    select_channels,
    selected_count,
    selected_parameters,
    unite,
    validate_density,
)


def profile(scores: dict[str, list[float]], *, ability: str = "x", shared_rows=None) -> Profile:
    tensors = {module: torch.tensor(values) for module, values in scores.items()}
    layout = Layout(
        {module: ((f"{module}.weight", 0),) for module in scores},
        (),
        {f"{module}.weight": (len(values), 10) for module, values in scores.items()},
    )
    return Profile(tensors, layout, "activation", ability, {}, {}, shared_rows=shared_rows or {})


def chosen(selection) -> dict[str, list[int]]:
    return {module: torch.nonzero(mask).flatten().tolist() for module, mask in selection.items()}


def test_ranking_is_global():
    scores = profile({"b": [1.0, 9.0, 3.0], "a": [8.0, 2.0], "c": [0.0] * 5})
    assert chosen(select_channels(scores, 0.3)) == {"b": [1, 2], "a": [0]}


def test_density_is_computed_exactly():
    scores = profile({"m": [float(i) for i in range(100)]})
    assert selected_count(select_channels(scores, 0.29)) == 29  # 0.29 * 100 is 28.999… in floating point
    assert selected_count(select_channels(scores, 0.299)) == 29
    assert selected_count(select_channels(scores, 1)) == 100
    assert selected_count(select_channels(scores, 0.0001)) == 1  # at least one
    assert validate_density(1e-05) == Fraction(1, 100_000)


def test_the_papers_one_percent():
    ones = profile({"m": [1.0] * 1_750_528})
    assert selected_count(select_channels(ones, 0.01)) == 17_505


@given(
    st.lists(
        st.lists(st.sampled_from([0.0, -0.0, 0.5, 1.0, 3e-41, 1e30]), min_size=1, max_size=6), min_size=1, max_size=4
    ),
    st.floats(0.01, 1),
    st.booleans(),
)
def test_ranks_and_selections_are_those_of_pythons_sort(values, density, exclude_first):
    modules = {f"m{place}": scores for place, scores in enumerate(values)}
    scored = profile(modules, shared_rows={f"m{len(values) - 1}": 1})
    exclude = ["m0"] if exclude_first and len(values) > 1 else []
    cells = [(module, place, score) for module, scores in modules.items() for place, score in enumerate(scores)]
    barred = {f"m{len(values) - 1}": 1}
    allowed = [c for c in cells if c[0] not in exclude and c[1] < barred.get(c[0], 10)]
    order = sorted(allowed, key=lambda cell: -cell[2])  # Python's sort is stable
    ranks = [order.index(cell) if cell in allowed else len(cells) for cell in cells]
    assert rank_channels(scored, exclude=exclude).tolist() == ranks
    taking_part = sum(cell[0] not in exclude for cell in cells)
    k = max(1, math.floor(validate_density(density) * taking_part))
    expected = {module: [place for m, place, _ in order[:k] if m == module] for module in modules}
    selected = select_channels(scored, density, exclude=exclude)
    assert chosen(selected) == {module: sorted(places) for module, places in expected.items() if places}


def test_ties_go_to_the_module_that_comes_first():
    scores = profile({"z": [1.0, 5.0, 1.0], "a": [1.0, 1.0]})
    assert chosen(select_channels(scores, 0.6)) == {"z": [0, 1, 2]}
    assert chosen(select_channels(scores, 0.8)) == {"z": [0, 1, 2], "a": [0]}


def test_excluded_modules_take_no_part_in_the_count():
    scores = profile({"layers.0.up": [5.0, 4.0], "layers.1.up": [3.0, 2.0], "lm_head": [9.0] * 6})
    assert chosen(select_channels(scores, 0.5, exclude=["lm_head"])) == {"layers.0.up": [0, 1]}
    assert chosen(select_channels(scores, 0.5, exclude=["layers.*.up"])) == {"lm_head": [0, 1, 2]}


def test_glob_that_matches_nothing_names_the_kinds():
    scores = profile({"layers.0.up": [5.0], "lm_head": [9.0]})
    with pytest.raises(ValueError, match=r'no module matches "head"; there are layers\.\*\.up, lm_head'):
        select_channels(scores, 0.5, exclude=["head"])
    with pytest.raises(ValueError, match="no module is left after excluding"):
        select_channels(scores, 0.5, exclude=["*"])


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_density_outside_its_range(density):
    with pytest.raises(ValueError, match=r"expected a fraction in \(0, 1\]"):
        select_channels(profile({"m": [1.0]}), density)


def test_rows_that_the_ability_model_lacks_are_never_selected():
    scores = profile({"lm_head": [0.0, 3.0, 0.0, 0.0], "up": [0.0]}, shared_rows={"lm_head": 2})
    assert chosen(select_channels(scores, 1.0)) == {"lm_head": [0, 1], "up": [0]}


def test_unions_and_what_selections_share():
    first = {"m": torch.tensor([True, True, False, False])}
    second = {"m": torch.tensor([False, True, True, True]), "n": torch.tensor([True])}
    assert chosen(unite([first, second])) == {"m": [0, 1, 2, 3], "n": [0]}
    assert first["m"].tolist() == [True, True, False, False]  # not changed
    flat = np.array([[1, 1, 0, 0, 0], [0, 1, 1, 1, 1]], dtype=bool)
    assert common_counts(flat).tolist() == [[2, 1], [1, 4]]


def test_union_of_different_models_is_refused():
    with pytest.raises(ValueError, match="these are masks of different models"):
        unite([{"m": torch.ones(2, dtype=torch.bool)}, {"m": torch.ones(3, dtype=torch.bool)}])
    with pytest.raises(ValueError, match=r'the profiles of "one" and "two" are of models with different modules'):
        make_mask([profile({"m": [1.0]}, ability="one"), profile({"n": [1.0]}, ability="two")], 0.5)


def test_parameters_of_a_tied_matrix_are_counted_once():
    shapes = {"embed.weight": (6, 4), "head.weight": (6, 4), "up.weight": (3, 4), "up.bias": (3,)}
    layout = Layout(
        {
            "embed": (("embed.weight", 1),),
            "up": (("up.weight", 0), ("up.bias", 0)),
            "head": (("head.weight", 0),),
        },
        (("embed.weight", "head.weight"),),
        shapes,
    )
    selection = {
        "embed": torch.tensor([True, False, False, False]),
        "head": torch.tensor([True, True, False, False, False, False]),
        "up": torch.tensor([True, False, False]),
    }
    # one column of 6 and two rows of 4 share two cells; one row of 4 and its bias
    assert selected_parameters(selection, layout) == 6 + 8 - 2 + 5
    assert selected_parameters(selection, layout, ["head"]) == 8
    assert layout.parameter_count() == 24 + 12 + 3


def test_parameters_of_experts():
    layout = Layout({"e.down": (("e.down", 2), ("e.down_bias", 1))}, (), {"e.down": (2, 5, 3), "e.down_bias": (2, 3)})
    selection = {"e.down": torch.tensor([[True, False, True], [False, False, True]])}
    assert layout.channel_shape("e.down") == (2, 3)
    assert selected_parameters(selection, layout) == 3 * (5 + 1)


def test_mask_records_where_it_comes_from():
    profiles = [
        profile({"m": [3.0, 2.0, 1.0, 0.0]}, ability="one"),
        profile({"m": [0.0, 1.0, 2.0, 3.0]}, ability="two"),
    ]
    mask = make_mask(profiles, 0.25, hashes=["aa", "bb"])
    assert chosen(mask.channels) == {"m": [0, 3]}
    assert [(source["ability"], source["sha256"], source["density"]) for source in mask.sources] == [
        ("one", "aa", 0.25),
        ("two", "bb", 0.25),
    ]
    assert mask.counts == {
        "channels": 2,
        "channels_total": 4,
        "channels_taking_part": 4,
        "parameters": 20,
        "parameters_total": 40,
    }


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    values=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=35, max_size=35),
    percent=st.integers(1, 100),
)
def test_selection_equals_sorting_in_plain_python(sizes, values, percent):
    numbers = iter(values)
    scores = {f"m{i}": [next(numbers) for _ in range(size)] for i, size in enumerate(sizes)}
    flat = [(module, i, score) for module, column in scores.items() for i, score in enumerate(column)]
    k = max(1, percent * len(flat) // 100)
    best = sorted(flat, key=lambda entry: -entry[2])[:k]  # Python's sort is stable
    expected: dict[str, list[int]] = {}
    for module, i, _ in sorted(best, key=lambda entry: (int(entry[0][1:]), entry[1])):
        expected.setdefault(module, []).append(i)
    assert chosen(select_channels(profile(scores), percent / 100)) == expected


def spared(recover, retain, of, **settings):
    """The channels of one module that are selected; the settings are the retention's."""
    profiles = [profile({"m": values}) for values in (recover, *retain)]
    return chosen(select_channels(profiles[0], of, retain=Retention(profiles[1:], **settings))).get("m", [])


def test_retained_abilities_are_spared_by_hand():
    recover = [9.0, 8.0, 3.0, 2.0, 1.0]
    retain = [[9.5, 1.0, 0.0, 0.5, 0.0], [0.0, 6.0, 0.0, 0.5, 0.5]]
    # r = 9.5, 6, 0, 0.5, 0.5; the median of the positive ones of both is 0.5 (0.5, 0.5, 0.5, 1, 6, 9.5)
    assert spared(recover, retain, 0.2) == [1]  # s - r / 2: 4.25, 5, 3, 1.75, 0.75
    assert spared(recover, retain, 0.4, strength=1.0) == [1, 2]  # s - r: -0.5, 2, 3, 1.5, 0.5
    assert spared(recover, retain, 0.6, strength=1.0) == [1, 2, 3]
    assert spared(recover, retain, 0.4, strength=0.0) == [0, 1]
    assert spared(recover, retain, 1.0, strength=1.0) == [0, 1, 2, 3, 4]  # below 0 too: k is what the density says
    assert spared(recover, retain, 0.4, ranking="ratio") == [2, 3]  # 0.9, 1.2, 6, 2, 1
    assert spared(recover, retain, 0.4, ranking="score") == [0, 1]
    assert spared(recover, retain, 0.4, ranking="score", density=0.2) == [2, 3]  # the tops 0 and 1 are struck
    assert spared(recover, retain, 0.6, ranking="score", density=0.2) == [2, 3, 4]
    with pytest.raises(ValueError, match=r"only 3 channels are left .* asks for 4"):
        spared(recover, retain, 0.8, ranking="score", density=0.2)


def test_without_scores_to_retain_the_ranking_is_the_plain_one():
    for ranking in ("difference", "ratio"):
        assert spared([1.0, 3.0, 2.0], [[0.0, 0.0, 0.0]], 0.7, ranking=ranking) == [1, 2]


def test_profiles_to_retain_are_of_the_same_model():
    ours, theirs = profile({"m": [1.0] * 3}), profile({"n": [1.0] * 3})
    with pytest.raises(ValueError, match="is to be retained, are of models with different modules"):
        select_channels(ours, 0.5, retain=Retention([theirs]))
    pair = {"target": {"fingerprint": "a"}, "ability_model": {"fingerprint": "b"}}
    first, other = replace(ours, **pair), replace(ours, **pair | {"ability_model": {"fingerprint": "c"}})
    with pytest.raises(ValueError, match="are of different pairs"):
        select_channels(first, 0.5, retain=Retention([other]))
    with pytest.raises(ValueError, match="are by different criteria: activation and weight"):
        select_channels(first, 0.5, retain=Retention([replace(first, criterion="weight")]))


def attributions(scores: dict[str, list[float]], damage: dict[str, list[float]], ability: str = "x") -> Profile:
    harm = {module: torch.tensor(values) for module, values in damage.items()}
    return replace(profile(scores, ability=ability), criterion="attribution", damage=harm)


def test_channels_that_do_not_help_are_never_selected():
    scores = attributions({"a": [3.0, -5.0, 0.0], "b": [1.0, -2.0, 2.0]}, {"a": [1.0] * 3, "b": [1.0] * 3})
    assert chosen(select_channels(scores, 1.0)) == {"a": [0], "b": [0, 2]}
    assert chosen(select_channels(scores, 0.34)) == {"a": [0], "b": [2]}
    with pytest.raises(ValueError, match='no channel of "x" has a positive attribution'):
        select_channels(attributions({"a": [-1.0, 0.0]}, {"a": [1.0, 1.0]}), 0.5)


def test_attribution_is_divided_by_the_damage_of_the_kept():
    gained = attributions({"m": [8.0, 6.0, 4.0, -9.0]}, {"m": [0.0] * 4}, "gained")
    kept = attributions({"m": [1.0] * 4}, {"m": [7.0, 1.0, 1.0, 1.0]}, "kept")
    # With the median of damage, 1: 8 / 8, 6 / 2, 4 / 2.
    ranks = rank_channels(gained, retain=Retention([kept]))
    assert ranks.tolist() == [2, 0, 1, 4]
    assert rank_channels(gained, retain=Retention([kept], ranking="difference", strength=1.0)).tolist() == [2, 0, 1, 4]
    assert rank_channels(gained, retain=Retention([kept], ranking="score")).tolist() == [0, 1, 2, 4]
    # The channel that damages most is left out.
    spared = Retention([kept], ranking="score", density=0.25)
    assert rank_channels(gained, retain=spared).tolist() == [4, 0, 1, 4]
    mask = make_mask([gained], 0.5, retain=Retention([kept]))
    assert mask.sources[0]["gain"] == 10.0
    assert mask.sources[0]["retain"]["abilities"][0]["loss"] == 2.0
    assert mask.sources[0]["retain"]["ranking"] == "ratio"


def test_criteria_are_not_mixed():
    first, second = profile({"m": [1.0, 2.0]}), attributions({"m": [1.0, 2.0]}, {"m": [0.0, 0.0]})
    with pytest.raises(ValueError, match="by different criteria, activation and attribution; a mask is by one"):
        make_mask([first, second], 0.5)
    with pytest.raises(ValueError, match="by different criteria: activation and attribution"):
        rank_channels(first, retain=Retention([second]))


@pytest.mark.parametrize("option", ["points", "center_logits"])
def test_a_mask_is_by_scores_of_one_kind(option):
    second = profile({"a": [1.0, 2.0]})
    first = replace(second, data={option: 2})
    make_mask([first, first], 0.5)
    with pytest.raises(ValueError, match=f'made with different settings, "{option}" 2 and'):
        make_mask([first, second], 0.5)
