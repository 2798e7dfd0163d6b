"""Regularization as a compiler pass: declarative rules rewrite a captured FX graph, and the result trains.

>>> import torch, fxreg
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
>>> gm = fxreg.transform(model, [fxreg.Rule(fxreg.l1(1e-4), layer="Linear", param="weight")])
>>> print(fxreg.explain(gm).plan)
rule    effect      parameter    shape      size  lowering    notes
------  ----------  -----------  -------  ------  ----------  -------
l1      l1(0.0001)  0.weight     8×4          32  penalty
l1      l1(0.0001)  2.weight     1×8           8  penalty
"""

from .activations import decorrelation, kl_sparsity, variance
from .anchors import ewc, l2_sp
from .arguments import Anchor, Stream, Strength
from .constraining import constraint
from .constraints import (
    box,
    l1_ball,
    l2_ball,
    limit_norm,
    min_max_norm,
    n_m_sparsity,
    non_negative,
    simplex,
    unit_norm,
)
from .controls import load_state_dict, penalties, set_loss_scale, state_dict, strengths
from .decorating import gradient, penalty
from .drawing import draw
from .errors import CaptureError, FxregError, MatchError, RuleError, VerifyError
from .files import dump_rules, load_rules
from .functions import input_gradient, jacobian
from .gradients import (
    adaptive_clip,
    add_noise,
    centralize,
    clip_block_rms,
    clip_global_norm,
    clip_norm,
    clip_value,
    freeze,
    mask,
    normalize,
    scale,
    tangent,
    trust_ratio,
    zero_nans,
)
from .groups import group_lasso, max_norm, sparse_group_lasso
from .joining import joint_gradient
from .kernels import total_variation
from .linting import lint
from .lints import Lint
from .matrices import nuclear_norm, orthogonal, soft_orthogonal, spectral
from .network import to_networkx
from .nonconvex import entropy, hoyer, log_sum, lp, mcp, scad, smooth_l1
from .optimizing import param_groups
from .positions import after, before, last
from .proximal import ProximalStep
from .regularizers import elastic_net, l1, l2, weight_decay
from .reporting import diff, explain
from .rules import Rule
from .schedules import StrengthScheduler
from .schemas import rules_schema
from .stepping import train_step
from .transforming import strip, transform
from .verifying import verify

__version__ = "0.1.0"

__all__ = [
    "Anchor",
    "CaptureError",
    "FxregError",
    "Lint",
    "MatchError",
    "ProximalStep",
    "Rule",
    "RuleError",
    "Stream",
    "Strength",
    "StrengthScheduler",
    "VerifyError",
    "adaptive_clip",
    "add_noise",
    "after",
    "before",
    "box",
    "centralize",
    "clip_block_rms",
    "clip_global_norm",
    "clip_norm",
    "clip_value",
    "constraint",
    "decorrelation",
    "diff",
    "draw",
    "dump_rules",
    "elastic_net",
    "entropy",
    "ewc",
    "explain",
    "freeze",
    "gradient",
    "group_lasso",
    "hoyer",
    "input_gradient",
    "jacobian",
    "joint_gradient",
    "kl_sparsity",
    "l1",
    "l1_ball",
    "l2",
    "l2_ball",
    "l2_sp",
    "last",
    "limit_norm",
    "lint",
    "load_rules",
    "load_state_dict",
    "log_sum",
    "lp",
    "mask",
    "max_norm",
    "mcp",
    "min_max_norm",
    "n_m_sparsity",
    "non_negative",
    "normalize",
    "nuclear_norm",
    "orthogonal",
    "param_groups",
    "penalties",
    "penalty",
    "rules_schema",
    "scad",
    "scale",
    "set_loss_scale",
    "simplex",
    "smooth_l1",
    "soft_orthogonal",
    "sparse_group_lasso",
    "spectral",
    "state_dict",
    "strengths",
    "strip",
    "tangent",
    "to_networkx",
    "total_variation",
    "train_step",
    "transform",
    "trust_ratio",
    "unit_norm",
    "variance",
    "verify",
    "weight_decay",
    "zero_nans",
]
