"""What code asks of the process around it: clocks, files, switches. The answer may be another one at the next call."""

import builtins
import types
from typing import Any

from .enclosed import names_in_code
from .packages import is_installed

_MOMENTS = {"time", "datetime", "uuid", "secrets"}
"""Modules that say something else each time, whoever asks."""
_PROCESS = {
    "ctypes", "decimal", "gc", "getpass", "glob", "inspect", "io", "locale", "logging", "mmap", "multiprocessing", "os",
    "pathlib", "platform", "posix", "resource", "select", "shutil", "signal", "socket", "subprocess", "sys", "tempfile",
    "thread", "threading", "traceback", "tracemalloc", "urllib", "warnings",
}  # fmt: skip
_SWITCHES = ("torch.backends", "torch.distributed", "torch._C", "torch._dynamo", "torch.__future__", "torch.utils.data")
_NAMES = {"backends", "__future__", "_C", "_dynamo"}
"""Attributes of torch behind which its switches are."""
_FUNCTIONS = {
    "SystemRandom",
    "default_rng",
    "get_autocast_cpu_dtype",
    "get_autocast_gpu_dtype",
    "get_default_device",
    "get_deterministic_debug_mode",
    "get_num_interop_threads",
    "get_printoptions",
    "get_worker_info",
    "geterr",
    "initial_seed",
    "is_anomaly_check_nan_enabled",
    "is_anomaly_enabled",
    "is_autocast_cache_enabled",
    "is_autocast_cpu_enabled",
    "is_deterministic_algorithms_warn_only_enabled",
    "is_warn_always_enabled",
}


def ambient(code: types.CodeType, space: dict[str, Any]) -> str | None:
    """What code that runs with these global variables asks of the process, if anything.

    A package's own switches are constant, like all that it keeps; what time it is, not even for a package.
    """
    names = names_in_code(code)
    packaged = is_installed(space.get("__name__"))
    for name in names.read:
        value = space.get(name, vars(builtins).get(name))
        if (home := _home(value)) in _MOMENTS or (not packaged and (home in _PROCESS or _is_switch(value))):
            return f"asks {name} of the process"
    for name, dots in names.imported:
        home = "" if dots else name.partition(".")[0]
        if home in _MOMENTS or (not packaged and home in _PROCESS):
            return f"asks {name} of the process"
    if packaged:
        return None
    return next(
        (f"asks {name} of the process" for name in names.attributes if name in _FUNCTIONS or name in _NAMES), None
    )


def _home(value: Any) -> str:
    """The top module that something is from, under the name that users know."""
    return _module(value).partition(".")[0].removeprefix("_")


def _module(value: Any) -> str:
    if isinstance(value, types.ModuleType):
        return value.__name__
    named = isinstance(value, type | types.FunctionType | types.BuiltinFunctionType)
    return getattr(value if named else type(value), "__module__", None) or ""


def _is_switch(value: Any) -> bool:
    """Whether something is a module of torch's that has its switches, or a function of one, or one of the functions."""
    if isinstance(value, types.ModuleType):
        return value.__name__.startswith(_SWITCHES)
    if not isinstance(value, types.FunctionType | types.BuiltinFunctionType):
        return False
    return value.__name__ in _FUNCTIONS or _module(value).startswith(_SWITCHES)
