"""capture: a module → its graph, as deep as it can be faithful. Mutates nothing."""

import contextvars
import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from . import calls
from .captured import Captured
from .deepening import deepen
from .errors import CaptureError
from .graphs import Lent
from .layers import whole_reason
from .module import CHILD, RegularizedModule
from .passing import Passing, can_tell
from .proxies import TracedValue, Untraceable
from .side_channels import has_hooks
from .staleness import remember
from .structure import fresh, map_tensors
from .tracing import SoundTracer


@dataclass(frozen=True)
class Given:
    """Arguments as a call gave them."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


Examples: TypeAlias = tuple[Any, ...] | Mapping[str, Any] | Given

_PLAIN_TYPES = {"bool", "int", "float", "str", "dict", "Dict", "Mapping", "list", "List", "Sequence", "tuple", "Tuple"}
_WRITABLE = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Argument:
    """One argument of a forward, and what is known of it.

    Attributes:
        is_open: whether it stays an argument; otherwise it is fixed at its default.
        by_position: whether the forward is given it by position.
        default: its default; `Parameter.empty` where it has none.
        oddity: why it is not taken for a tensor, if it is not.
        example: of its value, where there is one.
    """

    name: str
    is_open: bool
    by_position: bool
    default: Any
    oddity: str | None = None
    example: Any = None


def capture(
    model: nn.Module, example_inputs: Examples | None = None, marked: Collection[str] = frozenset()
) -> Captured:
    """Trace the model's forward; the root itself becomes one opaque call if it cannot be traced.

    Where that leaves layers out of sight, and there are examples, the forward is recorded as well.

    Args:
        marked: the paths of the modules whose activations the graph is to mark, where it sees them pass.

    Raises:
        CaptureError: examples that do not fit the forward's signature.
    """
    arguments = read_arguments(model, example_inputs)
    captured = replace(_symbolic(model, arguments, marked), passing=_passing(model, arguments))
    if example_inputs is None or not captured.opaque or whole_reason(model, runs=True) or has_hooks(model):
        return captured
    recorded = deepen(
        model,
        lambda graph: _add_placeholders(graph, arguments),
        {a.name: a.example for a in arguments if a.is_open},
        lambda values: _call(model, arguments, values),
        marked,
    )
    if recorded is None or len(visible_layers(model, recorded.graph)) <= len(visible_layers(model, captured.graph)):
        return captured
    return recorded.before(captured)


def visible_layers(model: nn.Module, graph: fx.Graph) -> set[str]:
    """The paths of the modules with parameters of their own that a graph calls, or whose parameters it reads, under
    whatever name."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    read = {id(parameters.get(str(node.target))) for node in graph.nodes if node.op == "get_attr"}
    return {
        path
        for path, module in model.named_modules()
        if module._parameters
        and (path in called or any(id(p) in read for p in module._parameters.values() if p is not None))
    }


def _passing(model: nn.Module, arguments: tuple["Argument", ...]) -> Passing:
    given = [a for a in arguments if a.is_open and not a.name.startswith("*")]
    stars = {a.name.count("*") for a in arguments if a.is_open and a.name.startswith("*")}
    by_name = frozenset(a.name for a in given if not a.by_position)
    return Passing(len(given) - len(by_name), by_name, 1 in stars, 2 in stars, can_tell(model))


def _symbolic(model: nn.Module, arguments: tuple["Argument", ...], marked: Collection[str]) -> Captured:
    """What can be said without an example."""
    odd = (f"argument {a.name!r} {a.oddity}" for a in arguments if a.oddity)
    reason = whole_reason(model) or next(odd, None)
    if reason is None:
        try:
            return _traced(model, arguments, marked)
        except Untraceable as failure:
            reason = str(failure)
    return Captured(Lent(_whole(arguments)), {"": reason}, remember(model))


def _traced(model: nn.Module, arguments: tuple[Argument, ...], marked: Collection[str]) -> Captured:
    """Trace until nothing is left that an earlier trace could not know; raise Untraceable if the root must be opaque.

    A second trace watches for side effects if the first had any. Another is needed for whoever reads what only the
    modules that run as they are will write.
    """
    watches, forced = False, dict[str, str]()
    while "" not in forced:
        tracer = SoundTracer(model, f"{CHILD}.model", forced, marked, watches)
        try:
            graph = _trace(tracer, arguments)
        except Untraceable:
            if watches or tracer.side_effect is None:
                raise
        if tracer.side_effect is None:
            misled = tracer.ledger.misled(tracer.state)
            if not misled:
                ledger = tracer.ledger
                reads, codes, listings = ledger.reads.items(), ledger.heard().values(), ledger.listings.items()
                remembered = remember(model, ledger.modules, reads, codes, listings)
                return Captured(Lent(graph), tracer.opaque, remembered)
            forced |= misled
        elif watches:
            raise Untraceable(tracer.side_effect)
        watches = watches or tracer.side_effect is not None
    raise Untraceable(forced[""])


def refuse_transformed(model: nn.Module) -> None:
    """Raise a CaptureError if fxreg was here before, or cannot add its child."""
    for path, module in model.named_modules():
        if isinstance(module, RegularizedModule):
            where = f"its module {path!r}" if path else "this module"
            raise CaptureError(f"{where} was already transformed. Transform the original model, with all the rules.")
    if hasattr(model, CHILD):
        raise CaptureError(f"the model has an attribute {CHILD!r}, the name of fxreg's own child. Rename it.")


def read_arguments(model: nn.Module, example_inputs: Examples | None) -> tuple[Argument, ...]:
    """The forward's arguments, in the order of its signature."""
    try:
        signature = inspect.signature(model.forward)
    except ValueError as error:
        raise CaptureError(f"{type(model).__name__}.forward has no signature to read: {error}.") from None
    given: dict[str, Any] = {}
    positional = len(signature.parameters)
    if example_inputs is not None:
        args, kwargs = split_examples(example_inputs)
        positional = len(args)
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise CaptureError(
                f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}. Pass a tuple for "
                "positional or a dict for keyword arguments."
            ) from None
    found: list[Argument] = []
    for position, (name, parameter) in enumerate(signature.parameters.items()):
        star = "*" * (parameter.kind == parameter.VAR_POSITIONAL) + "**" * (parameter.kind == parameter.VAR_KEYWORD)
        if star and example_inputs is None:
            if star == "*" or any(argument.name.startswith("*") for argument in found):
                found.append(Argument(star + name, True, False, inspect.Parameter.empty, "is of any number"))
        elif star == "**":
            extra = given.get(name, {})
            if len(extra) > 1:
                found.append(Argument(star + name, True, False, inspect.Parameter.empty, "comes in any order", extra))
            else:
                found += [Argument(n, True, False, inspect.Parameter.empty, _oddity(v), v) for n, v in extra.items()]
        elif star:
            extra = enumerate(given.get(name, ()))
            found += [Argument(f"{name}_{i}", True, True, inspect.Parameter.empty, _oddity(v), v) for i, v in extra]
            if any(other.kind is other.KEYWORD_ONLY for other in signature.parameters.values()):
                found.append(Argument(star + name, False, False, ()))  # no more, and so none for the ones by keyword
        else:
            is_open = name in given or parameter.default is inspect.Parameter.empty
            by_position = position < positional or parameter.kind is parameter.POSITIONAL_ONLY
            by_position = by_position and parameter.kind is not parameter.KEYWORD_ONLY and all(a.is_open for a in found)
            oddity = _oddity(given[name]) if name in given else _annotated_oddity(parameter.annotation)
            oddity = oddity if is_open else None
            found.append(Argument(name, is_open, by_position, parameter.default, oddity, given.get(name)))
    return tuple(found)


def split_examples(example_inputs: Examples) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Examples as (args, kwargs)."""
    if isinstance(example_inputs, Given):
        return example_inputs.args, dict(example_inputs.kwargs)
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise CaptureError(
        f"example_inputs must be a tuple (positional) or a dict (keyword), got {type(example_inputs).__name__}. For "
        "one tensor, pass (tensor,)."
    )


def run_examples(model: nn.Module, example_inputs: Examples) -> None:
    """Call a model with copies of examples, in a context of its own."""
    args, kwargs = map_tensors(fresh, split_examples(example_inputs))
    contextvars.copy_context().run(model, *args, **kwargs)


def _oddity(example: Any) -> str | None:
    return None if isinstance(example, Tensor) else f"is a {type(example).__name__} in the examples"


def _annotated_oddity(annotation: Any) -> str | None:
    """Why an annotation says that an argument is no tensor; unknown annotations are taken for tensors and checked
    when the module runs."""
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return f"is annotated {name}" if name.partition("[")[0].rpartition(".")[2] in _PLAIN_TYPES else None


def _trace(tracer: SoundTracer, arguments: tuple[Argument, ...]) -> fx.Graph:
    nodes = _add_placeholders(tracer.graph, arguments)
    is_marked = "" in tracer.marked

    def run() -> Any:
        values = {a.name: TracedValue(nodes[a.name], tracer) for a in arguments if a.is_open}
        if is_marked:
            tracer.mark(tuple(values.values()), "", "input")
        output = _call(tracer.root, arguments, values)
        if is_marked:
            tracer.mark(output, "", "output")
        if _holds_size(output):
            tracer.give_up("returns a torch.Size")
        return tracer.create_arg(output)

    result = tracer.trace_root(run)
    for argument in arguments:
        node = nodes.get(argument.name)
        if node and (argument.name in _undecided(arguments) or tracer.expectations.must_be_tensor(node)):
            tracer.expectations.expect(node, f"argument {argument.name!r}")
    tracer.graph.output(result)
    return tracer.graph


def _call(model: nn.Module, arguments: tuple[Argument, ...], values: dict[str, Any]) -> Any:
    """Call the forward with values for its open arguments."""
    values = dict(values)
    args = [values.pop(a.name) for a in arguments if a.is_open and a.by_position]
    extra = [values.pop(name) for name in list(values) if name.startswith("**")]
    return model.forward(*args, **values, **(extra[0] if extra else {}))


def _holds_size(output: Any) -> bool:
    """Whether an output has a size among its parts, which a graph's code would return as a tuple."""
    if type(output) in (tuple, list):
        return any(map(_holds_size, output))
    return type(output) is torch.Size or (type(output) is dict and any(map(_holds_size, output.values())))


def _whole(arguments: tuple[Argument, ...]) -> fx.Graph:
    """The graph of an opaque root: one call of the original model."""
    graph = fx.Graph()
    nodes = _add_placeholders(graph, arguments)
    stars = {name[: name.rindex("*") + 1]: nodes.pop(name) for name in list(nodes) if name.startswith("*")}
    args = tuple(nodes.pop(a.name) for a in arguments if a.is_open and a.by_position)
    named = {a.name: nodes[a.name] for a in arguments if a.is_open and a.name in nodes}
    rest: tuple[Any, Any] = (stars.get("*", ()), stars.get("**", {}))
    called = graph.call_function(calls.call_model, (graph.get_attr(CHILD), {}, args, named, *rest))
    called.meta["is_wrapped"] = True
    graph.output(called)
    return graph


def _add_placeholders(graph: fx.Graph, arguments: tuple[Argument, ...]) -> dict[str, fx.Node]:
    """The arguments in the order of the signature, so that they keep their positions; fixed ones are checked."""
    nodes, optional = {}, False
    fixed: list[tuple[Any, ...]] = []
    needed: list[tuple[Any, ...]] = []
    for argument in arguments:
        if argument.name.startswith("*"):
            node, default = graph.placeholder(argument.name), argument.default
        elif optional or argument.default is not inspect.Parameter.empty:
            optional = True
            default = argument.default if _is_writable(argument.default) else ...
            node = graph.placeholder(argument.name, default_value=default)
            if argument.is_open and default is ... and argument.default is not ...:
                needed.append((node, argument.name))
        else:
            node = graph.placeholder(argument.name)
        if argument.is_open:
            nodes[argument.name] = node
        else:
            fixed.append((node, default, argument.name))
    for function, checks in ((calls.expect_default, fixed), (calls.expect_given, needed)):
        for check in checks:
            graph.call_function(function, check).meta["is_wrapped"] = True
    return nodes


def _is_writable(default: Any) -> bool:
    """Whether code can say it; any other default is written as an ellipsis, and passing the argument raises."""
    if type(default) is tuple:
        return all(map(_is_writable, default))
    return isinstance(default, _WRITABLE)


def _undecided(arguments: tuple[Argument, ...]) -> set[str]:
    """The open arguments that a caller may leave out although capture took them for given."""
    optional, found = False, set()
    for argument in arguments:
        optional = optional or argument.default is not inspect.Parameter.empty
        if optional and argument.is_open:
            found.add(argument.name)
    return found
