"""The graph that a recorder writes, and which of its nodes gives which of the values at hand."""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from . import calls
from .errors import CaptureError
from .shapes import RANK, has_fixed_rank, source
from .sizes import SYMBOLIC, SizeNode, symbolic, veiled
from .structure import PLAIN, fields_of, is_record, recipe, replace_field
from .torch_calls import GETATTR, cone, follows_from_sizes, is_known_at_once, may_write, written

_DTYPES = {int: torch.int64, float: torch.float64, bool: torch.bool}
_OUTSIDE = "a tensor made at trace time or kept outside the module"

Mark: TypeAlias = tuple[fx.Node | None, int]


class Unrecordable(Exception):  # noqa: N818  not an error of the model's
    """A graph cannot hold something."""


@dataclass(frozen=True)
class Origin:
    """Where a value comes from: a node, and the way from what it gives to the value."""

    node: fx.Node
    steps: tuple[tuple[Callable[..., Any], Any], ...] = ()

    def item(self, key: Any) -> "Origin":
        return Origin(self.node, (*self.steps, (operator.getitem, key)))

    def attribute(self, name: str) -> "Origin":
        return Origin(self.node, (*self.steps, (GETATTR, name)))

    def __str__(self) -> str:
        return self.node.name + "".join(f"[{key!r}]" if how is not GETATTR else f".{key}" for how, key in self.steps)


class Writer:
    """A graph in the making.

    Attributes:
        scope: the path and class of the modules around what is written.
        kept: objects that the graph reads under these names.
        refuse: is told what a graph cannot hold, and returns.
        is_kept: whether an object is part of the model's state.
        writes: whether anything is written now.
        veils: whether objects were handed out that can only be passed on.
    """

    def __init__(
        self,
        tensors: Mapping[int, str],
        child: str,
        refuse: Callable[[str], None],
        is_kept: Callable[[Any], bool],
    ) -> None:
        self.graph = fx.Graph()
        self.scope: list[tuple[str, type]] = []
        self.kept: dict[str, Any] = {}
        self.refuse, self.is_kept = refuse, is_kept
        self.writes, self.veils = True, False
        self._tensors, self._child = tensors, child
        self._known: dict[int, tuple[Any, Origin]] = {}
        self._log: list[tuple[int, tuple[Any, Origin] | None]] = []
        self._same: dict[int, tuple[Tensor, Tensor]] = {}
        self._parts: dict[tuple[fx.Node, Any], fx.Node] = {}
        self._computed: dict[fx.Node, SizeNode] = {}
        self._assumed: dict[str, fx.Node] = {}
        self._decided: list[tuple[fx.Node, bool]] = []
        self._open: set[fx.Node] = set()
        self._ranked: set[fx.Node] = set()
        self._written: set[fx.Node] = set()
        self._first: set[fx.Node] = set()
        self._head: fx.Node | None = None

    # Nodes.

    def node(self, op: str, target: Any, args: Any = (), kwargs: Any = None) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs or {})
        node.meta["nn_module_stack"] = {path: (path, kind) for path, kind in self.scope}
        if op in ("call_function", "call_method") and may_write(node):
            self.note_written(node)
        return node

    def note_written(self, node: fx.Node) -> None:
        """Note that a node may write into its arguments."""
        self._written |= written(node)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a function that re-tracing must keep as a node."""
        node = self.node("call_function", function, args, kwargs)
        node.meta["is_wrapped"] = True
        return node

    def mark(self) -> Mark:
        """Where the graph, and what is known, stand."""
        return next(iter(reversed(self.graph.nodes)), None), len(self._log)

    def roll_back(self, mark: Mark) -> None:
        """Take back what was written and learned since a mark."""
        last, length = mark
        while (node := self.mark()[0]) is not last and node is not None:
            self.graph.erase_node(node)
        while len(self._log) > length:
            identity, before = self._log.pop()
            if before is None:
                del self._known[identity]
            else:
                self._known[identity] = before

    # Values.

    def place(self, values: Mapping[str, Any], nodes: Mapping[str, fx.Node]) -> dict[str, Any]:
        """Learn the root's arguments from their placeholders; returns what to call the root with."""
        self._head = self.mark()[0]
        self._open.update(nodes[name] for name in values)
        if any(not is_plain_argument(value) for value in values.values()):
            raise Unrecordable("is given an object")
        return {name: self.bound(value, Origin(nodes[name]), constants=True) for name, value in values.items()}

    def is_kept_tensor(self, value: Tensor) -> bool:
        """Whether a tensor is one that the model keeps: the same object at each call."""
        return id(value) in self._tensors

    def converted(self, value: Any) -> Any:
        """The tensor that `to` was asked to convert, and gave as it was; None if it was not so."""
        return self._same[id(value)][1] if id(value) in self._same else None

    def known(self) -> Iterable[Any]:
        """Every value that the graph gives."""
        return (value for value, _ in self._known.values())

    def learn(self, value: Any, origin: Origin) -> Any:
        if isinstance(value, Tensor) and not origin.steps:
            origin.node.meta[RANK] = _rank(value)
        self._log.append((id(value), self._known.get(id(value))))
        self._known[id(value)] = (value, origin)
        return value

    def bound(self, value: Any, origin: Origin, constants: bool = False) -> Any:
        """A value with every tensor in it known; one that was known before, as a new alias of itself.

        Args:
            constants: whether plain numbers and the like are taken as they are.
        """
        kind = type(value)
        if isinstance(value, Tensor):
            if id(value) in self._known or id(value) in self._tensors:
                original = value
                with torch._C.DisableTorchFunction():
                    value = torch.ops.aten.alias(value)
                if origin.node.target == "to":
                    self._same[id(value)] = (value, original)
            return self.learn(value, origin)
        if value is None or (constants and isinstance(value, PLAIN)):
            return value
        if isinstance(value, tuple):
            parts = [self.bound(one, origin.item(i), constants) for i, one in enumerate(value)]
            if all(map(operator.is_, parts, value)):
                return value
            return kind(*parts) if hasattr(value, "_fields") else kind(parts)
        if kind in (list, dict):
            pairs = value.items() if kind is dict else enumerate(value)
            if any(self.bound(one, origin.item(key), constants) is not one for key, one in pairs):
                raise Unrecordable(f"finds one of its own values in a {kind.__name__} that {origin} is")
            return value
        if is_record(value):
            for key, one in fields_of(value):
                if (part := self.bound(one, origin.attribute(key), constants)) is not one:
                    value = replace_field(value, key, part)
            return value
        if isinstance(value, PLAIN):
            raise Unrecordable(f"takes a {kind.__name__} from what {origin.node.name!r} returns")
        self.veils = True
        return self.learn(veiled(value, self.refuse), origin)

    def argument(self, value: Any) -> Any:
        """A value as an argument of a node."""
        kind = type(value)
        if id(value) in self._known:
            return self._found(self._known[id(value)][1])
        if kind in SYMBOLIC:
            return self.size_node(value.node)
        if isinstance(value, Tensor):
            if id(value) not in self._tensors:
                raise Unrecordable(f"uses {_OUTSIDE}")
            node = self.node("get_attr", self._tensors[id(value)])
            node.meta[RANK] = _rank(value)
            return node
        if kind in (tuple, torch.Size):
            return tuple(self.argument(one) for one in value)
        if kind is list:
            return [self.argument(one) for one in value]
        if kind is dict:
            return {key: self.argument(one) for key, one in value.items()}
        if kind is slice:
            return slice(*(self.argument(one) for one in (value.start, value.stop, value.step)))
        if kind is type and value in _DTYPES:
            return _DTYPES[value]
        if isinstance(value, PLAIN):
            return value.item() if kind.__module__ == "numpy" else value  # type: ignore[union-attr]
        raise Unrecordable(f"passes a {kind.__name__}")

    def output(self, value: Any) -> Any:
        """What the root returned, as an argument of the output node."""
        kind = type(value)
        if kind in (tuple, list):
            return kind([self.output(one) for one in value])
        if kind is dict:
            return {key: self.output(one) for key, one in value.items()}
        if kind is torch.Size:
            raise Unrecordable("returns a torch.Size")
        if isinstance(value, (*PLAIN, Tensor, *SYMBOLIC)) or id(value) in self._known:
            return self.argument(value)
        if is_record(value) and _is_made_of_its_fields(value):
            return self.call(kind, **{key: self.output(one) for key, one in fields_of(value)})
        return self._made(value)

    def _made(self, value: Any) -> fx.Node:
        """An object that the forward made: how it is made of values is kept, and done anew at each call."""
        parts: list[Any] = []

        def take(part: Any) -> int:
            parts.append(self.argument(part))
            return len(parts) - 1

        try:
            how = recipe(value, (Tensor, *SYMBOLIC), take, self.is_kept)
        except CaptureError as error:
            raise Unrecordable(f"returns a {type(value).__name__}, and {error}") from None
        name = f"recipe_{len(self.kept)}"
        self.kept[name] = how
        return self.call(calls.make, self.node("get_attr", f"{self._child}.{name}"), parts)

    def _found(self, origin: Origin) -> fx.Node:
        node = origin.node
        for step in origin.steps:
            part = self._parts.get((node, step))
            if part is None or part._erased:
                behind = self._head if node.op == "placeholder" and self._head is not None else node
                with self.graph.inserting_after(behind):
                    part = self.graph.call_function(step[0], (node, step[1]))
                part.meta["nn_module_stack"] = dict(node.meta.get("nn_module_stack", {}))
                self._parts[node, step] = part
            node = part
        return node

    # Sizes.

    def sizes(self, tensor: Tensor) -> list[Any]:
        """The sizes of a tensor, as symbolic numbers; those of parameters and buffers are fixed."""
        sizes = list(torch.Tensor.size(tensor))
        if id(tensor) in self._known:
            origin = self._known[id(tensor)][1]
            return [self.size(origin, dim, size) for dim, size in enumerate(sizes)]
        if id(tensor) in self._tensors:
            self.expect(self.node("call_method", "size", (self.argument(tensor),)), tuple(sizes))
        else:
            self.refuse(f"asks for the size of {_OUTSIDE}")
        return sizes

    def size(self, origin: Origin, dim: int, value: int) -> Any:
        """The size of a value along a dimension, as it follows from the sizes of others."""
        if not origin.steps:
            found = source(origin.node, dim)
            if isinstance(found, int):
                return found
            if isinstance(found, tuple):
                origin, dim = Origin(found[0]), found[1]
            elif found in self._computed:
                return symbolic(self._computed[found])
        return symbolic(SizeNode(self, value, torch.Tensor.size, (origin, dim)))

    def follows(self, size: Any) -> bool:
        """Whether a size follows from those of arguments and state, so that what it is can be asked first."""
        if isinstance(size, SYMBOLIC):
            size = size.node
        if isinstance(size, Origin):
            return not size.steps and (size.node.op == "get_attr" or follows_from_sizes(size.node))
        return not isinstance(size, SizeNode) or all(map(self.follows, size.operands))

    def number(self, node: fx.Node, value: int) -> Any:
        """What `item` gives, as a symbolic number: like a size, it is assumed only where its value is asked for."""
        size = SizeNode(self, value, torch.Tensor.item, (Origin(node.args[0]),))  # type: ignore[arg-type]
        size.node = node
        self._computed[node] = size
        return symbolic(size)

    def size_node(self, size: SizeNode) -> Any:
        if size.operation is None:
            return size.value
        if size.node is None or size.node._erased:
            if size.operation is torch.Tensor.size:
                origin, dim = size.operands
                size.node = self.node("call_method", "size", (self._found(origin), dim))
            elif size.operation is torch.Tensor.item:
                raise Unrecordable("uses a number that a module took which stays whole")  # it may be another by now
            elif size.operation.__name__ == "<lambda>":
                raise Unrecordable("chooses between sizes")
            else:
                operands = tuple(self.size_node(operand) for operand in size.operands)
                size.node = self.node("call_function", size.operation, operands)
            self._computed[size.node] = size
        return size.node

    # What is taken for granted.

    def assume(self, size: SizeNode) -> None:
        if not self.writes:
            return
        what = str(size)
        if what not in self._assumed or self._assumed[what]._erased:
            try:
                node = self.size_node(size)
                self._assumed[what] = self.call(calls.expect_same, node, size.value, what)
                if follows_from_sizes(node) or self.can_be_asked_first(node):
                    self._first.add(self._assumed[what])
            except Unrecordable as failure:
                self.refuse(str(failure))

    def expect(self, node: fx.Node, answer: Any) -> None:
        """Check where it is asked that a question has the answer it had."""
        self.call(calls.expect_same, node, answer, node.name)

    def assume_rank(self, tensor: Tensor) -> None:
        """The number of a value's dimensions was asked for; it is checked unless it follows from the arguments'."""
        known = self._known.get(id(tensor))
        if known is not None and (known[1].steps or not has_fixed_rank(known[1].node)):
            node = self._found(known[1])
            if node not in self._ranked:
                self._ranked.add(node)
                self.expect(self.node("call_method", "dim", (node,)), _rank(tensor))

    def can_be_asked_first(self, *nodes: fx.Node) -> bool:
        """Whether what nodes give follows from the root's arguments, and these have not been written to so far."""
        return is_known_at_once(*nodes) and self._written.isdisjoint(one for node in nodes for one in cone(node))

    def decide(self, node: fx.Node, answer: bool) -> None:
        """Note how a question about values was answered that follows from the root's arguments."""
        self._decided.append((node, answer))

    def questions(self) -> tuple[fx.Graph, tuple[Any, ...], bool]:
        """What was asked of the root's arguments alone, as a graph of its own; what it gave; whether it takes values.

        Whatever only the questions need is taken out of the graph.
        """
        asked: list[tuple[Any, Any]] = [(node, answer) for node, answer in self._decided if not node._erased]
        checks: list[Any] = [c for c in self._assumed.values() if c in self._first and not c._erased]
        takes_values = bool(asked) or not all(follows_from_sizes(check.args[0]) for check in checks)
        asked += [(check.args[0], check.args[1]) for check in checks]
        graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
        needed = {node for one, _ in asked for node in cone(one)}
        for node in self.graph.nodes:
            if node in self._open or node in needed:
                new[node] = graph.node_copy(node, new.__getitem__)
        graph.output(tuple(new[node] for node, _ in asked))
        for check in checks:
            self.graph.erase_node(check)
        for node in reversed(self.graph.nodes):
            if node in needed and not node.users and node.op != "placeholder":
                self.graph.erase_node(node)
        return graph, tuple(answer for _, answer in asked), takes_values


def _rank(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.dim()


def is_plain_argument(value: Any) -> bool:
    """Whether an argument is a tensor, a plain value, or a container of such: nothing that has an identity."""
    kind = type(value)
    if kind in (tuple, list):
        return all(map(is_plain_argument, value))
    if kind is dict:
        return all(type(key) in (str, int) for key in value) and all(map(is_plain_argument, value.values()))
    return kind is Tensor or (isinstance(value, PLAIN) and kind.__module__ in ("builtins", "torch"))


def _is_made_of_its_fields(value: Any) -> bool:
    """Whether calling a dataclass with the fields of an instance gives the same."""
    fields = dict(fields_of(value))
    try:
        made = type(value)(**fields)
        again = dict(fields_of(made))
    except Exception:
        return False
    if vars(made).keys() != vars(value).keys():
        return False
    return fields.keys() == again.keys() and all(fields[name] is again[name] for name in fields)
