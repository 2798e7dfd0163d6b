"""What modules say to each other past their arguments and results: attributes and containers.

A traced forward reads attributes once, when it is traced. That is wrong where a module that runs as it is, opaque or
with hooks of the user's own, writes them: whoever reads them must then run as it is, too.
"""

import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from .reaching import reach
from .scanning import (
    changes_containers,
    functions_behind,
    functions_of,
    global_names,
    mentioned_names,
    names_mentioned,
)
from .snapshots import Snapshot
from .structure import PLAIN
from .writes import Written

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_ANY = frozenset(vars(nn.Module()))
_VALUES = frozenset((*PLAIN, Tensor, nn.Parameter))
GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)


def has_hooks(module: nn.Module) -> bool:
    """Whether the user hooked anything onto a module."""
    own = vars(module)
    return any(own.get(kind) for kind in HOOKS)


class Ledger:
    """Which modules a trace went through, which run as they are, and what the former read.

    Each record keeps the order in which it was made, so that what was noted since a mark can be forgotten.
    """

    def __init__(self) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.reads: dict[tuple[str, str, str], Any] = {}
        self.codes: dict[tuple[int, int], tuple[types.CodeType, dict[str, Any]]] = {}  # by identity: equal is not same
        self._entered: dict[str, dict[int, types.CodeType]] = {}
        self._running: dict[str, nn.Module] = {}

    def traced(self, path: str, module: nn.Module) -> None:
        """A module's forward is being traced."""
        self.modules.setdefault(path, module)

    def enters(self, path: str, code: types.CodeType, space: dict[str, Any]) -> None:
        """Code of the user's runs for the module at a path, with its global variables."""
        self.codes.setdefault((id(code), id(space)), (code, space))
        self._entered.setdefault(path, {})[id(code)] = code

    def read(self, reader: str, path: str, name: str, value: Any) -> None:
        """The traced forward of `reader` read an attribute of the module at `path`."""
        self.reads.setdefault((reader, path, name), value)

    def runs(self, path: str, module: nn.Module) -> None:
        """A module will run as it is."""
        self._running.setdefault(path, module)

    def runs_layer(self, path: str, module: nn.Module) -> None:
        """A layer of torch's own will run as it is: it matters if something of the user's runs in it."""
        if not _is_inert(module):
            self.runs(path, module)

    def mark(self) -> tuple[int, ...]:
        """Where the records stand."""
        return (len(self.modules), len(self.reads), len(self._running))

    def forget(self, mark: tuple[int, ...]) -> None:
        """Drop what was noted since a mark."""
        records: tuple[dict[Any, Any], ...] = (self.modules, self.reads, self._running)
        for record, length in zip(records, mark, strict=True):
            shorten(record, length)

    def misled(self, state: Snapshot) -> dict[str, str]:
        """The paths of the traced modules that read what modules that run as they are may write, with the reason.

        Args:
            state: all that could be read: a name that is nobody's attribute, and was not asked for, is a local one.
        """
        written: dict[str, Written] = {}
        changing: list[nn.Module] = []
        hooks: list[Any] = []
        for path, module in self._running.items():
            own = [*_hooks(module)]
            functions = dict.fromkeys((*_functions(module, own), *reach([module])))
            written[path] = Written.by(functions)
            if changes_containers(functions):
                changing += module.modules()
                hooks += own
        if not any(map(any, written.values())) and not changing and not hooks:
            return {}
        owners = [owner for hook in hooks if isinstance(owner := getattr(hook, "__self__", None), nn.Module)]
        shared = Snapshot([*changing, *owners], also=hooks)
        kept = state.names() | {name for _, _, name in self.reads} | class_attributes(self.modules.values())
        kept |= global_names([*self._running.values()])
        names = {name: path for path, one in written.items() for name in one.among(kept)}
        found = {}
        for path, module in self.modules.items():
            mentioned = mentioned_names(module).union(*map(names_mentioned, self._entered.get(path, {}).values()))
            if common := sorted(mentioned & names.keys()):
                found[path] = f"mentions {common[0]!r}, which {names[common[0]]!r} may write when it runs"
        for (reader, path, name), value in self.reads.items():
            if shared.holds(value):
                where = ".".join(filter(None, (path, name)))
                found.setdefault(reader, f"reads {where!r}, which may change when the model runs")
        return found


def _is_inert(module: nn.Module) -> bool:
    """Whether nothing runs in a module but torch's own code: the user's may be kept in it."""
    own = vars(module)
    if not type(module).__module__.startswith("torch.") or any(own.get(kind) for kind in HOOKS):
        return False
    kept = [value for name, value in own.items() if type(value) not in _VALUES and name not in _OF_ANY]
    return not any(map(_leads_on, kept)) and all(map(_is_inert, module.children() if own["_modules"] else ()))


def _leads_on(kept: Any) -> bool:
    return any(map(_leads_on, kept)) if type(kept) in (tuple, list) else type(kept) not in _VALUES


def class_attributes(modules: Iterable[nn.Module]) -> set[str]:
    """What the modules' own classes define: an attribute of an instance may hide it later."""
    bases = {base for kind in {type(module) for module in modules} for base in kind.__mro__}
    return {name for base in bases if not base.__module__.startswith("torch.") for name in vars(base)}


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
