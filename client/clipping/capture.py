"""Sees every use of a trainable parameter in a forward pass, and files its backward on a tape.

A `TorchFunctionMode` looks at each torch call that a trainable parameter goes into. Calls it
knows (linear, addmm, embedding, layer norm, convolution) run as a `torch.autograd.Function` that
returns the gradient of the input only. Everything computed from parameters alone (a bias table
looked up once for the whole batch, a weight-normed kernel) runs as it is, and is fanned out to one
copy per record where it first meets the records; a call that does not broadcast then runs once per
record. What remains is refused by name: autograd must give nothing to any trainable parameter.

What is batched is decided on made records whose number is a prime that no other size shares, and
written down as a plan; with real records the plan is followed, never decided again.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from client.clipping import functions
from client.clipping.tape import Habits, Tape
from common.errors import PrivacyRefusedError


class UncoveredError(PrivacyRefusedError):
    """A trainable parameter is used in a way the engine has no exact rule for."""


@dataclass(frozen=True)
class Decision:
    """How one call that a parameter goes into is run."""

    call: str
    """Name of the torch function."""
    parameters: tuple[str, ...]
    """Names of the parameters in it; `*` for something computed from parameters."""
    roles: tuple[str, ...]
    """Of what the rule tells apart by it (see `_cast`): `shared`, `record` (one row each), `rows`
    (several), `other`."""
    rule: str
    """Key of `_RULES`."""


@dataclass(frozen=True)
class Plan:
    """What was decided on made records."""

    calls: tuple[Decision, ...]
    habits: Habits


class Capture(TorchFunctionMode):
    """Runs forward and backward of one batch of `tape.records` records.

    With no `plan` it decides, and `calls` holds the decisions afterwards; with one it follows it.
    Raises: UncoveredError at a call it has no rule for; PrivacyRefusedError at a call that is
    not the planned one.
    """

    def __init__(self, names: dict[nn.Parameter, str], tape: Tape, plan: Plan | None) -> None:
        super().__init__()
        self._names, self.tape = names, tape
        self._shared: dict[int, Tensor] = {id(parameter): parameter for parameter in names}
        """Parameters, and what was computed from them alone; kept alive so that ids stay theirs."""
        self._follows = plan
        self._forks: dict[int, tuple[Tensor, Tensor, functions.Branches]] = {}
        """By id of an input that matrices share: itself, its fork, and what adds up behind it."""
        self.calls: list[Decision] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs one torch call; see the class."""
        kwargs = kwargs or {}
        if func is Tensor.backward:
            return self._run_backward(args[0])
        found = [t for t in _tensors(args, kwargs) if id(t) in self._shared]
        if not found or func in _HARMLESS or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func.__name__ == "__get__":
            return self._remember(func(*args, **kwargs))
        decision = self._decide(func, args, kwargs, found)
        self.calls.append(decision)
        if decision.rule == "broadcast":
            return _broadcast(self, func, args, kwargs, decision.roles)
        if decision.rule == "by_record":
            return _by_record(self, func, args, kwargs, decision.roles)
        return _RULES[decision.rule](self, func, args, kwargs)

    def _run_backward(self, loss: Tensor) -> None:
        """`loss.backward()`, which torch would run with this mode off.

        Checkpointed layers run their forward again in it, and must be captured then too.
        """
        with self:
            _engine_run_backward(
                (loss,),
                (torch.ones_like(loss),),
                False,  # keeps no graph
                False,  # makes no graph
                (),
                allow_unreachable=True,
                accumulate_grad=True,
            )

    def is_shared(self, tensor: Any) -> bool:
        """Whether `tensor` is a trainable parameter or computed from such alone."""
        return id(tensor) in self._shared

    def is_parameter(self, tensor: Any) -> bool:
        """Whether `tensor` is a trainable parameter itself."""
        return isinstance(tensor, nn.Parameter) and tensor in self._names

    def is_batched(self, tensor: Any) -> bool:
        """Whether `tensor` holds records along its first axis, possibly several rows each."""
        if not isinstance(tensor, Tensor) or self.is_shared(tensor) or tensor.dim() == 0:
            return False
        return tensor.shape[0] > 0 and tensor.shape[0] % self.tape.records == 0

    def fan(self, shared: Tensor) -> Tensor:
        """(B, *shape) copies of a shared tensor, whose gradients are filed per record."""
        return functions.applied(
            functions.Fan, shared.detach().requires_grad_(), [shared], self.tape
        )

    def matrix(self, x: Tensor, weight: Any, bias: Any, *, transposed: bool) -> Tensor:
        """One application of a matrix, on the fork of `x` if others share it."""
        branches = None
        sharing = self.tape.habits.sharing if self.tape.habits else ()
        if x.requires_grad and weight in sharing:
            if id(x) not in self._forks:
                branches = functions.Branches()
                self._forks[id(x)] = x, functions.applied(functions.Fork, x, branches), branches
            _, x, branches = self._forks[id(x)]
        return functions.applied(functions.Matrix, x, weight, bias, self.tape, transposed, branches)

    def _remember(self, result: Any) -> Any:
        for tensor in _tensors((result,), {}):
            if tensor.requires_grad:
                self._shared[id(tensor)] = tensor
        return result

    def _decide(
        self, func: Callable[..., Any], args: Any, kwargs: Any, found: list[Tensor]
    ) -> Decision:
        names = tuple(
            self._names.get(t, "*") if isinstance(t, nn.Parameter) else "*" for t in found
        )
        if self._follows is None:
            rule = self._rule(func, args, kwargs)
            roles = tuple(self._role(value) for value in _cast(rule, args, kwargs))
            return Decision(func.__name__, names, roles, rule)
        place, calls = len(self.calls), self._follows.calls
        planned = calls[place] if place < len(calls) else None
        if (
            planned is None
            or (planned.call, planned.parameters) != (func.__name__, names)
            or not self._plays(planned, args, kwargs)
        ):
            raise PrivacyRefusedError(
                f"the model used {', '.join(names)} in another way than on made records; "
                "a model whose path depends on its records cannot be trained privately"
            )
        return planned

    def _role(self, value: Any) -> str:
        if self.is_shared(value):
            return "shared"
        if not self.is_batched(value):
            return "other"
        return "record" if value.shape[0] == self.tape.records else "rows"

    def _plays(self, planned: Decision, args: Any, kwargs: Any) -> bool:
        """Whether what held records when the plan was made still can."""
        records = self.tape.records
        for value, role in zip(_cast(planned.rule, args, kwargs), planned.roles, strict=False):
            if role == "record" and len(value) != records:
                return False
            if role == "rows" and len(value) % records:
                return False
        return True

    def _rule(self, func: Callable[..., Any], args: Any, kwargs: Any) -> str:
        tensors = _tensors(args, kwargs)
        if not any(self.is_batched(t) for t in tensors):
            return _rule_without_records(self, func, args, kwargs)
        rule = _DIRECT.get(func)
        if rule is not None and _CAN[rule](self, args, kwargs):
            return rule
        return "broadcast" if func in _BROADCASTING else "by_record"


def _cast(rule: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[Any]:
    """What a decision gives roles to: all arguments, all tensors, or the one that holds records."""
    if rule == "broadcast":
        return args
    if rule == "by_record":
        return _tensors(args, kwargs)
    return args[1:2] if rule == "addmm" else args[:1]


def _tensors(args: Iterable[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors among the arguments, and in lists among them."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def _rule_without_records(capture: Capture, func: Any, args: Any, kwargs: Any) -> str:
    """Nothing here holds records: shared, unless the result is made to hold them."""
    first = args[0] if args else None
    records = capture.tape.records
    if func in _EMBEDDINGS and _arguments(_EMBEDDING, args, kwargs)["input"].shape[:1] == (1,):
        return "embedding" if _can_embed(capture, args, kwargs) else "shared"
    if func in {Tensor.expand, Tensor.repeat} and isinstance(first, Tensor) and len(args) > 1:
        sizes, new = _sizes(args), len(_sizes(args)) - first.dim()
        if sizes[0] != records:
            return "shared"
        if func is Tensor.expand and (new > 0 or first.shape[0] == 1):
            return "expand"
        if func is Tensor.repeat and (new > 0 or set(sizes[1:]) <= {1}):
            return "repeat"
    return "shared"


def _sizes(args: Any) -> Any:
    """The sizes given to `expand` or `repeat`, one by one or together."""
    return args[1] if isinstance(args[1], list | tuple) else args[1:]


_LINEAR = ("input", "weight", "bias")
_ADDMM = ("bias", "input", "weight")
_EMBEDDING = (
    "input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse",
)  # fmt: skip
_LAYER_NORM = ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable")
_RMS_NORM = ("input", "normalized_shape", "weight", "eps")
_GROUP_NORM = ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled")
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_BATCH_NORM = (
    "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
)  # fmt: skip


def _arguments(names: tuple[str, ...], args: Any, kwargs: Any) -> dict[str, Any]:
    """The call's arguments by name; those not given are None."""
    return {**dict.fromkeys(names), **dict(zip(names, args, strict=False)), **kwargs}


def _owned(capture: Capture, *tensors: Any) -> bool:
    """Each is a trainable parameter, or frozen, or absent; none is computed from parameters."""
    return all(capture.is_parameter(t) or not capture.is_shared(t) for t in tensors)


def _can_linear(capture: Capture, args: Any, kwargs: Any) -> bool:
    given = _arguments(_LINEAR, args, kwargs)
    return capture.is_batched(given["input"]) and _owned(capture, given["weight"], given["bias"])


def _can_addmm(capture: Capture, args: Any, kwargs: Any) -> bool:
    given = _arguments(_ADDMM, args, {})
    plain = not kwargs and given["bias"].dim() == 1
    return (
        plain
        and capture.is_batched(given["input"])
        and _owned(capture, given["weight"], given["bias"])
    )


def _can_matmul(capture: Capture, args: Any, kwargs: Any) -> bool:
    return capture.is_batched(args[0]) and capture.is_parameter(args[1]) and args[1].dim() == 2  # noqa: PLR2004


def _can_embed(capture: Capture, args: Any, kwargs: Any) -> bool:
    given = _arguments(_EMBEDDING, args, kwargs)
    unusual = given["max_norm"] is not None or given["scale_grad_by_freq"] or given["sparse"]
    return not unusual and capture.is_parameter(given["weight"])


def _can_norm(capture: Capture, args: Any, kwargs: Any) -> bool:
    given = _arguments(_LAYER_NORM, args, kwargs)
    apart = given["input"].dim() > len(given["normalized_shape"])
    return apart and capture.is_batched(given["input"])


def _can_always(capture: Capture, args: Any, kwargs: Any) -> bool:
    return capture.is_batched(args[0])


def _can_convolve(capture: Capture, args: Any, kwargs: Any) -> bool:
    given = _arguments(_CONVOLUTION, args, kwargs)
    return bool(given["input"].shape[0] == capture.tape.records)


def _can_batch_norm(capture: Capture, args: Any, kwargs: Any) -> bool:
    given = _arguments(_BATCH_NORM, args, kwargs)
    return not given["training"] and capture.is_batched(given["input"])


def _can_attend(capture: Capture, args: Any, kwargs: Any) -> bool:
    return capture.is_batched(_arguments(("query",), args[:1], kwargs)["query"])


def _run_shared(capture: Capture, func: Any, args: Any, kwargs: Any) -> Any:
    return capture._remember(func(*args, **kwargs))


def _run_linear(capture: Capture, func: Any, args: Any, kwargs: Any) -> Tensor:
    given = _arguments(_LINEAR, args, kwargs)
    return capture.matrix(given["input"], given["weight"], given["bias"], transposed=False)


def _run_addmm(capture: Capture, func: Any, args: Any, kwargs: Any) -> Tensor:
    bias, x, weight = args
    return capture.matrix(x, weight, bias, transposed=True)


def _run_matmul(capture: Capture, func: Any, args: Any, kwargs: Any) -> Tensor:
    return capture.matrix(args[0], args[1], None, transposed=True)


def _run_embedding(capture: Capture, func: Any, args: Any, kwargs: Any) -> Tensor:
    given = _arguments(_EMBEDDING, args, kwargs)
    ids, padding = given["input"], given["padding_idx"]
    if ids.shape[0] == 1:
        ids = ids.expand(capture.tape.records, *ids.shape[1:])
    if padding is not None and padding < 0:
        padding += len(given["weight"])
    return functions.applied(functions.Table, given["weight"], ids, padding, capture.tape)


def _run_layer_norm(capture: Capture, func: Any, args: Any, kwargs: Any) -> Tensor:
    given = _arguments(_LAYER_NORM, args, kwargs)
    weight, bias, eps = given["weight"], given["bias"], given["eps"]
    eps = 1e-5 if eps is None else eps
    one_axis = len(given["normalized_shape"]) == 1
    if one_axis and _owned(capture, weight, bias) and weight is not None:
        return functions.applied(
            functions.LayerNorm, given["input"], weight, bias, eps, capture.tape
        )
    plain = functional.layer_norm(given["input"], given["normalized_shape"], eps=eps)
    return _scaled(capture, plain, weight, bias)


def _run_rms_norm(capture: Capture, func: Any, args: Any, kwargs: Any) -> Tensor:
    given = _arguments(_RMS_NORM, args, kwargs)
    plain = functional.rms_norm(given["input"], given["normalized_shape"], eps=given["eps"])
    return _scaled(capture, plain, given["weight"], None)


def _run_group_norm(capture: Capture, func: Any, args: Any, kwargs: Any) -> Tensor:
    given = _arguments(_GROUP_NORM, args, kwargs)
    eps = 1e-5 if given["eps"] is None else given["eps"]
    x = given["input"]
    plain = functional.group_norm(x, given["num_groups"], eps=eps)
    last = plain.movedim(1, -1)
    return _scaled(capture, last, given["weight"], given["bias"]).movedim(-1, 1)


def _run_batch_norm(capture: Capture, func: Any, args: Any, kwargs: Any) -> Tensor:
    """With running statistics, which are buffers: an affine map of each channel."""
    given = _arguments(_BATCH_NORM, args, kwargs)
    x, eps = given["input"], 1e-5 if given["eps"] is None else given["eps"]
    plain = functional.batch_norm(x, given["running_mean"], given["running_var"], eps=eps)
    last = plain.movedim(1, -1)
    return _scaled(capture, last, given["weight"], given["bias"]).movedim(-1, 1)


def _scaled(capture: Capture, x: Tensor, weight: Any, bias: Any) -> Tensor:
    """X * weight + bias over the last axes; either may be absent or frozen."""
    for value, combine in ((weight, torch.mul), (bias, torch.add)):
        if value is not None and capture.is_shared(value):
            role = "record" if x.shape[0] == capture.tape.records else "rows"
            x = _broadcast(capture, combine, (x, value), {}, (role, "shared"))
        elif value is not None:
            x = combine(x, value)
    return x


def _run_convolution(capture: Capture, func: Any, args: Any, kwargs: Any) -> Tensor:
    given = _arguments(_CONVOLUTION, args, kwargs)
    weight, bias = given["weight"], given["bias"]
    x, axes = given["input"], weight.dim() - 2
    if isinstance(given["padding"], str):
        x, given["padding"] = _padded(x, weight, given), 0
    geometry = functions.Geometry.of(axes, given)
    if _owned(capture, weight, bias):
        return functions.applied(functions.Convolution, x, weight, bias, geometry, capture.tape)
    return _convolved_by_record(capture, x, weight, bias, geometry)


def _padded(x: Tensor, weight: Tensor, given: dict[str, Any]) -> Tensor:
    """`x` with the zeros that the padding `same` stands for; `valid` stands for none."""
    if given["padding"] == "valid":
        return x
    unpadded = functions.Geometry.of(weight.dim() - 2, {**given, "padding": 0})
    sides: list[int] = []
    for size, dilation in zip(weight.shape[2:], unpadded.dilation, strict=True):
        total = (size - 1) * dilation
        sides = [total // 2, total - total // 2, *sides]
    return functional.pad(x, sides)


def _convolved_by_record(
    capture: Capture, x: Tensor, weight: Tensor, bias: Any, geometry: functions.Geometry
) -> Tensor:
    """A kernel computed from parameters: each record is convolved with its own copy, in groups."""
    records, channels = x.shape[:2]
    kernels = (
        capture.fan(weight) if capture.is_shared(weight) else weight.expand(records, *weight.shape)
    )
    folded = x.reshape(1, records * channels, *x.shape[2:])
    call = (functional.conv1d, functional.conv2d, functional.conv3d)[weight.dim() - 3]
    y = call(
        folded,
        kernels.flatten(0, 1),
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups * records,
    )
    y = y.view(records, weight.shape[0], *y.shape[2:])
    if bias is None:
        return y
    return _scaled(capture, y.movedim(1, -1), None, bias).movedim(-1, 1)


def _run_expand(capture: Capture, func: Any, args: Any, kwargs: Any) -> Tensor:
    fanned, sizes = capture.fan(args[0]), _sizes(args)
    new = len(sizes) - args[0].dim()
    if new == 0:
        fanned = fanned.squeeze(1)
    else:
        fanned = fanned.reshape(len(fanned), *[1] * (new - 1), *args[0].shape)
    return fanned.expand(capture.tape.records, *sizes[1:])


def _run_repeat(capture: Capture, func: Any, args: Any, kwargs: Any) -> Tensor:
    fanned, sizes = capture.fan(args[0]), _sizes(args)
    new = len(sizes) - args[0].dim()
    if new == 0:
        return fanned.flatten(0, 1).contiguous()
    return fanned.reshape(len(fanned), *[1] * (new - 1), *args[0].shape).repeat(1, *sizes[1:])


def _broadcast(capture: Capture, func: Any, args: Any, kwargs: Any, roles: tuple[str, ...]) -> Any:
    """An operation that broadcasts: the shared operand is fanned out and aligned.

    Where the others have several rows a record, (B*k, ...), it runs on (B, k, ...).
    """
    if any(capture.is_shared(value) for value in kwargs.values()) or {"record", "rows"} <= {*roles}:
        raise UncoveredError(f"no exact rule for this form of {func.__name__}")
    records, split = capture.tape.records, "rows" in roles
    axes = split + max(
        value.dim() for value, role in zip(args, roles, strict=True) if role in ("record", "rows")
    )
    operands = []
    for value, role in zip(args, roles, strict=True):
        if role == "shared":
            operands.append(_aligned(capture, value, axes))
        else:
            operands.append(value.unflatten(0, (records, -1)) if role == "rows" else value)
    result = func(*operands, **kwargs)
    return result.flatten(0, 1) if split else result


def _by_record(capture: Capture, func: Any, args: Any, kwargs: Any, roles: tuple[str, ...]) -> Any:
    """Any other call, once per record: on that record's rows, with its own copy of what is shared.

    Exact for what treats records alike along the first axis, as its name must not promise: the
    check on made records tells.
    """
    records, held = capture.tape.records, {}
    for value, role in zip(_tensors(args, kwargs), roles, strict=True):
        if role == "shared":
            held[id(value)] = capture.fan(value)
        elif role in ("record", "rows"):
            held[id(value)] = value.unflatten(0, (records, -1))  # type: ignore[no-untyped-call]

    def of(record: int, value: Any) -> Any:
        if isinstance(value, Tensor):
            return held[id(value)][record] if id(value) in held else value
        if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
            return [of(record, item) for item in value]
        return value

    results = [
        func(
            *(of(record, value) for value in args),
            **{name: of(record, value) for name, value in kwargs.items()},
        )
        for record in range(records)
    ]
    if not all(isinstance(result, Tensor) for result in results):
        raise UncoveredError(f"no exact rule for {func.__name__}")
    return torch.cat(results)


def _run_attention(capture: Capture, func: Any, args: Any, kwargs: Any) -> Any:
    """Scaled dot product attention whose additive mask is shared, as a position bias is."""
    given = _arguments(("query", "key", "value", "attn_mask"), args, kwargs)
    query, mask = given["query"], given["attn_mask"]
    if any(capture.is_shared(given[name]) for name in ("query", "key", "value")):
        raise UncoveredError("no exact rule for attention over a tensor without records")
    records = capture.tape.records
    rows = query.shape[0] // records
    fanned = _aligned(capture, mask, query.dim() + 1)
    given["attn_mask"] = fanned.expand(-1, rows, *[-1] * (query.dim() - 1)).flatten(0, 1)
    return func(**given)


def _aligned(capture: Capture, shared: Tensor, axes: int) -> Tensor:
    """(B, ...) fanned-out copies with `axes` axes, so that the others broadcast from the right."""
    shape = list(shared.shape)
    while len(shape) > axes - 1 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) > axes - 1:
        raise UncoveredError("a shared tensor has more axes than the records it meets")
    fanned = capture.fan(shared)
    return fanned.reshape(len(fanned), *[1] * (axes - 1 - len(shape)), *shape)


_EMBEDDINGS = {functional.embedding, torch.embedding}
_HARMLESS = {Tensor.type_as, Tensor.expand_as, Tensor.is_same_size, Tensor.new_zeros}
_BROADCASTING = {
    torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__,
    torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__, Tensor.__isub__,
    torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__,
    torch.div, Tensor.div, Tensor.__truediv__, Tensor.__rtruediv__,
    torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__,
    torch.where, Tensor.where, torch.maximum, torch.minimum, torch.addcmul, torch.baddbmm,
}  # fmt: skip
_DIRECT: dict[Any, str] = {
    functional.linear: "linear",
    torch.addmm: "addmm",
    torch.matmul: "matmul",
    Tensor.matmul: "matmul",
    Tensor.__matmul__: "matmul",
    functional.embedding: "embedding",
    torch.embedding: "embedding",
    functional.layer_norm: "layer_norm",
    torch.layer_norm: "layer_norm",
    functional.group_norm: "group_norm",
    functional.rms_norm: "rms_norm",
    functional.conv1d: "convolution",
    functional.conv2d: "convolution",
    functional.conv3d: "convolution",
    functional.scaled_dot_product_attention: "attention",
    functional.batch_norm: "batch_norm",
    torch.batch_norm: "batch_norm",
}
_CAN: dict[str, Callable[[Capture, Any, Any], bool]] = {
    "linear": _can_linear,
    "addmm": _can_addmm,
    "matmul": _can_matmul,
    "embedding": _can_embed,
    "layer_norm": _can_norm,
    "group_norm": _can_always,
    "rms_norm": _can_always,
    "convolution": _can_convolve,
    "attention": _can_attend,
    "batch_norm": _can_batch_norm,
}
_RULES: dict[str, Callable[[Capture, Any, Any, Any], Any]] = {
    "shared": _run_shared,
    "linear": _run_linear,
    "addmm": _run_addmm,
    "matmul": _run_matmul,
    "embedding": _run_embedding,
    "layer_norm": _run_layer_norm,
    "group_norm": _run_group_norm,
    "rms_norm": _run_rms_norm,
    "convolution": _run_convolution,
    "attention": _run_attention,
    "batch_norm": _run_batch_norm,
    "expand": _run_expand,
    "repeat": _run_repeat,
}
