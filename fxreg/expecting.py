"""What a trace took for granted of values without anything noticing: that they are tensors, and not None.

No proxy sees `x is None`, and `isinstance` of an argument has to be answered somehow. Where the code asks, the values
that it may have asked about are asserted when the graph runs.
"""

import itertools
import operator
import types
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .calls import expect_some, expect_tensor, passes, unpack
from .layers import is_plain_layer
from .naming import names_in

_ACCEPT_NONE = {operator.eq, operator.ne, operator.is_, operator.is_not, operator.contains}
_MAYBE_NONE = {F.multi_head_attention_forward}
"""Functions of torch's that may return None among other things."""


class Expectations:
    """What is to be asserted of the values in one graph.

    Attributes:
        opaque_results: what modules returned that are called as a whole, with their paths.
        asked_type: the arguments that were asked for their type.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self._root, self._graph = root, graph
        self.opaque_results: dict[fx.Node, str] = {}
        self.asked_type: set[fx.Node] = set()

    def mark(self) -> tuple[set[fx.Node], int]:
        """Where the records stand."""
        return set(self.asked_type), len(self.opaque_results)

    def forget(self, mark: tuple[set[fx.Node], int]) -> None:
        """Drop what was noted since a mark."""
        self.asked_type, known = mark
        while len(self.opaque_results) > known:
            self.opaque_results.popitem()

    def asks_none(self, last: fx.Node | None, given: Collection[fx.Node]) -> str | None:
        """The code behind the nodes since the last one, which was given some before, may have asked of any of them
        whether it is None: assert that it was not. Returns why that cannot be done, if it cannot."""
        new = {*itertools.takewhile(lambda node: node is not last, reversed(self._graph.nodes)), *given}
        for node in [node for node in self.opaque_results if node in new]:
            path = self.opaque_results[node]
            if node not in given and all(user.target is passes for user in node.users):
                return f"returns or discards what opaque {path!r} returns, and asks whether it is None"
            self.expect(node, f"what {path!r} returned")
            del self.opaque_results[node]
        for node in [node for node in self._graph.nodes if node in new and self._may_be_none(node)]:
            self._assert(node, expect_some, f"item {node.args[1]!r} of {node.args[0]}")
        return None

    def expect(self, node: fx.Node, what: str) -> None:
        """Assert at run time that a value is a tensor."""
        self._assert(node, expect_tensor, what)

    def must_be_tensor(self, node: fx.Node) -> bool:
        """Whether a value was asked for its type, or may be None without anything noticing."""
        return node in self.asked_type or not self._enforces_tensor(node)

    def _assert(self, node: fx.Node, check: Any, what: str) -> None:
        with self._graph.inserting_after(node):
            checked = self._graph.call_function(check, (node, what))
        checked.meta.update(is_wrapped=True, nn_module_stack=dict(node.meta.get("nn_module_stack", {})))
        node.replace_all_uses_with(checked, delete_user_cb=lambda user: user is not checked)

    def _may_be_none(self, node: fx.Node) -> bool:
        is_asserted = any(user.target is expect_some for user in node.users)
        return node.target is operator.getitem and not is_asserted and self._may_hold_none(node.args[0])

    def _may_hold_none(self, value: Any) -> bool:
        """Whether what is taken out of a value may be None: it came from outside, or from where anything may."""
        match value.op if isinstance(value, fx.Node) else "":
            case "placeholder":
                return True
            case "call_module":
                module = self._root.get_submodule(str(value.target))
                return isinstance(module, nn.Identity) or not is_plain_layer(module)
            case "call_function" if value.target in (operator.getitem, unpack, expect_some, expect_tensor):
                return value.target is not expect_tensor and self._may_hold_none(value.args[0])
            case "call_function":
                return value.target in _MAYBE_NONE
        return False

    def _enforces_tensor(self, node: fx.Node) -> bool:
        """Whether some use of the value fails by itself when the value is None."""
        for user in node.users:
            first = bool(user.args) and user.args[0] is node
            match user.op:
                case "call_method" if first:
                    return True
                case "call_function" if user.target in _ACCEPT_NONE or user.target is expect_tensor:
                    continue
                case "call_function" if first:
                    return True
                case "call_function" if getattr(user.target, "__module__", "") == "_operator":
                    if user.target not in (operator.getitem, operator.setitem):  # x[None] is a view
                        return True
                case "call_module" if first and self._refuses_none(user):
                    return True
        return False

    def _refuses_none(self, user: fx.Node) -> bool:
        kind = user.meta["nn_module_stack"][user.target][1]
        return str(kind.__module__).startswith("torch.") and not issubclass(kind, nn.Identity)


def says_kinds_of_tensors(frame: types.FrameType) -> bool:
    """Whether a name in running code is that of a class of tensors, of which not every tensor is an instance."""
    names, met = names_in(frame.f_code), set[int]()
    waiting = [*frame.f_locals.values(), *_under(names, frame.f_globals)]
    while waiting:
        value = waiting.pop()
        kind = type(value)  # what is traced must not be asked for its class
        if kind is tuple:
            waiting += value
        elif issubclass(kind, types.ModuleType) and id(value) not in met:
            met.add(id(value))
            waiting += _under(names, vars(value))
        elif issubclass(kind, type) and _is_kind_of_tensors(value):
            return True
    return False


def _is_kind_of_tensors(kind: type) -> bool:
    return type(kind) is type(torch.FloatTensor) or (kind is not Tensor and issubclass(kind, Tensor))


def _under(names: Iterable[str], space: Mapping[str, Any]) -> list[Any]:
    return [space[name] for name in names if name in space]
