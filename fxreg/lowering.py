"""lower: (captured graph, plan) → the emitted module. The only stage that writes into a graph."""

import hashlib
import itertools
import keyword
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import calls, operators
from .captured import Captured
from .effects import Effect, Gradient, Penalty, strength_name
from .errors import CaptureError
from .hidden_uses import hidden_uses
from .module import CHILD, Provenance, RegularizedModule, State, located, scalar_dtype
from .planning import Emit, LeaveToCompanion, Penalize, Plan, PullBack


def lower(model: nn.Module, captured: Captured, plan: Plan, emit: Emit) -> RegularizedModule:
    """Rewrite a copy of the captured graph as the plan says, and wrap it around the model's own state.

    Raises:
        CaptureError: a gradient transform on a parameter that is also reached past its registered name.
    """
    lowering = _Lowering(model, captured, plan, emit)
    gm = lowering.emitted()
    others = (
        _Lowering(model, one, plan, emit, lowering, which).emitted()
        for which, one in enumerate(captured.chain[1:], start=1)
    )
    vars(lowering.state)["others"] = tuple(others)  # no children: they have the state for one
    return gm


class _Lowering:
    """One rewrite: the graph being written, and what has been inserted so far; its state may be another one's."""

    def __init__(
        self,
        model: nn.Module,
        captured: Captured,
        plan: Plan,
        emit: Emit,
        first: "_Lowering | None" = None,
        which: int = 0,
    ) -> None:
        self.model, self.plan, self.emit = model, plan, emit
        self.device = _device_of(model)
        self.graph = fx.Graph()
        result = self.graph.graph_copy(captured.graph, {})
        self.output = self.graph.output(result)
        self.reads: dict[str, fx.Node] = {}
        self.nodes: dict[str, str] = {}
        self.strengths: dict[str, str] = first.strengths if first else {}
        self.streams: dict[tuple[str, str], str] = first.streams if first else {}
        self.arguments: dict[tuple[str, str], str] = first.arguments if first else {}
        provenance = Provenance(plan, emit, False, self.nodes, self.strengths, self.streams)
        self.state: State = first.state if first else State(model, captured, provenance, self.device)
        if captured.assumed is not None:
            self._check_assumed(which)
        for edit in plan.edits:
            if not isinstance(edit, LeaveToCompanion):
                self._register(edit.label, edit.effect)

    def emitted(self) -> RegularizedModule:
        self._pull_gradients()
        self._add_penalties()
        for node in self.graph.nodes:
            if node.op in ("get_attr", "call_module") and (place := located(node.target)) != node.target:
                node.target = place
        return RegularizedModule(self.model, self.state, self.graph)

    def _check_assumed(self, which: int) -> None:
        """Ask in the graph itself, too, for whoever runs it without the module's forward."""
        places = [node for node in self.graph.nodes if node.op == "placeholder"]
        checked = {node.args[0] for node in self.graph.nodes if node.target is calls.expect_default}
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        with self.graph.inserting_before(first):
            arguments = [node for node in places if node not in checked]
            args = (self.graph.get_attr(CHILD), arguments, *([which] if which else []))
            self._insert("", "call_function", calls.expect_assumed, args)

    # State.

    def _register(self, label: str, effect: Effect) -> None:
        """Give an effect's strengths and tensor arguments their buffers."""
        device = self.device
        for name, value in effect.strengths.items():
            public = strength_name(label, effect, name)
            dtype = scalar_dtype(device)
            if public not in self.strengths:
                self.strengths[public] = self._buffer(public, torch.tensor([value], dtype=dtype, device=device))
        for name, value in effect.arguments.items():
            if isinstance(value, Tensor) and (label, name) not in self.arguments:
                self.arguments[label, name] = self._buffer(f"{label}.{name}", value.to(device))

    def _buffer(self, name: str, value: Tensor) -> str:
        """Register a buffer under the name, or the nearest one that is free and an identifier."""
        plain = re.sub(r"\W", "_", name, flags=re.ASCII)
        plain = plain if plain.isidentifier() and not keyword.iskeyword(plain) else f"rule_{plain}"
        free = (plain if count == 1 else f"{plain}_{count}" for count in itertools.count(1))
        buffer = next(candidate for candidate in free if not hasattr(self.state, candidate))
        self.state.register_buffer(buffer, value, persistent=False)
        return buffer

    # Nodes.

    def _insert(
        self, label: str, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: Any = None, name: str = ""
    ) -> fx.Node:
        node = self.graph.create_node(
            op, target, args, kwargs or {}, name=re.sub(r"\W", "_", name, flags=re.ASCII) or None
        )
        node.meta["fxreg"] = label
        if getattr(target, "__module__", None) == calls.__name__:
            node.meta["is_wrapped"] = True
        self.nodes[node.name] = label
        return node

    def _read(self, label: str, buffer: str) -> fx.Node:
        """One read of a buffer of fxreg's, right behind the arguments, for all its uses."""
        if buffer not in self.reads:
            first = next(node for node in self.graph.nodes if node.op != "placeholder")
            with self.graph.inserting_before(first):
                self.reads[buffer] = self._insert(label, "get_attr", f"{CHILD}.{buffer}", name=buffer)
        return self.reads[buffer]

    def _tensors(self, label: str, effect: Effect) -> list[fx.Node]:
        """Reads of an effect's strengths, in the order of its operator."""
        return [self._read(label, self.strengths[strength_name(label, effect, n)]) for n in effect.strengths]

    def _named(self, label: str, effect: Effect) -> dict[str, Any]:
        return {
            name: self._read(label, self.arguments[label, name]) if isinstance(value, Tensor) else value
            for name, value in effect.arguments.items()
        }

    # Gradients.

    def _pull_gradients(self) -> None:
        pulls = self.plan.pulls()
        if not pulls:
            return
        names = _parameter_names(self.model)
        _refuse_hidden_uses(self.model, pulls)
        uses = list(self.graph.nodes)
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        with self.graph.inserting_before(first):
            pulled = {site: self._pulled(site, edits) for site, edits in pulls.items()}
        by_name = {name: pulled[site] for name, site in names.items() if site in pulled}
        inside: dict[str, dict[str, fx.Node]] = {}
        for name, node in by_name.items():
            for path in _ancestors(name):
                inside.setdefault(path, {})[name.removeprefix(f"{path}.")] = node
        for node in uses:
            self._substitute(node, by_name, inside)

    def _pulled(self, site: str, edits: tuple[PullBack, ...]) -> fx.Node:
        """The parameter as its uses are to see it. The gradient meets the last node first."""
        node = self._insert(edits[0].label, "get_attr", site)
        for edit in reversed(edits):
            definition = edit.effect.definition
            scale = self._read("", "loss_scale")
            tensors = self._tensors(edit.label, edit.effect)
            if isinstance(definition, Penalty):
                target: Any = definition.gradient_operator
                suffix = "gradient"
            else:
                assert isinstance(definition, Gradient)
                target, suffix = definition.operator, ""
                if definition.has_stream:
                    key = _stream_key(edit)
                    stream = torch.tensor([key, 0], dtype=torch.int64, device=self.device)
                    if (edit.label, site) not in self.streams:
                        self.streams[edit.label, site] = self._buffer(f"{edit.label}.{site}.stream", stream)
                    buffer = self.streams[edit.label, site]
                    tensors = self._in_schema_order(definition, tensors, self._read(edit.label, buffer))
            name = "_".join(filter(None, (site, edit.label, suffix)))
            kwargs = self._named(edit.label, edit.effect)
            node = self._insert(edit.label, "call_function", target, (node, scale, *tensors), kwargs, name)
        return node

    @staticmethod
    def _in_schema_order(definition: Gradient[Any], strengths: list[fx.Node], stream: fx.Node) -> list[fx.Node]:
        rest = iter(strengths)
        live = [a for a in definition.parameters if a.schema in ("strength", "stream")]
        return [stream if argument.schema == "stream" else next(rest) for argument in live]

    def _substitute(
        self, node: fx.Node, pulled: Mapping[str, fx.Node], inside: Mapping[str, dict[str, fx.Node]]
    ) -> None:
        """Make one use of parameters use the pulled ones."""
        target = str(node.target)
        if node.op == "get_attr" and target in pulled:
            node.replace_all_uses_with(pulled[target])
            self.graph.erase_node(node)
        elif node.op == "call_module" and target in inside:
            with self.graph.inserting_before(node):
                module = self.graph.get_attr(target)
                args = (module, inside[target], node.args, dict(node.kwargs))
                called = self.graph.create_node("call_function", calls.call_with, args, name=f"{node.name}_with")
            called.meta.update(node.meta, is_wrapped=True)
            node.replace_all_uses_with(called)
            self.graph.erase_node(node)
        elif node.target is calls.call_model:
            node.update_arg(1, dict(pulled))

    # Penalties.

    def _add_penalties(self) -> None:
        with self.graph.inserting_before(self.output):
            terms = [self._penalty(edit) for edit in self.plan.penalties]
            result = self.output.args[0]
            match self.emit:
                case "backward" if terms:
                    result = self._attached(result, terms)
                case "output":
                    result = (result, self._total(terms))
                case "loss" if terms:
                    training = self._insert("", "get_attr", CHILD)
                    training = self._insert("", "call_function", getattr, (training, "training"))
                    result = self._insert(
                        "", "call_function", calls.add_to_loss, (result, self._total(terms), training)
                    )
        self.output.args = (result,)

    def _attached(self, result: Any, terms: list[fx.Node]) -> Any:
        """The output with the penalties attached. Objects that the graph itself makes are made of attached parts, so
        that nobody needs to look for tensors in them."""
        makers: list[fx.Node] = []
        parts: dict[fx.Node, None] = {}

        def find(node: fx.Node) -> fx.Node:
            if isinstance(node.target, type) or node.target is calls.make:
                fx.map_arg((node.args, node.kwargs), find)
                makers.append(node)
            elif node.op != "get_attr":
                parts[node] = None
            return node

        fx.map_arg(result, find)
        scale = self._read("", "loss_scale")
        if not makers:
            return self._insert("", "call_function", calls.attach, (result, terms, scale))
        attached = self._insert("", "call_function", calls.attach, (list(parts), terms, scale))
        new = {p: self._insert("", "call_function", operator.getitem, (attached, i)) for i, p in enumerate(parts)}
        for maker in dict.fromkeys(makers):
            new[maker] = self.graph.node_copy(maker, lambda node: new.get(node, node))
        self.output.args = (fx.map_arg(result, lambda node: new.get(node, node)),)
        for maker in reversed(dict.fromkeys(makers)):
            self.graph.erase_node(maker)
        return self.output.args[0]

    def _penalty(self, edit: Penalize) -> fx.Node:
        definition = edit.effect.definition
        assert isinstance(definition, Penalty)
        weight = self._insert(edit.label, "get_attr", edit.site)
        kwargs = self._named(edit.label, edit.effect)
        if self.emit == "backward":
            kwargs["value"] = False
        return self._insert(
            edit.label,
            "call_function",
            definition.operator,
            (weight, *self._tensors(edit.label, edit.effect)),
            kwargs,
            f"{edit.site}_{edit.label}",
        )

    def _total(self, terms: list[fx.Node]) -> fx.Node:
        if terms:
            return self._insert("", "call_function", operators.total, (terms,), name="penalty")
        zero = self._buffer("no_penalty", torch.tensor(0.0, dtype=torch.float32, device=self.device))
        return self._read("", zero)


def _device_of(model: nn.Module) -> torch.device:
    """Where the model is; small tensors on the CPU go with any device, also with meta."""
    devices = {p.device for p in model.parameters() if p.device.type != "meta"}
    return devices.pop() if len(devices) == 1 else torch.device("cpu")


def _ancestors(name: str) -> Iterator[str]:
    """The paths of the modules around a parameter: of "a.b.c", "a.b" and "a"."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _parameter_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter, and the site it belongs to."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _stream_key(edit: PullBack) -> int:
    words = f"{edit.effect.arguments.get('seed', 0)}\n{edit.label}\n{edit.site}".encode()
    return int.from_bytes(hashlib.sha256(words).digest()[:8], "little", signed=True)


def _refuse_hidden_uses(model: nn.Module, pulls: Mapping[str, tuple[PullBack, ...]]) -> None:
    """A parameter that is also reached past its name would be used untransformed there."""
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    sites = {id(parameters[site]): site for site in pulls}
    for path, attribute, identity in hidden_uses(model, sites):
        site = sites[identity]
        raise CaptureError(
            f"rule {pulls[site][0].label!r} transforms the gradient of {site!r}, but that parameter is also held in "
            f"the attribute {attribute!r} of {path or 'the model'!r} ({type(modules[path]).__name__}), "
            "where it would be used untransformed. Register it once (nn.ParameterList, nn.ParameterDict, nn.ModuleList"
            "), or use via='penalty'."
        )
