"""ACT for mergekit: activation-guided, channel-wise transfer of abilities (arXiv 2601.09398).

Importing this package costs nothing: it runs at every start of Python through a ``.pth`` file, so
the public names are looked up when they are first used.
"""

__version__ = "0.1.0"

_HOMES = {
    "Mask": "artifacts",
    "Profile": "artifacts",
    "load_mask": "artifacts",
    "load_profile": "artifacts",
    "save_mask": "artifacts",
    "save_profile": "artifacts",
    "open_pair": "profiling",
    "make_mask": "selection",
    "select_channels": "selection",
    "profile_pair": "profiling",
}

__all__ = [
    "Mask",
    "Profile",
    "load_mask",
    "load_profile",
    "make_mask",
    "open_pair",
    "profile_pair",
    "save_mask",
    "save_profile",
    "select_channels",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
