"""Stage 2: RLOO with a penalty on depth, which pays the policy to think in visible tokens instead of hidden layers.

    R_i = r_task,i - lambda mean_t l_t / L - beta mean_t KL_t                                         (1)
    A_i = R_i - mean_{j != i} R_j                                       leave-one-out, no std division
    loss = 1/c mean over prompts of 1/k sum_i [ -A_i sum_t log pi(l_t, x_t) + beta mean_t KL_t ]

KL_t is exact, over the vocabulary, from the policy at l_t to the base model at full depth. It depends on the state and
not on the sampled token, so as a part of the reward alone it would cancel against the baseline: hence the second term.
Left out of PPO and GRPO on purpose: importance ratios and clipping (one gradient step per batch of rollouts), the
division by the standard deviation, a critic, truncated sampling (the policy that is scored is the one that sampled).

    python rloo.py --lam 0.1                    from the newest complete stage-1 run
    python rloo.py --resume runs/rloo-…         goes on after an interruption
"""

import time

import torch
from tqdm import tqdm

import runs
from data import tasks
from data.hub import UserError
from exits import Policy, generate, load_policy, micro_batches, score, teacher_pass


def reward(task, mean_depth, mean_kl, lam: float, beta: float) -> torch.Tensor:
    """Eq. (1): R = r_task - lambda mean_t l_t / L - beta mean_t KL_t, all (R,); mean_depth is mean_t l_t / L."""
    return task - lam * mean_depth - beta * mean_kl


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """A_i = R_i - mean_{j != i} R_j inside each prompt's group: (P, k) -> (P, k)."""
    k = rewards.shape[1]
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (k - 1)


def rloo_loss(advantage, logp, mean_kl, beta: float, c: int, count: int) -> torch.Tensor:
    """1 / (c count) sum_i [ -A_i sum_t log pi(l_t, x_t) + beta mean_t KL_t ] over rows (R,) of a step of `count` rows.

    mean over prompts of 1/k sum_i is a mean over the step's rows, so micro-batches simply add up.
    """
    return (beta * mean_kl - advantage.detach() * logp).sum() / (c * count)


def per_row(values: torch.Tensor, batch) -> torch.Tensor:
    """Sums of (N,) values at the predicting positions over each row's positions: (B,)."""
    return values.new_zeros(len(batch.ids)).index_add(0, batch.where[0], values)


def roll_out(policy: Policy, problems, tokenizer, step: int, args) -> list[dict]:
    """k samples of each problem with stochastic exits at temperature 1, graded: one record a response."""
    prompts = runs.prompt_ids(problems, tokenizer, args.thinking)
    got = generate(policy, prompts, samples=args.k, max_new_tokens=args.max_new_tokens, eos_ids=tokenizer.eos_ids,
                   seed=(args.seed, step), batch_size=args.rows)
    rows = []
    for i, length in enumerate(got.lengths.tolist()):
        problem, prompt, finished = problems[i // args.k], prompts[i // args.k], bool(got.finished[i])
        tokens = got.tokens[i, :length].tolist()
        grade = runs.grade(problem, prompt, tokens, finished, tokenizer)
        rows.append({"step": step, "id": problem.id, "sample": i % args.k, "prompt_ids": prompt, "token_ids": tokens,
                     "depths": got.depths[i, :length].tolist(), "logp_exit": got.logp_exit[i, :length].tolist(),
                     "logp_token": got.logp_token[i, :length].tolist(), "finished": finished, "value": grade.value,
                     "rule": grade.rule, "gold": problem.gold, "task": float(grade.strict), "flexible": grade.flexible})
    return rows


@torch.no_grad()
def score_rows(policy: Policy, rows: list[dict], args) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Adds each response's depth, KL, reward and advantage to its record. Returns the teacher's streams by
    micro-batch, for the update, and |log-prob at sampling - log-prob here| at every generated token (N,)."""
    teachers, drift = [], []
    for _, part, batch in micro_batches(policy, rows, args.micro_batch):
        teacher_h, _ = teacher_pass(policy, batch)
        logp_exit, logp_token, token_kl, _ = score(policy, batch, teacher_h)
        for row, total in zip(part, per_row(token_kl, batch).tolist(), strict=True):
            row["mean_kl"] = total / len(row["token_ids"])
            row["mean_depth"] = sum(row["depths"]) / len(row["depths"]) / policy.n_layers
        for name, here in (("logp_exit", logp_exit), ("logp_token", logp_token)):
            drift.append((here.cpu() - torch.tensor([x for row in part for x in row[name]])).abs())
        teachers.append(teacher_h)
    column = lambda name: torch.tensor([row[name] for row in rows], dtype=torch.double)  # noqa: E731
    rewards = reward(column("task"), column("mean_depth"), column("mean_kl"), args.lam, args.beta)
    advantages = leave_one_out(rewards.view(-1, args.k)).flatten()
    for row, r, a in zip(rows, rewards.tolist(), advantages.tolist(), strict=True):
        row["reward"], row["advantage"] = r, a
    return teachers, torch.cat(drift)


def accumulate_gradient(policy: Policy, rows: list[dict], teachers: list[torch.Tensor], args) -> None:
    """The gradient of rloo_loss over all rows of a step, micro-batch by micro-batch."""
    parts = micro_batches(policy, rows, args.micro_batch)
    for (_, part, batch), teacher_h in zip(parts, teachers, strict=True):
        logp_exit, logp_token, token_kl, _ = score(policy, batch, teacher_h)
        lengths = per_row(torch.ones_like(token_kl), batch)
        advantage = torch.tensor([row["advantage"] for row in part], device=policy.device, dtype=token_kl.dtype)
        rloo_loss(advantage, per_row(logp_exit + logp_token, batch), per_row(token_kl, batch) / lengths,
                  args.beta, args.max_new_tokens, len(rows)).backward()


def summarise(policy: Policy, rows: list[dict], drift: torch.Tensor, args) -> dict:
    """A step's metrics. Depth is pooled over tokens here, while the reward averages within each response."""
    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    depths = [d for row in rows for d in row["depths"]]
    groups = [rows[i : i + args.k] for i in range(0, len(rows), args.k)]
    return {
        "reward": mean(row["reward"] for row in rows), "reward_task": mean(row["task"] for row in rows),
        "reward_depth": -args.lam * mean(row["mean_depth"] for row in rows),
        "reward_kl": -args.beta * mean(row["mean_kl"] for row in rows),
        "accuracy": mean(row["task"] for row in rows), "accuracy_flexible": mean(row["flexible"] for row in rows),
        "average_compute": mean(depths) / policy.n_layers,
        "total_compute": sum(depths) / policy.n_layers / len(rows),
        "early_exit_rate": mean(d < policy.n_layers for d in depths),
        "exit_histogram": {str(d): depths.count(d) / len(depths) for d in policy.outcomes.tolist()},
        "length": mean(len(row["token_ids"]) for row in rows), "finished": mean(row["finished"] for row in rows),
        "groups_zero_task_variance": mean(len({row["task"] for row in group}) == 1 for group in groups),
        "kl": mean(row["mean_kl"] for row in rows), "drift_max": float(drift.max()), "drift_mean": float(drift.mean()),
    }


def stage_one(args) -> runs.Path:
    """The stage-1 run to start from: --init, or the newest complete one (of --model, where given)."""
    found = runs.Path(args.init) if args.init else runs.newest("distill", model=args.model)
    if found is None:
        flag = f" --model {args.model}" if args.model else ""
        raise UserError(f"no complete stage-1 run{flag} under {runs.RUNS}/: run python distill.py{flag} first, "
                        f"or give --init RUN")
    return found


def main() -> None:
    p = runs.parser(__doc__)
    p.add_argument("--lam", type=float, default=0.1, help="lambda of (1), the price of depth (default: 0.1)")
    p.add_argument("--beta", type=float, default=0.02, help="weight of the mean token KL to the base (default: 0.02)")
    p.add_argument("--k", type=int, default=8, help="samples per prompt (default: 8)")
    p.add_argument("--batch-size", type=int, help="prompts in a step, 12 / 4")
    p.add_argument("--steps", type=int, help="200 / 400")
    p.add_argument("--lr", type=float, help="learning rate, falling to 0 over the run: 0.003 / (0.1 / hidden size)")
    p.add_argument("--problems", type=int, help="training problems, 4096 / all")
    p.add_argument("--save-every", type=int, default=20, help="steps between checkpoints (default: 20)")
    p.add_argument("--init", help="stage-1 run to start from (default: the newest complete one)")
    p.add_argument("--resume", help="folder of an interrupted run, which goes on under its own flags")
    args = p.parse_args()
    if args.k < 2:
        raise UserError(f"--k {args.k}: the leave-one-out baseline needs at least 2 samples per prompt")
    run = runs.Run.resume(args, "rloo") if args.resume else None
    if run:
        args = run.args
    else:
        args.init = str(stage_one(args))
        runs.inherit(args, runs.Path(args.init))
        args = runs.settle(args, steps=(200, 400), lr=(3e-3, None), batch_size=(12, 4), problems=(4096, None))

    model, tokenizer = runs.load_model(args)
    problems = tasks.load(args.task, "train", data=args.data, n=args.problems, seed=args.seed)
    run, policy, optimizer, start = runs.begin(
        run, "rloo", args, model, lambda: load_policy(model, runs.checkpoint(args.init)))
    print(f"stage 1: {args.init}")
    print(f"{args.model}: exits {policy.exits} of {policy.n_layers}, {args.task}, lambda "
          f"{args.lam}, beta {args.beta}, {args.batch_size} prompts x {args.k} samples, thinking "
          f"{'on' if args.thinking else 'off'}, at most {args.max_new_tokens} new tokens -> {run.folder}")

    lr, warned = args.lr or 0.1 / model.config.hidden_size, False
    for step in (bar := tqdm(range(start, args.steps), initial=start, total=args.steps, desc="rloo")):
        times = [time.perf_counter()]
        chosen = [problems[i] for i in runs.pick(len(problems), args.batch_size, step, args.seed)]
        rows = roll_out(policy, chosen, tokenizer, step, args)
        times.append(time.perf_counter())
        teachers, drift = score_rows(policy, rows, args)
        times.append(time.perf_counter())
        accumulate_gradient(policy, rows, teachers, args)
        grad_norm = run.apply_gradients(optimizer, lr * (1 - step / args.steps))
        times.append(time.perf_counter())

        metrics = {"step": step, **summarise(policy, rows, drift, args), "grad_norm": grad_norm}
        seconds = [b - a for a, b in zip(times, times[1:], strict=False)]
        metrics |= {f"seconds_{name}": s for name, s in zip(("rollout", "score", "update"), seconds, strict=True)}
        run.log("completions.jsonl", rows)
        run.log("metrics.jsonl", [metrics])
        if metrics["finished"] < 0.8 and not warned:
            bar.clear()
            runs.warn_unfinished(metrics["finished"], args)
            warned = True
        bar.set_postfix_str(f"reward {metrics['reward']:.3f}  accuracy {metrics['accuracy']:.0%}  "
                            f"compute {metrics['average_compute']:.2f}  length {metrics['length']:.0f}  "
                            f"KL {metrics['kl']:.3f}  drift {metrics['drift_max']:.0e}  "
                            f"rollout/score/update {'/'.join(f'{s:.1f}' for s in seconds)} s")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            run.save(step + 1, policy, optimizer)
    run.complete(metrics)
    print(f"next: python evaluate.py    (compares the base model, {args.init} and {run.folder})")


if __name__ == "__main__":
    runs.run_main(main)
