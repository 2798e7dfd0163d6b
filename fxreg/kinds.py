"""What class a module was, where a graph is all that is left of it.

In a `GraphModule`, and in an exported program, containers are plain `Module`s; the class of a module that ran is in
`node.meta["nn_module_stack"]`, as a type or as its qualified name.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

_PARAMETRIZED = "torch.nn.utils.parametrize.Parametrized"
_LISTS = "parametrizations"
_LIST = nn.utils.parametrize.ParametrizationList


@dataclass(frozen=True)
class Kind:
    """The class of a module, as far as it is known.

    Attributes:
        classes: the classes of that name; several where one was defined again, none where it is not loaded.
        name: the qualified name; "" where nothing says what the module was.
    """

    classes: tuple[type, ...]
    name: str = ""

    def is_a(self, cls: type) -> bool:
        """Whether it is known to be of a class or of one derived from it."""
        return any(issubclass(one, cls) for one in self.classes)


def kinds(model: nn.Module) -> dict[str, Kind]:
    """For the path of every module, the class it has, or had before a graph was made of it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    recorded: dict[str, type | str] = {}
    graphs: list[str] = []
    for path, module in modules.items():
        stack = recorded_kinds(module) if isinstance(module, fx.GraphModule) else vars(module).get("nn_module_stack")
        if stack is not None:
            graphs.append(f"{path}." if path else "")
            recorded |= {".".join(filter(None, (path, inner))): kind for inner, kind in stack.items()}
    live = _live_classes() if recorded else {}
    return {path: _kind(path, module, recorded, graphs, live) for path, module in modules.items()}


def recorded_kinds(gm: fx.GraphModule) -> dict[str, type | str]:
    """The class, or its qualified name, of every module that ran when the graph was made."""
    found: dict[str, type | str] = {}
    for node in gm.graph.nodes:
        for path, kind in node.meta.get("nn_module_stack", {}).values():
            found.setdefault(path, kind)
        if node.op == "get_attr":  # a region that has a graph of its own and no state
            region = gm._modules.get(str(node.target))
            if isinstance(region, fx.GraphModule):
                found = recorded_kinds(region) | found
    return found


def graph_kinds(graph: fx.Graph) -> dict[str, Kind]:
    """For the path of every module that a graph's nodes stand in, its class."""
    found = {path: kind for node in graph.nodes for path, kind in node.meta.get("nn_module_stack", {}).values()}
    live = _live_classes() if any(isinstance(kind, str) for kind in found.values()) else {}
    return {path: _recorded(kind, live) for path, kind in found.items()}


def qualified(kind: type | str) -> str:
    """The qualified name of a class; a graph may record just that."""
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _kind(
    path: str,
    module: nn.Module,
    recorded: Mapping[str, type | str],
    graphs: list[str],
    live: Mapping[str, tuple[type, ...]],
) -> Kind:
    is_graph = isinstance(module, fx.GraphModule) or f"{path}." in graphs or (not path and "" in graphs)
    is_left = type(module) is nn.Module and any(path.startswith(graph) for graph in graphs)
    if path in recorded and (is_graph or is_left):
        return _recorded(recorded[path], live)
    if not is_left:
        return Kind((type(module),))
    parent, _, key = path.rpartition(".")
    if parent.rpartition(".")[2] == _LISTS:  # its forward need not have run
        return Kind((_LIST,))
    owner = recorded.get(parent)
    if key == "out_proj" and isinstance(owner, str) and _is_attention(_named(owner, live)):
        return Kind((NonDynamicallyQuantizableLinear,))  # its weight is used, and it never runs
    return Kind(())


def _recorded(kind: type | str, live: Mapping[str, tuple[type, ...]]) -> Kind:
    return Kind((kind,)) if isinstance(kind, type) else Kind(_named(kind, live), kind)


def _is_attention(classes: tuple[type, ...]) -> bool:
    return any(issubclass(cls, nn.MultiheadAttention) for cls in classes)


def _named(name: str, live: Mapping[str, tuple[type, ...]]) -> tuple[type, ...]:
    """The classes of a qualified name; a parametrized layer's class lives no longer than the layer."""
    found = live.get(name, ())
    if not found and name.startswith(_PARAMETRIZED):
        plain = getattr(nn, name.removeprefix(_PARAMETRIZED), None)
        found = (plain,) if isinstance(plain, type) else ()
    return found


def _live_classes() -> dict[str, tuple[type, ...]]:
    """Every class of modules that is loaded, by its qualified name."""
    found: dict[str, tuple[type, ...]] = {}
    waiting, seen = [nn.Module], {nn.Module}
    while waiting:
        cls = waiting.pop()
        name = qualified(cls)
        found[name] = (*found.get(name, ()), cls)
        fresh = [one for one in cls.__subclasses__() if one not in seen]
        seen.update(fresh)
        waiting += fresh
    return found
