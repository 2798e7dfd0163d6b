"""Listening to torch: what a recorder does with every call of a torch function, method or property."""

import functools
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from . import calls
from .executing import inside_handler
from .layers import ambient_state
from .shapes import FITS, RANK, sliced
from .sizes import SYMBOLIC, concrete
from .torch_calls import (
    DECISIONS,
    KINDS,
    RANKS,
    SILENT,
    SIZES,
    WANTS,
    as_node,
    holds_only_tensors,
    is_certain,
    is_in_place,
    is_refused,
    is_torchs,
    name_of,
    nodes_in,
    validating,
)  # fmt: skip
from .writing import Origin, Unrecordable

OTHER_MODE = "runs part of itself in another grad, autocast or inference mode"


class Listening(TorchFunctionMode):
    """Writes torch calls down for a recorder, or tells it what a graph cannot hold."""

    def __init__(self, recorder: Any) -> None:
        super().__init__()
        self._recorder, self._writer = recorder, recorder.writer

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._recorder.is_busy = True
        try:
            return self._heard(function, args, kwargs or {})
        finally:
            self._recorder.is_busy = False

    def _run(self, function: Any, args: Any, kwargs: Any) -> Any:
        """The call itself, in which the user's code may run: by an operator of a type of theirs, say."""
        self._recorder.is_busy = False
        try:
            return function(*args, **kwargs)
        finally:
            self._recorder.is_busy = True

    def _heard(self, function: Any, args: Any, kwargs: Any) -> Any:
        name = name_of(function)
        if self._writer.writes and ambient(listening=False) != self._recorder.ambient:
            self._recorder.give_up(OTHER_MODE)
        elif not is_torchs(function):
            self._recorder.give_up(f"calls {name} as if it were torch's")
        if not self._writer.writes or name in SILENT:
            return self._run(function, concrete(args), concrete(kwargs))
        if name.startswith("sym_"):
            return self._run(function, args, kwargs)
        if args and isinstance(args[0], Tensor) and name in SIZES:
            return self._sizes(name, *args, **kwargs)
        if catcher := inside_handler():
            self._recorder.give_up(f"{catcher} catches exceptions")
        elif is_refused(function, name) or (name in WANTS and self._writer.is_kept_tensor(args[0])):
            self._recorder.give_up(f"calls {name} in its forward")
        made: tuple[Any, Any] = ((), {})
        if self._writer.writes:
            try:
                made = self._writer.argument(args), self._writer.argument(kwargs)
            except Unrecordable as failure:
                self._recorder.give_up(str(failure))
        result = self._run(function, concrete(args), concrete(kwargs))
        if not self._writer.writes:
            return result
        try:
            return self._answered(function, name, args, made, result)
        except Unrecordable as failure:
            self._recorder.give_up(str(failure))
            return result

    def _answered(self, function: Any, name: str, args: Any, made: tuple[Any, Any], result: Any) -> Any:
        """The result of a torch call, once it is in the graph or assumed."""
        if name in RANKS:
            self._writer.assume_rank(args[0])
            return result
        if name in KINDS:
            self._ask_kind(name)
            if self._writer.writes:
                self._writer.expect(self._writer.node(*as_node(function, name, *made)), result)
            return result
        if isinstance(result, bool) and name in DECISIONS:
            if name == "__bool__" and is_certain(made[0][0]):
                return result
            if self._writer.can_be_asked_first(*nodes_in(made)):
                self._writer.decide(
                    self._writer.node(*as_node(bool if name == "__bool__" else function, name, *made)), result
                )
                return result
        if name == "__bool__" and result and (distribution := validating()) is not None:
            self._writer.call(calls.expect_valid, made[0][0], "_validate_args" in vars(distribution))
            return result
        if name == "item" and type(result) is int and self._writer.can_be_asked_first(*nodes_in(made)):
            return self._writer.number(self._writer.node(*as_node(function, name, *made)), result)
        if not holds_only_tensors(result) and name not in ("__setitem__", "__set__"):
            raise Unrecordable("branches on a value" if name == "__bool__" else f"asks {name} of a value")
        node = self._writer.node(*as_node(function, name, *made))
        if name == "__getitem__" and RANK in node.args[0].meta:
            self._note_slices(node, *args)
        if isinstance(result, Tensor) and is_in_place(name):
            return self._writer.learn(result, Origin(node))
        if type(result) in (tuple, list):
            self._assume_count(name, *made, len(result))
            node = self._writer.call(calls.unpack, node, len(result), f"what {name} returned")
        return self._writer.bound(result, Origin(node))

    def _ask_kind(self, name: str) -> None:
        """A data type or a device is assumed to stay as it is; where it costs no depth, the module stays whole."""
        if self._recorder.is_in_leaf():
            self._recorder.give_up(f"asks {name} of a value")
        self._recorder.asked.kinds = True

    def _sizes(self, name: str, tensor: Tensor, dim: Any = None) -> Any:
        if dim is None:
            self._writer.assume_rank(tensor)
        sizes = self._writer.sizes(tensor)
        if name in ("numel", "nelement"):
            return functools.reduce(lambda total, size: total * size, sizes, 1)
        if name == "__len__":
            return int(sizes[0])
        return torch.Size(sizes) if dim is None else sizes[concrete(dim)]

    def _note_slices(self, node: fx.Node, value: Tensor, index: Any) -> None:
        """`value[:n]` has n elements where there are as many, and that is assumed where n is a size."""
        parts = index if isinstance(index, tuple) else (index,)
        if not all(part is None or part is ... or isinstance(part, slice | int) for part in parts):
            return
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        for at, part in filter(None, sliced(index, source.meta[RANK])):
            if type(part.stop) in SYMBOLIC and part.start in (None, 0) and part.step in (None, 1):
                with torch._C.DisableTorchFunction():
                    size = value.size(at)
                fixed = self._recorder.fixed_shape(source, value)
                there = fixed[at] if fixed else self._writer.size(Origin(source), at, size)
                if self._writer.follows(part.stop) and self._writer.follows(there) and 0 <= part.stop <= there:
                    node.meta.setdefault(FITS, set()).add(at)

    def _assume_count(self, name: str, args: Any, kwargs: Any, count: int) -> None:
        """How many parts there are is taken for granted. Where they are as many as a size says, that can be asked
        before anything is done."""
        if name == "unbind" and RANK in args[0].meta:
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            size = self._writer.size(Origin(args[0]), dim % args[0].meta[RANK], count)
            if type(size) in SYMBOLIC:
                self._writer.assume(size.node)


def ambient(listening: bool = True) -> tuple[object, ...]:
    """What surrounds a call and changes what it does, seen from inside a mode or not."""
    return (*ambient_state(), torch._C._len_torch_function_stack() + (not listening))
