"""deepen: (model, examples) → the graph of a recorded forward that holds for both modes, or nothing.

A recording is believed once a second one says the same, and once nothing that was recorded changed, or read, what a
graph cannot hold. Otherwise the modules at fault stay whole, and everything is recorded again. Where only numbers
differ between training and evaluation, one graph holds both; where more does, each mode has its own.
"""

import contextvars
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from .captured import WAYS, Assumed, Captured, Settled, joined, kinds_of, settled, way
from .freezing import frozen
from .graphs import Lent
from .interception import as_if_compiled
from .layers import described
from .merging import differing, merged
from .module import CHILD
from .proxies import Untraceable
from .recording import Recorder
from .scanning import global_objects
from .snapshots import Snapshot, borrowed, iterator_kept
from .staleness import remember
from .structure import alike, fresh, likeness, map_tensors

_TRIES = 40


class _Again(Exception):  # noqa: N818  not an error
    """Some modules must stay whole: for their paths, why. Or else some names must be watched."""

    def __init__(self, forced: dict[str, str], names: Iterable[str] = ()) -> None:
        super().__init__()
        self.forced, self.names = forced, frozenset(names)


def deepen(
    model: nn.Module,
    place: Callable[[fx.Graph], dict[str, fx.Node]],
    arguments: dict[str, Any],
    call: Callable[..., Any],
    marked: Collection[str],
) -> Captured | None:
    """Record the model's forward on an example.

    Args:
        place: adds the placeholders to a graph, and returns them by name.
        arguments: the example, by name.
        call: calls the forward with arguments by name.
        marked: the paths of the modules whose activations the graph is to mark.
    """
    if iterator_kept(model) is not None:
        return None
    sets_more, names = _sets_more_than_modes(model), set[str]()
    recorded = _recorded(model, place, arguments, call, marked, sets_more, names)
    if recorded is None or sets_more or all(one.holds_in(WAYS) for one in recorded.chain):
        return recorded
    compiled = None
    with as_if_compiled(), suppress(Exception):  # there it may fail, whatever it does elsewhere
        compiled = _recorded(model, place, arguments, call, marked, sets_more, names, known=recorded)
    if compiled is None:
        return recorded
    return recorded.in_ways(("eager", "compiled")) if _alike(recorded, compiled) else recorded.before(compiled)


def _recorded(
    model: nn.Module,
    place: Any,
    arguments: dict[str, Any],
    call: Any,
    marked: Collection[str],
    sets_more: bool,
    names: set[str],
    known: Captured | None = None,
) -> Captured | None:
    forced: dict[str, str] = {}
    for _ in range(_TRIES):
        try:
            return _Session(model, place, arguments, call, forced, frozenset(names), marked, sets_more).recorded(known)
        except _Again as again:
            if again.names:
                names |= again.names
                continue
            if "" in again.forced or not again.forced.keys() - forced.keys():
                return None
            forced |= again.forced
        except Untraceable:
            return None
    return None


class _Session:
    """Everything that is done with one choice of modules to keep whole."""

    def __init__(
        self,
        model: nn.Module,
        place: Any,
        arguments: Any,
        call: Any,
        forced: dict[str, str],
        names: frozenset[str],
        marked: Collection[str],
        sets_more: bool,
    ) -> None:
        self.model, self.place, self.arguments, self.call = model, place, arguments, call
        self.forced, self.names, self.marked, self.sets_more = forced, names, marked, sets_more
        self.also = global_objects(model)
        self.watches = False
        self.settled = self._settle()

    def recorded(self, known: Captured | None) -> Captured:
        """What the model does in both modes; each recording is made twice, unless they are what is known already."""
        first, other = self._run(training=True), self._run(training=False)
        if known is not None and _alike(known, captured := self._joined(first, other)):
            return captured
        self._confirm(first, training=True)
        found = _differing(first, other, numbers=False)
        if found and not any(self._has_parameters(path) for path in found):
            raise _Again(dict.fromkeys(found, "does other things in training than in evaluation"))
        if not _are_one(first, other):
            self._confirm(other, training=False)
        return self._joined(first, other)

    def _confirm(self, one: Recorder, training: bool) -> None:
        """Record again, and find the same."""
        again = self._run(training)
        if missing := one.opaque.keys() ^ again.opaque.keys():
            raise _Again({path: one.opaque.get(path, again.opaque.get(path, "")) for path in missing})
        if found := _differing(one, again, numbers=True):
            raise _Again(dict.fromkeys(found, "differs from one call to the next"))
        if not alike(one.writer.kept, again.writer.kept):
            raise _Again({"": "returns an object that differs from one call to the next"})

    def _joined(self, first: Recorder, other: Recorder) -> Captured:
        """Both modes as one graph, or as one for each."""
        if _are_one(first, other):
            return self._captured(first, other)
        return self._captured(first, first, training=True).before(self._captured(other, other, training=False))

    def _follows_way(self, *recorders: Recorder) -> bool:
        asks = any(one.asked.way for one in recorders) or torch.compiler.is_compiling()  # as it is to think
        return asks or self.sets_more

    def _has_parameters(self, path: str) -> bool:
        return next(self.model.get_submodule(path).parameters(), None) is not None

    def _captured(self, first: Recorder, other: Recorder, training: bool | None = None) -> Captured:
        """What holds in one mode, or in both, for which there is a recording each."""
        asked = [one.writer.questions() for one in ((first, other) if first is not other else (first,))]
        graph = merged(first.writer.graph, other.writer.graph, CHILD)
        questions, answers = joined([one[:2] for one in asked])
        modes = first.asked.modes | other.asked.modes
        values = tuple(self.arguments.values())
        asked_facts = first.asked.facts | other.asked.facts | first.ledger.settled | other.ledger.settled
        facts = [Settled(*where, fact, frozen(fact)) for where, fact in asked_facts.items()]
        kept = dict(first.writer.kept)
        if training is False:  # beside those of the graph for training
            kept = {f"{name}_in_evaluation": one for name, one in kept.items()}
            for node in graph.nodes:
                if node.op == "get_attr" and node.target.removeprefix(f"{CHILD}.") in first.writer.kept:
                    node.target += "_in_evaluation"
        assumed = Assumed(
            arguments=tuple(map(likeness, values)),
            training=training,
            modes=tuple(modes),
            kinds=kinds_of(self.model, values) if first.asked.kinds or other.asked.kinds else None,
            questions=questions,
            answers=answers,
            ways=(way(),) if self._follows_way(first, other) else WAYS,
            asks_values=any(takes_values for _, _, takes_values in asked),
            kept=kept,
            settled=(*self.settled, *facts),
        )
        modules = first.ledger.modules | other.ledger.modules
        reads = first.ledger.reads | other.ledger.reads
        listings = first.ledger.listings | other.ledger.listings
        with self._borrowed(training=True):
            codes = first.ledger.heard() | other.ledger.heard()
            remembered = remember(self.model, modules, reads.items(), codes.values(), listings.items())
        return Captured(Lent(graph), first.opaque, remembered, assumed)

    def _settle(self) -> tuple[Settled, ...]:
        """What a first call sets for good. The recordings are of later calls."""
        with borrowed(self.model):
            before = Snapshot(self.model.modules(), also=self.also)
            self._call_once()
            changes = before.settling()
            return (changes and settled(self.model, changes)) or ()

    def _call_once(self) -> None:
        contextvars.copy_context().run(self.call, map_tensors(fresh, self.arguments))

    @contextmanager
    def _borrowed(self, training: bool) -> Iterator[Callable[[], None]]:
        """The model in a mode, after its first call if that sets something."""
        with borrowed(self.model, training=training) as reset:

            def settle() -> None:
                reset()
                if self.settled:
                    self._call_once()

            settle()
            yield settle

    def _run(self, training: bool) -> Recorder:
        """One recording, in one mode; the model is left as it was."""
        with self._borrowed(training) as reset:
            recorder = self._record()
            if recorder.changed() and not self.watches:
                reset()
                self.watches = True
                recorder = self._record()
        if misled := recorder.ledger.misled(recorder.state):
            raise _Again(misled, recorder.ledger.unwatched)
        return recorder

    def _record(self) -> Recorder:
        recorder = Recorder(self.model, f"{CHILD}.model", self.forced, self.also, self.marked, self.watches, self.names)
        try:
            recorder.record(self.place, map_tensors(fresh, self.arguments), self.call)
        except Exception as error:  # not Untraceable, which is none
            raise _Again(recorder.failed or {"": described(error)}) from error
        return recorder


def _sets_more_than_modes(model: nn.Module) -> bool:
    """Whether `train` of a class of the user's also sets what compiled code does not compare."""
    if all(type(module).train is nn.Module.train for module in model.modules()):
        return False
    with borrowed(model, training=True):
        before = Snapshot(model.modules(), also=global_objects(model))
        for mode in (False, True):
            model.train(mode)
            changes = before.settling()
            if changes is None or any(name != "training" for _, name, _ in changes):
                return True
    return False


def _alike(one: Captured, other: Captured) -> bool:
    """Whether two chains of recordings hold the same, in whichever way."""
    return len(one.chain) == len(other.chain) and all(map(_are_alike, one.chain, other.chain))


def _are_alike(one: Captured, other: Captured) -> bool:
    mine, theirs = one.assumed, other.assumed
    assert mine is not None
    assert theirs is not None
    return (
        one.opaque.keys() == other.opaque.keys()
        and replace(mine, ways=WAYS, kept={}, questions=theirs.questions) == replace(theirs, ways=WAYS, kept={})
        and alike(mine.kept, theirs.kept)
        and not differing(mine.questions, theirs.questions, numbers=True)
        and not differing(one.graph, other.graph, numbers=True)
    )


def _are_one(first: Recorder, other: Recorder) -> bool:
    """Whether one graph is what two recordings hold, in both modes."""
    return not _differing(first, other, numbers=False) and alike(first.writer.kept, other.writer.kept)


def _differing(one: Recorder, other: Recorder, numbers: bool) -> set[str]:
    """The paths of the modules that two recordings hold differently."""
    return one.opaque.keys() ^ other.opaque.keys() or differing(one.writer.graph, other.writer.graph, numbers)
