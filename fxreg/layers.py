"""What a module is to capture: a layer, something to look into, or something to leave whole."""

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as module_globals

from .hearing import has_own_forward
from .scanning import untraceable_reason
from .side_channels import GLOBAL_HOOKS, HOOKS, has_hooks

_LAYERS = ("torch.nn.modules.", "torch.nn.utils.parametrize", "torch.ao.nn.")
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one of torch's own layers: what people know the model by, and nodes of their own."""
    return type(module).__module__.startswith(_LAYERS) and type(module) is not nn.Sequential


def is_plain_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of torch's in which nothing of the user's runs."""
    return is_layer(module) and not module._modules and not has_hooks(module)


def whole_reason(module: nn.Module, runs: bool = False) -> str | None:
    """Why a module must be called as a whole before anything is tried, if it must.

    Its code is not asked where it `runs` for real.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return "is a scripted module"
    own = vars(module)
    if any(own[hooks] for hooks in (_BACKWARD_HOOKS if runs else HOOKS)):
        return "has hooks"
    if has_own_forward(module) or "__call__" in own:
        return "has a forward of its own instance"
    if any(getattr(module_globals, hooks) for hooks in GLOBAL_HOOKS):
        return "global module hooks are registered"
    if isinstance(module, fx.GraphModule):
        return None
    if type(module).__call__ is not nn.Module.__call__:
        return "overrides __call__"
    if type(module).__module__.startswith("torch.") and not isinstance(module, nn.Sequential | fx.GraphModule):
        return f"is torch's {type(module).__name__}"
    return None if runs else untraceable_reason(module)


def tensor_paths(paths: dict[nn.Module, str], root_alias: str) -> dict[int, str]:
    """Where the emitted module finds every tensor that a module keeps, by identity."""
    found: dict[int, str] = {}
    ambiguous: set[int] = set()  # one tensor under two attributes: which of them was read?
    for module, path in paths.items():
        for attributes in (vars(module), module._buffers, module._parameters):
            # The emitted module has the root's parameters and buffers; its plain attributes stay with the original.
            owner = path or (root_alias if attributes is vars(module) else "")
            for name, value in attributes.items():
                if isinstance(value, Tensor):
                    if id(value) in found and attributes is vars(module):
                        ambiguous.add(id(value))
                    found[id(value)] = f"{owner}.{name}" if owner else name
    return {identity: path for identity, path in found.items() if identity not in ambiguous}


def ambient_state() -> tuple[object, ...]:
    """What surrounds a call and changes what it does; the same while a forward does nothing about it."""
    modes = (torch._C.is_grad_enabled(), torch._C.is_inference_mode_enabled(), torch._C._is_any_autocast_enabled())
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return (*modes, torch.get_default_dtype(), torch._C._len_torch_dispatch_stack(), hooks)


def described(error: BaseException) -> str:
    """An error as a short reason."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
