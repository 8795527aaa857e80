"""Packages that read a module only when one of its names is asked for: `fpn --help` need not wait for PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


def lazy(package: str, places: Mapping[str, str]) -> None:
    """Give a package the names in `places`, each with the module that holds it, as in {"load": "fpn.data.load"}.

    Where a module is itself called `package.name` and holds nothing of that name, the name stands for the module.
    """

    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name not in places:
                raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=self)
            setattr(self, name, import_module(places[name]))
            return self.__dict__[name]

        def __setattr__(self, name: str, value: Any) -> None:
            # Python too hangs each module that it has read on its package, where `fpn.build` is to be the function.
            if name in places and isinstance(value, ModuleType):
                value = getattr(value, name, value)
            super().__setattr__(name, value)

        def __reduce__(self) -> tuple[Any, ...]:
            return import_module, (self.__name__,)  # as cloudpickle does with modules of the usual class

        def __dir__(self) -> list[str]:
            return sorted({*super().__dir__(), *places})

    sys.modules[package].__class__ = Lazy
