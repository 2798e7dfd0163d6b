"""What a forward is run on: values that refuse every question that tracing cannot answer."""

import dis
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute

from .calls import unpack
from .enclosed import inside

_MAY_BE_NONE = {"grad", "grad_fn", "_grad", "_grad_fn", "_base", "_backward_hooks", "_post_accumulate_grad_hooks"}


class Untraceable(BaseException):
    """A graph cannot hold what the forward did. No `Exception`: a forward's own `except` must not swallow it."""


class TracedValue(fx.Proxy):
    """A proxy that refuses every question about its value that tracing cannot answer."""

    tracer: Any
    __call__: Any = None  # as a tensor cannot be called

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # what isinstance() asks once the real type has said no
        return self.tracer.claimed_type(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if not hasattr(Tensor, name):
            self.tracer.give_up(f"asks for attribute {name!r}, which a tensor does not have")
        if name in _MAY_BE_NONE:
            self.tracer.give_up(f"asks for attribute {name!r}, which may be None")
        return _TracedAttribute(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):
            self.tracer.give_up(f"sets attribute {name!r} of a value")
        object.__setattr__(self, name, value)

    def __iter__(self) -> Iterator[Any]:
        self.tracer.check_known_structure(self)
        caller = sys._getframe(1)
        step = next(i for i in dis.get_instructions(caller.f_code) if i.offset == caller.f_lasti)
        if step.opname != "UNPACK_SEQUENCE":
            self.tracer.give_up("iterates over a value")
        parts = self.tracer.call(unpack, self, step.argval)
        return iter([parts[i] for i in range(step.argval)])

    def __getitem__(self, key: Any) -> Any:
        self.tracer.check_known_structure(self)
        return self.tracer.create_proxy("call_function", operator.getitem, (self, key), {})

    @property
    def keys(self) -> Any:
        self.tracer.give_up("asks for keys of a value")

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class _TracedAttribute(TracedValue, Attribute):
    """`value.name`, a node only once it is used other than by being called."""

    __call__ = Attribute.__call__

    def __init__(self, root: TracedValue, attr: str) -> None:
        Attribute.__init__(self, root, attr)


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(self: TracedValue, *_: Any) -> Any:
        self.tracer.give_up(f"asks {name} of a value")

    return refuse


def _in_place(target: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", target, (self, other), {})


for _name in (
    "bool", "len", "int", "float", "complex", "index", "contains", "format", "array", "round", "trunc", "floor",
    "ceil", "enter", "exit", "reversed", "delitem", "dlpack", "hash", "repr", "str", "copy", "deepcopy", "reduce_ex",
):  # fmt: skip
    setattr(TracedValue, f"__{_name}__", _refusing(f"__{_name}__"))

for _name in (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "matmul",
):  # fmt: skip
    setattr(TracedValue, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


def proxies_in(value: Any, seen: frozenset[int] = frozenset()) -> Iterator[fx.Proxy]:
    """The proxies in a value: in containers, and in whatever objects that are no modules refer to."""
    kind = type(value)  # asking isinstance of a proxy makes the tracer give up
    if issubclass(kind, fx.Proxy):
        yield value
    elif id(value) not in seen and not issubclass(kind, nn.Module | Tensor | type):
        for one in inside(value):
            yield from proxies_in(one, seen | {id(value)})


def holds_proxy(value: Any) -> bool:
    """Whether a value is a proxy, or a list, tuple or dict with one inside."""
    kind = type(value)  # asking isinstance of a proxy makes the tracer give up
    if issubclass(kind, tuple | list):
        return any(map(holds_proxy, value))
    if issubclass(kind, dict):
        return any(map(holds_proxy, value.values()))
    return issubclass(kind, fx.Proxy)
