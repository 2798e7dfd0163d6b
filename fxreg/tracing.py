"""A symbolic tracer that gives up rather than guess.

It runs a module's forward on proxies, as `torch.fx.Tracer` does. Whatever the forward does that a graph cannot hold
raises `Untraceable`; the smallest enclosing module is then rolled back and becomes one opaque call, with the reason
kept. Nothing that depends on the moment of tracing is baked in: `training` flags, parameters and buffers are read by
nodes, and any tensor computed at trace time is a reason to give up.
"""

import dis
import math
import operator
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.fx import immutable_collections
from torch.fx.proxy import Attribute
from torch.nn.modules import module as module_globals
from torch.overrides import TorchFunctionMode

from .calls import expect_tensor, unpack
from .scanning import untraceable_reason
from .snapshots import Snapshot

_LAYERS = ("torch.nn.modules.", "torch.nn.utils.parametrize", "torch.ao.nn.")
_CONTAINERS = (
    tuple, list, dict, torch.Size, immutable_collections.immutable_list, immutable_collections.immutable_dict
)  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
_ACCEPT_NONE = {operator.eq, operator.ne, operator.is_, operator.is_not, operator.contains}
_CHANGES = (
    "__delattr__", "register_buffer", "register_parameter", "add_module", "register_forward_hook",
    "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook", "_apply",
)  # fmt: skip


class Untraceable(BaseException):
    """A graph cannot hold what the forward did. No `Exception`: a forward's own `except` must not swallow it."""


class TracedValue(fx.Proxy):
    """A proxy that refuses every question about its value that tracing cannot answer."""

    tracer: "SoundTracer"

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # what isinstance() asks once the real type has said no
        return self.tracer.claimed_type(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if not hasattr(Tensor, name):
            self.tracer.give_up(f"asks for attribute {name!r}, which a tensor does not have")
        return _TracedAttribute(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):
            self.tracer.give_up(f"sets attribute {name!r} of a value")
        object.__setattr__(self, name, value)

    def __iter__(self) -> Iterator[Any]:
        self.tracer.check_known_structure(self)
        caller = sys._getframe(1)
        step = next(i for i in dis.get_instructions(caller.f_code) if i.offset == caller.f_lasti)
        if step.opname != "UNPACK_SEQUENCE":
            self.tracer.give_up("iterates over a value")
        parts = self.tracer.call(unpack, self, step.argval)
        return iter([parts[i] for i in range(step.argval)])

    def __getitem__(self, key: Any) -> Any:
        self.tracer.check_known_structure(self)
        return self.tracer.create_proxy("call_function", operator.getitem, (self, key), {})

    @property
    def keys(self) -> Any:
        self.tracer.give_up("asks for keys of a value")

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class _TracedAttribute(TracedValue, Attribute):
    """`value.name`, a node only once it is used other than by being called."""

    def __init__(self, root: TracedValue, attr: str) -> None:
        Attribute.__init__(self, root, attr)


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(self: TracedValue, *_: Any) -> Any:
        self.tracer.give_up(f"asks {name} of a value")

    return refuse


def _in_place(target: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", target, (self, other), {})


for _name in (
    "bool", "len", "int", "float", "complex", "index", "contains", "format", "array", "round", "trunc", "floor",
    "ceil", "enter", "exit", "reversed", "delitem", "dlpack", "hash", "repr", "str", "copy", "deepcopy", "reduce_ex",
):  # fmt: skip
    setattr(TracedValue, f"__{_name}__", _refusing(f"__{_name}__"))

for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
    "matmul",
):
    setattr(TracedValue, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


class SoundTracer(fx.Tracer):
    """Traces one root module; see the module docstring.

    After `trace_root`, `graph` holds the nodes up to but without the output node, and `opaque` the path of every
    module that is called as a whole although it is not one of torch's own, with the reason.
    """

    def __init__(self, root: nn.Module, root_alias: str) -> None:
        super().__init__(autowrap_modules=(math,))
        self.root = root
        self.graph = fx.Graph()
        self.opaque: dict[str, str] = {}
        self._root_alias = root_alias
        self._paths = {module: path for path, module in reversed([*root.named_modules(remove_duplicate=False)])}
        self._tensors = _tensor_paths(self._paths, root_alias)
        self._thread = threading.get_ident()
        self._poison: str | None = None
        self._opaque_results: dict[fx.Node, str] = {}
        self._asked_type: set[fx.Node] = set()
        self._scope: list[tuple[str, type]] = []
        self._watches = False
        self.side_effect: str | None = None

    # What the forward asks of its values.

    def give_up(self, reason: str) -> NoReturn:
        self._poison = self._poison or reason
        raise Untraceable(reason)

    def check_poison(self) -> None:
        """A forward may have swallowed what `give_up` raised, with a bare except."""
        if self._poison:
            raise Untraceable(self._poison)

    def claimed_type(self, value: TracedValue) -> type:
        if value.node.op != "placeholder":
            self.give_up("asks isinstance of a value whose type is not known before it runs")
        self._asked_type.add(value.node)
        return Tensor

    def check_known_structure(self, value: TracedValue) -> None:
        if value.node in self._opaque_results:
            self.give_up(f"takes apart what opaque {self._opaque_results[value.node]!r} returns")

    def proxy(self, node: fx.Node) -> TracedValue:
        return TracedValue(node, self)

    def iter(self, obj: fx.Proxy) -> Any:
        self.give_up("iterates over a value")

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.give_up("branches on a value")

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor):
            if id(a) not in self._tensors:
                self.give_up("uses a tensor made at trace time or kept outside the module")
            return self.create_node("get_attr", self._tensors[id(a)], (), {})
        if isinstance(a, nn.Module):
            self.give_up(f"passes the module {type(a).__name__} to a function")
        named = isinstance(a, tuple) and hasattr(a, "_fields")
        if isinstance(a, tuple | list | dict) and type(a) not in _CONTAINERS and not named:
            self.give_up(f"builds a {type(a).__name__}")
        if type(a).__module__ == "numpy" and isinstance(a, float | int | complex):
            return a.item()  # type: ignore[union-attr]
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.check_poison()
        if threading.get_ident() != self._thread:
            self.give_up("runs part of itself in another thread")
        if _ambient_state() != self._ambient:
            self.give_up("runs part of itself in another grad, autocast or inference mode")
        node = super().create_node(*args, **kwargs)
        node.meta["nn_module_stack"] = {path: (path, kind) for path, kind in self._scope}
        return node

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Record a call of one of fxreg's own functions, as a node that survives re-tracing."""
        result = self.create_proxy("call_function", function, args, {})
        result.node.meta["is_wrapped"] = True
        return result

    # Modules.

    def path_of(self, module: nn.Module) -> str:
        path: str | None = self._paths.get(module)
        if path is None:
            self.give_up(f"calls a {type(module).__name__} that is not one of the model's registered modules")
        return path

    def call_submodule(self, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.check_poison()
        path = self.path_of(module)
        if not path:
            self.give_up("calls itself")
        if type(module).__call__ is not nn.Module.__call__ and not isinstance(module, fx.GraphModule):
            self.give_up(f"calls {path!r}, whose class overrides __call__")
        if type(module).__module__.startswith(_LAYERS) and type(module) is not nn.Sequential:
            return self._call(path, module, args, kwargs)  # torch's own layers: what people know the model by
        reason = whole_reason(module)
        if type(module).__module__.startswith("torch.") and not isinstance(module, nn.Sequential | fx.GraphModule):
            reason = f"is torch's {type(module).__name__}"
        if reason is None:
            before, results, asked = self._last(), dict(self._opaque_results), set(self._asked_type)
            inner = dict(self.opaque)
            try:
                return self.run_traced(module, path, run, args, kwargs)
            except (Untraceable, Exception) as error:
                reason = self._poison or described(error)
                self._poison = None
                if self._watches:
                    self._put_back()
                self._roll_back(before)
                self._opaque_results, self._asked_type, self.opaque = results, asked, inner
        self.opaque[path] = reason
        if _holds_mutable((*args, *kwargs.values())):
            self.give_up(f"passes a list or dict to opaque {path!r}, which may change it")
        result = self._call(path, module, args, kwargs)
        self._opaque_results[result.node] = path
        return result

    def _call(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        result = self.create_proxy("call_module", path, args, kwargs)
        result.node.meta["nn_module_stack"][path] = (path, type(module))
        if isinstance(module, nn.MultiheadAttention):
            return self._attention_results(result, kwargs.get("need_weights", args[4] if len(args) > 4 else True))
        return result

    def _attention_results(self, result: Any, need_weights: object) -> Any:
        if not isinstance(need_weights, bool):
            self.give_up("computes need_weights of a MultiheadAttention")
        return (result[0], result[1] if need_weights else None)

    def run_traced(self, module: nn.Module, path: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a forward on proxies; raise if it did anything that a graph cannot hold."""
        last = self._last()
        self._scope.append((path, type(module)))
        try:
            result = run(*args, **kwargs)
            self.check_poison()
            if self._watches and (changed := self._put_back()):
                self.give_up(changed)
            self._check_opaque_results(last)
            return result
        finally:
            self._scope.pop()

    def _put_back(self) -> str | None:
        """Undo what running a forward did beside its values, and say what it was."""
        what = None
        if changed := self._snapshot.changed():
            what = f"changes {changed}"
            self._snapshot.restore()
        if rng_state() != self._rng:
            what = what or "draws random numbers that a graph would freeze"
            set_rng_state(self._rng)
        return what

    def _check_opaque_results(self, last: fx.Node | None) -> None:
        """A forward may have asked `x is None` of what an opaque module returned, and no proxy can see that. Each
        such value must be used where only a tensor will do, or be asserted to be one."""
        for node, path in list(self._opaque_results.items()):
            if (last is not None and not node > last) or _enforces_tensor(node):
                continue
            if not node.users:
                self.give_up(f"returns or discards what opaque {path!r} returns, of a kind known only when it runs")
            self.expect(node, f"what {path!r} returned")
            del self._opaque_results[node]

    def expect(self, node: fx.Node, what: str) -> None:
        """Assert at run time that a value is a tensor."""
        with self.graph.inserting_after(node):
            checked = self.graph.call_function(expect_tensor, (node, what))
        checked.meta.update(is_wrapped=True, nn_module_stack=dict(node.meta.get("nn_module_stack", {})))
        node.replace_all_uses_with(checked, delete_user_cb=lambda user: user is not checked)

    def must_assert(self, node: fx.Node) -> bool:
        """Whether a value was asked for its type, or may be None without anything noticing."""
        return node in self._asked_type or not _enforces_tensor(node)

    def _last(self) -> fx.Node | None:
        return next(iter(reversed(self.graph.nodes)), None)

    def _roll_back(self, last: fx.Node | None) -> None:
        while (node := self._last()) is not last and node is not None:
            self.graph.erase_node(node)

    # The root.

    def trace_root(self, run: Callable[[], Any], watch: bool = False) -> Any:
        """Run the root's forward under all patches and return what it returned; raises if it cannot be traced.

        Comparing all Python state after every module is slow. It is done with `watch`, once a first trace has found
        in `side_effect` that there is something to find.
        """
        self._watches = watch
        self._snapshot, self._rng = Snapshot(self._paths), rng_state()
        with _intercepted(self):
            self._ambient = _ambient_state()
            try:
                return self.run_traced(self.root, "", run, (), {})
            except Exception as error:
                raise Untraceable(self._poison or described(error)) from error
            finally:
                with torch._C.DisableTorchFunction():
                    self.side_effect = self._put_back()


class _NoTensorWork(TorchFunctionMode):
    """Refuses torch calls without a proxy: their result would be frozen into the graph."""

    def __init__(self, tracer: SoundTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _holds_proxy(args) or _holds_proxy(kwargs):
            if torch.overrides.is_tensor_method_or_property(func):
                return self._tracer.create_proxy("call_method", func.__name__, args, kwargs)
            return self._tracer.create_proxy("call_function", func, args, kwargs)
        name = getattr(func, "__name__", repr(func))
        return self._tracer.give_up(f"calls {name} on what is known when it is traced, which would be frozen in")


def whole_reason(module: nn.Module) -> str | None:
    """Why a module must be called as a whole before anything is tried, if it must."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is a scripted module"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "has hooks"
    if "forward" in vars(module) or "__call__" in vars(module):
        return "has a forward of its own instance"
    if any(getattr(module_globals, hooks) for hooks in _GLOBAL_HOOKS):
        return "global module hooks are registered"
    if isinstance(module, fx.GraphModule):
        return None
    if type(module).__call__ is not nn.Module.__call__:
        return "overrides __call__"
    return untraceable_reason(module)


def _holds_mutable(values: Iterable[Any]) -> bool:
    return any(type(value) in (list, dict, set) or (type(value) is tuple and _holds_mutable(value)) for value in values)


def _holds_proxy(value: Any) -> bool:
    kind = type(value)  # asking isinstance of a proxy makes the tracer give up
    if issubclass(kind, tuple | list):
        return any(map(_holds_proxy, value))
    if issubclass(kind, dict):
        return any(map(_holds_proxy, value.values()))
    return issubclass(kind, fx.Proxy)


def _enforces_tensor(node: fx.Node) -> bool:
    """Whether some use of the value fails by itself when the value is None."""
    for user in node.users:
        first = bool(user.args) and user.args[0] is node
        match user.op:
            case "call_method" if first:
                return True
            case "call_function" if user.target in _ACCEPT_NONE or user.target is expect_tensor:
                continue
            case "call_function" if first or getattr(user.target, "__module__", "") == "_operator":
                return True
            case "call_module" if first and str(user.meta["nn_module_stack"][user.target][1].__module__).startswith(
                "torch."
            ):
                return True
    return False


def _ambient_state() -> tuple[object, ...]:
    return (torch._C.is_grad_enabled(), torch._C.is_inference_mode_enabled(), torch._C._is_any_autocast_enabled())


def _tensor_paths(paths: dict[nn.Module, str], root_alias: str) -> dict[int, str]:
    """Where the emitted module finds every tensor that a module keeps, by identity."""
    found: dict[int, str] = {}
    ambiguous: set[int] = set()  # one tensor under two attributes: which of them was read?
    for module, path in paths.items():
        for attributes in (vars(module), module._buffers, module._parameters):
            # The emitted module has the root's parameters and buffers; its plain attributes stay with the original.
            owner = path or (root_alias if attributes is vars(module) else "")
            for name, value in attributes.items():
                if isinstance(value, Tensor):
                    if id(value) in found and attributes is vars(module):
                        ambiguous.add(id(value))
                    found[id(value)] = f"{owner}.{name}" if owner else name
    return {identity: path for identity, path in found.items() if identity not in ambiguous}


def described(error: BaseException) -> str:
    """An error as a short reason."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


_lock = threading.RLock()


@contextmanager
def _intercepted(tracer: SoundTracer) -> Iterator[None]:
    """Route this thread's module calls, attribute reads and autograd Functions through the tracer.

    The patches sit on classes and so are seen by every thread; each passes other threads through untouched. One trace
    at a time.
    """
    module_call, module_getattr, module_setattr = nn.Module.__call__, nn.Module.__getattr__, nn.Module.__setattr__

    def ours() -> bool:
        return threading.get_ident() == tracer._thread

    def call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if not ours():
            return module_call(module, *args, **kwargs)
        return tracer.call_submodule(module, module.forward, args, kwargs)

    def read(module: nn.Module, name: str) -> Any:
        value = module_getattr(module, name)
        if ours() and isinstance(value, Tensor):
            path = tracer.path_of(module)
            return tracer.create_proxy("get_attr", f"{path}.{name}" if path else name, (), {})
        return value

    def write(module: nn.Module, name: str, value: Any) -> None:
        if ours():
            tracer.give_up(f"sets {type(module).__name__}.{name}")
        module_setattr(module, name, value)

    def training(module: nn.Module) -> Any:
        if ours():
            path = tracer.path_of(module)
            owner = tracer.create_proxy("get_attr", path or tracer._root_alias.partition(".")[0], (), {})
            return tracer.create_proxy("call_function", getattr, (owner, "training"), {})
        own = vars(module)
        return own["training"] if "training" in own else module_getattr(module, "training")

    def set_training(module: nn.Module, mode: bool) -> None:
        if ours():
            tracer.give_up("changes the training mode")
        vars(module)["training"] = mode

    def refusing(original: Callable[..., Any], what: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: tracer.give_up(what) if ours() else original(*args, **kwargs)

    patches: list[tuple[Any, str, Any]] = [
        (nn.Module, "__call__", call),
        (nn.Module, "__getattr__", read),
        (nn.Module, "__setattr__", write),
        (torch, "is_grad_enabled", refusing(torch.is_grad_enabled, "reads or sets the grad mode")),
        (torch, "is_inference_mode_enabled", refusing(torch.is_inference_mode_enabled, "reads the inference mode")),
        (torch, "is_autocast_enabled", refusing(torch.is_autocast_enabled, "reads or sets autocast")),
        (
            torch.nn.utils.stateless,
            "_functional_call",
            refusing(torch.nn.utils.stateless._functional_call, "calls a module functionally"),
        ),
        *((nn.Module, name, refusing(vars(nn.Module)[name], f"calls {name} of a module")) for name in _CHANGES),
        (
            torch.autograd.function,  # asked by every Function.apply, however it was imported
            "_is_setup_context_defined",
            refusing(torch.autograd.function._is_setup_context_defined, "calls a custom autograd.Function"),
        ),
    ]
    with _lock, torch.enable_grad():
        originals = [(owner, name, vars(owner)[name]) for owner, name, _ in patches]
        try:
            for owner, name, replacement in patches:
                setattr(owner, name, replacement)
            nn.Module.training = property(training, set_training)  # type: ignore[assignment]
            with _NoTensorWork(tracer):
                yield
        finally:
            if "training" in vars(nn.Module):
                del nn.Module.training
            for owner, name, original in originals:
                setattr(owner, name, original)
            torch._C._set_grad_enabled(True)  # a forward that failed may have left it off


def rng_state() -> tuple[Any, ...]:
    """The state of torch's CPU generator, Python's and, where NumPy is loaded, its global one."""
    with torch._C.DisableTorchFunction():
        own = bytes(torch.default_generator.get_state().tolist())
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return (own, random.getstate())
    kind, keys, *rest = numpy.random.get_state()
    return (own, random.getstate(), (kind, tuple(keys.tolist()), *rest))


def set_rng_state(state: tuple[Any, ...]) -> None:
    """Set back what `rng_state` gave."""
    with torch._C.DisableTorchFunction():
        torch.default_generator.set_state(torch.tensor(list(state[0]), dtype=torch.uint8, device="cpu"))
    random.setstate(state[1])
    if len(state) > 2:
        sys.modules["numpy"].random.set_state(state[2])
