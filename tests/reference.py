"""The hand-written loss: what every emitted module is compared with. It uses no formula of fxreg's."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fxreg

Gradients = dict[str, Tensor | None]


@dataclass(frozen=True)
class Term:
    """A rule, and the penalty or the transform it stands for, written by hand."""

    rule: fxreg.Rule
    acts_on: Callable[[str], bool]
    penalty: Callable[[Tensor], Tensor] | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    joint: Callable[[list[Tensor]], list[Tensor]] | None = None
    via: str = "penalty"


def is_weight(name: str) -> bool:
    return name.rpartition(".")[2].startswith(("weight", "in_proj_weight"))


def weights() -> dict[str, Any]:
    """The selectors of a rule that agree with `is_weight`."""
    return {"param": "re:(in_proj_)?weight.*"}


def everything(name: str) -> bool:
    return True


def penalty_terms(via: str) -> list[Term]:
    """l1 on weights and l2 on everything, by the given lowering, with strengths that show."""
    return [
        Term(
            fxreg.Rule(fxreg.l1(0.013), **weights(), via=via),
            is_weight,
            penalty=lambda w: 0.013 * w.abs().sum(),
            via=via,
        ),
        Term(fxreg.Rule(fxreg.l2(0.07), via=via), everything, penalty=lambda w: 0.07 * (w * w).sum(), via=via),
    ]


def transform_terms() -> list[Term]:
    """Two transforms that do not commute, on everything."""
    return [
        Term(
            fxreg.Rule(fxreg.clip_norm(0.05)),
            everything,
            transform=lambda g: g * torch.clamp(0.05 / (g.norm() + 1e-6), max=1.0),
        ),
        Term(fxreg.Rule(fxreg.clip_value(0.02)), everything, transform=lambda g: g.clamp(-0.02, 0.02)),
    ]


def objective(output: Any) -> Tensor:
    """A loss that looks at all of an output, without symmetry."""
    total = torch.zeros(())
    for tensor in output if isinstance(output, tuple) else (output,):
        index = torch.arange(1, tensor.numel() + 1, device=tensor.device, dtype=torch.float64)
        total = total + (tensor.float().reshape(-1) * torch.cos(index).float()).sum() / 7 + tensor.square().mean()
    return total


def by_hand(model: nn.Module, loss: Tensor, terms: list[Term], factor: float = 1.0) -> Gradients:
    """Gradients of factor·(loss + Σ penalties), with transforms of the loss's part, by autograd on the model."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(factor * loss, list(parameters.values()), allow_unused=True)
    gradients: Gradients = dict(zip(parameters, found, strict=True))
    for term in terms:
        if term.transform:
            gradients = {
                name: g if g is None or not term.acts_on(name) else factor * term.transform(g / factor)
                for name, g in gradients.items()
            }
        if term.joint:
            seen = {name: g / factor for name, g in gradients.items() if g is not None and term.acts_on(name)}
            new = zip(seen, term.joint([*seen.values()]), strict=True)
            gradients.update({name: factor * g for name, g in new})
    for term in terms:
        if term.penalty is None:
            continue
        for name, parameter in parameters.items():
            reached = gradients[name] is not None
            if term.acts_on(name) and (reached or term.via == "penalty"):
                (added,) = torch.autograd.grad(factor * term.penalty(parameter), parameter)
                gradients[name] = added if gradients[name] is None else gradients[name] + added
    return gradients


def assert_same(actual: Gradients, expected: Gradients, tolerance: float) -> None:
    """Relative error in the 2-norm, parameter by parameter."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        got = actual[name]
        if wanted is None:
            assert got is None or not got.any(), f"{name} has a gradient that nothing gives it"
            continue
        assert got is not None, f"{name} has no gradient"
        error = (got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-12)
        assert error < tolerance, f"{name}: relative error {error:.3g}"


def twin(model: nn.Module) -> nn.Module:
    """The original, in a copy that nothing touches."""
    return copy.deepcopy(model)
