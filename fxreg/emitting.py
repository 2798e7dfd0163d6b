"""emit: what was lowered → the same, once it was compared with the model; without its recording where that is wrong."""

from torch import nn
from torch.export import ExportedProgram

from .capture import Examples, run_examples
from .captured import WAYS, Captured
from .interception import as_if_compiled
from .lowering import lower, refuses
from .module import RegularizedModule, mark_verified, state_of
from .snapshots import borrowed
from .verifying import verify


def verified(gm: RegularizedModule, model: nn.Module | ExportedProgram, example_inputs: Examples) -> RegularizedModule:
    """An emitted module that was compared with the model it came from, first without and then with its recordings.

    Raises:
        VerifyError: it differs without them.
    """
    state = state_of(gm)
    *_, last = gm, *state.others
    if not refuses(last):
        verify(last, model, example_inputs)
    if last is not gm and (difference := _difference(gm, model, example_inputs)):
        gm = _lowered_again(gm, state.captured.chain[-1].instead(difference))
    if not all(one.holds_in(WAYS) for one in state_of(gm).captured.chain):
        with as_if_compiled():
            difference = _difference(gm, model, example_inputs)
        if difference:
            gm = _lowered_again(gm, state_of(gm).captured.without_compiled())
    mark_verified(state_of(gm))
    return gm


def _difference(gm: RegularizedModule, model: nn.Module | ExportedProgram, example_inputs: Examples) -> str | None:
    """What the model does and its recordings do not, after a first call, which may set something."""
    state = state_of(gm)
    try:
        with borrowed(state.model):
            run_examples(state.model, example_inputs)
            verify(gm, model, example_inputs)
    except Exception as error:
        return str(error) or type(error).__name__
    return None


def _lowered_again(gm: RegularizedModule, captured: Captured) -> RegularizedModule:
    state = state_of(gm)
    return lower(state.model, captured, state.provenance.plan, state.provenance.emit)
