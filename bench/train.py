"""A stage-1 step against the same loss written with transformers + peft, the cost of its parts, and its memory.

    python bench/train.py --model FOLDER                       step, parts, adapters; a checkpoint
    python bench/train.py --shape qwen3-4b --batch 8 --length 2048
    python bench/train.py --shape qwen3-4b --layers 8 --exit-every 1 --memory 256 1024    targets and loss alone

Both sides run the same sequences with depths = L and heads on: the base model's pass, its lenses' KL at every exit, the
student's pass, KL and exit cross-entropy, backward. Every position counts as a token. FLOPs are 2 per parameter and
token in a forward pass; with adapters on a frozen base the backward pass has 2 more (no weight gradients), 2 more again
with recomputation: (2 + 2 + 2) N of the body a step, and (E + 4) 2 V D of the vocabulary (base and E lenses, student
and base again, one product backward). MFU is against the best square matrix product measured in the same run.
"""

import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from common import interleaved, load, machine, parser, peer, report, synchronise

import distill
import runs
from exits import (
    PROJECTIONS,
    ExitHeads,
    Policy,
    Response,
    adapters_off,
    base_pass,
    collate,
    joint_logp,
    score,
    stick_breaking,
)
from fast.linear import linear

NEVER_SAFE = 1e9  # a KL factor at which no exit is ever the target: depths = L


def peft_step(model, heads, exits, ids, first: int):
    """The same loss with transformers and peft: log-probabilities of positions first.. of ids (B, T)."""
    body, head = model.base_model.model.model, model.base_model.model.lm_head

    def logp(h):
        return torch.log_softmax(head(h).float(), -1)

    with torch.no_grad(), model.disable_adapter():
        out = body(ids, output_hidden_states=True)
        teacher = logp(out.last_hidden_state[:, first:])
        lens = [logp(body.norm(out.hidden_states[e][:, first:])) for e in exits]
        kl_e = torch.stack([(teacher.exp() * (teacher - one)).sum(-1) for one in lens], -1)
        distill.log_target(kl_e, NEVER_SAFE)
    out = body(ids, output_hidden_states=True)
    student = logp(out.last_hidden_state[:, first:])
    token_kl = (student.exp() * (student - teacher)).sum(-1)
    z = torch.stack([heads(out.hidden_states[e][:, first:], i) for i, e in enumerate(exits)], -1)
    logp_exit = stick_breaking(F.logsigmoid(z), F.logsigmoid(-z))[..., -1]
    loss = (token_kl - logp_exit).mean()
    loss.backward()
    return loss.item()


def peft_model(args, rank: int):
    theirs, note = peer(args)
    if theirs is None:
        return None, note
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return None, "peft is not installed"
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(PROJECTIONS))
    return get_peft_model(theirs, lora), note + " + peft"


def steps(policy: Policy, args) -> None:
    model, E, L = policy.model, len(policy.exits), policy.n_layers
    V, D, T, B = model.config.vocab_size, model.config.hidden_size, args.length, args.batch
    prompts = torch.randint(5, V, (B, 2)).tolist()
    tokens = torch.randint(5, V, (B, T - 1)).tolist()
    depth_of_outcome = policy.depth_of_outcome.tolist()

    def responses(depths):
        return [Response(p, t, depths) for p, t in zip(prompts, tokens, strict=True)]

    full, mixed = (collate(responses(depths), L, args.device)
                   for depths in ([L] * (T - 1), [depth_of_outcome[i % (E + 1)] for i in range(T - 1)]))
    losses = {}

    def ours():
        losses["ours"] = distill.train_step(policy, responses([L] * (T - 1)), step=0, kappa=NEVER_SAFE, seed=0,
                                            micro_batch=B)["loss"]

    @torch.no_grad()
    def forward(batch=full):
        policy(batch.ids, batch.depths, place=batch.place)

    def forward_base():
        with adapters_off(policy):
            forward()

    def update(batch):
        logp_exit, logp_token, *_ = score(policy, batch)
        (logp_exit + logp_token).sum().backward()

    arms = {"stage-1 step": ours, "  base's pass": lambda: base_pass(policy, full),
            "  forward, adapters off": forward_base, "  forward, adapters on": forward,
            "score + gradient, all at L": lambda: update(full), "score + gradient, mixed depths": lambda: update(mixed)}
    theirs, note = peft_model(args, policy.rank)
    if theirs is not None:
        heads = ExitHeads(E, D, 0, model.config.rms_norm_eps, args.device)

        def peft():
            losses["peft"] = peft_step(theirs, heads, policy.exits, full.ids, full.ids.shape[1] - (T - 1))

        arms["transformers + peft step"] = peft
    print(f"\n{B} sequences of {T} positions, E = {E}; {note}")
    seconds = {name: median(values) for name, values in interleaved(arms, args.repeats, args.device).items()}
    body = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and "lora" not in name)
    positions = B * T
    flops = positions * ((6 + 2 * model.recompute) * body + (E + 4) * 2 * V * D)
    peak = matmul_flops(model.lm_head.weight)
    for name, value in seconds.items():
        print(f"  {name:32}{1e3 * value:>10.0f} ms{positions / value:>10.0f} tokens/s")
    first = seconds["stage-1 step"]
    print(f"  stage-1 step: {flops / first / 1e9:.0f} GFLOP/s, MFU {flops / first / peak:.0%} of {peak / 1e9:.0f}; "
          f"adapters add {seconds['  forward, adapters on'] / seconds['  forward, adapters off'] - 1:.0%} to a forward "
          f"pass; mean depth {float(mixed.depths.float().mean()):.1f} of {L} scores "
          f"{seconds['score + gradient, all at L'] / seconds['score + gradient, mixed depths']:.2f} times as fast")
    if "peft" in losses:
        print(f"  {seconds['transformers + peft step'] / first:.2f} times transformers + peft; losses "
              f"{losses['ours']:.6f} and {losses['peft']:.6f} (their adapters start at zero too)")
    report(args, {"seconds": seconds, "flops": flops, "peak_flops": peak, "losses": losses})


def matmul_flops(like: torch.Tensor) -> float:
    n = 8192 if like.is_cuda else 1536
    a, b = (torch.randn(n, n, dtype=like.dtype, device=like.device) for _ in range(2))
    return 2 * n**3 / min(interleaved({"product": lambda: linear(a, b)}, 5, str(like.device))["product"])


def memory(policy: Policy, args) -> None:
    """Peak memory of targets and loss above what was there, at several numbers of positions, and a naive check."""
    model, record = policy.model, {}
    D, V, E = model.config.hidden_size, model.config.vocab_size, len(policy.exits)

    def inputs(n):
        h = [torch.randn(n, D, device=args.device, dtype=model.lm_head.weight.dtype) for _ in range(E + 2)]
        return h[0].requires_grad_(), h[1], h[2:], torch.zeros(n, E, device=args.device)

    def targets_and_loss(h, base_h, lens_h, z):
        kl_e = distill.lens_kl(model, base_h, lens_h)
        depths = torch.full((len(h),), policy.n_layers)
        logp_exit, _, token_kl = joint_logp(policy, h, z, depths, None, base_h)
        distill.distill_loss(token_kl, -logp_exit, len(h)).backward()
        return kl_e, token_kl, h.grad

    for n in sorted(args.memory):
        given = inputs(n)
        before = reset_peak(args.device)
        start = time.perf_counter()
        targets_and_loss(*given)
        synchronise(args.device)
        record[n] = {"GiB_above": current_peak(args.device) - before, "seconds": time.perf_counter() - start}
        print(f"  {n:>6} positions, V = {V}, E = {E}, D = {D}: {record[n]['GiB_above']:.2f} GiB above inputs and "
              f"weights, {record[n]['seconds']:.0f} s", flush=True)

    h, base_h, lens_h, z = inputs(16)
    ours = targets_and_loss(h, base_h, lens_h, z)
    with torch.enable_grad():
        plain = h.detach().requires_grad_()
        p, q, *lens = (torch.log_softmax(F.linear(model.model.norm(x), model.lm_head.weight).float(), -1)
                       for x in (plain, base_h, *lens_h))
        kl_e = torch.stack([(q.exp() * (q - one)).sum(-1) for one in lens], -1)
        token_kl = (p.exp() * (p - q)).sum(-1)
        token_kl.mean().backward()
    for name, a, b in zip(("lens KL", "token KL", "gradient"), ours, (kl_e, token_kl, plain.grad), strict=True):
        record[name] = float(((a - b).abs().max() / b.abs().max()).detach())
        print(f"  {name}: relative difference to the naive tables {record[name]:.1e}")
    report(args, record)


def reset_peak(device: str) -> float:
    """Starts a new high-water mark and returns what is in use, in GiB."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def current_peak(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else status("VmHWM")


def status(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**20


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--batch", type=int, default=4, help="sequences in a step (default: 4)")
    p.add_argument("--length", type=int, default=128, help="positions of a sequence (default: 128)")
    p.add_argument("--recompute", action="store_true", help="activation checkpointing")
    p.add_argument("--memory", type=int, nargs="+", metavar="POSITIONS", help="measure targets and loss alone")
    args = p.parse_args()
    policy = load(args)
    policy.model.recompute = args.recompute
    print(f"{args.model or args.shape}, {policy.n_layers} layers, exits {policy.exits}; {machine(args)}")
    memory(policy, args) if args.memory else steps(policy, args)


if __name__ == "__main__":
    runs.run_main(main)
