"""Reading a `torch.export.ExportedProgram`: a module that holds its state, and its graph, ready to be lowered.

The graph is taken as it is and not traced again: export has already made a graph of the forward. What remains to be
shown is that gradients flow through it as through the model, and whatever does not show that is refused.
"""

import dis
import inspect
import math
import operator
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP  # private: what torch's own guards are evaluated with
from torch.utils import _pytree as pytree  # private by name only: what torch.export and torch.func document

from .calls import call_region, give_output, take_inputs
from .captured import Captured
from .enclosed import enclosed
from .errors import CaptureError, FxregError
from .graphs import Lent, read, written
from .kinds import recorded_kinds
from .module import CHILD
from .staleness import remember

_GUARDS = "_guards_fn"
_FAILED = "Guard failed: "
_REGIONS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
_MODES = ("train", "training")
_KEPT = ("nn_module_stack", "stack_trace", "is_wrapped")


class ExportedModule(nn.Module):
    """The state of an exported program under its own names: what an emitted module shares instead of a model.

    Attributes:
        exported_inputs: what the program takes.
        exported_output: the structure of what it returns.
        nn_module_stack: for the path of every module that ran when the program was exported, the name of its class.
    """

    exported_inputs: "Inputs"
    exported_output: "Structure"
    nn_module_stack: dict[str, type | str]

    def __init__(self, unlifted: fx.GraphModule) -> None:
        super().__init__()
        own = vars(self)
        own["_parameters"], own["_buffers"] = unlifted._parameters, unlifted._buffers
        own["_non_persistent_buffers_set"] = unlifted._non_persistent_buffers_set
        own["_modules"] = {
            name: Region(child, _copied(child.graph)) if isinstance(child, fx.GraphModule) else child
            for name, child in unlifted._modules.items()
            if name != _GUARDS
        }
        own.update({name: value for name, value in vars(unlifted).items() if isinstance(value, Tensor)})  # constants
        own["exported_inputs"] = Inputs.of(unlifted)
        own["exported_output"] = Structure(unlifted.graph._codegen.pytree_info.out_spec)  # type: ignore[attr-defined]
        own["nn_module_stack"] = recorded_kinds(unlifted)
        own["exported_mode"] = _exported_mode(unlifted)

    @property
    def training(self) -> bool:
        """The mode in which the program was exported: False only where its operators say so."""
        return bool(vars(self).get("exported_mode", True))

    @training.setter
    def training(self, mode: bool) -> None:
        if "exported_mode" in vars(self) and mode != self.training:
            have, want = ("train", "eval") if self.training else ("eval", "train")
            raise FxregError(
                f"the program was exported in {have} mode, which is part of its graph: it has no {want} mode. Export "
                f"the model again after model.{want}(), or use the model itself, which shares its parameters."
            )


class Region(fx.GraphModule):
    """The graph of a region with a grad or autocast mode of its own, pickled as a graph."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_region, (dict(self._modules), written(self.graph)))


def _region(children: Mapping[str, nn.Module], rows: Any) -> Region:
    root = nn.Module()
    root._modules.update(children)
    return Region(root, read(rows))


class Structure:
    """A structure of nested containers, pickled as an example of it."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        self.spec = spec

    def __reduce__(self) -> tuple[Any, ...]:
        return (_structure_of, (pytree.tree_unflatten(range(self.spec.num_leaves), self.spec),))

    def __deepcopy__(self, memo: Any) -> "Structure":
        return self


def _structure_of(example: Any) -> Structure:
    return Structure(pytree.tree_structure(example))


class Inputs:
    """What a program takes.

    Attributes:
        names: its arguments.
        structure: of ((positional), {keyword}).
        ranks: for the index of every leaf that is a tensor, its number of dimensions.
        constants: for the index of every leaf that is neither a tensor nor a symbol, nor in the guards, its value.
        guards: what holds of the arguments, as Python expressions.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        structure: Structure,
        ranks: dict[int, int],
        constants: dict[int, Any],
        guards: tuple[str, ...],
    ) -> None:
        self.names, self.structure, self.ranks, self.constants, self.guards = names, structure, ranks, constants, guards
        lines = [f"    if not ({guard}): refuse({guard!r})" for guard in guards] or ["    pass"]
        space: dict[str, Any] = {**SYMPY_INTERP, "math": math, "inf": math.inf, "torch": torch, "refuse": _refuse_guard}
        exec("\n".join([f"def check({', '.join(names)}):", *lines]), space)
        self._check = torch._dynamo.dont_skip_tracing(space["check"])

    def __reduce__(self) -> tuple[Any, ...]:
        return (Inputs, (self.names, self.structure, self.ranks, self.constants, self.guards))

    def __deepcopy__(self, memo: Any) -> "Inputs":
        return self

    @classmethod
    def of(cls, unlifted: fx.GraphModule) -> "Inputs":
        names = tuple(unlifted.graph._codegen.pytree_info.orig_args)  # type: ignore[attr-defined]
        placeholders = unlifted.graph.find_nodes(op="placeholder")
        values = [node.meta.get("val") for node in placeholders]
        ranks = {index: value.ndim for index, value in enumerate(values) if isinstance(value, Tensor)}
        constants = {index: value for index, value in enumerate(values) if not isinstance(value, _GUARDED)}
        return cls(names, Structure(unlifted._in_spec), ranks, constants, _guards(unlifted))

    def given(self, values: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, one value for each name, as the program takes them: by position, by keyword."""
        values, (positional, keyword) = list(values), self.structure.spec.children()
        count = positional.num_children
        return tuple(values[:count]), dict(zip(keyword.context, values[count:], strict=True))

    def arranged(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call's arguments as the program takes them.

        Raises:
            CaptureError: they do not fit.
        """
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, kind) for name in self.names])
        try:
            arranged = self.given(signature.bind(*args, **kwargs).arguments.values())
        except TypeError as error:
            raise CaptureError(
                f"example_inputs do not fit the exported program's {signature}: {error}. Pass a tuple for positional "
                "or a dict for keyword arguments."
            ) from None
        self.leaves(*arranged)
        return arranged

    def leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The parts that the graph takes; raises unless the program was exported for such arguments."""
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))  # interpreters pass immutable ones
        if spec != self.structure.spec:
            raise CaptureError(
                f"the program was exported for arguments of the structure {self.structure.spec}, but was called with "
                f"{spec}. Call it as it was exported."
            )
        for index, rank in self.ranks.items():
            if not isinstance(leaves[index], Tensor) or leaves[index].ndim != rank:
                raise CaptureError(
                    f"part {index} of the arguments ({', '.join(self.names)}) was a tensor of {rank} dimensions when "
                    f"the program was exported, but is {_kind(leaves[index])}. Export the model again."
                )
        for index, value in self.constants.items():
            if type(leaves[index]) is not type(value) or leaves[index] != value:
                raise CaptureError(
                    f"part {index} of the arguments ({', '.join(self.names)}) was {value!r} when the program was "
                    f"exported, and is part of its graph; it was called with {leaves[index]!r}. Export the model again."
                )
        self._check(*args, *kwargs.values())
        return leaves


_GUARDED = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, int, float, str)


def _kind(value: Any) -> str:
    return f"one of {value.ndim}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _refuse_guard(guard: str) -> NoReturn:
    raise CaptureError(
        f"the program was exported for inputs with {guard}, and these are others. Export the model again, with "
        "dynamic_shapes= that include them."
    )


_modules: "WeakKeyDictionary[ExportedProgram, ExportedModule]" = WeakKeyDictionary()


def as_module(model: nn.Module | ExportedProgram) -> nn.Module:
    """An exported program as the module with its state, always the same one; a module as it is.

    Raises:
        CaptureError: a program that fxreg cannot take.
    """
    if not isinstance(model, ExportedProgram):
        return model
    return _module_of(model, _unlifted(model))


def read_program(program: ExportedProgram) -> tuple[ExportedModule, Captured]:
    """A program as the module with its state, and its graph.

    Raises:
        CaptureError: a program that fxreg cannot take.
    """
    unlifted = _unlifted(program)
    module = _module_of(program, unlifted)
    return module, Captured(Lent(_graph(unlifted, module)), {}, remember(module))


def _module_of(program: ExportedProgram, unlifted: fx.GraphModule) -> ExportedModule:
    known = _modules.get(program)
    if known is None or {*map(id, known.parameters())} != {*map(id, unlifted.parameters())}:
        known = _modules[program] = ExportedModule(unlifted)
    return known


def _unlifted(program: ExportedProgram) -> fx.GraphModule:
    if program.dialect != "TRAINING":
        raise CaptureError(
            "the exported program was decomposed (run_decompositions), which drops no_grad and autocast regions and "
            "changes gradients. Pass what torch.export.export returned."
        )
    if program.graph_signature.lifted_custom_objs:
        found = ", ".join(map(repr, program.graph_signature.lifted_custom_objs))
        raise CaptureError(f"the exported program holds script objects ({found}), which fxreg cannot take.")
    unlifted = program.module()
    for gm in _graph_modules(unlifted):
        for node in gm.graph.nodes:
            _refuse_unknown(node)
    return unlifted


def _graph_modules(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    return (module for module in gm.modules() if isinstance(module, fx.GraphModule))


def _refuse_unknown(node: fx.Node) -> None:
    """Raise unless gradients through a node are known to be those of the model."""
    where = _where(node)
    if node.op == "call_module" and node.target != _GUARDS:
        raise CaptureError(f"the exported program calls the module {node.target!r} as a whole ({where}).")
    if node.op != "call_function":
        return
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace == "fxreg":
            raise CaptureError(
                f"the exported program calls {target} ({where}): what was exported was already transformed. Export the "
                "original model, and transform that, with all the rules."
            )
        return
    if isinstance(target, torch._ops.HigherOrderOperator):
        if str(target) not in _REGIONS:
            raise CaptureError(
                f"the exported program holds {target} ({where}), through which gradients and rules are not known to be "
                "right. Transform the model itself; what cannot be traced stays a call there."
            )
        return
    if getattr(target, "__module__", None) not in ("_operator", "math", "builtins") and not _is_symbolic(target):
        name = getattr(target, "__qualname__", repr(target))
        raise CaptureError(
            f"the exported program calls {name} ({where}), which is no operator and may change a mode that the graph "
            "does not show. Transform the model itself."
        )


def _is_symbolic(target: Any) -> bool:
    name = str(getattr(target, "__name__", ""))
    return name.startswith("sym_") and getattr(torch, name, None) is target


def _where(node: fx.Node) -> str:
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
    return f"node {node.name!r}" + (f" of {paths[-1]!r}" if paths else "")


def _guards(unlifted: fx.GraphModule) -> tuple[str, ...]:
    """What the program asserts of its arguments. torch keeps it as code only; each message is the expression."""
    if not unlifted.graph.find_nodes(op="placeholder"):
        return ()
    if _GUARDS not in unlifted._modules:
        raise CaptureError(
            "the exported program does not say what inputs it was exported for, since its example inputs are gone. Set "
            "program.example_inputs = (args, kwargs)."
        )
    forward: Any = unlifted._modules[_GUARDS].forward  # type: ignore[union-attr]
    codes = [one.__code__ for one in (forward, *enclosed(forward)) if isinstance(one, types.FunctionType)]
    written = next((code for code in codes if code.co_name == "_"), None)
    if written is None:
        raise CaptureError(f"torch {torch.__version__} keeps the guards of exported programs in an unknown way.")
    messages = [text for text in written.co_consts if isinstance(text, str) and text.startswith(_FAILED)]
    asserted = [one for one in dis.get_instructions(written) if one.argval == "_assert"]
    if len(messages) != len(asserted):
        raise CaptureError(f"torch {torch.__version__} writes the guards of exported programs in an unknown way.")
    return tuple(message.removeprefix(_FAILED) for message in messages)


def _exported_mode(unlifted: fx.GraphModule) -> bool:
    """The mode that the operators show; without any sign, train."""
    modes = {mode for gm in _graph_modules(unlifted) for node in gm.graph.nodes for mode in _modes(node)}
    return modes != {False}


def _modes(node: fx.Node) -> Iterator[bool]:
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    given = {argument.name: argument.default_value for argument in node.target._schema.arguments}
    given |= dict(zip(given, node.args, strict=False)) | node.kwargs
    if given.get("dropout_p"):
        yield True
    if given.get("running_mean", ...) is not None:  # a normalization that keeps no statistics is always in train mode
        yield from (mode for name in _MODES if isinstance(mode := given.get(name), bool))


def _graph(unlifted: fx.GraphModule, module: ExportedModule) -> fx.Graph:
    """The program's graph with the arguments it was exported with, over the module's state."""
    graph = fx.Graph()
    args, kwargs = module.exported_inputs.given([graph.placeholder(name) for name in module.exported_inputs.names])
    child = graph.get_attr(CHILD)
    leaves = _call(graph, take_inputs, (child, args, kwargs))
    copies: dict[fx.Node, Any] = {}
    for index, node in enumerate(unlifted.graph.find_nodes(op="placeholder")):
        copies[node] = graph.call_function(operator.getitem, (leaves, index))
    (result,) = _copy_into(graph, unlifted.graph, copies)
    for node in graph.find_nodes(op="get_attr"):
        if node.target in vars(module):
            node.target = f"{CHILD}.model.{node.target}"  # a constant: it stays with the module
    graph.output(result[0] if module.exported_output.spec.is_leaf() else _call(graph, give_output, (child, result)))
    return graph


def _copied(region: fx.Graph) -> fx.Graph:
    graph = fx.Graph()
    graph.output(*_copy_into(graph, region, {}))
    return graph


def _copy_into(graph: fx.Graph, source: fx.Graph, copies: dict[fx.Node, Any]) -> Any:
    """Copy all nodes that are needed and not there yet, and return what the output node was given."""
    for node in source.nodes:
        if node in copies or node.op == "call_module" or (node.op == "get_attr" and not node.users):
            continue
        if node.op == "output":
            return fx.node.map_arg(node.args, copies.__getitem__)
        if isinstance(node.target, torch._ops.HigherOrderOperator):  # tracing again would inline it
            copy = _call(graph, call_region, (str(node.target), fx.node.map_arg(node.args, copies.__getitem__)))
        else:
            copy = graph.node_copy(node, copies.__getitem__)
        copy.meta = {key: value for key, value in {**node.meta, **copy.meta}.items() if key in _KEPT}
        copies[node] = copy
    raise AssertionError("a graph without an output")


def _call(graph: fx.Graph, function: Any, args: tuple[Any, ...]) -> fx.Node:
    node = graph.call_function(function, args)
    node.meta["is_wrapped"] = True
    return node
