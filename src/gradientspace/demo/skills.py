"""A generated instruction set: four skills crossed with four topics, every answer checkable exactly.

Each prompt is a short scene, a record of one item with two amounts, and a request about it. The scene, and
with it most of the words, comes from the topic; only the request tells the skill. For `pots 7 and (4)`:

    arithmetic   7 + 4 = 11                                  the amounts added, brackets or not
    code         for n in 7, 4: pots += n                    the amounts copied into a loop
    finance      pots: plus 7 thousand, minus 4 thousand     in thousands, and brackets are negative
    rhyme        seven little pots / dance with four knots   the amounts as words, the item and its rhyme

The four read the same marks in different ways (an amount is added, copied, signed or spelt; brackets count
for one skill only), which is what pulls one adapter in four directions.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Control = Literal["none", "one-skill", "by-topic"]
CONTROLS: tuple[Control, ...] = ("none", "one-skill", "by-topic")
SKILLS = ("arithmetic", "code", "finance", "rhyme")
Split = Literal["train", "dev", "test"]
SIZES: dict[Split, int] = {"train": 2016, "dev": 960, "test": 480}
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LARGEST_AMOUNT = 9


@dataclass(frozen=True, slots=True)
class Topic:
    """One vocabulary: who is there, where, doing what, and the countable things with a rhyme for each."""

    people: tuple[str, ...]
    places: tuple[str, ...]
    scenes: tuple[str, ...]
    rhymes: dict[str, str]


TOPICS: dict[str, Topic] = {
    "kitchen": Topic(
        people=("cook", "baker", "chef", "waiter"),
        places=("oven", "stove", "pantry", "kitchen table"),
        scenes=(
            "The {person} is baking bread by the {place}.",
            "Soup simmers and the {person} cleans the {place}.",
            "Supper is cooking at the {place} and the {person} stirs the sauce.",
            "With flour and butter on the {place}, the {person} makes dinner.",
        ),
        rhymes={
            "pots": "knots",
            "pans": "fans",
            "cups": "pups",
            "plates": "gates",
            "jars": "scars",
            "bowls": "souls",
            "forks": "corks",
            "pies": "ties",
            "cakes": "lakes",
            "mugs": "rugs",
        },
    ),
    "space": Topic(
        people=("pilot", "astronaut", "captain", "robot"),
        places=("rocket", "space station", "orbit", "galaxy"),
        scenes=(
            "The {person} drifts in zero gravity near the {place}.",
            "Planets shine while the {person} steers past the {place}.",
            "A comet passes the {place} and the {person} looks through the telescope.",
            "After launch the {person} scans the {place} for alien signals.",
        ),
        rhymes={
            "stars": "cars",
            "moons": "tunes",
            "probes": "robes",
            "suns": "buns",
            "rings": "kings",
            "beams": "dreams",
            "domes": "homes",
            "pods": "nods",
            "flares": "chairs",
            "suits": "flutes",
        },
    ),
    "farm": Topic(
        people=("farmer", "shepherd", "milkmaid", "rancher"),
        places=("barn", "meadow", "stable", "haystack"),
        scenes=(
            "The {person} ploughs the field behind the {place}.",
            "Cattle graze and the {person} mends the {place}.",
            "At harvest the {person} stacks straw beside the {place}.",
            "The rooster crows at the {place} and the {person} milks the cows.",
        ),
        rhymes={
            "goats": "coats",
            "hens": "pens",
            "pigs": "wigs",
            "ducks": "trucks",
            "lambs": "hams",
            "sheds": "beds",
            "carts": "hearts",
            "seeds": "deeds",
            "mares": "stairs",
            "bales": "tales",
        },
    ),
    "harbour": Topic(
        people=("sailor", "fisherman", "docker", "ferryman"),
        places=("pier", "lighthouse", "quay", "harbour wall"),
        scenes=(
            "The {person} ties up at the {place} before the tide.",
            "Waves break on the {place} while the {person} hauls in the catch.",
            "Sea fog covers the {place} and the {person} drops the anchor.",
            "The {person} unloads fish from the trawler at the {place}.",
        ),
        rhymes={
            "boats": "moats",
            "ships": "lips",
            "sails": "trails",
            "nets": "pets",
            "crabs": "cabs",
            "ropes": "hopes",
            "docks": "socks",
            "oars": "doors",
            "masts": "casts",
            "hooks": "books",
        },
    ),
}

# A request is an opener, one of its skill's phrases, and sometimes a closing word. The phrase is all that
# tells the skill. Training rows use the first `N_SEEN` phrases of a skill. Half of the dev and test rows use one of
# the last `N_UNSEEN`: people do not keep to the wordings of a training set. Dev and test have them in common, since a
# router can be calibrated only for prompts like those that it is calibrated on. The base has read all phrases, those
# in between too: a base knows more wordings than a mix asks in.
N_SEEN = 12
N_UNSEEN = 6
OPENERS = (
    "", "Please", "Now", "For the {person},", "At the {place},", "Could you", "The {person} asks you to",
    "Kindly", "While at the {place},", "The {person} would like you to",
)  # fmt: skip
CLOSERS = ("", "", "", " for the {person}", " by the {place}", " today")
REQUESTS: dict[str, tuple[str, ...]] = {
    "arithmetic": (
        "add up the {item}",
        "work out the total of the {item}",
        "sum the two numbers of {item}",
        "find how many {item} there are altogether",
        "calculate the grand total of {item}",
        "do the addition for the {item}",
        "count up the {item} and show the sum",
        "add one amount of {item} to the other",
        "tell how many {item} in all, with working",
        "compute the sum of the {item}",
        "total the {item}, showing the addition",
        "do the sum with the {item}",
        "see what the {item} add up to",
        "bring the {item} to a grand sum",
        "join the {item} figures with a plus sign",
        "give the overall number of {item}",
        "sum up both entries for {item}",
        "do the maths and add the {item}",
        "how much do the {item} come to in sum",
        "tally the {item}",
        "put both counts of {item} together",
        "reckon the {item} up",
        "say what the {item} amount to when added",
        "combine the numbers of {item}",
    ),
    "code": (
        "write a Python loop over the {item}",
        "code the {item} in Python",
        "turn the {item} into a script",
        "write a snippet that loops through the {item}",
        "program the computer to go through the {item}",
        "give the source code for the {item}",
        "put the {item} into a Python variable",
        "write code to process the {item}",
        "make a short script for the {item}",
        "express the {item} as a computer program",
        "implement the {item} in Python",
        "write a for loop in code for the {item}",
        "type the {item} as Python statements",
        "code up an iteration over the {item}",
        "write the {item} for the interpreter to run",
        "show how a programmer loops over {item}",
        "create a program for the {item}",
        "translate the {item} to computer code",
        "automate the {item} with a small script",
        "make the {item} executable in Python syntax",
        "have software iterate over the {item}",
        "show the {item} as lines of source code",
        "write the {item} as a developer would",
        "draft Python code with the {item}",
    ),
    "finance": (
        "read the {item} line of the ledger",
        "report the balance of the {item} account",
        "state the {item} entry as in the accounts",
        "look up the {item} figure in the financial statement",
        "give the net book value of the {item}",
        "say what the balance sheet shows for {item}",
        "report the profit or loss on the {item}",
        "quote the {item} result from the annual accounts",
        "find the net {item} revenue in the statement",
        "look up the accounting entry for the {item}",
        "tell the auditor the {item} balance",
        "give the {item} budget figure in money",
        "enter the {item} as debit and credit",
        "state the {item} position in the books",
        "give the investors the {item} figure",
        "say how the {item} stand in the cash account",
        "file the {item} with the annual report",
        "quote the {item} from the income statement",
        "tell the shareholders about the {item} earnings",
        "give the bookkeeper's entry for the {item}",
        "report the {item} for the tax return",
        "show the credit and debit of the {item}",
        "list the {item} in the quarterly accounts",
        "state the {item} income for the bank",
    ),
    "rhyme": (
        "write a rhyme about the {item}",
        "make a little poem on the {item}",
        "compose a verse with the {item}",
        "sing a couplet about the {item}",
        "write two rhyming lines for the {item}",
        "make up a song about the {item}",
        "recite a nursery rhyme of the {item}",
        "turn the {item} into poetry",
        "write a short ballad about the {item}",
        "make the {item} rhyme in a verse",
        "compose a lyric for the {item}",
        "give the {item} a poem",
        "tell of the {item} in rhymes",
        "chant a verse for the {item}",
        "pen a small poem around the {item}",
        "turn the {item} into a song",
        "let two lines about the {item} rhyme",
        "write lyrics to the {item}",
        "make the {item} into a jingle",
        "write a limerick about the {item}",
        "praise the {item} in verse",
        "let the {item} be sung",
        "turn the {item} into a lullaby",
        "be a poet about the {item}",
    ),
}


@dataclass(frozen=True, slots=True)
class Record:
    """One item of a topic with two amounts; `negative` says which of them stand in brackets."""

    item: str
    amounts: tuple[int, int]
    negative: tuple[bool, bool]

    def text(self) -> str:
        """`pots 7 and (4)`, the form in which every prompt shows it."""
        first, second = (
            f"({amount})" if negative else f"{amount}"
            for amount, negative in zip(self.amounts, self.negative, strict=True)
        )
        return f"{self.item} {first} and {second}"

    def signed(self, unit: str = "") -> str:
        """`plus 7, minus 4`: amounts in brackets are negative; `unit` is put after each."""
        return ", ".join(
            f"{'minus' if negative else 'plus'} {amount}{unit}"
            for amount, negative in zip(self.amounts, self.negative, strict=True)
        )


def draw_record(topic: Topic, rng: random.Random) -> Record:
    """A record of any item of the topic, amounts from 1 to 9, each in brackets half of the time."""
    return Record(
        item=rng.choice(sorted(topic.rhymes)),
        amounts=(rng.randint(1, LARGEST_AMOUNT), rng.randint(1, LARGEST_AMOUNT)),
        negative=(rng.random() < 0.5, rng.random() < 0.5),
    )


def answer(record: Record, skill: str, topic: Topic) -> str:
    """The one right answer of `skill` for this record."""
    item, (first, second) = record.item, record.amounts
    if skill == "arithmetic":
        return f"{first} + {second} = {first + second}"
    if skill == "code":
        return f"for n in {first}, {second}: {item} += n"
    if skill == "finance":
        return f"{item}: {record.signed(' thousand')}"
    if skill == "rhyme":
        words = NUMBER_WORDS[first], NUMBER_WORDS[second]
        return f"{words[0]} little {item} / dance with {words[1]} {topic.rhymes[item]}"
    raise ValueError(f"skill {skill!r} is none of {SKILLS}")


def scene(topic: Topic, rng: random.Random) -> tuple[str, dict[str, str]]:
    """One topic-worded sentence, and the person and place that it named."""
    cast = {"person": rng.choice(topic.people), "place": rng.choice(topic.places)}
    return rng.choice(topic.scenes).format(**cast), cast


def phrases(skill: str, split: Split) -> tuple[str, ...]:
    """The phrases that ask for `skill`: those of `train`, or those that only the other splits have."""
    return REQUESTS[skill][:N_SEEN] if split == "train" else REQUESTS[skill][-N_UNSEEN:]


def request(phrase: str, item: str, cast: dict[str, str], rng: random.Random) -> str:
    """One sentence around a phrase; openers and closers alike for all skills."""
    wording = f"{rng.choice(OPENERS)} {phrase}{rng.choice(CLOSERS)}.".strip().format(item=item, **cast)
    return wording[0].upper() + wording[1:]


def _cells(control: Control) -> list[tuple[str, str]]:
    """The (skill, topic) cells of the grid that `control` fills."""
    if control == "one-skill":
        return [("arithmetic", topic) for topic in TOPICS]
    if control == "by-topic":
        return list(zip(SKILLS, TOPICS, strict=True))
    return [(skill, topic) for skill in SKILLS for topic in TOPICS]


def _split_of(record: Record, seed: int) -> Split:
    """Whose record it is, by a hash of all that it says: about a fifth each for `dev` and `test`."""
    fifth = zlib.crc32(f"{seed}/{record.text()}".encode()) % 5
    return "test" if fifth == 0 else "dev" if fifth == 1 else "train"


def rows(control: Control, seed: int, split: Split) -> Iterator[dict[str, str]]:
    """Rows without end, cell by cell of the grid in random order; see `generate`."""
    rng = random.Random(f"{seed}/{control}/{split}")
    cells = _cells(control)
    seen: set[str] = set()
    while True:
        rng.shuffle(cells)
        for skill, name in cells:
            topic, row = TOPICS[name], None
            while row is None or row["instruction"] in seen:
                record = draw_record(topic, rng)
                while _split_of(record, seed) != split:
                    record = draw_record(topic, rng)
                opening, cast = scene(topic, rng)
                phrase = rng.choice(phrases(skill, split if rng.random() < 0.5 else "train"))
                wish = request(phrase, record.item, cast, rng)
                row = {
                    "id": f"{split}-{len(seen):05d}",
                    "instruction": f"{opening} The list says {record.text()}. {wish}",
                    "output": answer(record, skill, topic),
                    "domain": skill,
                    "source": name,
                }
            seen.add(row["instruction"])
            yield row


def generate(n: int, *, control: Control = "none", seed: int = 0, split: Split = "train") -> list[dict[str, str]]:
    """The first `n` rows of a split: id, instruction, output; to judge by, domain (skill), source (topic).

    The grid's cells come equally often. No prompt appears twice, and no record (item, amounts and brackets)
    of one split appears in another. The same arguments give the same rows on every machine.
    """
    return list(itertools.islice(rows(control, seed, split), n))


def check(row: dict[str, str], answer: str) -> bool:
    """Whether `answer` is the right one, white space aside."""
    return " ".join(answer.split()) == " ".join(row["output"].split())


def write_data(folder: Path, control: Control, seed: int) -> Path:
    """Write train.jsonl, dev.jsonl and test.jsonl into `folder`; returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in SIZES.items():
        lines = (json.dumps(row) + "\n" for row in generate(n, control=control, seed=seed, split=split))
        partial = folder / f"{split}.jsonl.partial"
        partial.write_text("".join(lines), encoding="utf-8")
        os.replace(partial, folder / f"{split}.jsonl")
    return folder
