"""2-norms of numbers of every size: the squares of 1e30 and of 1e-30 are no float32, and the norms are.

They cost one more pass over the tensor than a norm that divides by nothing.
"""

import math

import torch
from torch import Tensor


def whole(number: Tensor) -> Tensor:
    """A number that was computed from a sharded tensor, for all ranks: beside it there may be others that were not."""
    return number.full_tensor() if hasattr(number, "full_tensor") else number


def norm(tensor: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """‖x‖₂ of all of a tensor, 0-d; or over some dimensions, which stay, of size 1. Gradient: x/‖x‖₂, 0 at 0."""
    stay = dim is not None
    largest: Tensor | float = 1.0
    if tensor.numel():
        # A constant to every derivative: the norm does not depend on it.
        size = tensor.detach().abs().amax(dim or (), keepdim=stay)
        largest = torch.where((size > 0) & (size < math.inf), size, 1.0)
    scaled: Tensor = torch.linalg.vector_norm(tensor / largest, dim=dim, keepdim=stay)
    return scaled * largest
