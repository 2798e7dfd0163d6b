"""What Inductor makes of the graph: gradients of penalties are made where they are needed, not all at once."""

import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import fresh_cache, run_and_get_code

import fxreg

WIDTH = 64


def kernels(rule: fxreg.Rule, emit: str) -> list[list[str]]:
    """The arguments of all calls of the backward pass that write to memory."""
    model = nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(WIDTH, WIDTH), nn.Tanh())])
    gm = torch.compile(fxreg.transform(model, rule, emit=emit), fullgraph=True)

    def step() -> None:
        output = gm(torch.randn(3, WIDTH))
        (output.sum() if emit == "backward" else output[0].sum() + output[1]).backward()

    with fresh_cache():
        _, (_, backward) = run_and_get_code(step)
    weights = set(re.findall(rf"assert_size_stride\((\w+), \({WIDTH}, {WIDTH}\)", backward))
    assert len(weights) == 4, "the first weight, too, is needed for its own penalty"
    calls = re.findall(r"^ {8}(?:cpp_fused|extern_kernels)\w*[.\w]*\((.*)\)$", backward, re.MULTILINE)
    return [sorted(weights.intersection(re.findall(r"\w+", call))) for call in calls]


L1 = fxreg.l1(1e-3)
CASES = [
    (effect, via, "backward")
    for effect in (L1, fxreg.l2(1e-3), fxreg.smooth_l1(1e-3))
    for via in ("penalty", "gradient")
]


@pytest.mark.slow
@pytest.mark.parametrize(("effect", "via", "emit"), [*CASES, (L1, "penalty", "output")])
def test_no_kernel_waits_for_several_weights(effect: object, via: str, emit: str) -> None:
    read = kernels(fxreg.Rule(effect, param="weight", via=via), emit)
    assert max(map(len, read)) == 1
    assert sum(map(len, read)) == 7, "each weight for its penalty, and all but the first for its input's gradient"
