"""What every test starts from: one thread, one seed, and a compiler that remembers nothing."""

import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # the workers share the cores

settings.register_profile("fxreg", deadline=None, derandomize=True)
settings.load_profile("fxreg")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """What one test compiled neither serves the next nor counts towards its limit of recompilations."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
