"""The family act_<method>: mergekit's own methods, with changes inside the masks only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import get, merge_state_dicts, registered_methods
from mergekit.merge_methods.base import BasePolicy, PerInputValues, TensorEntry, TensorGroup
from mergekit.merge_methods.easy_define import merge_method
from merges import act_config, merged, random_mask, refusal, state_of

from mergekit_act.merging import TensorSelection, is_ours, register_methods

FAMILY = {
    "act_task_arithmetic",
    "act_ties",
    "act_dare_linear",
    "act_dare_ties",
    "act_della",
    "act_della_linear",
    "act_breadcrumbs",
    "act_breadcrumbs_ties",
    "act_sce",
    "act_ram",
    "act_ramplus_tl",
}

ADDED = ["mask", "mask_density", "fit", "fit_keep", "fit_ridge"]


def test_every_method_of_task_vectors_has_its_masked_form():
    names = {method.spec.name for method in registered_methods()}
    assert {name for name in names if is_ours(name)} == FAMILY | {"act"}
    with_base = {m.spec.name for m in registered_methods() if m.spec.contract.base == BasePolicy.REQUIRED}
    left_out = {name for name in with_base if not is_ours(name) and f"act_{name}" not in FAMILY}
    assert left_out == {"slerp", "nearswap", "arcee_fusion", "model_stock"}


@pytest.mark.parametrize("name", sorted(FAMILY))
def test_parameters_stay_and_masks_are_added(name):
    ours, inner = get(name).spec, get(name.removeprefix("act_")).spec
    assert [p.name for p in ours.parameters] == [p.name for p in inner.parameters] + ADDED
    assert (ours.contract, ours.uses_accelerator) == (inner.contract, inner.uses_accelerator)


def test_a_method_that_is_registered_later_is_picked_up(monkeypatch):
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import InputContract

    @merge_method(name="halfway", contract=InputContract(base=BasePolicy.REQUIRED))
    def halfway(group: TensorGroup, share: float = 0.5) -> torch.Tensor:
        return torch.lerp(group.base.tensor, group.non_base[0].tensor, share)

    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry.register(halfway)
    register_methods()
    register_methods()
    assert [p.name for p in get("act_halfway").spec.parameters] == ["share", *ADDED]


def run(name, tensors, selections, **parameters):
    """The method as mergekit's executor calls it, with what the planner seam has put in."""
    method = get(name)
    group = TensorGroup(tuple(TensorEntry(i, tensor, i == 0) for i, tensor in enumerate(tensors)))
    others = range(1, len(tensors))
    bound = {p.name: p.default for p in method.spec.parameters}
    for parameter in method.spec.input_parameters:
        value = parameters.get(parameter.name, parameter.default)
        bound[parameter.name] = PerInputValues([(i, value) for i in others])
    bound |= {key: value for key, value in parameters.items() if not isinstance(bound[key], PerInputValues)}
    bound["mask"] = PerInputValues([(i, selections[i - 1]) for i in others])
    (result,) = method._execute_resolved((group,), [bound])
    return result


def plain_cells(selection: TensorSelection | None, shape) -> torch.Tensor:
    cells = torch.zeros(shape, dtype=torch.bool)
    for axis, chosen in (selection.slices if selection else {}).items():
        for place in chosen.nonzero().tolist():
            index = [slice(None)] * len(shape)
            index[axis] = place[-1]
            if len(place) == 2:
                index[0] = place[0]
            cells[tuple(index)] = True
    return cells


@st.composite
def cases(draw):
    shape = draw(st.sampled_from([(5,), (4, 6), (3, 4, 5)]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tensors = [torch.randn(shape, generator=generator).to(dtype) for _ in range(draw(st.integers(2, 4)))]
    tensors[0].view(-1)[0] = -0.0
    selections = []
    for _ in tensors[1:]:
        axis = draw(st.integers(1, 2)) if len(shape) == 3 else draw(st.integers(0, len(shape) - 1))
        size = (shape[0], shape[axis]) if len(shape) == 3 else (shape[axis],)
        chosen = torch.rand(size, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))
        slices = {axis: chosen}
        if len(shape) == 2 and draw(st.booleans()):  # a tied matrix
            slices[1 - axis] = torch.rand(shape[1 - axis], generator=generator) < 0.3
        selections.append(draw(st.sampled_from([None, TensorSelection(slices)])))
    return tensors, selections


@pytest.mark.parametrize("name", sorted(FAMILY))
@settings(deadline=None, max_examples=40)
@given(case=cases(), weight=st.sampled_from([0.3, 1.0, -0.5]), density=st.sampled_from([0.5, 1.0]))
def test_inside_is_the_method_of_masked_models_and_outside_the_target(name, case, weight, density):
    tensors, selections = case
    own = {p.name for p in get(name).spec.parameters}
    parameters = {key: value for key, value in {"weight": weight, "density": density}.items() if key in own}
    torch.manual_seed(0)
    result = run(name, tensors, selections, **parameters)
    cells = [plain_cells(selection, tensors[0].shape) for selection in selections]
    union = torch.stack(cells).any(0)
    assert torch.equal(result[~union].view(torch.uint8), tensors[0][~union].view(torch.uint8))
    if not union.any():
        assert result is tensors[0]
        return
    masked = [torch.where(inside, tensor, tensors[0]) for tensor, inside in zip(tensors[1:], cells, strict=True)]
    torch.manual_seed(0)
    expected = merge_state_dicts(
        [{"w": tensor} for tensor in (tensors[0], *masked)], name.removeprefix("act_"), base=0, parameters=parameters
    )["w"]
    assert result.dtype == tensors[0].dtype
    assert torch.equal(result[union], expected[union].to(result.dtype))


@pytest.mark.parametrize("name", ["act_ties", "act_dare_linear", "act_sce"])
def test_mergekit_yaml_runs_the_family(pair_of, tmp_path, name):
    target, ability = pair_of("qwen2-tied")
    mask = random_mask(target, ability, tmp_path / "m.safetensors", density=0.2)
    parameters = {"mask": str(tmp_path / "m.safetensors")} | ({"weight": 0.5} if name != "act_sce" else {})
    result = merged(
        act_config(target, (ability, parameters), merge_method=name), tmp_path / "out", "--random-seed", "3"
    )
    before, other = state_of(target), state_of(ability)
    changed = {key for key in before if not torch.equal(before[key], result[key])}
    owned = {parameter for module in mask.channels for parameter, _ in mask.layout.parameters[module]}
    assert changed == {next(n for n in mask.layout.tied_names(name) if n in before) for name in owned}
    chosen = mask.channels["model.layers.0.mlp.up_proj"]
    up = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal((result[up] != before[up]).any(1), chosen)
    if name == "act_sce":  # one ability model: all of its change
        torch.testing.assert_close(result[up][chosen], other[up][chosen])


def test_the_family_needs_masks_too(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    message = refusal(act_config(target, (ability, {"weight": 1.0}), merge_method="act_ties"), tmp_path / "out")
    assert 'has no "mask"' in message
    random_mask(target, ability, tmp_path / "m.safetensors")
    parameters = {"weight": 1.0, "mask": str(tmp_path / "m.safetensors"), "densty": 0.5}
    message = refusal(act_config(target, (ability, parameters), merge_method="act_ties"), tmp_path / "out")
    assert 'merge method act_ties has no parameter "densty" (did you mean "density"?)' in message
