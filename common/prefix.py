"""The frozen prefix: blocks below the lowest trainable one run once per record, not per step.

The prefix is a fixed map of one record, so keeping its output changes neither the mechanism
nor its price; it stays in the memory of the site that owns the record.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from common.errors import CoterieError

Inputs = dict[str, Tensor]
"""What a model reads, by argument name; every tensor has the records along its first axis."""


EMBEDDINGS = "embeddings"
"""The module of encoders of texts and images that makes what the first block reads."""
CONVOLUTIONS, PROJECTION = "feature_extractor", "feature_projection"
POSITIONS = "encoder.pos_conv_embed"
"""Those of Wav2Vec2. Its kin differ in what these give, or in what their blocks hand on."""


class _Captured(Exception):  # noqa: N818 - control flow, not an error
    """Carries the hidden state out of a forward pass that need not be finished."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class FrozenPrefix:
    """Cuts an encoder of the usual shape (what makes states, then a list of blocks) in two.

    `depth` blocks are below the cut. A block's first positional argument is the hidden state.
    """

    def __init__(self, encoder: nn.Module, depth: int) -> None:
        self._encoder, self.depth = encoder, depth
        self._owner, self._name, self._blocks = _find_cuttable(encoder)

    @torch.no_grad()
    def hidden(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """(B, T, d) input of the first block above the cut; the blocks above do not run."""

        def capture(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            raise _Captured(arguments[0])

        handle = self._blocks[self.depth].register_forward_pre_hook(capture)
        try:
            self._encoder(**inputs)
        except _Captured as captured:
            return captured.hidden
        finally:
            handle.remove()
        raise AssertionError("the encoder never reached its blocks")

    @contextmanager
    def entered(self, hidden: Tensor) -> Iterator[None]:
        """Within this block the encoder starts at the cut, from `hidden` (B, T, d)."""
        upper = self._blocks[self.depth :]
        if not hasattr(self._encoder, EMBEDDINGS):
            upper = nn.ModuleList([_Entry(hidden), *upper])
        stand_ins = _stand_ins(self._encoder, hidden)
        setattr(self._owner, self._name, upper)
        for module, given in stand_ins.items():
            module.forward = lambda *_args, given=given, **_kwargs: given
        try:
            yield
        finally:
            for module in stand_ins:
                del module.forward
            setattr(self._owner, self._name, self._blocks)


class _Entry(nn.Module):
    """A block that gives what is kept, whatever comes to it."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, _states: Tensor, **_others: object) -> Tensor:
        """(B, T, d)."""
        return self._hidden


def _stand_ins(encoder: nn.Module, hidden: Tensor) -> dict[nn.Module, object]:
    """What each module below the blocks gives at once, that it need not run."""
    if hasattr(encoder, EMBEDDINGS):
        return {encoder.get_submodule(EMBEDDINGS): hidden}
    # Of Wav2Vec2 only sizes count of what comes before the blocks: `_Entry` replaces it.
    records, states, _ = hidden.shape
    nothing = torch.zeros_like(hidden)
    return {
        encoder.get_submodule(CONVOLUTIONS): hidden.new_zeros((records, 1, states)),
        encoder.get_submodule(PROJECTION): (nothing, nothing),
        encoder.get_submodule(POSITIONS): nothing,
    }


def trainable_depth(encoder: nn.Module) -> int:
    """Number of blocks below the lowest one that holds a trainable parameter.

    None are, where something outside the blocks is trained, as the embeddings in full tuning.
    Raises: NoPrefixError if the encoder cannot be cut.
    """
    _, _, blocks = _find_cuttable(encoder)
    # What reads the last block's states may be trained: it runs in every step.
    above = [pooler] if isinstance(pooler := getattr(encoder, "pooler", None), nn.Module) else []
    inside = {p for module in (*blocks, *above) for p in module.parameters()}
    if any(p.requires_grad and p not in inside for p in encoder.parameters()):
        return 0
    for depth, block in enumerate(blocks):
        if any(parameter.requires_grad for parameter in block.parameters()):
            return depth
    return len(blocks)


def find_blocks(encoder: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The list of blocks that holds most parameters, and where it hangs: of an encoder-decoder
    the decoder's. Raises: NoPrefixError if there is none.
    """
    found = [
        (sum(p.numel() for p in child.parameters()), owner, name, child)
        for owner in encoder.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList)
    ]
    if not found:
        raise NoPrefixError("the model has no list of blocks")
    _, owner, name, blocks = max(found, key=lambda entry: entry[0])
    return owner, name, blocks


def _find_cuttable(encoder: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """As `find_blocks`, where it is known what makes what the first block reads."""
    owner, name, blocks = find_blocks(encoder)
    if hasattr(encoder, EMBEDDINGS):
        return owner, name, blocks
    if getattr(encoder.config, "model_type", "") == "wav2vec2":
        return owner, name, blocks
    raise NoPrefixError("the encoder has no embeddings followed by a list of blocks")


class NoPrefixError(CoterieError):
    """The encoder cannot be cut; it then runs whole, which is slower and otherwise the same."""
