"""The generated problems are right, reproducible, split cleanly, and can't be solved by counting mentions.

The referees below read the question's text and never call the generators' own replay.
"""

import math
import re
from collections import Counter

import pytest

from data import arithmetic, stories

SEED, N = 1, 900
TEST_STARTS = [2, 4, 9, 18, 28, 36, 37, 58, 81, 87, 88]


@pytest.fixture(scope="module")
def sums():
    return {split: arithmetic.distinct(arithmetic.make, split, N, SEED) for split in ("train", "test")}


@pytest.fixture(scope="module")
def tales():
    return {split: arithmetic.distinct(stories.make, split, n, SEED) for split, n in (("train", N), ("test", 50))}


def solve_sum(question: str) -> int:
    """Reads a word problem with nothing but its verbs."""
    value = None
    for sentence in question.split("\n"):
        numbers = [int(n) for n in re.findall(r"\d+", sentence)]
        me = question.split()[0]
        if " has " in sentence and value is None:
            value = numbers[0]
        elif "doubles" in sentence:
            value *= 2
        elif re.search(rf"buys|finds|gives {me} ", sentence):
            value += numbers[0]
        elif re.search(r"loses|sells|gives", sentence):
            value -= numbers[0]
    return value


def solve_tale(question: str) -> str:
    """Simulates everybody's first- and second-order beliefs as dictionaries, sentence by sentence."""
    uncounted = re.sub(r"(First|Second|Third|\w+th) ", "", question)
    *sentences, query = [sentence.split() for sentence in re.findall(r"[^.?]+", uncounted)]
    present, left_at = {name.strip(",") for name in sentences[0][:4]} - {"and"}, {}
    beliefs = {}  # () -> the real place, (p,) -> where p thinks, (p, q) -> where p thinks that q thinks
    for words in sentences[1:]:
        if words[1] == "leaves":
            present.remove(words[0])
            left_at.setdefault(words[0], beliefs[()])
        elif words[1] == "returns":
            assert words[0] not in present
            present.add(words[0])
        else:
            assert words[0] in present | {"the"}, "nobody moves things from outside"
            witnesses = [(), *((p,) for p in present), *((p, q) for p in present for q in present if p != q)]
            for who in witnesses:
                if words[1] == "swaps":
                    pair = {words[-3]: words[-1], words[-1]: words[-3]}
                    beliefs[who] = pair.get(beliefs[who], beliefs[who])
                else:
                    beliefs[who] = words[-1]
    people = [word for word in query if word[0].isupper() and word != "Where"]
    return left_at[people[0]] if query[1] == "was" else beliefs[tuple(people)]


def mentions(question: str) -> list[str]:
    return re.findall("|".join(stories.CONTAINERS), question)


def deviation(hits: int, n: int, p: float) -> float:
    """Standard errors between a count and its expectation."""
    return abs(hits - n * p) / math.sqrt(n * p * (1 - p))


def test_split_never_moves():
    """The embedded model was trained on these splits: a new hash would leak its training into the tests."""
    keys = [[n, [["+", 5], ["-", 3]]] for n in range(1, 100)]
    assert [key[0] for key in keys if arithmetic.split_of(key) == "test"] == TEST_STARTS


def test_train_and_test_share_no_calculation_and_no_plot(sums, tales):
    def plot(problem):
        """The story with people and containers numbered in order of appearance."""
        text, number = problem["question"].split("\n", 1)[1], {}
        text = re.sub("|".join(stories.THINGS), "thing", text)
        names = "|".join(stories.NAMES + stories.CONTAINERS)
        return re.sub(rf"\b({names})\b", lambda m: str(number.setdefault(m[0], len(number))), text)

    def calculation(problem):
        """The sums alone: names and objects must not make two problems different."""
        return tuple(line.split(": ")[1] for line in problem["cot"].split("\n"))

    for made, key in ((sums, calculation), (tales, plot)):
        assert not {key(p) for p in made["train"]} & {key(p) for p in made["test"]}


def test_no_question_twice(sums, tales):
    """Two copies of a problem in a test set would make its confidence intervals too narrow."""
    repeating = arithmetic.distinct(lambda rng, split: {"question": rng.randint(1, 30)}, "test", 25, SEED)
    for problems in (repeating, sums["test"], tales["test"]):
        assert len({p["question"] for p in problems}) == len(problems)


def test_answers_are_right_by_an_independent_reading(sums, tales):
    """A wrong gold answer would cap every accuracy in the project."""
    for split in ("train", "test"):
        assert all(str(solve_sum(p["question"])) == p["answer"] for p in sums[split])
        assert all(solve_tale(p["question"]) == p["answer"] for p in tales[split])


def test_arithmetic_thoughts_are_true_sums_that_chain_to_the_answer(sums):
    for p in sums["train"]:
        value = re.search(r"has (\d+)", p["question"])[1]
        lines = [line.split(": ")[1] for line in p["cot"].split("\n")]
        for line, true_value in zip(lines, p["program"]["values"], strict=True):
            left, result = line.split("=")
            assert left.startswith(value) and eval(left) == int(result) == true_value
            assert 1 <= true_value <= 99
            value = result
        assert value == p["answer"] and p["answer_line"] == f"\\boxed{{{value}}}"


def test_story_thoughts_carry_the_program_values_and_end_in_the_answer(tales):
    for p in tales["train"]:
        held = [p["program"]["containers"][v] for v in p["program"]["values"]]
        lines = p["cot"].split("\n")
        for line, value in zip(lines, held, strict=True):
            assert line.endswith(f": {value}")
        assert held[-1] == p["answer"] and p["answer_line"] == f"ANSWER: {p['answer']}"


def test_kinds_are_balanced(sums, tales):
    """7 counts within 4 standard errors: a right generator fails for one seed in 2,000."""
    for made, kinds in ((sums, [f"{k} steps" for k in arithmetic.STEPS]), (tales, stories.KINDS)):
        counts = Counter(p["kind"] for p in made["train"])
        assert set(counts) == set(kinds)
        assert all(deviation(n, N, 1 / len(kinds)) < 4 for n in counts.values()), counts


def test_no_shortcut_beats_chance(tales):
    """First, last and most mentioned container, and the real place where that isn't the question.

    Each must hit one time in three, for each kind of question: 15 counts within 4 standard errors, so a
    right generator fails for one seed in 1,000.
    """
    hits, of_kind = Counter(), Counter()
    for p in tales["train"]:
        named = mentions(p["question"])
        guesses = {"first": named[0], "last": named[-1], "most": max(named, key=named.count)}
        if p["kind"] != "reality":
            guesses["real place"] = solve_tale(p["question"].rpartition("\n")[0] + " Where is it now?")
        of_kind[p["kind"]] += 1
        hits.update((p["kind"], name) for name, guess in guesses.items() if guess == p["answer"])
    assert len(hits) == 15
    assert all(deviation(n, of_kind[kind], 1 / 3) < 4 for (kind, _), n in hits.items()), hits
