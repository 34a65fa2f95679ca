"""The startup hook that lets plain ``mergekit-yaml`` know our merge methods.

mergekit 0.1.5 has no plugin discovery. The wheel ships ``mergekit_act.pth``, which imports this module when
Python starts. All that happens then is that a finder is put in front of ``sys.meta_path``. It waits for the
mergekit modules named below and completes each right after its own code has run, once. Everything heavy is
imported by then, because mergekit itself has imported it.

``MERGEKIT_ACT_AUTOLOAD=0`` turns the hook off. No failure in here reaches the process, whatever other finders and
loaders are there: each becomes one warning, and our methods refuse to run.
"""

import os
import sys

_SWITCH = "MERGEKIT_ACT_AUTOLOAD"

# mergekit module -> our module, and the function in it that completes mergekit's. The methods register themselves when
# theirs is imported, which may be what imports mergekit in the first place.
COMPLETIONS = {
    "mergekit.merge_methods": ("mergekit_act.merging", None),
    "mergekit.merge": ("mergekit_act.checking", "guard_merge"),
    "mergekit.plan": ("mergekit_act.checking", "guard_planner"),
    "mergekit.scripts.multimerge": ("mergekit_act.checking", "guard_multimerge"),
    "mergekit.scripts.merge_raw_pytorch": ("mergekit_act.checking", "guard_flat_planner"),
}
failed: dict[str, str] = {}  # module that could not be completed -> why


def install() -> None:
    """Complete mergekit's modules when they are imported, or at once if they already are."""
    if not any(type(finder) is _Finder for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in COMPLETIONS:
        module = sys.modules.get(name)
        # One that is still being imported, as when it is what brings us here, is completed by the finder.
        if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
            _complete(name)
    _refuse()


class _Finder:
    """Finds nothing itself: it lets the other finders look and hooks the module they found."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name not in COMPLETIONS:
            return None
        try:
            for finder in list(sys.meta_path):
                find_spec = None if finder is self else getattr(finder, "find_spec", None)
                spec = None if find_spec is None else find_spec(name, path, target)
                if spec is not None:
                    return _run_afterwards(spec, name)  # type: ignore[no-untyped-call]
        except Exception as error:  # Python asks the other finders itself then, and tells what it thinks of them
            _fail(name, error)
        return None


class _Loader:
    """A module's own loader, which completes the module as soon as it is loaded and is in its place again then."""

    def __init__(self, own, spec, name):  # type: ignore[no-untyped-def]
        self._own, self._spec, self._name = own, spec, name

    def __getattr__(self, attribute):  # type: ignore[no-untyped-def]
        return getattr(self._own, attribute)

    def create_module(self, spec):  # type: ignore[no-untyped-def]
        create = getattr(self._own, "create_module", None)
        return None if create is None else create(spec)

    def exec_module(self, module):  # type: ignore[no-untyped-def]
        self._spec.loader = self._own
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._own
        if hasattr(self._own, "exec_module"):
            self._own.exec_module(module)
        else:  # a loader of old
            self._own.load_module(self._name)
        _complete(self._name)


def _run_afterwards(spec, name):  # type: ignore[no-untyped-def]
    own = spec.loader
    if own is not None:  # None: a folder without a module of its own
        spec.loader = _Loader(own, spec, name)  # type: ignore[no-untyped-call]
    return spec


def _complete(name: str) -> None:
    home, function = COMPLETIONS[name]
    try:
        import importlib

        module = importlib.import_module(home)
        if function is not None:
            getattr(module, function)()
        failed.pop(name, None)
    except Exception as error:
        _fail(name, error)


def _fail(name: str, error: Exception) -> None:
    failed[name] = f"{name} could not be completed ({error!r})"
    _warn(f"mergekit-act could not complete {name}: {error!r}")
    _refuse()


def _refuse() -> None:
    """Without the planners' checks the methods must not run."""
    methods = sys.modules.get("mergekit_act.merging")
    for name, why in failed.items():
        if COMPLETIONS[name][1] is not None and hasattr(methods, "refuse_to_run"):
            methods.refuse_to_run(why)  # type: ignore[union-attr]


def _warn(message: str) -> None:
    message = f"{message} ({_SWITCH}=0 turns this off)"
    try:
        import warnings

        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except Exception:  # python -W error, or a hook for warnings that fails
        try:
            print(message, file=sys.stderr or sys.__stderr__)
        except Exception:
            return  # nobody can be told


if os.environ.get(_SWITCH) != "0":
    try:
        install()
    except Exception as error:
        _warn(f"mergekit-act could not install its import hook: {error!r}")
