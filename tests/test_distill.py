"""Stage 1: targets and loss against nested loops in double precision."""

import argparse
import math

import pytest
import torch

import distill
from exits import collate, teacher_pass
from tests.toys import toy_policy


def slow_target(kls, kappa):
    """(3) and (4) for one position, as the formulas stand, without log space."""
    q, left = [], 1.0
    for value in kls:
        s = 2 * (1 - 1 / (1 + math.exp(-kappa * value)))
        q.append(left * s)
        left *= 1 - s
    return [*q, left]


@pytest.mark.parametrize("kappa", [0.25, 1.0, 4.0])
def test_target_is_equations_3_and_4(kappa):
    """A wrong target calibrates the heads to something else, and nothing downstream can tell."""
    kls = torch.rand(7, 3, dtype=torch.double, generator=torch.Generator().manual_seed(1)) * 3
    q = distill.log_target(kls, kappa).exp()
    for n in range(7):
        assert q[n].tolist() == pytest.approx(slow_target(kls[n].tolist(), kappa), abs=1e-12)


def test_target_sums_to_one_and_survives_kl_zero_and_huge():
    """log (1 - s) is -inf at KL = 0 and log s is very negative at a large KL: neither may become NaN."""
    kls = torch.tensor([[0.0, 0.0], [0.5, 0.0], [1e4, 1e4], [1e4, 0.0], [1e-30, 2.0]])
    q = distill.log_target(kls, 1.0).exp()
    assert torch.allclose(q.sum(-1), torch.ones(5))
    assert q[0].tolist() == [1, 0, 0] and q[2].tolist() == [0, 0, 1] and q[3].tolist() == [0, 1, 0]


def test_larger_kl_factor_exits_later():
    """kappa is the dial of stage 1; turned the wrong way it would still train."""
    kls = torch.rand(50, 3, generator=torch.Generator().manual_seed(2))
    depth = torch.tensor([2.0, 4.0, 6.0, 8.0])
    means = [(distill.log_target(kls, kappa).exp() @ depth).mean().item() for kappa in (0.25, 1.0, 4.0, 16.0)]
    assert means == sorted(means) and means[0] < means[-1] - 0.5


def make_batch(policy):
    prompts, responses = [[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15, 16], [17]]
    return prompts, responses, collate(prompts, responses, n_layers=policy.n_layers)


def test_lens_kl_against_loops():
    """The lens has the final norm, runs on the base model (adapters off), and the KL goes from final to lens."""
    policy = toy_policy(1)
    prompts, responses, batch = make_batch(policy)
    got = distill.lens_kl(policy.model, *teacher_pass(policy, batch))
    for adapter in policy.adapters:
        adapter.on = False
    n = 0
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([prompt + response])
        streams = {}
        streams[6] = policy.model.stream(ids, (2, 4), lambda depth, h, kept=streams: kept.update({depth: h}))
        for t in range(len(prompt) - 1, len(prompt) + len(response) - 1):
            p = torch.softmax(policy.model.lm_head(policy.model.model.norm(streams[6][0, t])).double(), -1)
            for e, depth in enumerate((2, 4)):
                r = torch.softmax(policy.model.lm_head(policy.model.model.norm(streams[depth][0, t])).double(), -1)
                slow = sum(a.item() * math.log(a.item() / b.item()) for a, b in zip(p, r, strict=True))
                assert got[n, e].item() == pytest.approx(slow, rel=1e-3, abs=1e-5)
            n += 1
    assert n == len(got)


def test_loss_is_equation_5():
    """The student's KL and the exit's cross-entropy are both means over positions with weight one."""
    token_kl, logp_exit = torch.tensor([0.5, 1.5]), torch.tensor([-0.2, -0.4])
    assert distill.distill_loss(token_kl, logp_exit, 4).item() == pytest.approx((0.5 + 0.2 + 1.5 + 0.4) / 4)


def test_hazards_count_only_positions_that_reach_the_exit():
    """Past l* a head reads a frozen stream: averaging over all positions would log something else."""
    p = torch.tensor([[0.1, 0.9], [0.3, 0.5], [0.5, 0.7]])
    total, reach = distill.hazards(p, torch.tensor([2, 4, 6]), (2, 4))
    assert total.tolist() == pytest.approx([0.9, 1.2]) and reach.tolist() == [3, 2]
    assert distill.from_hazards(torch.tensor([0.2, 0.5])).tolist() == pytest.approx([0.2, 0.4, 0.4])


def test_exit_rate_and_savings_are_equation_6():
    """The headline figures of stage 1."""
    s = distill.summary(torch.tensor([0.25, 0.25, 0.5]), torch.tensor([2, 4, 8]))
    assert s["exit_rate"] == pytest.approx(0.5)
    assert s["layer_savings"] == pytest.approx(1 - (0.25 * 2 + 0.25 * 4 + 0.5 * 8) / 8)


def rows():
    prompts, responses, _ = make_batch(toy_policy(1))
    return [{"prompt_ids": p, "token_ids": r} for p, r in zip(prompts, responses, strict=True)]


def test_micro_batches_leave_gradient_and_metrics_unchanged():
    """The depth draws are addressed by row and position, and sums are divided by the step's count."""
    seen = []
    for micro in (1, 2, 3):
        policy = toy_policy(1)
        args = argparse.Namespace(micro_batch=micro, kl_factor=0.5, seed=0, draws=2)
        metrics = distill.train_step(policy, rows(), 0, args)
        seen.append((metrics, torch.cat([p.grad.flatten() for p in policy.trained().values()])))
    for metrics, gradient in seen[1:]:
        assert metrics["loss"] == pytest.approx(seen[0][0]["loss"], rel=1e-4)
        assert metrics["target"]["distribution"] == pytest.approx(seen[0][0]["target"]["distribution"], abs=2e-5)
        assert torch.allclose(gradient, seen[0][1], rtol=1e-3, atol=1e-5 * gradient.abs().max().item())


def test_several_draws_are_the_mean_over_their_depth_samples(monkeypatch):
    """They share the prompt and the teacher's pass; what they add up to must still be a mean of equation (5)."""
    def run(draws):
        policy = toy_policy(1)
        args = argparse.Namespace(micro_batch=2, kl_factor=0.5, seed=0, draws=draws)
        metrics = distill.train_step(policy, rows(), 0, args)
        return metrics["loss"], torch.cat([p.grad.flatten() for p in policy.trained().values()])

    loss, gradient = run(3)
    plain, single = distill.uniforms, []
    for n in range(3):
        monkeypatch.setattr(distill, "uniforms", lambda *args, n=n: plain(*args[:3], 3, *args[4:])[:, n : n + 1])
        single.append(run(1))
    assert loss == pytest.approx(sum(one for one, _ in single) / 3, rel=1e-5)
    torch.testing.assert_close(gradient, sum(one for _, one in single) / 3, rtol=1e-4, atol=1e-7)
    assert single[0][0] != single[1][0]


def test_three_equal_draws_report_what_one_does(monkeypatch):
    """Loss, target and hazards are means over positions and draws: counting a draw twice must not show."""
    plain = distill.uniforms
    monkeypatch.setattr(distill, "uniforms", lambda *args: plain(*args[:3], 1, *args[4:]).repeat(1, args[3]))
    reports = [distill.train_step(toy_policy(1), rows(), 0, argparse.Namespace(
        micro_batch=2, kl_factor=0.5, seed=0, draws=draws)) for draws in (1, 3)]
    for name in ("loss", "hazard_learned", "hazard_target"):
        assert reports[1][name] == pytest.approx(reports[0][name], rel=1e-4)
    assert reports[1]["target"]["distribution"] == pytest.approx(reports[0]["target"]["distribution"], abs=2e-5)


def test_learned_exits_are_the_same_whether_rows_of_one_prompt_share_a_pass():
    """The comparison's student must see the prompt that it shares."""
    policy = toy_policy(1)
    same = [{"prompt_ids": [5, 6, 7, 8], "token_ids": ids} for ids in ([1, 2, 3], [4, 5], [6, 7, 8, 9])] * 5
    alone, shared = (distill.learned_exits(policy, same, 0.5, 0, size)["learned"] for size in (1, 15))
    assert alone == shared and 0.1 < alone["exit_rate"] < 0.9


def test_training_brings_the_learned_exits_to_the_target():
    """The whole of stage 1 on one toy batch: exit cross-entropy falls to the target's entropy, roughly."""
    policy = toy_policy(1)
    policy.heads.weight.data.zero_()
    policy.heads.bias.data.fill_(-4.0)
    args = argparse.Namespace(micro_batch=3, kl_factor=0.5, seed=0, draws=1)
    optimizer = torch.optim.AdamW(policy.trained().values(), lr=3e-2, weight_decay=0.0)
    before = distill.learned_exits(policy, rows(), 0.5, 0, 3)
    for step in range(60):
        distill.train_step(policy, rows(), step, args)
        optimizer.step()
        optimizer.zero_grad()
    drawn = [distill.learned_exits(policy, rows(), 0.5, seed, 3) for seed in range(40)]
    learned = sum(d["learned"]["exit_rate"] for d in drawn) / len(drawn)
    target = drawn[0]["target"]["exit_rate"]
    assert abs(before["learned"]["exit_rate"] - target) > 0.2
    assert abs(learned - target) < 0.1
