"""Routing what a forward does to the tracer: module calls, attribute reads, torch calls, autograd Functions."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import BuiltinMethodType, MethodType
from typing import Any

import torch
from torch import nn
from torch.autograd import Function

from .hearing import meeting
from .packages import is_library
from .side_channels import REGISTRIES
from .surroundings import surroundings

lock = threading.RLock()
"""Whoever patches a class holds it."""
_PLAIN = frozenset({bool, int, float, str})
_INTERNAL = frozenset(vars(nn.Module())) | {"forward", "__dict__", "__class__"}


@contextmanager
def intercepted(tracer: Any) -> Iterator[None]:
    """Route this thread's module calls, attribute reads and autograd Functions through the tracer.

    The patches sit on classes and so are seen by every thread; each passes other threads through untouched. One trace
    at a time.
    """
    called: list[nn.Module] = [tracer.root]
    dtype = torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with lock, torch.enable_grad(), _meeting_marked(tracer, called):
        patches = [*_on_modules(tracer, called), *_on_questions(tracer)]
        originals = [(owner, name, vars(owner).get(name)) for owner, name, _ in patches]
        try:
            for owner, name, replacement in patches:
                setattr(owner, name, replacement)
            with tracer.mode():
                here = surroundings()
                try:
                    yield
                finally:
                    here.reinstate()
        finally:
            for owner, name, original in originals:
                if original is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, original)
            # A forward that failed may have left them otherwise.
            torch._C._set_grad_enabled(True)
            torch.set_default_dtype(dtype)
            torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])


@contextmanager
def calling(run: Callable[[Callable[..., Any], nn.Module, Any, Any], Any]) -> Iterator[None]:
    """Let `run(call, module, args, kwargs)` carry out every call of a module in this thread.

    The patch sits on the class, and passes other threads through.
    """
    with lock:
        original, thread = nn.Module.__call__, threading.get_ident()

        def call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return original(module, *args, **kwargs)
            return run(original, module, args, kwargs)

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]


@contextmanager
def as_if_compiled() -> Iterator[None]:
    """Answer this thread as Dynamo does when something asks whether it is being compiled."""
    owners = [(torch.compiler, "is_compiling"), (torch.compiler, "is_dynamo_compiling"), (torch._utils, "is_compiling")]
    if dynamo := sys.modules.get("torch._dynamo"):
        owners += [(dynamo, "is_compiling"), (dynamo.external_utils, "is_compiling")]
    thread = threading.get_ident()

    def answering(original: Callable[[], bool]) -> Callable[[], bool]:
        return lambda: threading.get_ident() == thread or original()

    with lock:
        originals = [(owner, name, vars(owner)[name]) for owner, name in owners]
        try:
            for owner, name, original in originals:
                setattr(owner, name, answering(original))
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)


def _ours(tracer: Any) -> bool:
    return bool(threading.get_ident() == tracer.thread)


def _meeting_marked(tracer: Any, called: list[nn.Module]) -> AbstractContextManager[None]:
    """Give up where the forward of a module whose activations are to be marked runs without a call of the module."""

    def meets(module: nn.Module) -> None:
        if _ours(tracer) and called[-1] is not module:
            tracer.give_up(f"runs the forward of a {type(module).__name__} without a call of it")

    return meeting([tracer.root.get_submodule(path) for path in tracer.marked], meets)


def _on_modules(tracer: Any, called: list[nn.Module]) -> list[tuple[Any, str, Any]]:
    """What replaces the methods of nn.Module."""
    module_call, module_getattr, module_setattr = nn.Module.__call__, nn.Module.__getattr__, nn.Module.__setattr__
    plain_read = object.__getattribute__

    def call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if not _ours(tracer):
            return module_call(module, *args, **kwargs)
        called.append(module)
        try:
            return tracer.call_submodule(module, module.forward, args, kwargs)
        finally:
            called.pop()

    def read_plain(module: nn.Module, name: str) -> Any:
        value = plain_read(module, name)
        if name in _INTERNAL:
            if name == "__dict__" and _ours(tracer) and not is_library(sys._getframe(1).f_globals.get("__name__")):
                tracer.give_up(f"looks into the dictionary of a {type(module).__name__}")
            elif name in REGISTRIES and _ours(tracer) and sys._getframe(1).f_globals.get("__package__") != __package__:
                tracer.note_listed(module, name, value)
            return value
        own = type(value) in _PLAIN or name in plain_read(module, "__dict__") or _is_of_class(module, name, value)
        if own and _ours(tracer):
            tracer.note_read(module, name, value)
        return value

    def read(module: nn.Module, name: str) -> Any:
        own = plain_read(module, "__dict__")
        for registry in REGISTRIES:  # as module_getattr does, in a tenth of the time
            if name in own.get(registry, ()):
                value = own[registry][name]
                break
        else:
            try:
                value = module_getattr(module, name)
            except AttributeError:
                if _ours(tracer):
                    tracer.note_read(module, name, ...)  # there is no such attribute: there may be one later
                raise
        return tracer.attribute(module, name, value) if _ours(tracer) else value

    def write(module: nn.Module, name: str, value: Any) -> None:
        if _ours(tracer):
            if tracer.is_as_it_was(module, name, value):
                return
            tracer.note_change(module, f"sets {type(module).__name__}.{name}")
        module_setattr(module, name, value)

    def training(module: nn.Module) -> Any:
        if _ours(tracer):
            return tracer.read_training(module)
        own = vars(module)
        return own["training"] if "training" in own else module_getattr(module, "training")

    def set_training(module: nn.Module, mode: bool) -> None:
        if _ours(tracer):
            tracer.note_change(module, "changes the training mode")
        vars(module)["training"] = mode

    return [
        (nn.Module, "__call__", call),
        (nn.Module, "__getattribute__", read_plain),
        (nn.Module, "__getattr__", read),
        (nn.Module, "__setattr__", write),
        (nn.Module, "training", property(training, set_training)),
    ]


def _on_questions(tracer: Any) -> list[tuple[Any, str, Any]]:
    """What replaces the functions that a forward must not call."""
    refused = [
        (torch, "is_grad_enabled", "reads or sets the grad mode"),
        (torch, "is_inference_mode_enabled", "reads the inference mode"),
        (torch, "is_autocast_enabled", "reads or sets autocast"),
        (torch.nn.utils.stateless, "_functional_call", "calls a module functionally"),
        # Asked by every Function.apply, however it was imported, where that is Python.
        (torch.autograd.function, "_is_setup_context_defined", "calls a custom autograd.Function"),
    ]
    replaced: list[tuple[Any, str, Any]] = [
        (owner, name, _refusing(tracer, vars(owner)[name], what)) for owner, name, what in refused
    ]
    if isinstance(Function.apply, BuiltinMethodType):  # torch 2.14: what it makes of proxies may be a crash

        def apply(kind: type[Function], *args: Any) -> Any:
            return super(Function, kind).apply(*args)  # type: ignore[misc]

        refuse = _refusing(tracer, apply, "calls a custom autograd.Function")
        replaced.append((Function, "apply", classmethod(refuse)))
    return replaced


def _is_of_class(module: nn.Module, name: str, value: Any) -> bool:
    """Whether an attribute is a default that the class keeps, and nothing that it makes for the instance."""
    return type(value) is not MethodType and any(vars(kind).get(name) is value for kind in type(module).__mro__)


def _refusing(tracer: Any, original: Callable[..., Any], what: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if _ours(tracer):
            tracer.give_up(what)
        return original(*args, **kwargs)

    return refuse
