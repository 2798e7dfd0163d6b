"""Whose a module is: the user's own, an installed package's, or a library's whose names say what they mean."""

import functools
import hashlib
import os
import sys
from importlib import metadata

_LIBRARIES = (
    "fxreg",
    "torch",
    "numpy",
    "builtins",
    "math",
    "functools",
    "itertools",
    "operator",
    "collections",
    "typing",
)
_STANDARD = os.path.dirname(os.__file__)


def is_library(module: str | None) -> bool:
    """Whether a module's name is that of a well-known library's."""
    return (module or "").partition(".")[0] in _LIBRARIES


@functools.lru_cache(maxsize=4096)
def is_foreign(module: str | None) -> bool:
    """Whether a module's name is that of a well-known library's, or of one of Python's own."""
    return is_library(module) or (module or "").partition(".")[0] in sys.stdlib_module_names


def is_installed(module: str | None) -> bool:
    """Whether a module is somebody's package, and not of the user's own program."""
    path = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return "site-packages" in path or "dist-packages" in path


def is_own(module: str | None) -> bool:
    """Whether a module is of the user's own program."""
    return not is_foreign(module) and not is_installed(module)


def edition(module: str | None) -> str | None:
    """What tells the contents of a module from those of another under its name; nothing of the user's own does.

    Of torch and of Python it is nothing: whoever keeps compiled code asks for their versions.
    """
    top = (module or "").partition(".")[0]
    if top in ("torch", __name__.partition(".")[0]):
        return ""
    path = getattr(sys.modules.get(top), "__file__", None)
    if top in sys.stdlib_module_names and (path is None or path.startswith(_STANDARD)):
        return ""
    return _record(top) if is_installed(top) else None


@functools.cache
def _record(package: str) -> str | None:
    """A hash of what was installed with a package: its record has every file, with the file's hash."""
    try:
        names = metadata.packages_distributions().get(package, [])
        found = [metadata.distribution(name) for name in sorted({*names})]
    except metadata.PackageNotFoundError:
        return None
    records = [f"{one.version} {one.read_text('RECORD')}" for one in found]
    return hashlib.sha256("\n".join(records).encode()).hexdigest() if records else None
