"""The file formats that are known, one module each. A module of this folder is found by being there."""

import importlib
import pkgutil

from rmsgd.inspection.reading.file_format import FileFormat


def _found() -> tuple[FileFormat, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(format_ for module in modules for format_ in module.FORMATS)


FORMATS = _found()
"""What the modules list as their ``FORMATS``."""
