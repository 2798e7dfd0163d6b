"""What is done to a model after `transform` is honoured, or an error: never silently something else."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize, prune

import fxreg

from .marks import slow_but

X = torch.linspace(-1.0, 1.0, 8).reshape(2, 4)
STRENGTH = 0.3


class Odd(nn.Module):
    """No Linear, with all that a Linear has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


class Branching(Body):
    """One call in the graph, and no graph break in compiled code."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if len(x) < 100 else -x)


class Net(nn.Module):
    def __init__(self, body: Callable[[], nn.Module] = Body) -> None:
        super().__init__()
        self.body, self.c, self.norm = body(), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.c(self.body(x)))


class BranchingNet(Net):
    def __init__(self) -> None:
        super().__init__(Branching)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if len(x) < 100 else -x)


def tied(make: Callable[[], Net]) -> Net:
    model = make()
    model.body.b.weight = model.body.a.weight  # type: ignore[union-attr]
    return model


MODELS: dict[str, tuple[Callable[[], Any], bool]] = {
    "transparent": (Net, False),
    "opaque": (lambda: Net(Branching), False),
    "recorded": (BranchingNet, True),
    "opaque root": (BranchingNet, False),
}
"""And whether there are examples."""

WEIGHTS = fxreg.Rule(fxreg.l1(STRENGTH), layer="Linear", param="weight")


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make()


def emit_from(model: nn.Module, has_examples: bool, *rules: fxreg.Rule, emit: Any = "backward") -> Any:
    return fxreg.transform(model, rules or [WEIGHTS], example_inputs=(X,) if has_examples else None, emit=emit)


def put(owner: nn.Module, name: str, value: Any) -> None:
    """Instead of a parameter, something that is none."""
    delattr(owner, name)
    setattr(owner, name, value)


def put_buffer(owner: nn.Module, name: str) -> None:
    value = getattr(owner, name).detach().clone()
    delattr(owner, name)
    owner.register_buffer(name, value)


def fresh(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone() + 1)


# What rules mean after it is something else.
DIFFERENT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "tied": (lambda m: setattr(m.body.b, "weight", m.body.a.weight), "'body.b.weight' is one with 'body.a.weight' now"),
    "tied to one of another rule": (lambda m: setattr(m.c, "weight", m.body.b.weight), "is one with"),
    "shared": (lambda m: setattr(m.body, "b", m.body.a), "'body.b.weight' is one with 'body.a.weight' now"),
    "parametrized": (
        lambda m: parametrize.register_parametrization(m.body.b, "weight", Doubled()),
        "'body.b.weight' is computed by a parametrization now",
    ),
    "parametrized by torch": (
        lambda m: nn.utils.parametrizations.weight_norm(m.body.b),
        "'body.b.weight' is computed by a parametrization now",
    ),
    "pruned": (lambda m: prune.l1_unstructured(m.body.b, "weight", 0.5), "'body.b.weight' is a plain Tensor now"),
    "a tensor": (lambda m: put(m.body.b, "weight", torch.ones(4, 4)), "'body.b.weight' is a plain Tensor now"),
    "a tensor with a gradient": (
        lambda m: put(m.body.b, "weight", torch.ones(4, 4, requires_grad=True)),
        "'body.b.weight' is a plain Tensor now",
    ),
    "a buffer": (lambda m: put_buffer(m.body.b, "weight"), "'body.b.weight' is a buffer now"),
    "another kind of layer": (lambda m: setattr(m.body, "b", Odd()), "'body.b.weight' belongs to a Odd now"),
    "another kind of first layer": (lambda m: setattr(m.body, "a", Odd()), "'body.a.weight' belongs to a Odd now"),
    "a new layer in a layer": (
        lambda m: m.body.b.add_module("extra", nn.Linear(2, 2)),
        "'body.b.extra.weight' is new",
    ),
}

UNTIED: dict[str, Callable[[Any], Any]] = {
    "untied": lambda m: setattr(m.body.b, "weight", fresh(m.body.b.weight)),
    "the first untied": lambda m: setattr(m.body.a, "weight", fresh(m.body.b.weight)),
    "assigned": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
}


def calls(gm: Any, is_compiled: bool) -> Any:
    if not is_compiled:
        return gm
    torch.compiler.reset()
    return torch.compile(gm, backend="aot_eager")


def refuses_after(model: Any, run: Any, change: Callable[[Any], Any], message: str) -> None:
    """It runs, and after the change it does not, also not again."""
    for _ in range(2):
        run(X)
    change(model)
    for _ in range(2):
        with pytest.raises(fxreg.CaptureError, match="model changed") as raised:
            run(X)
        assert message in str(raised.value) or "since it was captured" in str(raised.value), raised.value


def everywhere(changes: Any, compiled_elsewhere: Any) -> list[Any]:
    """Cases of every change, in eager mode for every model, and compiled where the graph shows all, and somewhere."""
    compiled = [("transparent", name) for name in changes] + compiled_elsewhere
    return [(kind, name, False) for kind in MODELS for name in changes] + [
        pytest.param(*case, True, marks=pytest.mark.slow) for case in compiled
    ]


@pytest.mark.parametrize(
    ("kind", "change", "is_compiled"),
    everywhere(
        DIFFERENT,
        [
            ("opaque root", "tied"),
            ("opaque root", "pruned"),
            ("opaque", "a new layer in a layer"),
        ],
    ),
)
def test_a_change_of_what_rules_mean_is_an_error(kind: str, change: str, is_compiled: bool) -> None:
    make, has_examples = MODELS[kind]
    model = seeded(make)
    gm = emit_from(model, has_examples)
    refuses_after(model, calls(gm, is_compiled), *DIFFERENT[change])


@pytest.mark.parametrize(("kind", "change", "is_compiled"), everywhere(UNTIED, [("opaque root", "untied")]))
def test_untied_weights_are_an_error(kind: str, change: str, is_compiled: bool) -> None:
    make, has_examples = MODELS[kind]
    model = seeded(lambda: tied(make))
    gm = emit_from(model, has_examples)
    refuses_after(model, calls(gm, is_compiled), UNTIED[change], "no longer one with")


RULES = {
    "penalty": WEIGHTS,
    "gradient": fxreg.Rule(fxreg.l1(STRENGTH), layer="Linear", param="weight", via="gradient"),
    "transform": fxreg.Rule(fxreg.clip_norm(0.1), layer="Linear", param="weight"),
    "joint": fxreg.Rule(fxreg.clip_global_norm(0.1), layer="Linear", param="weight"),
    "optimizer": fxreg.Rule(fxreg.l2(STRENGTH), layer="Linear", param="weight", via="optimizer"),
    "proximal": fxreg.Rule(fxreg.l1(STRENGTH), layer="Linear", param="weight", via="proximal"),
}


@pytest.mark.filterwarnings("ignore:fxreg. rules .* act through the optimizer")
@pytest.mark.parametrize("emit", ["backward", "output", "loss"])
@pytest.mark.parametrize("via", RULES)
@pytest.mark.parametrize("kind", ["transparent", "opaque root"])
def test_it_is_for_every_lowering(kind: str, via: str, emit: str) -> None:
    class Summed(MODELS[kind][0]):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sum()

    for change, message in (DIFFERENT["tied"], DIFFERENT["parametrized"]):
        model = seeded(Summed)
        gm = emit_from(model, False, RULES[via], emit=emit)
        refuses_after(model, gm, change, message)
    model = seeded(lambda: tied(Summed))
    gm = emit_from(model, False, RULES[via], emit=emit)
    refuses_after(model, gm, UNTIED["untied"], "no longer one with")


# What rules mean after it is the same, or can be done.
SAME: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda m: None,
    "another parameter": lambda m: setattr(m.body.b, "weight", fresh(m.body.b.weight)),
    "assigned": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True),
    "another layer of its kind": lambda m: setattr(m.body, "b", nn.Linear(4, 4)),
    "frozen": lambda m: m.body.b.weight.requires_grad_(False),
    "all frozen but one": lambda m: m.requires_grad_(False).c.weight.requires_grad_(True),
    "cast": lambda m: m.double().float(),
    "swapped": lambda m: m.body.b.load_state_dict(m.body.a.state_dict()),
    "parametrized elsewhere": lambda m: parametrize.register_parametrization(m.body.b, "bias", Doubled()),
    "a new layer of another kind": lambda m: m.body.b.add_module("extra", Odd()),
    "tied elsewhere": lambda m: setattr(m.body.b, "bias", m.body.a.bias),
}


def gradients_by_hand(model: Any) -> dict[str, Tensor | None]:
    owners = [m for m in model.modules() if isinstance(m, nn.Linear)]
    weights = {id(p): p for m in owners if (p := m._parameters.get("weight")) is not None}
    loss = model(X).square().sum() + sum(STRENGTH * p.abs().sum() for p in weights.values())
    return gradients(model, loss)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor | None]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


def assert_gradients(model: Any, loss: Tensor) -> None:
    found, wanted = gradients(model, loss), gradients_by_hand(model)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    ("kind", "change", "is_compiled"),
    everywhere(SAME, [("opaque root", "assigned"), ("recorded", "another layer of its kind")]),
)
def test_what_is_replaced_is_regularized(kind: str, change: str, is_compiled: bool) -> None:
    make, has_examples = MODELS[kind]
    model = seeded(make)
    gm = emit_from(model, has_examples)
    run = calls(gm, is_compiled)
    run(X)
    SAME[change](model)
    for _ in range(2):
        assert_gradients(model, run(X).square().sum())


# Rules that select by more.


def emit_and_run(model: Any, rule: fxreg.Rule) -> Any:
    gm = fxreg.transform(model, rule)
    gm(X)
    return gm


def test_another_shape_counts_where_a_rule_asks_for_it() -> None:
    def narrow(model: Any) -> None:
        model.body.a, model.body.b = nn.Linear(4, 3), nn.Linear(3, 4)

    model = seeded(Net)
    gm = emit_and_run(model, fxreg.Rule(fxreg.l1(STRENGTH), layer="Linear", param="weight"))
    narrow(model)
    assert_gradients(model, gm(X).square().sum())
    for rule in (
        fxreg.Rule(fxreg.l1(STRENGTH), where=lambda site: site.numel > 13),
        fxreg.Rule(fxreg.l2_sp(STRENGTH), param="weight"),
        fxreg.Rule(fxreg.group_lasso(STRENGTH, dim=0, size=2), layer="Linear", param="weight"),
    ):
        model = seeded(Net)
        refuses_after(model, fxreg.transform(model, rule), narrow, "'body.a.weight' has the shape (3, 4) now")


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_a_rule_asks_of_parameters_is_asked_again(is_compiled: bool) -> None:
    def freeze(model: Any) -> None:
        model.body.a.weight.requires_grad_(False)

    for where, change in (
        (lambda site: site.trainable, freeze),
        (lambda site: site.dtype == torch.float32, lambda m: m.body.double()),
    ):
        rule = fxreg.Rule(fxreg.l1(STRENGTH), layer="Linear", param="weight", where=where)
        model = seeded(Net)
        gm = fxreg.transform(model, rule)
        given = {name: p.detach() for name, p in model.named_parameters()}
        torch.func.functional_call(gm, given, (X,))
        refuses_after(model, calls(gm, is_compiled), change, "of 'body.a.weight' the rules say something else now")
        model = seeded(Net)
        gm = fxreg.transform(model, rule)
        change(model)
        with pytest.raises(fxreg.CaptureError, match=r"of 'body\.a\.weight' the rules say something else now"):
            gm(X)
    model = seeded(Net)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(STRENGTH), layer="Linear", where=lambda s: s.param == "weight"))
    freeze(model)
    assert_gradients(model, gm(X).square().sum())


def test_emptied_ties_are_to_be_tied_again() -> None:
    with torch.device("meta"):
        model = tied(Net)
        gm = emit_from(model, False)
    gm.to_empty(device="cpu")
    with pytest.raises(fxreg.CaptureError, match="no longer one with"):
        gm(X)
    model.body.b.weight = model.body.a.weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    assert_gradients(model, gm(X).square().sum())


@pytest.mark.parametrize("emit", slow_but(["backward"], ["backward", "output", "loss"]))
@pytest.mark.parametrize("via", ["penalty", "gradient", "transform", "joint"])
@pytest.mark.parametrize("kind", ["transparent", "opaque root"])
def test_what_is_honoured_is_what_another_transform_would_do(kind: str, via: str, emit: Any) -> None:
    class Summed(MODELS[kind][0]):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square().sum()

    for change in SAME.values():
        model = seeded(Summed)
        gm = emit_from(model, False, RULES[via], emit=emit)
        gm(X)
        change(model)
        one, other = gm(X), emit_from(model, False, RULES[via], emit=emit)(X)
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        one, other = (sum(loss) if emit == "output" else loss for loss in (one, other))
        torch.testing.assert_close(gradients(model, one), gradients(model, other), rtol=0, atol=0)


def test_activations_are_those_of_the_layers_that_are_there() -> None:
    class Active(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Tanh(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.b(self.first(self.a(x if len(x) < 100 else -x))))

    for layer in ("Tanh", "ReLU"):
        model = seeded(lambda: Net(Active))
        gm = emit_and_run(model, fxreg.Rule(fxreg.l1(STRENGTH), layer=layer, on="output"))
        model.body.a = nn.Linear(4, 4)
        gm(X)
        refuses_after(model, gm, lambda m: setattr(m.body, "first", nn.ReLU()), "the output of body.first")


def test_another_name_for_the_same_parameter_changes_no_penalty() -> None:
    """A transform has a stand-in for each name."""
    for via, name in (("penalty", "body.*"), ("gradient", "body.*"), ("penalty", "c"), ("gradient", "c")):
        model = seeded(Net)
        rule = fxreg.Rule(fxreg.l1(STRENGTH), name=name, param="weight", via=via)
        gm = emit_and_run(model, rule)
        model.norm.unused = nn.Linear(4, 4)
        model.norm.unused.weight = model.c.weight if name == "c" else model.body.b.weight
        if via == "gradient":
            with pytest.raises(fxreg.CaptureError, match=r"'norm\.unused\.weight' is new"):
                gm(X)
            continue
        once = [model.c.weight] if name == "c" else [model.body.a.weight, model.body.b.weight]
        expected = gradients(model, model(X).square().sum() + sum(STRENGTH * p.abs().sum() for p in once))
        found = gradients(model, gm(X).square().sum())
        assert all(torch.equal(found[n], g) if g is not None else found[n] is None for n, g in expected.items())


# Where the emitted module itself is changed.


@pytest.mark.parametrize("kind", ["transparent", "recorded"])
def test_the_emitted_modules_children_are_the_models(kind: str) -> None:
    make, has_examples = MODELS[kind]
    for change in (
        lambda m, gm: gm.add_module("extra", nn.Linear(4, 4)),
        lambda m, gm: m.add_module("extra", nn.Linear(4, 4)),
        lambda m, gm: setattr(gm, "c", nn.Linear(4, 4)),
        lambda m, gm: setattr(m, "c", nn.Linear(4, 4)),
        lambda m, gm: delattr(gm, "c"),
    ):
        model = seeded(make)
        gm = emit_from(model, has_examples)
        gm(X)
        change(model, gm)
        with pytest.raises(fxreg.CaptureError, match=r"the model changed"):
            gm(X)


def test_a_child_that_is_replaced_in_both_is_replaced_in_all_graphs_or_refused() -> None:
    for kind in ("transparent", "recorded"):
        make, has_examples = MODELS[kind]
        model = seeded(make)
        gm = emit_from(model, has_examples)
        model.c = gm.c = nn.Linear(4, 4)
        if has_examples:
            with pytest.raises(fxreg.CaptureError, match="its module 'c' is not the emitted module's"):
                gm(X)
        else:
            assert_gradients(model, gm(X).square().sum())


# Copies, and back again.


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_look_for_themselves(how: Any) -> None:
    model = seeded(lambda: tied(Net))
    gm = emit_from(model, False)
    gm(X)
    other_model, other = how((model, gm))
    other_model.body.b.weight = fresh(other_model.body.b.weight)
    with pytest.raises(fxreg.CaptureError, match="no longer one with"):
        other(X)
    gm(X)
    model.body.b.weight = fresh(model.body.b.weight)
    _, late = how((model, gm))
    for one in (gm, late):
        with pytest.raises(fxreg.CaptureError, match="no longer one with"):
            one(X)


def test_a_pickle_has_no_rules_and_refuses_other_layouts() -> None:
    for change, is_refused in (
        (SAME["another parameter"], False),
        (SAME["assigned"], False),
        (SAME["another layer of its kind"], False),
        (SAME["a new layer of another kind"], True),
        (SAME["parametrized elsewhere"], True),
        (SAME["tied elsewhere"], True),
        (DIFFERENT["another kind of layer"][0], True),
    ):
        model, gm = pickle.loads(pickle.dumps((made := seeded(Net), emit_from(made, False))))
        gm(X)
        change(model)
        if is_refused:
            with pytest.raises(fxreg.CaptureError, match="the model changed since it was transformed"):
                gm(X)
        else:
            assert_gradients(model, gm(X).square().sum())


def test_a_pickle_keeps_what_was_honoured() -> None:
    model = seeded(Net)
    gm = emit_from(model, False)
    SAME["a new layer of another kind"](model)
    gm(X)
    model, gm = pickle.loads(pickle.dumps((model, gm)))
    assert_gradients(model, gm(X).square().sum())


def test_what_is_put_back_is_right_again() -> None:
    model = seeded(lambda: tied(Net))
    gm = emit_from(model, False)
    gm(X)
    UNTIED["assigned"](model)
    with pytest.raises(fxreg.CaptureError):
        gm(X)
    model.body.b.weight = model.body.a.weight
    assert_gradients(model, gm(X).square().sum())
    parametrize.register_parametrization(model.c, "weight", Doubled())
    with pytest.raises(fxreg.CaptureError):
        gm(X)
    parametrize.remove_parametrizations(model.c, "weight", leave_parametrized=False)
    assert_gradients(model, gm(X).square().sum())
    parametrize.register_parametrization(model.body.b, "weight", Doubled())  # of what is body.a's, which is penalized
    assert_gradients(model, gm(X).square().sum())


# What else reads parameters by name.


def test_functional_calls_count_what_they_are_given() -> None:
    model = seeded(Net)
    gm = emit_from(model, False)
    given = {name: fresh(p) for name, p in model.named_parameters()}
    parameters = [*given.values()]
    weights = [given[f"{layer}.weight"] for layer in ("body.a", "body.b", "c")]
    for _ in range(2):
        wanted = torch.func.functional_call(model, given, (X,)).square().sum()
        wanted = torch.autograd.grad(wanted + sum(STRENGTH * p.abs().sum() for p in weights), parameters)
        found = torch.autograd.grad(torch.func.functional_call(gm, given, (X,)).square().sum(), parameters)
        torch.testing.assert_close(found, wanted)
    with pytest.raises(fxreg.CaptureError, match=r"'body\.b\.weight' is one with 'body\.a\.weight' now"):
        torch.func.functional_call(gm, {**given, "body.b.weight": given["body.a.weight"]}, (X,))
    gm(X)
    model = seeded(lambda: tied(Net))
    gm = emit_from(model, False)
    torch.func.functional_call(gm, {"body.a.weight": given["body.a.weight"]}, (X,))
    with pytest.raises(fxreg.CaptureError, match="no longer one with"):
        torch.func.functional_call(gm, {"body.a.weight": given["body.a.weight"]}, (X,), tie_weights=False)


def test_a_look_is_all_that_calls_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(Net)
    gm = emit_from(model, False, WEIGHTS, fxreg.Rule(fxreg.l2(STRENGTH), where=lambda site: site.trainable))
    gm(X)
    monkeypatch.setattr("fxreg.rematching.layout_of", pytest.fail)
    SAME["another parameter"](model)
    for _ in range(2):
        gm(X)
        torch.func.functional_call(gm, {name: p.detach().clone() for name, p in model.named_parameters()}, (X,))


def one_layer_at_a_time(gm: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in (gm.body.a, gm.body.b, gm.c):
        fully_shard(layer)
    return fully_shard(gm)


def flat(gm: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(gm, use_orig_params=True, device_id=torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`", "ignore:The `NO_SHARD` sharding")
@pytest.mark.parametrize("is_pickled", [False, True])
@pytest.mark.parametrize("way", [one_layer_at_a_time, flat, nn.parallel.DistributedDataParallel])
def test_sharded_parameters_are_the_same_ones(mesh: Any, way: Any, is_pickled: bool) -> None:
    """Without the rules, too: the classes that layers get are subclasses of theirs."""
    model = seeded(Net)
    wanted = gradients_by_hand(model)
    gm = emit_from(model, False)
    gm = pickle.loads(pickle.dumps(gm)) if is_pickled else gm
    run = way(gm)
    for _ in range(2):
        run.zero_grad()
        run(X).square().sum().backward()
        for parameter, grad in zip(run.parameters(), wanted.values(), strict=True):
            found = getattr(parameter.grad, "full_tensor", lambda p=parameter: p.grad)()
            torch.testing.assert_close(found.reshape(grad.shape), grad)  # type: ignore[union-attr]


@pytest.mark.slow
def test_what_is_sharded_and_compiled_is_looked_at(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.compiler.reset()
    model = seeded(Net)
    run = torch.compile(fully_shard(emit_from(model, False)), backend="eager")
    refuses_after(model, run, DIFFERENT["a new layer in a layer"][0], "'body.b.extra.weight' is new")


def test_values_and_verification_are_of_the_model_as_it_is() -> None:
    model = seeded(Net)
    gm = emit_from(model, False)
    SAME["another parameter"](model)
    weights = [model.body.a.weight, model.body.b.weight, model.c.weight]
    torch.testing.assert_close(fxreg.penalties(gm)["l1"], sum(STRENGTH * w.detach().abs().sum() for w in weights))
    fxreg.verify(gm, model, (X,))
    DIFFERENT["tied"][0](model)
    with pytest.raises(fxreg.CaptureError, match="is one with"):
        fxreg.penalties(gm)
    with pytest.raises(fxreg.CaptureError, match="is one with"):
        fxreg.verify(gm, model, (X,))
    assert fxreg.explain(gm).plan.edits


def test_a_proximal_step_knows_its_parameters() -> None:
    model = seeded(Net)
    gm = fxreg.transform(model, RULES["proximal"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = fxreg.ProximalStep(optimizer, gm)
    gm(X).square().sum().backward()
    optimizer.step()
    SAME["another parameter"](model)
    gm(X).square().sum().backward()
    with pytest.raises(fxreg.RuleError, match=r"'body\.b\.weight', and the model has another parameter"):
        optimizer.step()
    step.remove()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fxreg.ProximalStep(optimizer, gm)
    optimizer.step()


@pytest.mark.slow
def test_a_proximal_step_is_not_made_for_a_model_that_changed() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.1), param="weight", via="proximal"))
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(fxreg.CaptureError, match="is computed by a parametrization now"):
        fxreg.ProximalStep(torch.optim.SGD(model.parameters(), lr=0.1), gm)


def test_a_whole_step_looks() -> None:
    model = seeded(Net)
    gm = emit_from(model, False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = fxreg.train_step(gm, nn.functional.mse_loss, optimizer, backend="eager")
    step(X, X)
    DIFFERENT["tied"][0](model)
    with pytest.raises(fxreg.FxregError, match=r"is one with 'body\.a\.weight' now"):
        step(X, X)


# In compiled code.


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_is_one_graph_that_is_compiled_once(backend: str) -> None:
    torch.compiler.reset()
    model = seeded(Net)
    gm = emit_from(model, False)
    counter = CompileCounterWithBackend(backend)
    run: Any = torch.compile(nn.Sequential(gm, nn.Tanh()), backend=counter, fullgraph=True)
    for _ in range(3):
        wanted = gradients(model, gm(X).tanh().square().sum())
        for name, grad in gradients(model, run(X).square().sum()).items():
            torch.testing.assert_close(grad, wanted[name])
        SAME["another parameter"](model)
        SAME["assigned"](model)
    SAME["parametrized elsewhere"](model)
    DIFFERENT["tied"][0](model)
    assert counter.frame_count == 1
    for _ in range(2):
        with pytest.raises(Exception, match=r"'body\.b\.weight' is one with 'body\.a\.weight' now"):
            run(X)


def test_where_nothing_is_looked_at_is_known() -> None:
    """What docs/capture.md says of compiled functional calls."""
    torch.compiler.reset()
    model = seeded(Net)
    gm = emit_from(model, False)
    run = torch.compile(lambda p, x: torch.func.functional_call(gm, p, (x,)), backend="eager", fullgraph=True)
    given = {name: fresh(p) for name, p in model.named_parameters()}
    run(given, X)
    run({**given, "body.b.weight": given["body.a.weight"]}, X)
    DIFFERENT["tied"][0](model)
    del given["body.b.weight"]
    with pytest.raises(Exception, match="is one with"):
        run(given, X)
    gm.forward(X)
