"""Calling a module while others stand in for its parameters, and what must not be in such a call."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active  # private: no public way to ask

from .defining import not_traced
from .errors import CaptureError


def call_swapped(
    module: nn.Module, substitutes: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a module while others stand in for its parameters. `torch.func.functional_call` costs ten times as much, to
    run and to compile; and compiled in it, a buffer that the forward rebinds stays what it was."""
    inside: dict[str, dict[str, Tensor]] = {}
    for name, substitute in substitutes.items():
        path, _, key = name.rpartition(".")
        inside.setdefault(path, {})[key] = substitute
    held: list[Any] = [(module.get_submodule(path)._parameters, own) for path, own in inside.items()]
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    mine = [] if torch.compiler.is_compiling() else _take([parameters for parameters, _ in held], type(module).__name__)
    try:
        for parameters, own in held:
            before = dict(parameters)
            kept.append((parameters, before))
            for key, substitute in own.items():
                for name, parameter in before.items():
                    if parameter is before[key]:
                        parameters[name] = substitute
        return module(*args, **kwargs)
    finally:
        for parameters, before in reversed(kept):  # a module with two paths is there twice
            for name, parameter in before.items():
                parameters[name] = parameter
        for place in mine:
            del _taken[place]


_taken: dict[int, int] = {}
"""The dictionaries of parameters that stand-ins are in, and the threads that put them there."""


@not_traced
def _take(places: list[dict[str, Any]], what: str) -> list[int]:
    """Note that stand-ins come to some places; returns those that had none.

    Raises:
        CaptureError: another thread has its own there.
    """
    thread, mine = threading.get_ident(), list[int]()
    for place in map(id, places):
        already = place in _taken
        if _taken.setdefault(place, thread) != thread:
            for one in mine:
                del _taken[one]
            raise CaptureError(
                f"two threads call one {what} at once, and a rule transforms gradients of its parameters: one would "
                "compute with what stands in for them in the other. Give each thread a copy.deepcopy of the emitted "
                "module, call it in one after the other, or use via='penalty'."
            )
        mine += [] if already else [place]
    return mine


@contextmanager
def dressed(module: nn.Module, substitutes: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Stand-ins that look like the parameters: of their class, with the attributes that somebody gave these, and their
    gradients. What attributes the call gives them the parameters have afterwards."""
    if _are_plain():
        yield substitutes
        return
    alike, owners = dict(substitutes), dict[str, nn.Parameter]()
    for name, substitute in substitutes.items():
        parameter = _parameter(module, name)
        if parameter is not None and parameter.is_leaf:
            if _is_of_own_class(parameter):
                alike[name] = substitute.as_subclass(type(parameter))
            owners[name] = parameter
            vars(alike[name]).update(vars(parameter))
            alike[name].grad = parameter.grad
    try:
        yield alike
    finally:
        for name, parameter in owners.items():
            vars(parameter).update(vars(alike[name]))
            alike[name].grad = None


@not_traced
def refuse_plain_stand_ins(module: nn.Module, substitutes: dict[str, Tensor]) -> None:
    """Raise where stand-ins would look otherwise than the parameters. Dynamo runs the caller as it is then."""
    for name in substitutes if _are_plain() else ():
        parameter = _parameter(module, name)
        if parameter is not None and _is_of_own_class(parameter):
            raise CaptureError(
                f"a rule transforms the gradient of {name!r}, a {type(parameter).__name__}: inside torch.func, and in "
                f"one graph with fullgraph=True, a {type(module).__name__} that runs as it is would meet plain tensors "
                "in its place. Leave it out with exclude=, or use via='penalty'."
            )


@not_traced  # by itself, called from what Dynamo runs as it is, it would say that it is compiled
def _are_plain() -> bool:
    """Whether stand-ins cannot be made to look like parameters."""
    return torch.compiler.is_compiling() or _are_functorch_transforms_active()


def _parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    path, _, key = name.rpartition(".")
    return module.get_submodule(path)._parameters[key]


def _is_of_own_class(parameter: Tensor) -> bool:
    return type(parameter) is not nn.Parameter and issubclass(type(parameter), nn.Parameter)


@contextmanager
def without_reentrant_checkpoints() -> Iterator[None]:
    """A reentrant checkpoint calls the module again in the backward pass, with its own parameters: refuse it here."""
    if torch.compiler.is_compiling():  # Dynamo captures the checkpoint with what it uses
        yield
        return
    function = torch.utils.checkpoint.CheckpointFunction
    with _refusing_lock:
        _refusing[threading.get_ident()] = _refusing.get(threading.get_ident(), 0) + 1
        if sum(_refusing.values()) == 1:
            function.apply = _refuse_checkpoint  # type: ignore[method-assign]
    try:
        yield
    finally:
        with _refusing_lock:
            _refusing[threading.get_ident()] -= 1
            if not sum(_refusing.values()):
                _refusing.clear()
                del function.apply


_refusing: dict[int, int] = {}
"""How many calls each thread is in that no reentrant checkpoint may be in."""
_refusing_lock = threading.Lock()


def _refuse_checkpoint(*args: Any) -> Any:
    if not _refusing.get(threading.get_ident()):
        function = torch.utils.checkpoint.CheckpointFunction
        return super(function, function).apply(*args)  # type: ignore[no-untyped-call]
    raise CaptureError(
        "a parameter whose gradient a rule transforms is used inside a reentrant checkpoint, whose backward pass "
        "would bypass the rule. Checkpoint with use_reentrant=False, or use via='penalty'."
    )
