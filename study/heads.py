"""Is it the heads that hold a calibration back? New heads are fitted to a stage-1 run's frozen streams.

The adapters stay as they are. Heads of each width are fitted to the run's own targets, at depths drawn from q, and take
the old ones' place. Where they do better, the old ones' shape, rate or steps were what was missing; where they don't,
the responses to fit to may be too few. Writes heads.json.

    python -m study.heads RUN --widths 0 256
"""

import hashlib
from pathlib import Path

import torch
from tqdm import trange

import runs
from checkpoints import load_policy
from data.hub import field
from distill import base_target, exit_cross_entropy, held_out, student_target
from evaluate import paired
from exits import ExitHeads, Policy, Response, base_pass, micro_batches
from flags import whole
from sample import HELD_OUT, uniforms
from study import common
from study.common import answers, base_answers, correct, point
from teacher import read_responses

EPOCHS, BATCH, LR = 25, 512, 2e-3  # Adam's; the rate falls to 0


@torch.no_grad()
def streams(policy: Policy, responses: list[Response], kappa: float, seed: int, micro_batch: int, target):
    """What heads are fitted to, of N predicting positions: streams at the exits (N, E, D), s of (4) (N, E) and depths
    drawn from q (N,), all on the host: N x E x D numbers of the model's dtype."""
    found = []
    for index, batch in micro_batches(policy, responses, micro_batch):
        u = uniforms((seed, HELD_OUT), index[batch.row], batch.position, len(policy.exits))
        _, p_safe, depths, batch = target(policy, batch, *base_pass(policy, batch), kappa, u)
        out = policy(batch.ids, batch.depths, place=batch.place)
        found.append((torch.stack([h[batch.predicting] for h in out.at_exits], 1).cpu(),
                      p_safe.cpu(), depths))
    return [torch.cat(part) for part in zip(*found, strict=True)]


def fitted(policy: Policy, width: int, h: torch.Tensor, p_safe: torch.Tensor, depths: torch.Tensor) -> ExitHeads:
    """Heads of a width after EPOCHS passes over the streams (N, E, D), with exit_cross_entropy as the loss."""
    torch.manual_seed(0)
    heads = ExitHeads(h.shape[1], h.shape[2], width, policy.heads.eps, "cpu")
    optimizer = torch.optim.Adam(heads.parameters(), LR)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, EPOCHS)
    for _ in trange(EPOCHS, desc=f"heads of width {width}"):
        for i in torch.randperm(len(h)).split(BATCH):
            logits = torch.stack([heads(h[i, e], e) for e in range(h.shape[1])], -1)
            optimizer.zero_grad()
            exit_cross_entropy(logits, p_safe[i], depths[i], policy.exits).mean().backward()
            optimizer.step()
        falling.step()
    return heads.requires_grad_(False).to(policy.device)


def main() -> None:
    def more(p):
        p.add_argument("run", type=Path, help="a stage-1 run")
        p.add_argument("--widths", nargs="*", type=whole(0), default=[0, 256], help="of new heads (default: 0 256)")
        p.add_argument("--responses", type=whole(1), default=400, help="base responses to fit to (default: 400)")

    args = common.arguments(__doc__, more)
    config = runs.read_config(common.about_the_same(args, args.run))
    runs.refuse_stage(config, args.run, "distill")
    seed, kappa = (field(config["args"], name, kind, args.run / "config.json")
                   for name, kind in (("seed", int), ("kl_factor", float)))
    forward_kl, student_lens = (field(config["args"], name, bool, args.run / "config.json", default=False)
                                for name in ("forward_kl", "student_lens"))  # older runs have neither
    target = student_target if student_lens else base_target
    model, _ = runs.load_model(args)
    policy = load_policy(model, args.run)
    kept = read_responses(args.run / "teacher.jsonl", model, args)
    trained_width = policy.heads.hidden
    chosen = kept["train"][: args.responses]
    to_fit = streams(policy, chosen, kappa, seed, args.micro_batch, target)
    rows, before = [], None
    for width in [None, *args.widths]:
        heads = policy.heads if width is None else fitted(policy, width, *to_fit)

        def replaced(to: Policy, heads=heads) -> dict:
            to.heads = heads
            return {}

        replaced(policy)
        # The mark tells them from heads that were fitted otherwise.
        mark = hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in heads.parameters())).hexdigest()[:8]
        answered = answers(args, args.run, "learned" if width is None else f"heads {width} {mark}", replaced)
        measured = held_out(policy, kept["test"], kappa, seed, args.micro_batch, forward_kl, target)
        right = correct(answered)
        gained = dict(zip(("gained", "gained_half"), paired(before, right), strict=True)) if before else {}
        before = right
        rows.append(point(args, answered, width=width, **gained, **{name: measured[name] for name in (
            "exit_cross_entropy", "token_kl", "token_kl_at_own_exits", "intact", "intact_at_half")}))
    common.save(args, "heads", "heads", run=str(args.run), trained_width=trained_width, responses=len(chosen),
                positions=len(to_fit[0]), base=point(args, base_answers(args)), rows=rows)


if __name__ == "__main__":
    runs.run_main(main)
