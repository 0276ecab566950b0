"""What an optimiser step does beside forward and backward pass, in few operations.

A GPU waits where the host launches kernels more slowly than they run. So the tensors of a step are
listed once, and each operation takes all of them. A step whose loss or gradients are not finite
leaves no trace, and on a GPU the host does not wait to know.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import numpy
import timm.layers
import timm.utils
import torch

# Activations whose backward pass needs their input: in place they cost a copy of it.
NEED_INPUT = (torch.nn.ReLU6, torch.nn.Hardtanh, torch.nn.Hardswish, torch.nn.Hardsigmoid,
              torch.nn.SiLU, torch.nn.Mish)
# Layers of which autocast casts weight and bias, and that use them for nothing else.
CAST = (torch.nn.Conv2d, torch.nn.Linear, timm.layers.Conv2dSame)


def avoid_clones(model: torch.nn.Module) -> None:
    """Take activations out of place where autograd would copy their input; results are the same."""
    for module in model.modules():
        if isinstance(module, NEED_INPUT):
            module.inplace = False


class StepGuard:
    """Clips and applies the gradients of a step, unless they are not finite.

    The order of calls is: `begin`, the forward passes within `forward` and their backward passes,
    `norm`, `finish`.

    Args:
        model: network; its tensors must stay the same.
        optimizer: of its parameters; None for `forward` alone.
        ema: average of its weights, or None.
        cast: whether weights are cast together where autocast is enabled. DDP would get all
            gradients at the end then, and could not exchange them meanwhile.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None,
                 ema: timm.utils.ModelEmaV3 | None = None, cast: bool = False):
        self.optimizer, self.ema = optimizer, ema
        self._casts = [(m, name) for m in model.modules() if cast and type(m) in CAST
                       for name in ("weight", "bias") if getattr(m, name) is not None]
        self.parameters = list(model.parameters())
        self._norms = [m for m in model.modules()
                       if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)
                       # It refuses to work without its counter.
                       and not isinstance(m, torch.nn.SyncBatchNorm)
                       and m.num_batches_tracked is not None and m.momentum is not None
                       and m.weight is not None]
        self._counters, self._passes = None, 0
        counted = {id(norm.num_batches_tracked) for norm in self._norms}
        state = model.state_dict(keep_vars=True).values()
        # Other buffers than those of checkpoints are constants.
        self.snapshot = BufferSnapshot(value for value in state if id(value) not in counted
                                       and not isinstance(value, torch.nn.Parameter))
        self._averages, self._weights, self._copies, self._others = [], [], [], []
        for old, new in zip(ema.module.state_dict().values() if ema is not None else (), state):
            floating = old.is_floating_point()
            (self._averages if floating else self._copies).append(old)
            (self._weights if floating else self._others).append(new.detach())

    def begin(self) -> None:
        """Drop the gradients, and keep the buffers, which a bad step must not change."""
        self.optimizer.zero_grad(set_to_none=True)
        self.snapshot.take()
        self._passes = 0

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Do at once what each layer of a forward pass would launch a kernel for.

        `finish` counts the pass for all batch norms (num_batches_tracked); the number has no effect
        on training. Weights of convolutions are cast together to the dtype of autocast.
        """
        counters = [norm.num_batches_tracked for norm in self._norms]
        weights = [module._parameters[name] for module, name in self._casts]
        kind = self.parameters[0].device.type
        cast = _CastTogether.apply(torch.get_autocast_dtype(kind), *weights) \
            if weights and torch.is_autocast_enabled(kind) else weights
        for norm in self._norms:
            norm._buffers["num_batches_tracked"] = None
        _put(self._casts, cast)
        try:
            yield
        finally:
            for norm, counter in zip(self._norms, counters):
                norm._buffers["num_batches_tracked"] = counter
            _put(self._casts, weights)
        self._passes += 1

    def norm(self, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip the gradients to the norm `limit`, 0 for no limit.

        Returns:
            The norm before, a scalar, and whether it is not finite, a bool scalar, on the device.
        """
        if limit:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters
                                                  if p.grad is not None])
        return norm, norm - norm != 0

    def finish(self, number: int, bad: torch.Tensor) -> None:
        """Step the optimiser, then update the weight average, unless the step is bad.

        The host does not wait for `bad` if the optimiser is fused: the kernels on the device test
        it.

        Args:
            number: index of the step in the stage, for the warm-up of the average.
            bad: bool scalar on the parameters' device.
        """
        if self._counters is None:
            # A layer that the forward pass leaves out has no gradient, and counts nothing.
            self._counters = [norm.num_batches_tracked for norm in self._norms
                              if norm.weight.grad is not None]
        if self.optimizer.defaults.get("fused"):
            self._finish_on_device(number, bad)
        elif bad:
            self.snapshot.restore()
        else:
            if self._counters:
                torch._foreach_add_(self._counters, self._passes)
            self.optimizer.step()
            if self.ema is not None:
                self._update_average(1 - self.ema.get_decay(number))

    def _finish_on_device(self, number, bad):
        self.snapshot.restore_if(bad)
        good = ~bad
        if self._counters:
            torch._foreach_add_(self._counters, good.long(), alpha=self._passes)
        self.optimizer.found_inf = bad.float()
        self.optimizer.step()
        if self.ema is not None:
            self._update_average((1 - self.ema.get_decay(number)) * good)

    @torch.no_grad()
    def _update_average(self, weight):
        """Do what ModelEmaV3.update does, with 1 - decay as a number or a tensor on the device."""
        if isinstance(weight, torch.Tensor):
            differences = torch._foreach_sub(self._weights, self._averages)
            torch._foreach_mul_(differences, weight)
            torch._foreach_add_(self._averages, differences)
        else:
            torch._foreach_lerp_(self._averages, self._weights, weight)
        if self._copies:
            torch._foreach_copy_(self._copies, self._others)


class _CastTogether(torch.autograd.Function):
    """Cast tensors to a dtype in one operation, and their gradients back in one.

    Values are those of autocast, which casts each weight by itself.
    """

    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.tensors = tensors
        cast = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
        torch._foreach_copy_(cast, tensors)
        return cast

    @staticmethod
    def backward(ctx, *gradients):
        given = [(tensor, gradient) for tensor, gradient in zip(ctx.tensors, gradients)
                 if gradient is not None]
        found = iter([torch.empty_like(tensor) for tensor, _ in given])
        results = [None if gradient is None else next(found) for gradient in gradients]
        torch._foreach_copy_([result for result in results if result is not None],
                             [gradient for _, gradient in given])
        return None, *results


def _put(places, tensors):
    """Set parameters of modules by (module, name), without the checks of torch.nn.Module."""
    for (module, name), tensor in zip(places, tensors):
        module._parameters[name] = tensor


class BufferSnapshot:
    """Copies of buffers, to undo what a bad step's forward pass changed.

    Buffers of one dtype are copied as one tensor, because launching a copy takes a GPU longer than
    copying a small tensor.
    """

    def __init__(self, buffers: Iterable[torch.Tensor]):
        self.groups, self.values = {}, {}
        for buffer in buffers:
            self.groups.setdefault(buffer.dtype, []).append(buffer)

    def take(self) -> None:
        """Copy the buffers."""
        self.values = {dtype: _flatten(group) for dtype, group in self.groups.items()}

    def restore(self) -> None:
        """Restore the buffers."""
        for dtype, values in self.values.items():
            self._write(dtype, values)

    def restore_if(self, bad: torch.Tensor) -> None:
        """Restore the buffers where `bad`, a bool scalar on their device, is true."""
        for dtype, values in self.values.items():
            self._write(dtype, torch.where(bad, values, _flatten(self.groups[dtype])))

    def _write(self, dtype, values):
        group = self.groups[dtype]
        parts = values.split([buffer.numel() for buffer in group])
        torch._foreach_copy_(group, [part.view_as(buffer) for part, buffer in zip(parts, group)])


def _flatten(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


class StepSeeder:
    """Seeds torch's generators for a step, unless steps draw no random numbers.

    Seeding takes time of the host, and most networks have neither dropout nor stochastic depth. The
    first step shows whether anything is drawn.

    Attributes:
        drawing: whether steps draw random numbers; None before the second one.
    """

    def __init__(self):
        self.drawing, self._seeded = None, None

    def seed(self, numbers: tuple[int, ...]) -> None:
        """Seed by whole numbers, the same for the same numbers."""
        if self.drawing is None and self._seeded is not None:
            self.drawing = _random_state() != self._seeded
        if self.drawing is False:
            return
        torch.manual_seed(int(numpy.random.SeedSequence(numbers).generate_state(1)[0]))
        if self.drawing is None:
            self._seeded = _random_state()


def _random_state():
    """Return the state of torch's generators, of the CPU and of this process's GPU."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return [state.tolist() for state in states]
