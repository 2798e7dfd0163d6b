"""Remembering the Python state around a model's modules, to notice and undo what running a forward did to it."""

import array
import collections
import ctypes
import functools
import itertools
import logging
import operator
import queue
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from .enclosed import dictionary_of, enclosed, entries, slots, slotted
from .scanning import functions_of, global_objects, iterator_named, mentioned_names

_INERT = (
    bool, int, float, complex, str, bytes, types.NoneType, type, types.ModuleType, types.BuiltinFunctionType,
    torch.dtype, torch.device, torch.Size, fx.Graph, logging.Manager,
)  # fmt: skip
_CONTAINERS = (dict, list, set, collections.deque)
_EXACT_DICTS = (dict, collections.OrderedDict)
_EXACT_CONTAINERS = frozenset({*_CONTAINERS, *_EXACT_DICTS})
_LEAVES = frozenset({*_INERT, logging.Logger})  # a logger's levels are none of the model's; those of a class may be
_TENSORS = frozenset({Tensor, nn.Parameter})


class Snapshot:
    """Every list, dict, set, deque, array, random generator and plain object reachable from the modules' attributes.

    Tensors' values are remembered only on request: a tracer runs nothing that changes them. So are other modules that
    are met on the way, children included.

    Attributes:
        kinds: the types of what is remembered, and of what keeps it.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        with_values: bool = False,
        also: Iterable[Any] = (),
        other_modules: bool = False,
    ) -> None:
        self._held: dict[int, tuple[Any, Any]] = {}  # by identity, a value and a copy of its state
        self.kinds: set[type] = set()
        self._empty: dict[int, Any] = {}  # containers with nothing in them: every module has a dozen
        self._found_in: dict[int, int] = {}  # by identity, what holds a value; names are made of it when needed
        waiting: list[Any] = [*also]
        self._roots = {id(value): f"a global {type(value).__name__}" for value in waiting}
        self._also = frozenset(self._roots)
        passed = _LEAVES if with_values else _LEAVES | _TENSORS
        stops = _INERT if other_modules else (*_INERT, nn.Module)
        for module in modules:
            self._roots[id(vars(module))] = type(module).__name__
            waiting.append(vars(module))
        while waiting:
            value = waiting.pop()
            if isinstance(value, stops) or type(value) is logging.Logger:
                continue
            if isinstance(value, Tensor) and not (with_values and _can_be_compared(value)):
                continue
            self.kinds.add(type(value))
            before = _state(value)
            if before is not None:
                self._held[id(value)] = (value, before)
            for inner in before.values() if type(value) in _EXACT_DICTS else _inside(value):
                kind, identity = type(inner), id(inner)
                if kind in passed or identity in self._found_in or identity in self._roots:
                    continue
                self._found_in[identity] = id(value)
                if kind in _EXACT_CONTAINERS and not inner:
                    self._empty[identity] = inner
                else:
                    waiting.append(inner)

    def holds(self, value: Any) -> bool:
        """Whether a value is among what is remembered."""
        return id(value) in self._held or id(value) in self._empty

    def has_modules(self) -> bool:
        """Whether there is a module, or the dictionary of one, in what is remembered."""
        dictionaries = (before for _, before in self._held.values() if isinstance(before, dict))
        return any(issubclass(kind, nn.Module) for kind in self.kinds) or any("_modules" in one for one in dictionaries)

    def names(self, of_modules: bool = True) -> set[str]:
        """The name of every attribute, parameter and child of what is remembered, or only of what is no module."""
        found: set[str] = set()
        for identity, (value, before) in self._held.items():
            if not of_modules and isinstance(before, dict) and "_modules" in before:
                continue
            of_object = self._found_in.get(identity, identity) not in self._held or not isinstance(value, dict)
            is_global = identity in self._also and isinstance(value, dict)
            if isinstance(before, dict) and not is_global and (identity in self._roots or of_object):
                registries = (before.get(name) for name in ("_modules", "_parameters", "_buffers"))
                found.update(before, *(one for one in registries if isinstance(one, dict)))
        return found

    def changed(self, within: "Snapshot | None" = None) -> str | None:
        """Where something is no longer as it was, if anywhere; only in what another snapshot also remembers."""
        return next(map(self._name, self._changes(within)), None)

    def settling(self) -> "tuple[tuple[int, str, Any], ...] | None":
        """What was set since, as (identity of an object's dictionary or of a container, attribute, value): new
        attributes, and plain values in the place of others; the length of an ordered dict of hooks, under "". None if
        anything else changed."""
        found: list[tuple[int, str, Any]] = []
        for identity in self._changes():
            now, before = (self._empty[identity], {}) if identity in self._empty else self._held[identity]
            if isinstance(now, collections.OrderedDict):
                found.append((identity, "", len(now)))
                continue
            if not isinstance(now, dict) or identity in self._empty or before.keys() - now.keys():
                return None
            found += [(identity, name, one) for name, one in now.items() if before.get(name, ...) is not one]
        return tuple(found)

    def restore(self, within: "Snapshot | None" = None) -> None:
        """Put everything back, or what another snapshot also remembers."""
        for identity in [*self._changes(within)]:
            if identity in self._empty:
                self._empty[identity].clear()
            else:
                _put_back(*self._held[identity])

    def _changes(self, within: "Snapshot | None" = None) -> Iterator[int]:
        if within is None:
            candidates = itertools.chain(self._empty if any(self._empty.values()) else (), self._held)
        else:
            candidates = itertools.chain(within._empty, within._held)
        for identity in candidates:
            if identity in self._empty:
                if self._empty[identity]:
                    yield identity
            elif identity in self._held and not _same(*self._held[identity]):
                yield identity

    def _name(self, identity: int) -> str:
        """The type of the module and the keys through which a value was found."""
        keys: list[str] = []
        while identity in self._found_in:
            value, identity = identity, self._found_in[identity]
            before = self._held[identity][1] if identity in self._held else None
            if isinstance(before, dict):
                keys += [str(key) for key, one in before.items() if id(one) == value][:1]
        return ".".join([self._roots.get(identity, ""), *reversed(keys)])


def _can_be_compared(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and tensor.layout == torch.strided


def _state(value: Any) -> Any:
    """A copy of what is mutable in a value itself; None where nothing is."""
    if isinstance(value, dict):
        return entries(value)
    numpy = sys.modules.get("numpy")
    match value:
        case list() | set() | collections.deque():
            return list(value)
        case bytearray() | array.array():
            return value[:]
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
    return slotted(value) if slots(type(value)) else None


def _inside(value: Any) -> Iterator[Any]:
    """What a value refers to, and could be changed through it."""
    match value:
        case dict():
            yield from entries(value).values()
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
        case _:
            yield from slotted(value).values()
    if type(value).__dictoffset__ and not isinstance(value, types.FunctionType | types.MethodType):
        yield dictionary_of(value)


def _same(now: Any, before: Any) -> bool:
    if isinstance(before, dict) and not hasattr(type(now), "bit_generator"):
        kept = now if type(now) is dict else entries(now) if isinstance(now, dict) else slotted(now)
        return len(kept) == len(before) and _are(kept, before) and _are(kept.values(), before.values())
    if isinstance(now, _CONTAINERS):
        return len(now) == len(before) and _are(now, before)
    if isinstance(now, Tensor | torch.Generator):
        with torch._C.DisableTorchFunction():
            return torch.equal(_state(now) if isinstance(now, torch.Generator) else now.detach(), before)
    if type(before).__module__ == "numpy":
        return bool(now.shape == before.shape and now.tobytes() == before.tobytes())
    return repr(_state(now)) == repr(before)


def _are(now: Iterable[Any], before: Iterable[Any]) -> bool:
    return all(map(operator.is_, now, before))


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
        case _ if hasattr(type(now), "bit_generator"):
            now.bit_generator.state = before
        case _ if hasattr(type(now), "set_state"):
            now.set_state(before)
        case _ if isinstance(before, dict):
            for name in slotted(now).keys() - before.keys():
                object.__delattr__(now, name)
            for name, value in before.items():
                object.__setattr__(now, name, value)
        case bytearray() | array.array():
            now[:] = before
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
        state = torch.default_generator.get_state()
        own = ctypes.string_at(state.data_ptr(), state.numel())
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return (own, random.getstate())
    kind, keys, *rest = numpy.random.get_state()
    return (own, random.getstate(), (kind, keys.tobytes(), *rest))


def set_rng_state(state: tuple[Any, ...]) -> None:
    """Set back what `rng_state` gave."""
    with torch._C.DisableTorchFunction():
        torch.default_generator.set_state(torch.frombuffer(bytearray(state[0]), dtype=torch.uint8))
    random.setstate(state[1])
    if len(state) > 2:
        numpy = sys.modules["numpy"]
        kind, keys, *rest = state[2]
        numpy.random.set_state((kind, numpy.frombuffer(keys, dtype=numpy.uint32), *rest))


@contextmanager
def borrowed(
    model: nn.Module, also: Iterable[nn.Module] = (), training: bool | None = True
) -> Iterator[Callable[[], None]]:
    """Run things on the model in a mode, or in its own (None); yields a function that sets its state and all RNG back
    to the start, and does so at the end, mode included."""
    modes = [(module, module.training) for module in model.modules()]
    wanting = [(tensor, tensor.requires_grad) for tensor in (*model.parameters(), *model.buffers())]
    snapshot = Snapshot([*model.modules(), *also], with_values=True, also=global_objects(model))
    host = rng_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    generators = (torch.get_rng_state(), torch.cuda.get_rng_state_all() if devices else [])

    def reset() -> None:
        snapshot.restore()
        set_rng_state(host)
        torch.set_rng_state(generators[0])
        if devices:
            torch.cuda.set_rng_state_all(generators[1])
        for module, mode in modes:
            module.training = mode if training is None else training
        for tensor, wants in wanting:
            if tensor.requires_grad != wants:
                tensor.requires_grad_(wants)

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
            if leads_to_iterator(value) and any(name in mentioned_names(one) for one in model.modules()):
                return path, name
        for function in functions_of(module):
            if name := iterator_named(function.__code__, function.__globals__):
                return path, name
    return None


def leads_to_iterator(value: Any) -> bool:
    """Whether something that can be taken out of, and not be looked into, is a value or reachable from one."""
    waiting, seen = [value], set[int]()
    while waiting:
        one = waiting.pop()
        if hasattr(type(one), "__next__") or isinstance(one, queue.SimpleQueue):
            return True
        if id(one) not in seen and not isinstance(one, (*_INERT, Tensor, nn.Module)):
            seen.add(id(one))
            waiting += _inside(one)
    return False
