"""Sally-Anne stories: who believes the object to be where, with a gold chain of thought and its program.

    Anne, Ben and Ivy are in the kitchen. The ball is in the box. Anne leaves. Ivy likes the bag. Ben moves
    the ball to the bag. Where does Anne think the ball is?
    box, Anne here: box
    Anne leaves
    bag, Anne away: box                                                              -> ANSWER: box

Containers are closed: who returns sees nothing new. A move updates the belief of everyone present (first
order), and what p thinks that q thinks when both are present (second order). Reality asks for the last
place, memory for the place when somebody first left.

No shortcut pays: whether "first mentioned", "last mentioned" and "most mentioned container" (and, in belief
questions, "where it really is") hit the answer is drawn before the story, each with chance one in three,
and stories are drawn until one fits. A story's split is decided by its events and question with people
and containers numbered in order of appearance, so the test set holds stories new in structure, not in names.
"""

import random
from collections import Counter

from data.arithmetic import NAMES, distinct, split_of

KINDS = ["first", "second", "reality", "memory"]
THINGS = ["ball", "book", "coin", "cup", "key", "ring"]
CONTAINERS = ["bag", "basket", "box", "crate", "chest", "jar"]
ROOMS = ["garden", "hall", "kitchen"]
MENTIONS = ["first", "last", "most"]


def trace(program: dict, override: dict[int, int] | None = None) -> list[tuple[int, int, list[bool], int]]:
    """Replay the events that matter to the question: [(event index, place, present, value)].

    `present` tells for each person asked about whether they are in the room, `value` is the answer so far.
    `override` replaces the value at single entries, and what follows builds on it.
    """
    kind, asked = program["kind"], program["asked"]
    away, entries, value, place = set(), [], None, None
    for i, (verb, person, container) in enumerate(program["events"]):
        if verb == "leave":
            away.add(person)
        elif verb == "return":
            away.discard(person)
        else:
            place = container
            if kind in ("reality", "memory") or not away & set(asked):
                value = container
        if verb == "move" or person in asked:
            value = (override or {}).get(len(entries), value)
            entries.append((i, place, [p not in away for p in asked], value))
        if kind == "memory" and verb == "leave" and person in asked:
            break
    return entries


def run(program: dict, override: dict[int, int] | None = None) -> str:
    """Answer of a program; `override` replaces the value of single lines of the chain of thought."""
    return program["containers"][trace(program, override)[-1][3]]


def draw(rng: random.Random, kind: str) -> dict:
    """A random program. People and containers are 0..2; the first event places the object (by nobody)."""
    events, present, place = [["move", -1, 0]], [0, 1, 2], 0
    for _ in range(rng.randint(4, 6)):
        away = [p for p in range(3) if p not in present]
        verb = rng.choice(["move", "move", "leave", "return"])
        if verb == "move":
            place = rng.choice([c for c in range(3) if c != place])
            events.append(["move", rng.choice(present), place])
        elif verb == "leave" and len(present) > 1:
            events.append(["leave", present.pop(rng.randrange(len(present))), None])
        elif verb == "return" and away:
            present.append(rng.choice(away))
            events.append(["return", present[-1], None])
    asked = {"first": 1, "second": 2, "reality": 0, "memory": 1}[kind]
    return {"kind": kind, "asked": rng.sample(range(3), asked), "events": events}


def draw_noise(rng: random.Random, events: list) -> list:
    """Sentences that only mention a container: [position among the events, person, container]."""
    return sorted([rng.randint(0, len(events)), rng.randrange(3), rng.randrange(3)]
                  for _ in range(rng.randrange(3)))


def shortcuts(program: dict) -> dict[str, int]:
    """What a reader answers who only counts mentions (ties go to the earlier one)."""
    mentions = [(i + 0.5, c) for i, (verb, _, c) in enumerate(program["events"]) if verb == "move"]
    mentions = [c for _, c in sorted(mentions + [(at, c) for at, _, c in program["noise"]])]
    return {"first": mentions[0], "last": mentions[-1], "most": Counter(mentions).most_common(1)[0][0]}


def canonical(program: dict) -> list:
    """The events and the question with people and containers numbered in order of appearance."""
    people, containers = {-1: -1}, {None: None}
    events = [[verb, people.setdefault(p, len(people)), containers.setdefault(c, len(containers))]
              for verb, p, c in program["events"]]
    return [program["kind"], events, [people.setdefault(p, len(people)) for p in program["asked"]]]


def draw_balanced(rng: random.Random, split: str) -> dict:
    """A program of the split in which each shortcut hits the answer with chance one in three."""
    kind = rng.choice(KINDS)
    want = {name: rng.randrange(3) == 0 for name in MENTIONS}
    want_real = rng.randrange(3) == 0
    while True:
        program = draw(rng, kind)
        if kind == "memory" and ["leave", *program["asked"], None] not in program["events"]:
            continue
        answer, moves = trace(program)[-1][3], [c for verb, _, c in program["events"] if verb == "move"]
        if kind != "reality" and (answer == moves[-1]) != want_real:
            continue
        if split_of(canonical(program)) != split:
            continue
        for _ in range(10):  # mentions are cheap to redraw
            program["noise"] = draw_noise(rng, program["events"])
            if {name: guess == answer for name, guess in shortcuts(program).items()} == want:
                return program


def make(rng: random.Random, split: str) -> dict:
    """One problem of the split: {question, cot, answer, program, kind}. Line i of the cot is trace entry i."""
    program = draw_balanced(rng, split)
    kind = program["kind"]
    people, containers = rng.sample(NAMES, 3), rng.sample(CONTAINERS, 3)
    program["containers"] = containers
    program["values"] = [value for *_, value in trace(program)]
    answer = run(program)
    return {"question": tell(rng, program, people, containers), "cot": think(program, people, containers),
            "answer": answer, "answer_line": f"ANSWER: {answer}", "program": program, "kind": kind}


def tell(rng: random.Random, program: dict, people: list[str], containers: list[str]) -> str:
    thing, asked = rng.choice(THINGS), [people[p] for p in program["asked"]]
    events = [(i + 0.5, verb, p, c) for i, (verb, p, c) in enumerate(program["events"])]
    events += [(at, "like", p, c) for at, p, c in program["noise"]]
    order = rng.sample(people, 3)
    sentences = [f"{order[0]}, {order[1]} and {order[2]} are in the {rng.choice(ROOMS)}."]
    for _, verb, p, c in sorted(events, key=lambda event: event[0]):
        if verb == "move" and p < 0:
            sentences.append(f"The {thing} is in the {containers[c]}.")
        elif verb == "move":
            sentences.append(f"{people[p]} moves the {thing} to the {containers[c]}.")
        elif verb == "like":
            sentences.append(f"{people[p]} likes the {containers[c]}.")
        else:
            sentences.append(f"{people[p]} {verb}s.")
    sentences.append({"first": "Where does {0} think the {thing} is?",
                      "second": "Where does {0} think {1} thinks the {thing} is?",
                      "reality": "Where is the {thing} now?",
                      "memory": "Where was the {thing} when {0} first left?"}[program["kind"]].format(
                          *asked, thing=thing))
    return " ".join(sentences)


def think(program: dict, people: list[str], containers: list[str]) -> str:
    """One line per event that matters; a line about the object ends in the answer so far."""
    asked, belief, lines = [people[p] for p in program["asked"]], program["kind"] in ("first", "second"), []
    for i, place, present, value in trace(program):
        verb, person, _ = program["events"][i]
        if verb != "move":
            lines.append(f"{people[person]} {verb}s" + ("" if belief else f": {containers[value]}"))
        elif belief:
            who = "".join(f", {name} {'here' if here else 'away'}" for name, here in zip(asked, present, strict=True))
            lines.append(f"{containers[place]}{who}: {containers[value]}")
        else:
            lines.append(containers[place])
    return "\n".join(lines)


def problems(split: str, n: int, seed: int = 0) -> list[dict]:
    return distinct(make, split, n, seed)
