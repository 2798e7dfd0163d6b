"""Asking, in compiled code, what only Python can answer: a constant there, with a guard that asks again."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def ask(question: Callable[..., Any], subject: Any, *constants: Any) -> Any:
    """What `question(subject, *constants)` returns, as now, also where Dynamo traces the call: it asks while it traces,
    and its code asks again before each call, and is compiled anew where another answer comes.

    Args:
        question: a function of a module's, whose answers can be compared.
        subject: what Dynamo can find again: something that came to the traced code from outside.
        constants: plain values.
    """
    if not torch.compiler.is_dynamo_compiling():
        return question(subject, *constants)
    from torch._dynamo.comptime import comptime  # only then: else nobody needs it

    answer = None
    comptime(_answer)
    return answer


def _answer(context: Any) -> None:
    """Ask while Dynamo traces `ask`, whose local variables these are, and see that its code asks again."""
    from torch._dynamo.guards import install_guard  # only while something is compiled, which imports it anyway
    from torch._dynamo.variables import ConstantVariable

    def variable(name: str) -> Any:
        found = context.get_local(name)._i_will_not_complain_if_bc_breaks_VariableTracker()
        return getattr(found, "realize", lambda: found)()

    question, constants = variable("question").as_python_constant(), variable("constants").as_python_constant()
    subject = variable("subject")
    answer = question(subject.value, *constants)
    # A value that was set here, and read by what is traced, would be guarded itself.
    tracer = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    tracer.symbolic_locals["answer"] = ConstantVariable.create(answer)
    if subject.source is not None:
        again = functools.partial(_ask_again, question=question, constants=constants, answer=answer)
        install_guard(subject.source.make_guard(again))


def _ask_again(builder: Any, guard: Any, *, question: Any, constants: tuple[Any, ...], answer: Any) -> None:
    builder.add_python_lambda_leaf_guard_to_root(
        [f"___fxreg_answers_so({builder.arg_ref(guard)})"],
        [f"fxreg: {question.__name__} of {guard.name} is {answer!r}"],
        {"___fxreg_answers_so": lambda subject: question(subject, *constants) == answer},
    )
