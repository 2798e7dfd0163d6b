"""A recorder: it runs a forward for real, on an example, and writes down what it does.

`SoundTracer` asks nothing of the caller and so can know little: of what kind a value is, how many dimensions it has,
what an opaque module returns. A recorder sees all of it, since it runs the model: every torch call becomes a node,
every module call that a graph can hold is inlined, and Python takes the turns that it takes. What the turns depended
on is assumed, and every assumption is checked when the graph runs: sizes are symbolic (`sizes`), and the rest is in
`Assumed`.

Nothing is refused while it runs. What a graph cannot hold makes the innermost module whose forward is being recorded
*whole*: what was written since it was entered is rolled back, the rest of it runs unrecorded, and it becomes one call.
"""

import contextvars
import functools
import threading
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from . import calls
from .enclosed import dictionary_of, slots
from .errors import CaptureError
from .executing import inside_handler, unheard, watched
from .interception import intercepted
from .layers import described, is_layer, is_plain_layer, tensor_paths, whole_reason
from .listening import OTHER_MODE, Listening, ambient
from .notes import Asked
from .proxies import Untraceable
from .shapes import LAYER, SHAPE
from .side_channels import Ledger
from .sizes import concrete
from .snapshots import Snapshot, leads_to_iterator, rng_state
from .structure import differs, has_attributes, held, holds_mutable, is_nested, likeness, tensors
from .writing import Mark, Origin, Unrecordable, Writer

_CALL = nn.Module.__call__


@dataclass
class _Frame:
    """A module whose forward is being recorded.

    Attributes:
        call: its arguments, in case it becomes one call.
        written, heard: where the graph and the ledger stood before.
        opaque: what was whole before.
        reason: why it is whole, once it is.
    """

    path: str
    module: nn.Module
    call: tuple[Any, Any]
    written: Mark
    heard: tuple[int, ...]
    opaque: dict[str, str]
    reason: str | None = None


class Recorder:
    """Records one call of one root; see the module docstring.

    Attributes:
        opaque: for the path of every module that is whole, why.
        failed: the path of the first module whose forward raised, and what.
        is_busy: whether the recorder itself is at work, of which nothing is to be heard.
    """

    def __init__(
        self,
        root: nn.Module,
        root_alias: str,
        forced: Mapping[str, str],
        also: tuple[Any, ...],
        marked: Collection[str],
        watches: bool,
        names: frozenset[str] = frozenset(),
    ) -> None:
        self.root = root
        self.marked = marked
        self.ambient: tuple[object, ...] = ()
        self.opaque: dict[str, str] = {}
        self.ledger = Ledger(names)
        self.asked = Asked()
        self.failed: dict[str, str] = {}
        self._forced, self._also, self._watches = forced, also, watches
        self._alias = root_alias
        self._identity = threading.get_ident()
        self._paths = {module: path for path, module in reversed([*root.named_modules(remove_duplicate=False)])}
        self.writer = Writer(
            tensor_paths(self._paths, root_alias), root_alias.partition(".")[0], self.give_up, self._is_kept
        )
        self._frames: list[_Frame] = []
        self._before = self._state()
        self.state = self._before[0]
        self._is_suspicious, self.is_busy = False, False
        self._made: dict[int, nn.Module] = {}
        self._own: dict[int, Any] = {}

    # What interception asks.

    @property
    def thread(self) -> int:
        """The thread whose doings are recorded; none while something runs unrecorded."""
        return self._identity if self.writer.writes else 0

    def mode(self) -> TorchFunctionMode:
        return Listening(self)

    def give_up(self, reason: str) -> None:
        """Make the innermost module whole; it runs on, unrecorded."""
        if self.writer.writes:
            self._frames[-1].reason = reason
            self.writer.writes = False

    def note_asked_way(self, whether_compiled: bool) -> None:
        """The forward asked whether it is compiled, or else whether it is traced."""
        self.asked.way = True
        if whether_compiled and torch.compiler.is_compiling():  # as it is to think, but it has not heard so
            self.give_up("asks whether it is compiled, by a name of its own")

    @unheard
    def note_read(self, module: nn.Module, name: str, value: Any) -> None:
        if leads_to_iterator(value):
            self.give_up(f"reads the iterator {type(module).__name__}.{name}")
        elif module in self._paths:
            self.ledger.read(self._frames[-1].path, self._paths[module], name, value)

    @unheard
    def note_listed(self, module: nn.Module, registry: str, now: Any) -> None:
        if module in self._paths:
            self.ledger.lists(self._frames[-1].path, self._paths[module], registry, now)

    def attribute(self, module: nn.Module, name: str, value: Any) -> Any:
        if not isinstance(value, nn.Module | Tensor):
            self.note_read(module, name, value)
        return value

    def note_change(self, module: nn.Module, what: str) -> None:
        if module in self._paths:
            self.give_up(what)
        elif not vars(module):
            self._made[id(module)] = module  # the first thing that its __init__ does
        elif id(module) not in self._made:
            self.give_up(f"{what}, which is none of the model's")

    def note_entered(self, code: types.CodeType, space: dict[str, Any]) -> None:
        """Code of the user's runs."""
        self.ledger.enters(self._frames[-1].path if self._frames else "", code, space)

    def note_mentioned(self, watched: str, name: str, owner: tuple[Any, ...]) -> None:
        """The forward mentions a name that is watched, as an attribute of the owner if that is known."""
        if self.writer.writes:
            self.writer.writes = False  # to ask is none of the forward's doing
            self.ledger.mentions(self._frames[-1].path, watched, name, owner, self._paths)
            self.writer.writes = True

    def note_missed(self, name: str | None) -> None:
        """Something had no such attribute, which the forward may have expected."""
        self.ledger.misses(self._frames[-1].path if self._frames else "", name)

    def note_made(self, value: Any, is_new: bool = False) -> None:
        """An object was copied, or its `__init__` is about to run: it is the forward's own, if it has nothing yet."""
        if is_new or (type(value).__dictoffset__ and not dictionary_of(value)):
            self._own[id(value)] = value

    def watches_over(self, value: Any) -> bool:
        """Whether an attribute of an object may be written: the forward made it, or what is written is seen."""
        if isinstance(value, nn.Module | Tensor) or id(value) in self._own:
            return True
        return not isinstance(value, type) and not slots(type(value)) and self._is_kept(value)

    def is_as_it_was(self, module: nn.Module, name: str, value: Any) -> bool:
        """Whether an attribute is set to itself: `self.table = self.table.to(x.device)`, where it is there already."""
        original: Tensor | None = self.writer.converted(value)
        if original is None or module not in self._paths:
            return False
        if module._buffers.get(name) is original:
            self.asked.kinds = True
        elif id(vars(module).get(name)) == id(original):
            facts = {"dtype": original.dtype, "device": original.device}
            self.asked.facts |= {(self._paths[module], name, kind): fact for kind, fact in facts.items()}
        else:
            return False
        return True

    def fixed_shape(self, node: fx.Node, value: Tensor) -> tuple[int, ...] | None:
        """The shape of a tensor that a module keeps, which is assumed to stay; None where a node gives another."""
        if node.op != "get_attr":
            return None
        with torch._C.DisableTorchFunction():
            node.meta[SHAPE] = value.shape
        path, _, name = str(node.target).removeprefix(f"{self._alias}.").rpartition(".")
        self.asked.facts[path, name, "shape"] = node.meta[SHAPE]
        return tuple(node.meta[SHAPE])

    def read_training(self, module: nn.Module) -> bool:
        if module in self._paths:
            self.asked.modes[self._paths[module]] = None
        else:
            self.give_up("reads the mode of a module that is none of the model's")
        return bool(vars(module).get("training", True))

    def is_in_leaf(self) -> bool:
        """Whether the innermost module has parameters and no children, so that leaving it whole costs no depth."""
        module = self._frames[-1].module
        return not module._modules and bool(module._parameters) and len(self._frames) > 1

    # The root.

    def record(self, place: Callable[[fx.Graph], Mapping[str, fx.Node]], values: Mapping[str, Any], call: Any) -> None:
        """Run the root's forward and finish the graph.

        Args:
            place: adds the placeholders to a graph, and returns them by name.
            values: the arguments, by name; tensors among them may be written to.
            call: calls the forward with them.

        Raises:
            Untraceable: the root itself is whole.
        """
        context = dict(contextvars.copy_context().items())
        try:
            arguments = self.writer.place(values, place(self.writer.graph))
        except Unrecordable as failure:
            raise Untraceable(str(failure)) from None
        before = held(arguments)
        with intercepted(self):
            self.ambient = ambient()
            frame = self._enter("", self.root, (), {})
            self.ledger.traced("", self.root)
            try:
                self._mark(tuple(arguments.values()), "", "input")
                with watched(self):
                    result = call(arguments)
                self._mark(result, "", "output")
                self._check_state()
                if differs(before, arguments):
                    self.give_up("changes a container that it was given")
                elif dict(contextvars.copy_context().items()) != context:
                    self.give_up("sets a context variable")
                elif any(has_attributes(value) for value in self.writer.known() if isinstance(value, Tensor)):
                    self.give_up("sets an attribute of a tensor")
                elif frame.reason is None:
                    self.writer.graph.output(self.writer.output(result))
            except Unrecordable as failure:
                frame.reason = str(failure)
            finally:
                self.writer.writes = False
        if frame.reason is not None:
            raise Untraceable(frame.reason)

    def changed(self) -> bool:
        """Whether running the forwards changed any state beside tensors, or may have been seen to."""
        return self._is_suspicious or self._change() is not None

    # Modules.

    def call_submodule(self, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self._paths.get(module)
        if refusal := self._refusal(path, module):
            self.give_up(refusal)
        if not self.writer.writes:
            return _CALL(module, *concrete(args), **concrete(kwargs))
        if path is None:
            return run(*args, **kwargs)  # of the forward's own making: its tensors are not known
        if not is_plain_layer(module):
            self._check_state()
        if not self.writer.writes:
            return _CALL(module, *concrete(args), **concrete(kwargs))
        self._mark((args, kwargs), path, "input")
        result = self._called(path, module, run, args, kwargs)
        self._mark(result, path, "output")
        return result

    def _called(self, path: str, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        reason = None if is_layer(module) else self._forced.get(path) or whole_reason(module, runs=True)
        if reason is None and not is_layer(module):
            hooked = module._forward_hooks or module._forward_pre_hooks
            return self._inlined(path, module, functools.partial(_CALL, module) if hooked else run, args, kwargs)
        frame = self._enter(path, module, args, kwargs)
        if reason is not None and not self._watches:
            self._suspect(module)
        self.give_up(reason or "")
        try:
            result = _CALL(module, *concrete(args), **concrete(kwargs))
        finally:
            self._leave()
        return self._whole(frame, result)

    def _mark(self, values: Any, path: str, on: str) -> None:
        """Say in the graph that activations of a module pass here, if anyone wants to know."""
        if path not in self.marked or not self.writer.writes:
            return
        try:
            with torch._C.DisableTorchFunction():
                self.writer.call(calls.passes, tuple(map(self.writer.argument, tensors(values))), path, on)
        except (Unrecordable, CaptureError) as failure:
            self.give_up(str(failure))

    def _refusal(self, path: str | None, module: nn.Module) -> str | None:
        """Why a forward must not call a module, as far as a graph goes."""
        if ambient() != self.ambient:
            return OTHER_MODE
        if path == "":
            return "calls itself"
        if catcher := inside_handler():
            return f"{catcher} catches exceptions"
        if type(module).__call__ is not nn.Module.__call__ and not isinstance(module, fx.GraphModule):
            return f"calls {path!r}, whose class overrides __call__"
        if path is None and id(module) not in self._made:
            return f"calls a {type(module).__name__} that is not one of the model's registered modules"
        return None

    def _inlined(self, path: str, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        frame = self._enter(path, module, args, kwargs)
        self.ledger.traced(path, module)
        try:
            result = run(*args, **kwargs)
            self._check_state()
        except Exception as error:
            self.failed = self.failed or {path: described(error)}
            raise
        finally:
            self._leave()
        return result if frame.reason is None else self._whole(frame, result)

    def _enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> _Frame:
        call = (held(args), held(kwargs))
        frame = _Frame(path, module, call, self.writer.mark(), self.ledger.mark(), dict(self.opaque))
        self._frames.append(frame)
        self.writer.scope.append((path, type(module)))
        return frame

    def _leave(self) -> None:
        frame = self._frames.pop()
        self.writer.scope.pop()
        if frame.reason is not None:
            self.writer.writes = True
            self.writer.roll_back(frame.written)
            self.ledger.forget(frame.heard)
            self.opaque = frame.opaque
            if self._watches and not is_plain_layer(frame.module):
                self._before = self._state()

    def _whole(self, frame: _Frame, result: Any) -> Any:
        """What a module gave that has become one call."""
        try:
            args, kwargs = map(self.writer.argument, frame.call)
            node = self.writer.node("call_module", frame.path, args, kwargs)
            node.meta["nn_module_stack"][frame.path] = (frame.path, type(frame.module))
            if is_layer(frame.module):
                self.ledger.runs_layer(frame.path, frame.module)
            if is_plain_layer(frame.module) and not getattr(frame.module, "inplace", False):
                node.meta[LAYER] = type(frame.module)
                return self.writer.bound(result, Origin(node))
            self.writer.note_written(node)
            if holds_mutable((*frame.call[0], *frame.call[1].values())):
                raise Unrecordable(f"passes a list or dict to opaque {frame.path!r}, which may change it")
            if not is_layer(frame.module):
                self.opaque[frame.path] = frame.reason or ""
                self.ledger.runs(frame.path, frame.module)
            if is_nested(result):
                raise Unrecordable(f"takes apart what {frame.path!r} returns")
            with torch._C.DisableTorchFunction():
                node = self.writer.call(calls.expect_like, node, likeness(result), f"what {frame.path!r} returned")
            return self.writer.bound(result, Origin(node))
        except Unrecordable as failure:
            self.give_up(str(failure))
            return result

    # State.

    def _state(self) -> tuple[Snapshot, Any]:
        with torch._C.DisableTorchFunction():
            return Snapshot(self._paths, also=self._also), rng_state()[1:]

    def _is_kept(self, value: Any) -> bool:
        return self.state.holds(dictionary_of(value))

    def _change(self) -> str | None:
        """What running the forwards has changed beside tensors, if anything."""
        with torch._C.DisableTorchFunction():
            if changed := self._before[0].changed():
                return f"changes {changed}"
            return "draws random numbers that a graph would freeze" if rng_state()[1:] != self._before[1] else None

    def _check_state(self) -> None:
        if self._watches and self.writer.writes and (change := self._change()):
            self.give_up(change)

    def _suspect(self, module: nn.Module) -> None:
        """A module that runs as it is may see what the forward around it has changed, and changes back later."""
        with torch._C.DisableTorchFunction():
            seen = Snapshot([module], other_modules=True)
            self._is_suspicious |= self._before[0].changed(seen) is not None
