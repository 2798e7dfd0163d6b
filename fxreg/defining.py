"""The `torch.library` operators that emitted graphs are made of: how one is registered, and under which name.

A Python function as a node target is inlined by re-tracing, and an `autograd.Function` inside it silently loses its
backward. So every node with an effect on gradients is an operator of the `fxreg` namespace. All of them are
CompositeImplicitAutograd: eager mode, AOTAutograd and functorch run the Python body, Dynamo and `torch.export` keep the
call as one node.

The overload of an operator is a fingerprint of what it computes (`torch.ops.fxreg.l1.x1f0c33aa`): of its formula, and
of the code in this package around it. torch.compile's on-disk caches key an operator by its name alone: without the
fingerprint, editing a formula would silently train with the old one.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch._C import DisableTorchFunction, _DisableTorchDispatch  # private: no public way to stop
from torch._C._dynamo.eval_frame import (  # private: torch.compiler.disable, without its import and its cost a call
    _FrameAction,
    _FrameExecStrategy,
    set_code_exec_strategy,
)
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import TracingContext  # private: what is being compiled

from .errors import RuleError
from .fingerprints import Fingerprint

NAMESPACE = "fxreg"
_libraries: list[torch.library.Library] = []
_implementations: dict[str, tuple[Callable[..., Any], Fingerprint]] = {}
_checked: "WeakKeyDictionary[TracingContext, set[str]]" = WeakKeyDictionary()

F = TypeVar("F", bound=Callable[..., Any])


def define(
    name: str,
    overload: Fingerprint,
    schema: str,
    implementation: Callable[..., Any],
    batched: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload:
    """Register `fxreg::name.overload`; under a known overload, only replace the implementation.

    Args:
        overload: a fingerprint of what the implementation computes.
        batched: what does it inside `torch.vmap`, instead of torch's call for each slice, which takes no lists.
    """
    qualified = f"{name}.{overload}"
    known = qualified in _implementations
    _implementations[qualified] = implementation, overload
    if not known:
        # A library each: overloads of one name in one library abort the interpreter when it deregisters them at exit.
        library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
        _libraries.append(library)
        library.define(qualified + schema)  # type: ignore[no-untyped-call]
        library.impl(  # type: ignore[no-untyped-call]
            qualified,
            functools.partial(_run, qualified),
            "CompositeImplicitAutograd",
        )
        if batched is not None:
            library.impl(qualified, batched, "FuncTorchBatched")  # type: ignore[no-untyped-call]
    operator: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, NAMESPACE), name), overload)
    return operator


def _run(qualified: str, *args: Any, **kwargs: Any) -> Any:
    implementation, fingerprint = _implementations[qualified]
    if (compilation := TracingContext.try_get()) is not None:
        _check_is_current(qualified, fingerprint, compilation)
    return implementation(*args, **kwargs)


def not_traced(function: F) -> F:
    """The function, whose frames Dynamo leaves alone where it stands at the top, after a graph break."""
    itself: Any = function  # which has code, unlike all that can be called
    set_code_exec_strategy(itself.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return function


not_traced(_run)  # an operator's body is one step


def _check_is_current(qualified: str, fingerprint: Fingerprint, compilation: TracingContext) -> None:
    """Raise where a helper's new code would be compiled, and kept on disk, under the name of the old; once for each
    compilation, which may hold ten thousand sites."""
    checked = _checked.setdefault(compilation, set())
    if qualified in checked:
        return
    with temporarily_clear_interpreter_stack(), DisableTorchFunction(), _DisableTorchDispatch():
        is_current = fingerprint == fingerprint.now()
    if not is_current:
        raise RuleError(
            f"effect {qualified.partition('.')[0]!r}: a function that its formula calls, or a constant that it reads, "
            "changed after the module was transformed. Transform the model again, and compile that."
        )
    checked.add(qualified)
