"""Asking, in compiled code, what only Python can answer: a constant there, with a guard that asks again."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch


def ask(question: Callable[..., Any], heeds: Callable[..., bool], subject: Any, *constants: Any) -> Any:
    """What `question(subject, *constants)` returns, also where Dynamo traces the call: it asks while it traces, and its
    code asks again before each call, and is compiled anew where another answer comes.

    What traced code writes is not there until that code runs. Where it wrote what the question may be about, Dynamo
    breaks its graph, and asks when it was written.

    Args:
        question: a function of a module's, whose answers can be compared.
        heeds: (subject, a thing, the names of attributes of it) → whether a write into them may change the answer.
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

    question, heeds, constants = (variable(name).as_python_constant() for name in ("question", "heeds", "constants"))
    subject = variable("subject")
    answer = question(subject.value, *constants)
    tracer = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    for thing, names in _written(tracer.output.side_effects):
        if heeds(subject.value, thing, names):
            what = f"{type(thing).__name__}.{' .'.join(names)}" if names else type(thing).__name__
            context.graph_break(
                f"fxreg: a {what} was written in this function before the emitted module is called, which has to see it"
            )
    # A value that was set here, and read by what is traced, would be guarded itself.
    tracer.symbolic_locals["answer"] = ConstantVariable.create(answer)
    if subject.source is not None:
        install_guard(subject.source.make_guard(_asking_again(question, constants, answer)))


def _written(effects: Any) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """What was there before, and traced code has written into; and the names of attributes, where it is these."""
    from torch._dynamo.variables.base import AttributeMutationExisting, ValueMutationExisting

    things = {id(one): one for one in effects.keepalive}
    for identity, variable in effects.id_to_variable.items():
        kind = variable.mutation_type
        if isinstance(kind, AttributeMutationExisting | ValueMutationExisting) and effects.is_modified(variable):
            yield things.get(identity), tuple(effects.store_attr_mutations.get(variable, ()))


@functools.lru_cache
def _asking_again(question: Callable[..., Any], constants: tuple[Any, ...], answer: Any) -> Callable[..., None]:
    """What makes the guard: one object for one question and answer, for Dynamo to see that it has it already."""
    return functools.partial(_ask_again, question=question, constants=constants, answer=answer)


def _ask_again(builder: Any, guard: Any, *, question: Any, constants: tuple[Any, ...], answer: Any) -> None:
    builder.add_python_lambda_leaf_guard_to_root(
        [f"___fxreg_answers_so({builder.arg_ref(guard)})"],
        [f"fxreg: {question.__name__} of {guard.name} is {answer!r}"],
        {"___fxreg_answers_so": lambda subject: question(subject, *constants) == answer},
    )
