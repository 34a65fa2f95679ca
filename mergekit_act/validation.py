"""What the metadata of a profile or mask must say, and how it must agree with the file's tensors.

Whoever reads such a file reads it through here, so that the rest of the package may rely on types, names and counts.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_act.channels import Layout
from mergekit_act.criteria import CRITERIA

__all__ = [
    "FORMAT_VERSIONS",
    "KINDS",
    "checksum",
    "inputs_problems",
    "layout_problems",
    "mask_problems",
    "metadata_problems",
    "parse_metadata",
    "profile_problems",
]

#: Those that can be read; the last is written.
FORMAT_VERSIONS = (1, 2)
KINDS = ("profile", "mask", "inputs")

_DEEPEST = 50  # what YAML files may have, and so the data settings in the metadata
_LARGEST = 2**53


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over tensors: the name, dtype, shape and little-endian bytes of each, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def parse_metadata(text: str) -> dict[str, Any]:
    """The metadata's JSON.

    Raises:
        ValueError: it is no JSON object, names a key twice, or is nested too deep to be ours.
    """
    try:
        found = json.loads(text, object_pairs_hook=_unique)
        json.dumps(found, ensure_ascii=False).encode()  # half characters can be read, and not written
    except RecursionError as error:
        raise ValueError("its metadata is nested too deep") from error
    except UnicodeEncodeError as error:
        raise ValueError("its metadata has half a character") from error
    except ValueError as error:  # also an integer of thousands of digits
        raise ValueError(f"its metadata is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError("its metadata is not a JSON object")
    if _depth(found) > _DEEPEST:
        raise ValueError(f"its metadata is nested more than {_DEEPEST} deep")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'"{next(name for name in names if names.count(name) > 1)}" stands twice')
    return found


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return depth


_Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_density(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 1


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_list_of(check: _Check) -> _Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_object_of(check: _Check) -> _Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


# key -> what its value must be, in words, and the check. Other keys are allowed, and so is null where there is none.
_Fields = dict[str, tuple[str, _Check]]
_TEXT, _COUNT, _OBJECT = ("a text", _is_text), ("a whole number, not negative", _is_count), ("an object", _is_object)
_TEXTS, _NUMBER, _DENSITY = (
    ("a list of texts", _is_list_of(_is_text)),
    ("a number", _is_number),
    ("a fraction in (0, 1]", _is_density),
)
_MODEL: _Fields = {"model": _TEXT, "revision": _TEXT, "fingerprint": _TEXT}
_DATA: _Fields = {
    "dataset": _TEXT,
    "exclude": _TEXTS,
    "where": _OBJECT,
    "expert_tokens": ("an object of lists of whole numbers", _is_object_of(_is_list_of(_is_count))),
}
_DESCRIBED: _Fields = {
    "ability": _TEXT,
    "criterion": _TEXT,
    "target": _OBJECT,
    "ability_model": _OBJECT,
    "samples": _COUNT,
    "answer_tokens": _COUNT,
    "dtype": _TEXT,
    "data": _OBJECT,
    "loss": _NUMBER,
}
_SOURCE: _Fields = _DESCRIBED | {
    "density": _DENSITY,
    "exclude": _TEXTS,
    "sha256": _TEXT,
    "retain": _OBJECT,
    "gain": _NUMBER,
}
_RETAIN: _Fields = {
    "ranking": _TEXT,
    "strength": _NUMBER,
    "density": _DENSITY,
    "abilities": ("a list of objects", _is_list_of(_is_object)),
}


def _typed(value: Mapping[str, Any], fields: _Fields, where: str) -> Iterator[str]:
    for key, (expected, check) in fields.items():
        if value.get(key) is not None and not check(value[key]):
            yield f'its {where}"{key}" is not {expected}'


def _described(value: Mapping[str, Any], fields: _Fields, where: str) -> Iterator[str]:
    """What is wrong with what a file says of a profile."""
    found = list(_typed(value, fields, where))
    yield from found
    for key, inner in (("target", _MODEL), ("ability_model", _MODEL), ("data", _DATA), ("retain", _RETAIN)):
        if key in fields and isinstance(value.get(key), dict):
            yield from _typed(value[key], inner, f'{where}"{key}": ')
    retained = (value.get("retain") or {}).get("abilities") if not found else None
    if _is_list_of(_is_object)(retained):
        for one in retained or ():
            yield from _described(one, _DESCRIBED, f'{where}"retain": "abilities": ')


def metadata_problems(metadata: Mapping[str, Any]) -> list[str]:
    """What is wrong with the metadata of a profile or mask by itself; sentences that begin with "its"."""
    if metadata["kind"] == "mask":
        sources = metadata.get("sources", [])
        if not _is_list_of(_is_object)(sources):
            return ['its "sources" are no list of objects']
        fields: _Fields = {"operation": _TEXT, "counts": ("an object of whole numbers", _is_object_of(_is_count))}
        found = [problem for source in sources for problem in _described(source, _SOURCE, '"sources": ')]
        found += _typed(metadata, fields, "")
    elif metadata["kind"] == "inputs":
        fields = {"sources": ("an object of texts", _is_object_of(_is_text)), "target": _OBJECT}
        fields["roles"] = ("an object of objects", _is_object_of(_is_object))
        found = [f'its metadata lacks "{key}"' for key in fields if metadata.get(key) is None]
        found += _typed(metadata, fields, "")
    else:
        required = ("criterion", "ability", "target", "ability_model")
        found = [f'its metadata lacks "{key}"' for key in required if metadata.get(key) is None]
        optional = (*_DESCRIBED, "shared_rows")
        found += [f'its "{key}" is null' for key in optional if key not in required and metadata.get(key, 0) is None]
        fields = _DESCRIBED | {"shared_rows": ("an object of whole numbers", _is_object_of(_is_count))}
        found += _described(metadata, fields, "")
    for key in ("counts", "operation"):
        if key in metadata and metadata[key] is None:
            found.append(f'its "{key}" is null')
    if metadata["format_version"] > 1 and not _is_text(metadata.get("checksum")):
        found.append('its metadata lacks the "checksum" of format version 2 (version 1 has none)')
    return list(dict.fromkeys(found + layout_problems(metadata)))


def layout_problems(metadata: Mapping[str, Any]) -> list[str]:
    """What is wrong with the modules that a file describes: types, names, axes, shapes."""
    modules: Any = metadata.get("modules")
    parameters: Any = metadata.get("parameters")
    tied: Any = metadata.get("tied")
    shapes = metadata.get("shapes")
    if not (_is_list_of(_is_text)(modules) and modules):
        return ['its "modules" are no list of names']
    if len(set(modules)) < len(modules):
        return [f'its "modules" name "{next(one for one in modules if modules.count(one) > 1)}" twice']
    if not _is_object_of(_is_list_of(_is_owned))(parameters):
        return ['its "parameters" are no lists of a parameter\'s name and a channel axis (0, 1 or 2) per module']
    if not _is_list_of(_is_list_of(_is_text))(tied):
        return ['its "tied" are no lists of parameter names']
    if shapes is not None and not _is_object_of(_is_list_of(_is_count))(shapes):
        return ['its "shapes" are no lists of whole numbers per parameter']
    tied_names = [name for group in tied for name in group]
    odd = [name for name in (*modules, *parameters, *(shapes or ()), *tied_names) if not name.isprintable()]
    if odd:
        return [f"its metadata names {odd[0]!r}, which has control characters"]
    found = [f'its "parameters" lack the module "{one}"' for one in modules if not parameters.get(one)]
    found += [f'its "parameters" have "{one}", which is none of its modules' for one in set(parameters) - set(modules)]
    owned = [(name, axis) for pairs in parameters.values() for name, axis in pairs]
    if len(set(owned)) < len(owned):
        name = next(name for name, axis in owned if owned.count((name, axis)) > 1)
        found.append(f'its "parameters" name "{name}" twice on one axis')
    found += [f'its "tied" name "{name}" twice' for name in set(tied_names) if tied_names.count(name) > 1]
    if found or shapes is None:
        return found
    for group in tied:
        if len({tuple(shapes.get(name, ())) for name in group}) > 1 or not all(name in shapes for name in group):
            found.append(f'its "shapes" of {", ".join(group)}, which are one matrix, differ or are missing')
    return found + [problem for module in modules for problem in _shape_problems(module, parameters[module], shapes)]


def _is_owned(pair: Any) -> bool:
    if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
        return False
    return not isinstance(pair[1], bool) and isinstance(pair[1], int) and pair[1] in (0, 1, 2)


def _shape_problems(module: str, owned: list[Any], shapes: Mapping[str, list[int]]) -> Iterator[str]:
    channels: set[tuple[int, ...]] = set()
    of_experts = len(shapes.get(owned[0][0], ())) == 3
    for name, axis in owned:
        shape = shapes.get(name)
        if shape is None:
            yield f'its "shapes" lack the parameter "{name}"'
        elif axis >= len(shape) or 0 in shape or math.prod(shape) > _LARGEST:
            yield f'its "shapes" give "{name}" {shape}, which has no channels along axis {axis}'
        else:
            channels.add((shape[0], shape[axis]) if of_experts else (shape[axis],))
    if len(channels) > 1:
        yield f'its "shapes" give the parameters of "{module}" different numbers of channels'


def profile_problems(
    scores: Mapping[str, Tensor],
    damage: Mapping[str, Tensor],
    layout: Layout,
    criterion: str,
    shared_rows: Mapping[str, int],
) -> list[str]:
    """How a profile's tensors contradict what it says of them."""
    found = [f'module "{module}" has no scores' for module in layout.modules if module not in scores]
    if criterion not in CRITERIA:
        found.append(f'criterion "{criterion}" is none of {", ".join(CRITERIA)}')
    signed = criterion == "attribution"
    if signed:
        found += [f'module "{module}" has no damage' for module in layout.modules if module not in damage]
    elif damage:
        found.append(f"it has damage, which the criterion {criterion} has not")
    for what, tensors in (("scores", scores), ("damage", damage)):
        for module, own in tensors.items():
            found += _tensor_problems(layout, module, own, torch.float32)
            if own.dtype == torch.float32 and not torch.isfinite(own).all():
                found.append(f'module "{module}" has {what} that are NaN or infinite')
            elif own.dtype == torch.float32 and (own < 0).any() and not (signed and what == "scores"):
                found.append(f'module "{module}" has negative {what}')
    for module, rows in shared_rows.items():
        if module not in scores:
            found.append(f'shared_rows name "{module}", which is none of its modules')
        elif not 0 <= rows <= len(scores[module]):
            found.append(f'shared_rows of "{module}" are {rows}; it has {len(scores[module])} channels')
    return found


def inputs_problems(
    tensors: Mapping[str, Tensor], layout: Layout, sources: Mapping[str, str], roles: Mapping[str, Any]
) -> list[str]:
    """How the tensors of a file of inputs contradict what it says of them."""
    unknown = [module for module in sources if module not in layout.parameters]
    found = [f'module "{module}" is not in its list of modules' for module in unknown]
    for module, source in sources.items() if not found else ():
        name, axis = layout.parameters[module][0]
        shape = list((layout.shapes or {}).get(name, ()))
        channels = shape.pop(axis) if axis < len(shape) else 0
        width = shape[-1] if shape else channels
        for role in roles:
            tensor, scale = (tensors.get(f"{role}.{source}{suffix}") for suffix in ("", ".scale"))
            what = f'module "{module}" has inputs to {role}'
            if tensor is None:
                found.append(f'module "{module}" has no inputs to {role}')
            elif tensor.shape[-1:] != (width,):
                found.append(f"{what} of {list(tensor.shape)}, expected a width of {width}")
            elif tensor.ndim == 2 and (scale is None or scale.shape != tensor.shape[:1]):
                found.append(f"{what} without a scale for each")
            elif len(shape) == 2 and f"{role}.{source}.expert" not in tensors:
                found.append(f"{what} of unknown experts")
            elif not (tensor if scale is None else scale).isfinite().all():
                found.append(f"{what} that are NaN or infinite")
    return found


def mask_problems(channels: Mapping[str, Tensor], layout: Layout, counts: Mapping[str, int]) -> list[str]:
    """How a mask's tensors contradict what it says of them."""
    found = [
        problem for module in channels for problem in _tensor_problems(layout, module, channels[module], torch.bool)
    ]
    if found:
        return found
    selected = {module: int(chosen.sum()) for module, chosen in channels.items()}
    true = {"channels": sum(selected.values())}
    if layout.shapes is not None:
        true |= {
            "channels_total": layout.channel_count(),
            "parameters": layout.parameters_owned(selected),
            "parameters_total": layout.parameter_count(),
        }
    found += [
        f'its "counts" say {counts[key]} {key}, its tensors {count}'
        for key, count in true.items()
        if counts.get(key, count) != count
    ]
    taking_part = counts.get("channels_taking_part", true["channels"])
    if not true["channels"] <= taking_part <= counts.get("channels_total", taking_part):
        found.append(f'its "counts" say {taking_part} channels_taking_part, which does not fit the others')
    return found


def _tensor_problems(layout: Layout, module: str, tensor: Tensor, dtype: torch.dtype) -> Iterator[str]:
    if module not in layout.parameters or not layout.parameters[module]:
        yield f'module "{module}" is not in its list of modules'
    elif tensor.dtype != dtype:
        yield f'module "{module}" is {tensor.dtype}, expected {dtype}'
    elif tensor.ndim not in (1, 2):
        yield f'module "{module}" has {tensor.ndim} dimensions, expected [channels] or [experts, channels]'
    elif layout.shapes is not None and tuple(tensor.shape) != layout.channel_shape(module):
        expected = math.prod(layout.channel_shape(module))
        yield f'module "{module}" has {tensor.numel()} channels, its parameters say {expected}'
    elif not tensor.numel():
        yield f'module "{module}" has no channels'
    elif dtype == torch.bool and int(tensor.view(torch.uint8).max()) > 1:
        yield f'module "{module}" has bytes that are neither true nor false'
