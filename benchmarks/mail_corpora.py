"""`python -m benchmarks.mail_corpora FOLDER`: three made mail corpora, as CSV, for `data=csv`.

They stand in for a mail corpus that nobody here has seen: 5,000 messages to train on and 1,000 of a
hold-out each, of two classes. None is real mail: running text is BBC News, cut into
passages (an article serves the training part or the hold-out, never both), the rest is drawn from
lists below. Each is hard in its own way:

offers   30 % spam: offers with misspelt words, links and HTML left over, half of them followed by a
         passage of news that hides them; ham: letters that quote news, with replies and signatures
lists    17 % spam: which of two groups of news topics the new text is about, above a quoted reply
         about anything; nothing else tells the classes apart
forwards 50 % spam: as `offers`, behind headers of a forwarded mail that take half of 128 tokens

1 to 2 % of the labels are wrong in both parts, 3 % of the messages stand there twice, some
characters are broken.
"""

import argparse
import csv
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.config import DataConfig, DataSource
from common.data import load_splits

TRAIN, HOLDOUT = 5000, 1000
"""Messages of each part."""
REPEATED = 0.03
"""Share of the messages that stand there twice."""
TOPICS = ["business", "entertainment", "politics", "sports", "tech"]
NAMES = [
    "Anna", "Ben", "Carla", "Dinesh", "Eva", "Frank", "Grace", "Hiro", "Ines", "Jonas", "Kate",
    "Liam", "Mona", "Nils", "Olga", "Paul",
]  # fmt: skip
HOSTS = ["mail", "relay", "smtp", "mx", "gate", "post", "node", "edge"]
SENDERS = ["northfield", "ridgeway", "lakeside", "harbour", "oakdale", "westpoint", "summit"]
GREETINGS = ["Hi {n},", "Dear {n},", "{n} -", "Hello all,", "Team,", "", "Good morning {n},"]
CLOSINGS = ["Thanks,\n{n}", "Regards, {n}", "-- \n{n}\nOffice 4.12, ext. 55{d}", "Best\n{n}", ""]
REMARKS = [
    "see below, any comments before the meeting on {d}?",
    "can you check the numbers in this one, I get {d} and not what they write",
    "fyi, this came up in the call yesterday.",
    "attached the draft. Please send changes by the {d}th.",
    "I am out until Monday, please ask {n} for the file.",
    "do we still have room {d} for this? otherwise move it to next week",
    "the account team wants to know what we think, free for lunch to talk about it?",
    "order {d} was confirmed, the invoice goes to finance at the end of the month.",
    "here is the link to the paper: http://www.{h}.example/{d}.html",
    "please click through the slides before you approve them, the price list is on page {d}",
]
OFFERS = [
    "{w} {v}, only ${d}.99 while stocks last",
    "You have been selected for {v}. Reply within {d} hours",
    "Get {v} without any questions, approved in {d} minutes",
    "save up to {d}% on {v} today",
    "{n}, your neighbours already use {v}. Why pay more?",
    "this is not a joke: {v} delivered to your door, discreet packaging",
    "Confirm your account to receive {v}, case number {d}",
    "I am the widow of a banker and wish to share {v} with you in confidence",
    "last notice!! {v} expires in {d} hours",
    "our shares of {h} will rise {d}% this week, get {v} before the news is out",
]
GOODS = [
    "cheap medication", "a home loan at a low rate", "a university diploma", "a replica watch",
    "a free holiday", "software licences", "weight loss pills", "a casino bonus", "a lottery prize",
    "work from home income", "a new credit card", "printer ink", "hot penny stocks",
]  # fmt: skip
PRAISE = ["AMAZING", "limited offer:", "*** NEW ***", "Act now,", "100% natural", "GUARANTEED"]
TAGS = ["<br>", "<b>", "</td>", "&nbsp;", '<font color="#ff0000">', "<a href=", "=20", "=3D"]
SWAPS = {"a": "@", "i": "1", "o": "0", "e": "3", "l": "|", "s": "$"}
BROKEN = ["Ã©", "â€™", "�", "\x92", "Â£"]
OTHER_GROUP = ("entertainment", "sports")
"""Topics of the class `spam` in `lists`."""


@dataclass(frozen=True)
class Source:
    """What messages of one part are made from."""

    draw: random.Random
    articles: dict[str, list[list[str]]]
    """Words of each article, by topic."""

    def happens(self, share: float) -> bool:
        """One coin."""
        return self.draw.random() < share

    def passage(self, topics: tuple[str, ...], low: int, high: int) -> str:
        """Some words in a row of an article about one of the topics."""
        words = self.draw.choice(self.articles[self.draw.choice(topics)])
        length = min(self.draw.randint(low, high), len(words))
        start = self.draw.randint(0, len(words) - length)
        return " ".join(words[start : start + length])

    def line(self, choices: list[str]) -> str:
        """One of the lines, filled in."""
        draw = self.draw
        values = {"n": draw.choice(NAMES), "d": draw.randint(2, 98), "h": draw.choice(SENDERS)}
        values |= {"v": draw.choice(GOODS), "w": draw.choice(PRAISE)}
        return draw.choice(choices).format(**values)


def offers(source: Source, spam: bool) -> tuple[str, str]:
    """(subject, body)."""
    return _spam(source) if spam else _letter(source)


def lists(source: Source, spam: bool) -> tuple[str, str]:
    """(subject, body)."""
    ham = tuple(topic for topic in TOPICS if topic not in OTHER_GROUP)
    text = source.passage(OTHER_GROUP if spam else ham, 40, 120)
    subject = " ".join(text.split()[:4]) if source.happens(0.3) else "Re: digest"
    quoted = _quoted(source.passage((*TOPICS,), 20, 60))
    return subject, "\n".join([source.line(GREETINGS), text, source.line(CLOSINGS), quoted])


def forwards(source: Source, spam: bool) -> tuple[str, str]:
    """(subject, body)."""
    subject, body = offers(source, spam)
    draw = source.draw
    hops = [
        f"Received: from {draw.choice(HOSTS)}{draw.randint(1, 99)}.{draw.choice(SENDERS)}.example"
        for _ in range(3)
    ]
    people = f"From: {draw.choice(NAMES)}@{draw.choice(SENDERS)}.example\nTo: {draw.choice(NAMES)}"
    return f"FW: {subject}", "\n".join(["----- Forwarded by -----", *hops, people, body])


def _letter(source: Source) -> tuple[str, str]:
    parts = [source.line(GREETINGS), source.line(REMARKS)]
    if source.happens(0.6):
        parts.append(source.passage((*TOPICS,), 20, 250))
    parts.append(source.line(CLOSINGS))
    if source.happens(0.5):
        parts.append(_quoted(f"{source.line(REMARKS)} {source.passage((*TOPICS,), 10, 60)}"))
    return source.passage((*TOPICS,), 2, 6), "\n".join(parts)


def _spam(source: Source) -> tuple[str, str]:
    draw = source.draw
    lines = [source.line(OFFERS) for _ in range(draw.randint(1, 4))]
    body = _disguised(" ".join(lines), source)
    if source.happens(0.5):
        body = f"{body}\n{source.passage((*TOPICS,), 30, 200)}"
    if source.happens(0.3):
        body = f"{source.line(GREETINGS)} {body}"
    plain = source.happens(0.4)
    return source.passage((*TOPICS,), 2, 6) if plain else source.line(OFFERS), body


def _disguised(text: str, source: Source) -> str:
    """Some letters swapped for others that look alike, some tags and links."""
    draw, words = source.draw, []
    for word in text.split():
        swapped = "".join(SWAPS.get(c, c) if source.happens(0.4) else c for c in word)
        words.append(swapped if source.happens(0.3) else word)
        if source.happens(0.08):
            words.append(draw.choice(TAGS))
    if source.happens(0.6):
        node, sender = draw.randint(1, 255), draw.choice(SENDERS)
        words.append(f"http://{node}.{sender}.example/?id={draw.random()}")
    return " ".join(words)


def _quoted(text: str) -> str:
    words = text.split()
    rows = [" ".join(words[at : at + 10]) for at in range(0, len(words), 10)]
    return "\n".join(["On Tuesday somebody wrote:", *(f"> {row}" for row in rows)])


CORPORA: dict[str, tuple[Callable[[Source, bool], tuple[str, str]], float, float]] = {
    "offers": (offers, 0.30, 0.01),
    "lists": (lists, 0.17, 0.015),
    "forwards": (forwards, 0.50, 0.02),
}
"""How a message is made, the share of spam, the share of wrong labels."""


def messages(name: str, source: Source, count: int) -> list[tuple[str, str]]:
    """(text, label) of each message, some of them twice."""
    make, share, wrong = CORPORA[name]
    draw = source.draw
    rows: list[tuple[str, str]] = []
    while len(rows) < count:
        if rows and source.happens(REPEATED):
            rows.append(draw.choice(rows))
            continue
        spam = source.happens(share)
        subject, body = make(source, spam)
        text = f"Subject: {subject}\n{body}"
        if source.happens(0.2):
            at = draw.randint(0, len(text))
            text = f"{text[:at]}{draw.choice(BROKEN)}{text[at:]}"
        rows.append((text, "spam" if spam != source.happens(wrong) else "ham"))
    return rows


def write_corpus(folder: Path, name: str, seed: int) -> None:
    """`NAME-train.csv` and `NAME-holdout.csv`, with the columns `message` and `category`."""
    for part, count in (("train", TRAIN), ("holdout", HOLDOUT)):
        draw = random.Random(f"{seed}:{name}:{part}")  # noqa: S311 - made texts, not secrets
        rows = messages(name, Source(draw, _articles(part)), count)
        with (folder / f"{name}-{part}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("message", "category"), *rows])


def _articles(part: str) -> dict[str, list[list[str]]]:
    """BBC News: its training and validation parts, or its hold-out."""
    splits = load_splits(DataConfig(source=DataSource.bbc_news, path="", labels=TOPICS))
    found: dict[str, list[list[str]]] = {topic: [] for topic in TOPICS}
    for records in (splits.train, splits.validation) if part == "train" else (splits.holdout,):
        for text, label in zip(records.contents, records.labels, strict=True):
            found[TOPICS[label]].append(str(text).split())
    return found


def main() -> None:
    """Writes all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in CORPORA:
        write_corpus(arguments.folder, name, arguments.seed)


if __name__ == "__main__":
    main()
