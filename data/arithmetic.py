"""Multi-step arithmetic word problems with a gold chain of thought and the program behind it.

    Anne has 14 apples.
    First Anne buys 5 more.
    Second Anne loses 3.
    How many apples does Anne have now?

    First Anne buys 5 more: 14+5=19
    Second Anne loses 3: 19-3=16                                               -> \\boxed{16}

A problem is decided by its numbers alone (the program), so train and test never share a calculation,
whatever the names. Every value along the way lies in 1..99. Each line of the cot first repeats its
sentence: a small model learns to copy long before it learns to look things up.
"""

import hashlib
import json
import random

NAMES = ["Anne", "Ben", "Clara", "David", "Emma", "Jack", "Kate", "Leo"]
OBJECTS = ["apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps"]
PHRASES = {
    "+": ["{name} buys {n} more", "{name} finds {n} more", "{other} gives {name} {n}"],
    "-": ["{name} loses {n}", "{name} sells {n}", "{name} gives {other} {n}"],
    "*": ["{name} doubles the {things}"],
}
ORDINALS = ["First", "Second", "Third", "Fourth", "Fifth", "Sixth"]
STEPS = [2, 3, 4]
TEST_ONE_IN = 10  # problems is a test problem


def split_of(key) -> str:
    """Split of a problem from its canonical key: a stable hash, so it never moves between runs."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return "test" if digest[0] * 256 + digest[1] < 65536 // TEST_ONE_IN else "train"


def apply(value: int, op: str, n: int) -> int:
    return {"+": value + n, "-": value - n, "*": value * n}[op]


def draw(rng: random.Random, steps: int) -> dict:
    """A random program {start, ops, values}: values[i] is the true result of step i."""
    start = value = rng.randint(2, 49)
    ops, values = [], []
    while len(ops) < steps:
        op = rng.choice("++--*")
        n = 2 if op == "*" else rng.randint(1, 9) if rng.random() < 0.7 else rng.randint(10, 29)
        if 1 <= apply(value, op, n) <= 99:
            value = apply(value, op, n)
            ops.append([op, n])
            values.append(value)
    return {"start": start, "ops": ops, "values": values}


def make(rng: random.Random, split: str) -> dict:
    """One problem of the split: {question, cot, answer, program, kind}. Line i of the cot is step i."""
    steps = rng.choice(STEPS)
    program = draw(rng, steps)
    while split_of([program["start"], program["ops"]]) != split:
        program = draw(rng, steps)
    name, other = rng.sample(NAMES, 2)
    things = rng.choice(OBJECTS)
    sentences = [f"{name} has {program['start']} {things}."]
    lines, value = [], program["start"]
    for ordinal, (op, n), result in zip(ORDINALS, program["ops"], program["values"], strict=False):
        event = rng.choice(PHRASES[op]).format(name=name, other=other, n=n, things=things)
        sentences.append(f"{ordinal} {event}.")
        lines.append(f"{ordinal} {event}: {value}{op}{n}={result}")
        value = result
    sentences.append(f"How many {things} does {name} have now?")
    return {"question": "\n".join(sentences), "cot": "\n".join(lines), "answer": str(value),
            "answer_line": f"\\boxed{{{value}}}", "program": program, "kind": f"{steps} steps"}


def distinct(make, split: str, n: int, seed: int = 0) -> list[dict]:
    """n problems with no question twice, in an order that the seed fixes."""
    rng, seen = random.Random(f"{split} {seed}"), {}
    while len(seen) < n:
        problem = make(rng, split)
        seen.setdefault(problem["question"], problem)
    return list(seen.values())
