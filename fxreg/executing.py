"""Watching what a forward executes, for what leaves no other trace: instructions, calls of C functions, handlers."""

import builtins
import copy
import dis
import functools
import gc
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .ambient import ambient, answers, asked, is_answer
from .mentions import may_mention, mentioned
from .packages import is_foreign, is_own
from .scanning import LOOKS_PAST, PAST, context_name, looks_past
from .sizes import SYMBOLIC
from .stacks import UNKNOWN, Stack, instructions_of

_INSTRUCTIONS = {
    "STORE_GLOBAL": "writes the global variable",
    "DELETE_GLOBAL": "deletes the global variable",
}
_TYPE, _IDENTITY = "asks for a type", "compares identities"
_DICTIONARY, _WRITES = "looks into an object's dictionary", "writes the attribute"
_BY_NAME = "writes an attribute by its name"
_MENTIONS = {
    "manual_seed": "seeds a random generator",
    "fork_rng": "forks a random generator",
    "get_rng_state": "saves a random state",
    "set_rng_state": "sets a random state",
    "default_generator": "uses a random generator",
    "vars": _DICTIONARY,
    "__dict__": _DICTIONARY,
    "type": _TYPE,
    "__class__": _TYPE,
    "import_module": "imports a module by its name",
    "__import__": "imports a module by its name",
    "setattr": _BY_NAME,
    "delattr": _BY_NAME,
    "Thread": "starts a thread",
    "ThreadPoolExecutor": "starts a thread",
    "are_deterministic_algorithms_enabled": "reads a global mode",
    "get_float32_matmul_precision": "reads a global mode",
    "get_num_threads": "reads a global mode",
    "_getframe": "looks at who calls it",
    "currentframe": "looks at who calls it",
    **LOOKS_PAST,
}
_COMPILING = {torch.compiler.is_compiling.__code__, torch.compiler.is_dynamo_compiling.__code__}
_TRACING = {torch.compiler.is_exporting.__code__, torch.jit.is_tracing.__code__}  # type: ignore[attr-defined]
_QUESTIONS = {
    id: "asks for an identity",
    print: "prints",
    hash: "hashes a value",
    globals: "looks into the globals",
    torch.is_grad_enabled: "reads the grad mode",
    torch.is_inference_mode_enabled: "reads the inference mode",
    torch.is_autocast_enabled: "reads autocast",
    torch._C._is_any_autocast_enabled: "reads autocast",
    torch.get_autocast_dtype: "reads autocast",
    torch.get_default_dtype: "reads the default dtype",
}

_CHANGING = {
    id(vars(nn.Module)[name].__code__): f"calls {name} of a module"
    for name in (
        "__delattr__", "register_buffer", "register_parameter", "add_module", "register_forward_hook",
        "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook", "_apply",
        "__setstate__",
    )
}  # fmt: skip
"""What changes a module, by the identity of its code: replacing methods of nn.Module takes longer than most traces."""
_FOREIGN: dict[int, types.CodeType] = {}
"""Code of libraries', by identity; kept, so that nothing else gets it."""
_HASH = torch.Tensor.__hash__.__code__
_COPIES = copy._reconstruct.__code__  # type: ignore[attr-defined]  # what both kinds of copies end in
_DISPATCH = functools.singledispatch(lambda value: value).__code__  # type: ignore[attr-defined]


@contextmanager
def watched(recorder: Any) -> Iterator[None]:
    """Tell the recorder of everything the user's code executes that a graph cannot hold, before it happens."""

    def enter(frame: types.FrameType, event: str, argument: Any) -> Any:
        if recorder.is_busy:
            return None
        if frame.f_code.co_name == "__init__" and recorder.thread and frame.f_code.co_argcount:
            recorder.note_made(frame.f_locals[frame.f_code.co_varnames[0]])
        if id(frame.f_code) in _CHANGING and recorder.thread:
            recorder.note_change(frame.f_locals["self"], _CHANGING[id(frame.f_code)])
        if not recorder.thread or is_foreign(frame.f_globals.get("__name__", "")):
            return None
        if asks := ambient(frame.f_code, frame.f_globals):
            recorder.give_up(f"{frame.f_code.co_qualname} {asks}")
        recorder.note_entered(frame.f_code, frame.f_globals)
        frame.f_trace_lines = False
        frame.f_trace_opcodes = bool(_flagged(frame.f_code)) or may_mention(frame.f_code, recorder.ledger.watched)
        return step

    def step(frame: types.FrameType, event: str, argument: Any) -> Any:
        if event == "opcode" and recorder.thread:
            reason = _flagged(frame.f_code).get(frame.f_lasti)
            if reason is not None and _matters(reason, frame, recorder):
                recorder.give_up(f"{frame.f_code.co_qualname} {reason}")
            for told in mentioned(frame, recorder.ledger.watched):
                recorder.note_mentioned(*told)
        elif event == "exception" and recorder.thread and isinstance(argument[1], AttributeError):
            recorder.note_missed(argument[1].name)
        elif event == "exception" and recorder.thread and _is_ours(argument[1]):
            recorder.give_up(f"{frame.f_code.co_qualname} meets a {argument[0].__name__}")
        return step

    def call(frame: types.FrameType, event: str, argument: Any) -> None:
        if recorder.is_busy:
            return
        if event == "call" and recorder.thread:
            if frame.f_code in _COMPILING or frame.f_code in _TRACING:
                recorder.note_asked_way(frame.f_code in _COMPILING)
            elif reason := _refused(frame, recorder):
                recorder.give_up(reason)
        elif event == "return" and recorder.thread and frame.f_code is _COPIES:
            if isinstance(frame.f_locals["x"], nn.Module):
                recorder.give_up(f"copies a {type(argument).__name__}")
            recorder.note_made(argument, is_new=True)
        elif event == "c_call" and recorder.thread and (reason := _asked(argument, frame.f_globals.get("__name__"))):
            recorder.give_up(f"{frame.f_code.co_qualname} {reason}")

    before, originals = (sys.gettrace(), sys.getprofile()), (isinstance, getattr, hasattr)
    with _no_collection():
        sys.settrace(enter)
        sys.setprofile(call)
        builtins.isinstance, builtins.getattr, builtins.hasattr = (
            _asking(isinstance), _getting(getattr, recorder), _getting(hasattr, recorder)
        )  # fmt: skip
        try:
            yield
        finally:
            builtins.isinstance, builtins.getattr, builtins.hasattr = originals
            sys.settrace(before[0])
            sys.setprofile(before[1])


@contextmanager
def _no_collection() -> Iterator[None]:
    """Finalizers and callbacks are none of the forward's doing."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def unheard(method: Callable[..., None]) -> Callable[..., None]:
    """A method of a recorder that works for it alone: nobody is told what runs in it, since that takes most of the
    time."""

    @functools.wraps(method)
    def run(recorder: Any, *args: Any) -> None:
        recorder.is_busy = True
        try:
            method(recorder, *args)
        finally:
            recorder.is_busy = False

    return run


def _asking(original: Callable[[Any, Any], bool]) -> Any:
    """An `isinstance` to which sizes are numbers."""

    def is_instance(value: Any, kinds: Any) -> bool:
        if type(value) in SYMBOLIC and not is_foreign(sys._getframe(1).f_globals.get("__name__", "")):
            return original(value.node.value, kinds) or original(value, kinds)
        return original(value, kinds)

    return is_instance


def _getting(original: Callable[..., Any], recorder: Any) -> Any:
    """A `getattr` or `hasattr` that tells where a tensor is asked for what others may have, and it has not."""
    has, is_instance = hasattr, isinstance

    def get(value: Any, name: Any, *default: Any) -> Any:
        is_missing = is_instance(value, torch.Tensor) and is_instance(name, str) and not has(torch.Tensor, name)
        is_heard = is_missing and recorder.thread and not recorder.is_busy
        if is_heard and is_own(sys._getframe(1).f_globals.get("__name__")):
            recorder.give_up(f"asks for attribute {name!r}, which a tensor does not have")
        return original(value, name, *default)

    return get


class entering:  # noqa: N801  a context manager, of which there are thousands
    """Tell of every function of the user's that runs, and of those that change a module or answer for the process."""

    def __init__(
        self,
        note: Callable[[types.CodeType, dict[str, Any]], None],
        note_change: Callable[[nn.Module, str], None],
        give_up: Callable[[str], None],
    ) -> None:
        foreign = _FOREIGN

        def enter(frame: types.FrameType, event: str, argument: Any) -> None:
            code = frame.f_code
            if id(code) in foreign:  # nearly all are, and hashing the code itself would take as long as tracing
                return
            if id(code) in _CHANGING:
                note_change(frame.f_locals["self"], _CHANGING[id(code)])
            elif is_foreign(frame.f_globals.get("__name__", "")):
                if reason := asked(frame):
                    give_up(reason)
                if not answers(frame):
                    foreign[id(code)] = code
            else:
                note(code, frame.f_globals)

        self.enter = enter

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self.enter)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)


class unwatched:  # noqa: N801  a context manager, of which there are thousands
    """Hear of nothing for a while in which only libraries' code runs: being told takes time."""

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(None)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)


def inside_handler() -> str | None:
    """The name of a function of the user's, among the running ones, that would catch an error now; if any would."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        ranges = _catching(frame.f_code)
        if ranges and any(start <= frame.f_lasti < end for start, end in ranges):
            name = frame.f_globals.get("__name__", "")
            if not is_foreign(name):
                return frame.f_code.co_qualname
        if frame.f_code.co_name == "record" and frame.f_globals.get("__name__") == "fxreg.recording":
            return None
        frame = frame.f_back
    return None


def _refused(frame: types.FrameType, recorder: Any) -> str | None:
    """Why a call that begins is none for a graph."""
    if frame.f_code is _DISPATCH and any(type(one) in SYMBOLIC for one in frame.f_locals["args"]):
        return "dispatches by the type of a size"
    if frame.f_code is _HASH and not recorder.writer.is_kept_tensor(frame.f_locals["self"]):
        return "hashes a tensor"
    return asked(frame)


def _asked(function: Any, asker: str | None) -> str | None:
    """Why a call of a C function is none for a graph, if the user's code makes it."""
    if is_foreign(asker):
        return None
    try:
        known = _QUESTIONS.get(function)
    except TypeError:  # a method of something without a hash
        known = None
    return known or (f"asks {function.__name__} of the process" if is_answer(function, asker) else None)


def _is_ours(error: BaseException) -> bool:
    """Whether an exception may be due to a symbolic size where Python wants a plain number."""
    return isinstance(error, TypeError) or "Sym" in str(error)


@functools.lru_cache(maxsize=4096)
def _flagged(code: types.CodeType) -> dict[int, str]:
    """The offsets of the instructions that a graph cannot hold, and why."""
    found = {}
    instructions = instructions_of(code)
    for position, instruction in enumerate(instructions):
        name, argument = instruction.opname, instruction.argval
        if name in ("LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD", "LOAD_NAME") and argument in _MENTIONS:
            if (
                argument != "type"
                or name in ("LOAD_GLOBAL", "LOAD_NAME")
                or _is_of_builtins(instructions[position - 1])
            ):
                found[instruction.offset] = _MENTIONS[argument]
        elif looks_past(instructions, position):
            found[instruction.offset] = PAST
        elif name == "LOAD_DEREF" and argument == "__class__" and instructions[position + 1].opname == "LOAD_ATTR":
            found[instruction.offset] = "asks for its own class"
        elif name in _INSTRUCTIONS:
            found[instruction.offset] = f"{_INSTRUCTIONS[name]} {argument!r}"
        elif name == "STORE_DEREF" and argument in code.co_freevars:
            found[instruction.offset] = f"writes the variable {argument!r} of an enclosing function"
        elif name == "MATCH_CLASS":
            found[instruction.offset] = "matches a class"
        elif name == "IS_OP" and instructions[position - 1].opname != "LOAD_CONST":
            found[instruction.offset] = _IDENTITY
        elif name in ("STORE_ATTR", "DELETE_ATTR"):
            found[instruction.offset] = f"{_WRITES} {argument!r} of something that is not its own"
        elif name in ("BEFORE_WITH", "BEFORE_ASYNC_WITH"):
            found[instruction.offset] = f"enters {context_name([*instructions[:position]])}"
    return found


def _matters(reason: str, frame: types.FrameType, recorder: Any) -> bool:
    """Whether what is asked may be asked of something that a recording replaces: sizes, aliases, veiled objects."""
    if reason == _DICTIONARY:  # a flag read or written past its property
        return "training" in (*frame.f_code.co_names, *frame.f_code.co_consts)
    if reason == _TYPE:
        value = Stack(frame).typed()
        return value is UNKNOWN or type(value) in SYMBOLIC
    if reason == _IDENTITY:
        value = Stack(frame).top()
        replaced = isinstance(value, torch.Tensor | int | float) or type(value) in SYMBOLIC
        return value is UNKNOWN or replaced or recorder.writer.veils
    if reason == _BY_NAME:
        value = Stack(frame).first()
        return value is UNKNOWN or not recorder.watches_over(value)
    if reason.startswith(_WRITES):
        value = Stack(frame).written()
        return value is UNKNOWN or not recorder.watches_over(value)
    return True


def _is_of_builtins(before: dis.Instruction) -> bool:
    return before.argval == "builtins" or not before.opname.startswith("LOAD_")


@functools.lru_cache(maxsize=4096)
def _catching(code: types.CodeType) -> tuple[tuple[int, int], ...]:
    """The offsets from which an error goes to an `except`; a `finally` passes it on."""
    if not code.co_exceptiontable:
        return ()
    instructions = {one.offset: one.opname for one in instructions_of(code)}
    found = []
    for entry in dis._parse_exception_table(code):  # type: ignore[attr-defined]
        handler = [name for offset, name in instructions.items() if offset >= entry.target]
        if handler[:1] == ["PUSH_EXC_INFO"]:
            ends = next((i for i, name in enumerate(handler) if name in ("RERAISE", "POP_EXCEPT")), None)
            if ends is not None and handler[ends] == "POP_EXCEPT":
                found.append((entry.start, entry.end))
    return tuple(found)
