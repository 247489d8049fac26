"""Clipped sums of several sites in one pass: each slot's rows meet that slot's own parameters.

One model, its trained parameters stacked by `torch.func`, and two ways to the same sums.
`LinearLayers`: where all that is trained are linear layers, each used once, the book-keeping of
`client.clipping.tape`, batched over slots: no gradient of a record is built. `WholeGradients`:
any model that `vmap` can read, with every record's gradient in memory. Both are held against the
engine of the loop before they are used (`client.preflight.preflight_stacked`).

A pass has always the same shape, and a slot may hold a site, a piece of a site's sample, or
nobody: what comes of a slot depends on that slot alone.

Shapes: C slots, R rows in each (records and fillers), P trained parameters; n rows (tokens) of a
record, d inputs and p outputs of a layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from client.clipping.capture import UncoveredError
from client.clipping.engines import ROUGHEST, clip_factors
from client.clipping.tape import MatrixUse, Tape
from common.prefix import Inputs

RowLosses = Callable[[Inputs], Tensor]
"""(R,) losses of R rows, by the model as it stands."""
_Run = tuple[Tensor, list[Tensor], list[Tensor]]
"""(C, R) losses; what each layer read; and what has the gradients at their outputs."""

BLOCK_BYTES = 2 << 20
"""Of sums that are used as soon as they are made: what a core's second cache holds, or the part of
the third that is its own. With half of it products of few slots at a time cost 3 % of a round."""


class StackedEngine(ABC):
    """Sums of gradients for C slots at once.

    Guarantee, of `clipped`: a slot's sum is that of `client.clipping.engines.ClippingEngine` for
    its rows, to rounding; a row where `there` is false adds exactly nothing; a record's norm, and
    so its clipped gradient, does not depend on the slot, the row, or the others.
    """

    def __init__(self, model: nn.Module, losses: RowLosses, *, slots: int, rows: int) -> None:
        self.slots, self.rows = slots, rows
        self._whole = _Losses(model, losses)
        trained = {n: p for n, p in self._whole.named_parameters() if p.requires_grad}
        self.parameters = tuple(trained.values())
        """The model's own trained parameters, in the order of a flat vector."""
        self._names = tuple(trained)
        self._shapes = [tuple(p.shape) for p in self.parameters]
        self.sizes = [p.numel() for p in self.parameters]

    @abstractmethod
    def clipped(
        self, parameters: Tensor, rows: Inputs, there: Tensor, clip_norm: float
    ) -> tuple[Tensor, Tensor]:
        """One pass.

        Args: parameters: (C, P), or (P,) where all slots start from the same; rows: (C, R, ...);
        there: (C, R) whether what stands there is a record.
        Returns: (C, P) float32 sums of clipped gradients, and (C, R) norms, which are private.
        """

    def gradients(self, parameters: Tensor, rows: Inputs, there: Tensor) -> Tensor:
        """(C, P) sums of gradients as they are: for runs without any guarantee."""
        return torch.cat(
            [part.clone() for part in self.gradients_by_block(parameters, rows, there)]
        )

    def gradients_by_block(
        self, parameters: Tensor, rows: Inputs, there: Tensor
    ) -> Iterator[Tensor]:
        """The same, (c, P) of some slots after the other, each in memory that the next may take."""
        stacked = parameters.expand(self.slots, -1) if parameters.dim() == 1 else parameters
        leaves = [part.detach().requires_grad_() for part in self._apart(stacked)]
        with torch.enable_grad(), _batchable():
            losses = self._losses(dict(zip(self._names, leaves, strict=True)), rows)
            found = torch.autograd.grad(torch.where(there, losses, 0).sum(), leaves)
        yield _flat(found)

    def _apart(self, parameters: Tensor) -> list[Tensor]:
        """Flat parameters in the shapes that the model has, whether stacked or not."""
        front = parameters.shape[:-1]
        parts = torch.split(parameters, self.sizes, dim=-1)
        return [part.view(*front, *shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _losses(self, parameters: dict[str, Tensor], rows: Inputs) -> Tensor:
        """(C, R)."""
        losses: Tensor = vmap(self._whole.under)(parameters, rows)
        return _checked(losses, (self.slots, self.rows))


class LinearLayers(StackedEngine):
    """Book-keeping over linear layers: inputs and output gradients, norms by Grams, one product.

    Source: Bu et al. (2023), arXiv:2210.00038. Raises, when it is made: UncoveredError if anything
    else is trained, or a layer is used twice.
    """

    def __init__(
        self, model: nn.Module, losses: RowLosses, *, slots: int, rows: int, made: Inputs
    ) -> None:
        """Args: made: (R, ...) made rows, on which layers and shapes are found."""
        super().__init__(model, losses, slots=slots, rows=rows)
        with torch.no_grad():
            given = {n: p.detach() for n, p in zip(self._names, self.parameters, strict=True)}
            watch = _Watch(given)
            with watch:
                self._whole.under(given, made)
        used = [name for use in watch.uses for name in (use.weight, use.bias) if name]
        if sorted(used) != sorted(self._names):
            raise UncoveredError("what is trained is not linear layers, each used once")
        self._uses = watch.uses
        self._block = max(1, min(slots, BLOCK_BYTES // (4 * sum(self.sizes))))
        """Slots whose sums are made together."""
        nothing = torch.zeros(())
        self._offsets = [
            nothing.expand(slots, *use.shape).detach().requires_grad_() for use in watch.uses
        ]
        """Added to each layer's output, so that its gradient is theirs: zeros, all of them one."""

    def clipped(
        self, parameters: Tensor, rows: Inputs, there: Tensor, clip_norm: float
    ) -> tuple[Tensor, Tensor]:
        """See `StackedEngine`."""
        inputs, outputs = self._passed(parameters, rows)
        tape = self._tape(inputs, outputs)
        norms = tape.squared_norms().sqrt_()
        factors = clip_factors(norms, clip_norm)
        rough = tape.terms() > ROUGHEST * norms.clamp(min=clip_norm)
        kept = torch.isfinite(norms) & ~rough & there.flatten()
        factors = torch.where(kept, factors, 0)
        if not bool(torch.isfinite(norms).all()):
            inputs = [torch.where(kept[:, None, None], a, 0) for a in inputs]
            outputs = [torch.where(kept[:, None, None], g, 0) for g in outputs]
        weighted = [g * factors[:, None, None] for g in outputs]
        sums = torch.empty(self.slots, sum(self.sizes))
        self._sum_up(inputs, weighted, self._apart(sums))
        return sums, norms.view(self.slots, self.rows)

    def gradients_by_block(
        self, parameters: Tensor, rows: Inputs, there: Tensor
    ) -> Iterator[Tensor]:
        """See `StackedEngine`. A block stays in the cache until its slots have stepped."""
        inputs, outputs = self._passed(parameters, rows, there)
        size, held = self._block, torch.empty(self._block, sum(self.sizes))
        apart = self._apart(held)
        for start in range(0, self.slots, size):
            part = slice(start * self.rows, min(start + size, self.slots) * self.rows)
            here = min(size, self.slots - start)
            into = apart if here == size else [each[:here] for each in apart]
            self._sum_up([a[part] for a in inputs], [g[part] for g in outputs], into)
            yield held[:here]

    def _passed(
        self, parameters: Tensor, rows: Inputs, there: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(C*R, n, d) inputs of each layer and (C*R, n, p) gradients at its output, which are zero
        for rows that are not `there`.
        """
        run = self._run_alike if parameters.dim() == 1 else self._run_apart
        with torch.enable_grad(), _batchable():
            losses, read, outputs = run(
                dict(zip(self._names, self._apart(parameters), strict=True)), rows
            )
            losses = _checked(losses, (self.slots, self.rows))
            counted = losses if there is None else torch.where(there, losses, 0)
            gradients = torch.autograd.grad(counted.sum(), outputs)
        records = self.slots * self.rows
        return (
            [each.detach().reshape(records, -1, each.shape[-1]) for each in read],
            [each.reshape(records, -1, each.shape[-1]) for each in gradients],
        )

    def _run_alike(self, named: dict[str, Tensor], rows: Inputs) -> _Run:
        """From one start for all: the rows of all slots are a batch like any."""
        watch = _Watch(named, tapped=True)
        with watch:
            losses = self._whole.under(named, {n: t.flatten(0, 1) for n, t in rows.items()})
        read = [use.read for use in watch.uses]
        return losses.reshape(self.slots, -1), read, watch.outputs

    def _run_apart(self, named: dict[str, Tensor], rows: Inputs) -> _Run:
        """Each slot from its own start."""

        def run(p: dict[str, Tensor], r: Inputs, offsets: list[Tensor]) -> Any:
            watch = _Watch(p, offsets)
            with watch:
                losses = self._whole.under(p, r)
            return losses, [use.read for use in watch.uses]

        losses, read = vmap(run)(named, rows, self._offsets)
        return losses, read, self._offsets

    def _tape(self, inputs: list[Tensor], outputs: list[Tensor]) -> Tape:
        """Norms are of records, whatever slot they stand in."""
        tape = Tape(self.slots * self.rows)
        by_name = dict(zip(self._names, self.parameters, strict=True))
        for use, a, g in zip(self._uses, inputs, outputs, strict=True):
            tape.file_matrix(MatrixUse(by_name[use.weight], a, g, transposed=False))
            if use.bias:
                tape.keep(by_name[use.bias], g.sum(1))
        return tape

    def _sum_up(self, inputs: list[Tensor], outputs: list[Tensor], sums: list[Tensor]) -> None:
        """Writes (c, ...) `sums` in the parameters' shapes: one product a layer and slot, over all
        its rows.
        """
        into = dict(zip(self._names, sums, strict=True))
        for use, a, g in zip(self._uses, inputs, outputs, strict=True):
            given, read = (each.reshape(len(sums[0]), -1, each.shape[-1]) for each in (g, a))
            torch.bmm(given.transpose(1, 2), read, out=into[use.weight])
            if use.bias:
                torch.sum(given, 1, out=into[use.bias])


class WholeGradients(StackedEngine):
    """Every record's gradient in memory, (C, R, P) of them: small models of any kind."""

    def clipped(
        self, parameters: Tensor, rows: Inputs, there: Tensor, clip_norm: float
    ) -> tuple[Tensor, Tensor]:
        """See `StackedEngine`."""
        named = dict(zip(self._names, self._apart(parameters), strict=True))
        of_slot = vmap(grad(self._loss), in_dims=(None, 0))
        stacked = None if parameters.dim() == 1 else 0
        with _batchable():
            found = vmap(of_slot, in_dims=(stacked, 0))(named, rows)
        whole = [found[name].reshape(self.slots, self.rows, -1) for name in self._names]
        norms: Tensor = torch.stack([part.norm(dim=2) for part in whole]).norm(dim=0)
        factors = torch.where(there, clip_factors(norms, clip_norm), 0)
        if not bool(torch.isfinite(norms).all()):
            whole = [torch.where(torch.isfinite(norms)[:, :, None], part, 0) for part in whole]
        return _flat(torch.bmm(factors[:, None, :], part) for part in whole), norms

    def _loss(self, parameters: dict[str, Tensor], row: Inputs) -> Tensor:
        """Of one record."""
        alone = {name: tensor.unsqueeze(0) for name, tensor in row.items()}
        loss: Tensor = self._whole.under(parameters, alone).squeeze(0)
        return loss


class _Losses(nn.Module):
    """The model and its losses as one module, so that `functional_call` reaches its parameters."""

    def __init__(self, model: nn.Module, losses: RowLosses) -> None:
        super().__init__()
        self.model, self._of = model, losses
        self._places: dict[str, list[str]] = {}
        """By name of a trained parameter, every place in a module that holds it, each once."""
        names = {p: name for name, p in self.named_parameters() if p.requires_grad}
        for path, module in self.named_modules():
            for local, parameter in module.named_parameters(recurse=False):
                if parameter in names:
                    self._places.setdefault(names[parameter], []).append(f"{path}.{local}")

    def forward(self, rows: Inputs) -> Tensor:
        """(R,)."""
        return self._of(rows)

    def under(self, parameters: dict[str, Tensor], rows: Inputs) -> Tensor:
        """(R,) losses with other values for the trained parameters, by name; the model stays as it
        is. Torch's own way with tied weights would leave one of ours behind in a module that hangs
        in two places, as an encoder beside the native model it is a part of.
        """
        given = {place: tensor for n, tensor in parameters.items() for place in self._places[n]}
        found: Tensor = functional_call(self, given, (rows,), tie_weights=False)
        return found


@dataclass(frozen=True)
class _Use:
    """One application of a linear layer."""

    weight: str
    bias: str
    """Empty where there is none."""
    read: Tensor
    shape: tuple[int, ...]
    """Of the output, for the rows of one slot."""


class _Watch(TorchFunctionMode):
    """Sees every linear layer whose weight or bias is one of `parameters`.

    Args: offsets: what is added to each output, in the order of the calls; none while shapes are
    looked for; tapped: outputs are kept, and have gradients.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        offsets: list[Tensor] | None = None,
        *,
        tapped: bool = False,
    ) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in parameters.items()}
        self._offsets, self._tapped = offsets, tapped
        self.uses: list[_Use] = []
        self.outputs: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs one torch call."""
        output = func(*args, **(kwargs or {}))
        if func is not functional.linear:
            return output
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
        weight = self._names.get(id(given["weight"]), "")
        bias = self._names.get(id(given.get("bias")), "")
        if not weight and not bias:
            return output
        self.uses.append(_Use(weight, bias, given["input"], tuple(output.shape)))
        if self._tapped:  # what is written over afterwards is no output: the trial finds that out
            self.outputs.append(output if output.requires_grad else output.requires_grad_())
        if self._offsets is None:
            return output
        return output + self._offsets[len(self.uses) - 1]


def _batchable() -> AbstractContextManager[None]:
    """Attention as products: torch has no rule by which its quick form takes slots at once."""
    kernel: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return kernel


def _flat(parts: Iterable[Tensor]) -> Tensor:
    """(C, P) of parts (C, ...), in order."""
    return torch.cat([part.flatten(1) for part in parts], dim=1).detach()


def _checked(losses: Tensor, shape: tuple[int, int]) -> Tensor:
    if losses.shape != shape:
        raise UncoveredError(
            f"the task gave losses of shape {tuple(losses.shape)}, expected {shape}"
        )
    return losses
