"""Rollouts as stage 2 takes them: sampled exits and tokens, shared prompts, rows that end and are replaced.

    python bench/rollout.py --model FOLDER            a checkpoint, also transformers' generate where installed
    python bench/rollout.py --prompts 32 --samples 8 --rows 64

Heads are set so that every outcome, each exit and the full depth, is equally likely. "ragged" responses end halfway
in the mean (at random ids; the same random numbers in every arm, so the same tokens), the others run to the last token.
"""

from statistics import median

import torch
from common import interleaved, load, machine, parser, peer, report

import runs
from exits import Policy, Response, adapters_off
from fast.cache import row_bytes
from sample import generate


def uniform_heads(policy: Policy) -> None:
    """Exit e of E is taken with probability 1 / (E + 1 - e) by who reaches it: all E + 1 outcomes equally often."""
    E = len(policy.exits)
    with torch.no_grad():
        policy.heads.weight.zero_()
        policy.heads.bias.copy_(torch.logit(1 / (E + 1 - torch.arange(E))))


def ending_halfway(responses: list[Response]) -> list[int]:
    """Random ids that end responses, sampled without an end, after half of their T tokens in the mean, or few more."""
    tokens = torch.tensor([r.token_ids for r in responses])  # (R, T)
    ends, ids, kept, misses = torch.zeros_like(tokens, dtype=torch.bool), tokens.unique(), [], 0
    ends[:, -1] = True
    for i in ids[torch.randperm(len(ids))].tolist():
        more = ends | (tokens == i)
        if (more.int().argmax(1) + 1.0).mean() >= tokens.shape[1] / 2:
            kept.append(i)
            ends, misses = more, 0
        elif (misses := misses + 1) == 20:  # of tens of thousands, any one of which may shorten them by a token
            break
    return kept


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--prompts", type=int, default=8, help="(default: 8)")
    p.add_argument("--samples", type=int, default=4, help="G, of each prompt (default: 4)")
    p.add_argument("--context", type=int, default=128, help="prompt tokens (default: 128)")
    p.add_argument("--new", type=int, default=32, help="tokens of a response at most (default: 32)")
    p.add_argument("--rows", type=int, default=16, help="responses in the cache at a time (default: 16)")
    args = p.parse_args()
    policy = load(args)
    uniform_heads(policy)
    model, G = policy.model, args.samples
    prompts = torch.randint(5, model.config.vocab_size, (args.prompts, args.context))
    rows = prompts.tolist()
    eos = ending_halfway(generate(policy, rows, samples=G, max_new_tokens=args.new, eos_ids=[-1], rows=args.rows))
    produced = {}

    def sample(name, prompts=rows, at_a_time=None, base=False, **changes):
        options = dict(samples=G, max_new_tokens=args.new, eos_ids=[-1], rows=args.rows) | changes
        stride, tokens, layers = at_a_time or len(prompts), 0, 0
        with adapters_off(policy, base):
            for i in range(0, len(prompts), stride):
                got = generate(policy, prompts[i : i + stride], first_response=i * options["samples"], **options)
                tokens, layers = tokens + sum(map(len, got)), layers + sum(sum(r.depths) for r in got)
        produced[name] = tokens, layers / tokens

    size = max(1, args.rows // G)
    settings = {
        "full depth": dict(depths=policy.n_layers), "full depth, adapters off": dict(depths=policy.n_layers, base=True),
        "exits": {}, "exits, adapters off": dict(base=True),
        "exits, prompts not shared": dict(prompts=[row for row in rows for _ in range(G)], samples=1),
        "ragged": dict(eos_ids=eos), "ragged, batch after batch": dict(eos_ids=eos, at_a_time=size),
    }
    arms = {name: (lambda name=name, options=options: sample(name, **options)) for name, options in settings.items()}
    theirs, note = peer(args)
    if theirs is not None:
        def generate_theirs():
            for i in range(0, len(rows), size):
                part = prompts[i : i + size].to(args.device)
                theirs.generate(part, attention_mask=torch.ones_like(part), do_sample=True, top_k=0, top_p=1.0,
                                num_return_sequences=G, max_new_tokens=args.new, min_new_tokens=args.new,
                                pad_token_id=0)
            produced["transformers"] = len(rows) * G * args.new, float(policy.n_layers)

        arms["transformers"] = generate_theirs
    cached = row_bytes(model.config, args.context + args.new - 1, model.lm_head.weight)
    print(f"{args.model or args.shape}, {policy.n_layers} layers, exits {policy.exits}; {note}; {machine(args)}\n"
          f"{args.prompts} prompts of {args.context} tokens x {G}, at most {args.new} new, {args.rows} rows: cache "
          f"{args.rows} x {cached / 2**20:.1f} MiB")
    seconds = interleaved(arms, args.repeats, args.device)
    record = {}
    for name, values in seconds.items():
        tokens, depth = produced[name]
        record[name] = {"tokens": tokens, "mean_depth": depth, "tokens_per_s": tokens / median(values)}
        print(f"  {name:28}{tokens:>7} tokens, depth {depth:>5.1f}{tokens / median(values):>9.1f} tokens/s")
    report(args, {"results": record})


if __name__ == "__main__":
    runs.run_main(main)
