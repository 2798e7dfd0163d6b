"""`fxreg.param_groups`: an optimizer's own option carries out a rule exactly, or the rule is refused."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import fxreg

STRENGTH = 0.03
STEPS = 12

COUPLED: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "sgd": (optim.SGD, {"lr": 0.1}),
    "sgd, momentum and dampening": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1}),
    "sgd, nesterov": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "asgd": (optim.ASGD, {"lr": 0.05, "t0": 4.0}),
    "adam": (optim.Adam, {"lr": 0.05}),
    "adam, amsgrad": (optim.Adam, {"lr": 0.05, "amsgrad": True}),
    "adamax": (optim.Adamax, {"lr": 0.05}),
    "nadam": (optim.NAdam, {"lr": 0.05}),
    "radam": (optim.RAdam, {"lr": 0.05}),
    "adagrad": (optim.Adagrad, {"lr": 0.05}),
    "adadelta": (optim.Adadelta, {"lr": 0.5}),
    "rmsprop, centered": (optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}),
}


class Net(nn.Module):
    """A tied weight, a frozen one, an unused one, biases and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.fixed = nn.Linear(4, 4)
        self.fixed.weight.requires_grad_(False)
        self.decode = nn.Linear(4, 7)
        self.decode.weight = self.embed.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        return self.decode(self.norm(h + torch.tanh(self.fixed(self.body(h)))))


def make(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net().double()


TOKENS = torch.tensor([0, 3, 5, 6, 2, 1])
USED = ("embed.weight", "body.weight")
"""The trainable weights of rank 2 that the loss reaches."""


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(TOKENS), TOKENS.roll(1))


def train(
    model: nn.Module,
    optimizer: optim.Optimizer,
    steps: int = STEPS,
    penalty: Callable[[], Tensor | float] = lambda: 0.0,
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (loss_of(model) + penalty()).backward()
        optimizer.step()


def assert_same(model: nn.Module, reference: nn.Module, tolerance: float = 1e-12) -> None:
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(
            parameter, expected, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def weight_rule(effect: Any = None, **kwargs: Any) -> fxreg.Rule:
    effect = fxreg.l2(STRENGTH) if effect is None else effect
    return fxreg.Rule(effect, layer=("Linear", "Embedding"), param="weight", via="optimizer", **kwargs)


def decays(groups: Iterable[dict[str, Any]], model: nn.Module) -> dict[str, float]:
    """`weight_decay` by the parameter's name; fails if a parameter is there twice."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pairs = [(names[id(p)], group["weight_decay"]) for group in groups for p in group["params"]]
    assert len(pairs) == len(dict(pairs)), "a parameter stands in two groups"
    return dict(pairs)


# Exactly the penalty.


@pytest.mark.parametrize("name", COUPLED)
def test_l2_of_strength_s_trains_as_the_hand_written_penalty(name: str) -> None:
    cls, options = COUPLED[name]
    by_hand, model = make(), make()
    weights = [by_hand.get_parameter(n) for n in USED]
    train(
        by_hand, cls(by_hand.parameters(), **options), penalty=lambda: STRENGTH * sum(w.square().sum() for w in weights)
    )
    train(model, cls(fxreg.param_groups(model, weight_rule(), cls), **options))
    assert_same(model, by_hand)


@pytest.mark.parametrize("name", COUPLED)
def test_the_hand_written_penalty_matters_in_that_comparison(name: str) -> None:
    cls, options = COUPLED[name]
    plain, model = make(), make()
    train(plain, cls(plain.parameters(), **options))
    train(model, cls(fxreg.param_groups(model, weight_rule(), cls), **options))
    assert (plain.get_parameter("body.weight") - model.get_parameter("body.weight")).abs().max() > 1e-6


@pytest.mark.parametrize("how", ["foreach", "fused"])
@pytest.mark.parametrize("name", ["sgd, nesterov", "adam", "adagrad"])
def test_the_groups_serve_foreach_and_fused_optimizers(name: str, how: str) -> None:
    cls, options = COUPLED[name]
    by_hand, model = make(), make()
    weights = [by_hand.get_parameter(n) for n in USED]
    train(
        by_hand, cls(by_hand.parameters(), **options), penalty=lambda: STRENGTH * sum(w.square().sum() for w in weights)
    )
    train(model, cls(fxreg.param_groups(model, weight_rule(), cls), **options, **{how: True}))
    assert_same(model, by_hand, 1e-11)


@pytest.mark.parametrize("cls", [optim.Adam, optim.NAdam, optim.RAdam])
def test_decoupled_weight_decay_in_the_constructor_does_not_undo_an_l2_rule(cls: type[optim.Optimizer]) -> None:
    by_hand, model = make(), make()
    weights = [by_hand.get_parameter(n) for n in USED]
    train(
        by_hand, cls(by_hand.parameters(), lr=0.05), penalty=lambda: STRENGTH * sum(w.square().sum() for w in weights)
    )
    groups = fxreg.param_groups(model, weight_rule(), cls)
    train(model, cls(groups, lr=0.05, decoupled_weight_decay=True))
    assert_same(model, by_hand)


def test_l2_from_the_optimizer_equals_l2_in_the_graph() -> None:
    model, other = make(), make()
    rule = fxreg.Rule(fxreg.l2(STRENGTH), layer=("Linear", "Embedding"), param="weight", exclude="unused.*")
    gm = fxreg.transform(other, [rule])
    train(gm, optim.SGD(other.parameters(), lr=0.1, momentum=0.9))
    train(model, optim.SGD(fxreg.param_groups(model, weight_rule()), lr=0.1, momentum=0.9))
    assert_same(model, other)


def test_a_parameter_without_gradient_is_not_decayed_though_a_loss_term_would_move_it() -> None:
    by_hand, model = make(), make()
    unused = by_hand.get_parameter("unused.weight")
    train(by_hand, optim.SGD(by_hand.parameters(), lr=0.1), penalty=lambda: STRENGTH * unused.square().sum())
    train(model, optim.SGD(fxreg.param_groups(model, weight_rule()), lr=0.1))
    assert torch.equal(model.get_parameter("unused.weight"), make().get_parameter("unused.weight"))
    assert not torch.equal(unused, make().get_parameter("unused.weight"))


# The optimizer's own option.


@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD, optim.Adafactor])
def test_weight_decay_is_that_option_of_that_optimizer(cls: type[optim.Optimizer]) -> None:
    by_hand, model = make(), make()
    train(by_hand, cls(by_hand.parameters(), lr=0.05, weight_decay=0.3))
    rule = fxreg.Rule(fxreg.weight_decay(0.3))
    train(model, cls(fxreg.param_groups(model, rule, cls), lr=0.05))
    assert_same(model, by_hand)


def test_weight_decay_keeps_a_decoupled_constructor_option() -> None:
    by_hand, model = make(), make()
    options = {"lr": 0.05, "decoupled_weight_decay": True}
    train(by_hand, optim.Adam(by_hand.parameters(), **options, weight_decay=0.3))
    train(model, optim.Adam(fxreg.param_groups(model, fxreg.Rule(fxreg.weight_decay(0.3)), optim.Adam), **options))
    assert_same(model, by_hand)


def test_adamw_decay_is_not_the_penalty() -> None:
    by_hand, model = make(), make()
    parameters = [p for p in by_hand.parameters() if p.requires_grad]
    adamw = optim.AdamW(fxreg.param_groups(model, fxreg.Rule(fxreg.weight_decay(0.6)), optim.AdamW), lr=0.05)
    train(model, adamw)
    plain = optim.AdamW(by_hand.parameters(), lr=0.05, weight_decay=0.0)
    train(by_hand, plain, penalty=lambda: 0.3 * sum(p.square().sum() for p in parameters))
    assert (model.get_parameter("body.weight") - by_hand.get_parameter("body.weight")).abs().max() > 0.01


@pytest.mark.parametrize("cls", [optim.AdamW, optim.Adafactor, optim.Muon])
def test_l2_is_refused_where_decay_is_not_coupled_and_the_error_names_the_ways_out(cls: type[optim.Optimizer]) -> None:
    with pytest.raises(fxreg.RuleError) as caught:
        fxreg.param_groups(make(), weight_rule(label="shrink"), cls)
    for part in ("rule 'shrink'", "l2(0.03)", cls.__name__, "Adam,", "via='penalty'", "fxreg.weight_decay(d)"):
        assert part in str(caught.value)


@pytest.mark.parametrize("effect", [fxreg.l2(0.1), fxreg.weight_decay(0.1)], ids=repr)
@pytest.mark.parametrize("cls", [optim.LBFGS, optim.Rprop, optim.SparseAdam])
def test_an_optimizer_without_weight_decay_is_refused_and_the_error_names_the_ways_out(
    cls: type[optim.Optimizer], effect: Any
) -> None:
    with pytest.raises(fxreg.RuleError) as caught:
        fxreg.param_groups(make(), weight_rule(effect, label="shrink"), cls)
    for part in ("rule 'shrink'", repr(effect), f"{cls.__name__} has no weight_decay", "via='penalty'"):
        assert part in str(caught.value)


def test_a_subclass_that_may_decay_otherwise_is_refused() -> None:
    class MySGD(optim.SGD):
        pass

    with pytest.raises(fxreg.RuleError, match="MySGD is not known"):
        fxreg.param_groups(make(), weight_rule(), MySGD)


@pytest.mark.parametrize(
    "given", [optim.SGD([torch.zeros(1)], lr=0.1), "SGD", nn.Linear], ids=["instance", "name", "module"]
)
def test_the_optimizer_is_a_class(given: Any) -> None:
    with pytest.raises(fxreg.RuleError, match=r"must be an optimizer class such as torch\.optim\.SGD"):
        fxreg.param_groups(make(), weight_rule(), given)


@pytest.mark.parametrize("effect", [fxreg.l1(0.1), fxreg.group_lasso(0.1), fxreg.clip_norm(1.0)], ids=repr)
def test_an_effect_that_is_no_weight_decay_is_refused_when_the_rule_is_made(effect: Any) -> None:
    with pytest.raises(fxreg.RuleError, match="has no via='optimizer'"):
        fxreg.Rule(effect, via="optimizer")


# Who is in which group.


def test_every_trainable_parameter_stands_in_one_group_once() -> None:
    model = make()
    found = decays(fxreg.param_groups(model, weight_rule()), model)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    chosen = {"embed.weight", "body.weight", "decode.weight", "unused.weight"} & found.keys()
    assert found == {name: 2 * STRENGTH if name in chosen else 0.0 for name in found}
    assert "decode.weight" not in found  # tied: it is embed.weight
    assert "fixed.weight" not in found  # frozen


def test_a_tied_weight_matched_by_its_second_name_is_decayed_once() -> None:
    model = make()
    rule = fxreg.Rule(fxreg.l2(STRENGTH), name="decode", param="weight", via="optimizer")
    found = decays(fxreg.param_groups(model, rule), model)
    assert {name for name, decay in found.items() if decay} == {"embed.weight"}
    assert found["embed.weight"] == 2 * STRENGTH


def test_only_optimizer_rules_make_groups() -> None:
    model = make()
    rules = [fxreg.Rule(fxreg.l2(0.5)), fxreg.Rule(fxreg.l1(0.5), via="gradient"), fxreg.Rule(fxreg.clip_norm(1.0))]
    assert set(decays(fxreg.param_groups(model, rules), model).values()) == {0.0}


def test_a_default_of_the_constructor_does_not_reach_what_no_rule_matched() -> None:
    model = make()
    before = model.get_parameter("body.bias").detach().clone()
    optimizer = optim.SGD(fxreg.param_groups(model, weight_rule()), lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(model.get_parameter("body.bias"), before)


def test_an_optimizer_without_weight_decay_gets_groups_without_it_when_no_rule_needs_it() -> None:
    model = make()
    groups = fxreg.param_groups(model, fxreg.Rule(fxreg.l1(0.1)), optim.Rprop)
    assert all("weight_decay" not in group for group in groups)
    train(model, optim.Rprop(groups, lr=0.01), steps=1)


def test_l2_and_weight_decay_on_one_parameter_add_up() -> None:
    by_hand, model = make(), make()
    train(by_hand, optim.SGD(by_hand.parameters(), lr=0.1, weight_decay=0.2 + 2 * 0.1))
    rules = [fxreg.Rule(fxreg.weight_decay(0.2)), fxreg.Rule(fxreg.l2(0.1), via="optimizer")]
    train(model, optim.SGD(fxreg.param_groups(model, rules), lr=0.1))
    assert_same(model, by_hand)


def test_rules_of_different_strength_make_groups_of_their_own() -> None:
    model = make()
    rules = [
        fxreg.Rule(fxreg.l2(0.1), layer="Linear", param="weight", exclude=("decode.*", "embed.*"), via="optimizer"),
        fxreg.Rule(fxreg.l2(0.2), layer="Embedding", via="optimizer"),
    ]
    found = decays(fxreg.param_groups(model, rules), model)
    assert (found["body.weight"], found["embed.weight"], found["norm.weight"]) == (0.2, 0.4, 0.0)


def test_the_groups_of_the_emitted_module_are_those_of_the_model() -> None:
    model = make()
    gm = fxreg.transform(model, weight_rule())
    shown = [(g["weight_decay"], [id(p) for p in g["params"]]) for g in fxreg.param_groups(gm, weight_rule())]
    assert shown == [
        (g["weight_decay"], [id(p) for p in g["params"]]) for g in fxreg.param_groups(model, weight_rule())
    ]


def test_param_groups_changes_nothing() -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    fxreg.param_groups(model, weight_rule())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert attributes == {path: set(vars(module)) for path, module in model.named_modules()}


def test_the_model_is_a_module() -> None:
    with pytest.raises(fxreg.RuleError, match=r"param_groups: model must be an nn\.Module .*, got None"):
        fxreg.param_groups(None, [])  # type: ignore[arg-type]


def test_a_rule_that_matches_nothing_is_an_error_here_too() -> None:
    with pytest.raises(fxreg.MatchError, match="matched no parameter"):
        fxreg.param_groups(make(), fxreg.Rule(fxreg.l2(0.1), name="nowhere", via="optimizer"))


# Beside groups with options of their own.


def test_a_hand_kept_no_decay_list_is_a_rule() -> None:
    """As transformers' Trainer keeps it: decay on all but biases and normalizations."""
    by_hand, model = make(), make()
    named = [(name, p) for name, p in by_hand.named_parameters() if p.requires_grad]
    listed = {True: [p for n, p in named if "bias" in n or "norm" in n]}
    listed[False] = [p for n, p in named if not ("bias" in n or "norm" in n)]
    theirs = [{"params": listed[spared], "weight_decay": 0.0 if spared else 0.3} for spared in (True, False)]
    train(by_hand, optim.AdamW(theirs, lr=0.05))
    rule = fxreg.Rule(fxreg.weight_decay(0.3), exclude=("*bias*", "*norm*"))
    train(model, optim.AdamW(fxreg.param_groups(model, rule, optim.AdamW), lr=0.05))
    assert_same(model, by_hand)


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}], ids=repr)
@pytest.mark.parametrize("named", [False, True])
def test_learning_rates_of_their_own_stay_and_the_decay_is_the_rules(named: bool, how: dict[str, Any]) -> None:
    by_hand, model = make(), make()
    weights = [by_hand.get_parameter(n) for n in USED]

    def slow(of: nn.Module) -> list[dict[str, Any]]:
        body = of.body.named_parameters() if named else of.body.parameters()
        bias = ("decode.bias", of.decode.bias) if named else of.decode.bias
        return [{"params": body, "lr": 0.01, "momentum": 0.5}, {"params": [bias] if named else bias, "lr": 0.02}]

    groups = slow(by_hand)
    given = {id(p) for p in (*by_hand.body.parameters(), by_hand.decode.bias)}
    rest = [(n, p) for n, p in by_hand.named_parameters() if id(p) not in given]
    groups.append({"params": rest if named else [p for _, p in rest]})
    train(by_hand, optim.SGD(groups, lr=0.1, **how), penalty=lambda: STRENGTH * sum(w.square().sum() for w in weights))
    groups = fxreg.param_groups(model, weight_rule(), groups=slow(model))
    assert [(g.get("lr"), g.get("momentum"), g["weight_decay"]) for g in groups] == [
        (0.01, 0.5, 2 * STRENGTH), (0.01, 0.5, 0.0), (0.02, None, 0.0), (None, None, 2 * STRENGTH), (None, None, 0.0),
    ]  # fmt: skip
    optimizer = optim.SGD(groups, lr=0.1, **how)
    if named:
        assert optimizer.param_groups[0]["param_names"] == ["weight"]
    train(model, optimizer)
    assert_same(model, by_hand, 1e-11)


def test_frozen_and_tied_parameters_of_a_given_group_are_once_there_or_not_at_all() -> None:
    model = make()
    groups = [{"params": [model.decode.weight, model.fixed.weight], "lr": 0.01}]
    found = fxreg.param_groups(model, weight_rule(), groups=groups)
    assert [len(g["params"]) for g in found if "lr" in g] == [1]
    assert decays(found, model) == decays(fxreg.param_groups(model, weight_rule()), model)
    assert len(groups[0]["params"]) == 2
    assert "weight_decay" not in groups[0]


def test_a_group_keeps_its_decoupled_decay_but_where_l2_is_exact_without() -> None:
    model = make()
    groups = [{"params": model.body.parameters(), "decoupled_weight_decay": True}]
    found = fxreg.param_groups(model, weight_rule(), optim.Adam, groups=groups)
    assert [(g["weight_decay"], g.get("decoupled_weight_decay")) for g in found] == [
        (2 * STRENGTH, False), (0.0, True), (2 * STRENGTH, False), (0.0, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            lambda m: [{"params": m.body.parameters(), "weight_decay": 0.1}],
            r"groups\[0\] has a weight_decay of its own",
        ),
        (lambda m: [{"params": []}, {"lr": 0.1}], r"groups\[1\] must be a dict with 'params'"),
        (lambda m: {"params": m.body.parameters()}, r"groups\[0\] must be a dict with 'params', got 'params'"),
        (lambda m: [{"params": [nn.Parameter(torch.ones(1))]}], "has a Parameter that is no parameter of the model"),
        (lambda m: [{"params": ["body.weight"]}], "has a str that is no parameter of the model"),
        (lambda m: [{"params": m.embed.weight}, {"params": m.decode.weight}], r"groups\[1\] has 'embed.weight', which"),
    ],
)
def test_groups_that_say_too_much_or_too_little_are_refused_and_bind_nothing(groups: Any, message: str) -> None:
    model = make()
    gm = fxreg.transform(model, weight_rule())
    with pytest.raises(fxreg.RuleError, match=message):
        fxreg.param_groups(model, weight_rule(), groups=groups(model))
    assert shown_unbound(gm)


# Unbound rules are told of.


def shown_unbound(gm: nn.Module) -> bool:
    report = fxreg.explain(gm)
    assert ("unbound: l2: call fxreg.param_groups" in str(report)) == (report.unbound == ("l2",))
    return bool(report.unbound)


def test_an_unbound_rule_is_shown_and_warns_once_at_the_first_training_forward() -> None:
    gm = fxreg.transform(make(), weight_rule())
    assert shown_unbound(gm)
    with torch.no_grad():
        gm(TOKENS)  # not a training forward
    gm.eval()
    gm(TOKENS)  # nor this
    gm.train()
    with pytest.warns(UserWarning, match=r"rules 'l2' act through the optimizer, but fxreg\.param_groups was never"):
        gm(TOKENS)
    gm(TOKENS)  # a second warning would be an error
    assert shown_unbound(gm)


def test_param_groups_before_transform_binds() -> None:
    model = make()
    fxreg.param_groups(model, weight_rule())
    gm = fxreg.transform(model, weight_rule())
    assert not shown_unbound(gm)
    gm(TOKENS)  # a warning would be an error


@pytest.mark.parametrize("of", ["the model", "gm", "the compiled gm"])
def test_param_groups_after_transform_binds(of: str) -> None:
    model = make()
    rule = fxreg.Rule(fxreg.l2(STRENGTH), name="body", param="weight", via="optimizer")
    gm = fxreg.transform(model, rule)
    given = {"the model": model, "gm": gm, "the compiled gm": torch.compile(gm, backend="eager")}[of]
    found = decays(fxreg.param_groups(given, rule), model)
    assert [name for name, decay in found.items() if decay] == ["body.weight"]
    assert not shown_unbound(gm)
    gm(TOKENS)  # a warning would be an error


def test_a_refused_param_groups_call_binds_nothing() -> None:
    gm = fxreg.transform(make(), weight_rule())
    with pytest.raises(fxreg.RuleError):
        fxreg.param_groups(gm, weight_rule(), optim.AdamW)
    assert shown_unbound(gm)


def test_binding_one_model_leaves_another_unbound() -> None:
    fxreg.param_groups(make(), weight_rule())
    assert shown_unbound(fxreg.transform(make(), weight_rule()))


def test_rules_in_the_graph_are_never_unbound() -> None:
    gm = fxreg.transform(make(), fxreg.Rule(fxreg.l2(0.1)))
    assert fxreg.explain(gm).unbound == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm(TOKENS)


def test_the_graph_of_an_optimizer_rule_is_the_unregularized_graph() -> None:
    model = make()
    gm = fxreg.transform(model, weight_rule())
    assert gm.code == fxreg.transform(model, []).code
    weights = [model.get_parameter(n).detach() for n in (*USED, "fixed.weight", "unused.weight")]
    torch.testing.assert_close(fxreg.penalties(gm)["l2"], STRENGTH * sum(w.square().sum() for w in weights))
