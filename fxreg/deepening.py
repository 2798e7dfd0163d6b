"""deepen: (model, examples) → the graph of a recorded forward that holds for both modes, or nothing.

A recording is believed once a second one says the same, and once nothing that was recorded changed, or read, what a
graph cannot hold. Otherwise the modules at fault stay whole, and everything is recorded again.
"""

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from .captured import Assumed, Captured, joined, kinds_of
from .merging import differing, merged
from .module import CHILD
from .proxies import Untraceable
from .recording import Recorder
from .scanning import global_objects
from .snapshots import borrowed, iterator_kept
from .staleness import remember
from .structure import fresh, likeness, map_tensors
from .tracing import described

_TRIES = 40


class _Again(Exception):
    """Some modules must stay whole: for their paths, why."""

    def __init__(self, forced: dict[str, str]) -> None:
        super().__init__()
        self.forced = forced


def deepen(
    model: nn.Module,
    place: Callable[[fx.Graph], dict[str, fx.Node]],
    arguments: dict[str, Any],
    call: Callable[..., Any],
) -> Captured | None:
    """Record the model's forward on an example.

    Args:
        place: adds the placeholders to a graph, and returns them by name.
        arguments: the example, by name.
        call: calls the forward with arguments by name.
    """
    if iterator_kept(model) is not None:
        return None
    forced: dict[str, str] = {}
    for _ in range(_TRIES):
        try:
            return _Session(model, place, arguments, call, forced).recorded()
        except _Again as again:
            if "" in again.forced or not again.forced.keys() - forced.keys():
                return None
            forced |= again.forced
        except Untraceable:
            return None
    return None


class _Session:
    """Everything that is done with one choice of modules to keep whole."""

    def __init__(self, model: nn.Module, place: Any, arguments: Any, call: Any, forced: dict[str, str]) -> None:
        self.model, self.place, self.arguments, self.call, self.forced = model, place, arguments, call, forced
        self.also = global_objects(model)
        self.watches = False

    def recorded(self) -> Captured:
        first = self._run(training=True)
        self._agree(first, self._run(training=True), numbers=True)
        graph, questions, answers, asks_values = first.graph, first.questions, first.answers, first.asks_values
        modes, reads, modules = dict(first.asked.modes), dict(first.ledger.reads), dict(first.ledger.modules)
        other = self._run(training=False)
        self._agree(first, other, numbers=False)
        graph = merged(graph, other.graph, CHILD)
        questions, answers = joined((questions, answers), (other.questions, other.answers))
        asks_values |= other.asks_values
        modes |= other.asked.modes
        reads |= other.ledger.reads
        modules |= other.ledger.modules
        values = tuple(self.arguments.values())
        kinds = kinds_of(self.model, values) if first.asked.kinds else None
        assumed = Assumed(
            tuple(map(likeness, values)), tuple(modes), kinds, questions, answers, asks_values, first.kept
        )
        return Captured(graph, first.opaque, remember(self.model, modules, reads.items()), assumed)

    def _agree(self, one: Recorder, other: Recorder, numbers: bool) -> None:
        if missing := one.opaque.keys() ^ other.opaque.keys():
            raise _Again({path: one.opaque.get(path, other.opaque.get(path, "")) for path in missing})
        what = "differs from one call to the next" if numbers else "does other things in training than in evaluation"
        if found := differing(one.graph, other.graph, numbers):
            raise _Again(dict.fromkeys(found, what))

    def _run(self, training: bool) -> Recorder:
        """One recording, in one mode; the model is left as it was."""
        with borrowed(self.model, training=training) as reset:
            recorder, changed = self._record()
            if changed and not self.watches:
                reset()
                self.watches = True
                recorder, _ = self._record()
        if misled := recorder.ledger.misled(recorder.state):
            raise _Again(misled)
        return recorder

    def _record(self) -> tuple[Recorder, bool]:
        recorder = Recorder(self.model, f"{CHILD}.model", self.forced, self.also, self.watches)
        arguments = map_tensors(fresh, self.arguments)
        nodes = self.place(recorder.graph)
        for name, value in arguments.items():
            arguments[name] = recorder.learn(value, nodes[name])
        try:
            changed = recorder.record(lambda: self.call(arguments))
        except Untraceable:
            raise
        except Exception as error:
            raise _Again(dict(recorder.failed) or {"": described(error)}) from error
        return recorder, changed
