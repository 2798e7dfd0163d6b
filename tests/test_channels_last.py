"""In a whole step on the CPU the activations of convolutions are made in one memory format, and mean the same."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F

import fxreg
from fxreg.channels_last import ChannelsLast, inductor_options

aten = torch.ops.aten


class Convolutions(nn.Module):
    """With a kernel of one pixel, groups, a weight that is used twice, one that is channels last, and keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.groups = nn.Conv2d(8, 8, 3, groups=4)
        self.last = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
        self.pixel = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        images = self.norm(self.twice(self.twice(self.first(images)).tanh())).relu()
        images = self.last(self.groups(images).tanh())
        images = F.conv2d(input=images, weight=self.pixel.weight, bias=self.pixel.bias)
        scores: Tensor = self.head(images.tanh().mean((2, 3)))
        return scores


class Trial:
    """A model to train in one graph, and its twin to train by hand."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model, self.twin = model, copy.deepcopy(model)
        gm = fxreg.transform(model, [fxreg.Rule(fxreg.l2(0.01), param="*weight")])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        self.step = fxreg.train_step(gm, F.cross_entropy, optimizer, **options)
        self.batch = torch.randn(5, 3, 9, 9), torch.randint(4, (5,))

    def compare(self, steps: int) -> None:
        reference = torch.optim.SGD(self.twin.parameters(), lr=0.1, momentum=0.5)
        images, targets = self.batch
        for _ in range(steps):
            self.step(images, targets)
            reference.zero_grad()
            loss = F.cross_entropy(self.twin(images), targets)
            named = self.twin.named_parameters()
            (loss + sum(0.01 * p.square().sum() for name, p in named if name.endswith("weight"))).backward()
            reference.step()
        for (name, actual), expected in zip(self.model.named_parameters(), self.twin.parameters(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
            assert actual.stride() == expected.stride()


class Look:
    """A backend that applies the pass, and keeps what convolutions and their backward read and write."""

    def __init__(self) -> None:
        self.converted = 0
        self.seen: list[Tensor] = []

    def __call__(self, gm: fx.GraphModule, examples: Any) -> Any:
        before = len(gm.graph.nodes)
        ChannelsLast()(gm.graph)
        gm.graph.lint()
        gm.recompile()
        self.converted += len(gm.graph.nodes) - before
        return aot_autograd(fw_compiler=self._compile)(gm, examples)

    def _compile(self, gm: fx.GraphModule, examples: Any) -> Any:
        for node in gm.graph.nodes:
            if node.target is aten.convolution.default:
                self.seen.append(node.meta["val"])
            elif node.target is aten.convolution_backward.default:
                self.seen += [n.meta["val"] for n in node.args[:2] if isinstance(n, fx.Node) and n.op != "placeholder"]
        return gm.forward


@pytest.mark.slow
def test_what_convolutions_read_and_write_is_channels_last() -> None:
    look = Look()
    Trial(Convolutions(), backend=look).compare(steps=3)
    assert look.converted == 5  # of six; one weight is channels last
    assert len(look.seen) == 6 + 6 + 5
    others = [tensor for tensor in look.seen if not tensor.is_contiguous(memory_format=torch.channels_last)]
    assert [tensor.shape for tensor in others] == [(5, 6, 5, 5)]  # the gradient of the mean over images


class Written(nn.Module):
    """Its weight is another one at its second use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 9, padding=4)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            self.conv.weight.mul_(0.5)
        scores: Tensor = self.conv(images).mean((2, 3))
        return scores


def test_a_weight_that_is_written_in_forward_is_read_behind_it() -> None:
    look = Look()
    trial = Trial(Written(), backend=look)
    trial.batch = trial.batch[0], trial.batch[1] % 3
    trial.compare(steps=2)
    assert look.converted == 1


def is_converted(weight: Tensor) -> bool:
    graph = fx.Graph()
    images, node = graph.placeholder("images"), graph.placeholder("weight")
    node.meta["example_value"] = weight
    graph.output(graph.call_function(torch.conv2d, (images, node)))
    ChannelsLast()(graph)
    graph.lint()
    return len(graph.nodes) == 5


def test_only_where_inductor_changes_the_format() -> None:
    weight = torch.empty(4, 3, 3, 3)
    assert is_converted(weight)
    assert is_converted(weight.bfloat16())
    assert not is_converted(weight.double())  # oneDNN has no float64
    assert not is_converted(weight.to("meta"))
    assert not is_converted(weight.to(memory_format=torch.channels_last))
    with torch._inductor.config.patch(layout_optimization=False):
        assert not is_converted(weight)
    torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        assert not is_converted(weight)
    finally:
        torch.backends.mkldnn.set_flags(_enabled=True)


@pytest.mark.slow
def test_inductor_is_given_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []
    convert = ChannelsLast.__call__
    monkeypatch.setattr(ChannelsLast, "__call__", lambda own, graph: graphs.append(convert(own, graph)))
    monkeypatch.setattr(ChannelsLast, "uuid", lambda own: None)  # nothing from a cache
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 7), nn.Flatten())
    Trial(model).compare(steps=2)
    assert len(graphs) == 1


def test_modes_and_a_pass_of_ones_own_are_kept() -> None:
    assert "pre_grad_custom_pass" in inductor_options(None)
    assert inductor_options("max-autotune")["max_autotune"]
    with torch._inductor.config.patch(pre_grad_custom_pass=print):
        assert not inductor_options(None)
