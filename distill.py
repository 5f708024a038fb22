"""Stage 1: calibrate exit heads and adapters by self-distillation from the base model.

The base model answers training prompts once. At every predicting position the lens W_U norm(h^e) of each exit is
compared with the final distribution; where they agree, exiting is safe:

    s_e = 2 (1 - sigmoid(kappa KL_e)),   q = stick-breaking of s                                  (4), (3)
    loss = mean_t [ KL(student at l*_t || teacher) - log pi_student(l*_t) ],   l*_t ~ q            (5)

Left out on purpose: dropout, weight decay, a loss on the tokens themselves (the teacher's distribution is the target).

    python distill.py                           the embedded model on arithmetic: minutes on a laptop
    python distill.py --model Qwen/Qwen3-4B     GSM8K from the hub; one 24 GB GPU (the README has the arithmetic)
    python distill.py --resume runs/distill-…   goes on after an interruption
"""

import json
import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

import runs
from data import tasks
from data.hub import UserError
from exits import (
    NEVER,
    Policy,
    adapters_off,
    batch_of,
    draw,
    exit_depths,
    generate,
    in_chunks,
    kl,
    micro_batches,
    score,
    stick_breaking,
    teacher_pass,
    token_logp_all,
    uniforms,
)

RESPONSES, DEPTHS, HELD_OUT = 0, 1, 2  # purposes of random numbers


@torch.no_grad()
def lens_kl(model, teacher_h: torch.Tensor, lens_h: list[torch.Tensor]) -> torch.Tensor:
    """KL_e = KL(softmax(W_U norm(h^L)) || softmax(W_U norm(h^e))): (N, D) and E of (N, D) -> (N, E) nats."""
    def chunk(final, *lenses):
        teacher = token_logp_all(model, final)
        return (torch.stack([kl(teacher, token_logp_all(model, h)) for h in lenses], dim=-1),)

    return in_chunks(chunk, model.config.vocab_size, teacher_h, *lens_h)[0]


def log_safe(kl_e: torch.Tensor, kappa: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. (4): log s and log (1 - s) of s_e = 2 (1 - sigmoid(kappa KL_e)) = 1 - tanh(kappa KL_e / 2), each like KL_e.

    log (1 - s) is -inf at KL = 0: an exit that changes nothing is always taken.
    """
    return math.log(2) + F.logsigmoid(-kappa * kl_e), torch.log(torch.tanh(kappa * kl_e / 2))


def log_target(kl_e: torch.Tensor, kappa: float) -> torch.Tensor:
    """Eq. (3): log q over the outcomes, stick-breaking of s: (N, E) -> (N, E+1)."""
    return stick_breaking(*log_safe(kl_e, kappa))


def distill_loss(token_kl: torch.Tensor, logp_exit: torch.Tensor, count: int) -> torch.Tensor:
    """Eq. (5): mean over positions of KL(student || teacher) - log pi(l*): (N,), (N,), the step's positions."""
    return (token_kl - logp_exit).sum() / count


def summary(distribution: torch.Tensor, outcomes: torch.Tensor) -> dict:
    """An exit distribution (E+1,) with its exit rate and layer savings, eq. (6)."""
    distribution = distribution.double().cpu()
    savings = 1 - (distribution * outcomes.cpu()).sum() / outcomes[-1].item()
    return {"distribution": [round(x, 5) for x in distribution.tolist()],
            "exit_rate": 1 - float(distribution[-1]), "layer_savings": float(savings)}


def hazards(p: torch.Tensor, depths: torch.Tensor, exits) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of p_e over the positions that reach exit e at given depths, and their number: (N, E) -> two (E,)."""
    reach = depths[:, None] >= torch.tensor(exits, device=depths.device)
    return (p * reach).sum(0), reach.sum(0)


def from_hazards(p: torch.Tensor) -> torch.Tensor:
    p = p.double().clamp(1e-12, 1 - 1e-12)
    return stick_breaking(p.log(), torch.log1p(-p)).exp()


@torch.no_grad()
def learned_exits(policy: Policy, rows: list[dict], kappa: float, seed: int, micro_batch: int) -> dict:
    """Exits that the student draws in a parallel pass on given responses, against the mean of q on those positions."""
    E = len(policy.exits)
    drawn, target, count = torch.zeros(E + 1), torch.zeros(E + 1), 0
    for i, _, batch in micro_batches(policy, rows, micro_batch):
        row, position = (index.cpu().numpy() for index in batch.where)
        u = torch.full((*batch.ids.shape, E), NEVER, dtype=torch.double, device=policy.device)
        u[batch.where] = uniforms((seed, HELD_OUT), row + i, position, E, policy.device)
        idx = policy.exit_idx(policy(batch.ids, batch.depths, u, source=batch.source).depths[batch.where])
        drawn += torch.bincount(idx, minlength=E + 1).cpu()
        target += log_target(lens_kl(policy.model, *teacher_pass(policy, batch)), kappa).exp().sum(0).cpu()
        count += len(idx)
    return {"positions": count, "learned": summary(drawn / count, policy.outcomes),
            "target": summary(target / count, policy.outcomes)}


def teacher_responses(run, policy: Policy, tokenizer, args) -> dict[str, list[dict]]:
    """The base model's own answers to `--responses` training and `--held-out` test prompts: sampled once at
    temperature 1, kept in teacher.jsonl, or taken from another run's file."""
    path = runs.Path(args.teacher) if args.teacher else run.folder / "teacher.jsonl"
    if args.teacher and not path.is_file():
        raise UserError(f"--teacher {path}: no such file; give the teacher.jsonl of an earlier run")
    kept: dict[str, list[dict]] = {"train": [], "test": []}
    if path.exists():
        for line in path.read_text("utf-8").splitlines(True):
            if line.endswith("\n"):  # a kill may have left half a line
                row = json.loads(line)
                kept[row["split"]].append(row)
    if args.teacher:
        return kept
    runs.write_text(path, "".join(json.dumps(row) + "\n" for rows in kept.values() for row in rows))
    for split, wanted in (("train", args.responses), ("test", args.held_out)):
        rows = kept[split]
        if len(rows) >= wanted:
            continue
        problems = tasks.load(args.task, split, data=args.data, n=wanted, seed=args.seed)
        prompts = runs.prompt_ids(problems, tokenizer, args.thinking)
        with tqdm(total=len(prompts), initial=len(rows), desc=f"teacher, {split}") as bar, adapters_off(policy):
            stride = 4 * (args.rows or 32)  # a kill loses at most so many, but the last rows of each wait for no others
            for i in range(len(rows), len(prompts), stride):
                got = generate(policy, prompts[i : i + stride], max_new_tokens=args.max_new_tokens,
                               eos_ids=tokenizer.eos_ids, depths=policy.n_layers, batch_size=args.rows, progress=bar,
                               seed=(args.seed, RESPONSES, split == "test"), first_row=i)
                fresh = [{"split": split, "id": problems[i + j].id, "prompt_ids": prompts[i + j],
                          "token_ids": got.tokens[j, : got.lengths[j]].tolist(), "finished": bool(got.finished[j])}
                         for j in range(len(got.lengths))]
                run.log("teacher.jsonl", fresh)
                rows += fresh
    return kept


def train_step(policy: Policy, rows: list[dict], step: int, args) -> dict:
    """Accumulates the gradient of eq. (5) over a step's sequences and returns what is logged."""
    count = args.draws * sum(len(row["token_ids"]) for row in rows)
    E, total = len(policy.exits), dict.fromkeys(("token_kl", "exit_cross_entropy"), 0.0)
    q_sum, learned, wanted, reached = (torch.zeros(n, device=policy.device) for n in (E + 1, E, E, E))
    for i, part, batch in micro_batches(policy, rows, args.micro_batch):
        teacher_h, lens_h = teacher_pass(policy, batch)
        kl_e = lens_kl(policy.model, teacher_h, lens_h)
        log_q = log_target(kl_e, args.kl_factor)
        row, position = (index.cpu().numpy() for index in batch.where)
        u = uniforms((args.seed, DEPTHS, step), row + i, position, args.draws, policy.device)
        depths = torch.cat([policy.outcomes[draw(log_q, u[:, n])] for n in range(args.draws)])
        student = batch_of(policy, part * args.draws)
        student.depths[student.where] = depths
        # (5) asks for no token's own probability, and each asked for costs one more product with the vocabulary.
        logp_exit, _, token_kl, exit_logits = score(
            policy, student._replace(tokens=None), teacher_h.repeat(args.draws, 1))
        distill_loss(token_kl, logp_exit, count).backward()

        total["token_kl"] += token_kl.sum().item() / count
        total["exit_cross_entropy"] -= logp_exit.sum().item() / count
        q_sum += args.draws * log_q.exp().sum(0)
        p_sum, reach = hazards(exit_logits.detach().sigmoid(), depths, policy.exits)
        learned, reached = learned + p_sum, reached + reach
        wanted += hazards(log_safe(kl_e, args.kl_factor)[0].exp().repeat(args.draws, 1), depths, policy.exits)[0]
    reached = reached.clamp(min=1)
    return {"loss": sum(total.values()), **total, "tokens": count, "target": summary(q_sum / count, policy.outcomes),
            "learned": summary(from_hazards(learned / reached), policy.outcomes),
            "hazard_learned": (learned / reached).tolist(), "hazard_target": (wanted / reached).tolist()}


def main() -> None:
    p = runs.parser(__doc__)
    p.add_argument("--kl-factor", type=float, default=1.0, help="kappa of (4): larger exits later (default: 1.0)")
    p.add_argument("--exit-every", type=int, help="layers between exits (default: 5, or 2 in models under 20 layers)")
    p.add_argument("--rank", type=int, help="of the LoRA adapters, 8 / 16; alpha is twice the rank")
    p.add_argument("--steps", type=int, help="120 / 200")
    p.add_argument("--batch-size", type=int, help="sequences in a step, 32 / 8")
    p.add_argument("--draws", type=int, default=1, help="depth samples of each sequence, in a pass that shares "
                   "its prompt (default: 1)")
    p.add_argument("--lr", type=float, help="peak learning rate (default: 0.25 / hidden size, for a logit sums "
                   "over the width)")
    p.add_argument("--responses", type=int, help="teacher responses to train on, 512 / 256")
    p.add_argument("--held-out", type=int, default=64, help="test prompts for the final comparison (default: 64)")
    p.add_argument("--teacher", help="teacher.jsonl of an earlier run, instead of sampling anew")
    p.add_argument("--save-every", type=int, default=50, help="steps between checkpoints (default: 50)")
    p.add_argument("--resume", help="folder of an interrupted run, which goes on under its own flags")
    args = p.parse_args()
    run = runs.Run.resume(args, "distill") if args.resume else None
    args = run.args if run else runs.settle(
        args, steps=(120, 200), batch_size=(32, 8), rank=(8, 16), responses=(512, 256))
    if args.kl_factor <= 0:
        raise UserError(f"--kl-factor {args.kl_factor}: must be above 0")

    model, tokenizer = runs.load_model(args)
    exits = exit_depths(model.config.num_hidden_layers, args.exit_every)
    run, policy, optimizer, start = runs.begin(run, "distill", args, model, lambda: Policy(model, exits, args.rank))
    print(f"{args.model}: {policy.n_layers} layers, exits {policy.exits}, {args.task}, thinking "
          f"{'on' if args.thinking else 'off'}, at most {args.max_new_tokens} new tokens -> {run.folder}")

    data = teacher_responses(run, policy, tokenizer, args)
    for split, rows in data.items():
        if not rows:
            raise UserError(f"no teacher responses for split '{split}': raise --responses and --held-out above 0")
    runs.warn_unfinished(sum(r["finished"] for r in data["train"]) / len(data["train"]), args)

    lr = args.lr or 0.25 / model.config.hidden_size
    for step in (bar := tqdm(range(start, args.steps), initial=start, total=args.steps, desc="distill")):
        rows = [data["train"][i] for i in runs.pick(len(data["train"]), args.batch_size, step, args.seed)]
        metrics = train_step(policy, rows, step, args)
        warm_down = min(1.0, (step + 1) / 10) * (1 - step / args.steps)
        metrics["grad_norm"] = run.apply_gradients(optimizer, lr * warm_down)
        run.log("metrics.jsonl", [{"step": step, **metrics}])
        rates = [metrics[name]["exit_rate"] for name in ("learned", "target")]
        bar.set_postfix_str(f"token KL {metrics['token_kl']:.3f}  exit CE {metrics['exit_cross_entropy']:.3f}  "
                            f"exit rate {rates[0]:.1%} (target {rates[1]:.1%})")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            run.save(step + 1, policy, optimizer)

    held_out = learned_exits(policy, data["test"], args.kl_factor, args.seed, args.micro_batch)
    run.complete(held_out)
    print(f"held-out responses, {held_out['positions']} positions:")
    for name in ("target", "learned"):
        s = held_out[name]
        shares = "  ".join(f"{d}: {x:.1%}" for d, x in zip(policy.outcomes.tolist(), s["distribution"], strict=True))
        print(f"  {name:8} exit rate {s['exit_rate']:.1%}  layer savings {s['layer_savings']:.1%}   {shares}")
    print(f"next: python rloo.py --lam 0.1    (continues from {run.folder})")


if __name__ == "__main__":
    runs.run_main(main)
