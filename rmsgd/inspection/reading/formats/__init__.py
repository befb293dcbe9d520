"""The file formats that are known, one module each. Every module of this folder is found automatically."""

import importlib
import pkgutil

from rmsgd.inspection.reading.file_format import FileFormat


def _found() -> tuple[FileFormat, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(format_ for module in modules for format_ in module.FORMATS)


FORMATS = _found()
"""The formats of all modules, each from a list ``FORMATS``."""
