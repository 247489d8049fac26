"""How answers cut from a text are judged: exact match and F1, as SQuAD defines them.

Source: the evaluation script of Rajpurkar et al. (2018), "Know What You Don't Know",
arXiv:1806.03822.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence


def normalized(answer: str) -> str:
    """Lower case, without punctuation, English articles and extra blanks.

    >>> normalized("The  U.S. team!")
    'us team'
    """
    plain = "".join(each for each in answer.lower() if each not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(predicted: str, answer: str) -> float:
    """1 if the two are the same but for what `normalized` takes away, else 0."""
    return float(normalized(predicted) == normalized(answer))


def word_f1(predicted: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words, each as often as it stands there; where
    one has no word, 1 if both have none, else 0.

    >>> round(word_f1("the red cup", "a red team cup"), 4)
    0.8
    """
    found, wanted = normalized(predicted).split(), normalized(answer).split()
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))


def best_of(judge: Callable[[str, str], float]) -> Callable[[str, Sequence[str]], float]:
    """The most that a judge gives over all accepted answers; where none has a word, nothing but an
    answer without one is right, as with SQuAD 2's questions that have none.

    >>> best_of(word_f1)("red cup", ["the cup", "a red cup"]), best_of(exact_match)("cup", [])
    (1.0, 0.0)
    """

    def judged(predicted: str, answers: Sequence[str]) -> float:
        wanted = [answer for answer in answers if normalized(answer)]
        return max(judge(predicted, answer) for answer in wanted or [""])

    return judged
