"""Watching what a forward executes, for what leaves no other trace: instructions, calls of C functions, handlers."""

import builtins
import copy
import dis
import functools
import gc
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .scanning import context_name, is_library
from .sizes import SYMBOLIC

_INSTRUCTIONS = {
    "STORE_GLOBAL": "writes the global variable",
    "DELETE_GLOBAL": "deletes the global variable",
}
_TYPE, _IDENTITY, _UNKNOWN = "asks for a type", "compares identities", object()
_DICTIONARY = "looks into an object's dictionary"
_SIZED = {"shape", "size", "numel", "nelement"}
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
    "Thread": "starts a thread",
    "ThreadPoolExecutor": "starts a thread",
}
_COMPILING = {
    function.__code__
    for function in (
        torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling, torch.compiler.is_exporting,
        torch.jit.is_tracing,  # type: ignore[attr-defined]
    )
}  # fmt: skip
_QUESTIONS = {
    id: "asks for an identity",
    hash: "hashes a value",
    torch.is_grad_enabled: "reads the grad mode",
    torch.is_inference_mode_enabled: "reads the inference mode",
    torch.is_autocast_enabled: "reads autocast",
    torch._C._is_any_autocast_enabled: "reads autocast",
    torch.get_autocast_dtype: "reads autocast",
    torch.get_default_dtype: "reads the default dtype",
    torch.are_deterministic_algorithms_enabled: "reads a global mode",
    time.time: "reads the clock",
    time.perf_counter: "reads the clock",
    time.monotonic: "reads the clock",
}


_HASH = torch.Tensor.__hash__.__code__
_COPIES = copy._reconstruct.__code__  # type: ignore[attr-defined]  # what both kinds of copies end in
_DISPATCH = functools.singledispatch(lambda value: value).__code__  # type: ignore[attr-defined]


@contextmanager
def watched(recorder: Any) -> Iterator[None]:
    """Tell the recorder of everything the user's code executes that a graph cannot hold, before it happens."""

    def enter(frame: types.FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_name == "__init__" and recorder.thread and frame.f_code.co_argcount:
            recorder.note_made(frame.f_locals[frame.f_code.co_varnames[0]])
        if not recorder.thread or _is_foreign(frame.f_globals.get("__name__", "")):
            return None
        frame.f_trace_lines = False
        frame.f_trace_opcodes = bool(_flagged(frame.f_code))
        return step

    def step(frame: types.FrameType, event: str, argument: Any) -> Any:
        if event == "opcode" and recorder.thread:
            reason = _flagged(frame.f_code).get(frame.f_lasti)
            if reason is not None and _matters(reason, frame, recorder):
                recorder.give_up(f"{frame.f_code.co_qualname} {reason}")
        elif event == "exception" and recorder.thread and _is_ours(argument[1]):
            recorder.give_up(f"{frame.f_code.co_qualname} meets a {argument[0].__name__}")
        return step

    def call(frame: types.FrameType, event: str, argument: Any) -> None:
        if event == "call" and recorder.thread:
            if frame.f_code in _COMPILING:
                recorder.asked.compiling = True
            elif frame.f_code is _DISPATCH and any(type(one) in SYMBOLIC for one in frame.f_locals["args"]):
                recorder.give_up("dispatches by the type of a size")
            elif frame.f_code is _HASH and not recorder.writer.is_kept_tensor(frame.f_locals["self"]):
                recorder.give_up("hashes a tensor")
        elif event == "return" and recorder.thread and frame.f_code is _COPIES:
            recorder.note_made(argument, is_new=True)
        elif event == "c_call" and recorder.thread and not _is_foreign(frame.f_globals.get("__name__", "")):
            reason = _asked(argument)
            if reason is not None:
                recorder.give_up(f"{frame.f_code.co_qualname} {reason}")

    def is_instance(value: Any, kinds: Any) -> bool:
        if type(value) in SYMBOLIC and not _is_foreign(sys._getframe(1).f_globals.get("__name__", "")):
            return original(value.node.value, kinds) or original(value, kinds)  # sizes are numbers
        return original(value, kinds)

    before, original = (sys.gettrace(), sys.getprofile()), isinstance
    collects = gc.isenabled()
    gc.disable()  # finalizers and callbacks are none of the forward's doing
    sys.settrace(enter)
    sys.setprofile(call)
    builtins.isinstance = is_instance
    try:
        yield
    finally:
        builtins.isinstance = original
        sys.settrace(before[0])
        sys.setprofile(before[1])
        if collects:
            gc.enable()


def inside_handler() -> str | None:
    """The name of a function of the user's, among the running ones, that would catch an error now; if any would."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        ranges = _catching(frame.f_code)
        if ranges and any(start <= frame.f_lasti < end for start, end in ranges):
            name = frame.f_globals.get("__name__", "")
            if not _is_foreign(name):
                return frame.f_code.co_qualname
        if frame.f_code.co_name == "record" and frame.f_globals.get("__name__") == "fxreg.recording":
            return None
        frame = frame.f_back
    return None


@functools.lru_cache(maxsize=4096)
def _is_foreign(module: str) -> bool:
    return is_library(module) or module.partition(".")[0] in sys.stdlib_module_names


def _asked(function: Any) -> str | None:
    try:
        return _QUESTIONS.get(function)
    except TypeError:  # a method of something without a hash
        return None


def _is_ours(error: BaseException) -> bool:
    """Whether an exception may be due to a symbolic size where Python wants a plain number."""
    return isinstance(error, TypeError) or "Sym" in str(error)


@functools.lru_cache(maxsize=4096)
def _flagged(code: types.CodeType) -> dict[int, str]:
    """The offsets of the instructions that a graph cannot hold, and why."""
    found = {}
    instructions = [*dis.get_instructions(code)]
    for position, instruction in enumerate(instructions):
        name, argument = instruction.opname, instruction.argval
        if name in ("LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD", "LOAD_NAME") and argument in _MENTIONS:
            if (
                argument != "type"
                or name in ("LOAD_GLOBAL", "LOAD_NAME")
                or _is_of_builtins(instructions[position - 1])
            ):
                found[instruction.offset] = _MENTIONS[argument]
        elif name in _INSTRUCTIONS:
            found[instruction.offset] = f"{_INSTRUCTIONS[name]} {argument!r}"
        elif name == "STORE_DEREF" and argument in code.co_freevars:
            found[instruction.offset] = f"writes the variable {argument!r} of an enclosing function"
        elif name == "MATCH_CLASS":
            found[instruction.offset] = _TYPE
        elif name == "IS_OP" and instructions[position - 1].opname != "LOAD_CONST":
            found[instruction.offset] = _IDENTITY
        elif name in ("STORE_ATTR", "DELETE_ATTR") and instructions[position - 1].opname not in (
            "LOAD_ATTR",
            "BINARY_SUBSCR",
        ):
            found[instruction.offset] = f"writes the attribute {argument!r} of something that is not its own"
        elif name in ("BEFORE_WITH", "BEFORE_ASYNC_WITH"):
            found[instruction.offset] = f"enters {context_name(instructions[:position])}"
    return found


def _matters(reason: str, frame: types.FrameType, recorder: Any) -> bool:
    """Whether what is asked may be asked of something that a recording replaces: sizes, aliases, veiled objects."""
    if reason == _TYPE:
        return any(type(value) in SYMBOLIC for value in frame.f_locals.values()) or _asks_type_of_size(frame.f_code)
    if reason == _DICTIONARY:  # a flag read or written past its property
        return "training" in (*frame.f_code.co_names, *frame.f_code.co_consts)
    if reason == _IDENTITY:
        value = _operand(frame)
        return value is _UNKNOWN or recorder.writer.veils or type(value) in SYMBOLIC or isinstance(value, torch.Tensor)
    if (written := _written(frame.f_code).get(frame.f_lasti)) is not None:
        return not recorder.watches_over(frame.f_locals.get(written))
    return True


@functools.lru_cache(maxsize=4096)
def _asks_type_of_size(code: types.CodeType) -> bool:
    """Whether a line of the code has both a type and a size in it."""
    lines: dict[int | None, set[str]] = {}
    for instruction in dis.get_instructions(code):
        line = instruction.positions.lineno if instruction.positions else None
        lines.setdefault(line, set()).add(str(instruction.argval))
    return any("type" in names and not _SIZED.isdisjoint(names) for names in lines.values())


def _operand(frame: types.FrameType) -> Any:
    """What was loaded last, if that can be told."""
    before = None
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset == frame.f_lasti:
            break
        before = instruction
    if before is None or not before.opname.startswith("LOAD_") or before.opname in ("LOAD_ATTR", "LOAD_METHOD"):
        return _UNKNOWN
    name = before.argval
    spaces = (frame.f_globals, vars(builtins)) if before.opname == "LOAD_GLOBAL" else (frame.f_locals,)
    return next((space[name] for space in spaces if name in space), _UNKNOWN)


def _is_of_builtins(before: dis.Instruction) -> bool:
    return before.argval == "builtins" or not before.opname.startswith("LOAD_")


@functools.lru_cache(maxsize=4096)
def _written(code: types.CodeType) -> dict[int, str]:
    """The offsets where an attribute of a variable is written, `x.a = 1` or `x.a += 1`, and the variable's name."""
    found = {}
    instructions = [*dis.get_instructions(code)]
    for position, instruction in enumerate(instructions):
        if instruction.opname not in ("STORE_ATTR", "DELETE_ATTR"):
            continue
        owner = instructions[position - 1]
        if owner.opname == "SWAP":  # x, a copy of it, its a, what is added, and x on top again
            read = position - 1
            while read > 2 and (instructions[read].opname, instructions[read].argval) != (
                "LOAD_ATTR",
                instruction.argval,
            ):
                read -= 1
            owner = instructions[read - 2] if instructions[read - 1].opname == "COPY" else owner
        if owner.opname in ("LOAD_FAST", "LOAD_DEREF"):
            found[instruction.offset] = str(owner.argval)
    return found


@functools.lru_cache(maxsize=4096)
def _catching(code: types.CodeType) -> tuple[tuple[int, int], ...]:
    """The offsets from which an error goes to an `except`; a `finally` passes it on."""
    if not code.co_exceptiontable:
        return ()
    instructions = {one.offset: one.opname for one in dis.get_instructions(code)}
    found = []
    for entry in dis._parse_exception_table(code):  # type: ignore[attr-defined]
        handler = [name for offset, name in instructions.items() if offset >= entry.target]
        if handler[:1] == ["PUSH_EXC_INFO"]:
            ends = next((i for i, name in enumerate(handler) if name in ("RERAISE", "POP_EXCEPT")), None)
            if ends is not None and handler[ends] == "POP_EXCEPT":
                found.append((entry.start, entry.end))
    return tuple(found)
