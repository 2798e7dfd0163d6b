"""Writing into a graph: nodes with their rule's label, and the buffers that they read."""

import hashlib
import itertools
import keyword
import re
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import calls, penalty_calls
from .anchoring import anchor_of
from .captured import Captured
from .effects import Effect, Penalty, strength_name
from .module import CHILD, Provenance, State, scalar_dtype
from .planning import Emit, LeaveToCompanion, Penalize, PenalizeActivation, PenalizeFunction, Plan, PullBack


class Insertion:
    """A captured graph that is being written into, and what was inserted so far.

    Its state is a new one, or that of the first of several graphs.
    """

    def __init__(
        self,
        model: nn.Module,
        captured: Captured,
        plan: Plan,
        emit: Emit,
        first: "Insertion | None" = None,
        which: int = 0,
    ) -> None:
        self.model, self.plan, self.emit = model, plan, emit
        self.device = _device_of(model)
        self.is_alternative, self.opaque = first is not None, captured.opaque
        self.graph = captured.lent.lend()
        self.output = self.graph.output_node()
        self.reads: dict[str, fx.Node] = {}
        self.nodes: dict[str, str] = {}
        self.calls: dict[str, list[str]] = {}
        self.strengths: dict[str, str] = first.strengths if first else {}
        self.streams: dict[tuple[str, str], str] = first.streams if first else {}
        self.arguments: dict[tuple[str, str], str] = first.arguments if first else {}
        self.anchors: dict[tuple[str, str, str], str] = first.anchors if first else {}
        provenance = Provenance(plan, emit, False, self.nodes, self.strengths, self.streams, self.anchors, self.calls)
        self.state: State = first.state if first else State(model, captured, provenance, self.device)
        if captured.assumed is not None:
            self._check_assumed(which)
        for edit in plan.edits:
            if not (isinstance(edit, LeaveToCompanion) and edit.via == "optimizer"):  # which keeps it in its groups
                self.register(edit.label, edit.effect)
        self._anchor()

    def _check_assumed(self, which: int) -> None:
        """Ask in the graph itself, too, for whoever runs it without the module's forward."""
        places = [node for node in self.graph.nodes if node.op == "placeholder"]
        checked = {node.args[0] for node in self.graph.nodes if node.target is calls.expect_default}
        with self.graph.inserting_before(self.first()):
            arguments = [node for node in places if node not in checked]
            args = (self.insert("", "get_attr", CHILD), arguments, *([which] if which else []))
            self.insert("", "call_function", calls.expect_assumed, args)

    # State.

    def register(self, label: str, effect: Effect) -> None:
        """Give an effect's strengths and tensor arguments their buffers."""
        device = self.device
        for name, value in effect.strengths.items():
            public = strength_name(label, effect, name)
            dtype = scalar_dtype(device)
            if public not in self.strengths:
                self.strengths[public] = self.buffer(public, torch.tensor([value], dtype=dtype, device=device))
        for name, value in effect.arguments.items():
            if isinstance(value, Tensor) and (label, name) not in self.arguments:
                self.arguments[label, name] = self.buffer(f"{label}.{name}", value.to(device))

    def _anchor(self) -> None:
        """Give every parameter the tensors of its own that effects have for it, as copies."""
        edits = [edit for edit in self.plan.on_parameters if edit.effect.definition.anchors]
        parameters = dict(self.model.named_parameters()) if edits else {}
        for edit in edits:
            parameter = parameters[edit.site]
            for name in edit.effect.definition.anchors:
                if (edit.label, name, edit.site) not in self.anchors:
                    own = anchor_of(edit.effect.arguments[name], (edit.site, *edit.aliases), parameter)
                    copy = own.detach().clone().to(self.device if parameter.is_meta else parameter.device)
                    self.anchors[edit.label, name, edit.site] = self.buffer(f"{edit.label}.{edit.site}.{name}", copy)

    def buffer(self, name: str, value: Tensor) -> str:
        """Register a buffer under the name, or the nearest one that is free and a variable's in a forward."""
        plain = re.sub(r"\W", "_", name, flags=re.ASCII)
        is_taken = keyword.iskeyword(plain) or plain == "self"
        plain = f"rule_{plain}" if is_taken or not plain.isidentifier() else plain
        free = (plain if count == 1 else f"{plain}_{count}" for count in itertools.count(1))
        buffer = next(candidate for candidate in free if not self._is_taken(candidate))
        self.state.register_buffer(buffer, value, persistent=False)
        return buffer

    def _is_taken(self, name: str) -> bool:
        """As `hasattr` of the state says, which makes an error each time that it has none."""
        return name in self.state._buffers or name in vars(self.state) or hasattr(State, name)

    # Nodes.

    def insert(
        self, label: str, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: Any = None, name: str = ""
    ) -> fx.Node:
        node = self.graph.create_node(
            op, target, args, kwargs or {}, name=re.sub(r"\W", "_", name, flags=re.ASCII) or None
        )
        node.meta["fxreg"] = label
        if getattr(target, "__module__", None) in (calls.__name__, penalty_calls.__name__):
            node.meta["is_wrapped"] = True
        self.nodes[node.name] = label
        return node

    def first(self) -> fx.Node:
        """The first node behind the arguments."""
        found: fx.Node = next(node for node in self.graph.nodes if node.op != "placeholder")
        return found

    def read(self, label: str, buffer: str) -> fx.Node:
        """One read of a buffer of fxreg's, right behind the arguments, for all its uses."""
        if buffer not in self.reads:
            with self.graph.inserting_before(self.first()):
                self.reads[buffer] = self.insert(label, "get_attr", f"{CHILD}.{buffer}", name=buffer)
        return self.reads[buffer]

    def stream(self, edit: PullBack | PenalizeFunction) -> fx.Node:
        """A read of an edit's own random stream."""
        place = edit.label, edit.site
        if place not in self.streams:
            stream = torch.tensor([_stream_key(edit), 0], dtype=torch.int64, device=self.device)
            self.streams[place] = self.buffer(".".join(filter(None, (*place, "stream"))), stream)
        return self.read(edit.label, self.streams[place])

    def tensors(self, label: str, effect: Effect) -> list[fx.Node]:
        """Reads of an effect's strengths, in the order of its operator."""
        return [self.read(label, self.strengths[strength_name(label, effect, n)]) for n in effect.strengths]

    def named(self, edit: Penalize | PenalizeActivation | PullBack) -> dict[str, Any]:
        """An effect's named arguments: reads of those that are tensors."""
        found, label = dict(edit.effect.arguments), edit.label
        for name, value in edit.effect.arguments.items():
            if isinstance(value, Tensor):
                found[name] = self.read(label, self.arguments[label, name])
            elif name in edit.effect.definition.anchors:
                found[name] = self.read(label, self.anchors[label, name, edit.site])
        return found

    def formula(self, edit: Penalize | PenalizeActivation) -> tuple[Any, list[fx.Node], dict[str, Any]]:
        """A penalty's operator, strengths and named arguments."""
        definition = edit.effect.definition
        assert isinstance(definition, Penalty)
        kwargs = self.named(edit)
        if self.emit == "backward":
            kwargs["value"] = False
        return definition.operator, self.tensors(edit.label, edit.effect), kwargs


def _device_of(model: nn.Module) -> torch.device:
    """Where the model is; small tensors on the CPU go with any device, also with meta."""
    devices = {p.device for p in model.parameters() if p.device.type != "meta"}
    return devices.pop() if len(devices) == 1 else torch.device("cpu")


def _stream_key(edit: PullBack | PenalizeFunction) -> int:
    words = f"{edit.effect.arguments.get('seed', 0)}\n{edit.label}\n{edit.site}".encode()
    return int.from_bytes(hashlib.sha256(words).digest()[:8], "little", signed=True)
