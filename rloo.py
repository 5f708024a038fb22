"""Stage 2: RLOO (REINFORCE, leave-one-out) with a penalty on depth, which pays the policy to think in visible tokens.

    R_i = r_task,i - lambda mean_t l_t / L - beta mean_t KL_t            of sample i of a prompt      (1)
    A_i = R_i - mean_{j != i} R_j                                       leave-one-out, no std division
    loss = 1/c mean over prompts of 1/k sum_i [ -A_i sum_t log pi(l_t, x_t) + beta mean_t KL_t ],   c = max_new_tokens

KL_t is exact, over the vocabulary, from the policy at l_t to the base model at full depth. So R depends on the weights
in two ways: through what is drawn, and, by KL_t, directly. The gradient of E[R] is E[R grad log pi] + E[grad R]: the
first term of the loss gives E[R grad log pi], the second E[grad R]. To take the other samples' mean from R_i changes no
expectation, since they are drawn independently of sample i and E[grad log pi] = 0; it only lessens the noise. And the
KL in the loss is no second penalty: without it, what is maximised would not be (1). 1/c only scales the loss: dividing
by each response's own length would weigh short ones more.
Left out of PPO and GRPO on purpose: importance ratios and their clipping (one gradient step per batch of rollouts), the
division by the standard deviation, a critic, top-k and top-p (the policy that is scored is the one that sampled).

Shapes: P prompts of a step, k samples of each, B responses of a micro-batch, N predicting positions.

    python rloo.py --lam 0.1                    from the newest complete stage-1 run
    python rloo.py --resume runs/rloo-…         goes on after an interruption
"""

import argparse
import math
import time
from itertools import pairwise
from pathlib import Path
from shlex import quote
from statistics import fmean as mean

import torch

import flags
import optim
import parallel
import runs
from checkpoints import load_policy
from data import tasks
from data.hub import UserError, field
from evaluate import graded, measure
from exits import Policy, Response, base_pass, micro_batches, per_response, score
from fast.packing import send
from sample import generate

FLAT = 10  # steps in a row without a difference in task reward before it is said
SECONDS = ("seconds_rollout", "seconds_score", "seconds_update")  # of the three parts of a step, in metrics.jsonl


def reward(task, depth, mean_kl, lam: float, beta: float) -> torch.Tensor:
    """Eq. (1): r_task,i, mean_t l_t / L and mean_t KL_t of each response -> R_i, all (P k,)."""
    return task - lam * depth - beta * mean_kl


def depth_charged(records: list[dict], n_layers: int, gated: bool) -> torch.Tensor:
    """mean_t l_t / L of each response, which (1) charges: (P k,); where `gated` 0 for a wrong one."""
    return torch.tensor([sum(r["depths"]) / len(r["depths"]) / n_layers * (r["correct"] or not gated) for r in records],
                        dtype=torch.double)


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """A_i, each prompt's samples in a row: (P, k) -> (P, k)."""
    k = rewards.shape[1]
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (k - 1)


def rloo_loss(advantage, logp, mean_kl, beta: float, c: int, count: int) -> torch.Tensor:
    """What responses (B,) of a step of `count` add to the loss; logp (B,) is sum_t log pi(l_t, x_t).

    mean over prompts of 1/k sum_i is a mean over the step's responses, so micro-batches simply add up.
    """
    return (beta * mean_kl - advantage.detach() * logp).sum() / (c * count)


def response_mean(values: torch.Tensor, batch) -> torch.Tensor:
    """Means over each response, where `per_response` has sums: (N,) -> (B,)."""
    return per_response(values, batch) / per_response(torch.ones_like(values), batch)


def roll_out(policy: Policy, problems, prompts, tokenizer, step: int, args) -> tuple[list, list[Response]]:
    """k samples of each of this process's problems of a step, at temperature 1, no top-k, no top-p, exits drawn; and
    the problem of each."""
    mine = parallel.share(args.prompts_per_step)  # all, but where several processes divide them
    chosen = optim.pick(len(problems), args.prompts_per_step, step, args.seed)[mine]
    with policy.model.gathered(), parallel.bar(total=len(chosen) * args.samples, desc="samples", leave=False,
                                              delay=10) as bar:  # seconds; shorter rollouts need no bar of their own
        responses = generate(policy, [prompts[i] for i in chosen], samples=args.samples, rows=args.rows,
                             max_new_tokens=args.max_new_tokens, eos_ids=tokenizer.eos_ids, seed=(args.seed, step),
                             first_response=mine.start * args.samples, progress=bar)
    return [problems[i] for i in chosen for _ in range(args.samples)], responses


@torch.no_grad()
def score_responses(policy: Policy, responses: list[Response], micro_batch: int):
    """Before the update: the micro-batches, each (index, Batch, the base's streams), which the update needs again; each
    response's mean token KL (P k,); and |log-prob when sampled - here| of every generated token's depth and id (2N,),
    which must stay at rounding level."""
    parts, drift = [], [policy.heads.bias.new_zeros(0)]
    mean_kl = torch.zeros(len(responses), dtype=torch.double, device=policy.device)
    for index, batch in micro_batches(policy, responses, micro_batch):
        base_h, _ = base_pass(policy, batch)
        parts.append((index, batch, base_h))
        scores = score(policy, batch, base_h)
        sampled = torch.tensor([[x for i in index for x in getattr(responses[i], name)]
                                for name in ("logp_exit", "logp_token")])
        index, sampled = (send(x, policy.device) for x in (index, sampled))
        mean_kl[index] = response_mean(scores.token_kl, batch).double()
        drift.append((torch.stack([scores.logp_exit, scores.logp_token]) - sampled).abs().flatten())
    return parts, mean_kl.cpu(), torch.cat(drift).cpu()  # copied last, since each copy waits for the device


def earnings(problem_of: list, records: list[dict], mean_kl: torch.Tensor, n_layers: int, tokenizer, args) -> dict:
    """The parts of (1), R_i and A_i of each response, all (P k,), by their names in completions.jsonl."""
    task = torch.tensor([problem.reward(row["text"], row["finished"], row["correct"],
                                        tokenizer.think_open(row["prompt_ids"]))
                         for problem, row in zip(problem_of, records, strict=True)], dtype=torch.double)
    depth = depth_charged(records, n_layers, args.gate_depth_on_correct)
    rewards = reward(task, depth, mean_kl, args.lam, args.beta)
    return {"reward_task": task, "depth_charged": depth, "mean_kl": mean_kl, "reward": rewards,
            "advantage": leave_one_out(rewards.view(-1, args.samples)).flatten()}


def accumulate_gradient(policy: Policy, parts: list, advantages: torch.Tensor, beta: float, c: int, count: int) -> None:
    """What the responses of score_responses' `parts` add to the gradient of rloo_loss over a step's `count`."""
    for index, batch, base_h in parts:
        scores = score(policy, batch, base_h)
        advantage = send(advantages[index].to(scores.token_kl.dtype), policy.device)
        rloo_loss(advantage, per_response(scores.logp_exit + scores.logp_token, batch),
                  response_mean(scores.token_kl, batch), beta, c, count).backward()


def summarise(records: list[dict], drift: torch.Tensor, depth_of_outcome: list[int], args) -> dict:
    """A step's metrics from its completions; the three parts of the reward sum to it. Compute is that of all tokens, as
    in every table, while (1) charges each response its own mean."""
    def average(name):
        return mean(row[name] for row in records)

    task = [row["reward_task"] for row in records]
    groups = [set(task[i : i + args.samples]) for i in range(0, len(task), args.samples)]
    return {
        "reward": average("reward"), "reward_task": average("reward_task"),
        "reward_depth": -args.lam * average("depth_charged"), "reward_kl": -args.beta * average("mean_kl"),
        **{name: value for name, value in measure(records, depth_of_outcome).items()
           if name not in ("accuracy_low", "accuracy_high")},  # a prompt's samples are alike: they'd be too narrow
        "groups_of_equal_task_reward": sum(len(group) == 1 for group in groups) / len(groups),
        "kl": average("mean_kl"), "drift_max": float(drift.max()), "drift_mean": float(drift.mean()),
    }


def train_step(run, policy: Policy, optimizer, problems, prompts, tokenizer, step: int, args) -> tuple[list, dict]:
    """A step: roll out, score, since the reward needs the KL to the base model, and one update. Returns all ranks'
    completions and the metrics."""
    times = [time.perf_counter()]
    problem_of, responses = roll_out(policy, problems, prompts, tokenizer, step, args)
    records = graded(problem_of, responses, tokenizer)
    times.append(time.perf_counter())

    parts, mean_kl, drift = score_responses(policy, responses, args.micro_batch)
    earned = earnings(problem_of, records, mean_kl, policy.n_layers, tokenizer, args)
    times.append(time.perf_counter())

    accumulate_gradient(policy, parts, earned["advantage"], args.beta, c=args.max_new_tokens,
                        count=args.prompts_per_step * args.samples)
    updated = run.apply_gradients(optimizer, args.lr * optim.schedule(step, args.steps))
    times.append(time.perf_counter())

    records = parallel.all_gather([{"step": step, "sample": i % args.samples, **row,
                                    **{name: float(values[i]) for name, values in earned.items()}}
                                   for i, row in enumerate(records)])
    drift = torch.cat(parallel.all_gather([drift]))
    seconds = dict(zip(SECONDS, (end - start for start, end in pairwise(times)), strict=True))
    return records, {"step": step, **summarise(records, drift, policy.depth_of_outcome.tolist(), args), **updated,
                     **seconds}


def progress(metrics: dict) -> str:
    """A step's metrics, as the bar shows them."""
    return (f"reward {metrics['reward']:.3f}  accuracy {metrics['accuracy']:.0%}  "
            f"compute {metrics['average_compute']:.2f}  length {metrics['length']:.0f}  KL {metrics['kl']:.3f}  "
            f"drift {metrics['drift_mean']:.0e}  "
            f"rollout/score/update {'/'.join(f'{metrics[name]:.1f}' for name in SECONDS)} s")


def trend(rows: list[dict], where) -> str:
    """What has become of the means that matter, from the first tenth of a run's metrics to the last."""
    tenth, told = math.ceil(len(rows) / 10), []
    for name in ("accuracy", "average_compute", "length", "kl"):
        first, last = (runs.finite(part, name, where) for part in (rows[:tenth], rows[-tenth:]))
        told.append(f"{name} {mean(first):.3g} -> {mean(last):.3g}" if first and last else f"{name} not finite")
    return f"from the first {tenth} to the last of {len(rows)} steps: {', '.join(told)}"


def next_command(run: Path, init: Path, args) -> str:
    """What compares the run with its stage 1, where that is still there: with flags where else the two could not be."""
    told = [str(run)]
    if (runs.run_of(init) / "config.json").exists():
        before = runs.read_config(init)["args"]
        told = [str(init), *told, *(flags.typed(name, value) for name in (*flags.INHERITED, "dtype")
                                    if (value := getattr(args, name)) not in (None, before.get(name)))]
    return " ".join(["python evaluate.py", *map(quote, told)])


def stage_one(args) -> Path:
    """The run to start from: --init, or the newest complete stage-1 run (of --model, where given)."""
    model = args.model and flags.name_of(args.model)
    found = Path(args.init) if args.init else runs.newest("distill", model=model)
    if found is None:
        flag = f" --model {args.model}" if args.model else ""
        raise UserError(f"no complete stage-1 run{flag} under {runs.RUNS}/: run python distill.py{flag} first, "
                        f"or give --init RUN")
    if not args.init and (later := runs.begun_after(found, "distill", model)):
        raise UserError(f"{later} was begun after {found} and is not complete: finish it (python distill.py --resume "
                        f"{later}), or name the run to start from by --init")
    runs.refuse_stage(runs.read_config(found), found, "distill")
    return found


@parallel.shared
def main() -> None:
    p = flags.training(__doc__, save_every=(20, 5))
    p.add_argument("--lam", type=flags.number(0, 1e6), default=0.1, help="lambda of (1), the price of depth (default: "
                   "0.1)")
    p.add_argument("--beta", type=flags.number(0, 1e6), default=0.02, help="weight of the mean token KL to the base "
                   "(default: 0.02)")
    p.add_argument("--gate-depth-on-correct", action=argparse.BooleanOptionalAction, default=False,
                   help="charge depth for right answers only, so that a wrong one gains nothing by being shallow "
                   "(default: off, as in (1))")
    p.pair("--prompts-per-step", 12, 4, type=flags.whole(1), help="{} / {}")
    p.add_argument("--samples", type=flags.whole(2), default=8, help="k, the responses to each prompt (default: 8)")
    p.pair("--steps", 200, 400, type=flags.whole(1, 999_999), help="{} / {}")
    p.pair("--lr", 1e-3, None, type=flags.number(0, 10), help="peak learning rate: {} / (0.1 / hidden size)")
    p.pair("--problems", 4096, None, type=flags.whole(1), help="training problems, {} / all of a file, 1000 of a "
           "generator or a .py task")
    p.add_argument("--init", help="stage-1 run to start from (default: the newest complete one)")
    args = p.parse_args()
    run = runs.Run.resume(args, p, "rloo") if args.resume else None
    if run:
        args = run.args
        init = runs.find(field(vars(args), "init", str, run.folder / "config.json"), beside=run.folder)
    else:
        init = parallel.from_rank_0(lambda: stage_one(args).resolve())
        runs.inherit(args, init)
    args.init = str(init.resolve())
    args = flags.settle(p, args)

    runs.warn_idle("--prompts-per-step", args.prompts_per_step)
    problems = tasks.load(args.task, "train", data=args.data, n=args.problems, seed=args.seed)
    if run is None:
        tasks.refuse_shared(problems, args)
    model, tokenizer = runs.load_model(args)
    prompts = runs.prompt_ids(problems, model, tokenizer, args)
    # Recorded, so that a resumed run keeps it. A tenth of stage 1's, to be careful: on the embedded model 0.0015, twice
    # 0.1 / D, was the best of three rates from kappa 4, and 0.001 no worse from 16; 135 M parameters took three times
    # 0.1 / D. No larger model was tried.
    args.lr = 0.1 / model.config.hidden_size if args.lr is None else args.lr
    run, policy, optimizer, start = runs.begin(
        run, "rloo", args, model, problems, prompts, lambda: load_policy(model, init), init)
    print(f"stage 1: {init}{runs.incomplete(init)}")
    print(f"{runs.describe(args, tokenizer)}, exits {policy.exits} of {policy.n_layers}, lambda {args.lam}, beta "
          f"{args.beta}, {args.prompts_per_step} prompts x {args.samples} samples -> {run.folder}", flush=True)

    warned, flat = False, 0
    for step in run.steps(start, policy, optimizer):
        records, metrics = train_step(run, policy, optimizer, problems, prompts, tokenizer, step, args)
        run.log("completions.jsonl", records)
        run.log("metrics.jsonl", [metrics])
        if metrics["finished"] < 0.8 and not warned:
            run.bar.clear()
            runs.warn_unfinished(metrics["finished"], "an unfinished one never counts as right", tokenizer, args)
            warned = True
        flat = flat + 1 if metrics["groups_of_equal_task_reward"] == 1 else 0
        if flat == FLAT:
            run.bar.clear()
            runs.say(f"{FLAT} steps in a row the samples of every prompt earned the same task reward: depth and KL are "
                     f"all that is trained. Where accuracy stays at 0%, stop: has stage 1 converged?")
        run.bar.set_postfix_str(progress(metrics))
    run.complete(run.last_metrics()[0])
    print(trend(run.last_metrics(args.steps), run.folder / "metrics.jsonl"))
    print("next:", next_command(run.folder, init, args))


if __name__ == "__main__":
    runs.run_main(main)
