"""Gradient transforms of all the parameters of a rule at once: what they see, and when."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxreg
from fxreg.effects import registry

from .reference import Gradients, assert_same


@fxreg.joint_gradient
def joint_spread(
    grads: list[Tensor], weights: list[Tensor], *, rate: fxreg.Strength, shift: float = 0.0, square: bool = False
) -> list[Tensor]:
    """With a strength and arguments, and of the weights: everyone gets the sum of all."""
    total = torch.stack([(g * w).sum().to(rate) for g, w in zip(grads, weights, strict=True)]).sum()
    total = rate * (total.square() if square else total) + shift
    return [grad + total.to(grad) for grad in grads]


class Tied(nn.Module):
    """A weight with two names and two uses; one in what no graph shows; a frozen one; an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(requires_grad=False)
        self.unused = nn.Linear(3, 3)
        self.opaque = Opaque()

    def forward(self, x: Tensor) -> Tensor:
        return self.opaque(self.frozen(torch.tanh(self.second(torch.tanh(self.first(x))))))


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if float(x.detach().sum()) > -1e9 else x


def build(dtype: torch.dtype = torch.float64) -> tuple[Tied, Tensor]:
    torch.manual_seed(0)
    return Tied().to(dtype), torch.randn(5, 3, dtype=dtype)


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, factor: float = 1.0) -> Gradients:
    model.zero_grad()
    (factor * run(x).square().sum()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def clipped(model: nn.Module, x: Tensor, names: list[str], max_norm: float) -> Gradients:
    """By torch's own function, on some parameters of the original model."""
    found = gradients(model, model, x)
    parameters = dict(model.named_parameters())
    torch.nn.utils.clip_grad_norm_([parameters[name] for name in names], max_norm)
    return found


# What it sees.


@pytest.mark.parametrize("max_norm", [0.0, 0.3, 1e9])
@pytest.mark.parametrize("keys", [{}, {"param": "weight"}, {"name": "opaque.*"}], ids=str)
def test_the_norm_is_torchs_over_what_the_rule_matches(keys: dict[str, Any], max_norm: float) -> None:
    model, x = build()
    rule = fxreg.Rule(fxreg.clip_global_norm(max_norm), **keys)
    names = [edit.site for edit in fxreg.explain(model, rule).edits]
    wanted = {n: None if g is None else g.clone() for n, g in clipped(model, x, names, max_norm).items()}
    gm = fxreg.transform(model, rule, example_inputs=(x,))
    found = gradients(model, gm, x)
    assert_same(found, wanted, 1e-12)
    assert [name for name, g in found.items() if g is None] == [
        "frozen.weight", "frozen.bias", "unused.weight", "unused.bias",
    ]  # fmt: skip
    assert not gm(x).isnan().any()
    assert not any(p.requires_grad for p in model.frozen.parameters())


def test_it_stands_in_rule_order_and_before_penalties() -> None:
    model, x = build()
    plain = gradients(model, model, x)
    plain = {name: g.clone() for name, g in plain.items() if g is not None}
    parameters = dict(model.named_parameters())

    def by_hand(order: str) -> Gradients:
        found = dict(plain)
        for step in order:
            norm = torch.stack([g.norm() for g in found.values()]).norm()
            found = {
                name: g.clamp(-0.1, 0.1) if step == "v" else g * min(1.0, 0.5 / (float(norm) + 1e-6))
                for name, g in found.items()
            }
        return {name: found[name] + 0.1 * parameters[name].sign() if name in found else None for name in parameters}

    rules = {
        "v": fxreg.Rule(fxreg.clip_value(0.1)),
        "g": fxreg.Rule(fxreg.clip_global_norm(0.5)),
        "p": fxreg.Rule(fxreg.l1(0.1), via="gradient"),
    }
    for order in ("gv", "vg"):
        for penalty in range(3):
            letters = order[:penalty] + "p" + order[penalty:]
            gm = fxreg.transform(model, [rules[letter] for letter in letters], example_inputs=(x,))
            assert_same(gradients(model, gm, x), by_hand(order), 1e-12)
    assert (by_hand("gv")["first.weight"] - by_hand("vg")["first.weight"]).abs().max() > 0.01  # type: ignore[operator]


def test_two_rules_are_two_norms() -> None:
    model, x = build()
    wanted = clipped(model, x, ["first.weight", "opaque.inner.weight"], 0.2)
    torch.nn.utils.clip_grad_norm_([model.first.bias, model.second.bias, model.opaque.inner.bias], 0.3)
    wanted = {n: None if g is None else g.clone() for n, g in wanted.items()}
    rules = [
        fxreg.Rule(fxreg.clip_global_norm(0.2), param="weight", exclude=("frozen.*", "unused.*")),
        fxreg.Rule(fxreg.clip_global_norm(0.3), param="bias", exclude=("frozen.*", "unused.*")),
    ]
    gm = fxreg.transform(model, rules, example_inputs=(x,))
    assert_same(gradients(model, gm, x), wanted, 1e-12)


def test_rules_that_cross_act_one_after_the_other() -> None:
    """On some parameters the first, on some the second, on some both."""
    model, x = build()
    gradients(model, model, x)
    both = [model.first.weight, model.opaque.inner.weight]
    torch.nn.utils.clip_grad_norm_([*both, model.first.bias], 0.5)
    second = [*both, model.opaque.inner.bias]
    total = torch.stack([(p.grad * p).sum() for p in second]).sum().detach()  # type: ignore[operator]
    for parameter in second:
        parameter.grad = parameter.grad + 0.2 * total  # type: ignore[operator]
    wanted = {name: p.grad for name, p in model.named_parameters()}
    rules = [
        fxreg.Rule(fxreg.clip_global_norm(0.5), exclude=("*.inner.bias", "second.bias")),
        fxreg.Rule(joint_spread(0.2), exclude=("first.bias", "second.bias")),
    ]
    gm = fxreg.transform(model, rules, example_inputs=(x,))
    assert_same(gradients(model, gm, x), wanted, 1e-12)


def test_of_several_backward_passes_each_sees_its_own() -> None:
    model, x = build()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.clip_global_norm(0.3)))
    output = gm(x)
    for column in (0, 1):
        model.zero_grad()
        output[:, column].square().sum().backward(retain_graph=True)
        found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        model(x)[:, column].square().sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        assert_same(found, {name: p.grad for name, p in model.named_parameters()}, 1e-12)


def test_asked_for_one_gradient_it_sees_all() -> None:
    model, x = build()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.clip_global_norm(0.3)))
    (found,) = torch.autograd.grad(gm(x).square().sum(), [model.first.bias])
    torch.testing.assert_close(found, clipped(model, x, list(dict(model.named_parameters())), 0.3)["first.bias"])


class Unlike(nn.Module):
    """Parameters of three data types."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.p16 = nn.Parameter(torch.randn(300, 300).to(torch.float16))
        self.p32 = nn.Parameter(torch.randn(3))
        self.p64 = nn.Parameter(torch.randn(3).double())

    def forward(self, x: Tensor) -> Tensor:
        return (self.p16.float() * x).sum() + (self.p32 * x).sum() + (self.p64 * x).sum()


def test_data_types_stay_and_norms_are_wide() -> None:
    model = Unlike()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.clip_global_norm(1.0)))
    gm(torch.tensor(1e3)).backward()  # the sum of the squares of the half ones is no float16
    found = {name: p.grad for name, p in model.named_parameters()}
    assert all(found[name].dtype == p.dtype for name, p in model.named_parameters())  # type: ignore[union-attr]
    norm = torch.stack([g.double().norm() for g in found.values()]).norm()  # type: ignore[union-attr]
    assert float(norm) == pytest.approx(1.0, rel=1e-3)
    assert float(found["p32"][0] / found["p64"][0]) == pytest.approx(1.0, rel=1e-6)  # type: ignore[index]


@pytest.mark.parametrize("scale", [1024.0, 1 / 4])
def test_the_loss_scale_goes_around_it(scale: float) -> None:
    model, x = build()
    wanted = clipped(model, x, list(dict(model.named_parameters())), 0.3)
    wanted = {n: None if g is None else scale * g for n, g in wanted.items()}
    gm = fxreg.transform(model, fxreg.Rule(fxreg.clip_global_norm(0.3)))
    fxreg.set_loss_scale(gm, scale)
    assert_same(gradients(model, gm, x, scale), wanted, 1e-12)


def test_without_a_loss_scale_what_is_not_finite_is_what_torch_makes_of_it() -> None:
    model = Unlike()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.clip_global_norm(0.3)))
    gm(torch.tensor(1e6)).backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(torch.tensor(1e6)).backward()
    assert model.p16.grad.isinf().all()  # type: ignore[union-attr]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    for one, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=0, atol=0, equal_nan=True)


def test_with_a_loss_scale_what_is_not_finite_passes_and_all_else_with_it() -> None:
    model = Unlike()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.clip_global_norm(0.3)))
    fxreg.set_loss_scale(gm, 1024.0)
    (1024.0 * gm(torch.tensor(1e3))).backward()
    assert model.p16.grad is not None
    assert model.p32.grad is not None
    assert model.p16.grad.isinf().all()
    assert float(model.p32.grad[0]) == 1024e3


# Effects of one's own.


def test_a_joint_transform_of_ones_own_has_strengths_and_arguments_and_sees_the_weights() -> None:
    model, x = build()
    plain = {name: g for name, g in gradients(model, model, x).items() if g is not None}
    total = sum(float((g * dict(model.named_parameters())[name].detach()).sum()) for name, g in plain.items())
    for arguments, added in (({}, 0.5 * total), ({"shift": 2.0, "square": True}, 0.5 * total**2 + 2)):
        wanted = {name: g + added for name, g in plain.items()}
        gm = fxreg.transform(model, fxreg.Rule(joint_spread(0.5, **arguments)), example_inputs=(x,))
        for one in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), torch.fx.symbolic_trace(gm)):
            found = gradients(one, one, x)
            assert_same({name: found[name] for name in wanted}, wanted, 1e-12)
    fxreg.strengths(gm)["joint_spread"] = 0.0
    assert_same({n: gradients(model, gm, x)[n] for n in plain}, {n: g + 2 for n, g in plain.items()}, 1e-12)


def test_gradients_of_other_shapes_or_of_another_number_are_refused_at_match() -> None:
    @fxreg.joint_gradient
    def joint_fewer(grads: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        return grads[1:]

    @fxreg.joint_gradient
    def joint_smaller(grads: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        return [grad.sum() for grad in grads]

    for effect, shapes in ((joint_fewer(), r"\[\]"), (joint_smaller(), r"\[\(\)\]")):
        with pytest.raises(fxreg.RuleError, match=rf"'first\.weight'.*new gradients have shapes {shapes}"):
            fxreg.explain(build()[0], fxreg.Rule(effect))


def test_a_joint_transform_has_no_tensor_for_each_parameter() -> None:
    def joint_odd(grads: list[Tensor], weights: list[Tensor], *, stream: fxreg.Stream) -> list[Tensor]:
        return grads

    def joint_anchored(grads: list[Tensor], weights: list[Tensor], *, home: fxreg.Anchor = None) -> list[Tensor]:
        return grads

    for function, name in ((joint_odd, "stream"), (joint_anchored, "home")):
        with pytest.raises(fxreg.RuleError, match=rf"'{function.__name__}'.*Drop '{name}'"):
            fxreg.joint_gradient(function)
        assert function.__name__ not in registry


def test_the_plan_and_the_code_say_that_they_act_together() -> None:
    model, _ = build()
    rule = fxreg.Rule(fxreg.clip_global_norm(1.0), label="all")
    rows = str(fxreg.explain(model, rule)).splitlines()[2:]
    assert len(rows) == len(list(model.parameters()))
    assert all("jointly with the others of its rule" in row for row in rows)
    gm = fxreg.transform(model, rule)
    assert str(gm.code).count("torch.ops.fxreg.clip_global_norm") == 1
    lines = [line for line in fxreg.diff(gm).splitlines() if line.startswith("+ ")]
    inserted = [line for line in lines if "return" not in line and "torch.tanh" not in line]
    assert len(inserted) > len(rows)
    assert all(line.endswith("  # rule 'all'") for line in inserted)
    assert fxreg.strip(gm).code == fxreg.transform(model, []).code


def test_a_line_for_several_rules_says_which() -> None:
    model, _ = build()
    rules = [
        fxreg.Rule(fxreg.l1(0.1), name="first"),
        fxreg.Rule(fxreg.scale(0.5)),
        fxreg.Rule(fxreg.l2(0.1), name="first"),
    ]
    lines = fxreg.diff(fxreg.transform(model, rules)).splitlines()
    (scale,) = (line for line in lines if "self.fxreg.loss_scale" in line)
    assert scale.endswith("  # rules 'l1', 'scale', 'l2'")
    (attach,) = (line for line in lines if line.lstrip("+ ").startswith("attach = "))
    assert attach.endswith("  # rules 'l1', 'l2'")


def test_verify_rejects_a_graph_in_which_one_parameter_goes_past_the_transform() -> None:
    model, x = build()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.clip_global_norm(0.3)))
    fxreg.verify(gm, model, (x,))
    together = next(node for node in gm.graph.nodes if node.name == "clip_global_norm_together")
    one = next(iter(together.users))
    one.replace_all_uses_with(together.args[0][0])  # type: ignore[index, arg-type]
    gm.recompile()
    with pytest.raises(fxreg.VerifyError, match=r"gradient of 'first\.weight' is off"):
        fxreg.verify(gm, model, (x,))


# Contexts.


def test_per_sample_gradients_have_a_norm_for_each_sample_also_of_parameters_that_are_not_reached() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.unused = (nn.Linear(3, 3).double() for _ in range(3))
            self.frozen = nn.Parameter(torch.ones(3).double(), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x))) * self.frozen

    model, x = Plain(), build()[1]
    gm = fxreg.transform(model, fxreg.Rule(fxreg.clip_global_norm(0.3)), example_inputs=(x,))
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(p: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(gm, p, (sample,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for k, sample in enumerate(x):
        wanted = clipped(model, sample, list(parameters), 0.3)
        for name, grad in found.items():
            torch.testing.assert_close(grad[k], torch.zeros_like(grad[k]) if wanted[name] is None else wanted[name])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func.jvp itself
def test_forward_mode_sees_the_model_itself() -> None:
    model, x = build()

    def at(module: nn.Module) -> Any:
        call = lambda p: torch.func.functional_call(module, p, (x,))  # noqa: E731
        return torch.func.jvp(call, (parameters,), (tangents,))[1]

    model.opaque = nn.Linear(3, 2).double()  # type: ignore[assignment]
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: torch.ones_like(p) for name, p in parameters.items()}
    gm = fxreg.transform(model, fxreg.Rule(fxreg.clip_global_norm(0.3)))
    torch.testing.assert_close(at(gm), at(model))


@pytest.mark.slow
def test_compiled_by_inductor_it_is_the_same_and_compiles_once() -> None:
    torch._dynamo.reset()
    model, x = build()
    model.opaque = nn.Linear(3, 2).double()  # type: ignore[assignment]
    rules = [fxreg.Rule(fxreg.clip_value(0.5)), fxreg.Rule(fxreg.clip_global_norm(0.3)), fxreg.Rule(fxreg.l2(0.1))]
    gm = fxreg.transform(model, rules)
    wanted = {n: None if g is None else g.clone() for n, g in gradients(model, gm, x).items()}
    counter = CompileCounterWithBackend("inductor")
    run: Any = torch.compile(gm, backend=counter, fullgraph=True)
    for _ in range(2):
        assert_same(gradients(model, run, x), wanted, 1e-12)
    assert counter.frame_count == 1


def test_layers_that_are_sharded_by_themselves_are_refused(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for rule in (fxreg.Rule(fxreg.clip_global_norm(0.3)), fxreg.Rule(fxreg.l2(0.3), via="gradient")):
        model, x = build(torch.float32)
        model.second = nn.Linear(3, 3)
        gm = fxreg.transform(model, rule)
        fully_shard(model.first)
        with pytest.raises(fxreg.CaptureError, match=r"Linear was sharded by itself .*'weight'.*as a whole"):
            gm(x)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_in_parallel_each_rank_clips_its_own(mesh: Any, way: str) -> None:
    from torch.distributed.fsdp import fully_shard

    model, x = build(torch.float32)
    wanted = clipped(model, x, list(dict(model.named_parameters())), 0.3)
    wanted = {n: None if g is None else g.clone() for n, g in wanted.items()}
    gm = fxreg.transform(model, fxreg.Rule(fxreg.clip_global_norm(0.3)))
    if way == "fsdp":
        run: Any = fully_shard(gm)
    else:
        run = nn.parallel.DistributedDataParallel(gm, find_unused_parameters=True)
    for _ in range(2):
        found = gradients(model, run, x)
    assert_same(
        {n: g if g is None else getattr(g, "full_tensor", lambda g=g: g)() for n, g in found.items()}, wanted, 1e-5
    )


def test_what_another_rule_freezes_is_not_in_the_norm_and_verification_knows() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double(), torch.randn(5, 3).double()
    rules = [fxreg.Rule(fxreg.clip_global_norm(0.1)), fxreg.Rule(fxreg.freeze(), name="0")]
    gm = fxreg.transform(model, rules, example_inputs=(x,))
    gm(x).square().sum().backward()
    assert model[0].weight.grad is None
    own = list(model[1].parameters())
    grads = torch.autograd.grad(model(x).square().sum(), own)
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    for parameter, grad in zip(own, grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad * (0.1 / (norm + 1e-6)), rtol=1e-12, atol=1e-12)
