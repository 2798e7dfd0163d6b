"""The memory format of convolutions in a whole step: without it, Inductor makes every activation in two."""

from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files


def inductor_options(mode: str | None) -> dict[str, Any]:
    """Inductor's options for a whole step: those of `mode`, and the pass below.

    Somebody's own `torch._inductor.config.pre_grad_custom_pass` is left in its place.
    """
    options: dict[str, Any] = dict(torch._inductor.list_mode_options(mode)) if mode else {}
    if torch._inductor.config.pre_grad_custom_pass is None:
        options["pre_grad_custom_pass"] = _channels_last
    return options


class ChannelsLast(CustomGraphPass):
    """Convert the contiguous weights of convolutions on the CPU to channels last, where they are read.

    There Inductor computes convolutions with channels last, whatever the format of weights and inputs. Their backward
    is a node of the same graph here, and what goes into it must have the strides that it had when it was traced:
    contiguous, with a contiguous weight. So activations would be made in both formats. A converted weight makes all
    that follows channels last from the start. Values are those of the same convolution; parameters keep their format.
    """

    def __call__(self, graph: fx.Graph) -> None:
        if not (torch._inductor.config.layout_optimization and torch.backends.mkldnn.enabled):
            return
        for node in graph.find_nodes(op="call_function", target=torch.conv2d):
            weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
            if isinstance(weight, fx.Node) and _is_for(weight.meta.get("example_value")):
                with graph.inserting_before(node):  # not behind the weight, which may be written in between
                    new = graph.call_method("contiguous", (weight,), {"memory_format": torch.channels_last})
                new.meta["example_value"] = weight.meta["example_value"].contiguous(memory_format=torch.channels_last)
                node.replace_input_with(weight, new)

    def uuid(self) -> bytes:
        """What caches of compiled graphs know the pass by."""
        return get_hash_for_files((__file__,))


def _is_for(weight: Any) -> bool:
    if not isinstance(weight, Tensor) or weight.device.type != "cpu" or weight.dtype == torch.float64:
        return False  # oneDNN has no float64
    return weight.ndim == 4 and weight.is_contiguous()


_channels_last = ChannelsLast()
