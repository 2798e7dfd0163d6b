"""Remembering the Python state around a model's modules, to notice and undo what running a forward did to it."""

import collections
import functools
import operator
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from .enclosed import enclosed
from .scanning import mentioned_names

_INERT = (
    bool, int, float, complex, str, bytes, types.NoneType, type, types.ModuleType, types.BuiltinFunctionType,
    torch.dtype, torch.device, torch.Size, fx.Graph,
)  # fmt: skip
_CONTAINERS = (dict, list, set, collections.deque)
_EMPTY: dict[Any, Any] = {}  # every module has a dozen of them
_LEAVES = frozenset(_INERT)
_TENSORS = frozenset({Tensor, nn.Parameter})

_Trail: TypeAlias = tuple[Any, ...]
"""How a value was reached: the trail of what holds it, and its key there; a name is made of it only when needed."""


class Snapshot:
    """Every list, dict, set, deque, array, random generator and plain object reachable from the modules' attributes.

    Tensors' values are remembered only on request: a tracer runs nothing that changes them.
    """

    def __init__(self, modules: Iterable[nn.Module], with_values: bool = False, also: Iterable[Any] = ()) -> None:
        self._held: dict[int, tuple[_Trail, Any, Any]] = {}
        self._names: list[dict[str, Any]] = []
        self._passed = _LEAVES if with_values else _LEAVES | _TENSORS
        waiting: list[tuple[_Trail, Any]] = [((), value) for value in also]
        for module in modules:
            waiting += self._hold((type(module).__name__,), vars(module))
            self._names += (vars(module), module._modules, module._parameters, module._buffers)
        seen: set[int] = set()
        while waiting:
            trail, value = waiting.pop()
            if id(value) in seen or isinstance(value, (*_INERT, nn.Module)):
                continue
            seen.add(id(value))
            if isinstance(value, Tensor) and not (with_values and _can_be_compared(value)):
                continue
            waiting += self._hold(trail, value)

    def _hold(self, trail: "_Trail", value: Any) -> list[tuple["_Trail", Any]]:
        """Remember a value's own state, if it has one, and return what it refers to."""
        before = _state(value)
        if before is not None:
            self._held[id(value)] = (trail, value, before)
        if isinstance(value, dict):
            return [((trail, key), one) for key, one in value.items() if type(one) not in self._passed]
        inside = [*_inside(value)]
        self._names += [one for one in inside if one is getattr(value, "__dict__", None)]
        return [(trail, one) for one in inside if type(one) not in self._passed]

    def holds(self, value: Any) -> bool:
        """Whether a value is among what is remembered."""
        return id(value) in self._held

    def keys(self) -> set[str]:
        """The name of every attribute of what is remembered."""
        return {name for one in self._names for name in self._held.get(id(one), (0, 0, ()))[2]}

    def changed(self, within: "Snapshot | None" = None) -> str | None:
        """Where something is no longer as it was, if anywhere; only in what another snapshot also remembers."""
        held = self._held.values() if within is None else [self._held[i] for i in within._held if i in self._held]
        return next((_named(trail) for trail, now, before in held if not _same(now, before)), None)

    def restore(self) -> None:
        """Put everything back."""
        for _, now, before in self._held.values():
            if not _same(now, before):
                _put_back(now, before)


def _named(trail: _Trail) -> str:
    if trail and isinstance(trail[0], tuple):
        return f"{_named(trail[0])}.{trail[1]}"
    return str(trail[0]) if trail else ""


def _can_be_compared(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and tensor.layout == torch.strided


def _state(value: Any) -> Any:
    """A copy of what is mutable in a value itself; None where nothing is."""
    if isinstance(value, dict):
        return dict(value) if value else _EMPTY
    numpy = sys.modules.get("numpy")
    match value:
        case list() | set() | collections.deque():
            return list(value)
        case random.Random():
            return value.getstate()
        case torch.Generator():
            with torch._C.DisableTorchFunction():
                return value.get_state()
        case Tensor():
            return value.detach().clone()
        case _ if numpy is not None and isinstance(value, numpy.ndarray):
            return value.copy()
        case _ if numpy is not None and isinstance(value, numpy.random.Generator):
            return value.bit_generator.state
        case _ if numpy is not None and isinstance(value, numpy.random.RandomState):
            return value.get_state(legacy=False)
    return None


def _inside(value: Any) -> Iterator[Any]:
    """What a value that is no dict refers to, and could be changed through it."""
    match value:
        case Tensor():
            return
        case list() | set() | collections.deque() | tuple() | frozenset():
            yield from value
        case functools.partial():
            yield from (value.func, value.args, value.keywords)
        case types.MethodType():
            yield value.__self__
        case types.FunctionType():
            yield from enclosed(value)
    if not isinstance(value, types.FunctionType | types.MethodType) and isinstance(
        getattr(value, "__dict__", None), dict
    ):
        yield vars(value)


def _same(now: Any, before: Any) -> bool:
    if isinstance(now, dict):
        if not now and not before:
            return True
        same_keys = len(now) == len(before) and all(map(operator.is_, now, before))
        return same_keys and all(map(operator.is_, now.values(), before.values()))
    if isinstance(now, _CONTAINERS):
        return len(now) == len(before) and all(map(operator.is_, now, before))
    if isinstance(now, Tensor | torch.Generator):
        with torch._C.DisableTorchFunction():
            return torch.equal(_state(now) if isinstance(now, torch.Generator) else now.detach(), before)
    if type(before).__module__ == "numpy":
        return bool(now.shape == before.shape and now.tobytes() == before.tobytes())
    return repr(_state(now)) == repr(before)


def _put_back(now: Any, before: Any) -> None:
    match now:
        case dict():
            _put_back_dict(now, before)
        case set():
            now.clear()
            now.update(before)
        case list() | collections.deque():
            now.clear()
            now.extend(before)
        case random.Random():
            now.setstate(before)
        case torch.Generator():
            with torch._C.DisableTorchFunction():
                now.set_state(before)
        case Tensor():
            with torch.no_grad():
                now.copy_(before)
        case _ if hasattr(now, "bit_generator"):
            now.bit_generator.state = before
        case _ if hasattr(now, "set_state"):
            now.set_state(before)
        case _:
            now[...] = before


def _put_back_dict(now: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Another thread may be reading it meanwhile, so it is emptied only if its order has changed."""
    kind: Any = collections.OrderedDict if isinstance(now, collections.OrderedDict) else dict
    for key in now.keys() - before.keys():
        kind.__delitem__(now, key)
    for key, value in before.items():
        kind.__setitem__(now, key, value)
    if list(now) != list(before):
        kind.clear(now)
        kind.update(now, before)


def rng_state() -> tuple[Any, ...]:
    """The state of torch's CPU generator, Python's and, where NumPy is loaded, its global one."""
    with torch._C.DisableTorchFunction():
        own = bytes(torch.default_generator.get_state().tolist())
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return (own, random.getstate())
    kind, keys, *rest = numpy.random.get_state()
    return (own, random.getstate(), (kind, tuple(keys.tolist()), *rest))


def set_rng_state(state: tuple[Any, ...]) -> None:
    """Set back what `rng_state` gave."""
    with torch._C.DisableTorchFunction():
        torch.default_generator.set_state(torch.tensor(list(state[0]), dtype=torch.uint8, device="cpu"))
    random.setstate(state[1])
    if len(state) > 2:
        sys.modules["numpy"].random.set_state(state[2])


@contextmanager
def borrowed(model: nn.Module, also: Iterable[nn.Module] = (), training: bool = True) -> Iterator[Callable[[], None]]:
    """Run things on the model in a mode; yields a function that sets its state and all RNG back to the start, and
    does so at the end, mode included."""
    modes = [(module, module.training) for module in model.modules()]
    snapshot = Snapshot([*model.modules(), *also], with_values=True)
    host = rng_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    generators = (torch.get_rng_state(), torch.cuda.get_rng_state_all() if devices else [])

    def reset() -> None:
        snapshot.restore()
        set_rng_state(host)
        torch.set_rng_state(generators[0])
        if devices:
            torch.cuda.set_rng_state_all(generators[1])
        for module in model.modules():
            module.training = training

    try:
        reset()
        yield reset
    finally:
        reset()
        for module, mode in modes:
            module.training = mode


def iterator_kept(model: nn.Module) -> tuple[str, str] | None:
    """The path of a module that keeps an iterator, and the attribute: what was taken from it cannot be put back."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if hasattr(type(value), "__next__") and any(name in mentioned_names(one) for one in model.modules()):
                return path, name
    return None
