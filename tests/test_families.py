"""Real models: a part of the zoo, with every kind of model in it; docs/coverage.md has it for all of the zoo."""

import contextvars
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fxreg

from .coverage import (
    all_tensors,
    assert_faithful,
    assert_unchanged_by,
    called_layers,
    graph_breaks,
    regularized,
    seen_layers,
)  # fmt: skip
from .families import FAMILIES, KINDS, Inputs
from .marks import slow_but

ZOO = {family.name: family for family in FAMILIES}
TESTED = (
    "albert", "bert", "canine", "deberta_v2", "distilbert", "electra", "fnet", "layoutlmv3", "modernbert", "mpnet",
    "nomic_bert", "patchtsmixer", "patchtst", "perceiver", "rembert", "tapas", "xlnet",
    "falcon", "gemma", "gpt2", "gpt_neo", "gptj", "llama", "mpt", "openai_gpt", "opt", "qwen2",
    "bart", "blenderbot", "pegasus",
    "ernie4_5_moe", "glm4_moe", "granitemoe", "lfm2_moe", "minimax", "olmoe", "phimoe",
    "bamba", "lfm2", "mamba", "nemotron_h", "qwen3_next", "recurrent_gemma",
    "beit", "bit", "convnext", "deit", "dinov2", "mobilenet_v1", "poolformer", "pvt", "resnet", "segformer", "vit",
    "yolos",
    "audio_spectrogram_transformer", "encodec", "wav2vec2",
    "clip", "llava", "vilt",
)  # fmt: skip
QUICK = ("vit",)
COMPILED = ("bert", "mpt", "vit")
IN_PIECES = ("parakeet",)
"""Where what breaks the graph stays one call, and the penalties are in a graph with what follows."""
WITH_INDUCTOR = ("albert",)
VISIBLE = {"encodec": 0.09, "recurrent_gemma": 0.28}  # of the layers
STRENGTH = 0.01  # shows in every gradient

# What transformers itself does, and Dynamo, looking at its inputs after a graph break.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def test_the_zoo_has_models_of_every_kind() -> None:
    assert len(set(TESTED)) == len(TESTED) >= 60
    assert {ZOO[name].kind for name in TESTED} == set(KINDS)


@pytest.mark.parametrize("name", slow_but(QUICK, TESTED))
def test_a_real_model_trains_on_the_hand_written_loss(name: str) -> None:
    model, examples = ZOO[name].make()
    gm = regularized(model, examples, STRENGTH)
    assert fxreg.explain(gm).verified
    assert_faithful(gm, *ZOO[name].make(), STRENGTH)
    layers = called_layers(ZOO[name].make()[0], examples)
    assert len(seen_layers(gm) & layers) >= VISIBLE.get(name, 0.85) * len(layers)
    if islands := fxreg.explain(gm).islands:
        assert_unchanged_by(islands, model, model, examples)


ACTIVATIONS = ("bert", "deberta_v2", "resnet")
"""Whose activations stand in one graph, or in what runs as it is."""


def _total(values: Any) -> Tensor:
    return sum(
        (one.clone().float().square().sum() for one in all_tensors(values) if one.is_floating_point()), torch.zeros(())
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_real_model_trains_with_penalties_on_its_activations(name: str) -> None:
    (model, examples), (twin, _) = ZOO[name].make(), ZOO[name].make()
    rules = [
        fxreg.Rule(fxreg.l2(0.01), layer=("Linear", "Conv2d"), on="output"),
        fxreg.Rule(fxreg.l2(0.02), layer=("LayerNorm", "BatchNorm2d"), on="input"),
        fxreg.Rule(fxreg.l2(0.03), name=r"re:.*(layers?|blocks?)\.\d+", on="output"),
    ]
    gm = fxreg.transform(model, rules, example_inputs=examples)
    terms: list[Tensor] = []
    for path, module in twin.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda m, args, out: terms.append(0.01 * _total(out)))
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda m, args: terms.append(0.02 * _total(args)))
        if re.fullmatch(r".*(layers?|blocks?)\.\d+", path):
            module.register_forward_hook(lambda m, args, out: terms.append(0.03 * _total(out)))
    for one in (twin, gm):
        torch.manual_seed(0)
        output = contextvars.copy_context().run(one, **examples)
        loss = _total([value for value in all_tensors(output) if value.requires_grad])
        (loss + sum(terms) if one is twin else loss).backward()
    for (path, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), path
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def _breaks(module: torch.nn.Module, examples: Inputs) -> int:
    """How often Dynamo breaks the graph of a training step."""
    torch.compiler.reset()
    counters.clear()
    output = contextvars.copy_context().run(torch.compile(module, backend="aot_eager"), **examples)
    sum(tensor.sum() for tensor in all_tensors(output) if tensor.requires_grad).backward()
    return sum(counters["graph_break"].values())


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_a_real_model_compiles_with_no_more_graph_breaks_than_without_rules(name: str) -> None:
    model, examples = ZOO[name].make()
    assert _breaks(regularized(model, examples), examples) <= _breaks(*ZOO[name].make())


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_PIECES)
def test_a_real_model_is_in_no_more_pieces_than_without_rules(name: str) -> None:
    model, examples = ZOO[name].make()
    gm = regularized(model, examples).train()
    assert 0 < graph_breaks(gm, examples).count <= graph_breaks(*ZOO[name].make()).count


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_INDUCTOR)
def test_a_real_model_compiled_with_inductor_is_close_to_eager(name: str) -> None:
    model, examples = ZOO[name].make()
    gm = regularized(model, examples, STRENGTH).eval()  # Inductor draws its own dropout masks
    parameters = [p for p in gm.parameters() if p.requires_grad]
    eager, compiled = gm(**examples), contextvars.copy_context().run(torch.compile(gm), **examples)
    for one, other in zip(all_tensors(eager), all_tensors(compiled), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
    for one, other in zip(*(torch.autograd.grad(o.loss, parameters) for o in (eager, compiled)), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
