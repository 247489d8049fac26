"""How answers cut from a text are judged: exact match and F1, as SQuAD defines them.

Source: the evaluation script of Rajpurkar et al. (2018), "Know What You Don't Know",
arXiv:1806.03822.
"""

import re
import string
from collections import Counter


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
