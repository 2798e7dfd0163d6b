"""A short name for what a formula means, so that two formulas share it only if they cannot be told apart.

A function means its bytecode, its defaults, what it closes over, and the values of the global variables that its code
reads: functions likewise, and everything else by content. What torch, Python and installed packages define means its
qualified name; what fxreg defines also means the code of the modules that run inside operators.
"""

import builtins
import copyreg
import dis
import functools
import hashlib
import importlib
import importlib.util
import os
import sys
import types
from collections import deque
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef  # private: what torch.library.custom_op returns

from .enclosed import defaults, entries
from .naming import Names, names_in_code
from .packages import edition

NUMERICS = (
    "activations", "anchors", "arguments", "constraints", "defining", "effects", "formulas", "functions", "gradients",
    "groups", "hashing", "joining", "kernels", "matrices", "nonconvex", "norms", "operators", "regularizers",
)  # fmt: skip
"""The modules of fxreg's that run inside an operator, and those of the formulas."""

_PLAIN = (bool, int, float, complex, str, bytes, types.NoneType, types.EllipsisType)
_NO_CONTENT = {"_abc_impl", "__dict__", "__weakref__"}
_PROCESS = os.urandom(8).hex()
_kept: dict[int, object] = {}


class Fingerprint(str):
    """A short hash of what some values mean, and of fxreg's own numerics: an identifier. It keeps the values, which may
    come to mean something else."""

    __slots__ = ("meaning",)
    meaning: tuple[object, ...]

    def __new__(cls, *meaning: object) -> "Fingerprint":
        found = _Meaning()
        found.say(_numerics())
        found.all_of(meaning)
        result = super().__new__(cls, "x" + found.finished()[:8])
        result.meaning = meaning
        return result

    def now(self) -> "Fingerprint":
        """That of the same values as they are now."""
        return Fingerprint(*self.meaning)


@functools.cache
def _numerics() -> str:
    """A hash of the code that runs around formulas, and of fxreg's own formulas."""
    digest = hashlib.sha256()
    for name in NUMERICS:
        spec = importlib.util.find_spec(f"{__package__}.{name}")
        loader: Any = None if spec is None else spec.loader  # code, not source: an archive or a bundle may have none
        digest.update(_text(loader.get_code(f"{__package__}.{name}")).encode())
    return digest.hexdigest()


class _Meaning:
    """Writes what values mean into a digest, the same in every process. Where one is met its number is written, and
    what it means once, later: in a queue, as functions may call each other, and as deep as they like."""

    def __init__(self, met: "dict[int, tuple[int, object]] | None" = None) -> None:
        self.digest = hashlib.sha256()
        self.met = {} if met is None else met
        self.waiting = deque[object]()

    def finished(self) -> str:
        while self.waiting:
            self._explain(self.waiting.popleft())
        return self.digest.hexdigest()

    def say(self, *words: object) -> None:
        self.digest.update(repr(words).encode(errors="backslashreplace"))

    def all_of(self, values: Any) -> None:
        values = [*values]
        self.say(len(values))
        for value in values:
            self.add(value)

    def add(self, value: Any) -> None:
        if type(value) in _PLAIN:
            self.say(type(value).__name__, value)
        elif type(value) is tuple:
            self.say("tuple")
            self.all_of(value)
        elif isinstance(value, types.CodeType):
            self.say(_code(value))
        elif isinstance(value, types.ModuleType):
            self.say("module", value.__name__, edition(value.__name__))
        else:
            if id(value) not in self.met:
                self.met[id(value)] = len(self.met), value  # kept alive, so that no other gets its id
                self.waiting.append(value)
            self.say("number", self.met[id(value)][0])

    def _explain(self, value: Any) -> None:
        match value:
            case types.FunctionType():
                self._function(value)
            case type():
                self._class(value)
            case types.MethodType() | types.BuiltinMethodType():
                self.say("method", value.__module__, getattr(value, "__qualname__", None), edition(value.__module__))
                self.all_of([getattr(value, "__func__", None), value.__self__])
            case staticmethod() | classmethod():
                self.say(type(value).__name__)
                self.add(value.__func__)
            case property():
                self.say("property")
                self.all_of([value.fget, value.fset, value.fdel])
            case types.MappingProxyType():
                self.add(dict(value))
            case list() | set() | frozenset() | dict():
                self._container(value)
            case Tensor():
                self._tensor(value)
            case torch._ops.OperatorBase() | torch._ops.OpOverloadPacket():
                self.say("operator", str(value))
            case CustomOpDef():
                self.say("operator", value._qualname)
                self.all_of([value._init_fn, value._backward_fn, value._setup_context_fn])
            case torch.jit.ScriptFunction():
                self.say("script", str(value.inlined_graph))
            case _:
                self._object(value)

    def _container(self, value: Any) -> None:
        """What is in it, however its class would give it out; and whatever a class of somebody's adds."""
        self.all_of([type(value), getattr(value, "__dict__", None), getattr(value, "default_factory", None)])
        if isinstance(value, dict):
            self.all_of(item for pair in entries(value).items() for item in pair)
        elif isinstance(value, list):
            self.all_of(list.__iter__(value))
        else:
            kind: Any = set if isinstance(value, set) else frozenset
            self.say(sorted(map(self._apart, kind.__iter__(value))))

    def _apart(self, value: object) -> str:
        """What one of several values means that have no order."""
        one = _Meaning(dict(self.met))
        one.add(value)
        return one.finished()

    def _function(self, function: types.FunctionType) -> None:
        names = names_in_code(function.__code__)
        self.say("function", _code(function.__code__))
        self.all_of(defaults(function))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._variable(name, cell.cell_contents if _is_filled(cell) else _Unbound, names)
        for name, value in vars(function).items():
            if name == "__wrapped__" or not name.startswith("_"):
                self._variable(name, value, names)
        space = function.__globals__
        if (known := edition(space.get("__name__"))) is not None:
            self.say(known, space["__name__"], function.__qualname__)
            return
        for name in names.read:
            self._variable(name, space.get(name, getattr(builtins, name, _Unbound)), names)
        for name, level in names.imported:
            self._variable(name, _module(name, level, space), names)

    def _variable(self, name: str, value: Any, names: Names) -> None:
        """What a variable means to code that uses these names."""
        self.say(name)
        if name in names.rebound or (name in names.filled and isinstance(value, Collection)):
            return  # a counter, or a cache: what the code itself made of it
        self.add(value)
        if isinstance(value, types.ModuleType):
            self._module(value, names, set())

    def _module(self, module: types.ModuleType, names: Names, passed: set[str]) -> None:
        """Those attributes of a module that code names."""
        if edition(module.__name__) is not None or module.__name__ in passed:
            return
        passed.add(module.__name__)
        for name in names.attributes:
            if name in vars(module):
                value = vars(module)[name]
                self.say(name)
                self.add(value)
                if isinstance(value, types.ModuleType):
                    self._module(value, names, passed)

    def _class(self, kind: type) -> None:
        known = edition(kind.__module__)
        self.say("class", kind.__module__, kind.__qualname__, known)
        if known is not None:
            return
        self.all_of(kind.__bases__)
        for name, value in vars(kind).items():
            is_own = not (name.startswith("__") and name.endswith("__")) or isinstance(value, _CALLED)
            if is_own and name not in _NO_CONTENT:
                self.say(name)
                self.add(value)

    def _tensor(self, tensor: Tensor) -> None:
        self.say(tensor.dtype, tuple(tensor.shape), tensor.device.type)
        self.add(type(tensor))
        if tensor.device.type == "meta":
            return
        try:
            whole = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
            self.digest.update(whole.flatten().view(torch.uint8).numpy().data)
        except Exception:  # sparse, quantized, a subclass of anybody's
            self._by_identity(tensor)

    def _object(self, value: Any) -> None:
        """An object by what a pickle would hold of it; or of what it wraps."""
        self.add(type(value))
        if "__wrapped__" in getattr(value, "__dict__", ()):
            self.add(value.__wrapped__)
            return
        try:
            reduce = copyreg.dispatch_table.get(type(value))
            parts = value.__reduce_ex__(2) if reduce is None else reduce(value)
            parts = [parts] if isinstance(parts, str) else [*map(_listed, parts)]
        except Exception:
            self._by_identity(value)
        else:
            self.all_of(parts)

    def _by_identity(self, value: object) -> None:
        """Like nothing else, in this process or in any other."""
        _kept[id(value)] = value
        self.say(_PROCESS, id(value))


class _Unbound:
    """What a variable means that has no value yet."""


_CALLED = (types.FunctionType, staticmethod, classmethod, property)


def _listed(part: object) -> object:
    return [*part] if isinstance(part, Iterator) else part


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _module(name: str, level: int, space: dict[str, Any]) -> Any:
    """What `import` would give to code with these global variables."""
    try:
        full = importlib.util.resolve_name("." * level + name, space.get("__package__"))
        return sys.modules.get(full) or (full if edition(full) == "" else importlib.import_module(full))
    except ImportError:
        return _Unbound


@functools.lru_cache(maxsize=4096)
def _code(code: types.CodeType) -> str:
    return hashlib.sha256(_text(code).encode(errors="backslashreplace")).hexdigest()


def _text(constant: Any) -> str:
    """What code does, and what it does it with: not where it stands, nor its docstring."""
    if isinstance(constant, frozenset):
        return f"frozenset{sorted(map(_text, constant))}"
    if isinstance(constant, tuple):
        return f"({','.join(map(_text, constant))})"
    if not isinstance(constant, types.CodeType):
        return repr(constant)
    first, *rest = constant.co_consts or (None,)
    if isinstance(first, str) and not _loads_the_first(constant.co_code):
        first = None
    names = (constant.co_names, constant.co_varnames, constant.co_freevars, constant.co_cellvars)
    counts = (constant.co_argcount, constant.co_posonlyargcount, constant.co_kwonlyargcount, constant.co_flags)
    return f"{constant.co_code!r}{constant.co_exceptiontable!r}{names}{counts}{_text((first, *rest))}"


def _loads_the_first(code: bytes) -> bool:
    """Whether code uses its first constant, which may be there only as its docstring."""
    return any(code[at] in dis.hasconst and code[at + 1] == 0 for at in range(0, len(code), 2))
