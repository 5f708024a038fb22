"""What the commands write against what the functions give that they are made of, under the same flags: a flag, a seed
or a split that is lost on the way between the two changes no shape, and no message."""

import json
from types import SimpleNamespace

import pytest
import torch

import distill
import optim
import rloo
from checkpoints import load_policy
from data import tasks
from data.text import Tokenizer
from exits import Policy, Response
from model import Transformer
from sample import generate
from teacher import RESPONSES, read_responses
from tests.commands import RL, SMALL, config, lines, run


@pytest.fixture(scope="module")
def made(trained):
    """The toy, and two runs on it under flags that are no defaults."""
    run("distill.py", "--model", "toy", *SMALL, "--seed", 3, "--kl-factor", 3, "--forward-kl", "--student-lens",
        "--exit-every", 1, "--responses", 12, "--responses-per-step", 5, "--lr", 0.05, "--out", "wired-1", cwd=trained)
    run("rloo.py", *RL, "--seed", 5, "--save-every", 1, "--init", "wired-1", "--out", "wired-2", cwd=trained)
    return SimpleNamespace(home=trained, tokenizer=Tokenizer.from_pretrained(trained / "toy"))


def fresh_model(made) -> Transformer:
    return Transformer.from_pretrained(made.home / "toy")


def sampled(made, policy, split: str, n: int, order: int, chosen=None, **options) -> list[Response]:
    problems = tasks.load("arithmetic", split, n=n, seed=order)
    prompts = tasks.prompts([problems[i] for i in chosen or range(n)], made.tokenizer, True)
    return generate(policy, prompts, max_new_tokens=12, eos_ids=made.tokenizer.eos_ids, **options)


def assert_drawn(rows: list[dict], responses: list[Response], exits: bool = True) -> None:
    assert [row["token_ids"] for row in rows] == [r.token_ids for r in responses]
    assert [row["depths"] for row in rows] == [r.depths for r in responses]
    for row, r in zip(rows, responses, strict=True):
        assert row["logp_token"] == pytest.approx(r.logp_token, abs=1e-5)
        assert not exits or row["logp_exit"] == pytest.approx(r.logp_exit, abs=1e-5)


def test_stage_1_learns_from_the_base_at_full_depth_and_is_checked_at_its_own_kappa(made):
    """Else the teacher is an early exit, or sharpened; or the held-out check is of another target."""
    rows, base = lines(made.home / "wired-1" / "teacher.jsonl")[1:], Policy(fresh_model(made))
    kept = {}
    for split, n in (("train", 12), ("test", 3)):
        kept[split] = sampled(made, base, split, n, 3, depths=4, seed=(3, RESPONSES, split == "test"))
        assert [row["token_ids"] for row in rows if row["split"] == split] == [r.token_ids for r in kept[split]]
    for step, metrics in enumerate(lines(made.home / "wired-1" / "metrics.jsonl")):
        assert metrics["tokens"] == sum(len(kept["train"][i]) for i in optim.pick(12, 5, step, 3))
        if step == 0:  # by fresh adapters, which change nothing
            chosen = [kept["train"][i] for i in optim.pick(12, 5, 0, 3)]
            fresh = Policy(fresh_model(made), (1, 2, 3))
            first = distill.train_step(fresh, chosen, 0, 3.0, 3, 8, True, distill.student_target)
            assert metrics["token_kl"] == pytest.approx(first["token_kl"], abs=1e-5)
    policy, done = load_policy(fresh_model(made), made.home / "wired-1"), made.home / "wired-1" / "complete.json"
    args = SimpleNamespace(**config(made.home / "wired-1"))
    test = read_responses(made.home / "wired-1" / "teacher.jsonl", policy.model, args)["test"]
    wanted = distill.held_out(policy, test, 3.0, 3, 8, True, distill.student_target)
    found = json.loads(done.read_text())
    for name in ("token_kl", "exit_cross_entropy"):
        assert found[name] == pytest.approx(wanted[name], abs=1e-5)
    other = distill.held_out(policy, test, 1.0, 3, 8)
    assert abs(other["exit_cross_entropy"] - wanted["exit_cross_entropy"]) > 1e-3


def test_stage_2_draws_new_samples_of_its_training_problems_and_sums_their_gradient(made):
    """Else every step draws the same, or the test problems, or the gradient is clipped at another size."""
    for step, start in ((0, "wired-1"), (1, "wired-2/step-000001")):
        policy = load_policy(fresh_model(made), made.home / start)
        rows = [row for row in lines(made.home / "wired-2" / "completions.jsonl") if row["step"] == step]
        responses = sampled(made, policy, "train", 20, 5, optim.pick(20, 2, step, 5), samples=2, seed=(5, step))
        assert_drawn(rows, responses)
        parts, mean_kl, _ = rloo.score_responses(policy, responses, 8)
        assert [row["mean_kl"] for row in rows] == pytest.approx(mean_kl.tolist(), abs=1e-5)
        advantages = torch.tensor([row["advantage"] for row in rows], dtype=torch.double)
        rloo.accumulate_gradient(policy, parts, advantages, beta=0.02, c=12, count=4)
        norm = torch.cat([p.grad.flatten() for p in policy.trained().values()]).norm()
        logged = lines(made.home / "wired-2" / "metrics.jsonl")[step]
        assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert "accuracy" in logged and "accuracy_low" not in logged  # no interval takes a prompt's samples for apart
    args = config(made.home / "wired-2")
    assert args["lr"] == 0.1 / policy.model.config.hidden_size and args["max_new_tokens"] == 12


def test_evaluate_asks_held_out_problems_as_its_flags_say(made):
    """Else an offset or a temperature does nothing, the base has adapters, or parts of a model share their dice."""
    run("evaluate.py", "wired-1", "--n", 6, "--rows", 1, "--seed", 2, "--temperature", 0.7, "--delta", 5, "--out",
        "wired-eval", cwd=made.home)
    rows, L = lines(made.home / "wired-eval" / "completions.jsonl"), 4
    how = {"seed": (2,), "temperature": 0.7}
    base = sampled(made, Policy(fresh_model(made)), "test", 6, 2, depths=L, **how)
    assert_drawn(rows[:6], base, exits=False)  # it has none
    policy = load_policy(fresh_model(made), made.home / "wired-1")
    assert_drawn(rows[6:], sampled(made, policy, "test", 6, 2, delta=5.0, **how))
    assert len({d for row in rows[6:] for d in row["depths"]}) > 1
    for part, found in zip((rows[:6], rows[6:]), json.loads((made.home / "wired-eval" / "evaluation.json").read_text())[
            "metrics"], strict=True):
        assert found["total_compute"] == pytest.approx(sum(sum(row["depths"]) for row in part) / L / 6)
