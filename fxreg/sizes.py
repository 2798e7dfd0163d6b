"""Sizes while a forward is recorded: numbers that remember how they were computed.

A recorded forward runs on real tensors, whose sizes would be plain numbers and be frozen into the graph. It is given
`torch.SymInt`s instead, whose node this is. Arithmetic stays symbolic; whoever asks for the number itself, or compares
it, gets an answer that holds for the example, and the recorder notes it as assumed.
"""

import math
import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx

_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "mod": operator.mod, "neg": operator.neg,
    "floordiv": operator.floordiv, "int_floordiv": operator.floordiv, "truediv": operator.truediv,
    "int_truediv": operator.truediv, "float_truediv": operator.truediv, "pow": operator.pow,
    "float_pow": operator.pow, "pow_by_natural": operator.pow, "lshift": operator.lshift, "rshift": operator.rshift,
    "eq": operator.eq, "ne": operator.ne, "gt": operator.gt, "lt": operator.lt, "le": operator.le, "ge": operator.ge,
    "sym_min": min, "sym_max": max, "sym_float": float, "sym_not": operator.not_, "sym_and": operator.and_,
    "and_": operator.and_, "or_": operator.or_, "sym_or": operator.or_, "bitwise_and": operator.and_,
    "bitwise_or": operator.or_, "bitwise_xor": operator.xor, "ceil": math.ceil, "floor": math.floor,
    "trunc": math.trunc, "abs": operator.abs, "pos": operator.pos, "round": round, "sym_sqrt": math.sqrt,
    "sym_ite": lambda condition, one, other: one if condition else other,
}  # fmt: skip


class Keeper(Protocol):
    """Who keeps the graph that sizes are part of."""

    def size_node(self, size: "SizeNode") -> fx.Node:
        """The node that computes a size."""

    def assume(self, size: "SizeNode") -> None:
        """Note that a size was asked for its value."""


class SizeNode:
    """What `torch.SymInt`, `SymFloat` and `SymBool` ask: a value, and the operation and operands it came from.

    Attributes:
        value: for the example.
        operation: what computed it; None for a constant.
        operands: other sizes, or a tensor's node and a dimension.
    """

    def __init__(
        self, keeper: Keeper, value: float, operation: Callable[..., Any] | None = None, operands: tuple[Any, ...] = ()
    ) -> None:
        self.keeper, self.value, self.operation, self.operands = keeper, value, operation, operands
        self.node: fx.Node | None = None

    def __getattr__(self, name: str) -> Any:
        if name not in _OPERATIONS:
            raise AttributeError(name)
        operation = _OPERATIONS[name]

        def compute(*others: "SizeNode") -> SizeNode:
            operands = (self, *others)
            result = SizeNode(self.keeper, operation(*(o.value for o in operands)), operation, operands)
            # Torch takes no symbolic truth values, and they are mostly branched on at once.
            return SizeNode(self.keeper, result._ask()) if result.is_bool() else result

        return compute

    def __str__(self) -> str:
        if self.operation is None:
            return str(self.value)
        name = getattr(self.operation, "__name__", "?")
        return f"{name}({', '.join(map(str, self.operands))})"

    # What kind of number it is.

    def is_bool(self) -> bool:
        return isinstance(self.value, bool)

    def is_int(self) -> bool:
        return isinstance(self.value, int) and not self.is_bool()

    def is_float(self) -> bool:
        return isinstance(self.value, float)

    def is_constant(self) -> bool:
        return self.operation is None

    def is_nested_int(self) -> bool:
        return False

    def is_symbolic(self) -> bool:
        return self.operation is not None

    def has_hint(self) -> bool:
        return True

    @property
    def hint(self) -> float:
        return self.value

    def _constant(self, value: float) -> "SizeNode":
        return SizeNode(self.keeper, value)

    wrap_int = wrap_float = wrap_bool = _constant

    def maybe_as_int(self) -> int | None:
        return int(self.value) if self.operation is None else None

    # What its value is.

    def _ask(self, *_: Any) -> Any:
        if self.operation is not None:
            self.keeper.assume(self)
        return self.value

    int_ = bool_ = guard_int = guard_float = guard_bool = expect_true = _ask
    guard_size_oblivious = guard_or_false = guard_or_true = evaluate = _ask

    def statically_known_true(self, *_: Any) -> bool:
        return self.operation is None and bool(self.value)

    def str(self) -> str:
        return repr(self._ask())

    _graph_repr = str


class _Veil:
    """A stand-in for an object that nobody may look into while a forward is recorded: it can only be passed on."""

    def __init__(self, value: Any, refuse: Callable[[str], None]) -> None:
        object.__setattr__(self, "_veiled", (value, refuse))

    def __getattribute__(self, name: str) -> Any:
        value, refuse = object.__getattribute__(self, "_veiled")
        if name != "__class__":
            refuse(f"looks into a {type(value).__name__}")
        return getattr(value, name)

    def __setattr__(self, name: str, new: Any) -> None:
        value, refuse = object.__getattribute__(self, "_veiled")
        refuse(f"changes a {type(value).__name__}")
        setattr(value, name, new)


def _looking(name: str) -> Callable[..., Any]:
    return lambda veil, *args: _Veil.__getattribute__(veil, name).__call__(*args)


for _name in ("len", "getitem", "setitem", "delitem", "iter", "next", "contains", "bool", "eq", "call", "hash", "repr"):
    setattr(_Veil, f"__{_name}__", _looking(f"__{_name}__"))


def veiled(value: Any, refuse: Callable[[str], None]) -> Any:
    """An object that can only be passed on; whatever else is done with it is refused first, and then done."""
    return _Veil(value, refuse)


SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def symbolic(size: SizeNode) -> Any:
    """The number that a forward is given."""
    kind = torch.SymBool if size.is_bool() else torch.SymInt if size.is_int() else torch.SymFloat
    return kind(size)


def concrete(value: Any) -> Any:
    """The same arguments with plain numbers for symbolic ones, and unveiled."""
    kind = type(value)
    if kind in SYMBOLIC:
        return value.node.value
    if kind is _Veil:
        return object.__getattribute__(value, "_veiled")[0]
    if kind is torch.Size:
        return torch.Size([concrete(one) for one in value])
    if kind in (tuple, list):
        return kind([concrete(one) for one in value])
    if kind is slice:
        return slice(concrete(value.start), concrete(value.stop), concrete(value.step))
    if kind is dict:
        return {key: concrete(one) for key, one in value.items()}
    return value
