"""Stage 1: calibrate exit heads and adapters by self-distillation from the base model.

The base model answers training prompts once. At every predicting position its own lens W_U norm(h^e) at each exit is
compared with its own final distribution, not the student's, so the target does not move as the student learns. Where
they agree, exiting is safe:

    s_e = 2 (1 - sigmoid(kappa KL_e)),   q = stick-breaking of s                                  (4), (3)
    loss = mean_t [ KL(student at l*_t || base) - log pi_student(l*_t) ],   l*_t ~ q              (5)

The student reads the same responses, each token frozen at its l*. The second term is computed with the noise of its
coins averaged out (exit_cross_entropy).
Two options are not the paper's. --student-lens asks the student's lens in (4), so that exits move down as far as the
adapters follow. --forward-kl turns the KL of (5) round. As it stands it does not move a student that is sure of a token
which the base rules out: its gradient by a logit, p (log p - log base - KL), vanishes as p nears 0 or 1. Where an exit
is forced, as at one fixed depth, such tokens occur, and KL(base || student), whose gradient is p - base, frees them.
Left out on purpose: dropout, weight decay, a loss on the tokens themselves (the base's distribution is the target).

    python distill.py                           the embedded model on arithmetic: minutes on a laptop
    python distill.py --model Qwen/Qwen3-4B     GSM8K from the hub; one 24 GB GPU (docs/gpu.md has the arithmetic)
    python distill.py --resume runs/distill-…   goes on after an interruption
"""

import argparse
import math
from shlex import quote
from typing import NamedTuple

import torch
import torch.nn.functional as F

import flags
import optim
import parallel
import runs
import teacher
from data import tasks
from exits import (
    Batch,
    Policy,
    Response,
    base_pass,
    exit_depths,
    micro_batches,
    per_response,
    score,
    stick_breaking,
    token_logp_all,
)
from fast.chunks import in_chunks, kl_in_place
from fast.packing import send
from sample import DEPTHS, HELD_OUT, NEVER, draw, uniforms

STRETCH = 100  # tokens: about two of the embedded model's responses


# ------------------------------------------------------------------------------------------------ targets and loss


@torch.no_grad()
def lens_kl(model, base_h: torch.Tensor, lens_h: list[torch.Tensor]) -> torch.Tensor:
    """KL_e = KL(softmax(W_U norm(h^L)) || softmax(W_U norm(h^e))): (N, D) and E of (N, D) -> (N, E) nats."""
    def chunk(final, *lenses):
        base = token_logp_all(model, final)
        p = base.exp()  # once for all lenses
        return (torch.stack([kl_in_place(p, base, token_logp_all(model, h)) for h in lenses], dim=-1).clamp(min=0),)

    return in_chunks(chunk, model.config.vocab_size, base_h, *lens_h)[0]


def log_safe(kl_e: torch.Tensor, kappa: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. (4): log s and log (1 - s) of s_e = 2 (1 - sigmoid(kappa KL_e)) = 1 - tanh(kappa KL_e / 2), each like KL_e.

    log (1 - s) is -inf at KL = 0: an exit that changes nothing is always taken.
    """
    return math.log(2) + F.logsigmoid(-kappa * kl_e), torch.log(torch.tanh(kappa * kl_e / 2))


def log_target(kl_e: torch.Tensor, kappa: float) -> torch.Tensor:
    """Eq. (3): log q over the outcomes, stick-breaking of s: (N, E) -> (N, E + 1)."""
    return stick_breaking(*log_safe(kl_e, kappa))


class Target(NamedTuple):
    """What stage 1 teaches on a batch."""

    q: torch.Tensor  # (N, E + 1) eq. (3), of which depths were drawn
    p_safe: torch.Tensor  # (N, E) s of eq. (4)
    depths: torch.Tensor  # (N,) l*, on the host
    batch: Batch  # the batch at these depths


def base_target(policy: Policy, batch: Batch, base_h, lens_h, kappa: float, u) -> Target:
    """Draws l*_t ~ q of eq. (3), by uniforms u (N, E), of which it takes the first: the base's streams at full depth
    (N, D) and at the exits, E of (N, D) -> Target."""
    kl_e = lens_kl(policy.model, base_h, lens_h)
    log_q = log_target(kl_e, kappa)
    depths = policy.depth_of_outcome[draw(log_q, send(u[:, 0], policy.device)).cpu()]
    return Target(log_q.exp(), log_safe(kl_e, kappa)[0].exp(), depths, at_depths(batch, depths))


@torch.no_grad()
def student_target(policy: Policy, batch: Batch, base_h, lens_h, kappa: float, u) -> Target:
    """base_target with the student's lens in (4): what the adapters have learned to say early counts as safe. It is
    asked where it will be used, in a pass in which tokens freeze as soon as their coin, P(stop) = s_e, falls so. Past
    l* there is no such lens: q is l* itself, and s means nothing there."""
    def safety(h, exit_idx):
        log_s, log_not_s = log_safe(lens_kl(policy.model, base_h, [h[batch.predicting]])[:, 0], kappa)
        return log_s.new_zeros(h.shape[:2]).index_put(batch.predicting, log_s - log_not_s)

    out = policy(batch.ids, batch.depths, coins(batch, u), place=batch.place, heads=safety)
    p_safe, depths = out.exit_logits[batch.predicting].sigmoid(), out.depths[batch.row, batch.position]
    q = depths[:, None] == policy.depth_of_outcome
    return Target(send(q.to(p_safe.dtype), policy.device), p_safe, depths, at_depths(batch, depths))


def at_depths(batch: Batch, depths: torch.Tensor) -> Batch:
    """The batch with depths (N,) at its predicting positions."""
    return batch._replace(depths=batch.depths.index_put((batch.row, batch.position), depths))


def coins(batch: Batch, u: torch.Tensor) -> torch.Tensor:
    """Uniforms u (N, E) of the predicting positions as Policy.forward takes them, (B, T, E): no other one stops."""
    u_exit = torch.full((*batch.ids.shape, u.shape[-1]), NEVER, dtype=torch.double)
    u_exit[batch.row, batch.position] = u
    return u_exit


def reached(depths: torch.Tensor, exits, device) -> torch.Tensor:
    """Which exits each position came to, the one where it stopped included: (N,) on the host -> (N, E)."""
    return send(depths[:, None] >= torch.tensor(exits), device)


def exit_cross_entropy(exit_logits: torch.Tensor, p_safe: torch.Tensor, depths: torch.Tensor, exits) -> torch.Tensor:
    """The exit term of (5), -log pi(l*_t), with the noise of each coin averaged out: exit logits (N, E), s of (4)
    (N, E) and l* (N,) -> (N,).

    -log pi(l*_t) is a sum over the exits that l*_t reached: each tossed a coin, P(stop) = s_e, and pays -log p_e at
    stop, else -log (1 - p_e). Here each is replaced by its mean, the cross-entropy from s_e to p_e: the same
    expectation and expected gradient, less noise. l*_t is drawn all the same, for it decides which exits are reached
    and where the stream freezes. Heads past it learn nothing.
    """
    each = F.binary_cross_entropy_with_logits(exit_logits, p_safe, reduction="none")
    return (each * reached(depths, exits, each.device)).sum(-1)


def distill_loss(token_kl: torch.Tensor, exit_loss: torch.Tensor, count: int) -> torch.Tensor:
    """Eq. (5): mean over the step's `count` positions of KL(student || base) (N,) and the exit term (N,)."""
    return (token_kl + exit_loss).sum() / count


def train_step(policy: Policy, responses: list[Response], step: int, kappa: float, seed: int, micro_batch: int,
               forward_kl: bool = False, target=base_target) -> dict:
    """Accumulates the gradient of eq. (5) over a step's responses and returns what is logged."""
    count = sum(map(len, responses))
    E, depth_of_outcome = len(policy.exits), policy.depth_of_outcome
    sizes = [2, E + 1, E, E]
    loss, q_sum, p_sum, visits = (policy.heads.bias.new_zeros(n) for n in sizes)
    for index, batch in micro_batches(policy, responses, micro_batch, parallel.share(len(responses))):
        base_h, lens_h = base_pass(policy, batch)
        u = uniforms((seed, DEPTHS, step), index[batch.row], batch.position, E)
        q, p_safe, depths, batch = target(policy, batch, base_h, lens_h, kappa, u)
        # (5) asks for no token's own probability, and each asked for costs one more product with the vocabulary.
        scores = score(policy, batch, base_h, tokens=False, forward_kl=forward_kl)
        exit_loss = exit_cross_entropy(scores.exit_logits, p_safe, depths, policy.exits)
        distill_loss(scores.token_kl, exit_loss, count).backward()

        loss += torch.stack([scores.token_kl.sum(), exit_loss.sum()]).detach()
        q_sum += q.sum(0)
        p, visited = hazard_sums(scores.exit_logits.detach().sigmoid(), depths, policy.exits)
        p_sum, visits = p_sum + p, visits + visited
    sums = torch.cat([loss, q_sum, p_sum, visits])  # together, since each copy waits for the device
    parallel.all_reduce(sums)  # over the processes; apply_gradients adds the gradients
    loss, q_sum, p_sum, visits = sums.cpu().split(sizes)
    terms, hazard = (loss / count).tolist(), p_sum / visits.clamp(min=1)
    return {"loss": sum(terms), "token_kl": terms[0], "exit_cross_entropy": terms[1], "tokens": count,
            "target": summary(q_sum / count, depth_of_outcome),
            "learned": summary(from_hazards(hazard), depth_of_outcome)}


# ------------------------------------------------------------------------------------------------------- reporting


def summary(distribution: torch.Tensor, depth_of_outcome: torch.Tensor) -> dict:
    """An exit distribution (E + 1,) with its exit rate and layer savings, eq. (6)."""
    distribution = distribution.double()
    savings = 1 - (distribution * depth_of_outcome).sum() / depth_of_outcome[-1].item()
    return {"distribution": [round(x, 5) for x in distribution.tolist()],
            "exit_rate": 1 - float(distribution[-1]), "layer_savings": float(savings)}


def hazard_sums(p: torch.Tensor, depths: torch.Tensor, exits) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each exit e the sum of p_e over the positions that reach it at given depths, and how many do: p (N, E) and
    depths (N,) -> two (E,). One over the other is the exit's hazard."""
    at = reached(depths, exits, p.device)
    return (p * at).sum(0), at.sum(0)


def from_hazards(p: torch.Tensor) -> torch.Tensor:
    """The distribution over outcomes where a token that reaches exit e stops there with probability p_e: (E,) ->
    (E + 1,)."""
    p = p.double().clamp(1e-12, 1 - 1e-12)
    return stick_breaking(p.log(), torch.log1p(-p)).exp()


def at_own_exits(policy: Policy, batch, base_h, u: torch.Tensor, forward_kl=False) -> tuple[torch.Tensor, torch.Tensor]:
    """The depths (N,) that the student takes in a parallel pass with uniforms u (N, E), and its token KL (N,) there, on
    base responses: they are recorded at full depth, so that `u` decides everywhere."""
    scores = score(policy, batch, base_h, tokens=False, u=coins(batch, u), forward_kl=forward_kl)
    return scores.depths, scores.token_kl


@torch.no_grad()
def held_out(policy: Policy, responses: list[Response], kappa: float, seed: int, micro_batch: int,
             forward_kl: bool = False, target=base_target) -> dict:
    """Has it converged? On held-out base responses, in parallel passes:

        token_kl, exit_cross_entropy  the two terms of (5) at depths drawn from q
        learned, target               the exits that the student draws itself, and the mean of q
        at_half                       the exits it takes where p_e > 1/2 decides in place of a draw
        token_kl_at_own_exits         above token_kl: q knows the final layer, and the heads have to guess
        intact_whole                  mean of exp(-K), K a response's sum of the KL at the student's own exits: by rule
                                      of thumb the share of responses that stay as they were (89% where 87% did)
        intact                        the same for STRETCH tokens of a longer one
        intact_at_half                the same by at_half, where heads guess best
    """
    E, depth_of_outcome = len(policy.exits), policy.depth_of_outcome
    drawn, at_half, q_sum = torch.zeros(E + 1), torch.zeros(E + 1), policy.heads.bias.new_zeros(E + 1)
    totals, count = torch.zeros(6, dtype=torch.double, device=policy.device), sum(map(len, responses))
    for index, batch in micro_batches(policy, responses, micro_batch, parallel.share(len(responses))):
        base_h, lens_h = base_pass(policy, batch)
        u = uniforms((seed, HELD_OUT), index[batch.row], batch.position, 2 * E)
        own, kl_own = at_own_exits(policy, batch, base_h, u[:, :E], forward_kl)
        drawn += (own[:, None] == depth_of_outcome).sum(0)
        half, kl_half = at_own_exits(policy, batch, base_h, torch.full_like(u[:, :E], 0.5), forward_kl)
        at_half += (half[:, None] == depth_of_outcome).sum(0)
        q, p_safe, depths, batch_q = target(policy, batch, base_h, lens_h, kappa, u[:, E:])
        q_sum += q.sum(0)
        scores = score(policy, batch_q, base_h, tokens=False, forward_kl=forward_kl)
        lost = per_response(torch.stack([kl_own, kl_half], 1).double(), batch)
        whole = torch.exp(-lost[:, 0]).sum()
        stretch = send(torch.tensor([[min(1, STRETCH / len(responses[i]))] for i in index]), policy.device)
        exit_loss = exit_cross_entropy(scores.exit_logits, p_safe, depths, policy.exits)
        stretches = torch.exp(-lost * stretch).sum(0)
        totals += torch.stack([scores.token_kl.sum(), exit_loss.sum(), kl_own.sum(), whole, *stretches])
    for sums in (drawn, at_half, q_sum, totals):
        parallel.all_reduce(sums)  # over the processes, each of which has seen its share of the responses
    token_kl, cross_entropy, own_kl, whole, intact, intact_at_half = totals.tolist()
    return {"positions": count, "token_kl": token_kl / count, "exit_cross_entropy": cross_entropy / count,
            "token_kl_at_own_exits": own_kl / count, "intact": intact / len(responses),
            "intact_whole": whole / len(responses), "intact_at_half": intact_at_half / len(responses),
            "learned": summary(drawn / count, depth_of_outcome), "at_half": summary(at_half / count, depth_of_outcome),
            "target": summary(q_sum.cpu() / count, depth_of_outcome)}


def in_words(measured: dict, depth_of_outcome: list[int], longest: int) -> str:
    """What held_out has measured, in words; `longest`: tokens of the longest response."""
    whole = f" ({measured['intact_whole']:.0%} of whole ones)" if longest > STRETCH else ""
    lines = [f"held-out responses, {measured['positions']} positions: token KL {measured['token_kl']:.4f} "
             f"({measured['token_kl_at_own_exits']:.4f} where the student itself exits), exit CE "
             f"{measured['exit_cross_entropy']:.3f}; about {measured['intact']:.0%} of the base's responses, or "
             f"of stretches of {STRETCH} tokens, stay as they were{whole}; {measured['intact_at_half']:.0%} with exits "
             f"at p > 1/2, not drawn, which saves {measured['at_half']['layer_savings']:.1%} of the layers"]
    for name in ("target", "learned"):
        s = measured[name]
        shares = "  ".join(f"{d}: {x:.1%}" for d, x in zip(depth_of_outcome, s["distribution"], strict=True))
        lines.append(f"  {name:8} exit rate {s['exit_rate']:.1%}  layer savings {s['layer_savings']:.1%}   {shares}")
    return "\n".join(lines)


def verdict(measured: dict, training_kl: float) -> str | None:
    """What is still wrong with a calibration, in one line; None if nothing is.

    Exit rates match their target long before the tokens do, so it goes by `intact`: by stretches, for of long responses
    no whole one would ever stay. Many unsure heads cost a response though each is right more often than not; without
    the draw they cost little.
    """
    at_target, at_own = measured["token_kl"], measured["token_kl_at_own_exits"]
    learned, target = (measured[name]["exit_rate"] for name in ("learned", "target"))
    longer = "raise --steps (--resume RUN --steps N goes on)"
    if abs(learned - target) > 0.1:
        if not training_kl < 5:  # nats: the worst of the calibrations in docs/ has 1.4; one at --lr 10 had 12
            return f"not converged: it has diverged, to {training_kl:.1f} nats a token: lower --lr, in a new run"
        return f"not converged: {learned:.0%} of the tokens exit, and {target:.0%} are to: {longer}"
    if measured["intact"] > 0.8:
        return None
    problem = f"at {at_own:.4f} nats a token only {measured['intact']:.0%} of the responses stay as they were"
    # Heads that never say more than 1/2 leave everything as it was, at full depth.
    saved, to_save = (measured[name]["layer_savings"] for name in ("at_half", "target"))
    if measured["intact_at_half"] > 0.8 and 2 * saved > to_save:
        return (f"it is the draw that costs: {problem}; evaluate.py --threshold 0.5, without one, leaves "
                f"{measured['intact_at_half']:.0%}, and stage 2 learns to draw better")
    if at_own > 4 * at_target:
        cure = (f"where the target exits it is {at_target:.4f}, so the heads leave at the wrong tokens: raise --steps; "
                f"or, in a new run, --head-width or --kl-factor")
    elif at_target > 1.5 * training_kl:
        cure = f"training responses are at {training_kl:.4f}, learned by heart: raise --responses, with more problems"
    else:
        cure = f"{longer}; where that no longer helps, raise --kl-factor in a new run"
    return f"not converged: {problem}; {cure}"


@parallel.shared
def main() -> None:
    p = flags.training(__doc__, save_every=(50, 5))
    p.pair("--kl-factor", 16.0, 1.0, type=flags.number(0, 1e6, above=True), help="kappa of (4): larger exits later, "
           "and costs less accuracy; {} / {}, the paper's")
    p.add_argument("--forward-kl", action=argparse.BooleanOptionalAction, default=False, help="(5)'s token KL as "
                   "KL(base || student), which also pulls where the student is sure of what the base rules out "
                   "(default: off, KL(student || base))")
    p.add_argument("--student-lens", action=argparse.BooleanOptionalAction, default=False, help="(4) by the student's "
                   "own lens, in place of the base's: exits move down as far as the adapters learn to follow (default: "
                   "off, as in the paper)")
    p.add_argument("--exit-every", type=flags.whole(1), help="layers between exits (default: 5, or 2 in models under "
                   "20 layers)")
    p.pair("--rank", 8, 16, type=flags.whole(1, 4096), help="of the LoRA adapters, {} / {}; alpha is twice the rank")
    p.pair("--head-width", 0, 256, type=flags.whole(0, 65536), help="hidden units of each exit's head, {} / {}, where "
           "0 means a linear map")
    p.pair("--steps", 480, 400, type=flags.whole(1, 999_999), help="{} / {}")
    p.add_argument("--responses-per-step", type=flags.whole(1), default=8, help="(default: 8)")
    p.pair("--lr", 0.012, None, type=flags.number(0, 10), help="the adapters' peak rate: {} / (1 / hidden size, since "
           "a logit sums over the width)")
    p.add_argument("--head-lr", type=flags.number(0, 10), help="the heads' peak rate, --lr / five times --lr")
    p.pair("--responses", 3000, 3200, type=flags.whole(1), help="base responses to train on, {} / {}")
    p.add_argument("--held-out", type=flags.whole(1), default=64, help="test prompts for the final check (default: 64)")
    p.add_argument("--teacher", type=teacher.path_of, help="an earlier run, or its teacher.jsonl, whose base responses "
                   "to take, not sampling any")
    args = p.parse_args()
    run = runs.Run.resume(args, p, "distill") if args.resume else None
    args = flags.settle(p, run.args if run else args)

    runs.warn_idle("--responses-per-step", args.responses_per_step)
    problems = {split: tasks.load(args.task, split, data=args.data, n=n, seed=args.seed)
                for split, n in (("train", args.responses), ("test", args.held_out))}
    for name, split, count in (("--responses", "train", args.responses), ("--held-out", "test", args.held_out)):
        runs.warn_fewer(name, count, len(problems[split]))
    if run is None:
        tasks.refuse_shared(problems["train"], args)
    model, tokenizer = runs.load_model(args)
    exits = exit_depths(model.config.num_hidden_layers, args.exit_every)
    args.exit_every = exits[0]
    # Recorded, so that a resumed run keeps them. On pretrained layers the adapters have little to change, the heads all
    # to learn.
    args.lr = 1 / model.config.hidden_size if args.lr is None else args.lr
    args.head_lr = args.lr * (1 if args.model == "embedded" else 5) if args.head_lr is None else args.head_lr
    prompts = {split: runs.prompt_ids(some, model, tokenizer, args) for split, some in problems.items()}
    if source := teacher.source_of(run and run.folder, args):
        teacher.checked_responses(source, model, prompts, args)  # before the run has a folder, or is open again
    run, policy, optimizer, start = runs.begin(
        run, "distill", args, model, problems["train"] + problems["test"], prompts["train"] + prompts["test"],
        lambda: Policy(model, exits, args.rank, head_width=args.head_width))
    print(f"{runs.describe(args, tokenizer)}, exits {policy.exits} of {policy.n_layers} -> {run.folder}", flush=True)
    data = teacher.base_responses(run, policy, tokenizer, problems, prompts, args)
    teacher.report_accuracy(problems["train"], prompts["train"], data["train"], tokenizer)

    target = student_target if args.student_lens else base_target
    for step in run.steps(start, policy, optimizer):
        chosen = [data["train"][i] for i in optim.pick(len(data["train"]), args.responses_per_step, step, args.seed)]
        metrics = {"step": step, **train_step(policy, chosen, step, args.kl_factor, args.seed, args.micro_batch,
                                              args.forward_kl, target)}
        decay = optim.schedule(step, args.steps)
        metrics |= run.apply_gradients(optimizer, args.lr * decay, args.head_lr * decay)
        run.log("metrics.jsonl", [metrics])
        rates = [metrics[name]["exit_rate"] for name in ("learned", "target")]
        run.bar.set_postfix_str(f"token KL {metrics['token_kl']:.3f}  exit CE {metrics['exit_cross_entropy']:.3f}  "
                                f"exit rate {rates[0]:.1%} (target {rates[1]:.1%})")

    measured = held_out(policy, data["test"], args.kl_factor, args.seed, args.micro_batch, args.forward_kl,
                        target)
    run.complete(measured)
    print(in_words(measured, policy.depth_of_outcome.tolist(), max(map(len, data["test"]))))
    losses = runs.finite(run.last_metrics(20), "token_kl", run.folder / "metrics.jsonl")
    if problem := verdict(measured, sum(losses) / len(losses) if losses else math.inf):
        print(problem)
    print(f"next: python rloo.py --lam 0.1 --init {quote(str(run.folder))}")


if __name__ == "__main__":
    runs.run_main(main)
