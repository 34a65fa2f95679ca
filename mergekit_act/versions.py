"""The versions that results depend on."""

from __future__ import annotations

from importlib.metadata import version

from mergekit_act import __version__

__all__ = ["installed_versions"]


def installed_versions(*packages: str) -> dict[str, str]:
    """The versions of mergekit-act and of these packages.

    >>> sorted(installed_versions("torch"))
    ['mergekit-act', 'torch']
    """
    return {"mergekit-act": __version__} | {name: version(name) for name in packages}
