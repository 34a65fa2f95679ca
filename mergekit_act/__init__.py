"""ACT for mergekit: activation-guided, channel-wise transfer of abilities (arXiv 2601.09398).

Importing this package costs nothing: it runs at every start of Python through a ``.pth`` file, so
the public names are looked up when they are first used.
"""

__version__ = "0.1.0"

_HOMES = {
    "evaluate": "api",
    "load_mask": "artifacts",
    "load_profile": "artifacts",
    "make_mask": "selection",
    "merge": "api",
    "profile": "api",
    "save_mask": "artifacts",
    "select_channels": "selection",
    "sweep": "api",
    "transfer": "api",
}

__all__ = [
    "evaluate",
    "load_mask",
    "load_profile",
    "make_mask",
    "merge",
    "profile",
    "save_mask",
    "select_channels",
    "sweep",
    "transfer",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
