"""The startup hook that lets plain ``mergekit-yaml`` know our merge methods.

mergekit 0.1.5 has no plugin discovery. The wheel ships ``mergekit_act.pth``, which imports this module when
Python starts. All that happens then is that a finder is put in front of ``sys.meta_path``. It waits for the
mergekit modules named below and completes each right after its own code has run, once. Everything heavy is
imported by then, because mergekit itself has imported it.

``MERGEKIT_ACT_AUTOLOAD=0`` turns the hook off. No failure in here reaches the process: each becomes one warning.
"""

import os
import sys

_SWITCH = "MERGEKIT_ACT_AUTOLOAD"

# mergekit module -> our module, and the function in it that completes mergekit's. The methods register themselves when
# theirs is imported, which may be what imports mergekit in the first place.
_COMPLETIONS = {
    "mergekit.merge_methods": ("mergekit_act.merging", None),
    "mergekit.merge": ("mergekit_act.checking", "wrap_merge"),
    "mergekit.plan": ("mergekit_act.checking", "wrap_planner"),
    "mergekit.scripts.multimerge": ("mergekit_act.checking", "wrap_multimerge"),
    "mergekit.scripts.merge_raw_pytorch": ("mergekit_act.checking", "wrap_flat_planner"),
}


def install() -> None:
    """Complete mergekit's modules when they are imported, or at once if they already are."""
    if not any(type(finder) is _Finder for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in _COMPLETIONS:
        module = sys.modules.get(name)
        # One that is still being imported, as when it is what brings us here, is completed by the finder.
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _complete(name)


class _Finder:
    """Finds nothing itself: it lets the other finders look and hooks the module they found."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name not in _COMPLETIONS:
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if finder is not self else None
            if spec is not None:
                _run_afterwards(spec.loader, name)  # type: ignore[no-untyped-call]
                return spec
        return None


def _run_afterwards(loader, name):  # type: ignore[no-untyped-def]
    run_module = loader.exec_module

    def exec_module(module):  # type: ignore[no-untyped-def]
        run_module(module)
        _complete(name)

    loader.exec_module = exec_module


def _complete(name: str) -> None:
    home, function = _COMPLETIONS[name]
    try:
        import importlib

        module = importlib.import_module(home)
        if function is not None:
            getattr(module, function)()
    except Exception as error:
        _warn(f"mergekit-act could not complete {name}: {error!r}")
        if function is not None and "mergekit_act.merging" in sys.modules:
            # Without the planners' checks the methods must not run.
            sys.modules["mergekit_act.merging"].refuse_to_run(f"{name} could not be completed ({error!r})")


def _warn(message: str) -> None:
    import warnings

    message = f"{message} ({_SWITCH}=0 turns this off)"
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # python -W error
        print(message, file=sys.stderr)


if os.environ.get(_SWITCH) != "0":
    try:
        install()
    except Exception as error:
        _warn(f"mergekit-act could not install its import hook: {error!r}")
