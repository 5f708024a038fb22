"""What monitor.py prints beside its evals: how deep a response ran where, what it cost, and how deep it went unread."""

import re
import unicodedata

import numpy as np

from data.text import thoughts
from study.regimes import Subject


def serial_depth(pieces: list[str], depths: list[int], step: re.Pattern) -> int:
    """Opaque serial depth of a response: the most layers between one readable thing and the next, line by line. A line
    that a rule can read, as those like `step`, counts its deepest token, since each of its tokens is readable; of one
    that no rule can read the depths add up."""
    longest, text, line = 0, "", []
    for i, (piece, depth) in enumerate(zip(pieces, depths, strict=True)):
        text, line = text + piece, [*line, depth]
        if "\n" in piece or i == len(pieces) - 1:
            readable = step.fullmatch(text.strip()) or re.match(r"</?think>|\\boxed|ANSWER:", text)
            longest, text, line = max(longest, max(line) if readable else sum(line)), "", []
    return longest


def foreign_letters(text: str, prompt: str) -> float:
    """Script drift: the share of letters whose script the prompt has none of."""
    def scripts(some: str) -> list[str]:
        return [unicodedata.name(c, "?").split()[0] for c in some if c.isalpha()]

    known, found = set(scripts(prompt)), scripts(text)
    return sum(script not in known for script in found) / max(1, len(found))


def description(s: Subject, said: dict[str, list]) -> dict:
    """D. Of each response: depth a token while thinking and in the answer, layer-tokens (the sum of depths: depth down
    and length up may save nothing), tokens, opaque serial depth, script drift."""
    values = {}
    for regime in [regime for regime in said if not regime.startswith("cap-")]:
        responses, texts = said[regime], [s.tokenizer.decode(r.token_ids) for r in said[regime]]
        ends = [thoughts(s.tokenizer.pieces(r.token_ids)) or len(r) for r in responses]
        spans = [(r.depths[:end], r.depths[end:]) for r, end in zip(responses, ends, strict=True)]
        values |= {f"D depth, thinking, {regime}": [np.mean(before or np.nan) for before, _ in spans],
                   f"D depth, answer, {regime}": [np.mean(after or np.nan) for _, after in spans],
                   f"D serial depth {regime}": [serial_depth(s.tokenizer.pieces(r.token_ids), r.depths, s.form.step)
                                                for r in responses],
                   f"D layer-tokens {regime}": [sum(r.depths) for r in responses],
                   f"D tokens {regime}": list(map(len, responses)),
                   f"D foreign letters {regime}": [foreign_letters(re.sub("<[^<>]*>", "", text), p.question)
                                                   for text, p in zip(texts, s.problems, strict=True)]}
    return values
