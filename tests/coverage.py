"""How deep, and how faithfully, fxreg captures every family of the zoo: writes docs/coverage.md.

$ python -m tests.coverage                # all of it
$ python -m tests.coverage llama mixtral  # these, printed
"""

import contextlib
import io
import logging
import multiprocessing
import platform
import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import ParametrizationList

import fxreg
from fxreg import explain
from fxreg.capture import capture, visible_layers
from fxreg.module import state_of

from .families import FAMILIES, Family, Inputs
from .reference import assert_same, objective

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
STRENGTH = 1e-4

Run = tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor | None]]


# What the test suite asks, too.


def regularized(model: nn.Module, examples: Inputs, strength: float = STRENGTH) -> fx.GraphModule:
    """The emitted module, verified: L1 on every parameter."""
    return fxreg.transform(model, [fxreg.Rule(fxreg.l1(strength))], example_inputs=examples)


def assert_faithful(gm: nn.Module, reference: nn.Module, examples: Inputs, strength: float = STRENGTH) -> None:
    """An emitted module does what the hand-written loss does to another model with the same parameters."""
    names = {name for name, p in reference.named_parameters() if p.requires_grad}
    for training in (True, False):
        mode = "train" if training else "eval"
        ours = _run(gm.train(training), examples, names, lambda: 0.0)
        penalty = lambda: strength * sum(p.abs().sum() for p in _own(reference))  # noqa: E731
        theirs = _run(reference.train(training), examples, names, penalty)
        assert isinstance(ours, RuntimeError) == isinstance(theirs, RuntimeError), (
            f"{mode} mode: only one has gradients"
        )
        if isinstance(ours, RuntimeError) or isinstance(theirs, RuntimeError):
            continue
        assert len(ours[0]) == len(theirs[0]), f"{mode} mode: {len(ours[0])} outputs instead of {len(theirs[0])}"
        for k, (one, other) in enumerate(zip(ours[0], theirs[0], strict=True)):
            assert _same(one, other), f"{mode} mode: output {k} differs"
        for name, buffer in theirs[1].items():
            assert _same(ours[1][name], buffer), f"{mode} mode: buffer {name} differs"
        assert_same(ours[2], theirs[2], tolerance=1e-5)


@contextlib.contextmanager
def with_islands(model: nn.Module, islands: Mapping[str, Any]) -> Iterator[None]:
    """The model, with islands in the place of the forwards that they were captured from."""
    modules = {path: model.get_submodule(path) for path in islands}
    for path, module in modules.items():
        vars(module)["forward"] = islands[path]
    try:
        yield
    finally:
        for module in modules.values():
            del vars(module)["forward"]


def assert_unchanged_by(islands: Mapping[str, Any], model: nn.Module, reference: nn.Module, examples: Any) -> None:
    """A model with islands in the place of forwards does what another one in the same state, or itself, does."""
    names = {name for name, p in reference.named_parameters() if p.requires_grad}
    for training in (True, False):
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with with_islands(model, islands):
            ours = _run(model.train().train(training), examples, names, lambda: 0.0)
        if reference is model:
            after = {name: buffer.clone() for name, buffer in model.named_buffers()}
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
            ours = ours if isinstance(ours, RuntimeError) else (ours[0], after, ours[2])
        theirs = _run(reference.train().train(training), examples, names, lambda: 0.0)  # what evaluation kept is gone
        assert isinstance(ours, RuntimeError) == isinstance(theirs, RuntimeError)
        if isinstance(ours, RuntimeError) or isinstance(theirs, RuntimeError):
            continue
        for one, other in zip(ours[0], theirs[0], strict=True):
            assert _same(one, other)
        assert all(_same(ours[1][name], buffer) for name, buffer in theirs[1].items())
        assert_same(ours[2], theirs[2], tolerance=1e-5)


def called_layers(model: nn.Module, examples: Inputs) -> set[str]:
    """The paths of the layers with parameters of their own that a forward calls in eval mode. A parametrization is
    part of its layer."""
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, path=path: called.add(path))
        for path, module in model.named_modules()
        if module._parameters and not isinstance(module, ParametrizationList)
    ]
    with torch.no_grad():
        model.eval()(**examples)
    for hook in hooks:
        hook.remove()
    return called


def seen_layers(gm: fx.GraphModule) -> set[str]:
    """The paths of the layers that are in a graph of an emitted module with at least one other."""
    found = _in_graph(gm)
    for path, island in explain(gm).islands.items():
        found |= {f"{path}.{name}" if name else path for name in _in_graph(island)}
    return found


def _in_graph(gm: nn.Module) -> set[str]:
    state = state_of(gm)
    layers = visible_layers(state.model, state.captured.graph)
    return layers if len(layers) > 1 else set()


@dataclass(frozen=True)
class Breaks:
    """How often Dynamo breaks the graph of a call.

    Attributes:
        count: of graphs, less one; -1 where Dynamo failed.
        reasons: one for each place where it broke one.
    """

    count: int
    reasons: tuple[str, ...]


def graph_breaks(module: nn.Module, examples: Inputs) -> Breaks:
    torch._dynamo.reset()
    torch.manual_seed(0)  # which layers a model drops is random
    random.seed(0)
    np.random.seed(0)
    try:
        with _silence():
            found = torch._dynamo.explain(module)(**examples)
        return Breaks(max(found.graph_break_count, 0), tuple(str(each.reason) for each in found.break_reasons))
    except Exception as failure:
        return Breaks(-1, (f"{type(failure).__name__}: {failure}",))
    finally:
        torch._dynamo.reset()


def all_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of an output, those of its caches among them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from all_tensors(part)
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module):
        yield from all_tensors(vars(value))


def _run(module: nn.Module, examples: Any, names: set[str], penalty: Callable[[], Any]) -> Run | RuntimeError:
    """Outputs, buffers and gradients of one training step on the loss that the model returns, or on its outputs."""
    torch.manual_seed(3)
    random.seed(3)
    output = module(*examples) if isinstance(examples, tuple) else module(**examples)
    loss = getattr(output, "loss", None)
    if loss is None:
        loss = objective(tuple(t for t in all_tensors(output) if t.requires_grad))
    parameters = {name: p for name, p in module.named_parameters() if name in names}
    try:
        found = torch.autograd.grad(loss + penalty(), list(parameters.values()), allow_unused=True)
    except RuntimeError as failure:  # the model writes into what it needs for its gradient
        return failure
    outputs = [t.detach() for t in all_tensors(output)]
    return outputs, dict(module.named_buffers()), dict(zip(parameters, found, strict=True))


def _own(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _same(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and bool(((one == other) | (one.isnan() & other.isnan())).all())


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


# The page.


@dataclass(frozen=True)
class Row:
    """What was found for one family.

    Attributes:
        seen: how many of the layers are visible.
        opaque: the regions that hide layers or own no parameters, and why they stayed whole.
        error: why it is not faithful; "" if it is.
        theirs: the model's graph breaks.
        ours: the emitted module's.
    """

    name: str
    kind: str
    seen: int
    in_main: int
    layers: int
    opaque: dict[str, str]
    error: str
    theirs: Breaks
    ours: Breaks

    @property
    def breaks_more(self) -> bool:
        """Whether it is in more pieces, and that because it breaks where the model does not. Otherwise a piece more is
        the penalty's own, after the model's last break."""
        if self.error:  # not looked at
            return False
        more = self.ours.count > self.theirs.count >= 0 and len(self.ours.reasons) > len(self.theirs.reasons)
        return more or self.ours.count < 0 <= self.theirs.count


def measure(family: Family) -> Row:
    model, examples = family.make()
    error, ours, seen, main = "", Breaks(-1, ()), set[str](), set[str]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            gm = regularized(model, examples)
            captured, seen, main = state_of(gm).captured, seen_layers(gm), _in_graph(gm)
            assert_faithful(gm, *family.make())
            if islands := explain(gm).islands:
                assert_unchanged_by(islands, model, model, examples)
            ours = graph_breaks(gm.train(), examples)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
            model, examples = family.make()
            captured = capture(model, examples)
        theirs = graph_breaks(*family.make())
        model, examples = family.make()
        layers = called_layers(model, examples)
    opaque = {path: why for path, why in captured.opaque.items() if _matters(model.get_submodule(path))}
    return Row(
        family.name, family.kind, len(seen & layers), len(main & layers), len(layers), opaque, error, theirs, ours
    )


def _matters(module: nn.Module) -> bool:
    """Whether a region hides layers, or owns no parameters: a layer that is called as a whole is itself visible."""
    below = any(m._parameters for m in module.modules() if m is not module)
    return below or not module._parameters


def page(rows: Sequence[Row]) -> str:
    import transformers

    lines = [
        "# What capture sees of real models",
        "",
        f"For {len(rows)} tiny, randomly initialized models, each of another family of `transformers`: how many of the "
        "layers that own parameters are in a graph with others, which regions stay whole and why, whether training it "
        "is training the hand-written loss, and how often Dynamo breaks it. Written by `python -m tests.coverage` with "
        f"Python {platform.python_version()}, torch {torch.__version__} and transformers {transformers.__version__}.",
        "",
        "- *layers*: of those that a forward calls in eval mode, how many are visible: called, or their parameters "
        "read, by the emitted graph or by that of an island inside a region, with at least one other. Then, how many "
        "of them by the emitted graph itself.",
        "- *opaque regions*: called as a whole by the emitted graph. A layer without others inside is visible even so, "
        "and is left out.",
        f"- *faithful*: with `l1({STRENGTH:g})` on every parameter, outputs and buffers are bitwise those of the "
        "model, in train and in eval mode, and gradients those of the hand-written loss on another model.",
        "- *breaks*: graph breaks in train mode, of the model → of the emitted module, after a first call, which may "
        "set something; – where Dynamo fails.",
        "",
        "| family | kind | layers | opaque regions | faithful | breaks |",
        "|---|---|--:|---|---|--:|",
    ]
    for row in rows:
        cells = (
            row.name,
            row.kind,
            f"{row.seen} ({row.in_main}) of {row.layers}",
            _regions(row.opaque),
            _short(row.error, 200),
        )
        counts = (str(each.count) if each.count >= 0 else "–" for each in (row.theirs, row.ours))
        lines.append("| " + " | ".join([*cells[:4], cells[4] or "yes", " → ".join(counts)]) + " |")
    seen, layers = sum(row.seen for row in rows), sum(row.layers for row in rows)
    worse = [row for row in rows if row.breaks_more]
    longer = [row for row in rows if row.ours.count > row.theirs.count >= 0 and not row.breaks_more]
    lines += [
        "",
        "## Totals",
        "",
        f"- Layers visible: {seen:,} of {layers:,} ({100 * seen / layers:.1f} %), "
        f"{sum(row.in_main for row in rows):,} of them by the emitted graph itself. All of them in "
        f"{sum(row.seen == row.layers for row in rows)} families, none in {sum(row.seen == 0 for row in rows)}.",
        f"- Faithful: {sum(not row.error for row in rows)} of {len(rows)} families.",
        f"- Families where fxreg breaks more often than the model: {len(worse)}." + _listed(worse),
        f"- Families where it breaks no more often, but the penalty, after the model's last break, is a graph more: "
        f"{len(longer)}." + _listed(longer),
    ]
    return "\n".join(lines) + "\n"


def _listed(rows: Sequence[Row]) -> str:
    return f" {', '.join(row.name for row in rows)}." if rows else ""


def _regions(opaque: Mapping[str, str]) -> str:
    """Paths that differ in numbers alone as one, and those with the same reason together."""
    groups: dict[str, Counter[str]] = {}
    for path, why in opaque.items():
        groups.setdefault(why, Counter())[re.sub(r"\b\d+\b", "*", path)] += 1
    return "; ".join(f"{_paths(paths)}: {_short(why, 110)}" for why, paths in groups.items())


def _paths(paths: Mapping[str, int]) -> str:
    each = [(f"`{path}`" if path else "the model itself") + (f" ×{n}" if n > 1 else "") for path, n in paths.items()]
    return ", ".join(each[:3]) + (f" and {len(each) - 3} more" if len(each) > 3 else "")


def _short(text: str, most: int) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _measured(name: str) -> tuple[Row, float]:
    torch.set_num_threads(1)
    start = time.perf_counter()
    (family,) = (family for family in FAMILIES if family.name == name)
    return measure(family), time.perf_counter() - start


def main(names: Iterable[str]) -> None:
    chosen = [family for family in FAMILIES if not names or family.name in names]
    if unknown := set(names) - {family.name for family in chosen}:
        sys.exit(f"no such family: {', '.join(sorted(unknown))}")
    rows = []
    # A few families to a process: what one leaves behind in `transformers` and in the compiler is gone for the next.
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=8) as pool:
        for k, (row, took) in enumerate(pool.imap(_measured, [family.name for family in chosen]), 1):
            rows.append(row)
            print(
                f"{k}/{len(chosen)} {row.name}: {row.seen} of {row.layers}, {row.error or 'faithful'}, "
                f"{row.theirs.count} → {row.ours.count} breaks, {took:.1f} s",
                file=sys.stderr,
            )
    if names:
        print(page(rows))
    else:
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
