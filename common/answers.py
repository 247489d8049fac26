r"""Answers: what people accept as the answer to a question about a context, as one text.

A record keeps them in one text, so that it is spooled, hashed and told apart as any other: an
answer a line, the first written first, and after a tab where in the context it begins, if that is
not where its text first stands. Nothing at all says that the context holds no answer. Texts of
records have neither tabs nor line ends: white space was made one blank.

Each record is read by itself: what becomes of it depends on no other.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """A piece of a context."""

    text: str
    place: int = -1
    """Where in the context it begins, in characters; below 0: where its text first stands."""

    def begin(self, context: str) -> int:
        """Where it begins in a context that may hold it; below 0 where that does not."""
        if self.place >= 0 and context.startswith(self.text, self.place):
            return self.place
        return context.find(self.text)


def accepted(line: str) -> list[Answer]:
    r"""The answers that one text keeps.

    >>> accepted("the cup\ncup\t9")
    [Answer(text='the cup', place=-1), Answer(text='cup', place=9)]
    >>> accepted("")
    []
    """
    parts = [each.partition("\t") for each in line.split("\n") if each]
    return [Answer(text, int(place or -1)) for text, _, place in parts]


def found(line: str, context: str) -> tuple[int, str] | None:
    """Where the first of the answers that stand in the context begins, and its text."""
    places = ((answer.begin(context), answer.text) for answer in accepted(line))
    return next((place for place in places if place[0] >= 0), None)


def read_answers(value: Any, context: str) -> str | None:
    r"""What stands in a column of answers, as one text; None if none of them stands in the context.

    A text is one answer. Several are a list of texts, or in the shape of SQuAD: `{"text": [...],
    "answer_start": [...]}`, or a list of such objects with one text each. Nothing, blanks, and a
    list of nothing say that there is no answer. Where SQuAD's number and text disagree, the text
    counts.
    Args: context: as it stands in the table; the numbers count its characters.
    Raises: ValueError, saying what it is, if it is of another shape.

    >>> read_answers({"text": ["cup", "the cup"], "answer_start": [8, 4]}, "cup and the  cup ")
    'cup\nthe cup'
    >>> read_answers([], "the cup"), read_answers("ball", "the cup")
    ('', None)
    """
    plain = " ".join(context.split())
    answers = dict.fromkeys(_kept(*pair, context, plain) for pair in _pairs(value))
    answers.pop("", None)
    line = "\n".join(answers)
    return line if not line or found(line, plain) else None


def _pairs(value: Any) -> Iterator[tuple[str, int]]:
    """Texts, and where each begins by the table; below 0 where it does not say."""
    if value is None:
        return
    if isinstance(value, str):
        yield value, -1
    elif isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if isinstance(texts, str) or texts is None:
            texts, starts = [texts or ""], [starts]
        yield from zip(_texts(texts), _starts(starts, len(texts)), strict=True)
    elif isinstance(value, list):
        for each in value:
            if isinstance(each, list) or each is None:
                raise ValueError(_SHAPES)
            yield from _pairs(each)
    else:
        raise ValueError(_SHAPES)  # noqa: TRY004 - of a table, and not of a program


_SHAPES = "no text, list of texts, or object with text and answer_start as in SQuAD"


def _texts(texts: Any) -> Iterable[str]:
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(_SHAPES)
    return texts


def _starts(starts: Any, count: int) -> list[int]:
    if starts is None or starts == [None]:
        return [-1] * count
    if not isinstance(starts, list) or not all(type(start) is int for start in starts):
        raise ValueError(_SHAPES)
    if len(starts) != count:
        raise ValueError("not one number in answer_start for each text")
    return starts


def _kept(text: str, start: int, context: str, plain: str) -> str:
    """One answer as a record keeps it; empty if it is nothing but blanks."""
    answer = " ".join(text.split())
    if not answer or start < 0:
        return answer
    before = context[: start + len(text) - len(text.lstrip())]
    place = len(" ".join(before.split()))
    place += bool(place) and before[-1:].isspace()
    other = place != plain.find(answer) and plain.startswith(answer, place)
    return f"{answer}\t{place}" if other else answer
