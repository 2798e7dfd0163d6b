"""Hearing every call of some modules, as their callers see it, and noticing what runs them past a call.

While somebody listens, `__call__` of the modules' own classes, and the `forward` that these run, tell of themselves.
Hooks are no way to do it: other hooks may come behind them, models ask whether there are any, and `module.forward(x)`
runs past them. So do copies of a module; what runs in another thread or inside `torch.func` cannot be used. All of
this is remembered, and an error.
"""

import copy
import functools
import itertools
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from .errors import CaptureError
from .surroundings import surroundings

_lock = threading.Lock()
_open: tuple["Hearing", ...] = ()
_numbers = itertools.count()
_MARK = "_fxreg_heard"
"""An attribute of modules that are heard, and so of their copies: for the number of each hearing the module's id."""
_meeting: tuple[Callable[[nn.Module], None], ...] = ()
_CALLS = (nn.Module._wrapped_call_impl.__code__, nn.Module._call_impl.__code__)


@dataclass
class _Patch:
    """A method of a class or module that tells, and for how many."""

    owner: Any
    before: Any
    telling: Any
    listeners: int = 0


_patched: dict[tuple[int, str], _Patch] = {}
"""By the identity of the class or module, and the method's name."""


class _Thread(threading.local):
    """What a thread is doing: how many listen in it, and of the heard calls in it the module and whether its forward
    was entered."""

    def __init__(self) -> None:  # once in each thread
        self.listeners = 0
        self.running: list[tuple[nn.Module, bool]] = []


_thread = _Thread()


class Hearing:
    """While it is entered, tells of calls of some modules; on leaving, raises if one of them ran and was not heard."""

    def __init__(
        self, region: nn.Module, modules: Mapping[nn.Module, str], note: Callable[[nn.Module, str, Any], None]
    ) -> None:
        """Listen to these modules in a region.

        Args:
            region: what runs.
            modules: each with what it is to people.
            note: called with a module, `"input"` and its arguments, and then with `"output"` and its result.
        """
        self.note = note
        self._region = region
        self._modules = modules
        self._what = {id(module): what for module, what in modules.items()}
        self._number = next(_numbers)
        self._thread, self.surroundings = threading.get_ident(), surroundings()
        self._kinds = {type(module) for module in modules}
        self._owners = {id(one): one for module in modules for one in (_owner(module), module)}.values()
        self._missed: str | None = None

    def __enter__(self) -> Self:
        global _open
        with _lock:
            for module in self._modules:
                vars(module).setdefault(_MARK, {})[self._number] = id(module)
            self._patch(_patch)
            _open = (*_open, self)
        _thread.listeners += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        global _open
        _thread.listeners -= 1
        with _lock:
            _open = tuple(one for one in _open if one is not self)
            self._patch(_restore)
            for module in self._modules:
                vars(module)[_MARK].pop(self._number)
                if not vars(module)[_MARK]:
                    del vars(module)[_MARK]
        if kind is None and self._missed is not None:
            raise CaptureError(self._missed)
        if kind is not None and kind.__name__ in ("Unsupported", "UncapturedHigherOrderOpError"):  # of Dynamo's
            raise CaptureError(
                f"{', '.join(self._what.values())}: something around is compiled as one graph (torch.cond, "
                "fullgraph=True), in which activations cannot be heard. Leave it out with exclude=, or compile what "
                f"fxreg.transform returned instead. ({kind.__name__})"
            ) from error

    def hears(self, called: nn.Module) -> bool:
        """Whether a call counts; where it should and cannot, that is remembered."""
        if not self._concerns(called):
            return False
        if self._identity(called) != id(called):
            self._miss_copy(called)
        elif threading.get_ident() != self._thread:
            self.miss(called, "the module runs in another thread")
        elif surroundings().transforms != self.surroundings.transforms:
            self.miss(called, "the module runs inside a transform of torch.func, or is traced")
        else:
            return True
        return False

    def miss(self, module: nn.Module, why: str, remedy: str = "") -> None:
        """Remember that what passes at a module now is lost."""
        remedy = remedy or "Let the forward call it as module(x), in its own thread, or leave it out with exclude=."
        what = self._what[vars(module)[_MARK][self._number]]
        self._missed = self._missed or f"{what}: {why}, where its activations are lost. {remedy}"

    def _miss_copy(self, called: nn.Module) -> None:
        self.miss(called, "a copy of the module runs")

    def meets(self, module: nn.Module) -> None:
        """The forward of some module runs, and not in a call of it."""
        if self._concerns(module):
            is_copy = self._identity(module) != id(module)
            self._miss_copy(module) if is_copy else self.miss(module, "the module's forward runs without a call of it")

    def _identity(self, called: nn.Module) -> int | None:
        """The id of the module that something is, or is a copy of."""
        found: int | None = vars(called).get(_MARK, {}).get(self._number)
        return found

    def _patch(self, patch: Callable[[Any, str, Any], None]) -> None:
        for kind in self._kinds:
            patch(kind, "__call__", _telling_call)
        # Also on the modules themselves: a forward of their own is what Dynamo guards, so that what was compiled
        # before is not used meanwhile.
        for owner in self._owners:
            patch(owner, "forward", _telling_forward)

    def _concerns(self, called: nn.Module) -> bool:
        """Whether something that runs is one of the modules, or a copy, and not the business of others: of a thread
        that listens itself, or runs the whole region."""
        if self._identity(called) is None:
            return False
        return threading.get_ident() == self._thread or not (_thread.listeners or _runs(self._region))


@contextmanager
def meeting(modules: Iterable[nn.Module], meets: Callable[[nn.Module], None]) -> Iterator[None]:
    """Call `meets` with every module that runs a forward which some of these modules have, and not in a call that is
    heard."""
    global _meeting
    owners = {id(owner): owner for owner in map(_owner, modules)}.values()
    with _lock:
        for owner in owners:
            _patch(owner, "forward", _telling_forward)
        _meeting = (*_meeting, meets)
    try:
        yield
    finally:
        with _lock:
            _meeting = tuple(one for one in _meeting if one is not meets)
            for owner in owners:
                _restore(owner, "forward", _telling_forward)


def has_own_forward(module: nn.Module) -> bool:
    """Whether an instance has a forward of its own while nobody listens."""
    own = vars(module).get("forward")
    return own is not None and not (isinstance(own, _Telling) and not own.is_own)


def untold(function: Any) -> Any:
    """What a function is while nobody listens."""
    is_telling = isinstance(function, types.FunctionType) and function.__code__ in _TELLING
    return function.__wrapped__ if is_telling else function


def _runs(module: nn.Module) -> bool:
    """Whether what runs now is part of a call of the module."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _CALLS and frame.f_locals["self"] is module:
            return True
        frame = frame.f_back
    return False


def _telling_call(kind: Any, original: Any) -> Any:
    """`__call__` of a class, also one of its own: it tells of what the caller gives and gets."""

    def call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        run = super(kind, module).__call__ if original is None else functools.partial(original, module)
        return _heard(module, run, args, kwargs) if _MARK in module.__dict__ else run(*args, **kwargs)

    return call


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _heard(module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    if _thread.running and _thread.running[-1] == (module, False):
        return run(*args, **kwargs)  # by super() of one that told
    hearing = [one for one in _open if one.hears(module)]
    if not hearing:
        return run(*args, **kwargs)
    _note(hearing, module, "input", (args, kwargs))
    _thread.running.append((module, False))
    try:
        result = run(*args, **kwargs)
    finally:
        _thread.running.pop()
    _note(hearing, module, "output", result)
    return result


def _note(hearing: Iterable[Hearing], module: nn.Module, on: str, values: Any) -> None:
    for one in hearing:
        with one.surroundings.restored():
            one.note(module, on, values)


def _telling_forward(owner: Any, original: Any) -> Any:
    """The forward of a class, or of an instance."""
    if isinstance(owner, nn.Module):
        return _Telling(owner, original)

    @functools.wraps(original)
    def forward(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if _meeting or _MARK in module.__dict__:
            _tell(module, owner)
        return original(module, *args, **kwargs)

    return forward


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _tell(module: nn.Module, owner: Any) -> None:
    """A forward runs that is kept by its owner."""
    if owner is not module and owner is not _class_owner(module):
        return  # by super()
    running = _thread.running
    if running and running[-1][0] is module:
        running[-1] = (module, True)
        return
    for one in _open:
        one.meets(module)
    for meets in _meeting:
        meets(module)


class _Telling:
    """The forward of an instance, which tells of itself; copies and questions find the forward as it was."""

    def __init__(self, module: nn.Module, own: Any) -> None:
        vars(self).update(_module=module, is_own=own is not None, __wrapped__=module.forward if own is None else own)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _tell(self._module, self._module)
        return self.__wrapped__(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["__wrapped__"], name)

    def __copy__(self) -> Any:
        return self.__wrapped__

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copy.copy, (self.__wrapped__,)


_TELLING = {code for code in _telling_forward.__code__.co_consts if isinstance(code, types.CodeType)}


def _owner(module: nn.Module) -> Any:
    """Where a module's forward is kept: in itself, or in a class."""
    if has_own_forward(module):
        return module
    return _class_owner(module)


def _class_owner(module: nn.Module) -> type:
    return next(kind for kind in type(module).__mro__ if "forward" in vars(kind))


def _patch(owner: Any, name: str, telling: Callable[[Any, Any], Any]) -> None:
    before = vars(owner).get(name)
    if (id(owner), name) not in _patched:
        can_tell = isinstance(owner, nn.Module) or before is None or isinstance(before, types.FunctionType)
        _patched[id(owner), name] = _Patch(owner, before, telling(owner, before) if can_tell else before)
        _put(owner, name, _patched[id(owner), name].telling)
    _patched[id(owner), name].listeners += 1


def _restore(owner: Any, name: str, telling: Any) -> None:
    patch = _patched[id(owner), name]
    patch.listeners -= 1
    if not patch.listeners:
        del _patched[id(owner), name]
        if vars(owner).get(name) is patch.telling:  # and nobody replaced it
            _put(owner, name, patch.before)


def _put(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, nn.Module) and value is not None:
        vars(owner)[name] = value
    elif isinstance(owner, nn.Module):
        del vars(owner)[name]
    elif value is None:
        delattr(owner, name)
    else:
        setattr(owner, name, value)
