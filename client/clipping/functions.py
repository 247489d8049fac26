"""The autograd functions of the single-backward engine: input gradients out, uses filed.

Each returns the gradient of its batched input and nothing for its parameters; what clipping
needs goes to the tape. Saved tensors go through `save_for_backward`, so gradient checkpointing
works; a backward gets them as arguments.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from client.clipping.gram import row_sums
from client.clipping.tape import FanUse, MatrixUse, TableUse, Tape, per_record

# torch.autograd.Function ships no types.
# mypy: disable-error-code="no-untyped-call,misc"

NORMED_TOGETHER = 100_000
"""Elements of a layer norm's input that are looked at at a time: they stay in the cache."""


def applied(function: type[Function], *arguments: Any) -> Tensor:
    """`function.apply`, typed."""
    output: Tensor = function.apply(*arguments)
    return output


def _uncaptured(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward whose torch calls no capture looks at: they are many, and use no parameter anew.

    Captures stay on for the layers that checkpointing runs again, as unpacking saved tensors may.
    """

    @functools.wraps(backward)
    def run(ctx: Any, g: Tensor) -> Any:
        saved = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            return backward(ctx, g, *saved)

    return run


@dataclass
class Branches:
    """The gradient of an input that several matrices share, added up by their products."""

    total: Tensor | None = None
    """(B, R, d)."""

    def add(self, rows: Tensor, matrix: Tensor, live: slice, shape: torch.Size) -> None:
        """Adds `rows` (B, r, p) @ `matrix` (p, d), at the rows in `live`."""
        if self.total is None:
            self.total = _widened(rows @ matrix, live, shape).view(len(rows), -1, shape[-1])
        elif rows.shape[1] == self.total.shape[1]:
            self.total.view(-1, shape[-1]).addmm_(rows.reshape(-1, rows.shape[-1]), matrix)
        else:
            self.total[:, live] += rows @ matrix


class Fork(Function):
    """x, where several matrices use it: they add to `branches`, and autograd has nothing to add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branches: Branches) -> Tensor:
        """The same tensor."""
        ctx.set_materialize_grads(False)
        ctx.branches, ctx.shape, ctx.dtype = branches, x.shape, x.dtype
        return x.view_as(x)

    @staticmethod
    @_uncaptured
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None]:
        """Runs when all who use the output have run."""
        total, ctx.branches.total = ctx.branches.total, None  # not held until the pass is over
        if total is None:
            return g, None
        total = total.view(ctx.shape).to(ctx.dtype)
        return total if g is None else total + g, None


class Matrix(Function):
    """x W^T + b for W (p, d), or x W + b for W (d, p) if transposed; x (B*k, ..., d)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tape: Tape,
        transposed: bool,
        branches: Branches | None,
    ) -> Tensor:
        """The layer's output; the gradient of x goes to `branches`, if x is forked."""
        ctx.save_for_backward(x, weight)
        ctx.tape, ctx.transposed, ctx.weight, ctx.bias = tape, transposed, weight, bias
        ctx.branches = branches
        if transposed:
            y = torch.matmul(x, weight)
            y = y if bias is None else y.add_(bias)
        else:
            y = functional.linear(x, weight, bias)
        whole: Tensor = torch.ops.aten._unsafe_view(y, y.shape)  # a model may write into it
        return whole

    @staticmethod
    @_uncaptured
    def backward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor
    ) -> tuple[Tensor | None, None, None, None, None, None]:
        """Gradient of x; files rows and output gradients."""
        tape, records = ctx.tape, ctx.tape.records
        rows, inputs = (t.detach().reshape(records, -1, t.shape[-1]) for t in (g, x))
        live = tape.live_rows(ctx.weight, rows)
        rows, inputs = rows[:, live], inputs[:, live]
        gradient = None
        if ctx.needs_input_grad[0]:
            matrix = weight.to(g.dtype)
            matrix = matrix.t() if ctx.transposed else matrix
            if ctx.branches is None:
                gradient = _widened((rows @ matrix).to(x.dtype), live, x.shape)
            else:
                ctx.branches.add(rows, matrix, live, x.shape)
        if ctx.bias is not None and ctx.bias.requires_grad:
            tape.keep(ctx.bias, row_sums(rows.float()))
        if ctx.weight.requires_grad:
            tape.file_matrix(MatrixUse(ctx.weight, inputs.to(g.dtype), rows, ctx.transposed))
        return gradient, None, None, None, None, None


def _widened(rows: Tensor, live: slice, shape: torch.Size) -> Tensor:
    """(B, r, d) as a tensor of `shape`, (B*k, ..., d): zero but for the rows in `live`."""
    if rows.numel() == shape.numel():
        return rows.view(shape)
    whole = rows.new_zeros(shape)
    whole.view(len(rows), -1, shape[-1])[:, live] = rows
    return whole


class Table(Function):
    """Rows of W (V, d) at ids (B, ...)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int | None, tape: Tape) -> Tensor:
        """The rows looked up."""
        ctx.weight, ctx.ids, ctx.padding, ctx.tape = weight, ids, padding, tape
        return functional.embedding(ids, weight)

    @staticmethod
    @_uncaptured
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, None, None]:
        """Files ids and output gradients."""
        records = ctx.tape.records
        rows = g.detach().reshape(records, -1, g.shape[-1])
        ids = ctx.ids.reshape(records, -1)
        ctx.tape.tables.append(TableUse(ctx.weight, ids, rows, ctx.padding))
        return None, None, None, None


class LayerNorm(Function):
    """Layer normalisation over the last axis of x (B*k, ..., d)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, tape: Tape
    ) -> Tensor:
        """The normalised, scaled input."""
        y, mean, scale = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, scale, weight, bias)
        ctx.weight, ctx.bias, ctx.tape = weight, bias, tape
        return y

    @staticmethod
    @_uncaptured
    def backward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor | None, None, None, None, None]:
        """Gradient of x by torch's fused kernel; (B, d) of the parameters as products, as that
        kernel sums parameters over whatever it is given.
        """
        records, shape = ctx.tape.records, weight.shape
        rows = [t.reshape(records, -1, t.shape[-1]) for t in (g, x, mean, scale)]
        live = ctx.tape.live_rows(ctx.weight, rows[0])
        rows = [t[:, live].contiguous() for t in rows]
        gradient = None
        if ctx.needs_input_grad[0]:
            kernel = torch.ops.aten.native_layer_norm_backward.default
            wanted = [True, False, False]
            of_rows = kernel(*rows[:2], shape, *rows[2:], weight, bias, wanted)[0]
            gradient = _widened(of_rows, live, x.shape)
        with_bias = ctx.bias is not None and ctx.bias.requires_grad
        if ctx.weight.requires_grad:
            of_weight, of_bias = _norm_gradients(*(t.float() for t in rows))
            ctx.tape.keep(ctx.weight, of_weight)
        elif with_bias:
            of_bias = row_sums(rows[0].float())
        if with_bias:
            ctx.tape.keep(ctx.bias, of_bias)
        return gradient, None, None, None, None


def _norm_gradients(g: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(B, d) sums over rows of g * (x - mean) * scale, and of g; few records at a time."""
    records, count, width = x.shape
    together = min(records, max(1, NORMED_TOGETHER // max(1, count * width)))
    of_weight, of_bias = x.new_empty(records, 1, width), x.new_empty(records, 1, width)
    centred, ones = x.new_empty(together, count, width), x.new_ones(1, 1, count)
    everything = (g, x, mean, scale, of_weight, of_bias)
    for outer, inputs, means, scales, weights, biases in zip(
        *(t.split(together) for t in everything), strict=True
    ):
        held = centred[: len(inputs)]
        torch.sub(inputs, means, out=held)
        torch.bmm(scales.transpose(1, 2), held.mul_(outer), out=weights)
        torch.bmm(ones.expand(len(inputs), -1, -1), outer, out=biases)
    return of_weight[:, 0], of_bias[:, 0]


@dataclass(frozen=True)
class Geometry:
    """How a convolution slides."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, axes: int, given: Mapping[str, Any]) -> "Geometry":
        """From a call's arguments; a single number stands for every axis."""

        def each(name: str, default: int) -> tuple[int, ...]:
            value = default if given[name] is None else given[name]
            return (value,) * axes if isinstance(value, int) else tuple(value)

        return cls(each("stride", 1), each("padding", 0), each("dilation", 1), given["groups"] or 1)


class Convolution(Function):
    """A convolution of x (B, c, ...) with W (o, c / groups, ...)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, tape: Tape
    ) -> Tensor:
        """The feature maps (B, o, ...)."""
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.bias, ctx.geometry, ctx.tape = weight, bias, geometry, tape
        g = geometry
        y: Tensor = torch.convolution(
            x, weight, bias, g.stride, g.padding, g.dilation, False, [0] * len(g.stride), g.groups
        )
        return y

    @staticmethod
    @_uncaptured
    def backward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor
    ) -> tuple[Tensor | None, None, None, None, None]:
        """Gradient of x; files patches where that is cheaper than the kernel's gradient."""
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = _convolution_backward(g, x, weight, ctx.geometry, (True, False, False))[0]
        if ctx.bias is not None and ctx.bias.requires_grad:
            ctx.tape.keep(ctx.bias, g.flatten(2).float().sum(2))
        if ctx.weight.requires_grad:
            _file_kernel(ctx.tape, ctx.weight, ctx.geometry, x.detach(), g.detach())
        return gradient, None, None, None, None


def _file_kernel(
    tape: Tape, weight: nn.Parameter, geometry: Geometry, x: Tensor, g: Tensor
) -> None:
    outputs, inputs = len(weight), weight[0].numel()
    positions = g.shape[2:].numel()
    described = positions * (inputs + outputs)
    apart = all(step >= size for step, size in zip(geometry.stride, weight.shape[2:], strict=True))
    if geometry.groups == 1 and (apart or described < inputs * outputs):
        patches = _patches(x, weight, geometry)
        use = MatrixUse(weight, patches.to(g.dtype), g.flatten(2).transpose(1, 2), transposed=False)
        if described < inputs * outputs:
            tape.file_matrix(use)
        else:
            tape.keep(weight, per_record(use).view(tape.records, *weight.shape))
        return
    kernels = [
        _convolution_backward(g_i[None], x_i[None], weight, geometry, (False, True, False))[1]
        for g_i, x_i in zip(g, x, strict=True)
    ]
    tape.keep(weight, torch.stack(kernels))


def _patches(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """(B, positions, c * kernel) what the kernel sees at each position."""
    axes = weight.dim() - 2
    sides = [side for pad in reversed(geometry.padding) for side in (pad, pad)]
    seen = functional.pad(x, sides)
    steps = zip(weight.shape[2:], geometry.dilation, geometry.stride, strict=True)
    for axis, (size, dilation, stride) in enumerate(steps):
        seen = seen.unfold(2 + axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    positions = range(2, 2 + axes)
    kernel = range(2 + axes, 2 + 2 * axes)
    rows = seen.permute(0, *positions, 1, *kernel)
    return rows.reshape(len(x), -1, weight[0].numel())


def _convolution_backward(
    g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    y = geometry
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        g, x.to(g.dtype), weight.to(g.dtype), None, y.stride, y.padding, y.dilation, False,
        [0] * len(y.stride), y.groups, wanted,
    )  # fmt: skip
    return found


class Fan(Function):
    """(B, *shape) views of a shared tensor; the gradient of each goes to the tape."""

    @staticmethod
    def forward(ctx: Any, detached: Tensor, shared: list[Tensor], tape: Tape) -> Tensor:
        """One view per record. In a list, what made `shared` stays out of the main backward."""
        (ctx.shared,), ctx.tape = shared, tape
        return detached.expand(tape.records, *detached.shape)

    @staticmethod
    @_uncaptured
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, None]:
        """Files the gradients by record."""
        ctx.tape.fans.append(FanUse(ctx.shared, g.detach()))
        return None, None, None
