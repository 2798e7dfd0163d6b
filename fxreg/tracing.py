"""A symbolic tracer that gives up rather than guess.

It runs a module's forward on proxies, as `torch.fx.Tracer` does. Whatever the forward does that a graph cannot hold
raises `Untraceable`; the smallest enclosing module is then rolled back and becomes one opaque call, with the reason
kept. Nothing that depends on the moment of tracing is baked in: `training` flags, parameters and buffers are read by
nodes, and any tensor computed at trace time is a reason to give up.
"""

import enum
import functools
import math
import sys
import threading
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.fx import immutable_collections
from torch.overrides import TorchFunctionMode

from .calls import passes
from .executing import entering, unwatched
from .expecting import Expectations, says_kinds_of_tensors
from .interception import intercepted
from .layers import ambient_state, described, is_layer, is_plain_layer, tensor_paths, whole_reason
from .proxies import TracedValue, Untraceable, holds_proxy, proxies_in
from .scanning import asks_for_none, code_asks_for_none, code_reason
from .shapes import LAYER
from .side_channels import Ledger, shorten
from .snapshots import Snapshot, leads_to_iterator, rng_state, set_rng_state
from .structure import PLAIN, holds_mutable

_CONTAINERS = (
    tuple, list, dict, torch.Size, immutable_collections.immutable_list, immutable_collections.immutable_dict
)  # fmt: skip
_PLAIN = {tuple, list, dict, bool, int, float, str, type(None)}


class _NoTensorWork(TorchFunctionMode):
    """Refuses torch calls without a proxy: their result would be frozen into the graph."""

    def __init__(self, tracer: Any) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if holds_proxy(args) or holds_proxy(kwargs):
            if torch.overrides.is_tensor_method_or_property(func):
                return self._tracer.create_proxy("call_method", func.__name__, args, kwargs)
            return self._tracer.create_proxy("call_function", func, args, kwargs)
        name = getattr(func, "__name__", repr(func))
        return self._tracer.give_up(f"calls {name} on what is known when it is traced, which would be frozen in")


class SoundTracer(fx.Tracer):
    """Traces one root module; see the module docstring.

    After `trace_root`, `graph` holds the nodes up to but without the output node, and `opaque` the path of every
    module that is called as a whole although it is not one of torch's own, with the reason.

    Comparing all Python state around every module is slow. It is done with `watches`, once a first trace has found in
    `side_effect` that there is something to find.
    """

    def __init__(
        self, root: nn.Module, root_alias: str, forced: Mapping[str, str], marked: Collection[str], watches: bool
    ) -> None:
        super().__init__(autowrap_modules=(math,))
        self.root = root
        self.marked = marked
        self.graph = fx.Graph()
        self.opaque: dict[str, str] = {}
        self._root_alias = root_alias
        self._paths = {module: path for path, module in reversed([*root.named_modules(remove_duplicate=False)])}
        self.thread = threading.get_ident()
        self._poison: str | None = None
        self._says: dict[tuple[int, int], tuple[str | None, bool]] = {}  # of code and its globals, by identity
        self._asked_none = False
        self.expectations = Expectations(root, self.graph)
        self._scope: list[tuple[str, dict[str, tuple[str, type]]]] = [("", {})]
        self._watches = watches
        self._forced = forced
        self.ledger = Ledger()
        self.side_effect: str | None = None
        self._suspicion: str | None = None

    @functools.cached_property
    def _tensors(self) -> dict[int, str]:
        return tensor_paths(self._paths, self._root_alias)

    # What the forward asks of its values.

    def give_up(self, reason: str) -> NoReturn:
        self._poison = self._poison or reason
        raise Untraceable(reason)

    def check_poison(self) -> None:
        """A forward may have swallowed what `give_up` raised, with a bare except."""
        if self._poison:
            raise Untraceable(self._poison)

    def _enters(self, code: types.CodeType, space: dict[str, Any]) -> None:
        """Some function of the user's is about to run: what its code says decides whether it may."""
        says = self._says.get((id(code), id(space)))
        if says is None:
            says = self._says[id(code), id(space)] = (code_reason(code, space), code_asks_for_none(code))
        self.ledger.enters(self._scope[-1][0], code, space)
        self._poison = self._poison or says[0]
        self._asked_none = self._asked_none or says[1]

    def claimed_type(self, value: TracedValue) -> type:
        if value.node.op != "placeholder" or says_kinds_of_tensors(sys._getframe(2)):
            self.give_up("asks isinstance of a value whose type is not known before it runs")
        self.expectations.asked_type.add(value.node)
        return Tensor

    def check_known_structure(self, value: TracedValue) -> None:
        if path := self.expectations.opaque_results.get(value.node):
            self.give_up(f"takes apart what opaque {path!r} returns")

    def proxy(self, node: fx.Node) -> TracedValue:
        return TracedValue(node, self)

    def iter(self, obj: fx.Proxy) -> Any:
        self.give_up("iterates over a value")

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.give_up("branches on a value")

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if type(a) in _PLAIN:
            return fx.proxy.TracerBase.create_arg(self, a)
        if isinstance(a, Tensor):
            if id(a) not in self._tensors:
                self.give_up("uses a tensor made at trace time or kept outside the module")
            return self.create_node("get_attr", self._tensors[id(a)], (), {})
        if isinstance(a, nn.Module):
            self.give_up(f"passes the module {type(a).__name__} to a function")
        named = isinstance(a, tuple) and hasattr(a, "_fields")
        if isinstance(a, int | float | str) and not isinstance(a, enum.Enum) and type(a).__module__ != "numpy":
            self.give_up(f"computes with a {type(a).__name__}")  # whose own words in code may be others
        if isinstance(a, tuple | list | dict) and type(a) not in _CONTAINERS and not named:
            self.give_up(f"builds a {type(a).__name__}")
        if type(a).__module__ == "numpy" and isinstance(a, float | int | complex):
            return a.item()  # type: ignore[union-attr]
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.check_poison()
        if threading.get_ident() != self.thread:
            self.give_up("runs part of itself in another thread")
        if ambient_state() != self._ambient:
            self.give_up("runs part of itself in another grad, autocast or inference mode")
        node = self.graph.create_node(*args, **kwargs)
        node.meta["nn_module_stack"] = dict(self._scope[-1][1])
        return node

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        with unwatched():
            return super().create_proxy(*args, **kwargs)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Record a call of one of fxreg's own functions, as a node that survives re-tracing."""
        result = self.create_proxy("call_function", function, args, {})
        result.node.meta["is_wrapped"] = True
        return result

    def mode(self) -> TorchFunctionMode:
        return _NoTensorWork(self)

    def attribute(self, module: nn.Module, name: str, value: Any) -> Any:
        """What a forward gets that reads a parameter, buffer or child, or what a `__getattr__` of its own gives."""
        if isinstance(value, nn.Module):
            return value
        if isinstance(value, Tensor):
            path = self.path_of(module)
            return self.create_proxy("get_attr", f"{path}.{name}" if path else name, (), {})
        self.note_read(module, name, value)
        return value

    def note_read(self, module: nn.Module, name: str, value: Any) -> None:
        """Remember that a forward read something that a graph holds as it was."""
        if not isinstance(value, PLAIN) and leads_to_iterator(value):
            self.give_up(f"reads the iterator {type(module).__name__}.{name}")
        if module in self._paths and len(self._scope) > 1:
            self.ledger.read(self._scope[-1][0], self._paths[module], name, value)

    def note_listed(self, module: nn.Module, registry: str, now: Any) -> None:
        """Remember that a forward asked for all that a module has of one kind."""
        if module in self._paths and len(self._scope) > 1:
            self.ledger.lists(self._scope[-1][0], self._paths[module], registry, now)

    def is_as_it_was(self, module: nn.Module, name: str, value: Any) -> bool:
        """Whether an attribute is set to what it is. A proxy is something else."""
        return False

    def note_change(self, module: nn.Module, what: str) -> None:
        self.give_up(what)

    def read_training(self, module: nn.Module) -> Any:
        owner = self.path_of(module) or self._root_alias.partition(".")[0]
        return self.create_proxy(
            "call_function", getattr, (self.create_proxy("get_attr", owner, (), {}), "training"), {}
        )

    # Modules.

    def path_of(self, module: nn.Module) -> str:
        path: str | None = self._paths.get(module)
        if path is None:
            self.give_up(f"calls a {type(module).__name__} that is not one of the model's registered modules")
        return path

    def call_submodule(self, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with unwatched():
            return self._called(module, run, args, kwargs)

    def _called(self, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.check_poison()
        path = self.path_of(module)
        if not path:
            self.give_up("calls itself")
        reach = Snapshot([module], other_modules=True) if self._watches else None
        if self._watches and (changed := self._side_effect(reach)):
            self.give_up(changed)
        if path in self.marked:
            self.mark((args, kwargs), path, "input")
            result = self._called_at(path, module, reach, run, args, kwargs)
            self.mark(result, path, "output")
            return result
        return self._called_at(path, module, reach, run, args, kwargs)

    def mark(self, values: Any, path: str, on: str) -> None:
        """Say in the graph that activations of a module pass here."""
        self.call(passes, tuple(proxies_in(values)), path, on)

    def _called_at(
        self, path: str, module: nn.Module, reach: Snapshot | None, run: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if type(module).__call__ is not nn.Module.__call__ and not isinstance(module, fx.GraphModule):
            self.give_up(f"calls {path!r}, whose class overrides __call__")
        if is_layer(module):
            self.ledger.runs_layer(path, module)
            return self._call(path, module, args, kwargs)  # torch's own layers: what people know the model by
        reason = self._forced.get(path) or whole_reason(module)
        if reason is None:
            before, expected, heard = self._last(), self.expectations.mark(), self.ledger.mark()
            known = len(self.opaque)
            try:
                return self.run_traced(module, path, run, args, kwargs, reach)
            except (Untraceable, Exception) as error:
                reason = self._poison or described(error)
                self._poison = None
                if self._watches:
                    self._put_back(reach)
                self._roll_back(before)
                self.ledger.forget(heard)
                self.expectations.forget(expected)
                shorten(self.opaque, known)
        return self._call_opaque(path, module, reason, args, kwargs)

    def _call_opaque(self, path: str, module: nn.Module, reason: str, args: Any, kwargs: Any) -> Any:
        self.opaque[path] = reason
        if holds_mutable((*args, *kwargs.values())):
            self.give_up(f"passes a list or dict to opaque {path!r}, which may change it")
        if not self._watches:
            self._suspect(module)
        self.ledger.runs(path, module)
        result = self._call(path, module, args, kwargs)
        self.expectations.opaque_results[result.node] = path
        return result

    def _suspect(self, module: nn.Module) -> None:
        """A module that runs as it is may see what the forward around it has changed, and changes back later."""
        self._suspicion = self._suspicion or self.state.changed(Snapshot([module], other_modules=True))

    def _call(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        result = self.create_proxy("call_module", path, args, kwargs)
        result.node.meta["nn_module_stack"][path] = (path, type(module))
        if self.marked and is_plain_layer(module) and not getattr(module, "inplace", False):
            result.node.meta[LAYER] = type(module)
        if issubclass(type(module), nn.MultiheadAttention):  # `isinstance` may ask the module, which is listened to
            return self._attention_results(result, kwargs.get("need_weights", args[4] if len(args) > 4 else True))
        return result

    def _attention_results(self, result: Any, need_weights: object) -> Any:
        if not isinstance(need_weights, bool):
            self.give_up("computes need_weights of a MultiheadAttention")
        return (result[0], result[1] if need_weights else None)

    def run_traced(
        self,
        module: nn.Module,
        path: str,
        run: Callable[..., Any],
        args: Any,
        kwargs: Any,
        reach: Snapshot | None = None,
    ) -> Any:
        """Run a forward on proxies; raise if it did anything that a graph cannot hold.

        It is compared in what it can reach from its attributes. What it changed elsewhere, a caller is found to have
        changed.
        """
        last, asked_none, self._asked_none = self._last(), self._asked_none, False
        self._scope.append((path, {**self._scope[-1][1], path: (path, type(module))}))
        self.ledger.traced(path, module)
        try:
            with entering(self._enters, self.note_change, self.give_up):
                result = run(*args, **kwargs)
            self.check_poison()
            if self._watches and (changed := self._put_back(reach)):
                self.give_up(changed)
            if self._asked_none or asks_for_none(module):
                self._check_none(last, (args, kwargs))
            return result
        finally:
            self._asked_none = asked_none
            self._scope.pop()

    def _side_effect(self, reach: Snapshot | None = None) -> str | None:
        """What running a forward has done so far beside its values."""
        if changed := self.state.changed(reach):
            return f"changes {changed}"
        return "draws random numbers that a graph would freeze" if rng_state() != self._rng else None

    def _put_back(self, reach: Snapshot | None = None) -> str | None:
        """Undo what running a forward did beside its values, and say what it was."""
        what = self._side_effect(reach)
        if what:
            self.state.restore(reach)
            set_rng_state(self._rng)
        return what

    def _check_none(self, last: fx.Node | None, given: Any) -> None:
        if cannot := self.expectations.asks_none(last, [value.node for value in proxies_in(given)]):
            self.give_up(cannot)

    def _last(self) -> fx.Node | None:
        return next(iter(reversed(self.graph.nodes)), None)

    def _roll_back(self, last: fx.Node | None) -> None:
        while (node := self._last()) is not last and node is not None:
            self.graph.erase_node(node)

    # The root.

    def trace_root(self, run: Callable[[], Any]) -> Any:
        """Run the root's forward under all patches and return what it returned; raises if it cannot be traced."""
        self.state, self._rng = Snapshot(self._paths), rng_state()
        with intercepted(self):
            self._ambient = ambient_state()
            try:
                return self.run_traced(self.root, "", run, (), {})
            except Exception as error:
                raise Untraceable(self._poison or described(error)) from error
            finally:
                with torch._C.DisableTorchFunction():
                    self.side_effect = self._put_back() or self._suspicion
