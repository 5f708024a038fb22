"""A task: belief stories, each asked twice, to be thought about in a chain and to be answered at once.

A stage 1 and 2 that are trained on chains alone forget how to answer without one, and monitor.py, which asks for such
answers, would take the lost form for lost ability.

    python distill.py --task study/both.py
"""

from collections.abc import Iterator
from dataclasses import replace

from data import tasks


def at_once(problem: tasks.Problem, **more) -> tasks.Problem:
    """The story with the order to answer at once; `more`: what else of it changes."""
    order = f'Answer at once, by a line "ANSWER: " followed by {" or ".join(problem.choices)}.'
    return replace(problem, thinking=False, instruction=order, **more)


def problems(split: str, n: int, seed: int) -> Iterator[tasks.Problem]:
    for problem in tasks.load("stories", split, n=(n + 1) // 2, seed=seed):
        yield problem
        yield at_once(problem, id=f"{problem.id}/direct")
