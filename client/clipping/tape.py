"""What one backward pass files about each trainable parameter, its norms and its clipped sums.

No per-record weight gradient is built where a cheaper form exists ("book-keeping", Bu et al. 2023,
arXiv:2210.00038). A weight W that maps a (B, R, d) to outputs with gradient g (B, R, p) has the
per-record gradient g_i^T a_i, whose squared norm is <a_i a_i^T, g_i g_i^T>: two Gram matrices of
R x R instead of a matrix of p x d.

Shapes: B records, R rows (tokens, patches) per record, d inputs and p outputs of a layer,
V rows of an embedding table.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from client.clipping.gram import Gram

KEPT_ELEMENTS = 4096
"""Per-record gradients up to this size are kept rather than described: they cost nothing."""
INSTANTIATE_COST = 1.6
"""Time per flop of a product that builds a gradient, in that of a Gram: 36-70 against 65-77
GFLOP/s on one core with AVX-512."""

NARROW = 4
"""Output gradients are cut to their rows that are not zero where those are one in so many."""
CANCELLED = 1e-2
"""Below this share of its diagonal, a Gram's sum is a small difference of large numbers, and
float32 rounding would show in it."""


@dataclass
class MatrixUse:
    """One application of a matrix: rows `a` (B, R, d) in, gradient `g` (B, R, p) at its output."""

    weight: nn.Parameter
    a: Tensor
    g: Tensor
    transposed: bool
    """The weight is stored (d, p), as Hugging Face's Conv1D does, and not (p, d)."""


@dataclass
class TableUse:
    """One look-up: `ids` (B, S) in, gradient `g` (B, S, d) at the output."""

    weight: nn.Parameter
    ids: Tensor
    g: Tensor
    padding: int | None
    """This row takes no gradient."""


@dataclass
class FanUse:
    """A tensor computed from parameters alone met the records: `g` (B, *shared.shape)."""

    shared: Tensor
    g: Tensor


@dataclass(frozen=True)
class Habits:
    """What made records showed of the weights: hints, none of which a result rests on."""

    alone: frozenset[nn.Parameter]
    """Filed once a batch: norms are taken in the backward pass, while rows are in the cache."""
    narrow: Mapping[nn.Parameter, slice]
    """Only these rows of their output gradient are not zero, as below what reads one row."""
    sharing: frozenset[nn.Parameter]
    """Applied to the input of another, as query, key and value are."""


@dataclass
class Tape:
    """Everything filed during one backward pass over B records."""

    records: int
    habits: Habits | None = None
    """None: this batch shows them."""
    matrices: list[MatrixUse] = field(default_factory=list)
    tables: list[TableUse] = field(default_factory=list)
    fans: list[FanUse] = field(default_factory=list)
    kept: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    """Per-record gradients (B, *shape), where they are small or the only way."""
    _early: "list[_Norms]" = field(default_factory=list)
    """Norms taken in the backward pass."""
    _narrow: dict[nn.Parameter, slice] = field(default_factory=dict)
    _terms: Tensor = field(default_factory=lambda: torch.zeros(()))
    _open: "_Shared | None" = None
    """The matrices filed last, of which more may follow: query, key and value share an input."""

    def live_rows(self, weight: nn.Parameter, g: Tensor) -> slice:
        """Where rows of `g` (B, R, p), at the output of `weight`, are not zero; all, if many.

        A row shorter than 1e-22 counts as zero, as it does in every norm: its square is.
        """
        rows = g.shape[1]
        usual = self.habits.narrow.get(weight) if self.habits else None
        if rows < NARROW or (self.habits is not None and usual is None):
            return slice(0, rows)
        lengths = torch.linalg.vector_norm(g, dim=2, dtype=torch.float32)
        live = lengths.ne(0).any(0).nonzero().flatten().tolist() or [0]
        first, last = live[0], live[-1] + 1
        if usual is not None:  # never fewer: how rows are rounded must not depend on the others
            first, last = min(first, usual.start), max(last, usual.stop)
        if (last - first) * NARROW > rows:
            return slice(0, rows)
        self._narrow[weight] = slice(first, last)
        return self._narrow[weight]

    def shown(self) -> Habits:
        """The habits this batch shows, after `settle`."""
        alone, _ = self._by_multiplicity()
        shared = (group for group in _same_input(self.matrices) if len(group) > 1)
        return Habits(
            alone=frozenset(use.weight for use in alone),
            narrow=dict(self._narrow),
            sharing=frozenset(use.weight for group in shared for use in group),
        )

    def keep(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        """Adds per-record gradients (B, *shape) of `parameter`."""
        held = self.kept.get(parameter)
        self.kept[parameter] = gradients if held is None else held + gradients

    def file_matrix(self, use: MatrixUse) -> None:
        """Files one application of a matrix, in the cheaper form."""
        rows, inputs, outputs = use.a.shape[1], use.a.shape[2], use.g.shape[2]
        small = inputs * outputs <= max(KEPT_ELEMENTS, rows * (inputs + outputs) // 4)
        if rows > 1 and small:
            self.keep(use.weight, per_record(use).view(self.records, *use.weight.shape))
            return
        self.matrices.append(use)
        early = self.habits is not None and use.weight in self.habits.alone
        if early and not _cheaper_built(rows, inputs, outputs):
            self._take_early(use)

    def _take_early(self, use: MatrixUse) -> None:
        if self._open is not None and _memory(self._open.uses[0].a) == _memory(use.a):
            self._open.add(use)
            return
        self._close_early()
        self._open = _Shared([use], Gram.of(use.a.float()), Gram.of(use.g.float()))

    def _close_early(self) -> None:
        if self._open is not None:
            self._early.append(self._open.norms())
        self._open = None

    @torch.no_grad()
    def settle(self, parameters: list[nn.Parameter]) -> None:
        """Carries gradients of shared tensors back to their parameters; call after backward."""
        self._close_early()
        fans, self.fans = self.fans, []
        for fan in fans:
            if isinstance(fan.shared, nn.Parameter):
                self.keep(fan.shared, fan.g)
        derived = [fan for fan in fans if not isinstance(fan.shared, nn.Parameter)]
        if derived:
            self._settle_derived(derived, parameters)
        self._unite_mixed()

    def covered(self) -> set[nn.Parameter]:
        """The parameters something was filed for."""
        return {*(use.weight for use in self._described()), *self.kept}

    def squared_norms(self) -> Tensor:
        """(B,) squared L2 norm of each record's gradient over all parameters, in float32."""
        device = next(iter(self._tensors())).device
        total = torch.zeros(self.records, dtype=torch.float32, device=device)
        for gradients in self.kept.values():
            total += gradients.reshape(self.records, -1).float().square().sum(1)
        alone, tied = self._by_multiplicity()
        still = {use.weight for use in alone}
        norms = [each for each in self._early if still.issuperset(use.weight for use in each.uses)]
        done = {use.weight for each in norms for use in each.uses}
        late = [use for use in alone if use.weight not in done]
        norms += [_matrix_norms(group) for group in _same_input(late)]
        norms += [_table_norms(tables) for tables in _same_gradient(late)]
        norms += [_tied_norms(uses) for uses in tied]
        self._terms = torch.stack([each.rows for each in norms]).sum(0) if norms else total * 0
        return total.add_(_added(norms)).clamp_(min=0) if norms else total

    def terms(self) -> Tensor:
        """(B,) L2 norm of what the sums will be made of, row by row; after `squared_norms`.

        Of a gradient that is kept whole, nothing: its rows are added up apart from others'.
        """
        return self._terms.sqrt()

    def zero_records(self, keep: Tensor) -> None:
        """Makes every record where `keep` (B,) is false contribute nothing, NaN or not."""
        for use in self._described():
            use.g = torch.where(keep[:, None, None], use.g, 0)
        for use in self.matrices:
            use.a = torch.where(keep[:, None, None], use.a, 0)
        for parameter, gradients in self.kept.items():
            shaped = keep.view(-1, *[1] * (gradients.dim() - 1))
            self.kept[parameter] = torch.where(shaped, gradients, 0)

    def add_weighted(self, factors: Tensor, sums: dict[nn.Parameter, Tensor]) -> None:
        """Adds each record's gradient times its factor (B,) to `sums`, and frees what was filed.

        A sum not there yet is made when its turn comes, in memory that others have left.
        """
        groups = _same_input(self.matrices)
        self.matrices = []
        while groups:
            _add_matrices(groups.pop(), factors, sums)
        while self.tables:
            use = self.tables.pop()
            if use.weight not in sums:
                sums[use.weight] = torch.zeros_like(use.weight, dtype=torch.float32)
            _add_table(use, factors, sums[use.weight])
        while self.kept:
            parameter, gradients = self.kept.popitem()
            flat = gradients.reshape(self.records, -1).float()
            weighted = torch.mv(flat.t(), factors).view_as(parameter)
            sums[parameter] = sums[parameter] + weighted if parameter in sums else weighted

    def _described(self) -> list[MatrixUse | TableUse]:
        return [*self.matrices, *self.tables]

    def _tensors(self) -> list[Tensor]:
        return [*self.kept.values(), *(use.g for use in self._described())]

    def _by_multiplicity(
        self,
    ) -> tuple[list[MatrixUse | TableUse], list[list[MatrixUse | TableUse]]]:
        uses: dict[nn.Parameter, list[MatrixUse | TableUse]] = defaultdict(list)
        for use in self._described():
            uses[use.weight].append(use)
        alone = [group[0] for group in uses.values() if len(group) == 1]
        return alone, [group for group in uses.values() if len(group) > 1]

    def _settle_derived(self, fans: list[FanUse], parameters: list[nn.Parameter]) -> None:
        """One small backward per record, through what was computed without records."""
        shared = [fan.shared for fan in fans]
        gradients: dict[nn.Parameter, list[Tensor]] = defaultdict(list)
        for record in range(self.records):
            found = torch.autograd.grad(
                shared,
                parameters,
                [fan.g[record] for fan in fans],
                retain_graph=record + 1 < self.records,
                allow_unused=True,
            )
            for parameter, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    gradients[parameter].append(gradient)
        for parameter, rows in gradients.items():
            self.keep(parameter, torch.stack(rows))

    def _unite_mixed(self) -> None:
        """A parameter filed in forms that do not add up is kept whole: its norm needs the sum."""
        whole_only = {*self.kept, *_used_both_ways(self.matrices)}
        mixed = [use for use in self.matrices if use.weight in whole_only]
        self.matrices = [use for use in self.matrices if use.weight not in whole_only]
        tables = [use for use in self.tables if use.weight in whole_only]
        self.tables = [use for use in self.tables if use.weight not in whole_only]
        for use in mixed:
            self.keep(use.weight, per_record(use).view(self.records, *use.weight.shape))
        for table in tables:
            for record in range(self.records):
                self.kept[table.weight][record] += _built(table, record)


def per_record(use: MatrixUse) -> Tensor:
    """(B, p, d), or (B, d, p) if transposed: the gradient of every record."""
    if use.transposed:
        return torch.bmm(use.a.transpose(1, 2), use.g)
    return torch.bmm(use.g.transpose(1, 2), use.a)


def _used_both_ways(uses: list[MatrixUse]) -> set[nn.Parameter]:
    """Weights applied both as they are and transposed."""
    plain = {use.weight for use in uses if not use.transposed}
    return plain & {use.weight for use in uses if use.transposed}


def _same_input(uses: list[MatrixUse] | list[MatrixUse | TableUse]) -> list[list[MatrixUse]]:
    """Matrices applied to one and the same input, as query, key and value are."""
    groups: dict[object, list[MatrixUse]] = defaultdict(list)
    for use in uses:
        if isinstance(use, MatrixUse):
            groups[_memory(use.a)].append(use)
    return list(groups.values())


def _same_gradient(uses: list[MatrixUse | TableUse]) -> list[list[TableUse]]:
    """Tables whose look-ups are summed, as word, position and type embeddings are."""
    groups: dict[object, list[TableUse]] = defaultdict(list)
    for use in uses:
        if isinstance(use, TableUse):
            groups[_memory(use.g)].append(use)
    return list(groups.values())


def _memory(tensor: Tensor) -> object:
    """Equal for two tensors, both alive, that are the same elements."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


@dataclass
class _Norms:
    """(B,) squared norms of the gradients that `uses` make, and what they are checked by."""

    uses: Sequence[MatrixUse | TableUse]
    found: Tensor
    rows: Tensor
    """(B,) what they would be if rows did not cancel or reinforce each other."""

    @classmethod
    def sum_of(cls, uses: Sequence[MatrixUse | TableUse], *products: tuple[Gram, Gram]) -> "_Norms":
        """Of inner products of two Grams each, of which the second is used up."""
        found, rows = zip(*(spent.meet(kept) for kept, spent in products), strict=True)
        return cls(uses, functools.reduce(torch.add, found), functools.reduce(torch.add, rows))

    @classmethod
    def built(cls, uses: Sequence[MatrixUse]) -> "_Norms":
        """Of matrices whose gradients are built, record by record."""
        rows = [use.a.float().square().sum(2) * use.g.float().square().sum(2) for use in uses]
        found = _built_norms(uses, range(len(rows[0])))
        return cls(uses, found, torch.stack([each.sum(1) for each in rows]).sum(0))


@dataclass
class _Shared:
    """Matrices with one input, as they come in the backward pass: their Grams add up."""

    uses: list[MatrixUse]
    of_input: Gram
    of_gradients: Gram
    """The sum of those of the output gradients."""

    def add(self, use: MatrixUse) -> None:
        """One more."""
        self.uses.append(use)
        self.of_gradients.add(use.g.float())

    def norms(self) -> _Norms:
        """Of all of them; uses up the Grams."""
        return _Norms.sum_of(self.uses, (self.of_input, self.of_gradients))


def _added(norms: list[_Norms]) -> Tensor:
    """(B,) their sum; a gradient whose rows nearly cancel is built, as rounding would show."""
    found = torch.stack([each.found for each in norms])
    rows = torch.stack([each.rows for each in norms])
    for place, record in (found < CANCELLED * rows).nonzero().tolist():
        found[place, record] = _built_norms(norms[place].uses, [record])[0]
    return found.sum(0)


def _matrix_norms(group: list[MatrixUse]) -> _Norms:
    """Of several matrices with one input: their Grams add up."""
    a = group[0].a.float()
    if a.shape[1] == 1:
        squared = torch.stack([use.g.float().square().sum((1, 2)) for use in group]).sum(0)
        found = a.square().sum((1, 2)) * squared
        return _Norms(group, found, found)
    if _cheaper_built(a.shape[1], a.shape[2], sum(use.g.shape[2] for use in group)):
        return _Norms.built(group)
    shared = _Shared(group[:1], Gram.of(a), Gram.of(group[0].g.float()))
    for use in group[1:]:
        shared.add(use)
    return shared.norms()


def _table_norms(tables: list[TableUse]) -> _Norms:
    """Of tables whose look-ups are summed: rows meet where ids are equal."""
    meets, *others = [Gram.of_one_hot(use.ids, use.padding) for use in tables]
    for each in others:
        meets.add_all(each)
    return _Norms.sum_of(tables, (Gram.of(tables[0].g.float()), meets))


def _tied_norms(uses: list[MatrixUse | TableUse]) -> _Norms:
    """Of one weight used several times: cross terms included.

    ||H + E||^2 = ||H||^2 + ||E||^2 + 2 <H, E> with H from its uses as a matrix and E from those
    as a table; <H, E> needs only the output gradients at the ids that were looked up.
    """
    matrices = [use for use in uses if isinstance(use, MatrixUse)]
    tables = [use for use in uses if isinstance(use, TableUse)]
    products: list[tuple[Gram, Gram]] = []
    if matrices:
        a = _side_by_side([use.a.float() for use in matrices])
        g = _side_by_side([use.g.float() for use in matrices])
        if not tables and _cheaper_built(a.shape[1], a.shape[2], g.shape[2]):
            return _Norms.built(matrices)
        products.append((Gram.of(a), Gram.of(g)))
    if tables:
        ids = _side_by_side([use.ids for use in tables])
        looked = _side_by_side([_unpadded(use) for use in tables])
        products.append((Gram.of(looked), Gram.of_one_hot(ids)))
    norms = _Norms.sum_of(uses, *products)
    if matrices and tables:
        rows, inputs = (a, g) if matrices[0].transposed else (g, a)
        at_ids = torch.gather(rows, 2, ids[:, None, :].expand(-1, rows.shape[1], -1))
        crossed = torch.bmm(inputs, looked.transpose(1, 2))
        norms.found += 2 * crossed.mul_(at_ids).sum((1, 2))
    return norms


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """(B, n1 + n2 + ..., ...), with no copy made of a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _cheaper_built(rows: int, inputs: int, outputs: int) -> bool:
    """Whether building g_i^T a_i costs less than two Grams."""
    return INSTANTIATE_COST * inputs * outputs < rows * (inputs + outputs)


def _built_norms(uses: Sequence[MatrixUse | TableUse], records: Iterable[int]) -> Tensor:
    """Squared norms of some records' gradients, built one record at a time and dropped."""
    norms = []
    for record in records:
        sums: dict[nn.Parameter, Tensor] = {}
        for use in uses:
            built = _built(use, record)
            sums[use.weight] = sums[use.weight] + built if use.weight in sums else built
        norms.append(torch.stack([whole.square().sum() for whole in sums.values()]).sum())
    return torch.stack(norms)


def _built(use: MatrixUse | TableUse, record: int) -> Tensor:
    """The whole gradient of one record, in the weight's shape."""
    g = use.g[record].float()
    if isinstance(use, MatrixUse):
        a = use.a[record].float()
        return (torch.mm(a.t(), g) if use.transposed else torch.mm(g.t(), a)).view_as(use.weight)
    if use.padding is not None:
        g = g * (use.ids[record] != use.padding).unsqueeze(-1)
    whole = torch.zeros_like(use.weight, dtype=torch.float32)
    return whole.index_add_(0, use.ids[record], g)


def _unpadded(use: TableUse) -> Tensor:
    g = use.g.float()
    return g if use.padding is None else g * (use.ids != use.padding).unsqueeze(-1)


def _add_matrices(
    group: list[MatrixUse], factors: Tensor, sums: dict[nn.Parameter, Tensor]
) -> None:
    """One product over all rows of all records; the narrower side carries the factors."""
    scale_input = group[0].a.shape[2] <= sum(use.g.shape[2] for use in group)
    a = group[0].a.float()
    inputs = _rows(a * factors[:, None, None] if scale_input else a)
    for use in group:
        g = use.g.float()
        outputs = _rows(g if scale_input else g * factors[:, None, None])
        left, right = (inputs, outputs) if use.transposed else (outputs, inputs)
        held = sums.get(use.weight)
        if held is None:
            sums[use.weight] = torch.mm(left.t(), right).view_as(use.weight)
        else:
            held.view(left.shape[1], right.shape[1]).addmm_(left.t(), right)


def _add_table(use: TableUse, factors: Tensor, target: Tensor) -> None:
    weighted = use.g.float() * factors[:, None, None]
    if use.padding is not None:
        weighted *= (use.ids != use.padding).unsqueeze(-1)
    target.index_add_(0, use.ids.flatten(), _rows(weighted))


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
