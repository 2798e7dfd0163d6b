"""Penalties on the model's function: the gradient of its input, and its Jacobian, against double backpropagation by
hand and closed forms."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxreg

from .reference import Gradients, assert_same

S = 0.3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Normed(nn.Module):
    """With a buffer that is written, and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.second = (
            nn.Linear(3, 5),
            nn.BatchNorm1d(5),
            nn.Dropout(0.5),
            nn.Linear(5, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(torch.tanh(self.norm(self.first(x)))))


class Losing(nn.Module):
    """Two inputs, one of them of integers, and its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def x(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 3, dtype=dtype, generator=torch.Generator().manual_seed(5))


def make(kind: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def squared_gradient(model: nn.Module, x: Tensor, scalar: Callable[[Any], Tensor] = torch.sum) -> Tensor:
    x = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(scalar(model(x)), x, create_graph=True)
    return found.square().sum()


def gradients(loss: Tensor, model: nn.Module) -> Gradients:
    names = dict(model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, [*names.values()], allow_unused=True), strict=True))


def by_hand(model: nn.Module) -> Gradients:
    return gradients(model(x()).square().mean() + S * squared_gradient(model, x()) / 4, model)


RULE = fxreg.Rule(fxreg.input_gradient(S), on="input", reduction="batch")


def trained(gm: nn.Module, emit: str = "backward") -> Gradients:
    output = gm(x())
    return gradients(output[0].square().mean() + output[1] if emit == "output" else output.square().mean(), gm)


@pytest.mark.parametrize("emit", ["backward", "output"])
@pytest.mark.parametrize("examples", [None, (x(),)], ids=["", "verified"])
def test_training_is_double_backpropagation(examples: Any, emit: Any) -> None:
    gm = fxreg.transform(make(), RULE, example_inputs=examples, emit=emit)
    assert_same(trained(gm, emit), by_hand(make()), 1e-12)
    torch.testing.assert_close(
        fxreg.penalties(gm, x())["input_gradient"], (S * squared_gradient(make(), x()) / 4).detach()
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_is_the_same_in_one_graph(backend: str) -> None:
    gm = fxreg.transform(make(), RULE)
    compiled = torch.compile(gm, backend=backend, fullgraph=True)
    names = dict(gm.named_parameters())
    found = torch.autograd.grad(compiled(x()).square().mean(), [*names.values()])
    assert_same(dict(zip(names, found, strict=True)), by_hand(make()), 1e-9)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm))], ids=["deepcopy", "pickle"])
def test_copies_have_it_too(how: Callable[[Any], Any]) -> None:
    assert_same(trained(how(fxreg.transform(make(), RULE))), by_hand(make()), 1e-12)


def test_it_is_differentiated_through_functional_calls_and_by_sample() -> None:
    model = make()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.input_gradient(S), on="input"))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(given: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(gm, given, (x,)).square().mean()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x()[:, None])
    for i in range(4):
        sample = x()[i, None]
        wanted = gradients(model(sample).square().mean() + S * squared_gradient(model, sample), model)
        assert_same({name: one[i] for name, one in found.items()}, wanted, 1e-12)


def test_buffers_and_random_numbers_are_those_of_the_model_alone() -> None:
    model, twin = make(Normed), make(Normed)
    gm = fxreg.transform(model, RULE, example_inputs=(x(),))
    last = []
    for module in (gm, twin):
        torch.manual_seed(3)
        last.append([module(x()) for _ in range(3)][-1])
    assert torch.equal(*last)
    assert torch.equal(model.norm.running_mean, twin.norm.running_mean)
    assert int(model.norm.num_batches_tracked) == 3


def test_of_a_model_with_its_own_loss_the_losss_gradient_is_penalized() -> None:
    labels = torch.tensor([0, 1, 1, 0])
    model = make(Losing)
    rule = fxreg.Rule(fxreg.input_gradient(S), on="input")
    gm = fxreg.transform(model, rule, example_inputs=(x(), labels), emit="loss")
    twin = make(Losing)
    loss = twin(x(), labels)["loss"]
    penalty = S * squared_gradient(lambda x: twin(x, labels), x(), lambda output: output["loss"])
    torch.testing.assert_close(gm(x(), labels)["loss"], loss + penalty)
    assert_same(gradients(gm(x(), labels)["loss"], model), gradients(loss + penalty, twin), 1e-12)
    gm.eval()
    assert torch.equal(gm(x(), labels)["loss"], loss)


@pytest.mark.slow
def test_the_jacobians_estimate_is_unbiased_and_exact_for_one_output() -> None:
    model = nn.Linear(3, 4, bias=False).double()
    exact = 4 * model.weight.detach().square().sum()  # a batch of four
    gm = fxreg.transform(model, fxreg.Rule(fxreg.jacobian(1.0, samples=4), on="input"), emit="output")
    values = torch.stack([gm(x())[1].detach() for _ in range(300)])
    error = values.std() / 300**0.5
    assert float(error) > 0
    assert abs(float(values.mean() - exact)) < 4 * float(error)
    one = nn.Linear(3, 1, bias=False).double()
    gm = fxreg.transform(one, fxreg.Rule(fxreg.jacobian(1.0), on="input"), emit="output")
    torch.testing.assert_close(gm(x())[1], 4 * one.weight.square().sum())


def test_the_jacobians_directions_are_those_of_its_seed_and_step() -> None:
    rule = fxreg.Rule(fxreg.jacobian(1.0, seed=3), on="input")
    first = fxreg.transform(make(), rule, emit="output", example_inputs=(x(),))
    values = [first(x())[1].detach() for _ in range(3)]
    assert len({float(value) for value in values}) > 1
    second = fxreg.transform(make(), rule, emit="output")
    before = torch.get_rng_state()
    second(x())
    state = fxreg.state_dict(second)
    assert torch.equal(torch.get_rng_state(), before)
    third = fxreg.transform(make(), rule, emit="output")
    fxreg.load_state_dict(third, state)
    assert torch.equal(third(x())[1], values[1])
    assert torch.equal(fxreg.penalties(third, x())["jacobian"], values[2])


def test_training_with_the_jacobian_is_double_backpropagation_of_its_directions() -> None:
    gm = fxreg.transform(make(), fxreg.Rule(fxreg.jacobian(S, samples=2), on="input"), emit="output")
    output, penalty = gm(x())
    stream = gm.get_buffer("fxreg.jacobian_stream").clone()
    twin = make()
    value = torch.zeros((), dtype=torch.float64)
    for sample in range(2):
        v = fxreg.jacobian.function(output, stream=stream + torch.tensor([sample, 0]))
        assert set(v.unique().tolist()) <= {-1.0, 1.0}
        value = value + S * squared_gradient(twin, x(), lambda y, v=v: (v * y).sum()) / 2
    torch.testing.assert_close(penalty, value)
    assert_same(gradients(penalty, gm), gradients(value, twin), 1e-12)


@pytest.mark.parametrize("effect", [fxreg.input_gradient(S), fxreg.jacobian(S)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_gradients_are_squared_and_summed_in_float32(effect: Any, dtype: torch.dtype) -> None:
    """R is n·Σw² of a linear function with one output: 300² is no float16, and the sum takes more than 8 bits."""
    model = nn.Linear(1000, 1, bias=False, dtype=dtype)
    nn.init.constant_(model.weight, 300.0)
    inputs = torch.ones(4, 1000, dtype=dtype)
    rule = fxreg.Rule(effect, on="input")
    for examples in (None, (inputs,)):
        gm = fxreg.transform(model, rule, emit="output", example_inputs=examples)
        penalty = gm(inputs)[1]
        assert penalty.dtype == torch.float32
        assert float(penalty.detach()) == pytest.approx(S * 4 * 1000 * 300.0**2, rel=1e-5)
        assert float(fxreg.penalties(gm, inputs)[effect.name]) == pytest.approx(float(penalty.detach()), rel=1e-6)
        (slope,) = torch.autograd.grad(penalty, model.weight)
        assert slope.dtype == dtype
        torch.testing.assert_close(slope.float(), torch.full((1, 1000), 2 * S * 4 * 300.0), rtol=1e-2, atol=0)


@pytest.mark.parametrize("effect", [fxreg.input_gradient(S), fxreg.jacobian(S)], ids=repr)
def test_of_no_samples_one_or_huge_ones_numbers_are_finite_and_of_complex_ones_refused(effect: Any) -> None:
    model = nn.Linear(3, 1)
    gm = fxreg.transform(model, fxreg.Rule(effect, on="input"), emit="output")
    for inputs, samples in ((torch.zeros(0, 3), 0), (torch.zeros(3), 1), (torch.full((2, 3), 1e15), 2)):
        penalty = gm(inputs)[1]
        torch.testing.assert_close(penalty, S * samples * model.weight.square().sum())
        (slope,) = torch.autograd.grad(penalty, model.weight)
        torch.testing.assert_close(slope, 2 * S * samples * model.weight)
    model = nn.Linear(3, 1, dtype=torch.complex64)
    with pytest.raises(fxreg.FxregError, match="no floating-point tensor among the inputs"):
        fxreg.transform(model, fxreg.Rule(effect, on="input"))(torch.zeros(2, 3, dtype=torch.complex64))


@pytest.mark.parametrize(
    "keys", [{}, {"on": "output"}, {"on": "input", "layer": "Linear"}, {"on": "input", "name": "first"}], ids=str
)
def test_it_is_for_the_models_input(keys: dict[str, Any]) -> None:
    with pytest.raises(fxreg.RuleError, match="is about how the whole model's output follows its input: on='input'"):
        fxreg.Rule(fxreg.jacobian(0.1), **keys)


def test_what_runs_as_it_is_would_run_twice_and_is_refused() -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    model = nn.Sequential(nn.Linear(3, 3), Gate())
    with pytest.raises(fxreg.CaptureError, match=r"calls the captured graph a second time, and in it 1 runs as it is"):
        fxreg.transform(model, RULE)


def test_inputs_without_a_floating_point_tensor_are_an_error() -> None:
    gm = fxreg.transform(nn.Embedding(5, 3), fxreg.Rule(fxreg.input_gradient(0.1), on="input"))
    with pytest.raises(fxreg.FxregError, match="there is no floating-point tensor among the inputs"):
        gm(torch.tensor([1]))


def test_explain_shows_it_and_strip_takes_it_away() -> None:
    gm = fxreg.transform(make(), RULE)
    assert "input of the model" in str(fxreg.explain(gm))
    assert fxreg.strip(gm).code == fxreg.transform(make(), []).code


def noted(module: nn.Module, args: Any, output: Tensor) -> None:
    """A hook that would run twice."""


def test_layers_with_hooks_would_do_twice_what_they_do() -> None:
    model = make()
    model.first.register_forward_hook(noted)  # type: ignore[union-attr]
    with pytest.raises(fxreg.CaptureError, match=r"in it first runs as it is \(it has hooks\)"):
        fxreg.transform(model, RULE)


@pytest.mark.parametrize("examples", [None, (x(),)], ids=["", "verified"])
@pytest.mark.parametrize("effect", [fxreg.clip_value(1e-3), fxreg.freeze()], ids=["clipped", "frozen"])
def test_parameters_are_read_raw_and_frozen_ones_stay_frozen(effect: Any, examples: Any) -> None:
    model = make()
    gm = fxreg.transform(model, [RULE, fxreg.Rule(effect, name="first")], example_inputs=examples)
    loss, penalty = (
        gradients(term, model) for term in (model(x()).square().mean(), S * squared_gradient(model, x()) / 4)
    )
    wanted = by_hand(model)
    for name in ("first.weight", "first.bias"):
        wanted[name] = None if effect.name == "freeze" else loss[name].clamp(-1e-3, 1e-3) + penalty[name]
    assert_same(trained(gm), wanted, 1e-9)


def test_tensors_inside_an_argument_are_refused() -> None:
    class Listed(Net):
        def forward(self, x: Tensor, more: Any) -> Tensor:
            return super().forward(x) * more[0]

    gm = fxreg.transform(make(Listed), fxreg.Rule(fxreg.input_gradient(S), on="input"))
    gm(x(), torch.ones(1, dtype=torch.float64))
    with pytest.raises(fxreg.FxregError, match="there are tensors inside an argument"):
        gm(x(), [torch.ones(1, dtype=torch.float64)])


@pytest.mark.parametrize("how", [lambda x: x.detach().mul_(2.0), nn.ReLU(inplace=True)], ids=["detached", "layer"])
def test_a_forward_that_writes_into_its_input_is_refused(how: Any) -> None:
    class Writing(Net):
        def forward(self, x: Tensor) -> Tensor:
            how(x)
            return super().forward(x)

    model = make(Writing)
    if isinstance(how, nn.Module):
        model.how = how
    with pytest.raises(fxreg.CaptureError, match="the forward writes into its argument 'x'"):
        fxreg.transform(model, RULE)
