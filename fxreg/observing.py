"""What rules on forward calls are about, seen while a model runs as it is: without a graph or an emitted operator."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .functions import directions
from .hearing import Hearing
from .interception import calling, lock
from .layers import is_layer
from .penalty_calls import followed
from .planning import PenalizeActivation, PenalizeFunction
from .structure import map_tensors, tensors
from .torch_calls import as_node, is_call_of, name_of

Note = Callable[[PenalizeActivation, Tensor], None]


@contextmanager
def observing(model: nn.Module, edits: Sequence[PenalizeActivation], note: Note) -> Iterator[None]:
    """Call `note` with a copy of every activation that the edits are on, when it passes, in this thread."""
    if not edits:
        yield
        return
    on_modules: dict[nn.Module, list[PenalizeActivation]] = {}
    for edit in edits:
        if edit.op is None:
            on_modules.setdefault(model.get_submodule(edit.sites[0]), []).append(edit)
    what = {module: f"rule {here[0].label!r}, {here[0].site}" for module, here in on_modules.items()}

    def tell(module: nn.Module, on: str, values: Any) -> None:
        _tell([edit for edit in on_modules[module] if edit.on == on], values, note)

    on_calls = [edit for edit in edits if edit.op is not None]
    with lock, Hearing(model, what, tell), _calls(model, on_calls, note) if on_calls else nullcontext():
        yield


@contextmanager
def _calls(model: nn.Module, edits: Sequence[PenalizeActivation], note: Note) -> Iterator[None]:
    """Tell of calls of functions and methods, and for that follow whose forward runs."""
    sites = {id(model.get_submodule(path)): path for edit in edits for path in edit.sites}
    stack: list[nn.Module] = []

    def follow(call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        stack.append(module)
        try:
            return call(module, *args, **kwargs)
        finally:
            stack.pop()

    with calling(follow), _Calls(model, edits, sites, stack, note):
        yield


class _Calls(TorchFunctionMode):
    """Tells of the calls of functions and methods in the forwards of modules."""

    def __init__(
        self,
        model: nn.Module,
        edits: Sequence[PenalizeActivation],
        sites: Mapping[int, str],
        stack: list[nn.Module],
        note: Note,
    ) -> None:
        super().__init__()
        self._model, self._edits, self._sites, self._stack, self._note = model, edits, sites, stack, note

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._stack or is_layer(self._stack[-1]):
            return function(*args, **kwargs)
        path = self._sites.get(id(self._stack[-1]), ...)
        kind, target, given, named = as_node(function, name_of(function), args, kwargs)
        here = [edit for edit in self._edits if path in edit.sites and is_call_of(edit.op, kind, target)]
        if takes := [edit for edit in here if edit.on == "input"]:
            kept = {id(tensor) for tensor in (*self._model.parameters(), *self._model.buffers())}
            _tell(takes, [one for one in tensors((given, named)) if id(one) not in kept], self._note)
        result = function(*args, **kwargs)
        _tell([edit for edit in here if edit.on == "output"], result, self._note)
        return result


def _tell(edits: Sequence[PenalizeActivation], values: Any, note: Note) -> None:
    if not edits:
        return
    with torch._C.DisableTorchFunction():  # what is done here is none of the model's
        found = [one for one in tensors(values) if one.is_floating_point()]
        for edit, tensor in itertools.product(edits, found):
            note(edit, tensor.clone())


@torch.enable_grad()
def slopes(
    model: nn.Module, args: Any, kwargs: Any, edit: PenalizeFunction, stream: Tensor | None
) -> list[tuple[Tensor, list[Tensor]]]:
    """The floating-point tensors among the arguments, with the gradients that a penalty on the function squares.

    The model runs again; its buffers and torch's generators are put back.
    """
    inputs: dict[int, Tensor] = {}

    def follow(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return inputs.setdefault(id(tensor), tensor if tensor.requires_grad else tensor.detach().requires_grad_())

    args, kwargs = map_tensors(follow, (args, kwargs))
    found: list[list[Tensor]] = [[] for _ in inputs]
    definition, arguments = edit.effect.definition, edit.effect.arguments
    for sample in range(arguments.get("samples", 1)):
        before = [buffer.detach().clone() for buffer in model.buffers()]
        with torch.random.fork_rng():
            outputs = followed(model(*args, **kwargs))
        scalar = [
            (v.detach() * one).sum()
            for v, one in zip(directions(definition, outputs, stream, arguments, sample), outputs, strict=True)
        ]
        gradients = torch.autograd.grad(
            torch.stack(scalar).sum(), list(inputs.values()), create_graph=True, materialize_grads=True
        )
        for gradient, place in zip(gradients, found, strict=True):
            place.append(gradient)
        for buffer, old in zip(model.buffers(), before, strict=True):
            if not torch.equal(buffer, old):  # writing the same would spoil the backward pass
                buffer.data.copy_(old)
    return list(zip(inputs.values(), found, strict=True))
