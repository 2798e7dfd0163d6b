"""Random numbers that are a pure function of a key, a step and an index: no generator has a part in them."""

import math

import torch
from torch import Tensor


def standard_normal(key: Tensor, step: Tensor, index: Tensor) -> Tensor:
    """Box–Muller over two hashed uniforms per element, in float64."""
    first, second = uniform(key, step, 2 * index), uniform(key, step, 2 * index + 1)
    return torch.sqrt(-2 * torch.log(first)) * torch.cos(2 * math.pi * second)


def uniform(key: Tensor, step: Tensor, index: Tensor) -> Tensor:
    """A number strictly between 0 and 1 for each index, in float64."""
    return _between(_mixed(_mixed(key + step * 0x632BE59BD9B4E019) + index))


def _mixed(bits: Tensor) -> Tensor:
    """splitmix64's finalizer (Steele, Lea and Flood, 2014) on wrapping int64."""
    bits = bits + _signed(0x9E3779B97F4A7C15)
    bits = (bits ^ _shifted(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shifted(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Logical right shift: torch's is arithmetic."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


def _between(bits: Tensor) -> Tensor:
    """The top 52 bits as a float64 strictly between 0 and 1."""
    return (_shifted(bits, 12).to(torch.float64) + 0.5) * 2.0**-52
