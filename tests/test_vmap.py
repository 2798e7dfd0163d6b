"""Inside `torch.vmap`, with autograd outside: ensembles, and models that are mapped over their inputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

import fxreg
from fxreg import Rule

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's own

TWO = [Rule(fxreg.l1(0.1), param="weight"), Rule(fxreg.l2(0.2), param="bias")]
ACTIVATIONS = [Rule(fxreg.l2(0.1), layer=nn.Linear, on="output")]
SCALED = [Rule(fxreg.scale(0.5), param="weight")]
RULES = {"penalties": TWO, "activations": ACTIVATIONS, "transform": SCALED}


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(7)).double()


def by_hand(member: nn.Module, rule: str) -> list[Tensor]:
    """The gradients of Σ y² and the rules."""
    heard: list[Tensor] = []
    for layer in member.modules():
        if isinstance(layer, nn.Linear) and rule == "activations":
            layer.register_forward_hook(lambda _, args, output: heard.append(0.1 * output.square().sum()))
    loss = member(X).square().sum() + sum(heard)
    for name, parameter in member.named_parameters():
        if rule == "penalties":
            is_weight = name.endswith("weight")
            loss = loss + (0.1 * parameter.abs().sum() if is_weight else 0.2 * parameter.square().sum())
    found = torch.autograd.grad(loss, [*member.parameters()])
    halved = rule == "transform"
    names = [name for name, _ in member.named_parameters()]
    return [g / 2 if halved and n.endswith("weight") else g for n, g in zip(names, found, strict=True)]


def mapped(gm: nn.Module, emit: str, parameters: dict[str, Tensor]) -> Tensor:
    """Σ y² over all models, and what the rules add to it."""
    found: Any = torch.vmap(lambda one: functional_call(gm, one, (X,)))(parameters)
    return found[0].square().sum() + found[1].sum() if emit == "output" else found.square().sum()


def twice_mapped(gm: nn.Module, emit: str, parameters: dict[str, Tensor]) -> Tensor:
    outer = {name: value[:, None] for name, value in parameters.items()}
    return torch.vmap(lambda inner: mapped(gm, emit, inner))(outer).sum()


Gradients = Callable[[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor]], list[Tensor]]


def outside(loss: Callable[[dict[str, Tensor]], Tensor], parameters: dict[str, Tensor]) -> list[Tensor]:
    return [*torch.autograd.grad(loss(parameters), [*parameters.values()])]


def func_grad(loss: Callable[[dict[str, Tensor]], Tensor], parameters: dict[str, Tensor]) -> list[Tensor]:
    return [*torch.func.grad(loss)({name: value.detach() for name, value in parameters.items()}).values()]


def compiled(loss: Callable[[dict[str, Tensor]], Tensor], parameters: dict[str, Tensor]) -> list[Tensor]:
    torch._dynamo.reset()
    return outside(torch.compile(loss, backend="aot_eager"), parameters)


def check_ensemble(rule: str, emit: Any, gradients: Gradients, calls: Any = mapped) -> None:
    members = [model(seed) for seed in range(3)]
    parameters, _ = stack_module_state(members)
    gm = fxreg.transform(members[0], RULES[rule], emit=emit)
    found = gradients(lambda given: calls(gm, emit, given), parameters)
    wanted = [torch.stack(each) for each in zip(*(by_hand(model(k), rule) for k in range(3)), strict=True)]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("emit", ["backward", "output"])
@pytest.mark.parametrize("gradients", [outside, func_grad])
@pytest.mark.parametrize("rule", RULES)
def test_of_an_ensemble_each_model_has_its_penalty(rule: str, emit: str, gradients: Gradients) -> None:
    check_ensemble(rule, emit, gradients)


@pytest.mark.parametrize("rule", RULES)
def test_also_where_it_is_mapped_twice(rule: str) -> None:
    check_ensemble(rule, "backward", outside, twice_mapped)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_also_in_compiled_code(rule: str) -> None:
    check_ensemble(rule, "backward", compiled)


@pytest.mark.parametrize("rule", RULES)
def test_mapped_over_inputs_a_penalty_on_parameters_counts_once(rule: str) -> None:
    found = model()
    gm = fxreg.transform(found, RULES[rule])
    torch.vmap(lambda row: gm(row[None])[0])(X).square().sum().backward()
    torch.testing.assert_close([p.grad for p in found.parameters()], by_hand(model(), rule))


@pytest.mark.slow
def test_compiled_as_one_graph_it_is_an_error() -> None:
    members = [model(seed) for seed in range(2)]
    parameters, _ = stack_module_state(members)
    gm = fxreg.transform(members[0], TWO)
    torch._dynamo.reset()
    whole = torch.compile(lambda given: mapped(gm, "backward", given), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"inside torch\.vmap"):
        whole(parameters)
