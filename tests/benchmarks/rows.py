"""The rows of `tests.benchmarks.step`: a training step by every way to regularize, on models of several kinds."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxreg

from .capture import BasicBlock, encoder

STRENGTH = 1e-4
Step = Callable[[], object]


class ResNet(nn.Module):
    """ResNet-18, a quarter as wide, with a stem for small images."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        stages = [self._stage(old, new) for old, new in zip([width, *widths], widths, strict=False)]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], 10)

    @staticmethod
    def _stage(old: int, new: int) -> nn.Sequential:
        blocks = [BasicBlock(new), BasicBlock(new)]
        if old != new:
            blocks.insert(0, nn.Conv2d(old, new, 1, stride=2, bias=False))
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class GPT(nn.Module):
    """Blocks like those of GPT-2 behind an embedding, with a head of its own."""

    def __init__(self, width: int = 256, layers: int = 4, vocabulary: int = 512, length: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = encoder(layers, width, 4 * width, width // 64)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class WithLoss(nn.Module):
    """A model that returns its own loss."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss_fn(self.model(x), y)}


@dataclass(frozen=True)
class Workload:
    """A model and a batch for it."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]


def mlp(width: int = 1024, layers: int = 8) -> nn.Module:
    hidden = [part for _ in range(layers - 1) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, width))


def next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def _tokens(batch: int, length: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randint(512, (batch, length)), torch.randint(512, (batch, length)))


def _images(batch: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))


def channels_last(width: int = 16) -> nn.Module:
    return ResNet(width).to(memory_format=torch.channels_last)


WORKLOADS = (
    Workload("mlp", mlp, lambda: (torch.randn(32, 1024), torch.randn(32, 1024)), F.mse_loss),
    Workload("small mlp", lambda: mlp(384), lambda: (torch.randn(32, 384), torch.randn(32, 384)), F.mse_loss),
    Workload("resnet", ResNet, _images, F.cross_entropy),
    Workload("resnet, channels last", channels_last, _images, F.cross_entropy),
    Workload("gpt", GPT, _tokens(8, 64), next_token),
    Workload("gpt, tiny batch", GPT, _tokens(1, 8), next_token),
)
LARGE = (
    Workload("wide mlp", lambda: mlp(4096), lambda: (torch.randn(32, 4096), torch.randn(32, 4096)), F.mse_loss),
    Workload("wide resnet", lambda: channels_last(64), lambda: _images(128), F.cross_entropy),
    Workload("large gpt", lambda: GPT(1024, length=512), _tokens(8, 512), next_token),
)
"""What fills a GPU."""
QUICK = Workload("quick", lambda: mlp(16, 2), lambda: (torch.randn(4, 16), torch.randn(4, 16)), F.mse_loss)


@dataclass(frozen=True)
class Setting:
    """Where and how every row runs."""

    workload: Workload
    device: torch.device
    compile_mode: str | None = None
    autocast: bool = False
    optimizer: str = "sgd"

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.workload.model().to(self.device)

    def batch(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        x, y = self.workload.batch()
        return x.to(self.device), y.to(self.device)

    def steps_of(self, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        classes = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
        options = {"fused": True, "weight_decay": 0.0, **options}
        return classes[self.optimizer](model.parameters(), lr=1e-4, **options)

    def compiled(self, function: Any) -> Any:
        return torch.compile(function, mode=self.compile_mode)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return self.workload.loss(output, target)


def weights(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim > 1]


def rule(effect: Callable[[float], Any] = fxreg.l1, **options: Any) -> fxreg.Rule:
    return fxreg.Rule(effect(STRENGTH), where=lambda site: len(site.shape) > 1, **options)


def by_hand(model: nn.Module) -> Tensor:
    return STRENGTH * sum(weight.abs().sum() for weight in weights(model))


def _loop(setting: Setting, optimizer: torch.optim.Optimizer, loss: Callable[[Tensor, Tensor], Tensor]) -> Step:
    x, y = setting.batch()

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.autocast):
            value = loss(x, y)
        value.backward()
        optimizer.step()

    return step


def _plain(setting: Setting, wrap: Callable[[Any], Any], **options: Any) -> Step:
    model = setting.model()
    run = wrap(model)
    return _loop(setting, setting.steps_of(model, **options), lambda x, y: setting.loss(run(x), y))


def _term_outside(setting: Setting, wrap: Callable[[Any], Any]) -> Step:
    model = setting.model()
    run = wrap(model)
    return _loop(setting, setting.steps_of(model), lambda x, y: setting.loss(run(x), y) + by_hand(model))


def _term_inside(setting: Setting, wrap: Callable[[Any], Any]) -> Step:
    model = setting.model()
    loss = wrap(lambda x, y: setting.loss(model(x), y) + by_hand(model))
    return _loop(setting, setting.steps_of(model), loss)


def _parameter_hooks(setting: Setting, wrap: Callable[[Any], Any]) -> Step:
    model = setting.model()

    def add(weight: Tensor) -> None:
        weight.grad.add_(weight.detach().sign(), alpha=STRENGTH)

    for weight in weights(model):
        weight.register_post_accumulate_grad_hook(add)
    run = wrap(model)
    return _loop(setting, setting.steps_of(model), lambda x, y: setting.loss(run(x), y))


def _module_hooks(setting: Setting, wrap: Callable[[Any], Any]) -> Step:
    model = setting.model()

    def add(module: nn.Module, *given: Any) -> None:
        for weight in module.parameters(recurse=False):
            if weight.ndim > 1:  # the module's own gradient may have come already, or comes later
                term = STRENGTH * weight.detach().sign()
                weight.grad = term if weight.grad is None else weight.grad + term

    for module in model.modules():
        if any(weight.ndim > 1 for weight in module.parameters(recurse=False)):
            module.register_full_backward_hook(add)
    run = wrap(model)
    warnings.filterwarnings("ignore", "Full backward hook is firing")  # of the first layer: its input has no gradient
    return _loop(setting, setting.steps_of(model), lambda x, y: setting.loss(run(x), y))


def _proximal(setting: Setting, wrap: Callable[[Any], Any]) -> Step:
    model = setting.model()
    gm = fxreg.transform(model, rule(via="proximal"))
    optimizer = setting.steps_of(model)
    fxreg.ProximalStep(optimizer, gm)
    run = wrap(gm)
    return _loop(setting, optimizer, lambda x, y: setting.loss(run(x), y))


def _fxreg(setting: Setting, wrap: Callable[[Any], Any], emit: str = "backward", **options: Any) -> Step:
    model = setting.model()
    if emit == "loss":
        run = wrap(fxreg.transform(WithLoss(model, setting.loss), rule(**options), emit="loss"))
        return _loop(setting, setting.steps_of(model), lambda x, y: run(x, y)["loss"])
    run = wrap(fxreg.transform(model, rule(**options), emit=emit))
    if emit == "backward":
        return _loop(setting, setting.steps_of(model), lambda x, y: setting.loss(run(x), y))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        output, penalty = run(x)
        return setting.loss(output, y) + penalty

    return _loop(setting, setting.steps_of(model), loss)


def _whole(
    setting: Setting, *rules: fxreg.Rule, emit: str = "backward", proximal: bool = False, **options: Any
) -> Step:
    model = setting.model()
    gm = fxreg.transform(model, rules, emit=emit)
    optimizer = setting.steps_of(model, **options)
    if proximal:
        fxreg.ProximalStep(optimizer, gm)
    step = fxreg.train_step(gm, setting.loss, optimizer, mode=setting.compile_mode)
    x, y = setting.batch()

    def run() -> None:
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.autocast):
            step(x, y)

    return run


def _evaluation(setting: Setting, wrap: Callable[[Any], Any], emit: str | None) -> Step:
    model = setting.model()
    run = wrap(model if emit is None else fxreg.transform(model, rule(), emit=emit))
    model.eval()
    x, _ = setting.batch()
    return torch.no_grad()(lambda: run(x))


PLAIN, TWIN = "plain", "plain, twin"
MODES = ("eager", "compiled", "whole", "eval")


def rows(setting: Setting) -> Iterator[tuple[str, str, Callable[[], Step]]]:
    """(mode, name, how to make the step) for every row."""
    foreach = {"fused": False, "foreach": True}
    both: dict[str, Callable[[Any], Step]] = {
        PLAIN: lambda wrap: _plain(setting, wrap),
        TWIN: lambda wrap: _plain(setting, wrap),
        "weight_decay, fused": lambda wrap: _plain(setting, wrap, weight_decay=STRENGTH),
        "weight_decay, foreach": lambda wrap: _plain(setting, wrap, weight_decay=STRENGTH, **foreach),
        "loss term": lambda wrap: _term_outside(setting, wrap),
        "loss term in the graph": lambda wrap: _term_inside(setting, wrap),
        "post-accumulate hooks": lambda wrap: _parameter_hooks(setting, wrap),
        "full backward hooks": lambda wrap: _module_hooks(setting, wrap),
        "proximal step": lambda wrap: _proximal(setting, wrap),
        "fxreg, gradient": lambda wrap: _fxreg(setting, wrap, via="gradient"),
        "fxreg, emit=backward": lambda wrap: _fxreg(setting, wrap),
        "fxreg, emit=output": lambda wrap: _fxreg(setting, wrap, "output"),
        "fxreg, emit=loss": lambda wrap: _fxreg(setting, wrap, "loss"),
    }
    for mode, wrap in (("eager", lambda function: function), ("compiled", setting.compiled)):
        for name, make in both.items():
            # Without a compiler, a loss term has one form; with one, Dynamo does not take hooks on modules whole.
            if (mode, name) not in (("eager", "loss term in the graph"), ("compiled", "full backward hooks")):
                yield mode, name, lambda make=make, wrap=wrap: make(wrap)
    whole: dict[str, Callable[[], Step]] = {
        PLAIN: lambda: _whole(setting),
        TWIN: lambda: _whole(setting),
        "weight_decay": lambda: _whole(setting, weight_decay=STRENGTH),
        "fxreg, gradient": lambda: _whole(setting, rule(via="gradient")),
        "fxreg, gradient, L2": lambda: _whole(setting, rule(fxreg.l2, via="gradient")),
        "fxreg, emit=backward": lambda: _whole(setting, rule()),
        "fxreg, emit=output": lambda: _whole(setting, rule(), emit="output"),
        "proximal step": lambda: _whole(setting, rule(via="proximal"), proximal=True),
    }
    for name, make in whole.items():
        yield "whole", name, make
    for name, emit in ((PLAIN, None), ("fxreg, emit=backward", "backward"), ("fxreg, emit=output", "output")):
        yield "eval", name, lambda emit=emit: _evaluation(setting, setting.compiled, emit)
