"""What every test starts from: one thread, one seed, and a compiler that remembers nothing."""

import collections
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import fx

from fxreg.module import RegularizedModule

torch.set_num_threads(1)  # the workers share the cores

settings.register_profile("fxreg", deadline=None, derandomize=True)
settings.load_profile("fxreg")


@pytest.hookimpl(tryfirst=True)  # before some are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test with many cases, one in five is quick."""
    cases = collections.Counter[str]()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if item.get_closest_marker("slow") is None:
            cases[test] += 1
            if cases[test] > 2 and cases[test] % 5:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _graphs_are_well_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every graph that a test emits is checked, which costs a user too much."""
    set_graph = RegularizedModule._set_graph

    def checked(self: RegularizedModule, graph: fx.Graph) -> None:
        graph.lint()
        set_graph(self, graph)

    monkeypatch.setattr(RegularizedModule, "_set_graph", checked)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """What one test compiled neither serves the next nor counts towards its limit of recompilations."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if guards := sys.modules.get("torch._dynamo.guards"):
        # For its log, Dynamo measures every set of guards behind emptied caches: a tenth of a compilation.
        vars(guards)["profile_guard_manager"] = lambda *given: 0.0


@pytest.fixture
def mesh() -> Iterator[Any]:
    """One rank, and a mesh of it."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield torch.distributed.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()
