"""Stage 1: targets, loss, step and held-out check against the formulas as they stand, on the reference's numbers."""

import math

import pytest
import torch

import distill
import runs
from exits import base_pass, collate
from optim import adamw
from tests.chance import splitmix
from tests.reference import stick_breaking
from tests.toys import EXITS, L, assert_close, reference, responses, set_heads, toy_policy

ANSWERS = responses([[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15, 16], [17]], [[L] * n for n in (2, 4, 1)])


def slow_safe(kl_e, kappa):
    """(4) as it stands, without log space."""
    return [2 * (1 - 1 / (1 + math.exp(-kappa * value))) for value in kl_e]


def slow_target(kl_e, kappa):
    """(3) as it stands."""
    return stick_breaking(torch.tensor(slow_safe(kl_e, kappa), dtype=torch.double)).tolist()


def slow_kls(policy, ids, before=None):
    """KL from the base model's final answer after a text to its answer at each exit, or to the student's, where the
    text's tokens ran `before` layers."""
    _, (*lenses, final) = reference(policy, base=True).policy(ids, [policy.n_layers] * (len(ids) - 1))
    if before is not None:
        _, (*lenses, _) = reference(policy).policy(ids, before)
    return [sum(p * math.log(p / q) for p, q in zip(final.tolist(), lens.tolist(), strict=True)) for lens in lenses]


def pick(odds, die):
    """The outcome in whose interval a die of [0, 1) falls."""
    return next(i for i in range(len(odds)) if die < sum(odds[: i + 1]))


def slow_depth(policy, target, ids, before, kappa, coins):
    """q of the next token after a text whose tokens ran `before` layers, s of (4), and the depth that coins draw."""
    if target is distill.base_target:
        kls = slow_kls(policy, ids)
        q = slow_target(kls, kappa)
        return q, slow_safe(kls, kappa), (*EXITS, L)[pick(q, coins[0])]
    safe = slow_safe(slow_kls(policy, ids, before), kappa)
    depth = next((e for e, s, coin in zip(EXITS, safe, coins, strict=True) if coin < s), L)
    return [float(e == depth) for e in (*EXITS, L)], safe, depth


def predicting(r):
    """(position, text up to it) of each token that predicts one of the response."""
    return [(len(r.prompt_ids) - 1 + t, [*r.prompt_ids, *r.token_ids[:t]]) for t in range(len(r))]


# ------------------------------------------------------------------------------------------------ targets and loss


@pytest.mark.parametrize("kappa", [0.25, 1.0, 4.0])
def test_target_is_equations_3_and_4(kappa):
    """A wrong target calibrates the heads to something else, and nothing downstream can tell."""
    kls = torch.rand(7, 3, dtype=torch.double, generator=torch.Generator().manual_seed(1)) * 3
    assert_close(distill.log_target(kls, kappa).exp(), [slow_target(row, kappa) for row in kls.tolist()])


def test_target_sums_to_one_and_survives_kl_zero_and_huge():
    """log (1 - s) is -inf at KL = 0 and log s is very negative at a large KL: neither may become NaN."""
    kls = torch.tensor([[0.0, 0.0], [0.5, 0.0], [1e4, 1e4], [1e4, 0.0], [1e-30, 2.0]])
    q = distill.log_target(kls, 1.0).exp()
    assert_close(q.sum(-1), torch.ones(5), 1e-6)
    assert q[0].tolist() == [1, 0, 0] and q[2].tolist() == [0, 0, 1] and q[3].tolist() == [0, 1, 0]


def test_lens_kl_against_loops():
    """The lens has the final norm, runs on the base model (adapters off), and the KL goes from final to lens."""
    policy = toy_policy(1).double()
    got = distill.lens_kl(policy.model, *base_pass(policy, collate(ANSWERS, L)))
    assert_close(got, [slow_kls(policy, ids) for r in ANSWERS for _, ids in predicting(r)])


def test_a_lens_that_agrees_but_for_rounding_is_safe_and_no_nan():
    """In float32 a KL near 0 may come out below it, whose log (1 - s) is NaN: one such position ends a run."""
    model, h = toy_policy(1).model, torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    kl_e = distill.lens_kl(model, h, [h * (1 + 1e-3)])
    assert 0 <= kl_e.min() and kl_e.max() < 1e-5 and distill.log_target(kl_e, 1.0).exp().isfinite().all()


def test_loss_is_equation_5():
    """The student's KL and the exit's cross-entropy are both means over positions with weight one."""
    token_kl, logp_exit = torch.tensor([0.5, 1.5]), torch.tensor([-0.2, -0.4])
    assert distill.distill_loss(token_kl, -logp_exit, 4).item() == pytest.approx((0.5 + 0.2 + 1.5 + 0.4) / 4)


def test_exit_cross_entropy_has_the_expectation_of_the_exit_term_of_equation_5():
    """Averaging the coins out must take noise from the gradient and leave its mean: a head that learned from exits past
    l*, or from none but l*, would settle elsewhere."""
    exits, kappa = (2, 4, 5), 0.7
    kls, z = torch.rand(2, 4, 3, dtype=torch.double, generator=torch.Generator().manual_seed(2)) * 3 - 1
    kls = kls.abs()
    for row, logits in zip(kls.tolist(), z, strict=True):
        q, left, expected = slow_target(row, kappa), 1.0, 0.0
        for i, odds in enumerate(q):
            p = 1 / (1 + math.exp(-logits[i])) if i < 3 else 1.0
            expected -= odds * math.log(left * p)
            left *= 1 - p
        safe = torch.tensor([slow_safe(row, kappa)] * 4, dtype=torch.double)
        ours = distill.exit_cross_entropy(logits.expand(4, 3), safe, torch.tensor([*exits, 8]), exits)
        assert_close((torch.tensor(q, dtype=torch.double) * ours).sum(), expected)


def test_hazards_count_only_positions_that_reach_the_exit():
    """Past l* a head reads a frozen stream: averaging over all positions would log something else."""
    p = torch.tensor([[0.1, 0.9], [0.3, 0.5], [0.5, 0.7]])
    total, reach = distill.hazard_sums(p, torch.tensor([2, 4, 6]), (2, 4))
    assert total.tolist() == pytest.approx([0.9, 1.2]) and reach.tolist() == [3, 2]
    assert distill.from_hazards(torch.tensor([0.2, 0.5])).tolist() == pytest.approx([0.2, 0.4, 0.4])


def test_exit_rate_and_savings_are_equation_6():
    """The headline figures of stage 1."""
    s = distill.summary(torch.tensor([0.25, 0.25, 0.5]), torch.tensor([2, 4, 8]))
    assert s["exit_rate"] == pytest.approx(0.5)
    assert s["layer_savings"] == pytest.approx(1 - (0.25 * 2 + 0.25 * 4 + 0.5 * 8) / 8)


# ------------------------------------------------------------------------------------------------- steps and checks


@pytest.mark.parametrize("micro_batch, forward_kl, target", [
    (1, False, distill.base_target), (2, True, distill.base_target), (3, False, distill.base_target),
    (1, True, distill.student_target), (3, False, distill.student_target)])
def test_a_steps_gradient_and_metrics_are_equation_5s_at_depths_drawn_from_q(micro_batch, forward_kl, target):
    """All of stage 1 but the optimizer. Depths are addressed by response and position, and sums are divided by the
    step's count: micro-batches may not bend the mean."""
    policy, step, seed, kappa = toy_policy(1).double(), 3, 5, 0.5
    slow, names = reference(policy), [name.removeprefix("model.") for name in policy.trained()]
    for name in names:
        slow.w[name].requires_grad_()
    scores, targets, hazards, coins = [], [], ([], []), []
    for i, r in enumerate(ANSWERS):
        before = [L] * (len(r.prompt_ids) - 1)
        for t, ids in predicting(r):
            dice = [splitmix(seed, distill.DEPTHS, step, i, t, e) for e in (0, 1)]
            q, s, depth = slow_depth(policy, target, ids, before, kappa, dice)
            p = slow.policy(ids, before)[0]
            before.append(depth)
            targets.append(q)
            for e in (e for e in (0, 1) if depth >= EXITS[e]):
                hazards[e].append(p[e].item())
                coins.append(-s[e] * p[e].log() - (1 - s[e]) * (1 - p[e]).log())
        scores.append(slow.score(r.prompt_ids, r.token_ids, before[len(r.prompt_ids) - 1 :], forward_kl))
    token_kl = torch.cat(scores, 1)[2]
    exit_loss = sum(coins) / len(token_kl)
    loss = token_kl.mean() + exit_loss
    loss.backward()

    metrics = distill.train_step(policy, ANSWERS, step, kappa, seed, micro_batch, forward_kl, target)
    for p, name in zip(policy.trained().values(), names, strict=True):
        assert_close(p.grad, slow.w[name].grad)
    for key, value in (("loss", loss), ("token_kl", token_kl.mean()), ("exit_cross_entropy", exit_loss)):
        assert metrics[key] == pytest.approx(value.item(), rel=1e-6)
    assert metrics["tokens"] == 7
    assert metrics["target"]["distribution"] == pytest.approx(torch.tensor(targets).mean(0).tolist(), abs=2e-5)
    first, second = (sum(hazards[e]) / len(hazards[e]) for e in (0, 1))
    assert metrics["learned"]["exit_rate"] == pytest.approx(1 - (1 - first) * (1 - second), rel=1e-6)
    assert metrics["learned"]["layer_savings"] == pytest.approx((4 * first + 2 * (1 - first) * second) / L, rel=1e-6)


@pytest.mark.parametrize("micro_batch, forward_kl, target", [
    (1, False, distill.base_target), (3, True, distill.base_target), (2, False, distill.student_target)])
def test_held_out_equals_the_references_pass_over_the_same_dice(micro_batch, forward_kl, target, monkeypatch):
    """The figures that say whether stage 1 has converged: one wrong position or die, and it is judged by another
    model's, another depth's or another text's numbers."""
    policy, seed, kappa, scores, own, drawn, targets = toy_policy(1).double(), 4, 0.5, [], [], [], []
    at_half, cut, exit_loss = [], [], 0.0
    slow = reference(policy)
    for i, r in enumerate(ANSWERS):
        depths, student, sure = [], *([L] * (len(r.prompt_ids) - 1) for _ in range(2))
        for t, ids in predicting(r):
            *coins, first, second = [splitmix(seed, distill.HELD_OUT, i, t, e) for e in range(4)]
            p_exit = slow.policy(ids, student)[0].tolist()
            student.append(next((e for e, p, coin in zip(EXITS, p_exit, coins, strict=True) if coin < p), L))
            p_exit = slow.policy(ids, sure)[0].tolist()
            sure.append(next((e for e, p in zip(EXITS, p_exit, strict=True) if p > 0.5), L))
            before = [L] * (len(r.prompt_ids) - 1) + depths
            q, safe, depth = slow_depth(policy, target, ids, before, kappa, (first, second))
            targets.append(q)
            depths.append(depth)
            exit_loss -= sum(s * math.log(p) + (1 - s) * math.log(1 - p)
                             for e, p, s in zip(EXITS, slow.policy(ids, before)[0].tolist(), safe, strict=True)
                             if depth >= e)
        drawn += student[len(r.prompt_ids) - 1 :]
        scores.append(slow.score(r.prompt_ids, r.token_ids, depths, forward_kl))
        own.append(slow.score(r.prompt_ids, r.token_ids, student[len(r.prompt_ids) - 1 :], forward_kl)[2])
        cut += sure[len(r.prompt_ids) - 1 :]
        at_half.append(slow.score(r.prompt_ids, r.token_ids, sure[len(r.prompt_ids) - 1 :], forward_kl)[2])
    token_kl = torch.cat(scores, 1)[2]
    got = distill.held_out(policy, ANSWERS, kappa, seed, micro_batch, forward_kl, target)
    assert min(len(set(drawn)), len(set(cut))) > 1 and got["positions"] == len(drawn) == 7
    assert got["token_kl"] == pytest.approx(float(token_kl.mean()), rel=1e-9)
    assert got["exit_cross_entropy"] == pytest.approx(exit_loss / 7, rel=1e-9)
    assert got["token_kl_at_own_exits"] == pytest.approx(float(torch.cat(own).mean()), rel=1e-9)
    for stretch in (distill.STRETCH, 2):  # of a response that is longer, what it loses in so many tokens
        monkeypatch.setattr(distill, "STRETCH", stretch)
        got = distill.held_out(policy, ANSWERS, kappa, seed, micro_batch, forward_kl, target)
        for name, them in (("intact", own), ("intact_at_half", at_half)):
            lost = [kl.sum() * min(1, stretch / len(kl)) for kl in them]
            assert got[name] == pytest.approx(float(sum((-k).exp() for k in lost)) / 3, rel=1e-9)
        assert got["intact_whole"] == pytest.approx(float(sum((-kl.sum()).exp() for kl in own)) / 3, rel=1e-9)
    q = torch.tensor(targets).mean(0).tolist()
    for name, wanted in (("target", q), ("learned", [drawn.count(depth) / 7 for depth in (2, 4, 6)])):
        assert got[name]["distribution"] == pytest.approx(wanted, abs=1e-5)
        assert got[name]["exit_rate"] == pytest.approx(1 - wanted[-1], abs=1e-6)
        assert got[name]["layer_savings"] == pytest.approx((4 * wanted[0] + 2 * wanted[1]) / 6, abs=1e-6)


@pytest.mark.parametrize("target", [distill.base_target, distill.student_target])
def test_held_out_is_the_same_whether_rows_of_one_prompt_share_a_pass(target):
    """The comparison's student must see the prompt that it shares, and so must the one whose lens is asked."""
    same = responses([[5, 6, 7, 8]] * 15, [[1, 2, 3], [4, 5], [6, 7, 8, 9]] * 5, [[L] * n for n in (3, 2, 4)] * 5)
    alone, shared = (distill.held_out(toy_policy(1).double(), same, 0.5, 0, size, target=target) for size in (1, 15))
    assert alone["learned"] == shared["learned"] and 0.1 < alone["learned"]["exit_rate"] < 0.9
    for name in ("token_kl", "exit_cross_entropy", "intact"):
        assert alone[name] == pytest.approx(shared[name], rel=1e-9)


@pytest.mark.parametrize("intact, token_kl, own_kl, told", [
    (0.81, 9.0, 99.0, None), (0.79, 0.16, 0.63, "raise --responses"), (0.79, 0.16, 0.65, "--head-width"),
    (0.79, 0.14, 0.55, "were; raise --steps (--resume RUN --steps N goes on); where that no longer helps, raise "
     "--kl-factor")])
def test_verdict_names_the_flag_that_helps(intact, token_kl, own_kl, told):
    """More steps don't help a model that knows its responses by heart, nor more responses one that still learns, and
    neither one whose heads can't tell which tokens are safe."""
    measured = {"intact": intact, "intact_at_half": 0.79, "token_kl": token_kl, "token_kl_at_own_exits": own_kl,
                "learned": {"exit_rate": 0.4}, "target": {"exit_rate": 0.49, "layer_savings": 0.3},
                "at_half": {"layer_savings": 0.2}}
    problem = distill.verdict(measured, training_kl=0.1)
    assert problem is None if told is None else f"{own_kl:.4f}" in problem and "79%" in problem and told in problem
    drawn = distill.verdict({**measured, "intact": 0.5, "intact_at_half": 0.9}, training_kl=0.1)
    assert "only 50% of the responses stay" in drawn and "--threshold 0.5, without one, leaves 90%" in drawn
    unsure = distill.verdict({**measured, "intact": 0.5, "intact_at_half": 1.0, "at_half": {"layer_savings": 0.1}}, 0.1)
    assert unsure.startswith("not converged")  # no head says more than 1/2, so nothing leaves and nothing changes
    idle = distill.verdict({**measured, "intact": 1.0, "learned": {"exit_rate": 0.0}}, training_kl=0.1)
    assert "0% of the tokens exit, and 49% are to" in idle  # who never exits changes nothing, and has learned nothing
    assert "lower --lr" in distill.verdict({**measured, "learned": {"exit_rate": 1.0}}, training_kl=13.0)


def test_adapters_and_heads_step_at_their_own_rates(tmp_path):
    """Heads at the adapters' rate take several times the steps to learn which tokens are safe."""
    policy = toy_policy()
    optimizer, before = adamw(policy), {name: p.detach().clone() for name, p in policy.trained().items()}
    for rates, wanted in (((0.25, 2.0), 2.0), ((0.25,), 0.25)):
        distill.train_step(policy, ANSWERS, 0, 2.0, 0, 3)
        runs.Run(tmp_path, None).apply_gradients(optimizer, *rates)
        for name, p in policy.trained().items():  # AdamW's first step is the rate itself, along the gradient's sign
            step = (p.detach() - before[name]).abs().max()
            assert float(step) == pytest.approx(wanted if name.startswith("heads.") else 0.25, rel=1e-3)
            p.data.copy_(before[name])
        optimizer = adamw(policy)


def test_the_optimizer_is_adam_of_the_recorded_runs():
    """With AdamW's usual eps a stage-2 gradient, divided by thousands of tokens, would hardly move a weight; with its
    usual beta no average would end within a short run."""
    policy = toy_policy()
    optimizer, heads = adamw(policy), policy.heads.bias
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    wanted, m, v = heads.detach().double().clone(), 0.0, 0.0
    for t, g in enumerate((1e-9, -2e-9, 5e-10), start=1):
        heads.grad = torch.full_like(heads, g)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        wanted -= m / (1 - 0.9**t) / ((v / (1 - 0.95**t)) ** 0.5 + 1e-12)
        assert_close(heads, wanted, 1e-4)


def test_training_brings_the_learned_exits_to_the_target():
    """The whole of stage 1 on one toy batch, from closed exits: four seeds ended within 0.1 of every share."""
    policy, gaps = set_heads(toy_policy(1).double(), -4.0), []
    optimizer = torch.optim.AdamW(policy.trained().values(), lr=1e-2, weight_decay=0.0)
    for step in range(51):
        metrics = distill.train_step(policy, ANSWERS * (16 if step == 50 else 4), step, 2.0, 0, 64)
        learned, target = (torch.tensor(metrics[name]["distribution"]) for name in ("learned", "target"))
        gaps.append((learned - target).abs().max())
        optimizer.step()
        optimizer.zero_grad()
    assert gaps[0] > 0.5 and gaps[-1] < 0.15
