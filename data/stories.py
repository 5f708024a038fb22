"""Sally-Anne stories: who believes the object to be where, with a gold chain of thought and its program.

    Anne, Ben and Leo are in the hall.
    First the ball is in box.
    Second Anne leaves.
    Third Ben swaps box and bag.
    Fourth Anne returns.
    Fifth Ben moves it to jar.
    Where does Anne think the ball is?

    First the ball is in box, Anne here: box
    Second Anne leaves: box
    Third Ben swaps box and bag, Anne away: box
    Fourth Anne returns: box
    Fifth Ben moves it to jar, Anne here: jar                                         -> ANSWER: jar

Containers are closed: who returns sees nothing new. To swap box and bag is to swap what they hold. Moves and
swaps change the belief of everyone present (first order), and what p thinks that q thinks when both are present
(second order). Reality asks for the last place, memory for the place when somebody first left. Swaps make a
place depend on all that came before: a reader who can't write the steps down has to follow them in the head.
Each line of the cot first repeats its sentence: a small model learns to copy long before it learns to look
things up.

No shortcut pays: whether "first mentioned", "last mentioned" and "most mentioned container" (and, unless it
is the question, "where it really is") hit the answer is drawn before the story, each with a chance of 1 in 3,
and stories are drawn until one fits. A story's split is a hash of its events and question, people and containers
numbered in order of appearance, so that stories which differ in names alone share a split. Not so those that differ in
the order of a swap: "swaps box and bag" and "swaps bag and box" mean the same and count as two, so that 95% of the test
stories have a twin in the train split, and 47% one among its first 24,000.
"""

import random

from data.arithmetic import NAMES, ORDINALS, split_of

THINGS = ["ball", "book", "coin", "cup", "key", "ring"]
CONTAINERS = ["bag", "basket", "box", "crate", "chest", "jar"]
ROOMS = ["garden", "hall", "kitchen"]
VERBS = ["move"] + ["swap"] * 5 + ["leave"] * 2 + ["return"] * 2
QUESTIONS = {
    "first": "Where does {0} think the {thing} is?",
    "second": "Where does {0} think {1} thinks the {thing} is?",
    "reality": "Where is the {thing} now?",
    "memory": "Where was the {thing} when {0} first left?",
}
KINDS = list(QUESTIONS)
MENTIONS = ["first", "last", "most"]


def trace(program: dict, false: dict[int, int] | None = None) -> list[tuple[list[bool], int]]:
    """Replay of the story, or of what matters to a memory question: [(present, value)] event by event.

    `present` tells for each person asked about whether they are in the room, `value` is the answer so far; `false`
    {event: value} puts another value in its place after that event, from which the later ones go on.
    """
    kind, asked = program["kind"], program["asked"]
    watchers = set(asked) if kind in ("first", "second") else set()  # whose absence makes the value stale
    away, entries, value = set(), [], None
    for verb, person, containers in program["events"]:
        if verb == "leave":
            away.add(person)
        elif verb == "return":
            away.discard(person)
        elif not away & watchers:
            value = containers[0] if verb == "move" else swapped(value, containers)
        value = (false or {}).get(len(entries), value)
        entries.append(([p not in away for p in asked], value))
        if kind == "memory" and verb == "leave" and person in asked:
            break
    return entries


def swapped(place: int, pair: list[int]) -> int:
    return pair[1 - pair.index(place)] if place in pair else place


def draw(rng: random.Random, kind: str) -> dict:
    """A random program. People and containers are 0..2; the first event places the object (by nobody)."""
    events, present, place = [["move", -1, [0]]], [0, 1, 2], 0
    for _ in range(rng.randint(4, 5)):
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


def shortcuts(program: dict) -> dict[str, int]:
    """What a reader answers who only counts mentions (ties go to the earlier one)."""
    mentions = [c for _, _, containers in program["events"] for c in containers]
    return {"first": mentions[0], "last": mentions[-1], "most": max(mentions, key=mentions.count)}


def canonical(program: dict) -> list:
    """The events and the question with people and containers numbered in order of appearance."""
    people, places = {-1: -1}, {}
    events = [[verb, people.setdefault(p, len(people)), [places.setdefault(c, len(places)) for c in held]]
              for verb, p, held in program["events"]]
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
        answer = trace(program)[-1][1]
        if kind != "reality" and (answer == program["real"]) != want_real:
            continue
        if {name: guess == answer for name, guess in shortcuts(program).items()} != want:
            continue
        if split_of(canonical(program)) == split:
            return program


def make(rng: random.Random, split: str) -> dict:
    """A problem of the split: {question, cot, answer, program, kind}. Line i of the cot is trace entry i."""
    program = draw_balanced(rng, split)
    people, containers, thing = rng.sample(NAMES, 3), rng.sample(CONTAINERS, 3), rng.choice(THINGS)
    program["containers"] = containers
    program["values"] = [value for _, value in trace(program)]
    said, answer = happenings(program, thing, people, containers), containers[program["values"][-1]]
    order = rng.sample(people, 3)
    intro = f"{order[0]}, {order[1]} and {order[2]} are in the {rng.choice(ROOMS)}."
    question = QUESTIONS[program["kind"]].format(*(people[p] for p in program["asked"]), thing=thing)
    return {"question": "\n".join([intro, *(f"{event}." for event in said), question]),
            "cot": think(program, said, people), "answer": answer, "answer_line": f"ANSWER: {answer}",
            "program": program, "kind": program["kind"]}


def happenings(program: dict, thing: str, people: list[str], containers: list[str]) -> list[str]:
    """The story's events in words, without a full stop."""
    said = []
    for ordinal, (verb, p, places) in zip(ORDINALS, program["events"], strict=False):
        places = [containers[c] for c in places]
        if p < 0:
            event = f"the {thing} is in {places[0]}"
        elif verb == "move":
            event = f"{people[p]} moves it to {places[0]}"
        elif verb == "swap":
            event = f"{people[p]} swaps {places[0]} and {places[1]}"
        else:
            event = f"{people[p]} {verb}s"
        said.append(f"{ordinal} {event}")
    return said


def think(program: dict, said: list[str], people: list[str]) -> str:
    """One line per event: what happened, who of those asked about saw it, and the answer so far."""
    lines = []
    for event, (_, _, places), (present, value) in zip(said, program["events"], trace(program), strict=False):
        if places and program["kind"] in ("first", "second"):
            for p, here in zip(program["asked"], present, strict=True):
                event += f", {people[p]} {'here' if here else 'away'}"
        lines.append(f"{event}: {program['containers'][value]}")
    return "\n".join(lines)
