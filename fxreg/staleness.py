"""Noticing that a model is no longer what was captured: what a graph holds as it was is compared before each call."""

import dis
import enum
import functools
import inspect
import types
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules import module as module_globals

from .defining import not_traced
from .freezing import frozen
from .hearing import has_own_forward, untold
from .kinds import qualified
from .mentions import asked
from .naming import codes_in, names_in_code
from .outside import Outside, read_outside
from .packages import is_library, is_own
from .side_channels import GLOBAL_HOOKS, HOOKS, listed
from .structure import alike
from .witnesses import Witness

_COMPARED = (types.FunctionType, types.MethodType, functools.partial, tuple, frozenset, enum.Enum)
"""Of these Dynamo does not guard that two are the same one, or they are quickly compared."""


@dataclass(frozen=True)
class Remembered:
    """What the graph took from one module for good.

    Attributes:
        path: from the model to the module.
        kind: the qualified name of its class if its forward was traced, otherwise "".
        values: the attributes that were read, as they were, each with the number of the object that it was, or None.
        parameters: the names of its own parameters.
        hooks: its hooks of each kind; None where only its class's forward is in the graph, whatever is
            done around it.
        children: the names of its children, and of those in its lists and dicts of modules.
        methods: the functions of its class that traced code may have called, by name.
        outside: of the root, what all traced code reads outside the modules.
        lists: the names of all that it has of a kind, where traced code asked for that.
        kinds: of the root, the classes of all modules by path, where traced code asks what something is.
        witness: has seen the values.
    """

    path: tuple[str, ...]
    kind: str
    values: tuple[tuple[str, Any, int | None], ...]
    parameters: tuple[str, ...]
    hooks: tuple[Any, ...] | None = ()
    children: tuple[Any, ...] = ()
    methods: tuple[tuple[str, Any], ...] = ()
    outside: tuple[Outside, ...] = ()
    lists: tuple[tuple[str, tuple[str, ...]], ...] = ()
    kinds: tuple[tuple[str, str], ...] = ()
    witness: Witness = field(default_factory=Witness, compare=False, repr=False)


def remember(
    root: nn.Module,
    modules: Mapping[str, nn.Module] | None = None,
    reads: Iterable[tuple[tuple[str, str, str], Any]] = (),
    codes: Iterable[tuple[types.CodeType, dict[str, Any]]] = (),
    listings: Iterable[tuple[tuple[str, str, str], tuple[str, ...]]] = (),
) -> tuple[Remembered, ...]:
    """What to compare later: of the root, of the traced modules by path, and of what they, or code, read or listed."""
    modules, reads = modules or {}, [*reads]
    values: dict[str, dict[str, Any]] = {path: {} for path in ("", *modules)}
    codes = [*codes]
    mentioned = sorted({"forward"}.union(*(names_in_code(code).attributes for code, _ in codes)))
    functions = _functions(map(type, modules.values()), mentioned)
    methods = {kind: tuple((name, frozen(one)) for name, one in own.items()) for kind, own in functions.items()}
    kept = [value for _, value in reads] + [one for own in functions.values() for one in own.values()]
    for (_, path, name), value in reads:
        values.setdefault(path, {})[name] = value
    for path, module in root.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            for name, value in (getattr(tensor, "__dict__", None) or {}).items():
                if name in mentioned:
                    values.setdefault(path, {})[f"{key}.{name}"] = value
    lists: dict[str, dict[str, tuple[str, ...]]] = {}
    for (_, path, registry), names in listings:
        lists.setdefault(path, {})[registry] = names
        values.setdefault(path, {})
    for path, module in modules.items():
        for name, value in _class_values(type(module), mentioned):
            if name not in vars(module):
                values[path].setdefault(name, value)
    objects: dict[int, tuple[Any, int]] = {}  # one, a configuration say, may be everybody's: once is enough
    return tuple(
        Remembered(
            tuple(path.split(".")) if path else (),
            qualified(type(modules[path])) if path in modules else "",
            tuple((name, *_as_it_is(value, objects)) for name, value in found.items()),
            _own_parameters(modules.get(path, root if not path else None)),
            _hooks(modules[path]) if path in modules else (),
            _children(modules[path]) if path in modules else (),
            _not_hidden(methods[type(modules[path])], modules[path]) if path in modules else (),
            () if path else read_outside(codes, [*{id(one): one for one in kept}.values()], _asked),
            tuple(lists.get(path, {}).items()),
            () if path or not _asks_for_kinds(code for code, _ in codes) else _kinds(root),
        )
        for path, found in values.items()
    )


def _asks_for_kinds(codes: Iterable[types.CodeType]) -> bool:
    """Whether code asks what something is an instance of, by a function or by `case Kind():`."""
    each = (inner for code in codes for inner in codes_in(code))
    return any(
        not _CLASS_OF.isdisjoint(code.co_names) or dis.opmap["MATCH_CLASS"] in code.co_code[::2] for code in each
    )


_CLASS_OF = {"isinstance", "issubclass", "type", "__class__"}


def _kinds(root: nn.Module) -> tuple[tuple[str, str], ...]:
    """The paths and classes of the modules in a model."""
    each = root.named_modules(remove_duplicate=False)
    return tuple((path, qualified(type(module))) for path, module in each if path)


def _class_values(kind: type, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """What a class of the user's has under some names and is no function, nor gives something else."""
    spaces = [vars(base) for base in kind.__mro__ if is_own(base.__module__)]
    for name in names if spaces else ():
        found = [space[name] for space in spaces if name in space][:1]
        yield from ((name, value) for value in found if not hasattr(type(value), "__get__"))


def _asked(code: types.CodeType, names: Collection[str]) -> Collection[str]:
    """Those of some names for which code asks by a value that may be one."""
    return asked((code,)).among(names)


def _as_it_is(value: Any, objects: dict[int, tuple[Any, int]]) -> tuple[Any, int | None]:
    """A value frozen, and its number among some objects, if it is one that two attributes may have in common."""
    has_more = type(value).__dictoffset__ and not isinstance(value, (type, *_COMPARED))
    if not isinstance(value, list | dict | set | deque) and not has_more:
        return frozen(value), None
    if id(value) not in objects:
        objects[id(value)] = frozen(value), len(objects)
    return objects[id(value)]


@not_traced
def difference(
    model: nn.Module,
    remembered: Iterable[Remembered],
    children: Mapping[str, Any] | None = None,
    values: bool = True,
    found: Sequence[Any] | None = None,
) -> str | None:
    """What is new about a model that was captured, if anything.

    Args:
        children: of the emitted module, where it counts that they are the model's.
        values: whether attributes and hooks count, too, and not only modules and parameters.
        found: what `modules_of` gave, where modules and parameters are known to be as they were then, and were found
            to be as they are remembered.
    """
    remembered, met = [*remembered], dict[int | None, Any]()
    if values and any(one.kind for one in remembered) and _has_global_hooks():
        return _changed((), "is called with global hooks on modules")
    if found is not None:
        for one, module in zip(remembered, found, strict=True) if values else ():
            if module is None:
                continue
            what = _other_list(module, one) if one.lists else None
            what = what or (_other_doings(module, one) if one.kind else None)
            what = what or (_other_value(module, one, met) if one.values or one.outside else None)
            if what:
                return _changed(one.path, what)
        return None
    for name, child in model._modules.items():
        if children is not None and children.get(name) is not child:
            return _changed((name,), "was replaced")
    for one, module in zip(remembered, [_module_at(model, one.path) for one in remembered], strict=True):
        what = "was removed" if module is None else _difference(module, one, values, met)
        if what:
            return _changed(one.path, what)
    return None


def modules_of(model: nn.Module, remembered: Iterable[Remembered]) -> list[Any]:
    """The modules that are remembered; None for what is left of one whose class cannot be imported."""
    return [None if _is_stand_in(module := _module_at(model, one.path), one) else module for one in remembered]


def heeds(model: nn.Module, remembered: Iterable[Remembered], thing: Any, names: Iterable[str]) -> bool:
    """Whether `difference` may come out otherwise when something is written.

    Args:
        names: of the attributes that were written; none if it is a container.
    """
    if isinstance(thing, Tensor) or type(thing).__module__.partition(".")[0] == "fxreg":
        return False
    remembered = [*remembered]
    if isinstance(thing, nn.Module):
        read = {name for one in remembered for name, *_ in (*one.values, *one.methods)}
        return not read.union(HOOKS, thing._modules, ("forward", "_modules")).isdisjoint(names)
    if isinstance(thing, dict):
        for module in model.modules():
            own = vars(module)
            if kind := next((kind for kind in ("_parameters", "_buffers") if thing is own.get(kind)), None):
                # Stand-ins come and go there, which matters only to who listed them.
                listing = (one.path for one in remembered if kind in dict(one.lists))
                return any(_module_at(model, path) is module for path in listing)
            if thing is own or any(thing is own.get(kind) for kind in ("_modules", *HOOKS)):
                return True
    if type(thing) is object:  # what stands for a global variable
        return any(outside.path[0] in names for one in remembered for outside in one.outside)
    is_open = thing is None or isinstance(thing, type | types.ModuleType | types.CellType)
    return is_open or any(one.witness.may_hold(thing) for one in remembered)


def _has_global_hooks() -> bool:
    """Whether hooks on all modules are registered, other than torch's own, which count and look."""
    hooks = (hook for kind in GLOBAL_HOOKS for hook in getattr(module_globals, kind).values())
    return any(not is_library(getattr(hook, "__module__", None)) for hook in hooks)


def _difference(module: nn.Module, then: Remembered, values: bool, met: dict[int | None, Any]) -> str | None:
    """What is new about a module, if anything."""
    if _is_stand_in(module, then):
        return None
    if then.kind and qualified(type(module)) != then.kind:
        return f"is now a {type(module).__name__}"
    if then.kind and _children(module) != then.children:
        return "has other children"
    if (then.kind or not then.path) and _own_parameters(module) != then.parameters:
        return "has other parameters"
    if then.kinds and (other := set(then.kinds) ^ set(_kinds(module))):
        return f"has another {min(other)[0]!r}"
    if what := _other_list(module, then):
        return what
    return _other_doings(module, then, values) or (_other_value(module, then, met) if values else None)


def _other_list(module: nn.Module, then: Remembered) -> str | None:
    """What a module has other names of than when it was asked for all of them, if anything."""
    for registry, names in then.lists:
        if listed(getattr(module, registry)) != names:
            return "has other children" if registry == "_modules" else f"has other {registry[1:]}"
    return None


def _is_stand_in(module: nn.Module, then: Remembered) -> bool:
    """Whether a module was unpickled: what is left of a model whose class cannot be imported."""
    return bool(then.kind) and type(module) is nn.Module and then.kind != qualified(nn.Module)


def _other_doings(module: nn.Module, then: Remembered, values: bool = True) -> str | None:
    """What a module does otherwise, around its class's forward or in its place, if anything."""
    own = vars(module)
    if not then.kind:
        return None
    if has_own_forward(module) and not (then.hooks is None and isinstance(own["forward"], fx.GraphModule)):
        return "got a forward of its own instance"
    if then.hooks is None or not values:
        return None
    if (any(then.hooks) or any(map(own.get, HOOKS))) and not alike(_hooks(module), then.hooks):
        return "has other hooks"
    return f"has another {other!r}" if (other := _other_method(module, then)) else None


def _other_value(module: nn.Module, then: Remembered, met: dict[int | None, Any]) -> str | None:
    """What of the attributes that were read, or of what is read outside the modules, is another now, if anything.

    Args:
        met: the objects by number that were found to be as they were: whose they are, too, they are still.
    """
    own = vars(module)
    for name, value, number in then.values:
        now = own[name] if name in own else _kept(module, name)
        if number in met and now is met[number]:
            continue
        if not then.witness.agrees(name, now, value):
            return f"has another {name!r}"
        if number is not None:
            met[number] = now
    for outside in then.outside:
        if not outside.is_gone and not then.witness.agrees(outside.name, outside.now(), outside.value):
            return f"reads {outside.name!r}, which is another now"
    return None


def _kept(module: nn.Module, name: str) -> Any:
    """What a module has under a name, or, behind a dot, a tensor of its."""
    name, _, attribute = name.partition(".")
    found = getattr(module, name, ...)
    return getattr(found, attribute, ...) if attribute else found


def _functions(kinds: Iterable[type], mentioned: Iterable[str]) -> dict[type, dict[str, types.FunctionType]]:
    """Those functions of each class that have one of these names, outside well-known libraries."""
    found: dict[type, dict[str, types.FunctionType]] = {}
    for kind in dict.fromkeys(kinds):
        own = ((name, _method(kind, name)) for name in mentioned)
        found[kind] = {name: one for name, one in own if one is not None and not is_library(one.__module__)}
    return found


def _method(kind: type, name: str) -> types.FunctionType | None:
    """A function in a class, also behind a property or a static method."""
    found: Any = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
    if isinstance(found, property):
        found = found.fget
    found = untold(getattr(found, "__func__", found))
    return found if isinstance(found, types.FunctionType) else None


def properties_in(model: nn.Module, remembered: Iterable[Remembered]) -> dict[tuple[type, str], Any]:
    """The functions behind properties, by class and name: compiled code asks for what they are elsewhere."""
    found = {}
    for one in remembered:
        module = _module_at(model, one.path)
        for name, method in one.methods if one.hooks is not None else ():
            if isinstance(inspect.getattr_static(type(module), name, None), property):
                found[type(module), name] = method
    return found


def other_property(properties: Mapping[tuple[type, str], Any]) -> str | None:
    """What is behind another function now, if any is."""
    for (kind, name), method in properties.items():
        if not alike(frozen(_method(kind, name)), method):
            return f"{kind.__name__} has another {name!r}"
    return None


def _not_hidden(methods: tuple[tuple[str, Any], ...], module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The methods that a module does not have an attribute of its own in the place of."""
    own = vars(module)
    return tuple(one for one in methods if one[0] not in own) if any(n in own for n, _ in methods) else methods


def _other_method(module: nn.Module, then: Remembered) -> str | None:
    """The name of a method that is another now: of the class, or of the instance, which has its own."""
    own = vars(module)
    for name, before in then.methods:
        if name in own and name != "forward":  # which is asked for by itself
            return name
        now = getattr(type(module), name, None)  # what it is, is looked up only where it is another
        if not then.witness.knows(name, now):
            function = _method(type(module), name)
            if not alike(frozen(function), before):
                return name
            then.witness.meets(name, now, function)
    return None


def _module_at(model: nn.Module, path: Iterable[str]) -> Any:
    """The module that is at a path now, if any."""
    found: Any = model
    for part in path:
        found = found._modules.get(part) if found is not None else None
    return found


def _own_parameters(module: nn.Module | None) -> tuple[str, ...]:
    return () if module is None else tuple(name for name, p in module._parameters.items() if p is not None)


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    own = vars(module)
    return tuple([tuple(map(frozen, hooks.values())) if (hooks := own.get(kind)) else () for kind in HOOKS])


def _children(module: nn.Module) -> tuple[Any, ...]:
    """The names of a module's children, in order; of lists and dicts of modules, what is in them."""
    lists = (nn.ModuleList, nn.ModuleDict)
    return tuple([(n, _children(c)) if isinstance(c, lists) else n for n, c in module._modules.items()])


def _changed(path: tuple[str, ...], what: str) -> str:
    where = f"its module {'.'.join(path)!r}" if path else "it"
    return (
        f"the model changed since it was captured: {where} {what}, and the graph does not know. Transform the model "
        "again."
    )
