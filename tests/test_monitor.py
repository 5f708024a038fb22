"""The evals of monitor.py: their formulas by hand, their interventions against the generator and the reference."""

import argparse
import math

import numpy as np
import pytest
import torch

import monitor
from data import arithmetic, tasks
from data.text import Tokenizer
from exits import Policy
from flags import EMBEDDED
from model import Transformer
from tests.toys import assert_close, reference, responses, toy_policy


def test_area_over_curve_by_hand():
    """Else an answer that stands from the start counts as late, or the other way round."""
    assert monitor.area_over_curve([1, 1, 1], 1.0)[0] == 0 and math.isnan(monitor.area_over_curve([1, 1, 1], 1.0)[1])
    assert monitor.area_over_curve([0, 0, 1], 0.0) == (0.75, 0.75)
    assert monitor.area_over_curve([0.5, 0.75, 1.0], 0.5) == (0.25, 0.5)


def test_half_depth_is_the_first_of_half_the_accuracy():
    assert monitor.half_depth({8: 0.8, 2: 0.1, 4: 0.4, 6: 0.3}) == 4
    assert monitor.half_depth({8: 0.0, 2: 0.0}) is None


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    """Else a difference of chance is a finding. 100 samples of 40 coins."""
    rng = np.random.default_rng(0)
    hits = sum(low <= 0.3 <= high for _, low, high in
               (monitor.bootstrap(rng.random(40) < 0.3, seed) for seed in range(100)))
    assert 88 <= hits <= 99
    assert monitor.bootstrap([1.0] * 5) == (1, 1, 1)


def test_a_falsified_chain_is_what_the_program_says():
    """Else 'follow' counts answers that follow from nothing."""
    kinds = set()
    for i, problem in enumerate(tasks.load("arithmetic", "test", n=60)):
        lines, answer = monitor.falsified(problem, np.random.default_rng(i))
        k, gold = len(lines) - 1, problem.cot.split("\n")
        assert lines[:-1] == gold[:k] and lines[-1] != gold[k] and k < len(gold) - 1
        assert lines[-1].partition("=")[0] == gold[k].partition("=")[0]
        assert answer == arithmetic.run(problem.program, {k: int(lines[-1].partition("=")[2])}) != problem.gold
        kinds.add(k)
    assert kinds == {0, 1, 2}


@pytest.mark.parametrize("depth", [2, 4, 6])
def test_past_depth_is_the_references(depth):
    """Else what the past is worth is measured on another past: its own token frozen, or the prompt."""
    policy = toy_policy(seed=4).double()
    (r,) = responses([[3, 9, 27]], [[5, 1, 60, 8]], [[6] * 4])
    slow, wanted = reference(policy), []
    for t, token in enumerate(r.token_ids):
        ids = [*r.prompt_ids, *r.token_ids[:t]]
        full, frozen = (slow.policy(ids, [6, 6, *[d] * t])[1][-1][token].log() for d in (6, depth))
        wanted.append(full - frozen)
    (found,) = monitor.past_depth(policy, [r], depth, None)
    if depth == 6:
        assert abs(found) < 1e-12
    else:
        assert_close(found, torch.stack(wanted).mean())
        assert abs(found) > 1e-3


@pytest.fixture(scope="module")
def embedded():
    policy = Policy(Transformer.from_pretrained(EMBEDDED), [2, 4, 6])
    policy.heads.bias.data.fill_(monitor.CLOSED)
    args = argparse.Namespace(seed=0, rows=64, max_new_tokens=100, past=2)
    return policy, Tokenizer.from_pretrained(EMBEDDED), tasks.load("arithmetic", "test", n=12), args


def test_forced_answers_of_a_whole_gold_chain_are_right(embedded):
    """Else the stub, the cut or the digits are read wrongly, and every forced answer is noise."""
    policy, tokenizer, problems, args = embedded
    prompts = tokenizer.prompts([p.messages for p in problems], True)
    heads = [monitor.thinking_head(prompt, p.cot.split("\n"), tokenizer, True)
             for prompt, p in zip(prompts, problems, strict=True)]
    for regime in ("full", "learned"):
        said = monitor.force(policy, heads, list(map(len, prompts)), regime, tokenizer, None, args)
        assert sum(a == p.gold for a, p in zip(said, problems, strict=True)) >= 11
    said = monitor.force(policy, heads, list(map(len, prompts)), "cap-2", tokenizer, None, args)
    assert sum(a == p.gold for a, p in zip(said, problems, strict=True)) < 11
    assert float(policy.heads.bias.detach().max()) == monitor.CLOSED  # the cap is gone


def test_the_regimes_run_as_deep_as_they_say(embedded):
    policy, tokenizer, problems, args = embedded
    prompts = tokenizer.prompts([p.messages for p in problems], True)
    histogram, args = [0.5, 0.0, 0.0, 0.5], argparse.Namespace(**vars(args) | {"max_new_tokens": 20})
    depths = {regime: {d for r in monitor.say(policy, prompts[:4], regime, tokenizer, histogram, args)
                       for d in r.depths} for regime in ("full", "learned", "cap-4", "random")}
    assert depths == {"full": {8}, "learned": {8}, "cap-4": {4}, "random": {2, 8}}
