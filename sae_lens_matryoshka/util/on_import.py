"""Acting when a module gets imported, without importing it."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call `action` now if the module `name` is imported already, else as soon as it is.

    An exception of `action` propagates from here, but only warns when the module is imported later.
    """
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(MetaPathFinder):
    """Lets the other finders find the module, and acts after its code has run."""

    def __init__(self, name: str, action: Callable[[], None]):
        self._name: str | None = name  # None: nothing more to do
        self._action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        self._name = None  # so that only the other finders answer
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._name = fullname
        if spec is None or not hasattr(spec.loader, "exec_module"):
            return spec
        loader, run_code = spec.loader, spec.loader.exec_module

        def run_code_and_act(module: ModuleType) -> None:
            del loader.exec_module  # the class's own is back
            run_code(module)
            # The finder stays in `sys.meta_path`: other threads may be iterating over it.
            self._name = None
            try:
                self._action()
            except Exception as error:
                warnings.warn(f"After the import of {fullname}: {error}", stacklevel=2)

        loader.exec_module = run_code_and_act
        return spec
