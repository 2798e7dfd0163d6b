"""What surrounds a call of a module, and how something else is computed meanwhile as if nothing did."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._C import _autograd, _functorch  # private, as all of this: no public way to ask
from torch._C import _TorchDispatchModeKey as Key
from torch.overrides import _pop_mode as _pop_function_mode
from torch.overrides import _pop_mode_temporarily
from torch.utils._python_dispatch import _pop_mode, _push_mode


@dataclass(frozen=True)
class Surroundings:
    """What is around a piece of code.

    Attributes:
        transforms: how many of torch.func, and the modes in which torch traces.
        functions: how many modes see calls of torch functions.
        dispatches: how many see calls of operators.
        packing: the innermost pair of hooks that see what is saved for the backward pass.
    """

    transforms: tuple[Any, ...]
    functions: int
    dispatches: int
    packing: Any

    def reinstate(self) -> None:
        """Take away for good what came since, and was left there."""
        while torch._C._len_torch_function_stack() > self.functions:
            _pop_function_mode()  # type: ignore[no-untyped-call]
        while torch._C._len_torch_dispatch_stack() > self.dispatches:
            _pop_mode()
        while _packing() not in (self.packing, None):
            _autograd._pop_saved_tensors_default_hooks()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Take away for a while what came since, but for transforms. What is computed here is none of its business,
        and a checkpoint would miss it when it computes its part again."""
        modes: list[Any] = []
        hooks: list[Any] = []
        with ExitStack() as stack:
            for _ in range(torch._C._len_torch_function_stack() - self.functions):
                stack.enter_context(_pop_mode_temporarily())
            try:
                while torch._C._len_torch_dispatch_stack() > self.dispatches:
                    modes.append(_pop_mode())
                while (top := _packing()) != self.packing:
                    hooks.append(top)
                    _autograd._pop_saved_tensors_default_hooks()
                yield
            finally:
                for pair in reversed(hooks):
                    _autograd._push_saved_tensors_default_hooks(*pair)
                for mode in reversed(modes):
                    _push_mode(mode)


def surroundings() -> Surroundings:
    """What is around this."""
    innermost: Any = _functorch.peek_interpreter_stack()
    tracing = [torch._C._get_dispatch_mode(key) for key in (Key.FAKE, Key.PROXY, Key.FUNCTIONAL)]
    transforms = (innermost.level() if innermost is not None else 0, *map(id, tracing))
    functions, dispatches = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    return Surroundings(transforms, functions, dispatches, _packing())


def _packing() -> Any:
    return _autograd._top_saved_tensors_default_hooks(True)
