"""The emitted module: a GraphModule whose parameters, buffers, children and mode are the original model's own."""

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, Self
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, fx, nn

from . import calls, staleness
from .asking import Asking
from .captured import Captured
from .effects import Via
from .errors import FxregError
from .graphs import read, written
from .guarding import ask
from .layouts import Meaning, seen
from .planning import Emit, LeaveToCompanion, Plan

CHILD = "fxreg"
"""The name of the one child that fxreg adds to the emitted module."""


_TAKEN = (set(dir(fx.GraphModule)) - set(dir(nn.Module))) | set(vars(fx.GraphModule(nn.Module(), fx.Graph())))


def located(path: str) -> str:
    """Where an emitted module finds a path of the model's: names that GraphModule itself uses, with the model."""
    return f"{CHILD}.model.{path}" if path.partition(".")[0] in _TAKEN else path


_OWN = ("_graph", "_compiled_call_impl")  # what no copy has in common; the second is of `gm.compile()`
_HOOKS_OF_STATE = (
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_OF_CLASS = (
    "train",
    "eval",
    "requires_grad_",
    "_apply",
    "state_dict",
    "load_state_dict",
    "_load_from_state_dict",
    "_save_to_state_dict",
    "get_extra_state",
    "set_extra_state",
)
"""What an emitted module lets its model do, whose class may do it in its own way."""


_bound: "WeakKeyDictionary[nn.Module, set[tuple[str, str]]]" = WeakKeyDictionary()
_stepping: "WeakKeyDictionary[State, WeakSet[Any]]" = WeakKeyDictionary()


def bind(model: nn.Module, edits: Iterable[LeaveToCompanion]) -> None:
    """Note that the companion of these edits was called for a model, before or after it was transformed."""
    _bound.setdefault(model, set()).update((repr(edit.effect), edit.site) for edit in edits)


def stepping(state: "State") -> "WeakSet[Any]":
    """The proximal steps that act on an emitted module: weakly, as each goes with its optimizer."""
    return _stepping.setdefault(state, WeakSet())


@dataclass(frozen=True)
class Provenance:
    """Where an emitted module comes from.

    Attributes:
        plan: the edits.
        emit: where the total penalty goes.
        verified: whether it was compared with the model when it was emitted.
        nodes: for every inserted node's name, the label of its rule ("" for what serves several).
        strengths: for every name in `fxreg.strengths`, its buffer.
        streams: for every (label, parameter) with a random stream, its buffer.
        anchors: for every (label, argument, parameter) that is a tensor of the parameter's own, its buffer.
        calls: for the label of every rule on activations, the nodes of its penalties.
    """

    plan: Plan
    emit: Emit
    verified: bool
    nodes: Mapping[str, str]
    strengths: Mapping[str, str]
    streams: Mapping[tuple[str, str], str]
    anchors: Mapping[tuple[str, str, str], str]
    calls: Mapping[str, Sequence[str]]


def scalar_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it: float32(1e-4) is off by 2.5e-8."""
    return torch.float32 if device.type == "mps" else torch.float64


class State(nn.Module):
    """The child `fxreg`: strengths, loss scale, streams and anchors as buffers that only ever move between devices.

    Scalars have shape [1]: AOTAutograd takes 0-d float64 inputs on the CPU for symbolic numbers, and compiles twice.
    It keeps the original model, outside `_modules`, so that its parameters are not counted twice.
    """

    def __init__(
        self,
        model: nn.Module,
        captured: Captured,
        provenance: Provenance,
        device: torch.device,
    ) -> None:
        super().__init__()
        vars(self).update(_model=model, others=(), islands={})
        self.is_island = False
        for recorded in captured.chain:
            if recorded.assumed is not None:
                vars(self).update(recorded.assumed.kept)
        self.captured = captured
        self.provenance = provenance
        self.meaning: Meaning | None = None
        self.scale_was_set = False
        self.warned_unbound = False
        self.backwards_watched = 0
        one = torch.ones(1, dtype=scalar_dtype(device), device=device)
        self.register_buffer("loss_scale", one, persistent=False)

    loss_scale: Tensor
    others: "tuple[RegularizedModule, ...]"
    islands: "dict[str, RegularizedModule]"
    function: "RegularizedModule"

    @property
    def model(self) -> nn.Module:
        """The original model."""
        model: nn.Module = vars(self)["_model"]
        return model

    @property
    def training(self) -> bool:
        """The original model's mode: the root has one, and this is where the graph reads it."""
        return self.model.training if "_model" in vars(self) else True

    @training.setter
    def training(self, mode: bool) -> None:
        if "_model" in vars(self):
            self.model.training = mode

    def assumes(self, *arguments: Any, which: int = 0) -> bool:
        """Whether what a recorded graph assumes holds for a call with these arguments; whoever traces the module
        gets the graph for its mode, in which the question is asked again.

        Args:
            which: the module's own graph is 0, and `others` follow.
        """
        captured, model = self.captured.chain[which], self.model
        if captured.assumed is None:
            return False
        if (proxy := next((one for one in arguments if isinstance(one, fx.Proxy)), None)) is not None:
            if captured.assumed.training not in (None, model.training) or "eager" not in captured.assumed.ways:
                return False
            self._ask_again(proxy.tracer, arguments, which)
            return True
        return not ask(is_stale, heeds, self, which) and captured.assumed.holds(model, arguments)

    def _ask_again(self, tracer: Any, arguments: tuple[Any, ...], which: int) -> None:
        """Leave the question to the graph that is being traced."""
        state = tracer.create_proxy("get_attr", tracer.path_of_module(self), (), {})
        asking = tracer.create_proxy("call_function", calls.expect_assumed, (state, [*arguments], which), {})
        asking.node.meta["is_wrapped"] = True

    def call_model(self, args: Any, kwargs: Any) -> Any:
        """Call the original model; in the place of its forward, the forward of its class, without its hooks."""
        return type(self.model).forward(self.model, *args, **kwargs) if self.is_island else self.model(*args, **kwargs)

    def unbound(self) -> dict[str, Via]:
        """The labels of the rules whose companion call has not come yet, and what they wait to act by."""
        plan, bound = self.provenance.plan, _bound.get(self.model, set())
        waiting = [e for e in plan.companions("optimizer") if (repr(e.effect), e.site) not in bound]
        waiting += [] if stepping(self) else plan.companions("proximal")
        return {edit.label: edit.via for edit in waiting}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "State":
        # Whatever fn does to dtypes and values is for the model's state; only where it puts tensors matters here.
        for name, buffer in self._buffers.items():
            if buffer is not None:
                device = fn(torch.empty(0, dtype=torch.float32, device=buffer.device)).device
                if device.type != "meta":
                    self._buffers[name] = buffer.to(device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        model = type(self.model)
        is_plain = all(getattr(model, name) is getattr(nn.Module, name) for name in _OF_CLASS)
        if not _importable(model) and not self.captured.needs_model and is_plain:
            # The graph does not need the model itself: only its mode, in a stand-in that pickles.
            stand_in = nn.Module()
            vars(stand_in).update({k: vars(self.model)[k] for k in ("_parameters", "_buffers", "_modules", "training")})
            state["_model"] = stand_in
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> "State":
        result = State.__new__(State)
        memo[id(self)] = result
        vars(result).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return result


class RegularizedModule(fx.GraphModule):
    """What `fxreg.transform` returns. Its state is the original model's own: not copies, the same registries."""

    def __init__(self, model: nn.Module, state: State, graph: fx.Graph) -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name=type(model).__name__)
        vars(self)["_parameters"] = model._parameters
        vars(self)["_buffers"] = model._buffers
        vars(self)["_non_persistent_buffers_set"] = model._non_persistent_buffers_set
        for hooks in _HOOKS_OF_STATE:
            vars(self)[hooks] = vars(model)[hooks]
        vars(self)["_modules"] = {**model._modules, CHILD: state}
        self._set_graph(graph)

    def _set_graph(self, graph: fx.Graph) -> None:
        if any(node.target is calls.expect_assumed for node in graph.nodes):
            graph.set_codegen(Asking(graph, CHILD))
        fx.GraphModule.graph.__set__(self, graph)  # type: ignore[attr-defined]  # a child may be called "graph"

    @property
    def training(self) -> bool:
        modules = vars(self).get("_modules", {})
        return modules[CHILD].training if CHILD in modules else True

    @training.setter
    def training(self, mode: bool) -> None:
        modules = vars(self).get("_modules", {})
        if CHILD in modules:
            modules[CHILD].training = mode

    # What a class may do in its own way, with more than parameters, buffers and flags, the model does.

    def train(self, mode: bool = True) -> Self:
        state_of(self).model.train(mode)
        return self

    def eval(self) -> Self:
        state_of(self).model.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        state_of(self).model.requires_grad_(requires_grad)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        state = state_of(self)
        state.model._apply(fn, recurse)  # type: ignore[no-untyped-call]
        state._apply(fn, recurse)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return state_of(self).model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return state_of(self).model.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # where it is inside another module
        state_of(self).model._load_from_state_dict(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> Self:
        if not state_of(self).provenance.plan.edits:
            return super()._replicate_for_data_parallel()  # type: ignore[return-value]
        raise FxregError(
            "DataParallel: each replica of an emitted module would add the penalties' gradients in full, and transform "
            "those of its own share of the batch. Use DistributedDataParallel."
        )

    def __copy__(self) -> "RegularizedModule":
        result = _restored()
        vars(result).update({k: v for k, v in vars(self).items() if k not in _OWN})
        type(result).__name__ = type(self).__name__
        result._set_graph(copy.deepcopy(self.graph))
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        state = {k: v for k, v in vars(self).items() if k not in (*_OWN, "_code")}
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            state[kind] = OrderedDict((key, _pickled(hook)) for key, hook in state[kind].items())
        return (_restored, (), {"attributes": state, "graph": written(self.graph), "name": type(self).__name__})

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state["attributes"])
        type(self).__name__ = state["name"]
        self._set_graph(read(state["graph"]))

    def __deepcopy__(self, memo: dict[int, Any]) -> "RegularizedModule":
        result = _restored()
        memo[id(self)] = result
        attributes = {k: copy.deepcopy(v, memo) for k, v in vars(self).items() if k not in _OWN}
        vars(result).update(attributes)
        type(result).__name__ = type(self).__name__
        result._set_graph(copy.deepcopy(self.graph))
        return result


def uncompiled(module: Any) -> Any:
    """The module that `torch.compile` was given, if a module is what it returned; any other module itself."""
    return module if isinstance(module, RegularizedModule) else getattr(module, "_orig_mod", module)


def is_emitted(module: Any) -> bool:
    """Whether a module is one that `fxreg.transform` returned, compiled or not."""
    return isinstance(uncompiled(module), RegularizedModule)


def emitted(gm: nn.Module) -> RegularizedModule:
    """The emitted module itself, also from inside what `torch.compile` returned.

    Raises:
        FxregError: the module was not emitted by `fxreg.transform`, or was re-traced since.
    """
    found = uncompiled(gm)
    if isinstance(found, RegularizedModule):
        return found
    inside = dict(gm.named_modules()) if isinstance(gm, nn.Module) else {}
    path = next((path for path, one in inside.items() if isinstance(one, RegularizedModule)), None)
    mend = "" if path is None else f" There is one inside, at {path!r}: pass that."
    raise FxregError(f"expected a module that fxreg.transform returned, got {type(gm).__name__}.{mend}")


def original(model: nn.Module) -> nn.Module:
    """The model that an emitted or compiled emitted module came from; any other module itself."""
    return state_of(model).model if is_emitted(model) else model


def state_of(gm: nn.Module) -> State:
    """The fxreg child of an emitted module."""
    state = emitted(gm)._modules[CHILD]
    assert isinstance(state, State)
    return state


def stand_for(island: nn.Module, module: nn.Module) -> None:
    """Let what was emitted for a stand-in of a module be the module's own forward, in its mode."""
    state = state_of(island)
    vars(state).update(_model=module, is_island=True)


def is_stale(state: State, which: int) -> bool:
    """Whether the model is no longer what one of its graphs holds for good."""
    return state.captured.chain[which].is_stale(state.model, seen(state.meaning))


def heeds(state: State, thing: Any, names: Sequence[str]) -> bool:
    """Whether a write into a thing may be one into what the graphs hold for good."""
    return staleness.heeds(state.model, [one for each in state.captured.chain for one in each.remembered], thing, names)


def mark_verified(state: State) -> None:
    state.provenance = replace(state.provenance, verified=True)


def forget_given(state: State) -> None:
    """Leave to the buffers alone what effects were given by name: the plan holds, and pickles, no second copy."""
    state.provenance = replace(state.provenance, plan=state.provenance.plan.without_tensors())


def own(hook: Any) -> Any:
    """A module-level hook with a code object of its own.

    `torch.compile` counts what it compiled by code object, and compiles a hook for every class: that of an emitted
    module is its own. The ninth module of a process would fail with fullgraph=True.
    """
    result: Any = FunctionType(hook.__code__.replace(), hook.__globals__, hook.__name__)
    result.owned_from = hook
    return result


class _Owned:
    """Pickles as what `own` makes of a hook."""

    def __init__(self, hook: Any) -> None:
        self.hook = hook

    def __reduce__(self) -> tuple[Any, ...]:
        return own, (self.hook,)


def _pickled(hook: Any) -> Any:
    return _Owned(hook.owned_from) if hasattr(hook, "owned_from") else hook


def _restored() -> RegularizedModule:
    return RegularizedModule.__new__(RegularizedModule)


def _importable(cls: type) -> bool:
    found: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is cls
