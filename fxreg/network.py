"""The emitted graph for tools that know graphs and not `torch.fx`: a networkx graph with plain data on its nodes."""

from collections.abc import Iterator, Mapping
from typing import Any, TypedDict

import networkx as nx
from torch import Tensor, fx, nn
from torch.fx.node import _get_qualified_name  # private: the names fx itself writes into code

from .flows import read_value
from .kinds import qualified
from .module import emitted, state_of


class NodeData(TypedDict):
    """What a node of `to_networkx` has.

    Attributes:
        op: `"placeholder"`, `"get_attr"`, `"call_module"`, `"call_function"`, `"call_method"` or `"output"`.
        target: what is read or called: a path, a method's name, or a function's qualified name.
        module: the path of the module that is called, or in whose forward the node stands; `""` is the model, None
            what stands in no forward: arguments, the output, and what fxreg inserted.
        layer: the qualified name of that module's class.
        label: the label of the rule that inserted the node, `""` if it serves several, None if it is the model's own.
        parameter: of a read of a parameter, its first name in `named_parameters()`.
    """

    op: str
    target: str
    module: str | None
    layer: str | None
    label: str | None
    parameter: str | None


def to_networkx(gm: nn.Module) -> "nx.MultiDiGraph[str]":
    """The emitted graph as a `networkx.MultiDiGraph`, in the order of execution.

    Nodes are the names that the code uses, and have the attributes of `NodeData`, all of them text or None. An edge
    goes from a value to its use. Its key is the place among the arguments: `"0"` is the first positional one, `"dim"`
    a keyword, `"1.weight"` the entry `"weight"` of the second. A module with several graphs, as recordings of several
    modes are, gives the one that is tried first.

    Args:
        gm: what `fxreg.transform` returned, compiled or not, pickled or copied since or not.

    Raises:
        FxregError: not a module that `fxreg.transform` returned.

    >>> import networkx, torch, fxreg
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    >>> graph = fxreg.to_networkx(fxreg.transform(model, [fxreg.Rule(fxreg.l1(1e-4), name="2", param="weight")]))
    >>> [node for node, label in graph.nodes(data="label") if label == "l1"]
    ['l1', '_2_weight', '_2_weight_l1']
    >>> graph.nodes["_2"]["layer"], graph.nodes["_2_weight"]["parameter"]
    ('torch.nn.modules.linear.Linear', '2.weight')
    >>> networkx.shortest_path(graph, "_0", "attach")
    ['_0', '_1', '_2', 'attach']
    """
    gm, state = emitted(gm), state_of(gm)
    first = {id(parameter): name for name, parameter in state.model.named_parameters()}
    found = nx.MultiDiGraph()
    for node in gm.graph.nodes:
        found.add_node(node.name, **_data(node, state.model, first, state.provenance.nodes))
        for place, used in _places({**dict(enumerate(node.args)), **node.kwargs}):
            found.add_edge(used.name, node.name, key=place)
    return found


def _data(node: fx.Node, model: nn.Module, first: Mapping[int, str], labels: Mapping[str, str]) -> NodeData:
    value = read_value(model, str(node.target)) if node.op == "get_attr" else None
    module, layer = next(reversed(node.meta.get("nn_module_stack", {}).values()), (None, None))
    return {
        "op": node.op,
        "target": _get_qualified_name(node.target) if callable(node.target) else str(node.target),
        "module": module,
        "layer": None if layer is None else qualified(layer),
        "label": labels.get(node.name),
        "parameter": first.get(id(value)) if isinstance(value, Tensor) else None,
    }


def _places(value: Any, *path: object) -> Iterator[tuple[str, fx.Node]]:
    """Every node inside a value, with its place."""
    parts: Mapping[Any, Any] = {}
    match value:
        case fx.Node():
            yield ".".join(map(str, path)), value
        case Mapping():
            parts = value
        case tuple() | list():
            parts = dict(enumerate(value))
        case slice():
            parts = {"start": value.start, "stop": value.stop, "step": value.step}
    for key, part in parts.items():
        yield from _places(part, *path, key)
