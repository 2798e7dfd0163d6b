"""Malformed rules: every one is a FxregError that says what, where, what was found and how to mend it, and no model
notices that it was tried."""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxreg

thoroughly = settings(max_examples=150, deadline=None, derandomize=True)
briefly = settings(max_examples=40, deadline=None, derandomize=True)


class Encoder(nn.Module):
    """Parameters at three depths, a tie, a buffer, a frozen parameter and a hook: things that must not change."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))
        self.encoder = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
        self.head = nn.Linear(3, 2)
        self.encoder[2].weight = self.encoder[0].weight
        self.head.bias.requires_grad_(False)
        self.head.register_forward_hook(lambda module, args, output: None)
        self.encoder[1].eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x * self.gain))


def everything_about(model: nn.Module) -> Any:
    """What a failed attempt could have touched: values, identities, attributes, hooks, modes."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return (
        {key: (id(value), value._version, value.clone()) for key, value in model.state_dict(keep_vars=True).items()},
        {path: (id(module), type(module), module.training) for path, module in modules.items()},
        {path: {key: id(value) for key, value in vars(module).items()} for path, module in modules.items()},
        {
            (path, key): tuple(value)
            for path, module in modules.items()
            for key, value in vars(module).items()
            if isinstance(value, dict)
        },
        {name: (p.requires_grad, p.grad, p._backward_hooks) for name, p in model.named_parameters()},
    )


def assert_untouched(model: nn.Module, before: Any) -> None:
    state, *rest = before
    now, *others = everything_about(model)
    assert rest == others
    assert state.keys() == now.keys()
    for key, (identity, version, value) in state.items():
        assert (identity, version) == now[key][:2], key
        assert torch.equal(value, now[key][2]), key


def refused(rules: Any, *, model: nn.Module | None = None) -> str:
    """Both ways in refuse the rules alike, with one of fxreg's errors, and leave the model alone."""
    model = model or Encoder()
    before = everything_about(model)
    messages = []
    for attempt in (fxreg.explain, fxreg.transform):
        with pytest.raises(fxreg.FxregError) as caught:
            attempt(model, rules)
        assert type(caught.value) in (fxreg.RuleError, fxreg.MatchError)
        messages.append(str(caught.value))
        assert_untouched(model, before)
    assert messages[0] == messages[1]
    return messages[0]


# Construction.

JUNK: tuple[Any, ...] = (
    None, True, 1, -1.5, float("nan"), 1j, b"Linear", "", "no such thing", object(), ..., int, [], {}, set(), (), [3],
    (None,), range(2), frozenset({1.5}), lambda site: True, nn.Linear(1, 1), nn.Sequential(nn.ReLU()), fxreg, fxreg.l1,
    np.ones(2), np.float64(1), torch.tensor(1.0), torch.ones(2), torch.empty(1, device="meta"), re.compile(b"bytes"),
    [re.compile(b"bytes")], "re:(", "re:[", "re:*", "re:a{99999999999999999999}", "re:" + "(" * 20_000, ["re:("],
    ["*", 3], nn.Linear | nn.Conv2d, list[int], (nn.Linear, "not an identifier"), (nn.Linear, int), "a..b", ".Linear",
)  # fmt: skip


def _is_pattern(value: object) -> bool:
    if isinstance(value, re.Pattern):
        return isinstance(value.pattern, str)
    if not isinstance(value, str):
        return False
    try:
        re.compile(value.removeprefix("re:") if value.startswith("re:") else "")
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _is_collection(value: object) -> bool:
    return isinstance(value, list | tuple | set | frozenset | dict | range)


WELL_FORMED = {
    "effect": lambda value: False,
    "layer": lambda value: value is None or (isinstance(value, type) and issubclass(value, nn.Module)),
    "op": lambda value: value is None or isinstance(value, str) or callable(value),
    "name": lambda value: value is None or _is_pattern(value),
    "param": _is_pattern,
    "exclude": lambda value: _is_pattern(value) or (_is_collection(value) and all(map(_is_pattern, value))),
    "where": lambda value: value is None or callable(value),
    "on": lambda value: False,
    "via": lambda value: value is None,
    "label": lambda value: value is None or (isinstance(value, str) and value),
    "optional": lambda value: isinstance(value, bool),
}


def not_refused(construct: Callable[[Any], object], values: Iterable[Any], mention: str) -> list[str]:
    """The values that get past a constructor, or out of it by anything but a RuleError that mentions a word."""
    found = []
    for value in values:
        shown = f"{type(value).__name__} {repr(value)[:40]}"
        try:
            construct(value)
        except fxreg.RuleError as error:
            if mention not in str(error):
                found.append(f"{shown}: does not mention {mention!r}: {error}")
        except Exception as error:
            found.append(f"{shown}: {type(error).__name__}: {error}")
        else:
            found.append(f"{shown}: accepted")
    return found


@pytest.mark.parametrize("field", WELL_FORMED)
def test_a_malformed_field_is_a_rule_error_at_construction(field: str) -> None:
    malformed = [value for value in JUNK if not WELL_FORMED[field](value)]
    assert not_refused(lambda value: fxreg.Rule(**{"effect": fxreg.l1(0.1), field: value}), malformed, field) == []


@thoroughly
@given(
    fields=st.dictionaries(st.sampled_from(sorted(set(WELL_FORMED) - {"effect"})), st.sampled_from(JUNK)),
    effect=st.sampled_from((fxreg.l1(0.1), fxreg.clip_norm(1.0), fxreg.weight_decay(0.1), *JUNK)),
)
def test_no_combination_of_fields_raises_anything_but_fxreg_errors(fields: dict[str, Any], effect: Any) -> None:
    model = Encoder()
    before = everything_about(model)
    try:
        fxreg.explain(model, fxreg.Rule(effect, **fields))
    except fxreg.FxregError:
        wrong = [field for field, value in fields.items() if not WELL_FORMED[field](value)]
        assert wrong or fields or not isinstance(effect, type(fxreg.l1(1.0)))
    assert_untouched(model, before)


@pytest.mark.parametrize("several", [list, tuple, iter, set, dict.fromkeys])
def test_layers_and_exclusions_may_be_any_iterable(several: Any) -> None:
    rule = fxreg.Rule(
        fxreg.l1(0.1), layer=several([nn.Linear, "BatchNorm1d"]), exclude=several(["head.*", re.compile("gain")])
    )
    for _ in range(2):  # an iterator is read once, at construction
        sites = [edit.site for edit in fxreg.explain(Encoder(), rule).edits]
        assert sites == ["encoder.0.weight", "encoder.0.bias", "encoder.1.weight", "encoder.1.bias", "encoder.2.bias"]


@pytest.mark.parametrize("layer", [nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1)), (nn.ReLU, nn.Linear(1, 1))])
def test_a_module_in_the_place_of_its_class_says_to_give_the_class(layer: Any) -> None:
    cls = "Sequential" if isinstance(layer, nn.Sequential) else "Linear"
    said = f"must be a class, got an instance of {cls}. Give the class, {cls}."
    with pytest.raises(fxreg.RuleError, match=re.escape(f"rule 'l1': layer {said} One module alone")) as caught:
        fxreg.Rule(fxreg.l1(0.1), layer=layer)
    assert "name=" in str(caught.value)
    with pytest.raises(fxreg.RuleError, match=f"{re.escape(f'before: type {said}')}$"):
        fxreg.before(layer)


def test_an_effect_that_was_not_called_says_to_call_it() -> None:
    with pytest.raises(fxreg.RuleError, match=r"lacks its strength.*fxreg\.l1\(") as caught:
        fxreg.Rule(fxreg.l1, label="sparse")
    assert "'sparse'" in str(caught.value)


def test_a_lowering_that_the_effect_lacks_lists_those_it_has() -> None:
    with pytest.raises(fxreg.RuleError) as caught:
        fxreg.Rule(fxreg.l1(0.1), via="optimizer", label="sparse")
    for part in ("'sparse'", "l1", "'optimizer'", "'penalty'", "'gradient'"):
        assert part in str(caught.value)


@pytest.mark.parametrize("effect", [fxreg.clip_norm(1.0), fxreg.freeze(), fxreg.weight_decay(0.1)], ids=repr)
@pytest.mark.parametrize("via", ["penalty", "proximal"])
def test_a_transform_or_an_optimizer_option_is_no_penalty(effect: Any, via: Any) -> None:
    with pytest.raises(fxreg.RuleError, match=f"{effect.name} has no via='{via}'"):
        fxreg.Rule(effect, via=via)


def test_a_pattern_that_does_not_compile_is_shown_with_the_reason() -> None:
    with pytest.raises(fxreg.RuleError) as caught:
        fxreg.Rule(fxreg.l1(0.1), name="re:(enc", label="sparse")
    for part in ("'sparse'", "name=", "re:(enc", "unterminated subpattern"):
        assert part in str(caught.value)


@thoroughly
@given(st.text(alphabet="ab01()[]{}*+?|\\.^$-,", max_size=12))
def test_a_regular_expression_is_refused_exactly_when_python_refuses_it(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's own doubts about "[[": not an error
        try:
            expected = re.compile(text).fullmatch("ab") is not None
        except (re.error, OverflowError):
            with pytest.raises(fxreg.RuleError, match="does not compile"):
                fxreg.Rule(fxreg.l1(0.1), name=f"re:{text}")
            return
        model = nn.ModuleDict({"ab": nn.Linear(1, 1)})
        plan = fxreg.explain(model, fxreg.Rule(fxreg.l1(0.1), name=f"re:{text}", optional=True))
    assert bool(plan.edits) == expected


@thoroughly
@given(name=st.text(max_size=8), param=st.text(max_size=8), exclude=st.lists(st.text(max_size=8), max_size=3))
def test_any_text_is_a_glob(name: str, param: str, exclude: list[str]) -> None:
    if any(text.startswith("re:") for text in (name, param, *exclude)):
        return
    rule = fxreg.Rule(fxreg.l1(0.1), name=name, param=param, exclude=exclude, optional=True)
    fxreg.explain(Encoder(), rule)


@briefly
@given(st.text(min_size=1, max_size=6))
def test_any_text_is_a_label_and_the_key_of_its_strength(label: str) -> None:
    model = Encoder()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.25), param="gain", label=label))
    assert {key: float(value) for key, value in fxreg.strengths(gm).items()} == {label: 0.25}
    gm(torch.zeros(2, 3)).sum().backward()
    assert torch.equal(model.gain.grad, torch.full((3,), 0.25))


WORDS = ("loss_scale", "training", "fxreg", "model", "for", "self", "1", "a.b", "_buffers", "l²")


@pytest.mark.parametrize("label", WORDS)
def test_a_label_that_is_a_word_of_the_machinery_is_a_label_like_any_other(label: str) -> None:
    model = Encoder()
    gm = fxreg.transform(model, [fxreg.Rule(fxreg.l1(0.25), param="gain", label=label)], emit="output")
    output, penalty = gm(torch.zeros(2, 3))
    assert torch.equal(output, model(torch.zeros(2, 3)))
    assert float(penalty.detach()) == 0.75
    assert list(fxreg.penalties(gm)) == [label]


# Strengths and arguments.

NO_STRENGTH = (
    -1, -1e-30, float("inf"), float("-inf"), float("nan"), True, False, None, "1", b"1", 1j, [1.0], (1.0,), {},
    object(), 10**400, -(10**400), torch.ones(1), torch.ones(2), torch.tensor(True), torch.tensor(1j),
    torch.tensor(float("nan")), torch.tensor(-1.0), torch.tensor(1.0, device="meta"), np.ones(2), np.array(None),
    int, fxreg.l1,
)  # fmt: skip
STRONG = {
    "l1": lambda s: fxreg.l1(s),
    "l2": lambda s: fxreg.l2(s),
    "elastic_net.l1": lambda s: fxreg.elastic_net(s, 0.1),
    "elastic_net.l2": lambda s: fxreg.elastic_net(0.1, s),
    "group_lasso": lambda s: fxreg.group_lasso(s),
    "clip_norm": lambda s: fxreg.clip_norm(s),
    "clip_value": lambda s: fxreg.clip_value(s),
    "scale": lambda s: fxreg.scale(s),
    "add_noise": lambda s: fxreg.add_noise(s),
    "weight_decay": lambda s: fxreg.weight_decay(s),
}


@pytest.mark.parametrize("name", STRONG)
def test_a_strength_is_a_finite_number_that_is_not_negative(name: str) -> None:
    assert not_refused(STRONG[name], NO_STRENGTH, "strength") == []


@pytest.mark.parametrize("name", STRONG)
def test_every_other_real_number_is_one(name: str) -> None:
    own = name.partition(".")[2]
    numbers = (0, 0.0, 3, 1e-4, 5e-324, 1e300, np.float64(0.5), np.float32(0.5), np.int64(2))
    for value in (*numbers, torch.tensor(0.5), torch.tensor(2)):
        strengths = STRONG[name](value).strengths
        found = strengths[own] if own else next(iter(strengths.values()))
        assert (found, type(found)) == (float(value), float)


def test_a_refused_strength_names_the_effect_its_parameter_and_the_value() -> None:
    with pytest.raises(fxreg.RuleError) as caught:
        fxreg.elastic_net(0.1, -3.5)
    for part in ("elastic_net", "l2", "-3.5", "not negative"):
        assert part in str(caught.value)


BAD_ARGUMENTS = {
    "l1, nothing": lambda: fxreg.l1(),
    "l1, two": lambda: fxreg.l1(0.1, 0.2),
    "l1, unknown": lambda: fxreg.l1(0.1, weight=3),
    "l1, twice": lambda: fxreg.l1(0.1, strength=0.2),
    "elastic_net, half": lambda: fxreg.elastic_net(0.1),
    "freeze, something": lambda: fxreg.freeze(0.1),
    "group_lasso, float": lambda: fxreg.group_lasso(0.1, dim=0.5),
    "group_lasso, bool": lambda: fxreg.group_lasso(0.1, dim=True),
    "group_lasso, str": lambda: fxreg.group_lasso(0.1, dim="0"),
    "group_lasso, None": lambda: fxreg.group_lasso(0.1, dim=None),
    "group_lasso, mixed": lambda: fxreg.group_lasso(0.1, dim=(0, 0.5)),
    "group_lasso, bools": lambda: fxreg.group_lasso(0.1, dim=(True,)),
    "mask, None": lambda: fxreg.mask(None),
    "mask, list": lambda: fxreg.mask([True]),
    "mask, array": lambda: fxreg.mask(np.ones(2)),
    "add_noise, gamma str": lambda: fxreg.add_noise(0.1, gamma="1"),
    "add_noise, gamma NaN": lambda: fxreg.add_noise(0.1, gamma=float("nan")),
    "add_noise, gamma huge": lambda: fxreg.add_noise(0.1, gamma=10**400),
    "add_noise, seed float": lambda: fxreg.add_noise(0.1, seed=1.0),
    "add_noise, seed bool": lambda: fxreg.add_noise(0.1, seed=True),
    "add_noise, seed past int64": lambda: fxreg.add_noise(0.1, seed=2**63),
    "add_noise, stream": lambda: fxreg.add_noise(0.1, stream=torch.zeros(2, dtype=torch.int64)),
}


@pytest.mark.parametrize("construct", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_wrong_arguments_of_an_effect_are_rule_errors(construct: Any, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id.partition(",")[0]
    with pytest.raises(fxreg.RuleError, match=name):
        construct()


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63)])
def test_any_seed_that_fits_int64_is_one(seed: int) -> None:
    model = Encoder()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.add_noise(0.1, seed=seed), param="gain"))
    gm(torch.ones(2, 3)).sum().backward()
    assert model.gain.grad.isfinite().all()


# The rules and the model themselves.

NO_RULES = {
    "None": lambda: 3,
    "a path that is not there": lambda: "no/such/rules.toml",
    "another": lambda: Path("no/such/rules.yaml"),
    "bytes": lambda: b"rules",
    "an effect": lambda: fxreg.l1(0.1),
    "a definition": lambda: fxreg.l1,
    "effects": lambda: [fxreg.l1(0.1)],
    "the class": lambda: fxreg.Rule,
    "nested": lambda: [[fxreg.Rule(fxreg.l1(0.1))]],
    "one bad": lambda: [fxreg.Rule(fxreg.l1(0.1)), None],
    "dicts": lambda: [{"effect": "l1"}],
    "a generator": lambda: (rule for rule in (fxreg.Rule(fxreg.l1(0.1)), "l1")),
    "a model": lambda: nn.Sequential(nn.Linear(1, 1)),
    "a 0-d tensor": lambda: torch.tensor(1.0),
    "a 1-d tensor": lambda: torch.ones(2),
    "a 0-d array": lambda: np.array(None),
    "ellipsis": lambda: [...],
}


@pytest.mark.parametrize("make", NO_RULES.values(), ids=NO_RULES)
@pytest.mark.parametrize("attempt", [fxreg.explain, fxreg.transform])
def test_what_is_no_sequence_of_rules_is_refused(attempt: Any, make: Any) -> None:
    model = Encoder()
    before = everything_about(model)
    with pytest.raises(fxreg.FxregError):
        attempt(model, make())
    assert_untouched(model, before)


def test_the_position_of_the_odd_one_out_is_named() -> None:
    message = refused([fxreg.Rule(fxreg.l1(0.1)), fxreg.l2(0.5)])
    assert "rules[1]" in message
    assert "l2(0.5)" in message


@pytest.mark.parametrize("attempt", [fxreg.explain, fxreg.transform])
@pytest.mark.parametrize("rules", [[], fxreg.Rule(fxreg.l1(0.1))], ids=["no rules", "a rule"])
def test_what_is_no_module_is_refused(attempt: Any, rules: Any) -> None:
    for model in (None, "model", nn.Linear, torch.ones(2), lambda x: x, {}):
        with pytest.raises(fxreg.FxregError, match=r"nn\.Module"):
            attempt(model, rules)


# Matching.


def test_a_rule_that_matches_nothing_says_so_with_the_nearest_names_and_both_remedies() -> None:
    rule = fxreg.Rule(fxreg.group_lasso(0.1, dim=(0, 1)), layer=nn.Linear, name="encodr.*", label="sparse")
    message = refused(rule)
    for part in (
        "'sparse'",
        "layer=Linear",
        "name='encodr.*'",
        "matched no parameter",
        "'encoder",
        "name=",
        "optional=True",
    ):
        assert part in message
    assert "dim=" not in message.partition("matched")[0], "the conditions are quoted, not the effect's own arguments"


def test_a_layer_that_is_not_there_is_answered_with_layers_and_with_the_names_that_were_given() -> None:
    for layer in ("Conv2d", nn.Conv2d, ("Conv1d", nn.Conv2d)):
        message = refused(fxreg.Rule(fxreg.l1(0.1), layer=layer))
        assert "nearest layers: '" in message
        assert "'Linear'" in message
        assert "nearest parameters" not in message
    assert "nearest modules: 'encoder" in refused(fxreg.Rule(fxreg.l1(0.1), layer="Conv2d", name="encodr"))
    assert "nearest layers" not in refused(fxreg.Rule(fxreg.l1(0.1), layer="Linear", name="encodr"))


def test_what_is_not_even_several_is_answered_with_what_there_may_be() -> None:
    with pytest.raises(fxreg.RuleError, match=r"layer must be nn\.Module classes or class names, got 3"):
        fxreg.Rule(fxreg.l1(0.1), layer=3)  # type: ignore[arg-type]
    with pytest.raises(fxreg.RuleError, match="exclude must be a glob or a compiled pattern of str, got None"):
        fxreg.Rule(fxreg.l1(0.1), exclude=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("keys", [{"name": "encoder.0.weight"}, {"param": "encoder.0.weight"}, {"name": "enc*.weight"}])
def test_a_full_name_in_one_key_is_divided_in_two(keys: dict[str, str]) -> None:
    assert "as in name='encoder.0', param='weight'" in refused(fxreg.Rule(fxreg.l1(0.1), **keys))
    assert "as in" not in refused(fxreg.Rule(fxreg.l1(0.1), name="decoder", param="*weight"))


def test_an_effect_in_the_place_of_a_rule_is_told_to_be_in_one() -> None:
    for rules in (fxreg.l1(0.1), [fxreg.l1(0.1)]):
        with pytest.raises(fxreg.RuleError, match=r"Write fxreg\.Rule\(l1\(0\.1\), …\)"):
            fxreg.explain(nn.Linear(2, 2), rules)  # type: ignore[arg-type]


def test_a_parameter_that_is_not_there_is_answered_with_parameters() -> None:
    message = refused(fxreg.Rule(fxreg.l1(0.1), param="gian"))
    assert "'l1'" in message
    assert "param='gian'" in message
    assert "nearest parameters" in message
    assert "'gain'" in message


@pytest.mark.parametrize(
    "name", ["Linaer", "nn.Linaer", "torch.Linear", "torch.nn.nn.Linear", "inear", "linear", "re", "functional"]
)
@pytest.mark.parametrize("optional", [True, False])
def test_a_class_name_that_nothing_has_is_a_rule_error_even_if_optional(name: str, optional: bool) -> None:
    rule = fxreg.Rule(fxreg.l1(0.1), layer=("Conv2d", name), optional=optional, label="sparse")
    with pytest.raises(fxreg.RuleError) as caught:
        fxreg.explain(Encoder(), rule)
    for part in ("'sparse'", f"layer={name!r}", "torch.nn", "Mend layer="):
        assert part in str(caught.value)
    refused(rule)


def test_a_misspelt_class_is_answered_with_the_nearest() -> None:
    assert "'Linear'" in refused(fxreg.Rule(fxreg.l1(0.1), layer="Linaer")).partition("nearest")[2]


def _raises(site: Any) -> bool:
    raise LookupError("no such thing")


WHERES = {
    "raises": (_raises, "LookupError: no such thing"),
    "takes nothing": (lambda: True, "TypeError"),
    "takes two": (lambda site, other: True, "TypeError"),
    "misspells": (lambda site: site.nmae, "nmae"),
    "has no truth": (lambda site: torch.ones(2), "RuntimeError"),
    "has no single truth": (lambda site: np.ones(2), "ValueError"),
}


@pytest.mark.parametrize(("where", "why"), WHERES.values(), ids=WHERES)
def test_a_predicate_that_fails_is_a_rule_error_with_the_site_and_the_reason(where: Any, why: str) -> None:
    message = refused(fxreg.Rule(fxreg.l1(0.1), param="gain", where=where, label="sparse"))
    for part in ("'sparse'", "where=", "'gain'", why):
        assert part in message


def test_labels_given_twice_are_refused() -> None:
    rules = [fxreg.Rule(fxreg.l1(0.1), label="twice"), fxreg.Rule(fxreg.l2(0.1), label="twice")]
    message = refused(rules)
    assert "'twice'" in message
    assert "unique" in message


def test_a_label_that_would_share_another_rules_strength_never_does() -> None:
    """`elastic_net` labelled e has the strengths e.l1 and e.l2."""
    model = Encoder()
    rules = [
        fxreg.Rule(fxreg.elastic_net(1.0, 2.0), param="gain", label="e"),
        fxreg.Rule(fxreg.l1(5.0), layer=nn.Linear, param="bias", label="e.l1"),
    ]
    try:
        gm = fxreg.transform(model, rules)
    except fxreg.MatchError:
        return  # as good
    biases = model.encoder[0].bias.abs().sum() + model.encoder[2].bias.abs().sum() + model.head.bias.abs().sum()
    assert float(fxreg.penalties(gm)["e.l1"]) == pytest.approx(5 * float(biases), rel=1e-6)


def test_a_dimension_the_weight_lacks_names_the_rule_the_site_and_its_shape() -> None:
    message = refused(fxreg.Rule(fxreg.group_lasso(0.1, dim=1), label="rows"))
    for part in ("'rows'", "'gain'", "(3,)", "dimension 1", "group_lasso"):
        assert part in message


def test_a_mask_that_does_not_broadcast_names_the_rule_the_site_and_its_shape() -> None:
    message = refused(fxreg.Rule(fxreg.mask(torch.ones(4)), layer=nn.Linear, param="weight", label="lottery"))
    for part in ("'lottery'", "'encoder.0.weight'", "(3, 3)"):
        assert part in message


def test_duplicates_name_both_rules_the_site_and_a_remedy() -> None:
    rules = [fxreg.Rule(fxreg.l1(0.1), label="first"), fxreg.Rule(fxreg.l1(0.2), param="bias", label="second")]
    message = refused(rules)
    for part in ("'first'", "'second'", "'encoder.0.bias'", "exclude="):
        assert part in message


def test_masks_of_values_that_cannot_be_compared_raise_nothing_of_torchs_own() -> None:
    masks = [fxreg.Rule(fxreg.mask(torch.empty(1, device="meta")), param="gain") for _ in range(2)]
    with contextlib.suppress(fxreg.FxregError):
        fxreg.explain(Encoder(), masks)


def test_a_well_formed_rule_after_a_refused_one_is_none_the_worse() -> None:
    model = Encoder()
    refused([fxreg.Rule(fxreg.l1(0.1)), fxreg.Rule(fxreg.l1(0.1), name="nowhere")], model=model)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.1)))
    assert list(fxreg.strengths(gm)) == ["l1"]


# Rules as values.


def test_rules_of_equal_fields_are_equal_and_frozen() -> None:
    def make(strength: float = 0.1) -> fxreg.Rule:
        return fxreg.Rule(fxreg.group_lasso(strength, dim=1), layer=[nn.Linear], exclude="head.*", label="rows")

    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != make(0.2)
    for change in (lambda r: setattr(r, "label", "other"), lambda r: r.effect.strengths.update(strength=3)):
        with pytest.raises((AttributeError, TypeError)):
            change(make())


def test_a_rule_prints_as_it_is_written() -> None:
    rule = fxreg.Rule(
        fxreg.l1(0.1), layer=nn.Linear, name="encoder.*", exclude=("head.*",), via="gradient", label="sparse"
    )
    shown = repr(rule)
    for part in ("l1(0.1)", "Linear", "name='encoder.*'", "head.*", "via='gradient'", "label='sparse'"):
        assert part in shown
    assert "where" not in shown
    assert "optional" not in shown
