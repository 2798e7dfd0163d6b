"""What capture gives to the next stage: a graph, and what it takes for granted.

Whether what a recorded graph assumes still holds is asked before anything else is done, so that the answer "no" costs
nothing: the emitted module then runs its other graph, which assumes nothing.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import fx, nn
from torch._C import _are_functorch_transforms_active  # private: no public way to ask

from .enclosed import dictionary_of
from .freezing import frozen
from .graphs import Lent, as_function, read, written
from .layouts import Glance
from .passing import Passing
from .staleness import Remembered, difference, modules_of
from .structure import PLAIN, alike, likeness, tensors

Way: TypeAlias = Literal["eager", "compiled", "traced"]
WAYS: tuple[Way, ...] = get_args(Way)


@dataclass(frozen=True)
class Captured:
    """The graph of a forward, and what stayed whole in it.

    Attributes:
        lent: the graph, which is written into in one place and stays what it was everywhere else.
        opaque: for the path of every module called as a whole, why; `""` is the root.
        remembered: what the graph holds as it was, for `staleness.difference`.
        assumed: what must hold of a call for the graph to be right; nothing if None.
        otherwise: what is to be asked where that does not hold.
        passing: how the forward's arguments are passed; known of the last of a chain.
    """

    lent: Lent
    opaque: Mapping[str, str]
    remembered: tuple[Remembered, ...] = ()
    assumed: "Assumed | None" = None
    otherwise: "Captured | None" = None
    passing: Passing | None = None

    @property
    def graph(self) -> fx.Graph:
        """Complete, with its output node; parameters are read where the forward reads them."""
        return self.lent.graph

    @property
    def chain(self) -> "tuple[Captured, ...]":
        """What is tried in turn. The last one assumes nothing."""
        return (self, *(self.otherwise.chain if self.otherwise else ()))

    @property
    def views(self) -> "tuple[Captured, ...]":
        """The graphs that say most of the forward: its recordings, or else the one that always holds."""
        return self.chain[:-1] or self.chain

    def holds_in(self, ways: tuple[Way, ...]) -> bool:
        """Whether it holds in all of these ways to run."""
        return self.assumed is None or set(ways) <= set(self.assumed.ways)

    def in_ways(self, ways: tuple[Way, ...]) -> "Captured":
        """The same chain, for these ways to run where it depends on the way."""
        otherwise = self.otherwise and self.otherwise.in_ways(ways)
        if self.assumed is None or self.holds_in(WAYS):
            return replace(self, otherwise=otherwise)
        return replace(self, assumed=replace(self.assumed, ways=ways), otherwise=otherwise)

    def without_compiled(self) -> "Captured":
        """The same chain, without what was recorded for compiled code."""
        if self.assumed is None or self.otherwise is None:
            return self
        otherwise, ways = self.otherwise.without_compiled(), tuple(one for one in self.assumed.ways if one == "eager")
        return replace(self, assumed=replace(self.assumed, ways=ways), otherwise=otherwise) if ways else otherwise

    def before(self, last: "Captured") -> "Captured":
        """The same chain, and behind it another."""
        return replace(self, otherwise=self.otherwise.before(last) if self.otherwise else last)

    @property
    def needs_model(self) -> bool:
        """Whether the original model's own forward may run."""
        return any("" in one.opaque for one in self.chain)

    def is_stale(self, model: nn.Module, glance: Glance | None) -> bool:
        """Whether what the graph holds as it was is no longer so; of a model that may still look as it did."""
        return difference(model, self.remembered, found=self.passed(glance)) is not None

    def passed(self, glance: Glance | None) -> Sequence[Any] | None:
        """The modules that were found to be as they were when the model looked so."""
        _, found = (glance and glance.passed.get(id(self))) or (self, None)
        return found

    def passes(self, model: nn.Module, glance: Glance) -> None:
        """Note that they were found so, if there was no difference at a glance."""
        if id(self) not in glance.passed:
            glance.passed[id(self)] = (self, modules_of(model, self.remembered))

    def instead(self, difference: str) -> "Captured":
        """The same, with a note that a recording was not right."""
        opaque = {
            path: f"{reason}; recorded, it was not the model: {difference}" for path, reason in self.opaque.items()
        }
        return replace(self, opaque=opaque)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "lent": written(self.graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lent=Lent(read(state["lent"])))


@dataclass(frozen=True)
class Settled:
    """An attribute that stays what it is after a first call, of a module or of an object that a module keeps.

    Attributes:
        path: of the module.
        keeper: the module's attribute with the object; "" for the module itself.
        name: of the attribute; of hooks, their kind.
        value: a plain one, how many hooks, or else the type: what compiled code compares.
        exactly: all of it, frozen.
    """

    path: str
    keeper: str
    name: str
    value: Any
    exactly: Any

    def holds(self, model: nn.Module) -> bool:
        owner: Any = model.get_submodule(self.path)
        if self.keeper:
            owner = getattr(owner, self.keeper, None)
        now: object = getattr(owner, self.name, ...)
        if not torch.compiler.is_compiling():
            return alike(frozen(now), self.exactly)
        if isinstance(now, collections.OrderedDict):
            return bool(len(now) == self.value)
        is_type = isinstance(self.value, type)
        return type(now) is self.value if is_type else bool(likeness(now) == likeness(self.value))


def settled(model: nn.Module, changes: Iterable[tuple[int, str, Any]]) -> tuple[Settled, ...] | None:
    """Where changes of state are that were just made, as `Snapshot.settling` gives them; None if somewhere else."""
    places: dict[int, tuple[str, str, str]] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, collections.OrderedDict):  # which has a __dict__ as well
                places.setdefault(id(value), (path, "", name))
            elif type(value).__dictoffset__ and not isinstance(value, type):
                places.setdefault(id(dictionary_of(value)), (path, name, ""))
        places[id(vars(module))] = (path, "", "")
    found = []
    for identity, name, value in changes:
        if identity not in places:
            return None
        path, keeper, kind = places[identity]
        now = getattr(model.get_submodule(path), kind) if kind else value
        found.append(
            Settled(path, keeper, kind or name, value if isinstance(value, PLAIN) else type(value), frozen(now))
        )
    return tuple(found)


def way() -> Way:
    """How the running code runs, as it can find out by asking."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
        return "traced"
    return "compiled" if torch.compiler.is_compiling() else "eager"


@dataclass(frozen=True)
class Assumed:
    """What held when a forward was recorded.

    Attributes:
        arguments: what each argument was like, by position.
        training: the root's mode, if it does other things in the other one.
        modes: the paths of the modules whose `training` was read; all had the root's mode.
        kinds: data types and devices, and autocast, if the forward asked for any.
        questions: a graph from the arguments to what else was asked of them.
        answers: what it gave.
        ways: the ways to run for which it holds.
        asks_values: whether it computes with values, and not with sizes alone.
        kept: objects that the graph refers to, by name.
        settled: what a first call of the model sets for good.
    """

    arguments: tuple[Any, ...]
    training: bool | None
    modes: tuple[str, ...]
    kinds: tuple[Any, ...] | None
    questions: fx.Graph
    answers: tuple[Any, ...]
    ways: tuple[Way, ...]
    asks_values: bool
    kept: Mapping[str, Any]
    settled: tuple[Settled, ...] = ()
    ask: Callable[..., Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ask", as_function(self.questions))

    def __getstate__(self) -> dict[str, Any]:
        return {**{k: v for k, v in vars(self).items() if k != "ask"}, "questions": written(self.questions)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, questions=read(state["questions"]))
        self.__post_init__()

    def holds(self, model: nn.Module, arguments: tuple[Any, ...]) -> bool:
        """Whether it does, for a call of the model with these arguments."""
        if way() not in self.ways or tuple(map(likeness, arguments)) != self.arguments:
            return False
        for one in self.settled:
            if not one.holds(model):
                return False
        mode = model.training
        if self.training is not None and self.training != mode:
            return False
        for path in self.modes:
            if model.get_submodule(path).training != mode:
                return False
        if self.kinds is not None and kinds_of(model, arguments) != self.kinds:
            return False
        if self.asks_values and _are_functorch_transforms_active():
            return False
        return self._answers_eagerly(arguments) if self.asks_values else self._answers(arguments)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _answers_eagerly(self, arguments: tuple[Any, ...]) -> bool:
        """A model that looks at values breaks Dynamo's graph. So does this, once for all of them."""
        return self._answers(arguments)

    def _answers(self, arguments: tuple[Any, ...]) -> bool:
        try:
            answers = self.ask(*arguments) if self.answers else ()
        except Exception:  # `len(x) > 3 and x[3] > 0` is two questions, and here both are asked
            return False
        for answer, expected in zip(answers, self.answers, strict=True):
            # Truth values are branched on, not compared: Dynamo's symbolic ones cannot be.
            if (bool(answer) is not expected) if isinstance(expected, bool) else answer != expected:
                return False
        return True


def kinds_of(model: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The data types and devices of arguments, parameters and buffers, and whether autocast is on."""
    everything = itertools.chain(tensors(arguments), model.parameters(), model.buffers())
    return (torch._C._is_any_autocast_enabled(), *[(tensor.dtype, tensor.device) for tensor in everything])


def joined(asked: Iterable[tuple[fx.Graph, tuple[Any, ...]]]) -> tuple[fx.Graph, tuple[Any, ...]]:
    """Sets of questions about the same arguments, with their answers, as one."""
    graph, nodes, answers = fx.Graph(), list[Any](), list[Any]()
    places: list[fx.Node] = []
    for questions, given in asked:
        new: dict[fx.Node, fx.Node] = {}
        is_first = not places
        for node in questions.nodes:
            if node.op == "output":
                nodes += [new[each] for each in node.args[0]]
            elif node.op == "placeholder" and not is_first:
                new[node] = places[len(new)]
            else:
                new[node] = graph.node_copy(node, new.__getitem__)
                places += [new[node]] if node.op == "placeholder" else []
        answers += given
    graph.output(tuple(nodes))
    return graph, tuple(answers)
