"""Does time follow depth? Decoding at prescribed depths, against the bare matrix products and transformers.

    python bench/decode.py --model FOLDER --batch 1 16        a checkpoint, also in transformers where installed
    python bench/decode.py --shape qwen3-4b --batch 1 64      random weights
    python bench/decode.py --grow                             how a token's cost grows with batch and context, from a
                                                              cache that is declared full: no prompt is read

One run, interleaved, medians; every arm decodes greedily and never ends early. A figure is (time of N + 1 tokens minus
time of 1) / N, so the prompt's pass doesn't count. Ideal = head(B) + the sum over layers of layer(rows that run it),
bare products timed in the same rounds: by F.linear, the framework's own, and by our `linear`. Attention, norms,
sampling and the exit heads are what an efficiency below 1 pays for. Above 1 it means that the reference products are
slower than ours, which is why both are shown.
"""

from statistics import median

import torch
from common import (
    bandwidth,
    bare_head,
    bare_layers,
    interleaved,
    layer_weights,
    load,
    machine,
    parser,
    peer,
    report,
)

import runs
import sample
from exits import Policy, adapters_off
from fast.cache import Cache
from fast.graphs import Graphs


@torch.no_grad()
def plain_decode(policy: Policy, prompts: torch.Tensor, new: int) -> torch.Tensor:
    """Greedy decoding without any of the exits' machinery: the same blocks and cache, and nothing around them."""
    model = policy.model
    B, T = prompts.shape
    cache = Cache(model.config, B, T + new, 1, model.lm_head.weight, Graphs() if model.graphs else None)
    sample.prefill(policy, prompts.tolist(), cache, torch.arange(B)[:, None])
    token, out = prompts[:, -1], []
    for _ in range(new):
        h = cache.run(model, model.embed(token[:, None]), 0, range(policy.n_layers), torch.ones(B, 1, dtype=torch.bool))
        cache.end(h)
        token = model.unembed(h[:, 0]).argmax(-1)
        out.append(token)
    return torch.stack(out, 1)


def arms_of(policy: Policy, theirs, prompts: torch.Tensor, depths: dict) -> dict:
    """Name -> function of a number of tokens. `depths`: name -> what generate takes, or None to draw them."""
    rows = prompts.tolist()

    def ours(wanted):
        def run(n):
            given = wanted[:, :n] if isinstance(wanted, torch.Tensor) else wanted
            with adapters_off(policy):
                sample.generate(policy, rows, max_new_tokens=n, eos_ids=[-1], temperature=0, depths=given,
                                rows=len(rows))
        return run

    def plain(n):
        with adapters_off(policy):
            plain_decode(policy, prompts, n)

    arms = {"no exits, plain loop": plain}
    arms |= {name: ours(wanted) for name, wanted in depths.items()}
    if theirs is not None:
        arms["transformers"] = lambda n: theirs.generate(
            prompts, max_new_tokens=n, min_new_tokens=n, do_sample=False, attention_mask=torch.ones_like(prompts),
            pad_token_id=0)
    return arms


def measure(policy: Policy, theirs, batch: int, context: int, new: int, args) -> dict:
    model, L = policy.model, policy.n_layers
    prompts = torch.randint(5, model.config.vocab_size, (batch, context), device=args.device)
    depth_of_outcome = policy.depth_of_outcome.tolist()
    fixed = [min(depth_of_outcome[:-1], key=lambda d, share=share: abs(d - share * L)) for share in (0.25, 0.5, 0.75)]
    mix = torch.tensor(depth_of_outcome)[torch.randint(len(depth_of_outcome), (batch, new + 1))]
    mix[:, 0] = L  # not counted: it meets, and captures, every segment
    Graphs.SLOTS = 2**20  # so that no capture is due later
    depths = {"never firing": None, "depths = L": L} | {f"all at {d} of {L}": d for d in sorted(set(fixed))}
    depths |= {"random mix": mix}
    arms = arms_of(policy, theirs, prompts, depths)
    timed = {(name, n): (lambda run=run, n=n: run(n)) for name, run in arms.items() for n in (1, new + 1)}
    counts = {name: rows_per_layer(wanted, batch, new, policy) for name, wanted in depths.items()}
    counts |= {name: [[batch] * L] for name in arms if name not in counts}
    sizes = sorted({n for steps in counts.values() for step in steps for n in step} - {0})
    for own in (False, True):
        timed |= {("layers", n, own): bare_layers(model, n, own) for n in sizes}
        timed["head", own] = bare_head(model, batch, own)
    seconds = interleaved(timed, args.repeats, args.device)

    def ideal(name, own):
        layer = {0: 0.0} | {n: median(seconds["layers", n, own]) / L for n in sizes}
        return median(seconds["head", own]) + sum(layer[n] for step in counts[name] for n in step) / len(counts[name])

    reference = None
    weight = sum(w.numel() * w.element_size() for w in layer_weights(model.model.layers[0]))
    head = model.lm_head.weight.numel() * model.lm_head.weight.element_size()
    slot = 2 * model.config.num_key_value_heads * model.config.head_dim * model.lm_head.weight.element_size()
    result = {}
    for name in arms:
        step = median([a - b for a, b in zip(seconds[name, new + 1], seconds[name, 1], strict=True)]) / new
        reference = reference or step
        deep = sum(sum(step) for step in counts[name]) / len(counts[name]) / batch
        ran = sum(sum(n > 0 for n in step) for step in counts[name]) / len(counts[name])
        moved = head + ran * weight + deep * batch * slot * (context + new / 2)
        result[name] = {"ms_per_step": 1e3 * step, "tokens_per_s": batch / step, "mean_depth": deep,
                        "L_over_depth": L / deep, "speedup": reference / step,
                        "efficiency_F_linear": ideal(name, False) / step, "efficiency_own": ideal(name, True) / step,
                        "GB_per_s": moved / step / 1e9, "share_of_bandwidth": moved / step / args.bandwidth}
    return result


def rows_per_layer(wanted, batch: int, new: int, policy: Policy) -> list[list[int]]:
    """How many rows run each layer, at every counted step."""
    L = policy.n_layers
    if not isinstance(wanted, torch.Tensor):
        return [[batch * ((wanted or L) > layer) for layer in range(L)]]
    return [[int((wanted[:, t] > layer).sum()) for layer in range(L)] for t in range(1, new + 1)]


def show(title: str, result: dict) -> None:
    print(f"\n{title}\n{'':22}{'tok/s':>9}{'ms/step':>9}{'depth':>7}{'L/depth':>9}{'speedup':>9}"
          f"{'eff. F.linear':>15}{'eff. own':>10}{'GB/s':>7}{'of bandwidth':>14}")
    for name, m in result.items():
        print(f"{name:22}{m['tokens_per_s']:>9.1f}{m['ms_per_step']:>9.1f}{m['mean_depth']:>7.1f}"
              f"{m['L_over_depth']:>9.2f}{m['speedup']:>9.2f}{m['efficiency_F_linear']:>15.2f}"
              f"{m['efficiency_own']:>10.2f}{m['GB_per_s']:>7.1f}{m['share_of_bandwidth']:>14.0%}")


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="rows decoded at once (default: 1 16)")
    p.add_argument("--context", type=int, nargs="+", default=[128], help="prompt tokens (default: 128)")
    p.add_argument("--new", type=int, default=24, help="tokens decoded and counted (default: 24)")
    p.add_argument("--grow", action="store_true", help="sweep batch 1..64 and context 256..4096")
    args = p.parse_args()
    policy = load(args)
    with torch.no_grad():
        policy.heads.bias.fill_(-1e9)  # "never firing" evaluates the heads and draws
    theirs, note = (None, "no prompts are read") if args.grow else peer(args)
    args.bandwidth = bandwidth(args.device)
    print(f"{args.model or args.shape}, {policy.n_layers} layers, exits {policy.exits}; {note}; {machine(args)}; "
          f"one read of 1 GiB: {args.bandwidth / 1e9:.1f} GB/s")
    cases = [(batch, context) for batch in args.batch for context in args.context]
    if args.grow:
        sample.prefill = lambda policy, prompts, cache, rows: cache.admit(
            rows, torch.tensor([len(p) - 1 for p in prompts]))
        cases = [(batch, 256) for batch in (1, 4, 16, 64)] + [(4, context) for context in (1024, 4096)]
    record = {}
    for batch, context in cases:
        result = measure(policy, theirs, batch, context, args.new, args)
        record[f"batch {batch}, context {context}"] = result
        show(f"batch {batch}, context {context}, {args.new} tokens, {args.repeats} repeats", result)
    report(args, {"results": record})


if __name__ == "__main__":
    runs.run_main(main)
