"""A task for stage 1: belief stories, one in four to be thought about in a chain, the others to be answered at once.

Stage 1's loss is a mean over tokens, of which an answer at once has four and a chain 55; with study/both.py, which
stage 2 takes, answers at once are a fourteenth of what is learned, here a sixth.
"""

from collections.abc import Iterator
from dataclasses import replace

from data import tasks


def problems(split: str, n: int, seed: int) -> Iterator[tasks.Problem]:
    for i, problem in enumerate(tasks.load("stories", split, n=n, seed=seed)):
        at_once = f'Answer at once, by a line "ANSWER: " followed by {" or ".join(problem.choices)}.'
        yield problem if i % 4 == 0 else replace(problem, thinking=False, instruction=at_once)
