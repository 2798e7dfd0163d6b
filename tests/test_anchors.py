"""Effects with a tensor for each parameter: what it is, that it stays, and that it is kept once."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxreg

from .reference import assert_same


def build(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    return model, torch.randn(7, 3, dtype=dtype)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def sgd(model: nn.Module, loss: Callable[[], Tensor], steps: int = 4) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return values(model)


FISHER = {
    "0.weight": torch.rand(5, 3, generator=torch.Generator().manual_seed(1)),
    "0.bias": torch.zeros(5),
    "2.weight": torch.full((2, 5), 3.0),
    "2.bias": torch.tensor([0.0, 10.0]),
    "not there": torch.ones(9),
}
CASES: tuple[tuple[Any, Callable[[str, Tensor, Tensor], Tensor]], ...] = (
    (fxreg.l2_sp(0.3), lambda name, w, start: 0.3 * ((w - start) ** 2).sum()),
    (fxreg.ewc(0.3, FISHER), lambda name, w, start: 0.3 * (FISHER[name] * (w - start) ** 2).sum()),
)


@pytest.mark.parametrize("emit", ["backward", "output"])
@pytest.mark.parametrize("via", ["penalty", "gradient"])
@pytest.mark.parametrize(("effect", "penalty"), CASES, ids=["l2_sp", "ewc"])
def test_training_is_that_of_the_loss_by_hand(effect: Any, penalty: Any, via: Any, emit: Any) -> None:
    model, x = build()
    start = values(model)

    def by_hand() -> Tensor:
        terms = [penalty(name, p, start[name]) for name, p in model.named_parameters()]
        return model(x).square().mean() + torch.stack(terms).sum()

    wanted = sgd(model, by_hand)
    distance = sum(float(penalty(name, p, start[name])) for name, p in wanted.items())

    model, x = build()
    gm = fxreg.transform(model, fxreg.Rule(effect, via=via, label="near"), emit=emit, example_inputs=(x,))

    def emitted() -> Tensor:
        if emit == "backward":
            return gm(x).square().mean()
        output, added = gm(x)
        return output.square().mean() + added

    assert_same(sgd(model, emitted), wanted, 1e-12)
    assert float(fxreg.penalties(gm)["near"]) == pytest.approx(distance, rel=1e-12)


def test_with_the_loss_it_is_added_to_the_loss() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build()[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).square().mean()

    model, (_, x) = Loss(), build()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l2_sp(0.5)), emit="loss", example_inputs=(x,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert float((gm(x) - model(x)).detach()) == pytest.approx(0.5 * sum(p.numel() for p in model.parameters()))


# What it is, and that it stays.


def test_the_anchor_is_what_was_given_under_any_name_of_the_parameter() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2, bias=False)
            self.second = nn.Linear(2, 2, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model, point = Tied(), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    with torch.no_grad():
        model.first.weight.zero_()
    for given in (
        {"first.weight": point},
        {"second.weight": point},
        dict.fromkeys(("first.weight", "second.weight"), point),
    ):
        gm = fxreg.transform(model, fxreg.Rule(fxreg.l2_sp(1.0, given)))
        assert float(fxreg.penalties(gm)["l2_sp"]) == 30.0
    both = {"first.weight": point, "second.weight": point + 1}
    with pytest.raises(fxreg.RuleError, match=r"'first\.weight', 'second\.weight' are one parameter"):
        fxreg.explain(model, fxreg.Rule(fxreg.l2_sp(1.0, both)))


def test_what_was_given_may_change_afterwards_and_so_may_the_model() -> None:
    model, _ = build()
    start, given = values(model), model.state_dict()  # shares its memory with the model
    gm = fxreg.transform(model, [fxreg.Rule(fxreg.l2_sp(1.0)), fxreg.Rule(fxreg.l2_sp(1.0, given), label="given")])
    other, _ = build(seed=1)
    for assign in (False, True):
        model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        wanted = sum(float(((p - start[name]) ** 2).sum()) for name, p in values(other).items())
        assert {label: float(v) for label, v in fxreg.penalties(gm).items()} == pytest.approx(
            {"l2_sp": wanted, "given": wanted}
        )


def test_a_formula_may_have_tensors_of_its_own_beside_given_ones_in_the_parameters_precision() -> None:
    seen = []

    @fxreg.penalty
    def anchors_seeing(weight: Tensor, *, home: fxreg.Anchor, weights: fxreg.Anchor = None) -> Tensor:
        seen.append((weight.dtype, home.dtype, weights.dtype))
        return (weights * (weight - home).abs()).sum()

    model = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    given = {"weight": torch.tensor([[0.25, 0.5]], dtype=torch.float64)}
    gm = fxreg.transform(model, fxreg.Rule(anchors_seeing(2.0, given)))
    assert float(fxreg.penalties(gm)["anchors_seeing"]) == 2 * (0.75 + 2 * 1.5)
    assert set(seen) == {(torch.float32,) * 3}
    kept = {name: tensor.dtype for name, tensor in fxreg.state_dict(gm).items() if name.startswith("anchors.")}
    assert kept == {
        "anchors.anchors_seeing.home.weight": torch.float64,
        "anchors.anchors_seeing.weights.weight": torch.bfloat16,
    }


@pytest.mark.parametrize(
    "change",
    [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to_empty(device="cpu"), lambda m: m.to("meta")],
)
def test_anchors_keep_dtype_and_value(change: Callable[[nn.Module], object]) -> None:
    model, _ = build()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l2_sp(1.0, {name: p + 1 for name, p in values(model).items()})))
    before = fxreg.state_dict(gm)
    change(gm)
    after = fxreg.state_dict(gm)
    assert before.keys() == after.keys()
    assert len(before) == 6
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor)
        assert after[name].dtype == tensor.dtype


def test_the_models_own_state_stays_the_models() -> None:
    model, _ = build()
    keys = list(model.state_dict())
    gm = fxreg.transform(model, fxreg.Rule(fxreg.ewc(1.0, FISHER)))
    assert list(gm.state_dict()) == keys
    assert [name for name, _ in gm.named_parameters()] == keys


def test_copies_have_anchors_of_their_own_and_files_have_them_once() -> None:
    model = nn.Linear(300, 300, bias=False)
    given = {"weight": torch.randn(300, 300), "another": torch.randn(300, 300)}
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l2_sp(1.0, given)))
    wanted = float((model.weight.detach() - given["weight"]).square().sum())
    file = io.BytesIO()
    torch.save(gm, file)
    size = model.weight.nbytes
    assert len(pickle.dumps(gm)) < 2.5 * size
    assert len(file.getvalue()) < 2.5 * size
    file.seek(0)
    copies = (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), torch.load(file, weights_only=False))
    zero = {name: torch.zeros_like(t) for name, t in fxreg.state_dict(gm).items() if name.startswith("anchors.")}
    fxreg.load_state_dict(gm, fxreg.state_dict(gm) | zero)
    assert float(fxreg.penalties(gm)["l2_sp"]) == pytest.approx(float(model.weight.detach().square().sum()))
    for one in copies:
        assert float(fxreg.penalties(one)["l2_sp"]) == pytest.approx(wanted)
        assert "l2_sp(1, anchor=<2 tensors by name>)" in str(fxreg.explain(one))


def test_a_resumed_run_is_the_same_bit_by_bit() -> None:
    def run(model: nn.Module, gm: nn.Module, x: Tensor, steps: int) -> dict[str, Tensor]:
        return sgd(model, lambda: gm(x).square().mean(), steps)

    rules = [fxreg.Rule(fxreg.l2_sp(0.3), param="weight"), fxreg.Rule(fxreg.ewc(0.1, FISHER))]
    model, x = build()
    gm = fxreg.transform(model, rules)
    run(model, gm, x, 3)
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "fxreg": fxreg.state_dict(gm)}, saved)
    wanted = run(model, gm, x, 3)

    saved.seek(0)
    loaded = torch.load(saved)
    model, _ = build(seed=5)  # elsewhere, with other weights, so other anchors
    gm = fxreg.transform(model, rules)
    model.load_state_dict(loaded["model"])
    fxreg.load_state_dict(gm, loaded["fxreg"])
    found = run(model, gm, x, 3)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_model_without_values_takes_given_ones() -> None:
    real, x = build()
    with torch.device("meta"):
        model, _ = build()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l2_sp(1.0, real.state_dict())))
    gm.to_empty(device="cpu")
    with torch.no_grad():
        for own, p in zip(gm.parameters(), real.parameters(), strict=True):
            own.copy_(p + 1)
    assert float(fxreg.penalties(gm)["l2_sp"]) == pytest.approx(sum(p.numel() for p in real.parameters()))
    gm(x).sum().backward()


# Reports and errors.


def test_the_plan_says_the_strength_and_what_was_given() -> None:
    model, _ = build()
    table = str(fxreg.explain(model, [fxreg.Rule(fxreg.l2_sp(0.01)), fxreg.Rule(fxreg.ewc(1.0, FISHER))]))
    assert " l2_sp(0.01) " in table
    assert " ewc(1, fisher=<5 tensors by name>) " in table
    assert (
        repr(fxreg.ewc(1.0, {"a": torch.ones(1)}, {}))
        == "ewc(1, fisher=<1 tensor by name>, anchor=<0 tensors by name>)"
    )


def test_effects_are_equal_that_were_given_equal_tensors() -> None:
    one, same, other = ({"weight": torch.ones(2) * v, "bias": torch.zeros(1)} for v in (1, 1, 2))
    assert fxreg.l2_sp(0.1) == fxreg.l2_sp(0.1)
    assert fxreg.l2_sp(0.1, one) == fxreg.l2_sp(0.1, same) == pickle.loads(pickle.dumps(fxreg.l2_sp(0.1, one)))
    assert len({fxreg.l2_sp(0.1, one), fxreg.l2_sp(0.1, same)}) == 1
    for different in (fxreg.l2_sp(0.1), fxreg.l2_sp(0.1, other), fxreg.l2_sp(0.1, {"weight": one["weight"]})):
        assert fxreg.l2_sp(0.1, one) != different
        assert not fxreg.l2_sp(0.1, one).same_but_strength(different)
    assert fxreg.l2_sp(0.1, one).same_but_strength(fxreg.l2_sp(0.2, same))


def test_two_anchors_are_two_effects_and_the_same_twice_is_a_duplicate() -> None:
    model, _ = build()
    given = values(model)
    fxreg.explain(model, [fxreg.Rule(fxreg.l2_sp(0.1)), fxreg.Rule(fxreg.l2_sp(0.1, given))])
    for twice in (
        (fxreg.l2_sp(0.1), fxreg.l2_sp(0.2)),
        (fxreg.l2_sp(0.1, given), fxreg.l2_sp(0.2, copy.deepcopy(given))),
    ):
        with pytest.raises(fxreg.MatchError, match="duplicates"):
            fxreg.explain(model, [fxreg.Rule(effect) for effect in twice])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, r"l2_sp\(anchor=…\) has no tensor for '0\.weight', '0\.bias', '2\.weight' and 1 more; .* is empty"),
        ({"0.weight": torch.ones(5, 3), "0.bias": torch.ones(5), "model.2.weight": 1, "2.bias": torch.ones(2)},
         r"'l2_sp'.* for '2\.weight'; nearest names given: .*'model\.2\.weight'"),
        ({"0.weight": torch.ones(3, 5)}, r"for '0\.weight': expected a tensor of shape \(5, 3\), got \(3, 5\)"),
        ({"0.weight": torch.ones(5, 3, dtype=torch.int64)}, r"'0\.weight': .*floating-point numbers, got torch\.int64"),
        ({"0.weight": torch.ones(5, 3, dtype=torch.complex64)}, r"got torch\.complex64"),
        ({"0.weight": torch.ones(5, 3, device="meta")}, r"'0\.weight': the tensor is on the meta device"),
        ({"0.weight": [1.0]}, r"'0\.weight': expected a tensor, got list"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(given: dict[str, Any], says: str) -> None:
    model, _ = build()
    filled = given if not given or len(given) > 1 else values(model) | given
    for act in (fxreg.explain, fxreg.transform):
        with pytest.raises(fxreg.RuleError, match=says):
            act(model, fxreg.Rule(fxreg.l2_sp(0.1, filled)))


def test_what_is_no_mapping_is_refused() -> None:
    model, _ = build()
    for wrong in (model, torch.ones(3), 3, [torch.ones(3)]):
        with pytest.raises(fxreg.RuleError, match=r"l2_sp\(anchor=…\): expected a mapping of full parameter names"):
            fxreg.l2_sp(0.1, wrong)
    with pytest.raises(fxreg.RuleError, match=r"ewc\(fisher=…\): expected a mapping .* got None"):
        fxreg.ewc(0.1, None)
    with pytest.raises(fxreg.RuleError, match="fisher"):
        fxreg.ewc(0.1)  # type: ignore[call-arg]


def test_what_has_no_value_yet_is_no_anchor() -> None:
    with pytest.raises(fxreg.RuleError, match=r"'weight': the parameter is on the meta device.*mapping"):
        fxreg.explain(nn.Linear(2, 2, device="meta"), fxreg.Rule(fxreg.l2_sp(0.1)))


def test_activations_have_no_anchors() -> None:
    with pytest.raises(fxreg.RuleError, match=r"'l2_sp': l2_sp has a tensor for each parameter \(anchor\)"):
        fxreg.Rule(fxreg.l2_sp(0.1), on="output")


def test_a_constraint_may_have_anchors_and_keeps_them_in_its_state() -> None:
    @fxreg.constraint
    def anchors_clamped(weight: Tensor, *, limit: fxreg.Anchor = None) -> Tensor:
        """No element above what it was."""
        return torch.minimum(weight, limit)

    model, x = build()
    start = values(model)
    gm = fxreg.transform(model, fxreg.Rule(anchors_clamped()))
    assert {key for key in fxreg.state_dict(gm) if key.startswith("anchors.")} == {
        f"anchors.anchors_clamped.limit.{name}" for name in start
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fxreg.ProximalStep(optimizer, gm)
    gm(x).square().mean().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        wanted = torch.minimum(start[name] - 0.1 * p.grad, start[name])  # type: ignore[operator]
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-14, atol=1e-14)
        assert (p != start[name]).any()


def test_the_default_of_an_anchor_is_a_copy_or_none_at_all() -> None:
    def anchors_odd(weight: Tensor, *, home: fxreg.Anchor = 3.0) -> Tensor:
        return weight.sum()

    with pytest.raises(fxreg.RuleError, match=r"'anchors_odd': the default of 'home' can only be None"):
        fxreg.penalty(anchors_odd)


def test_a_state_of_other_anchors_is_refused() -> None:
    model, _ = build()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l2_sp(0.1), param="weight"))
    state = fxreg.state_dict(gm)
    with pytest.raises(fxreg.FxregError, match=r"missing \['anchors\.l2_sp\.anchor\.0\.weight'\]"):
        fxreg.load_state_dict(gm, {n: t for n, t in state.items() if n != "anchors.l2_sp.anchor.0.weight"})
    with pytest.raises(fxreg.FxregError, match=r"'anchors\.l2_sp\.anchor\.0\.weight' has shape \(5,\)"):
        fxreg.load_state_dict(gm, state | {"anchors.l2_sp.anchor.0.weight": torch.ones(5)})


# Compiled, and sharded.


@pytest.mark.slow
def test_compiled_by_inductor_it_trains_the_same_and_compiles_once() -> None:
    torch._dynamo.reset()
    rules = [fxreg.Rule(fxreg.l2_sp(0.3)), fxreg.Rule(fxreg.ewc(0.2, FISHER), via="gradient")]
    results = []
    counter = CompileCounterWithBackend("inductor")
    for compiled in (False, True):
        model, x = build()
        gm = fxreg.transform(model, rules)
        run: Any = torch.compile(gm, backend=counter, fullgraph=True) if compiled else gm
        results.append(sgd(model, lambda run=run, x=x: run(x).square().mean()))  # type: ignore[misc]
    assert_same(results[1], results[0], 1e-12)
    assert counter.frame_count == 1


@pytest.mark.parametrize("via", ["penalty", "gradient"])
def test_sharded_after_the_transform_the_anchor_meets_both_shards_and_whole_weights(mesh: Any, via: Any) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    rules = [fxreg.Rule(fxreg.l2_sp(0.3), via=via), fxreg.Rule(fxreg.ewc(0.2, FISHER), via=via)]
    results = []
    for sharded in (False, True):
        model, x = build(dtype=torch.float32)
        gm = fxreg.transform(model, rules)
        if sharded:
            fully_shard(gm, mesh=mesh)
        assert isinstance(model[0].weight, DTensor) == sharded
        results.append(sgd(model, lambda gm=gm, x=x: gm(x).square().mean()))  # type: ignore[misc]
        results.append(fxreg.penalties(gm))
    for found, wanted in zip(results[2:], results[:2], strict=True):
        assert_same({n: getattr(t, "full_tensor", lambda t=t: t)() for n, t in found.items()}, wanted, 1e-6)
    assert float(wanted["ewc"]) > 0
