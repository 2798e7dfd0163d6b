"""Gradient transforms: one formula each, of the loss's gradient g and the parameter w.

A transform acts once per parameter and forward call, on the gradient summed over the parameter's uses in that call,
before any penalty's gradient is added. None of the nonlinear ones commutes with gradient accumulation or with the
reduction over ranks: clipping four micro-batches' gradients is not clipping their sum. They act on what they see.
"""

import torch
from torch import Tensor

from .arguments import Stream, Strength
from .decorating import gradient
from .groups import group_norms
from .hashing import standard_normal
from .joining import joint_gradient
from .norms import norm, whole


@gradient
def clip_value(grad: Tensor, weight: Tensor, *, limit: Strength) -> Tensor:
    """Clamp every element, g ← max(-limit, min(g, limit)); NaN stays NaN.

    Args:
        limit: the largest absolute value, at least 0, in units of the gradient.

    Raises:
        RuleError: a limit that is negative, infinite or NaN.

    >>> import torch, fxreg
    >>> fxreg.clip_value.function(torch.tensor([-3.0, 0.5]), torch.zeros(2), limit=torch.tensor(1.0))
    tensor([-1.0000,  0.5000])

    Source: Mikolov (2012), "Statistical language models based on neural networks", section 3.2.2.
    """
    return torch.minimum(torch.maximum(grad, -limit), limit)


@gradient
def clip_norm(grad: Tensor, weight: Tensor, *, max_norm: Strength) -> Tensor:
    """Shrink the parameter's gradient to a norm, g ← g · min(1, max_norm / (‖g‖₂ + 1e-6)).

    Per parameter, as `torch.nn.utils.clip_grad_norm_` does for a list of one; a zero gradient stays zero.

    Args:
        max_norm: the largest 2-norm, at least 0, in units of the gradient.

    Raises:
        RuleError: a norm that is negative, infinite or NaN.

    >>> import torch, fxreg
    >>> g = fxreg.clip_norm.function(torch.tensor([3.0, 4.0]), torch.zeros(2), max_norm=torch.tensor(1.0))
    >>> round(float(g.norm()), 5)
    1.0

    Source: Pascanu, Mikolov and Bengio (2013), "On the difficulty of training recurrent neural networks", alg. 1.
    """
    return grad * torch.clamp(max_norm / (norm(grad) + 1e-6), max=1.0)


@joint_gradient
def clip_global_norm(grads: list[Tensor], weights: list[Tensor], *, max_norm: Strength) -> list[Tensor]:
    """Shrink the gradients of all the rule's parameters to one norm, g ← g · min(1, max_norm / (‖all g‖₂ + 1e-6)).

    What `torch.nn.utils.clip_grad_norm_` does to these parameters, in every backward pass: over those that have a
    gradient in it, in float32 or wider; zero gradients stay zero. The first part of a gradient that arrives waits for
    the last one. Where ranks each have a share of the batch, each clips its own gradients before they are averaged.

    Args:
        max_norm: the largest 2-norm of all gradients together, at least 0, in units of the gradient.

    Raises:
        RuleError: a norm that is negative, infinite or NaN.

    >>> import torch, fxreg
    >>> grads = [torch.tensor([3.0]), torch.tensor([0.0, 4.0])]
    >>> fxreg.clip_global_norm.function(grads, grads, max_norm=torch.tensor(10.0))
    [tensor([3.]), tensor([0., 4.])]
    >>> clipped = fxreg.clip_global_norm.function(grads, grads, max_norm=torch.tensor(1.0))
    >>> [[round(float(x), 5) for x in grad] for grad in clipped]
    [[0.6], [0.0, 0.8]]

    Source: Pascanu, Mikolov and Bengio (2013), "On the difficulty of training recurrent neural networks", alg. 1.
    """
    total = norm(torch.stack([whole(norm(grad)).to(max_norm) for grad in grads]))
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    return [grad * factor.to(grad) for grad in grads]


@gradient
def clip_block_rms(grad: Tensor, weight: Tensor, *, threshold: Strength) -> Tensor:
    """Shrink the parameter's gradient to a root mean square, g ← g / max(1, rms(g) / threshold).

    `clip_norm` for parameters of all sizes: rms(g) = ‖g‖₂/√n does not grow with their number n of elements.

    Args:
        threshold: the largest root mean square, at least 0, in units of the gradient.

    Raises:
        RuleError: a threshold that is negative, infinite or NaN.

    >>> import torch, fxreg
    >>> fxreg.clip_block_rms.function(torch.tensor([3.0, -3.0]), torch.zeros(2), threshold=torch.tensor(1.0))
    tensor([ 1., -1.])

    Source: Shazeer and Stern (2018), "Adafactor", section 6.
    """
    rms = norm(grad) / max(grad.numel(), 1) ** 0.5
    return torch.where(rms > threshold, grad * (threshold / rms), grad)


@gradient
def adaptive_clip(grad: Tensor, weight: Tensor, *, clipping: Strength, eps: float = 1e-3) -> Tensor:
    """Shrink each unit's gradient to a share of its weight's norm, g_u ← g_u · min(1, M_u / max(‖g_u‖₂, 1e-6)).

    M_u = clipping · max(‖w_u‖₂, ε), for one unit u per index along the first dimension; a vector or scalar is one unit.

    Args:
        clipping: the largest ratio of the norms, at least 0.
        eps: ε > 0, in units of the weight: what a smaller norm counts as, so that weights of 0 can move.

    Raises:
        RuleError: a ratio that is negative, infinite or NaN.

    >>> import torch, fxreg
    >>> weight, grad = torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.tensor([[6.0, 8.0], [0.1, 0.0]])
    >>> fxreg.adaptive_clip.function(grad, weight, clipping=torch.tensor(0.5))
    tensor([[1.5000, 2.0000],
            [0.1000, 0.0000]])

    Source: Brock, De, Smith and Simonyan (2021), "High-performance large-scale image recognition without
    normalization", eq. 3.
    """
    limits = clipping * _unit_norms(weight).clamp_min(eps).to(grad.dtype)
    norms = _unit_norms(grad)
    return torch.where(norms > limits, grad * (limits / norms.clamp_min(1e-6)), grad)


@gradient
def normalize(grad: Tensor, weight: Tensor, *, length: Strength) -> Tensor:
    """Give the parameter's gradient a norm, g ← g · length / (‖g‖₂ + 1e-6); a zero gradient stays zero.

    Args:
        length: the norm, at least 0, in units of the gradient.

    Raises:
        RuleError: a length that is negative, infinite or NaN.

    >>> import torch, fxreg
    >>> g = fxreg.normalize.function(torch.tensor([0.3, 0.4]), torch.zeros(2), length=torch.tensor(1.0))
    >>> round(float(g.norm()), 5)
    1.0

    Source: Hazan, Levy and Shalev-Shwartz (2015), "Beyond convexity: stochastic quasi-convex optimization".
    """
    return grad * (length / (norm(grad) + 1e-6))


@gradient
def trust_ratio(grad: Tensor, weight: Tensor, *, coefficient: Strength, eps: float = 0.0) -> Tensor:
    """Give the parameter's gradient a share of the weight's norm, g ← g · coefficient · ‖w‖₂ / (‖g‖₂ + ε).

    Unchanged where one of the norms is 0.

    Args:
        coefficient: the ratio of the norms, at least 0.
        eps: ε ≥ 0, in units of the gradient.

    Raises:
        RuleError: a coefficient that is negative, infinite or NaN.

    >>> import torch, fxreg
    >>> fxreg.trust_ratio.function(torch.tensor([0.0, 2.0]), torch.tensor([3.0, 4.0]), coefficient=torch.tensor(0.1))
    tensor([0.0000, 0.5000])

    Source: You, Gitman and Ginsburg (2017), "Large batch training of convolutional networks", eq. 6.
    """
    mine, its = norm(grad), norm(weight).to(grad.dtype)
    return torch.where((mine > 0) & (its > 0), grad * (coefficient * its / (mine + eps)), grad)


@gradient
def tangent(grad: Tensor, weight: Tensor) -> Tensor:
    """Leave out what would change the units' norms, g_u ← g_u − w_u · ⟨g_u, w_u⟩ / ‖w_u‖₂².

    One unit u per index along the first dimension; vectors and scalars pass unchanged, and so does a unit whose weight
    is 0. What is left is tangent to the sphere on which w_u lies: for weights of unit norm, and for weights before a
    normalization, whose norms say nothing.

    >>> import torch, fxreg
    >>> fxreg.tangent.function(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]]))
    tensor([[0., 2.]])

    Source: Absil, Mahony and Sepulchre (2008), "Optimization algorithms on matrix manifolds", section 3.6.
    """
    if grad.ndim < 2:
        return grad
    norms = group_norms(weight, 0)
    unit = torch.where(norms > 0, weight / norms, 0).to(grad.dtype)
    return grad - unit * (grad * unit).sum(tuple(range(1, grad.ndim)), keepdim=True)


@gradient
def scale(grad: Tensor, weight: Tensor, *, factor: Strength) -> Tensor:
    """Multiply, g ← factor · g: a learning rate of its own for what the rule matches.

    Args:
        factor: at least 0.

    Raises:
        RuleError: a factor that is negative, infinite or NaN.

    >>> import torch, fxreg
    >>> fxreg.scale.function(torch.tensor([2.0]), torch.zeros(1), factor=torch.tensor(0.5))
    tensor([1.])

    Source: Howard and Ruder (2018), "Universal language model fine-tuning", section 3.2.
    """
    return grad * factor


@gradient(detach=True)
def freeze(grad: Tensor, weight: Tensor) -> Tensor:
    """No gradient at all: the parameter is detached and its `.grad` stays None, so weight decay spares it too.

    Raises:
        MatchError: a penalty on the same parameter (when the rules are matched).

    >>> import torch, fxreg
    >>> model = torch.nn.Linear(3, 2)
    >>> gm = fxreg.transform(model, [fxreg.Rule(fxreg.freeze(), param="weight")])
    >>> gm(torch.ones(1, 3)).sum().backward()
    >>> model.weight.grad, model.bias.grad
    (None, tensor([1., 1.]))

    Source: Yosinski et al. (2014), "How transferable are features in deep neural networks?", section 2.
    """
    return torch.zeros_like(grad)


@gradient
def mask(grad: Tensor, weight: Tensor, *, mask: Tensor) -> Tensor:
    """Keep the gradient where the mask is true, g ← g where mask, else 0 (also where g is NaN).

    Args:
        mask: a tensor that broadcasts to the parameter's shape: boolean, or numbers of which 0 means false.

    Raises:
        RuleError: not a tensor, or of a shape that does not broadcast to the parameter's.

    >>> import torch, fxreg
    >>> fxreg.mask.function(torch.ones(2), torch.zeros(2), mask=torch.tensor([True, False]))
    tensor([1., 0.])

    Source: Frankle and Carbin (2019), "The lottery ticket hypothesis", section 1.
    """
    return torch.where(mask != 0, grad, 0)


@gradient
def centralize(grad: Tensor, weight: Tensor) -> Tensor:
    """Subtract each output unit's mean, g ← g − mean over dims 1…; vectors and scalars pass unchanged.

    >>> import torch, fxreg
    >>> fxreg.centralize.function(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2))
    tensor([[-1.,  1.]])

    Source: Yong et al. (2020), "Gradient centralization", eq. 1.
    """
    if grad.ndim < 2:
        return grad
    return grad - grad.mean(dim=tuple(range(1, grad.ndim)), keepdim=True)


@gradient
def zero_nans(grad: Tensor, weight: Tensor) -> Tensor:
    """Replace NaN by 0 and keep everything else, infinities included.

    With a loss scale other than 1 a gradient that is not finite passes unchanged, so that a GradScaler sees it.

    >>> import torch, fxreg
    >>> fxreg.zero_nans.function(torch.tensor([float("nan"), float("inf")]), torch.zeros(2))
    tensor([0., inf])

    Source: DeepMind (2020), Optax, `zero_nans`.
    """
    return torch.where(grad.isnan(), 0, grad)


@gradient
def add_noise(
    grad: Tensor, weight: Tensor, *, eta: Strength, stream: Stream, gamma: float = 0.55, seed: int = 0
) -> Tensor:
    """Add Gaussian noise that fades, g ← g + N(0, eta / t^gamma), with t = 1 in the first forward call.

    A pure function of the seed, the parameter's name, the step and the element's index: torch's own generators are
    neither read nor advanced, and a resumed run (`fxreg.state_dict`) draws what the first would have drawn. A forward
    call that activation checkpointing repeats counts as a step.

    Args:
        eta: the variance at t = 1, at least 0, in units of the gradient squared.
        gamma: how fast the variance fades; 0 keeps it.
        seed: chooses the noise.

    Raises:
        RuleError: an eta that is negative, infinite or NaN.

    >>> import fxreg
    >>> fxreg.add_noise(0.01, seed=7)
    add_noise(0.01, gamma=0.55, seed=7)

    Source: Neelakantan et al. (2015), "Adding gradient noise improves learning for very deep networks", eq. 1.
    """
    key, step = stream.unbind()
    deviation = (eta / step.to(grad.dtype) ** gamma).sqrt()
    index = torch.arange(grad.numel(), device=grad.device).reshape(grad.shape)
    return grad + deviation * standard_normal(key, step, index).to(grad.dtype)


def _unit_norms(tensor: Tensor) -> Tensor:
    """The 2-norm of each output unit, of all of a vector or scalar; broadcastable against the tensor."""
    return group_norms(tensor, 0) if tensor.ndim > 1 else norm(tensor)
