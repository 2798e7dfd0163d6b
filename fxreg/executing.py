"""Watching which instructions a forward executes, for what leaves no other trace."""

import dis
import functools
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .scanning import _context_name

_QUESTIONS = {
    "is_grad_enabled": "reads the grad mode",
    "is_inference_mode_enabled": "reads the inference mode",
    "is_autocast_enabled": "reads autocast",
    "is_any_autocast_enabled": "reads autocast",
    "manual_seed": "seeds a random generator",
    "fork_rng": "forks a random generator",
    "Thread": "starts a thread",
    "ThreadPoolExecutor": "starts a thread",
}


@contextmanager
def watched(recorder: Any) -> Iterator[None]:
    """Tell the recorder of every instruction of the user's code that a graph cannot hold, before it runs."""

    def enter(frame: types.FrameType, event: str, argument: Any) -> Any:
        name = str(frame.f_globals.get("__name__", ""))
        if not recorder.thread or (top := name.partition(".")[0]) in _LIBRARIES_ or top in sys.stdlib_module_names:
            return None
        frame.f_trace_lines = False
        frame.f_trace_opcodes = bool(_flagged(frame.f_code))
        return step

    def step(frame: types.FrameType, event: str, argument: Any) -> Any:
        if event == "opcode" and recorder.thread:
            reason = _flagged(frame.f_code).get(frame.f_lasti)
            if reason is not None:
                recorder.give_up(f"{frame.f_code.co_qualname} {reason}")
        elif event == "exception" and recorder.thread and _is_ours(argument[1]):
            recorder.give_up(f"{frame.f_code.co_qualname} meets a {argument[0].__name__}")
        return step

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


from .scanning import _LIBRARIES as _LIBRARIES_


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
        if name in ("LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD", "LOAD_NAME") and argument in _QUESTIONS:
            found[instruction.offset] = _QUESTIONS[argument]
        elif name in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            found[instruction.offset] = f"writes the global variable {argument!r}"
        elif name == "STORE_DEREF" and argument in code.co_freevars:
            found[instruction.offset] = f"writes the variable {argument!r} of an enclosing function"
        elif name in ("BEFORE_WITH", "BEFORE_ASYNC_WITH"):
            found[instruction.offset] = f"enters {_context_name(instructions[:position])}"
    return found
