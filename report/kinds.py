"""Kinds of tokens, and how deep each of them runs: digits of results, copied names, function words, punctuation.

A token has the kind of the word that its first printed character is in.
"""

import re
from collections import defaultdict

from data.arithmetic import ORDINALS
from data.text import thoughts

FUNCTION = ("a an and are as at be by does for from has have he her his how i if in into is it its my no not now of on "
            "or our she so than that the their them then there they this to was we were what when where who will with")
KINDS = re.compile("|".join((
    r"(?P<control><[|｜/a-zA-Z_▁]+>)", r"(?<==)\s*(?P<result>\d+)", r"(?<=\{)(?P<boxed>\d+)(?=\})", r"(?P<number>\d+)",
    r"(?P<operator>[-+*/×÷=])", r"(?P<function>\b(?:" + FUNCTION.replace(" ", "|") + r")\b)",
    r"(?P<ordinal>\b(?:" + "|".join(ORDINALS) + r")\b)", r"(?P<name>\b[A-Z][a-z]+\b)", r"(?P<word>\\?[^\W\d_]+)",
    r"(?P<punctuation>[^\w\s]|_)")))
MEANING = {"result": "digits of a result (after =)", "boxed": "digits of the boxed answer", "number": "other digits",
           "operator": "operators and =", "name": "names (capitalised words)", "ordinal": "First, Second, …",
           "function": "function words", "word": "other words", "rest": "later pieces of a word",
           "punctuation": "punctuation", "blank": "spaces and line breaks", "control": "<think>, </think>, end"}


def kinds_of(pieces: list[str]) -> list[str]:
    """The kind of each token of a text."""
    text = "".join(pieces)
    kind_at, start_at, kinds, at = {}, {}, [], 0
    for found in KINDS.finditer(text):
        start, end = found.span(found.lastgroup)
        for i in range(start, end):
            kind_at[i], start_at[i] = found.lastgroup, start
    for piece in pieces:
        first = at + len(piece) - len(piece.lstrip())
        kind = kind_at.get(first, "blank") if piece.strip() else "blank"
        later = kind in ("word", "name", "function") and start_at[first] < first
        kinds.append("rest" if later else kind)
        at += len(piece)
    return kinds


def by_kind(rows: list[dict], depth_of_outcome: list[int], tokenizer) -> list[dict]:
    """Depth by part (thoughts, answer, all) and kind of token, over responses as evaluate.graded has them. A response
    that ends inside its thoughts is all thoughts."""
    found = defaultdict(list)
    for row in rows:
        pieces = tokenizer.pieces(row["token_ids"])
        closed = thoughts(pieces)
        if not closed and ("<think>" in "".join(pieces) or tokenizer.think_open(row["prompt_ids"])):
            closed = len(pieces)
        for i, (kind, depth) in enumerate(zip(kinds_of(pieces), row["depths"], strict=True)):
            for part in ("all", "thoughts" if i < closed else "answer"):
                found[part, kind].append(depth)
                found[part, "all"].append(depth)
    count, L = len(found["all", "all"]), depth_of_outcome[-1]
    return [{"part": part, "kind": kind, "share": len(depths) / count, "tokens": len(depths),
             "exit_rate": sum(d < L for d in depths) / len(depths), "average_compute": sum(depths) / len(depths) / L}
            for (part, kind), depths in found.items()]
