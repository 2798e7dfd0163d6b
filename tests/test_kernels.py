"""What Inductor makes of the graph: gradients of penalties are made where they are needed, not all at once."""

import re

import pytest
import torch
from torch import nn

import fxreg

from .generated import code_of

WIDTH = 64


def calls_of(rules: list[fxreg.Rule], emit: str = "backward") -> tuple[str, list[str]]:
    """The code of the backward pass, and all its calls that write to memory."""
    model = nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(WIDTH, WIDTH), nn.Tanh())])
    gm = torch.compile(fxreg.transform(model, rules, emit=emit), fullgraph=True)

    def step() -> None:
        output = gm(torch.randn(3, WIDTH))
        (output.sum() if emit == "backward" else output[0].sum() + output[1]).backward()

    _, backward = code_of(step)
    return backward, re.findall(r"^ {8}((?:cpp_fused|extern_kernels)\w*[.\w]*\(.*\))$", backward, re.MULTILINE)


def kernels(rule: fxreg.Rule, emit: str) -> list[list[str]]:
    """The weights that each call reads."""
    backward, calls = calls_of([rule], emit)
    weights = set(re.findall(rf"assert_size_stride\((\w+), \({WIDTH}, {WIDTH}\)", backward))
    assert len(weights) == 4, "the first weight, too, is needed for its own penalty"
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


@pytest.mark.slow
@pytest.mark.parametrize("via", ["penalty", "gradient"])
def test_a_penalty_takes_no_kernel_and_no_product_of_its_own(via: str) -> None:
    _, plain = calls_of([])
    _, calls = calls_of([fxreg.Rule(L1, param="weight", via=via)])
    assert not any("addmm" in call for call in calls), "it would be written to memory, and read back"
    products, kernels = ([sum(kind in call for call in some) for some in (plain, calls)] for kind in ("mm(", "cpp_"))
    assert products[0] == products[1]
    assert kernels[1] <= kernels[0] + 1, "behind the last product there is no other work"
