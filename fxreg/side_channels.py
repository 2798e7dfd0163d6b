"""What modules say to each other past their arguments and results: attributes and containers.

A traced forward reads attributes once, when it is traced. That is wrong where a module that runs as it is, opaque or
with hooks of the user's own, writes them: whoever reads them must then run as it is, too.
"""

import contextlib
import itertools
import operator
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .enclosed import HOLDERS, attributes, inside
from .mentions import asked
from .methods import methods_of, only_methods
from .naming import names_in, names_mentioned
from .notes import Mention
from .outside import places
from .packages import is_installed, is_library
from .reaching import reach
from .scanning import (
    changes_containers,
    containers_of,
    functions_behind,
    functions_of,
    global_names,
    objects_named,
)
from .snapshots import Snapshot
from .structure import PLAIN
from .writes import ANY, Written

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_ANY = frozenset(vars(nn.Module()))
_VALUES = frozenset((*PLAIN, Tensor, nn.Parameter))
_GETTERS = (operator.attrgetter, operator.methodcaller)
REGISTRIES = ("_parameters", "_buffers", "_modules")
GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)


def has_hooks(module: nn.Module) -> bool:
    """Whether the user hooked anything onto a module."""
    own = vars(module)
    return any(own.get(kind) for kind in HOOKS)


def listed(registry: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of what a module has, of one kind."""
    return tuple([name for name, one in registry.items() if one is not None])


class Ledger:
    """Which modules a trace went through, which run as they are, and what the former read.

    Each record keeps the order in which it was made, so that what was noted since a mark can be forgotten.
    """

    def __init__(self, watched: frozenset[str] = frozenset()) -> None:
        """
        Args:
            watched: the names, and patterns of such, of which every mention will be told as it happens.
        """
        self.watched, self.unwatched = watched, set[str]()
        self.settled: dict[tuple[str, str, str], Any] = {}
        self._happened: dict[int, str | Mention] = {}
        self.modules: dict[str, nn.Module] = {}
        self.reads: dict[tuple[str, str, str], Any] = {}
        self.listings: dict[tuple[str, str, str], tuple[str, ...]] = {}
        self.codes: dict[tuple[int, int], tuple[types.CodeType, dict[str, Any]]] = {}  # by identity: equal is not same
        self._entered: dict[str, dict[int, types.CodeType]] = {}
        self._missed: dict[str, set[str]] = {}
        self._running: dict[str, nn.Module] = {}

    def traced(self, path: str, module: nn.Module) -> None:
        """A module's forward is being traced."""
        self.modules.setdefault(path, module)

    def enters(self, path: str, code: types.CodeType, space: dict[str, Any]) -> None:
        """Code of the user's runs for the module at a path, with its global variables."""
        self.codes.setdefault((id(code), id(space)), (code, space))
        self._entered.setdefault(path, {})[id(code)] = code

    def heard(self) -> dict[tuple[int, int], tuple[types.CodeType, dict[str, Any]]]:
        """The code that ran for the modules that were traced, with its global variables; by identity."""
        entered = set[int]().union(*(self._entered.get(path, ()) for path in self.modules))
        return {key: one for key, one in self.codes.items() if key[0] in entered}

    def read(self, reader: str, path: str, name: str, value: Any) -> None:
        """The traced forward of `reader` read an attribute of the module at `path`."""
        self.reads.setdefault((reader, path, name), value)

    def lists(self, reader: str, path: str, registry: str, now: Mapping[str, Any]) -> None:
        """The traced forward of `reader` asked the module at `path` for all of its children, parameters or buffers."""
        self.listings.setdefault((reader, path, registry), listed(now))

    def misses(self, path: str, name: str | None) -> None:
        """The traced forward of the module at a path asked for an attribute that was not there, or it is not known for
        which."""
        self._missed.setdefault(path, set()).add(re.escape(name) if name else ANY)

    def runs(self, path: str, module: nn.Module) -> None:
        """A module will run as it is."""
        self._running.setdefault(path, module)
        self._happened[len(self._happened)] = path

    def mentions(
        self, reader: str, watched: str, name: str, owner: tuple[Any, ...], paths: Mapping[nn.Module, str]
    ) -> None:
        """The traced forward of `reader` mentions a name that is watched.

        Args:
            owner: whose attribute it is there, if anybody knows.
            paths: those of the model's modules.
        """
        mention = Mention(watched, name, reader)
        for one in owner:
            with contextlib.suppress(Exception):
                is_module = isinstance(one, nn.Module)
                is_like_one = is_module or "_modules" in getattr(one, "__dict__", ())
                leads_on = not name and Snapshot([], also=owner, other_modules=True).has_modules()
                mention = replace(mention, of_module=is_like_one or leads_on)
                if name and isinstance(value := getattr(one, name, ...), PLAIN):
                    mention = replace(mention, owner=one, path=paths.get(one) if is_module else None, value=value)
        self._happened[len(self._happened)] = mention

    def runs_layer(self, path: str, module: nn.Module) -> None:
        """A layer of torch's own will run as it is: it matters if something of the user's runs in it."""
        if not _is_inert(module):
            self.runs(path, module)

    def mark(self) -> tuple[int, ...]:
        """Where the records stand."""
        return tuple(map(len, self._records()))

    def forget(self, mark: tuple[int, ...]) -> None:
        """Drop what was noted since a mark."""
        for record, length in zip(self._records(), mark, strict=True):
            shorten(record, length)

    def _records(self) -> tuple[dict[Any, Any], ...]:
        return (self.modules, self.reads, self.listings, self._running, self._happened)

    def misled(self, state: Snapshot) -> dict[str, str]:
        """The paths of the traced modules that read what modules that run as they are may write, with the reason.

        Args:
            state: all that could be read: a name that is nobody's attribute, and was not asked for, is a local one.
        """
        written: dict[str, Written] = {}
        changing: list[nn.Module] = []
        hooks: list[Any] = []
        named: dict[int, Any] = {}
        running = {path: [*_hooks(module)] for path, module in self._running.items()}
        reached = {
            path: dict.fromkeys((*_functions(module, running[path]), *reach([module])))
            for path, module in self._running.items()
        }
        methods = only_methods(self._methods(state), {*itertools.chain(*reached.values())})
        for path, module in self._running.items():
            own, functions = running[path], reached[path]
            written[path] = Written.by(functions, methods)
            if changes_containers(functions):
                changing += module.modules()
                hooks += own
                named |= objects_named(functions) | containers_of({*map(type, module.modules())})
        if not any(map(any, written.values())) and not changing and not hooks:
            return {}
        owners = [owner for hook in hooks if isinstance(owner := getattr(hook, "__self__", None), nn.Module)]
        shared = Snapshot([*changing, *owners], also=[*hooks, *named.values()])
        of_objects = {*state.names(of_modules=False), *shared.names(of_modules=False)}
        kinds = {*state.kinds, *map(type, self.modules.values())}
        kept = state.names() | {name for _, _, name in self.reads} | class_attributes(kinds)
        kept |= global_names([*self._running.values()]) | self._global_numbers()
        # what modules keep, and is read, is compared by what it is
        of_objects |= class_attributes(one for one in state.kinds if not issubclass(one, nn.Module))
        written = {path: one.filling(of_objects) for path, one in written.items()}
        names = {name for one in written.values() for name in one.among(kept)}
        computes = any("__getattr__" in vars(base) for kind in kinds for base in _own_bases(kind))
        found, blind = {}, self._with_getters()
        for path, module in self.modules.items():
            codes = [*(one.__code__ for one in functions_of(module)), *self._entered.get(path, {}).values()]
            said = frozenset().union(*map(names_in, codes))
            is_blind = path in blind
            asks = asked(codes).union(Written.of([ANY] if is_blind else self._missed.get(path, ())))
            mentioned = names.intersection(itertools.chain(*map(names_mentioned, codes)))
            for one in written.values():
                mentioned |= (one.among(said) if computes else one.names & said) | one.meeting(asks)
            mentioned |= {each.watched for each in self._mentions() if each.reader == path}
            writers = {name: {at: one for at, one in written.items() if one.may_be(name)} for name in mentioned}
            writers = {name: ones for name, ones in writers.items() if ones}
            unsettled = (name for name, ones in writers.items() if is_blind or not self._is_settled(path, name, ones))
            if common := min(unsettled, default=None):
                found[path] = f"mentions {common!r}, which {[*writers[common]][-1]!r} may write when it runs"
        codes_of = {path: self._entered.get(path, {}).values() for path in self.modules}
        says = {path: frozenset[str]().union(*map(names_mentioned, codes)) for path, codes in codes_of.items()}
        for reader, where, value in self._read():
            if reader not in found and any(map(shared.holds, _changeable(value, says.get(reader, frozenset())))):
                found[reader] = f"reads {where!r}, which may change when the model runs"
        return found

    def _read(self) -> Iterator[tuple[str, str, Any]]:
        """The paths of the traced modules, and what they read: attributes, and what names in their code lead to."""
        for (reader, path, name), value in self.reads.items():
            yield reader, ".".join(filter(None, (path, name))), value
        for code, space in self.codes.values():
            if is_installed(space.get("__name__")):  # what packages keep is taken for constant
                continue
            readers = [path for path in self.modules if id(code) in self._entered.get(path, ())]
            for place in places(code, space) if readers else ():
                yield from ((path, place.name, place.value) for path in readers)

    def _with_getters(self) -> set[str]:
        """The paths of the traced modules that have functions made to get attributes: nothing says when they do."""
        codes = {
            id(code)
            for code, space in self.codes.values()
            if any(isinstance(space.get(name), _GETTERS) for name in names_in(code))
        }
        found = {path for path, entered in self._entered.items() if not codes.isdisjoint(entered)}
        return found | {reader for (reader, _, _), value in self.reads.items() if isinstance(value, _GETTERS)}

    def _global_numbers(self) -> set[str]:
        """The global variables with plain values that the traced code says."""
        spaces = self.codes.values()
        return {name for code, space in spaces for name in names_in(code) if isinstance(space.get(name, space), PLAIN)}

    def _mentions(self) -> Iterator[Mention]:
        return (one for one in self._happened.values() if isinstance(one, Mention))

    def _methods(self, state: Snapshot) -> frozenset[types.FunctionType]:
        """The functions that always get a module as their first argument."""
        running = (inner for module in self._running.values() for inner in module.modules())
        kinds: set[Any] = {type(module) for module in (*running, *self.modules.values())}
        others = (base for kind in state.kinds if not issubclass(kind, nn.Module) for base in _own_bases(kind))
        borrowed = {one for base in others for one in vars(base).values() if isinstance(one, types.FunctionType)}
        return frozenset[types.FunctionType]().union(*map(methods_of, kinds)) - borrowed

    def _is_settled(self, path: str, name: str, writers: Mapping[str, Written]) -> bool:
        """Whether all that a module read under a name was read before anyone ran who may write it, and known places
        keep it, as they did before. What they keep can then be asked before the next call. What nobody writes but to
        modules is no matter in other objects."""
        if name not in self.watched:
            self.unwatched.add(name)
            return False
        of_modules = not any(one.in_objects().may_be(name) for one in writers.values())
        found = {}
        has_run = False
        for one in self._happened.values():
            if isinstance(one, str):
                has_run |= one in writers
            elif one.watched == name and one.reader == path and (one.of_module or not of_modules):
                place = self._place(one)
                if has_run or place is None or not one.is_still():
                    return False
                found[*place, one.name] = one.value
        self.settled |= found
        return True

    def _place(self, mention: Mention) -> tuple[str, str] | None:
        """The path of a module that has an attribute, or that and an attribute that was read of it, which has."""
        if mention.path is not None:
            return mention.path, ""
        return next(((path, kept) for (_, path, kept), value in self.reads.items() if value is mention.owner), None)


def _changeable(value: Any, said: frozenset[str]) -> Iterator[Any]:
    """A value, what is in it, and what a function closes over; the attributes, of some names, of an object."""
    waiting, met = [value], dict[int, Any]()
    while waiting:
        one = waiting.pop()
        if type(one) in _VALUES or isinstance(one, nn.Module) or id(one) in met:
            continue
        met[id(one)] = one
        yield one
        if isinstance(one, HOLDERS):
            waiting += inside(one)
        elif not is_installed(type(one).__module__):
            kept = attributes(one)
            waiting += (kept[name] for name in said & kept.keys())


def _is_inert(module: nn.Module) -> bool:
    """Whether nothing runs in a module but torch's own code: the user's may be kept in it."""
    own = vars(module)
    if not type(module).__module__.startswith("torch.") or any(own.get(kind) for kind in HOOKS):
        return False
    kept = [value for name in own.keys() - _OF_ANY if type(value := own[name]) not in _VALUES]
    return not any(map(_leads_on, kept)) and all(map(_is_inert, module.children() if own["_modules"] else ()))


def _leads_on(kept: Any) -> bool:
    return any(map(_leads_on, kept)) if type(kept) in (tuple, list) else type(kept) not in _VALUES


def class_attributes(kinds: Iterable[type]) -> set[str]:
    """What classes of the user's define: an attribute of an instance may hide it later."""
    return {name for kind in kinds for base in _own_bases(kind) for name in vars(base)}


def _own_bases(kind: type) -> Iterator[type]:
    return (base for base in kind.__mro__ if not is_library(base.__module__))


def shorten(record: dict[Any, Any], length: int) -> None:
    """Drop what was entered last until so many entries are left."""
    while len(record) > length:
        record.popitem()


def _hooks(module: nn.Module) -> Iterator[Any]:
    """The user's own hooks on a module and those inside."""
    for inner in module.modules():
        for kind in HOOKS:
            yield from getattr(inner, kind).values()


def _functions(module: nn.Module, hooks: Iterable[Any]) -> Iterator[Any]:
    for inner in module.modules():
        yield from functions_of(inner)
    for hook in hooks:
        yield from functions_behind(hook)
