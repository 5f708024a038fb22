"""Sally-Anne stories: who believes the object to be where, with a gold chain of thought and its program.

    Anne, Ben and Leo are in the hall. The ball is in the box. Anne leaves. Leo likes the bag. Ben swaps the contents
    of the box and the bag. Anne returns. Ben moves the ball to the jar. Where does Anne think the ball is?
    in box, Anne here: box
    Anne leaves
    swap box bag, Anne away: box
    Anne returns
    to jar, Anne here: jar                                                            -> ANSWER: jar

Containers are closed: who returns sees nothing new. Moves and swaps change the belief of everyone present (first
order), and what p thinks that q thinks when both are present (second order). Reality asks for the last place, memory
for the place when somebody first left. Swaps make the place depend on all that came before, so that a reader who
can't write steps down has to follow them one by one in the head.

No shortcut pays: whether "first mentioned", "last mentioned" and "most mentioned container" (and, unless it is the
question, "where it really is") hit the answer is drawn before the story, each with chance one in three, and stories
are drawn until one fits. A story's split is decided by its events and question with people and containers numbered
in order of appearance, so the test set holds stories new in structure, not in names.
"""

import random

from data.arithmetic import NAMES, distinct, split_of

KINDS = ["first", "second", "reality", "memory"]
THINGS = ["ball", "book", "coin", "cup", "key", "ring"]
CONTAINERS = ["bag", "basket", "box", "crate", "chest", "jar"]
ROOMS = ["garden", "hall", "kitchen"]
VERBS = ["move"] + ["swap"] * 4 + ["leave"] * 2 + ["return"] * 2
QUESTIONS = {
    "first": "Where does {0} think the {thing} is?",
    "second": "Where does {0} think {1} thinks the {thing} is?",
    "reality": "Where is the {thing} now?",
    "memory": "Where was the {thing} when {0} first left?",
}
MENTIONS = ["first", "last", "most"]


def trace(program: dict, override: dict[int, int] | None = None) -> list[tuple[int, list[bool], int]]:
    """Replay the events that matter to the question: [(event index, present, value)].

    `present` tells for each person asked about whether they are in the room, `value` is the answer so far.
    `override` replaces the value at single entries, and what follows builds on it.
    """
    kind, asked = program["kind"], program["asked"]
    watchers = set(asked) if kind in ("first", "second") else set()  # whose absence makes the value stale
    away, entries, value = set(), [], None
    for i, (verb, person, containers) in enumerate(program["events"]):
        if verb == "leave":
            away.add(person)
        elif verb == "return":
            away.discard(person)
        elif not away & watchers:
            value = containers[0] if verb == "move" else swapped(value, containers)
        if containers or person in asked:
            value = (override or {}).get(len(entries), value)
            entries.append((i, [p not in away for p in asked], value))
        if kind == "memory" and verb == "leave" and person in asked:
            break
    return entries


def swapped(place: int, pair: list[int]) -> int:
    return pair[1 - pair.index(place)] if place in pair else place


def run(program: dict, override: dict[int, int] | None = None) -> str:
    """Answer of a program; `override` replaces the value of single lines of the chain of thought."""
    return program["containers"][trace(program, override)[-1][2]]


def draw(rng: random.Random, kind: str) -> dict:
    """A random program. People and containers are 0..2; the first event places the object (by nobody)."""
    events, present, place = [["move", -1, [0]]], [0, 1, 2], 0
    for _ in range(rng.randint(5, 6)):
        away = [p for p in range(3) if p not in present]
        verb = rng.choice(VERBS)
        if verb == "move":
            place = rng.choice([c for c in range(3) if c != place])
            events.append(["move", rng.choice(present), [place]])
        elif verb == "swap":
            pair = rng.sample(range(3), 2)
            place = swapped(place, pair)
            events.append(["swap", rng.choice(present), pair])
        elif verb == "leave" and len(present) > 1:
            events.append(["leave", present.pop(rng.randrange(len(present))), []])
        elif verb == "return" and away:
            present.append(rng.choice(away))
            events.append(["return", present[-1], []])
    asked = rng.sample(range(3), {"first": 1, "second": 2, "reality": 0, "memory": 1}[kind])
    return {"kind": kind, "asked": asked, "events": events, "real": place}


def draw_noise(rng: random.Random, events: list) -> list:
    """Sentences that only mention a container: [position among the events, person, container]."""
    return sorted([rng.randint(0, len(events)), rng.randrange(3), rng.randrange(3)]
                  for _ in range(rng.randrange(2)))


def shortcuts(program: dict) -> dict[str, int]:
    """What a reader answers who only counts mentions (ties go to the earlier one)."""
    mentions = []
    for i, (_, _, containers) in enumerate([*program["events"], [None, None, []]]):
        mentions += [c for at, _, c in program["noise"] if at == i] + containers
    return {"first": mentions[0], "last": mentions[-1], "most": max(mentions, key=mentions.count)}


def canonical(program: dict) -> list:
    """The events and the question with people and containers numbered in order of appearance."""
    people, places = {-1: -1}, {}
    events = [[verb, people.setdefault(p, len(people)), [places.setdefault(c, len(places)) for c in containers]]
              for verb, p, containers in program["events"]]
    return [program["kind"], events, [people.setdefault(p, len(people)) for p in program["asked"]]]


def draw_balanced(rng: random.Random, split: str) -> dict:
    """A program of the split in which each shortcut hits the answer with chance one in three."""
    kind = rng.choice(KINDS)
    want = {name: rng.randrange(3) == 0 for name in MENTIONS}
    want_real = rng.randrange(3) == 0
    while True:
        program = draw(rng, kind)
        if kind == "memory" and ["leave", *program["asked"], []] not in program["events"]:
            continue
        answer = trace(program)[-1][2]
        if kind != "reality" and (answer == program["real"]) != want_real:
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
    program["values"] = [value for _, _, value in trace(program)]
    answer = run(program)
    return {"question": tell(rng, program, people, containers), "cot": think(program, people, containers),
            "answer": answer, "answer_line": f"ANSWER: {answer}", "program": program, "kind": kind}


def tell(rng: random.Random, program: dict, people: list[str], containers: list[str]) -> str:
    thing, asked, order = rng.choice(THINGS), [people[p] for p in program["asked"]], rng.sample(people, 3)
    sentences = [f"{order[0]}, {order[1]} and {order[2]} are in the {rng.choice(ROOMS)}."]
    for i, (verb, p, places) in enumerate([*program["events"], ["end", 0, []]]):
        sentences += [f"{people[q]} likes the {containers[c]}." for at, q, c in program["noise"] if at == i]
        name, places = people[p], [containers[c] for c in places]
        if verb == "move":
            sentences.append(f"The {thing} is in the {places[0]}." if p < 0 else
                             f"{name} moves the {thing} to the {places[0]}.")
        elif verb == "swap":
            sentences.append(f"{name} swaps the contents of the {places[0]} and the {places[1]}.")
        elif verb != "end":
            sentences.append(f"{name} {verb}s.")
    sentences.append(QUESTIONS[program["kind"]].format(*asked, thing=thing))
    return " ".join(sentences)


def think(program: dict, people: list[str], containers: list[str]) -> str:
    """One line per event that matters; a line about the object ends in the answer so far."""
    asked, belief, lines = [people[p] for p in program["asked"]], program["kind"] in ("first", "second"), []
    for i, present, value in trace(program):
        verb, p, places = program["events"][i]
        if places:
            what = " ".join(["in" if p < 0 else "to" if verb == "move" else "swap"] + [containers[c] for c in places])
            who = [f", {name} {'here' if here else 'away'}" for name, here in zip(asked, present, strict=True)]
            lines.append(f"{what}{''.join(who) if belief else ''}: {containers[value]}")
        else:
            lines.append(f"{people[p]} {verb}s" + ("" if belief else f": {containers[value]}"))
    return "\n".join(lines)


def problems(split: str, n: int, seed: int = 0) -> list[dict]:
    return distinct(make, split, n, seed)
