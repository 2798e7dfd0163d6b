"""A recorder: it runs a forward for real, on an example, and writes down what it does.

`SoundTracer` asks nothing of the caller and so can know little: of what kind a value is, how many dimensions it has,
what an opaque module returns. A recorder sees all of it, since it runs the model: every torch call becomes a node,
every module call that a graph can hold is inlined, and Python takes the turns that it takes. What the turns depended
on is assumed, and every assumption is checked when the graph runs: sizes are symbolic (`sizes`), and the rest is in
`Assumed`.

Nothing is refused while it runs. What a graph cannot hold makes the innermost module whose forward is being recorded
*whole*: what was written since it was entered is rolled back, the rest of it runs unrecorded, and it becomes one call.
"""

import copy
import functools
import operator
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from . import calls
from .executing import inside_handler, watched
from .interception import intercepted
from .proxies import Untraceable
from .shapes import RANK, source
from .side_channels import Ledger
from .sizes import SYMBOLIC, SizeNode, concrete, symbolic, veiled
from .snapshots import Snapshot, rng_state
from .structure import Hole, fields_of, is_record, likeness, map_tensors, replace_field
from .tracing import _ambient_state, _tensor_paths, described, is_layer, is_plain_layer, whole_reason

_CONSTANTS = (
    bool, int, float, complex, str, type(None), type(...), torch.dtype, torch.device, torch.layout,
    torch.memory_format,
)  # fmt: skip
_RANK = {"dim", "ndim", "ndimension"}
_DTYPE = {
    "dtype", "is_floating_point", "is_complex", "element_size", "itemsize", "layout", "is_sparse", "is_quantized",
    "is_nested", "is_tensor", "result_type", "is_signed", "is_mkldnn", "is_sparse_csr",
}  # fmt: skip
_DEVICE = {"device", "is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "get_device"}
_OPERATORS = {
    f"__{name}__": getattr(operator, name)
    for name in (
        "getitem", "setitem", "eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod",
        "pow", "matmul", "and_", "or_", "xor", "neg", "invert", "lshift", "rshift", "iadd", "isub", "imul", "itruediv",
        "ifloordiv", "imod", "ipow", "iand", "ior", "ixor",
    )
} | {"__and__": operator.and_, "__or__": operator.or_}  # fmt: skip
_REVERSED = {
    f"__r{name}__": getattr(operator, name)
    for name in ("sub", "truediv", "floordiv", "mod", "pow", "matmul", "lshift", "rshift")
}
_REFUSED = {
    "backward", "register_hook", "retain_grad", "requires_grad_", "detach_", "resize_", "resize_as_", "set_",
    "share_memory_", "data", "grad", "register_post_accumulate_grad_hook", "__deepcopy__", "manual_seed", "seed",
    "normal_", "apply_", "map_", "storage",
}  # fmt: skip
_SILENT = {"_set_grad_enabled"}  # what it changes is noticed at the next call


_DECISIONS = {"__bool__", "__contains__", "item", "is_nonzero", "equal", "allclose"}
_PURE = {
    "getitem", "all", "any", "eq", "ne", "lt", "le", "gt", "ge", "sum", "min", "max", "amin", "amax", "bool", "to",
    "long", "int", "float", "isnan", "isinf", "logical_not", "logical_and", "logical_or", "invert", "size", "view",
    "reshape", "flatten", "unsqueeze", "squeeze", "expand", "cumsum", "diff", "add", "sub", "mul", "is_", "unpack",
    "ones", "zeros", "arange", "full", "ones_like", "zeros_like", "contiguous", "type", "where", "getattr", "and_",
    "or_", "not_", "masked_fill", "transpose", "permute", "clone", "detach", "new_ones", "new_zeros", "__invert__",
    "__and__", "__or__", "abs", "count_nonzero", "floordiv", "clamp", "isin", "item",
}  # fmt: skip


_CALL = nn.Module.__call__


class _Unrecordable(Exception):
    """A graph cannot hold something."""


@dataclass(frozen=True)
class _Origin:
    """Where a value comes from: a node, and the way from what it gives to the value."""

    node: fx.Node
    steps: tuple[tuple[str, Any], ...] = ()

    def at(self, kind: str, key: Any) -> "_Origin":
        return _Origin(self.node, (*self.steps, (kind, key)))

    def __str__(self) -> str:
        return self.node.name + "".join(f"[{k!r}]" if kind == "item" else f".{k}" for kind, k in self.steps)


@dataclass
class _Frame:
    """A module whose forward is being recorded.

    Attributes:
        call: its arguments, in case it becomes one call.
        last: the last node before it was entered.
        logged, heard: how much had been learned before.
        opaque: what was whole before.
        reason: why it is whole, once it is.
    """

    path: str
    module: nn.Module
    call: tuple[Any, Any]
    last: fx.Node | None
    logged: int
    heard: tuple[int, ...]
    opaque: dict[str, str]
    reason: str | None = None


@dataclass
class Asked:
    """What the recorded forwards asked, beside sizes.

    Attributes:
        kinds: whether they asked for the data type or the device of a tensor.
        modes: the paths of the modules whose `training` they read.
    """

    kinds: bool = False
    modes: dict[str, None] = field(default_factory=dict)


class Recorder:
    """Records one call of one root; see the module docstring."""

    def __init__(
        self, root: nn.Module, root_alias: str, forced: Mapping[str, str], also: tuple[Any, ...], watches: bool
    ) -> None:
        self.root = root
        self._alias = root_alias.partition(".")[0]
        self.kept: dict[str, Any] = {}
        self.graph = fx.Graph()
        self.opaque: dict[str, str] = {}
        self.ledger = Ledger()
        self.asked = Asked()
        self.failed: dict[str, str] = {}
        self._forced = forced
        self._identity = threading.get_ident()
        self._recording = True
        self._frames: list[_Frame] = []
        self._paths = {module: path for path, module in reversed([*root.named_modules(remove_duplicate=False)])}
        self._tensors = _tensor_paths(self._paths, root_alias)
        self._known: dict[int, tuple[Any, _Origin]] = {}
        self._log: list[tuple[int, tuple[Any, _Origin] | None]] = []
        self._parts: dict[tuple[fx.Node, tuple[str, Any]], fx.Node] = {}
        self._assumed: dict[str, fx.Node] = {}
        self._head: fx.Node | None = None
        self._also, self._watches = also, watches
        self._before = self._state()
        self.state = self._before[0]
        self._open: set[fx.Node] = set()
        self._computed: dict[fx.Node, SizeNode] = {}
        self._suspicious = False
        self._decisions: list[tuple[fx.Node, bool]] = []

    # What interception asks.

    @property
    def thread(self) -> int:
        """The thread whose doings are recorded; none while something runs unrecorded."""
        return self._identity if self._recording else 0

    def mode(self) -> TorchFunctionMode:
        return _Listening(self)

    def give_up(self, reason: str) -> None:
        """Make the innermost module whole; it runs on, unrecorded."""
        if self._recording:
            self._frames[-1].reason = reason
            self._recording = False

    def note_read(self, module: nn.Module, name: str, value: Any) -> None:
        if hasattr(type(value), "__next__"):
            self.give_up(f"reads the iterator {type(module).__name__}.{name}")
        elif module in self._paths:
            self.ledger.read(self._frames[-1].path, self._paths[module], name, value)

    def attribute(self, module: nn.Module, name: str, value: Any) -> Any:
        if not isinstance(value, nn.Module | Tensor):
            self.note_read(module, name, value)
        return value

    def note_change(self, module: nn.Module, what: str) -> None:
        if module in self._paths:  # others were made by the forward itself: a slice of a ModuleList
            self.give_up(what)

    def read_training(self, module: nn.Module) -> bool:
        if module in self._paths:
            self.asked.modes[self._paths[module]] = None
        else:
            self.give_up("reads the mode of a module that is none of the model's")
        own = vars(module)
        return bool(own["training"]) if "training" in own else True

    # Modules.

    def record(self, call: Callable[[], Any]) -> bool:
        """Run the root's forward and finish the graph; whether it changed any state beside tensors.

        Raises:
            Untraceable: the root itself is whole.
        """
        self._head = self._last()
        with intercepted(self):
            self._ambient = _ambient()
            frame = self._enter("", self.root, (), {})
            self.ledger.traced("", self.root)
            try:
                with watched(self):
                    result = call()
                self._check_state()
                if frame.reason is None:
                    self.graph.output(self._argument_of_output(result))
            except _Unrecordable as failure:
                frame.reason = str(failure)
            finally:
                self._recording = False
        if frame.reason is not None:
            raise Untraceable(frame.reason)
        self.questions, self.answers = self._questions()
        return self._suspicious or self._changed() is not None

    def call_submodule(self, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self._paths.get(module)
        if _ambient() != self._ambient:
            self.give_up("runs part of itself in another grad, autocast or inference mode")
        elif path == "":
            self.give_up("calls itself")
        elif self._recording and (catcher := inside_handler()):
            self.give_up(f"{catcher} catches exceptions")
        elif type(module).__call__ is not nn.Module.__call__ and not isinstance(module, fx.GraphModule):
            self.give_up(f"calls {path!r}, whose class overrides __call__")
        elif path is None and (reason := whole_reason(module, runs=True)) and not is_layer(module):
            self.give_up(f"calls a {type(module).__name__}, which is none of the model's modules and {reason}")
        if not self._recording:
            return nn.Module.__call__(module, *concrete(args), **concrete(kwargs))
        if path is None:
            return run(*args, **kwargs)  # of its own making, or kept in a plain attribute: its tensors are not known
        reason = None
        if not is_layer(module):
            reason = self._forced.get(path) or whole_reason(module, runs=True)
            if reason is None:
                hooked = module._forward_hooks or module._forward_pre_hooks
                return self._inlined(path, module, functools.partial(_CALL, module) if hooked else run, args, kwargs)
        if not is_plain_layer(module):
            self._check_state()
        if not self._recording:
            return nn.Module.__call__(module, *concrete(args), **concrete(kwargs))
        frame = self._enter(path, module, args, kwargs)
        if reason is not None and not self._watches:
            self._suspect(module)
        self.give_up(reason or "")
        try:
            result = nn.Module.__call__(module, *concrete(args), **concrete(kwargs))
        finally:
            self._leave()
        return self._whole(frame, result)

    def _inlined(self, path: str, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        frame = self._enter(path, module, args, kwargs)
        self.ledger.traced(path, module)
        try:
            result = run(*args, **kwargs)
            self._check_state()
        except Exception as error:
            self.failed = self.failed or {path: described(error)}
            raise
        finally:
            self._leave()
        return result if frame.reason is None else self._whole(frame, result)

    def _state(self) -> tuple[Snapshot, Any]:
        with torch._C.DisableTorchFunction():
            return Snapshot(self._paths, also=self._also), rng_state()[1:]

    def _changed(self) -> str | None:
        """What running the forwards has changed beside tensors, if anything."""
        with torch._C.DisableTorchFunction():
            if changed := self._before[0].changed():
                return f"changes {changed}"
            return "draws random numbers that a graph would freeze" if rng_state()[1:] != self._before[1] else None

    def _check_state(self) -> None:
        if self._watches and self._recording and (changed := self._changed()):
            self.give_up(changed)

    def _suspect(self, module: nn.Module) -> None:
        """A module that runs as it is may see what the forward around it has changed, and changes back later."""
        with torch._C.DisableTorchFunction():
            self._suspicious |= self._before[0].changed(Snapshot(module.modules())) is not None

    def _enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> _Frame:
        call = (_held(args), _held(kwargs))
        frame = _Frame(path, module, call, self._last(), len(self._log), self.ledger.mark(), dict(self.opaque))
        self._frames.append(frame)
        return frame

    def _leave(self) -> None:
        frame = self._frames.pop()
        if frame.reason is not None:
            self._recording = True
            self._roll_back(frame)
            if self._watches and not is_plain_layer(frame.module):
                self._before = self._state()

    def _whole(self, frame: _Frame, result: Any) -> Any:
        """What a module gave that has become one call."""
        layer = is_layer(frame.module)
        try:
            args, kwargs = (self._argument(part) for part in frame.call)
            node = self._node("call_module", frame.path, tuple(args), kwargs)
            node.meta["nn_module_stack"][frame.path] = (frame.path, type(frame.module))
            if layer:
                self.ledger.runs_layer(frame.path, frame.module)
                return self._bound(result, _Origin(node))
            if _holds_mutable((*frame.call[0], *frame.call[1].values())):
                raise _Unrecordable(f"passes a list or dict to opaque {frame.path!r}, which may change it")
            self.opaque[frame.path] = frame.reason or ""
            self.ledger.runs(frame.path, frame.module)
            what = f"what {frame.path!r} returned"
            with torch._C.DisableTorchFunction():
                node = self._call(calls.expect_like, node, likeness(result), what)
            return self._bound(result, _Origin(node))
        except _Unrecordable as failure:
            self.give_up(str(failure))
            return result

    # Torch calls.

    def torch_call(self, function: Any, args: Any, kwargs: Any) -> Any:
        """A torch function, method or property of a tensor is called."""
        name = _name_of(function)
        if self._recording and _ambient(listening=False) != self._ambient:
            self.give_up("runs part of itself in another grad, autocast or inference mode")
        if self._recording and name.startswith("sym_"):
            return function(*args, **kwargs)
        if not self._recording or name in _SILENT:
            return function(*concrete(args), **concrete(kwargs))
        first = args[0] if args else None
        if isinstance(first, Tensor) and name in ("shape", "size", "numel", "nelement", "__len__"):
            return self._sizes(name, first, *args[1:], **kwargs)
        if catcher := inside_handler():
            self.give_up(f"{catcher} catches exceptions")
            return function(*concrete(args), **concrete(kwargs))
        if name in _REFUSED or (getattr(function, "__module__", None) or "").startswith("torch.autograd"):
            self.give_up(f"calls {name} in its forward")
            return function(*concrete(args), **concrete(kwargs))
        try:
            made = [self._argument(args), self._argument(kwargs)]
        except _Unrecordable as failure:
            self.give_up(str(failure))
        result = function(*concrete(args), **concrete(kwargs))
        if not self._recording:
            return result
        if name in _RANK | _DTYPE | _DEVICE:
            return result if name in _RANK else self._kind_asked(name, result)
        if name == "__bool__" and _is_certain(made[0][0]):
            return result
        if isinstance(result, bool) and name in _DECISIONS and (asked := self._decided(function, name, made)):
            self._decisions.append((asked, result))
            return result
        if not _holds_only_tensors(result) and name != "__setitem__":
            self.give_up(f"asks {name} of a value" if name != "__bool__" else "branches on a value")
            return result
        try:
            node = self._node(*_as_node(function, name, *made))
            in_place = name.endswith("_") and not name.endswith("__")
            if isinstance(result, Tensor):
                return self._learn(result, _Origin(node)) if in_place else self._bound(result, _Origin(node))
            if type(result) in (tuple, list):
                self._count(name, made, result, node)
                node = self._call(calls.unpack, node, len(result))
            return self._bound(result, _Origin(node))
        except _Unrecordable as failure:
            self.give_up(str(failure))
            return result

    def _decided(self, function: Any, name: str, made: list[Any]) -> fx.Node | None:
        """The node of a question whose answer follows from the root's arguments alone, and so can be asked before
        anything else is done."""
        if not all(map(self._is_known_at_once, _nodes_in(made))):
            return None
        if name == "__bool__":
            return self._node("call_function", bool, (made[0][0],), {})
        return self._node(*_as_node(function, name, *made))

    def _count(self, name: str, made: list[Any], result: Any, node: fx.Node) -> None:
        """How many parts there are is taken for granted. Where they are as many as a size says, that can be asked
        before anything is done."""
        args, kwargs = made
        if name == "unbind" and RANK in args[0].meta:
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            dim = dim % args[0].meta[RANK]
            size = self._size(_Origin(args[0]), dim, len(result))
            if type(size) in SYMBOLIC:
                self.assume(size.node)

    def _kind_asked(self, name: str, answer: Any) -> Any:
        """A data type or a device is assumed to stay as it is; where it costs no depth, the module stays whole."""
        module = self._frames[-1].module
        if not module._modules and module._parameters and len(self._frames) > 1:
            self.give_up(f"asks {name} of a value")
        self.asked.kinds = True
        return answer

    def _sizes(self, name: str, tensor: Tensor, dim: Any = None) -> Any:
        """The sizes of a tensor, as symbolic numbers; those of parameters and buffers are fixed."""
        sizes = torch.Tensor.size(tensor)
        if id(tensor) in self._known:
            origin = self._known[id(tensor)][1]
            known = [self._size(origin, d, n) for d, n in enumerate(sizes)]
        elif id(tensor) in self._tensors:
            known = list(sizes)
        else:
            self.give_up("asks for the size of a tensor made at trace time or kept outside the module")
            known = list(sizes)
        if name in ("numel", "nelement"):
            total: Any = 1
            for n in known:
                total = total * n
            return total
        if name == "__len__":
            return int(known[0])
        return torch.Size(known) if dim is None else known[concrete(dim)]

    def _size(self, origin: _Origin, dim: int, value: int) -> Any:
        if not origin.steps:
            found = source(origin.node, dim)
            if isinstance(found, int):
                return found
            if isinstance(found, tuple):
                origin, dim = _Origin(found[0]), found[1]
            elif found in self._computed:
                return symbolic(self._computed[found])
        return symbolic(SizeNode(self, value, torch.Tensor.size, (origin, dim)))

    # What sizes ask.

    def size_node(self, size: SizeNode) -> Any:
        if size.operation is None:
            return size.value
        if size.node is None or size.node._erased:
            if size.operation is torch.Tensor.size:
                origin, dim = size.operands
                size.node = self._node("call_method", "size", (self._materialized(origin), dim), {})
            elif size.operation.__name__ == "<lambda>":
                raise _Unrecordable("chooses between sizes")
            else:
                operands = tuple(self.size_node(operand) for operand in size.operands)
                size.node = self._node("call_function", size.operation, operands, {})
            self._computed[size.node] = size
        return size.node

    def assume(self, size: SizeNode) -> None:
        if not self._recording:
            return
        what = str(size)
        if what not in self._assumed or self._assumed[what]._erased:
            try:
                self._assumed[what] = self._call(calls.expect_same, self.size_node(size), size.value, what)
            except _Unrecordable as failure:
                self.give_up(str(failure))

    def _questions(self) -> tuple[fx.Graph, tuple[Any, ...]]:
        """What was asked of the root's arguments alone, as a graph of its own, and what it gave. Whatever only it
        needs is taken out of the recorded graph."""
        self.asks_values = any(not node._erased for node, _ in self._decisions)
        asked: list[tuple[Any, Any, fx.Node | None]] = [
            (node, answer, None) for node, answer in self._decisions if not node._erased
        ]
        for check in self._assumed.values():
            if not check._erased and self._is_known_at_once(check.args[0]):
                asked.append((check.args[0], check.args[1], check))
        graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
        needed = {node for one, _, _ in asked for node in _cone(one)}
        for node in self.graph.nodes:
            if node in self._open or node in needed:
                new[node] = graph.node_copy(node, new.__getitem__)
        graph.output(tuple(new[node] for node, _, _ in asked))
        for _, _, one in asked:
            if one is not None:
                self.graph.erase_node(one)
        for node in reversed(self.graph.nodes):
            if node in needed and not node.users and node.op != "placeholder":
                self.graph.erase_node(node)
        return graph, tuple(answer for _, answer, _ in asked)

    @staticmethod
    def _is_known_at_once(node: Any) -> bool:
        return all(one.op == "placeholder" or _is_pure(one) for one in _cone(node))

    # Values and nodes.

    def learn(self, value: Any, node: fx.Node) -> Any:
        """An argument of the root, and its placeholder; returns what to call the root with."""
        self._open.add(node)
        return self._bound(value, _Origin(node), scalars=True)

    def _learn(self, value: Any, origin: _Origin) -> Any:
        if isinstance(value, Tensor) and not origin.steps:
            origin.node.meta[RANK] = _rank(value)
        self._log.append((id(value), self._known.get(id(value))))
        self._known[id(value)] = (value, origin)
        return value

    def _bound(self, value: Any, origin: _Origin, scalars: bool = False) -> Any:
        """A value with every tensor in it known; one that was known before, as a new alias of itself."""
        kind = type(value)
        if isinstance(value, Tensor):
            if id(value) in self._known or id(value) in self._tensors:
                with torch._C.DisableTorchFunction():
                    value = torch.ops.aten.alias(value)
            return self._learn(value, origin)
        if value is None:
            return value
        if isinstance(value, tuple) and (hasattr(value, "_fields") or kind is not tuple):
            parts = [self._bound(one, origin.at("item", i), scalars) for i, one in enumerate(value)]
            return kind(*parts) if hasattr(value, "_fields") else value if _same(parts, value) else kind(parts)
        if kind in (tuple, list):
            return kind([self._bound(one, origin.at("item", i), scalars) for i, one in enumerate(value)])
        if kind is dict:
            return {key: self._bound(one, origin.at("item", key), scalars) for key, one in value.items()}
        if is_record(value):
            for key, one in fields_of(value):
                if (part := self._bound(one, origin.at("attribute", key), scalars)) is not one:
                    value = replace_field(value, key, part)
            return value
        if scalars or not isinstance(value, _CONSTANTS):
            return value if isinstance(value, _CONSTANTS) else self._learn(veiled(value, self.give_up), origin)
        raise _Unrecordable(f"takes a {kind.__name__} from what {origin.node.name!r} returns")

    def _argument(self, value: Any) -> Any:
        """A value as an argument of a node."""
        kind = type(value)
        if id(value) in self._known:
            return self._materialized(self._known[id(value)][1])
        if kind in SYMBOLIC:
            return self.size_node(value.node)
        if isinstance(value, Tensor):
            if id(value) not in self._tensors:
                raise _Unrecordable("uses a tensor made at trace time or kept outside the module")
            node = self._node("get_attr", self._tensors[id(value)], (), {})
            node.meta[RANK] = _rank(value)
            return node
        if kind in (tuple, torch.Size):
            return tuple(self._argument(one) for one in value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            raise _Unrecordable(f"passes a {kind.__name__}")
        if kind is list:
            return [self._argument(one) for one in value]
        if kind is dict:
            return {key: self._argument(one) for key, one in value.items()}
        if kind is slice:
            return slice(*(self._argument(one) for one in (value.start, value.stop, value.step)))
        if value in (int, float, bool):
            return {int: torch.int64, float: torch.float64, bool: torch.bool}[value]
        if isinstance(value, _CONSTANTS) and kind.__module__ != "numpy":
            return value
        raise _Unrecordable(f"passes a {kind.__name__}")

    def _argument_of_output(self, value: Any) -> Any:
        kind = type(value)
        if is_record(value):
            fields = {key: self._argument_of_output(one) for key, one in fields_of(value)}
            if any(
                a is not b
                for (_, a), (_, b) in zip(fields_of(kind(**dict(fields_of(value)))), fields_of(value), strict=True)
            ):
                raise _Unrecordable(f"returns a {kind.__name__}, which cannot be made from its fields")
            node = self._node("call_function", kind, (), fields)
            node.meta["is_wrapped"] = True
            return node
        if kind in (tuple, list):
            return kind([self._argument_of_output(one) for one in value])
        if kind is dict:
            return {key: self._argument_of_output(one) for key, one in value.items()}
        if kind is torch.Size:
            raise _Unrecordable("returns a torch.Size")
        if isinstance(value, (*_CONSTANTS, Tensor, *SYMBOLIC)) or id(value) in self._known:
            return self._argument(value)
        return self._rebuilt(value)

    def _rebuilt(self, value: Any) -> fx.Node:
        """An object that the forward made: a skeleton of it is kept, and filled anew at each call."""
        parts: list[Any] = []

        def hole(part: Any) -> Hole:
            parts.append(self._argument(part))
            return Hole(len(parts) - 1)

        try:
            skeleton = copy.deepcopy(map_tensors(hole, value, (Tensor, *SYMBOLIC)))
        except Exception as error:
            raise _Unrecordable(f"returns a {type(value).__name__}: {described(error)}") from error
        name = f"skeleton_{len(self.kept)}"
        self.kept[name] = skeleton
        kept = self._node("get_attr", f"{self._alias}.{name}", (), {})
        return self._call(calls.fill, kept, parts)

    def _materialized(self, origin: _Origin) -> fx.Node:
        node = origin.node
        for step in origin.steps:
            part = self._parts.get((node, step))
            if part is None or part._erased:
                kind, key = step
                behind = self._head if node.op == "placeholder" and self._head is not None else node
                with self.graph.inserting_after(behind):
                    target = operator.getitem if kind == "item" else getattr
                    part = self.graph.call_function(target, (node, key))
                part.meta["nn_module_stack"] = dict(node.meta.get("nn_module_stack", {}))
                self._parts[node, step] = part
            node = part
        return node

    def _node(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta["nn_module_stack"] = {f.path: (f.path, type(f.module)) for f in self._frames}
        return node

    def _call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        node = self._node("call_function", function, args, {})
        node.meta["is_wrapped"] = True
        return node

    def _last(self) -> fx.Node | None:
        return next(iter(reversed(self.graph.nodes)), None)

    def _roll_back(self, frame: _Frame) -> None:
        while (node := self._last()) is not frame.last and node is not None:
            self.graph.erase_node(node)
        while len(self._log) > frame.logged:
            identity, before = self._log.pop()
            if before is None:
                del self._known[identity]
            else:
                self._known[identity] = before
        self.ledger.forget(frame.heard)
        self.opaque = frame.opaque


class _Listening(TorchFunctionMode):
    """Hands every torch call to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recorder.torch_call(func, args, kwargs or {})


def _ambient(listening: bool = True) -> tuple[object, ...]:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return (*_ambient_state(), torch.get_default_dtype(), torch._C._len_torch_function_stack() + (not listening),
            torch._C._len_torch_dispatch_stack(), hooks)  # fmt: skip


def _rank(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.dim()


def _name_of(function: Any) -> str:
    """The name of a function, method or property."""
    name = getattr(function, "__name__", "")
    return function.__self__.__name__ if name == "__get__" else name


def _as_node(function: Any, name: str, args: Any, kwargs: Any) -> tuple[str, Any, Any, Any]:
    if getattr(function, "__name__", "") == "__get__":
        return "call_function", getattr, (args[0], name), {}
    if is_tensor_method_or_property(function):
        if name in _OPERATORS:
            return "call_function", _OPERATORS[name], args, kwargs
        if name in _REVERSED:
            return "call_function", _REVERSED[name], (args[1], args[0]), kwargs
        return "call_method", name, args, kwargs
    return "call_function", function, args, kwargs


def _is_certain(node: Any) -> bool:
    """Whether a node asks whether something drawn from [0, 1) is negative: a layer that is dropped with probability 0."""
    if node.target != "lt" or not isinstance(node.args[0], fx.Node) or isinstance(node.args[1], fx.Node):
        return False
    return node.args[0].target is torch.rand and node.args[1] <= 0


def _nodes_in(arguments: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(arguments, found.append)
    return found


def _cone(node: fx.Node) -> set[fx.Node]:
    """A node, and all that it depends on."""
    found, waiting = set[fx.Node](), [node]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += one.all_input_nodes
    return found


def _is_pure(node: fx.Node) -> bool:
    """Whether a node gives the same whenever it runs on the same, and does nothing else."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return name in _PURE


def _holds_only_tensors(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return len(value) > 0 and all(one is None or _holds_only_tensors(one) for one in value)
    return isinstance(value, Tensor)


def _held(value: Any) -> Any:
    """Arguments as they are now: the containers among them may change later."""
    kind = type(value)
    if kind in (tuple, list):
        return kind([_held(one) for one in value])
    return {key: _held(one) for key, one in value.items()} if kind is dict else value


def _holds_mutable(values: Any) -> bool:
    return any(type(v) in (list, dict, set) or (type(v) is tuple and _holds_mutable(v)) for v in values)


def _same(parts: list[Any], value: Any) -> bool:
    return all(map(operator.is_, parts, value))
