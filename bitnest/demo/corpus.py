"""The demo's text: four domains, held-out books, and two mixed texts cut from them.

What: every domain is a list of documents. prose (novels), thought (philosophy and essays) and
verse (Paradise Lost) come from a directory of books `Title_With_Underscores.txt`; synthetic
(sums, JSON records, tables, dates, counting) is generated here from a seed. Some documents of each
domain are held out of training. `mixed_text` deals chunks of a few kilobytes in the order of
`SLOTS`, the order batches are filled in too, so any prefix of a text mixes the domains as training
does.

What it leaves out: cleaning the books, finding duplicates between them, any text under licence.
"""

import datetime
import json
import random
from collections.abc import Iterator
from pathlib import Path

# Order of the domains, in batches and in the texts; any four neighbours are already a mix.
_HUMAN = ["prose", "thought", "prose"]
SLOTS = [*_HUMAN, "synthetic", *_HUMAN, "verse", *_HUMAN, "synthetic", *_HUMAN, "synthetic"]
THOUGHT = {
    "Beyond_Good_and_Evil",
    "Confessions_of_St_Augustine",
    "Nicomachean_Ethics",
    "The_Life_of_Jesus",
    "The_Republic",
    "Thus_Spoke_Zarathustra",
    "Walden",
    "Women_and_Economics",
}
VERSE = "Paradise_Lost"  # the one long poem: its last quarter is the held-out part
HELD_OUT = {"prose": ["Treasure_Island", "Frankenstein"], "thought": ["Beyond_Good_and_Evil"]}
CALIBRATION = {"prose": ["Cranford", "Dracula"], "thought": ["The_Republic"]}
# Published after 1929: public domain in some countries only, so neither read nor shipped.
SKIPPED = {"At_the_Mountains_of_Madness", "The_Cosmic_Computer", "This_Crowded_Earth"}
# Characters of one chunk in the texts; digits are one token each, so synthetic chunks are shorter.
CHUNK = {"prose": 2800, "thought": 2800, "verse": 2800, "synthetic": 1500}
TEXT_BYTES = 500_000
Documents = dict[str, list[str]]  # domain -> texts

NAMES = ["Ada", "Ben", "Clara", "David", "Emma", "Frank", "Grace",
         "Henry", "Iris", "John", "Kate", "Louis", "Mary", "Noah"]  # fmt: skip
TOWNS = ["London", "Paris", "Boston", "Dublin", "Naples", "Vienna", "Cairo", "Geneva"]
GOODS = ["apples", "bread", "candles", "cloth", "coal", "lamps", "paper", "ropes", "salt", "tea"]


def synthetic(seed: int, size: int) -> str:
    """About `size` characters of structured text: blocks of lines, a blank line between blocks."""
    rng = random.Random(seed)

    def sums() -> Iterator[str]:
        for _ in range(rng.randint(4, 12)):
            a, b = rng.randint(0, 99), rng.randint(0, 99)
            yield rng.choice([f"{a} + {b} = {a + b}", f"{a + b} - {a} = {b}"])

    def records() -> Iterator[str]:
        for number in range(start := rng.randint(1, 900), start + rng.randint(2, 6)):
            row = {"id": number, "name": rng.choice(NAMES), "town": rng.choice(TOWNS)}
            yield json.dumps(row | {"age": rng.randint(18, 80), "member": rng.random() < 0.5})

    def table() -> Iterator[str]:
        yield "| item | count | price | total |"
        yield "|---|---|---|---|"
        for item in rng.sample(GOODS, rng.randint(3, 6)):
            n, price = rng.randint(1, 9), rng.randint(1, 12)
            yield f"| {item} | {n} | {price} | {n * price} |"

    def dates() -> Iterator[str]:
        day = datetime.date(1800, 1, 1) + datetime.timedelta(days=rng.randrange(73000))
        for _ in range(rng.randint(3, 8)):
            yield f"{day.isoformat()} is {day:%A}, {day.day} {day:%B} {day.year}"
            day += datetime.timedelta(days=1)

    def counting() -> Iterator[str]:
        for _ in range(rng.randint(2, 4)):
            start, step = rng.randint(0, 50), rng.randint(1, 10)
            yield f"count by {step}: " + ", ".join(str(start + step * i) for i in range(9))

    out, length = [], 0
    while length < size:
        out.append("\n".join(rng.choice([sums, records, table, dates, counting])()) + "\n\n")
        length += len(out[-1])
    return "".join(out)


def read_domains(corpus: Path, seed: int) -> tuple[Documents, Documents, Documents]:
    """(training, held-out, calibration) documents; those of calibration are also trained on."""
    train: Documents = {"prose": [], "thought": [], "verse": [], "synthetic": []}
    held: Documents = {domain: [] for domain in train}
    for path in sorted(corpus.glob("*.txt")):
        text, title = path.read_text(encoding="utf-8"), path.stem
        if title == VERSE:
            cut = text.index("\n", len(text) * 3 // 4) + 1
            train["verse"], held["verse"] = [text[:cut]], [text[cut:]]
        elif title not in SKIPPED:
            domain = "thought" if title in THOUGHT else "prose"
            (held if title in HELD_OUT[domain] else train)[domain].append(text)
    train["synthetic"].append(synthetic(seed, 6_000_000))
    held["synthetic"].append(synthetic(~seed, 200_000))
    calibration = {
        domain: [(corpus / f"{title}.txt").read_text(encoding="utf-8") for title in titles]
        for domain, titles in CALIBRATION.items()
    }
    return train, held, calibration | {domain: train[domain] for domain in ("verse", "synthetic")}


def chunks(documents: list[str], size: int) -> Iterator[str]:
    """Pieces of at least `size` characters that end at a line end, the documents in turn."""

    def pieces(text: str) -> Iterator[str]:
        start = 0
        while (end := text.find("\n", start + size)) >= 0:
            yield text[start:end].strip() + "\n\n"
            start = end

    sources = [pieces(text) for text in documents]
    while sources:
        for source in list(sources):
            if (piece := next(source, None)) is None:
                sources.remove(source)
            else:
                yield piece


def mixed_text(documents: Documents) -> str:
    """`TEXT_BYTES` of chunks at least, in whole rounds of SLOTS."""
    sources = {domain: chunks(texts, CHUNK[domain]) for domain, texts in documents.items()}
    out, length = [], 0
    while length < TEXT_BYTES:
        for domain in SLOTS:
            piece = next(sources[domain], None)
            if piece is None:
                raise ValueError(f"domain {domain}: too little text for {TEXT_BYTES} bytes")
            out.append(piece)
            length += len(piece.encode())
    return "".join(out)
