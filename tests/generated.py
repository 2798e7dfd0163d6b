"""The code that Inductor generates, without what takes its time: the C++ compiler."""

from collections.abc import Callable
from typing import Any
from unittest import mock

from torch._inductor.async_compile import AsyncCompile
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.utils import fresh_cache, run_and_get_code


def code_of(step: Callable[[], Any]) -> list[str]:
    """The code of every graph that a step compiles, in their order. Its kernels do nothing: the values are none."""
    kernels = mock.patch.object(AsyncCompile, "cpp_pybinding", return_value=lambda *tensors: None)
    pick_vec_isa()  # by a trial, once and for all: not so in a cache of its own
    with fresh_cache(), kernels:
        _, codes = run_and_get_code(step)
    return codes
