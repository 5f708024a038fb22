"""A task for stage 1: belief stories, one in four to be thought about in a chain, the others to be answered at once.

Stage 1's loss is a mean over tokens, of which an answer at once has four and a chain 55; with study/both.py, which
stage 2 takes, answers at once are a fourteenth of what is learned, here a sixth.
"""

from collections.abc import Iterator

from data import tasks
from study.both import at_once


def problems(split: str, n: int, seed: int) -> Iterator[tasks.Problem]:
    for i, problem in enumerate(tasks.load("stories", split, n=n, seed=seed)):
        yield problem if i % 4 == 0 else at_once(problem)
