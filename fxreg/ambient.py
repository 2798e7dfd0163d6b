"""What code asks of the process around it: clocks, files, switches. The answer may be another one at the next call.

Whoever names such a thing asks. Python functions are also heard when they are called, wherever the caller has them from
(an attribute, a closure, a container). Of C functions only a recording hears, so that a trace looks at what there is to
call.
"""

import builtins
import types
from collections.abc import Iterable
from typing import Any

from torch import nn

from .enclosed import dictionary_of
from .naming import names_in_code
from .packages import is_foreign, is_installed

_MOMENTS = {"time", "datetime", "uuid", "secrets"}
"""Modules that say something else each time, whoever asks."""
_PROCESS = {
    "ctypes", "decimal", "gc", "getpass", "glob", "inspect", "io", "locale", "logging", "mmap", "multiprocessing", "os",
    "pathlib", "platform", "posix", "resource", "select", "shutil", "signal", "socket", "subprocess", "sys", "tempfile",
    "thread", "threading", "traceback", "tracemalloc", "urllib", "warnings",
}  # fmt: skip
_SWITCHES = ("torch.backends", "torch.distributed", "torch._dynamo", "torch.__future__", "torch.utils.data")
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
    names, asker = names_in_code(code), space.get("__name__")
    read = {name: space.get(name, vars(builtins).get(name)) for name in names.read}
    for name, value in read.items():
        if is_answer(value, asker):
            return f"asks {name} of the process"
    packaged = is_installed(asker)
    for name, dots in names.imported:
        home = "" if dots else _top(name)
        if home in _MOMENTS or (not packaged and home in _PROCESS):
            return f"asks {name} of the process"
    if packaged:
        return None
    if kept := kept_answer(read.values(), asker):
        return kept
    return next(
        (f"asks {name} of the process" for name in names.attributes if name in _FUNCTIONS or name in _NAMES), None
    )


def asked(frame: types.FrameType) -> str | None:
    """What the user's code asks of the process by the call that begins with a frame, if anything."""
    if not answers(frame) or frame.f_back is None:
        return None
    asker, home = frame.f_back.f_globals.get("__name__"), _top(frame.f_globals.get("__name__"))
    if is_foreign(asker) or (home not in _MOMENTS and is_installed(asker)):
        return None
    return f"asks {frame.f_code.co_qualname} of the process"


def answers(frame: types.FrameType) -> bool:
    """Whether the function that runs in a frame says something of the process."""
    module = frame.f_globals.get("__name__") or ""
    home = _top(module)
    if home == "torch":
        return module.startswith("torch.backends") or frame.f_code.co_name in _FUNCTIONS
    return home in _MOMENTS or home in _PROCESS


def kept_answer(values: Iterable[Any], keeper: str | None) -> str | None:
    """What code of a module could ask of the process with C functions among some values, or what these hold."""
    for value in values:
        for one in (value.__func__ if isinstance(value, staticmethod) else value, *_held(value)):
            if isinstance(one, types.BuiltinFunctionType) and is_answer(one, keeper):
                return f"may ask {one.__name__} of the process"
    return None


def is_answer(value: Any, asker: str | None) -> bool:
    """Whether something of a library's says something of the process that is not constant for who asks."""
    home = _top(_module(value))
    return home in _MOMENTS or ((home in _PROCESS or _is_switch(value)) and not is_installed(asker))


def _held(value: Any) -> Iterable[Any]:
    if type(value) in (list, tuple, set):
        return value  # type: ignore[no-any-return]
    if isinstance(value, nn.Module | type | types.ModuleType | types.FunctionType):
        return ()
    return [*(value if type(value) is dict else dictionary_of(value)).values()]


def _top(module: str | None) -> str:
    """The top module, under the name that users know."""
    return (module or "").partition(".")[0].removeprefix("_")


def _module(value: Any) -> str:
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, types.BuiltinFunctionType) and not value.__module__:  # a method, of a class perhaps
        value = value.__self__
    named = isinstance(value, type | types.FunctionType | types.BuiltinFunctionType)
    return getattr(value if named else type(value), "__module__", None) or ""


def _is_switch(value: Any) -> bool:
    """Whether something is a module of torch's that has its switches, or a function of one, or one of the functions."""
    if not isinstance(value, types.ModuleType | types.FunctionType | types.BuiltinFunctionType):
        return False
    module = _module(value)  # of `torch._C`, none of what is inside: `torch._C._nn` has gelu
    return module == "torch._C" or module.startswith(_SWITCHES) or value.__name__ in _FUNCTIONS
