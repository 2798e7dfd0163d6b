"""emit: what was lowered → the same, once it was compared with the model; without its recording where that is wrong."""

from torch import nn
from torch.export import ExportedProgram

from .capture import Examples, run_examples
from .lowering import lower
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
    verify(last, model, example_inputs)
    if last is not gm:
        try:
            with borrowed(state.model):
                run_examples(state.model, example_inputs)  # what a first call sets
                verify(gm, model, example_inputs)
        except Exception as error:  # the model did more than was recorded
            plain = state.captured.chain[-1].instead(str(error))
            gm = lower(state.model, plain, state.provenance.plan, state.provenance.emit)
    mark_verified(state_of(gm))
    return gm
