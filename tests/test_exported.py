"""Exported programs and graph modules train as the models they came from, or are refused.

The reference is the original model with the penalty written by hand; what `torch.export` made of it has no part in it.
"""

import copy
import dataclasses
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fxreg

from .marks import slow_but
from .models import CASES, build
from .reference import Gradients, assert_same, by_hand, objective, penalty_terms, transform_terms, twin

# Of torch's own, when it exports a recurrent layer.
pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")

L1 = fxreg.Rule(fxreg.l1(0.1))
X = torch.linspace(-1, 1, 12).reshape(4, 3).sin()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x))


def gradients(gm: nn.Module, loss: Tensor) -> Gradients:
    names = dict(gm.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, list(names.values()), allow_unused=True), strict=True))


def run(gm: nn.Module, args: tuple[Any, ...], emit: str = "backward") -> Gradients:
    torch.manual_seed(1)
    output = gm(*args)
    return gradients(gm, objective(output) if emit == "backward" else objective(output[0]) + output[1])


def expected(model: nn.Module, args: tuple[Any, ...], terms: Any) -> Gradients:
    torch.manual_seed(1)
    return by_hand(model, objective(model(*args)), terms)


def sites(model: Any, **keys: Any) -> list[str]:
    """The parameters that a rule selects."""
    return [edit.site for edit in fxreg.explain(model, [fxreg.Rule(fxreg.l1(0.1), optional=True, **keys)]).edits]


# Gradients.


@pytest.mark.parametrize("emit", ["backward", "output"])
@pytest.mark.parametrize("via", ["penalty", "gradient"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_training_a_program_is_training_the_model_with_the_penalty_in_its_loss(name: str, via: str, emit: Any) -> None:
    model, inputs = build(name, torch.float64)
    reference, terms = twin(model), [*transform_terms(), *penalty_terms(via)]
    program = export(model, inputs)
    gm = fxreg.transform(program, [term.rule for term in terms], example_inputs=inputs, emit=emit)
    assert not fxreg.explain(gm).opaque
    assert_same(run(gm, inputs, emit), expected(reference, inputs, terms), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("via", ["penalty", "gradient"])
@pytest.mark.parametrize(
    "again",
    [
        lambda gm: pickle.loads(pickle.dumps(gm)),
        copy.deepcopy,
        fx.symbolic_trace,
        lambda gm: export(gm, (X,)).module(),
        lambda gm: torch.compile(gm, backend="aot_eager", fullgraph=True),
    ],
    ids=["pickled", "copied", "retraced", "exported", "compiled"],
)
def test_a_region_without_grad_and_one_with_autocast_stay_what_they_are(again: Callable[..., Any], via: str) -> None:
    class Regions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(3, 3) for _ in "abcd")

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.a(x) + torch.tanh(self.d(x)) + torch.rand(3)
                with torch.autocast("cpu", torch.bfloat16):
                    y = y + self.b(x)
            with torch.autocast("cpu", torch.bfloat16):
                z = self.b(x)
            return self.c(self.a(x) * y) + z

    model, terms = Regions(), penalty_terms(via)
    gm = fxreg.transform(export(model, (X,)), [term.rule for term in terms], example_inputs=(X,))
    emitted = again(gm)
    names = [name for name, _ in gm.named_parameters()]
    found = run(emitted, (X,))
    if found.keys() != set(names):  # torch.compile's and torch.export's, in the same order; a re-trace has another one
        found = dict(zip(names, found.values(), strict=True))
    assert_same(found, expected(twin(model), (X,), terms), 1e-5)
    assert sites(export(model, (X,)), layer=nn.Linear) == names  # `b` and `d` run inside regions only


def test_a_program_that_returns_its_loss_has_the_penalty_in_it() -> None:
    class Loss(Small):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            y = super().forward(x)
            return {"loss": y.square().mean(), "y": y}

    model, terms = Loss(), penalty_terms("penalty")
    gm = fxreg.transform(export(model, (X,)), [t.rule for t in terms], example_inputs=(X,), emit="loss")
    output, theirs = gm(X), model(X)
    assert_same(gradients(gm, output["loss"]), by_hand(model, theirs["loss"], terms), 1e-5)
    assert torch.equal(output["y"], theirs["y"])
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X)["loss"], output["loss"])


def test_a_loaded_program_trains_too() -> None:
    model, inputs = build("cnn")
    file = io.BytesIO()
    torch.export.save(export(model, inputs), file)
    file.seek(0)
    terms = penalty_terms("penalty")
    gm = fxreg.transform(torch.export.load(file), [term.rule for term in terms], example_inputs=inputs)
    assert_same(run(gm, inputs), expected(twin(model), inputs, terms), 1e-5)


def test_a_program_exported_with_dynamo_trains_too() -> None:
    model, inputs = build("transformer")
    terms = penalty_terms("gradient")
    gm = fxreg.transform(export(model, inputs, strict=True), [term.rule for term in terms], example_inputs=inputs)
    assert_same(run(gm, inputs), expected(model, inputs, terms), 1e-5)


# State.


def test_the_emitted_module_shares_parameters_and_buffers_with_program_and_model() -> None:
    model, inputs = build("cnn")
    program = export(model, inputs)
    gm = fxreg.transform(program, [L1])
    assert list(gm.state_dict()) == list(model.state_dict())
    assert all(own is theirs for own, theirs in zip(gm.parameters(), model.parameters(), strict=True))
    before = model.features[1].running_mean.clone()
    gm(*inputs)
    assert not torch.equal(model.features[1].running_mean, before)
    for name, buffer in gm.named_buffers():
        assert name.startswith("fxreg.") or buffer is program.state_dict[name] is model.get_buffer(name)


def test_constants_tied_and_unused_parameters_and_hidden_buffers() -> None:
    class State(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(2, 2)
            self.b.weight = self.a.weight
            self.inner = nn.Module()
            self.inner.constant, self.constant = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)
            self.register_buffer("hidden", torch.full((3,), 2.0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) * self.constant + self.hidden + self.inner.constant + torch.tensor([3.0, 1.0, 2.0])

    model, terms = State(), penalty_terms("penalty")
    gm = fxreg.transform(export(model, (X,)), [term.rule for term in terms], example_inputs=(X,))
    assert list(gm.state_dict()) == list(model.state_dict())
    for one in (gm, pickle.loads(pickle.dumps(gm)), copy.deepcopy(gm), fx.symbolic_trace(gm)):
        assert_same(run(one, (X,)), expected(model, (X,), terms), 1e-5)
    assert fxreg.explain(gm).plan.edits[0].aliases == ("b.weight",)
    assert torch.equal(fxreg.strip(gm)(X), model(X))


# Rules.


class Scale(nn.Module):
    """Owns a parameter and has children."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gain = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.gain


class Deeper(Scale):
    pass


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Scale(), Deeper(), parametrizations.weight_norm(nn.Linear(3, 4)))
        self.mha = nn.MultiheadAttention(4, 2, batch_first=True)
        self.conv = nn.Conv1d(4, 4, 1)
        self.decode = nn.Linear(4, 4, bias=False)
        self.root = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)[None]
        x = x + self.mha(x, x, x, need_weights=False)[0]
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.decode(self.decode(x)) * self.root


KEYS: list[dict[str, Any]] = [
    {"layer": "Linear"},
    {"layer": nn.Linear},
    {"layer": "nn.Linear", "param": "weight"},
    {"layer": nn.modules.linear.NonDynamicallyQuantizableLinear},
    {"layer": (nn.Conv1d, "MultiheadAttention")},
    {"layer": Scale},
    {"layer": "Scale"},
    {"layer": "Deeper"},
    {"layer": "tests.test_exported.Deeper"},
    {"layer": Layers},
    {"layer": nn.Module},
    {"name": "encoder.*"},
    {"name": "encoder.*", "layer": "Linear", "exclude": "*.bias"},
    {"name": "encoder.2"},
    {"name": ""},
    {"name": "*", "param": "original*"},
    {"param": "*bias"},
    {"where": lambda site: site.numel > 4 and site.param == "weight"},
]


@pytest.mark.parametrize("keys", slow_but(KEYS[::4], KEYS), ids=lambda keys: ",".join(keys))
def test_rules_match_in_a_program_as_in_the_model(keys: dict[str, Any]) -> None:
    model = Layers()
    program = export(model, (X,))
    assert sites(model, **keys), "the test has lost its point"
    assert sites(program, **keys) == sites(model, **keys)
    gm = fxreg.transform(program, [fxreg.Rule(fxreg.l1(0.1), **keys)])
    assert [edit.site for edit in fxreg.explain(gm).plan.edits] == sites(model, **keys)


def test_rules_match_classes_that_only_a_function_knows_and_ones_that_are_gone() -> None:
    def make() -> nn.Module:
        class Own(nn.Linear):
            pass

        return nn.Sequential(Own(3, 3), nn.Linear(3, 3))

    model = make()
    program = export(model, (X,))
    assert sites(program, layer=type(model[0])) == sites(program, layer="Own") == ["0.weight", "0.bias"]
    assert len(sites(program, layer=nn.Linear)) == 4
    program = export(model, (X,))
    for node in program.graph.nodes:  # as if loaded where the class is not
        for key, (path, kind) in node.meta.get("nn_module_stack", {}).items():
            node.meta["nn_module_stack"][key] = (path, kind.replace("test_exported", "elsewhere"))
    assert sites(program, layer="Own") == ["0.weight", "0.bias"]
    with pytest.raises(fxreg.MatchError, match=r"'0' was a tests\.elsewhere.*Own, which is not loaded.*Import it"):
        sites(program, layer=nn.Linear)
    with pytest.raises(fxreg.RuleError, match=r"neither in torch\.nn nor in the model"):
        sites(program, layer="Onw")


class Borrowing(nn.Module):
    """Uses a layer's weight and does not call the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lent = nn.Linear(3, 3), nn.Linear(3, 3)
        self.unused = parametrizations.weight_norm(nn.Linear(3, 3, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.fc(x), self.lent.weight)


def test_a_rule_on_layers_says_so_where_the_program_does_not_tell_the_class() -> None:
    program = export(Borrowing(), (X,))
    with pytest.raises(fxreg.MatchError, match=r"'lent' did not run by itself.*exclude='lent.weight'"):
        fxreg.transform(program, [fxreg.Rule(fxreg.l1(0.1), layer="Linear")])
    assert sites(program, layer="Linear", exclude=["lent.*", "unused.*"]) == ["fc.weight", "fc.bias"]
    assert len(sites(program, name="unused", param="original*")) == 2
    assert sites(program, name="lent") == ["lent.weight", "lent.bias"]
    assert sites(program, layer="Linear", name="fc") == ["fc.weight", "fc.bias"]


# Graph modules.


@pytest.mark.parametrize(
    "keys",
    [keys for keys in KEYS if keys.get("layer") is not Layers],  # the root's class is not recorded
    ids=lambda keys: ",".join(keys),
)
def test_rules_match_in_a_traced_module_as_in_the_model(keys: dict[str, Any]) -> None:
    model = Layers()
    assert sites(fx.symbolic_trace(model), **keys) == sites(model, **keys)


def test_a_traced_module_trains_as_the_model() -> None:
    model, terms = Layers(), penalty_terms("gradient")
    gm = fxreg.transform(fx.symbolic_trace(model), [term.rule for term in terms], example_inputs=(X,))
    assert_same(run(gm, (X,)), expected(twin(model), (X,), terms), 1e-5)


def test_an_exported_module_inside_a_model_is_matched_too() -> None:
    model = nn.Sequential(nn.Linear(3, 3), export(Deeper(), (X,)).module())
    assert sites(model, layer=Scale) == ["1.gain"]
    assert sites(model, layer="Linear") == ["0.weight", "0.bias", "1.fc.weight", "1.fc.bias"]


def test_the_module_of_a_program_can_be_given_as_well() -> None:
    terms = penalty_terms("gradient")
    model = Small()
    gm = fxreg.transform(export(model, (X,)).module(), [term.rule for term in terms])
    assert_same(run(gm, (X,)), expected(model, (X,), terms), 1e-5)


# Inputs and outputs.


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, batch: dict[str, Any], *rest: Tensor, n: int, mask: Tensor | None = None) -> Any:
        y = self.fc(batch["x"][0] + batch["y"]) * n + rest[0]
        return (y, {"a": [y.sum(), 3, None]}) if mask is None else (y * mask, {"a": [y.mean(), 3, None]})


def batch(size: int) -> dict[str, Any]:
    return {"x": (torch.randn(size, 3),), "y": torch.randn(size, 3)}


def test_any_structure_goes_in_and_out() -> None:
    model = Structured()
    program = export(model, (batch(4), X), {"n": 2, "mask": None})
    examples = {"batch": batch(4), "rest_0": X, "n": 2, "mask": None}
    gm = fxreg.transform(program, [L1], example_inputs=examples)
    one = batch(4)
    theirs, ours = model(one, X, n=2), gm(one, X, n=2, mask=None)
    assert torch.equal(ours[0], theirs[0])
    assert ours[1]["a"][1:] == [3, None]
    again = pickle.loads(pickle.dumps(gm))
    assert torch.equal(again(one, X, 2, None)[1]["a"][0], theirs[1]["a"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": batch(3)}, r"exported for inputs with batch\['x'\]\[0\].size\(\)\[0\] == 4"),
        ({"batch": {"x": (X[0],), "y": X}}, "was a tensor of 2 dimensions .* is one of 1"),
        ({"batch": {"x": (X,), "y": 3.0}}, "was a tensor of 2 dimensions .* is a float"),
        ({"batch": {"x": [X], "y": X}}, "exported for arguments of the structure"),
        ({"n": 3}, "n == 2"),
        ({"mask": X}, "was None when the program was exported"),
    ],
)
def test_inputs_that_the_program_was_not_exported_for_are_refused(change: dict[str, Any], message: str) -> None:
    gm = fxreg.transform(export(Structured(), (batch(4), X), {"n": 2, "mask": None}), [L1])
    fitting = {"batch": batch(4), "rest_0": X, "n": 2, "mask": None}
    gm(**fitting)
    with pytest.raises(fxreg.CaptureError, match=message):
        gm(**{**fitting, **change})


def test_examples_that_do_not_fit_are_refused() -> None:
    with pytest.raises(fxreg.CaptureError, match=r"do not fit the exported program's \(x\)"):
        fxreg.transform(export(Small(), (X,)), [L1], example_inputs={"y": X})
    with pytest.raises(fxreg.CaptureError, match=r"exported for inputs with x\.size\(\)\[0\] == 4"):
        fxreg.transform(export(Small(), (X,)), [L1], example_inputs=(X[:2],))


class Halves(nn.Module):
    """Constrains its batch size by what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.fc(x).reshape(x.shape[0] // 2, 2, 3) if x.shape[0] % 2 == 0 else self.fc(x)[:, None]
        return z.sum(1).sum(0) + torch.arange(x.shape[0]).sum() + torch.zeros(x.shape[0], 3).sum(0) + y.sum(0)


@pytest.mark.slow
@pytest.mark.parametrize("via", ["penalty", "gradient"])
def test_a_dynamic_program_takes_other_sizes_and_keeps_its_guards(via: str) -> None:
    model, terms = Halves(), penalty_terms(via)
    program = export(model, (X, torch.randn(5, 3)), dynamic_shapes=({0: 2 * Dim("half", max=8)}, {0: Dim.DYNAMIC}))
    gm = fxreg.transform(program, [term.rule for term in terms], example_inputs=(torch.randn(6, 3), torch.randn(5, 3)))
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True, dynamic=True)
    for emitted in (gm, pickle.loads(pickle.dumps(gm)), fx.symbolic_trace(gm), compiled):
        for rows in (4, 6, 10):
            inputs = (torch.randn(rows, 3), torch.randn(rows + 1, 3))
            torch.manual_seed(1)
            names = dict(gm.named_parameters() if emitted is compiled else emitted.named_parameters())
            found = torch.autograd.grad(objective(emitted(*inputs)), list(names.values()))
            assert_same(dict(zip(names, found, strict=True)), expected(model, inputs, terms), 1e-4)
    for rows in (7, 18):  # odd; more than was said
        with pytest.raises(fxreg.CaptureError, match=r"exported for inputs with x\.size"):
            gm(torch.randn(rows, 3), torch.randn(5, 3))


@dataclasses.dataclass
class Result:
    loss: Tensor
    hidden: Tensor | None = None


torch.export.register_dataclass(Result, serialized_type_name="fxreg.tests.Result")


def test_a_registered_dataclass_comes_out_as_one() -> None:
    class Model(Small):
        def forward(self, x: Tensor) -> Result:  # type: ignore[override]
            return Result(super().forward(x).square().mean(), x)

    model, terms = Model(), penalty_terms("penalty")
    program = export(model, (X,))
    for emit in ("backward", "loss"):
        gm = fxreg.transform(program, [term.rule for term in terms], example_inputs=(X,), emit=emit)  # type: ignore[arg-type]
        output = gm(X)
        assert isinstance(output, Result)
        assert_same(gradients(gm, output.loss), by_hand(model, model(X).loss, terms), 1e-5)


# Modes.


def dropped() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))


@pytest.mark.parametrize("training", [True, False])
def test_a_program_has_the_mode_it_was_exported_in_and_says_so(training: bool) -> None:
    model = dropped().train(training)
    gm = fxreg.transform(export(model, (X,)), [L1], example_inputs=(X,))
    assert gm.training == training
    assert gm.train(training) is gm
    have, want = ("train", "eval") if training else ("eval", "train")
    for switch in (lambda: gm.train(not training), lambda: pickle.loads(pickle.dumps(gm)).train(not training)):
        with pytest.raises(fxreg.FxregError, match=f"exported in {have} mode.*model.{want}()"):
            switch()
    assert gm.training == training
    torch.manual_seed(1)
    theirs = model(X)
    torch.manual_seed(1)
    assert torch.equal(gm(X), theirs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.BatchNorm1d(3, track_running_stats=False),
        lambda: nn.Identity(),
        lambda: nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3).eval()),
    ],
    ids=["batch statistics", "no sign", "frozen statistics"],
)
def test_the_mode_is_train_unless_the_operators_say_eval(make: Callable[[], nn.Module]) -> None:
    gm = fxreg.transform(export(nn.Sequential(nn.Linear(3, 3), make()), (X,)), [L1], example_inputs=(X,))
    assert gm.train().training
    with pytest.raises(fxreg.FxregError, match="has no eval mode"):
        gm.eval()


def test_normalization_by_the_batch_says_nothing_about_the_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    assert not fxreg.transform(export(model, (X,)), [L1], example_inputs=(X,)).eval().training


def test_a_penalty_in_the_loss_of_an_eval_program_would_never_act() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = dropped()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).square().mean()

    with pytest.raises(fxreg.CaptureError, match="exported in eval mode"):
        fxreg.transform(export(Loss().eval(), (X,)), [L1], emit="loss")


# Refusals.


class Cond(Small):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.fc(x), lambda x: x * 2, (x,))


def without_examples() -> ExportedProgram:
    program = export(Small(), (X,))
    program.example_inputs = None
    return program


def with_a_mode_call() -> ExportedProgram:
    program = export(Small(), (X,))
    (first, *_) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    with program.graph.inserting_before(first):
        program.graph.call_function(torch._C._set_grad_enabled, (False,))
    return program


REFUSED: dict[str, tuple[Callable[[], ExportedProgram], str]] = {
    "decomposed": (lambda: export(Small(), (X,)).run_decompositions(), "was decomposed"),
    "control flow": (lambda: export(Cond(), (X,)), "holds cond .*Transform the model itself"),
    "transformed": (lambda: export(fxreg.transform(Small(), [L1]), (X,)), "was already transformed"),
    "without examples": (without_examples, "program.example_inputs ="),
    "a change of mode": (with_a_mode_call, "calls .*_set_grad_enabled.* may change a mode"),
}


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")  # run_decompositions
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_known_to_train_right_is_refused(what: str) -> None:
    make, message = REFUSED[what]
    program = make()
    with pytest.raises(fxreg.CaptureError, match=message):
        fxreg.transform(program, [L1])


# Around it.


def test_verify_compares_with_the_program_and_with_the_model() -> None:
    model, inputs = build("cnn")
    program = export(model, inputs)
    gm = fxreg.transform(program, [L1])
    fxreg.verify(gm, program, inputs)
    fxreg.verify(gm, model, inputs)
    (dropout, *_) = (n for n in gm.graph.nodes if n.target is torch.ops.aten.dropout.default)
    dropout.update_arg(1, 0.75)
    gm.recompile()
    for reference in (program, model):
        with pytest.raises(fxreg.VerifyError, match="output 0 differs"):
            fxreg.verify(gm, reference, inputs)


def test_verify_tells_a_model_whose_backward_export_has_lost() -> None:
    class Tripled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return 3 * grad

    class Model(Small):
        def forward(self, x: Tensor) -> Tensor:
            return Tripled.apply(self.fc(x))  # type: ignore[no-any-return]

    model = Model()
    gm = fxreg.transform(export(model, (X,)), [L1], example_inputs=(X,))
    with pytest.raises(fxreg.VerifyError, match=r"gradient of 'fc\.weight' is off"):
        fxreg.verify(gm, model, (X,))


def test_two_transforms_of_one_program_share_and_parameter_groups_bind() -> None:
    rules = [fxreg.Rule(fxreg.l2(0.1), layer="Linear", via="optimizer")]
    model = Small()
    for groups_first in (True, False):
        program = export(model, (X,))
        if groups_first:
            fxreg.param_groups(program, rules)
        gm = fxreg.transform(program, rules)
        assert fxreg.explain(gm).unbound == (() if groups_first else ("l2",))
        for source in (program, gm):
            (group,) = fxreg.param_groups(source, rules)
            assert group["weight_decay"] == 0.2
            assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
        assert fxreg.explain(gm).unbound == ()


def test_a_program_is_not_changed_and_not_kept() -> None:
    program = export(Small(), (X,))
    before = str(program)
    gm = fxreg.transform(program, [L1], example_inputs=(X,))
    assert str(program) == before
    gone = weakref.ref(program)
    del program
    gc.collect()
    assert gone() is None
    assert gm(X).requires_grad


def test_the_nodes_know_their_modules() -> None:
    gm = fxreg.transform(export(Layers(), (X,)), [L1])
    stacks: Iterator[Any] = (node.meta.get("nn_module_stack", {}).values() for node in gm.graph.nodes)
    kinds = dict(entry for stack in stacks for entry in stack)
    assert kinds["encoder.1"] == "tests.test_exported.Deeper"
