"""lower: (captured graph, plan) → the emitted module. The only stage that writes into a graph."""

import operator
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from . import calls, operators, penalty_calls
from .captured import Captured
from .effects import Gradient, Penalty
from .errors import CaptureError
from .flows import handed_on
from .hidden_uses import asks_for_parameters, hidden_uses
from .inserting import Insertion
from .module import CHILD, RegularizedModule, located
from .penalizing import check_called, penalize_activations, penalize_functions, unseen
from .planning import Emit, Penalize, Plan, PullBack

_WHOLE_MODEL: dict[Any, int] = {calls.call_model: 1, penalty_calls.call_model_penalized: 2}
"""Where calls of the whole model take stand-ins for parameters."""


def lower(model: nn.Module, captured: Captured, plan: Plan, emit: Emit) -> RegularizedModule:
    """Rewrite the captured graph as the plan says, and wrap it around the model's own state.

    Raises:
        CaptureError: a gradient transform on a parameter that is also reached past its registered name; a rule on calls
            that may stand where the graph does not see them.
        MatchError: a rule on activations that finds no call, or one that has the same penalty already.
    """
    lowering = _Lowering(model, captured, plan, emit)
    gm = lowering.emitted()
    others = [
        _Lowering(model, one, plan, emit, lowering, which) for which, one in enumerate(captured.chain[1:], start=1)
    ]
    vars(lowering.state)["others"] = tuple(one.emitted() for one in others)  # no children: they have the state for one
    if plan.functions:
        vars(lowering.state)["function"] = lower(model, captured, Plan(()), "backward")
    check_called(plan, [lowering, *others])
    return gm


def refuses(gm: fx.GraphModule) -> bool:
    """Whether a graph is there only to say that it would be wrong."""
    return any(node.target is calls.refuse for node in gm.graph.nodes)


class _Lowering(Insertion):
    """One rewrite, edit by edit."""

    def emitted(self) -> RegularizedModule:
        terms: list[fx.Node] = []
        if why := unseen(self):
            if not self.is_alternative:
                raise CaptureError(why)
            with self.graph.inserting_before(self.first()):
                self.insert("", "call_function", calls.refuse, (why,))
        else:
            terms = penalize_activations(self)
            terms += penalize_functions(self)
        self._pull_gradients()
        self._add_penalties(terms)
        for node in self.graph.nodes:
            if node.op in ("get_attr", "call_module") and (place := located(node.target)) != node.target:
                node.target = place
        return RegularizedModule(self.model, self.state, self.graph)

    # Gradients.

    def _pull_gradients(self) -> None:
        pulls = self.plan.pulls()
        if not pulls:
            return
        names = _parameter_names(self.model)
        _refuse_hidden_uses(self.model, pulls)
        uses = dict.fromkeys(self.graph.nodes)
        with self.graph.inserting_before(self.first()):
            pulled = self._pulled(pulls)
        added = [node for node in self.graph.nodes if node not in uses and node not in self.reads.values()]
        by_name = {name: pulled[site] for name, site in names.items() if site in pulled}
        inside: dict[str, dict[str, fx.Node]] = {}
        for name, node in by_name.items():
            for path in _ancestors(name):
                inside.setdefault(path, {})[name.removeprefix(f"{path}.")] = node
        self._refuse_questions(inside)
        for node in uses:
            self._substitute(node, by_name, inside)
        self._sink(added)

    def _refuse_questions(self, inside: Collection[str]) -> None:
        """Refuse modules that run as they are, on stand-ins for parameters, and ask for what these are not."""
        for node in self.graph.nodes:
            owner = node.args[0] if node.target is penalty_calls.call_penalized else node
            path = "" if node.target in _WHOLE_MODEL else str(owner.target)
            if not (path in inside or node.target in _WHOLE_MODEL):
                continue
            if (found := asks_for_parameters(self.model.get_submodule(path))) is None:
                continue
            why = (
                f"a rule transforms gradients of parameters of {path or 'the model'!r}, which runs as it is, and "
                f"{found} asks whether a tensor is a parameter or a leaf, or which one, or makes one: it would meet "
                "stand-ins, which are neither. Leave them out with exclude=, or use via='penalty'."
            )
            if not self.is_alternative:
                raise CaptureError(why)
            with self.graph.inserting_before(self.first()):
                self.insert("", "call_function", calls.refuse, (why,))
            return

    def _pulled(self, pulls: tuple[tuple[PullBack, ...], ...]) -> dict[str, fx.Node]:
        """The parameters as their uses are to see them: one after the other, but for what joint pullbacks need."""
        waiting: dict[str, list[tuple[PullBack, ...]]] = {}
        for edits in pulls:
            for edit in edits:
                waiting.setdefault(edit.site, []).append(edits)
        pulled: dict[str, fx.Node] = {}

        def pull(site: str, until: tuple[PullBack, ...] | None = None) -> None:
            """The gradient meets the last node first."""
            if site not in pulled:
                pulled[site] = self.insert(waiting[site][0][0].label, "get_attr", site)
            while waiting[site] and (edits := waiting[site][-1]) is not until:
                for edit in edits if len(edits) > 1 else ():
                    pull(edit.site, until=edits)
                self._pull(edits, pulled)
                for edit in edits:
                    waiting[edit.site].pop()

        for site in dict.fromkeys(edit.site for edit in self.plan.edits if isinstance(edit, PullBack)):
            pull(site)
        return pulled

    def _pull(self, edits: tuple[PullBack, ...], pulled: dict[str, fx.Node]) -> None:
        """Put one more node between parameters and their uses."""
        edit, *_ = edits
        definition: Any = edit.effect.definition
        target = definition.gradient_operator if isinstance(definition, Penalty) else definition.operator
        live, kwargs = self._live(edit), self.named(edit)
        if not definition.is_joint:
            name = "_".join([edit.site, edit.label, *(["gradient"] if isinstance(definition, Penalty) else [])])
            node = self.insert(edit.label, "call_function", target, (pulled[edit.site], *live), kwargs, name)
            pulled[edit.site] = node
            return
        weights = [pulled[edit.site] for edit in edits]
        together = self.insert(edit.label, "call_function", target, (weights, *live), kwargs, f"{edit.label}_together")
        for k, edit in enumerate(edits):
            name = f"{edit.site}_{edit.label}"
            pulled[edit.site] = self.insert(edit.label, "call_function", operator.getitem, (together, k), name=name)

    def _live(self, edit: PullBack) -> list[fx.Node]:
        """Reads of the loss scale, the strengths and the stream, in the order of the operator."""
        definition = edit.effect.definition
        scale, tensors = self.read("", "loss_scale"), self.tensors(edit.label, edit.effect)
        if isinstance(definition, Gradient) and definition.has_stream:
            tensors = self._in_schema_order(definition, tensors, self.stream(edit))
        return [scale, *tensors]

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
                module = self.insert("", "get_attr", target)
                args = (module, inside[target], node.args, dict(node.kwargs))
                called = self.graph.create_node("call_function", calls.call_with, args, name=f"{node.name}_with")
            called.meta.update(node.meta, is_wrapped=True)
            node.replace_all_uses_with(called)
            self.graph.erase_node(node)
        elif node.target is penalty_calls.call_penalized and str(node.args[0].target) in inside:  # type: ignore[union-attr]
            node.update_arg(2, inside[str(node.args[0].target)])  # type: ignore[union-attr]
        elif node.target in _WHOLE_MODEL:
            node.update_arg(_WHOLE_MODEL[node.target], dict(pulled))

    def _sink(self, nodes: list[fx.Node]) -> None:
        """Move parameters' nodes right before their first uses, so that a backward pass changes each gradient where it
        was made, while it is in a cache."""
        uses: dict[fx.Node, fx.Node] = {}
        heads: dict[fx.Node, fx.Node] = {}
        for node in reversed(nodes):
            if node.users:
                first = min(node.users)
                use = uses[node] = uses.get(first, first)
                heads.get(use, use).prepend(node)
                heads[use] = node

    # Penalties.

    def _add_penalties(self, terms: list[fx.Node]) -> None:
        with self.graph.inserting_before(self.output):
            terms = [*terms, *(self._penalty(edit) for edit in self.plan.penalties)]
            result = self.output.args[0]
            match self.emit:
                case "backward" if terms:
                    result = self._attached(result, terms)
                case "output":
                    result = (result, self._total(terms))
                case "loss" if terms:
                    training = self.insert("", "get_attr", CHILD)
                    training = self.insert("", "call_function", getattr, (training, "training"))
                    result = self.insert("", "call_function", calls.add_to_loss, (result, self._total(terms), training))
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
        given = handed_on(self.model, parts)
        more = (terms, self.read("", "loss_scale"), *([given] if given else ()))
        if not makers:
            return self.insert("", "call_function", calls.attach, (result, *more))
        attached = self.insert("", "call_function", calls.attach, (list(parts), *more))
        new = {p: self.insert("", "call_function", operator.getitem, (attached, i)) for i, p in enumerate(parts)}
        for maker in dict.fromkeys(makers):
            new[maker] = self.graph.node_copy(maker, lambda node: new.get(node, node))
        self.output.args = (fx.map_arg(result, lambda node: new.get(node, node)),)
        for maker in reversed(dict.fromkeys(makers)):
            self.graph.erase_node(maker)
        return self.output.args[0]

    def _penalty(self, edit: Penalize) -> fx.Node:
        weight = self.insert(edit.label, "get_attr", edit.site)
        operator, strengths, kwargs = self.formula(edit)
        return self.insert(
            edit.label, "call_function", operator, (weight, *strengths), kwargs, f"{edit.site}_{edit.label}"
        )

    def _total(self, terms: list[fx.Node]) -> fx.Node:
        if terms:
            return self.insert("", "call_function", operators.total, (terms,), name="penalty")
        zero = self.read("", self.buffer("no_penalty", torch.tensor(0.0, dtype=torch.float32, device=self.device)))
        return self.insert("", "call_method", "clone", (zero,), name="penalty")  # the caller may write into it


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


def _refuse_hidden_uses(model: nn.Module, pulls: tuple[tuple[PullBack, ...], ...]) -> None:
    """A parameter that is also reached past its name would be used untransformed there."""
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    sites = {id(parameters[edit.site]): edit for edits in reversed(pulls) for edit in edits}
    for path, attribute, identity in hidden_uses(model, sites):
        edit = sites[identity]
        raise CaptureError(
            f"rule {edit.label!r} transforms the gradient of {edit.site!r}, but that parameter is also held in "
            f"the attribute {attribute!r} of {path or 'the model'!r} ({type(modules[path]).__name__}), "
            "where it would be used untransformed. Register it once (nn.ParameterList, nn.ParameterDict, nn.ModuleList"
            "), or use via='penalty'."
        )
