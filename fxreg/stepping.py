"""train_step: forward, backward, penalties and update as one compiled graph."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from .capture import split_examples
from .errors import FxregError
from .module import RegularizedModule, emitted, scalar_dtype, state_of
from .proximal import Move, ProximalStep, leading
from .updates import moving, update_of
from .whole import Group, Job, WholeStep, separable_terms

Loss: TypeAlias = Callable[..., Tensor]


def train_step(
    gm: nn.Module,
    loss_fn: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
) -> "TrainStep":
    """Compile a whole training step: the gradient of loss + Σ s·R(w), and the optimizer's update with it.

    `loss = step(inputs, *targets)` is one graph for the ordinary loop's

        optimizer.zero_grad()
        loss = loss_fn(gm(*inputs), *targets)
        loss.backward()
        optimizer.step()

    Parameters and the optimizer's state are changed in place, so that checkpoints, learning-rate schedulers and the
    ordinary loop go on from there, and back. Strengths and the optimizer's numbers are read at every step, and new ones
    compile nothing anew. `.grad` is neither read nor written.

    The gradient of a penalty is taken by itself, in closed form where it has one, and added to the loss's behind all
    transforms. With `emit="output"` the step adds the penalty to the loss, and `loss_fn` is given the output alone;
    with `emit="loss"`, `loss_fn` is given the output whose loss has the penalty in it.

    Args:
        gm: what `fxreg.transform` returned.
        loss_fn: (output, *targets) → the loss, a 0-d tensor.
        optimizer: a `torch.optim.SGD`, `Adam` or `AdamW`. Parameters of the module that it does not hold stay as they
            are; it may hold others.
        backend: as for `torch.compile`, like `mode` and `dynamic`.

    Returns:
        A function: `inputs` are a tensor, a tuple (positional) or a dict (keyword); it returns the loss, detached, as
        it was before the update.

    Raises:
        FxregError: an optimizer or an option that has no formula here; something that a compiled step would pass by:
            hooks on parameters or before the optimizer's step, parameters that are not plain tensors, other ranks; a
            model or a loss that does not compile whole.

    >>> import torch, fxreg
    >>> model = torch.nn.Linear(4, 1)
    >>> gm = fxreg.transform(model, [fxreg.Rule(fxreg.l1(0.1), param="weight")])
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> step = fxreg.train_step(gm, torch.nn.functional.mse_loss, optimizer, backend="aot_eager")
    >>> before = model.weight.detach().clone()
    >>> loss = step(torch.zeros(8, 4), torch.zeros(8, 1))
    >>> torch.allclose(model.weight, before - 0.1 * 0.1 * before.sign())
    True
    """
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        raise FxregError(
            f"train_step: torch {torch.__version__} has no torch._dynamo.config.trace_autograd_ops, which puts a "
            "backward pass into a graph. Use a later torch, or the ordinary loop with torch.compile(gm)."
        )
    return TrainStep(emitted(gm), loss_fn, optimizer, dynamic=dynamic, **_compiler(backend, mode))


def _compiler(backend: str | Callable[..., Any], mode: str | None) -> dict[str, Any]:
    """The arguments of `torch.compile` that say who compiles, and how."""
    if backend != "inductor":
        return {"backend": backend, "mode": mode}
    from .channels_last import inductor_options  # imports Inductor, which takes as long as torch itself

    return {"backend": backend, "options": inductor_options(mode)}


class TrainStep:
    """What `train_step` returns: the compiled step, and what it was made from."""

    def __init__(self, gm: RegularizedModule, loss_fn: Loss, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        self.gm, self.loss_fn, self.optimizer = gm, loss_fn, optimizer
        self._update = update_of(optimizer)
        _refuse_strangers(gm, optimizer)
        self._numbers: dict[int, tuple[Tensor, dict[str, float | None]]] = {}
        self._zeros: dict[torch.device, Tensor] = {}
        self._spare: dict[Tensor, dict[str, Tensor]] = {}
        self._counts: dict[Tensor, tuple[Tensor, float | None]] = {}
        self._terms = separable_terms(gm)
        whole = WholeStep(gm, loss_fn, state_of(gm).provenance.emit, self._terms, self._update.formula)
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            options["isolate_recompiles"] = True  # the graphs of other steps are none of this one's
        self._compiled: Callable[..., Any] = torch.compile(whole.run, fullgraph=True, **options)
        self._groups()  # what it refuses, it refuses at once

    def __call__(self, inputs: Any, *targets: Any) -> Tensor:
        """Train on one batch, and return its loss."""
        args, kwargs = split_examples((inputs,) if isinstance(inputs, Tensor) else inputs)
        proximal = leading(self.optimizer)
        groups = self._groups(proximal)
        live = [term.live(self.gm) for term in self._terms or ()]
        told = ExitStack()

        def step(optimizer: torch.optim.Optimizer) -> Tensor:
            with torch._dynamo.config.patch(trace_autograd_ops=True):
                loss: Tensor
                loss, moved = self._compiled(args, kwargs, targets, self._zero(), live, groups)
            told.enter_context(moving(optimizer, self._kept(groups, moved), proximal))
            vars(optimizer)["_opt_called"] = True  # a scheduler asks for it before it warns
            return loss

        hooked: Any = torch_optimizer.Optimizer.profile_hook_step(step)  # calls the hooks, as the optimizer's own does
        try:
            with told:
                result: Tensor = hooked(self.optimizer)
                return result
        except torch._dynamo.exc.TorchDynamoException as error:
            raise FxregError(
                "train_step: the model, the loss and the update must compile as one graph, and do not. Mend what "
                f"breaks it, or use the ordinary loop with torch.compile(gm). Dynamo says: {error}"
            ) from error

    def _groups(self, proximal: Iterable[ProximalStep] = ()) -> list[Group]:
        """The optimizer as it is now: options may have been changed, and states loaded."""
        _refuse_unseen(self.gm, self.optimizer)
        found = []
        moves: dict[Tensor, list[Move]] = {}
        for step in proximal:
            for parameter, own in step.moves().items():
                moves.setdefault(parameter, []).extend(own)
        for place, group in enumerate(self.optimizer.param_groups):
            numbers = self._update.numbers(group)
            trainable = [parameter for parameter in group["params"] if parameter.requires_grad]
            jobs = [self._job(parameter, group, moves.get(parameter, [])) for parameter in trainable]
            found.append((tuple(numbers), self._written(place, numbers, group["params"]), jobs))
        return found

    def _job(self, parameter: Tensor, group: Mapping[str, Any], moves: list[Move]) -> Job:
        switches, names = self._update.switches(group), self._update.names(group)
        state = self.optimizer.state.get(parameter, {})
        new = [name for name in names if state.get(name) is None]
        if new:
            spare = self._spare.get(parameter)
            if spare is None or spare.keys() != set(names) or spare[names[-1]].device != parameter.device:
                spare = self._spare[parameter] = self._update.prepared(parameter, group)
            state = {**state, **{name: spare[name] for name in new}}
        if switches.get("dampening"):  # else nothing asks, and the first graph is that of all steps
            switches["new"] = bool(new)
        live = {name: _standing(_no_number(state[name])) for name in names}
        before = self._counts.pop(parameter, None)
        if "step" in live and live["step"].device != parameter.device:
            live["step"] = self._counted(parameter, state["step"], before)
        return parameter, live, switches, moves

    def _counted(self, parameter: Tensor, own: Tensor, before: tuple[Tensor, float | None] | None) -> Tensor:
        """The count of steps that an optimizer keeps on the CPU, where the parameter is: to write into the optimizer's
        would wait for the device."""
        count, last = before or (torch.zeros_like(own, device=parameter.device), None)
        if last != float(own):
            count.fill_(float(own))
        self._counts[parameter] = count, None  # until the step is done
        return _standing(count)

    def _kept(self, groups: list[Group], moved: tuple[bool, ...]) -> set[Tensor]:
        """The parameters that moved; the new states of theirs are the optimizer's, as it would have made them."""
        jobs = (job for _, _, jobs in groups for job in jobs)
        found = {parameter for (parameter, *_), has_moved in zip(jobs, moved, strict=True) if has_moved}
        for parameter in found & self._spare.keys():
            state = self.optimizer.state[parameter]
            state.update({name: one for name, one in self._spare.pop(parameter).items() if state.get(name) is None})
        for parameter in found & self._counts.keys():
            own = self.optimizer.state[parameter]["step"].add_(1)
            self._counts[parameter] = self._counts[parameter][0], float(own)
        return found

    def _written(self, place: int, numbers: Mapping[str, float | Tensor], parameters: list[Tensor]) -> Tensor:
        """The numbers of a group as one tensor: by themselves they would be constants of the graph."""
        devices = {parameter.device for parameter in parameters}
        device = devices.pop() if len(devices) == 1 else torch.device("cpu")
        tensor, last = self._numbers.get(place, (None, {}))
        if tensor is None or tensor.device != device:
            tensor, last = torch.zeros(len(numbers), dtype=scalar_dtype(device), device=device), {}
        for k, (name, number) in enumerate(numbers.items()):
            if isinstance(number, Tensor):
                tensor[k].copy_(number.detach().reshape(()))
                last[name] = None
            elif last.get(name) != number:
                tensor[k].fill_(number)
                last[name] = number
        self._numbers[place] = tensor, last
        return _standing(tensor)

    def _zero(self) -> Tensor:
        device = state_of(self.gm).loss_scale.device
        if device not in self._zeros:
            self._zeros[device] = torch.zeros(1, dtype=scalar_dtype(device), device=device, requires_grad=True)
        return self._zeros[device]


def _standing(tensor: Tensor) -> Tensor:
    """The same, for CUDA graphs to read and write where it is."""
    if tensor.is_cuda:
        torch._dynamo.mark_static_address(tensor)
    return tensor


def _no_number(state: Tensor) -> Tensor:
    """The same memory, with a dimension where Dynamo would take it for a number, and drop what is written into it."""
    is_taken = state.ndim == 0 and state.dtype == torch.float64 and state.device.type == "cpu"
    return state.view(1) if is_taken else state


def _refuse_strangers(gm: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    own = {id(parameter) for parameter in gm.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise FxregError(
            f"train_step: the optimizer ({type(optimizer).__name__}) holds none of the module's parameters. Make it of "
            "the model's own, model.parameters()."
        )


def _refuse_unseen(gm: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse what the ordinary loop would run, and one graph passes by."""
    if torch_optimizer._global_optimizer_pre_hooks or optimizer._optimizer_step_pre_hooks:
        raise FxregError(
            "train_step: the optimizer has a hook before its step, which would find no gradients. Use a gradient rule "
            "(fxreg.clip_norm, @fxreg.gradient), or the ordinary loop. Hooks after the step are called."
        )
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise FxregError(
            f"train_step: {distributed.get_world_size()} ranks are training, and the step would not reduce gradients "
            "over them. Use the ordinary loop with DistributedDataParallel or fully_shard."
        )
    update_of(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if why := _unseen(parameter):
                names = {id(own): name for name, own in gm.named_parameters()}
                name = names.get(id(parameter), "that is not the module's")
                raise FxregError(f"train_step: parameter {name!r} {why}")


def _unseen(parameter: Tensor) -> str | None:
    if type(parameter) not in (nn.Parameter, Tensor):
        return f"is a {type(parameter).__name__}, not a plain tensor. Use the ordinary loop."
    if parameter.is_complex():
        return "is complex, and the formulas of the updates are for real ones. Use the ordinary loop."
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        return (
            "has a hook on its gradient, which a graph would not call. Use a gradient rule (@fxreg.gradient), or the "
            "ordinary loop."
        )
    return None
