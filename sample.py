"""Sampling from the policy: random numbers fixed by seed, response and position, and one loop that decodes many
responses.

    admit     waiting prompts enter free rows of the cache; a prompt's samples, or some of them, share its pass
    compact   when no prompt waits and half of the rows are empty, the cache shrinks; not with graphs, which read its
              tensors: their empty rows cost less than new captures
    step      one pass of Policy.forward over the rows' last tokens, which draws a depth for each; then a token
    record    both, with their log-probabilities, go to the response; an eos or the length limit frees its row

Shapes: R rows of the cache, n of them live, E exits, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

import parallel
from data.hub import UserError
from exits import Policy, Response, adapters_rounded, logp_depth, token_logp_all
from fast.cache import Cache, fitting_rows
from fast.chunks import in_chunks
from fast.graphs import Graphs
from fast.packing import Sequences, send

PREFILL = 2**14  # prompt tokens in one pass: an MLP's activations for all of them would outgrow the cache
# What tells draws of one run seed apart, as the `seed` of `uniforms`; recorded runs hang on these numbers. Stage 1:
# (seed, RESPONSES, test split?), (seed, DEPTHS, step), (seed, HELD_OUT); stage 2: (seed, step); evaluate.py, study/ and
# bench/: (seed,); monitor.py: those of study/regimes.py.
RESPONSES, DEPTHS, HELD_OUT = range(3)
NEVER = 2.0  # in place of a uniform number: no probability exceeds it, so it never stops


def uniforms(seed: Sequence[int], responses, positions, count: int) -> torch.Tensor:
    """Uniform numbers in [0, 1) that depend only on (seed, response, position, index), never on the batch around them.

    A response is its number among all of a step's. responses and positions broadcast against each other to some shape;
    returns float64 of that shape + (count,). SplitMix64's finaliser (Steele et al. 2014), once each for the seed's
    parts, response, position and index.
    """
    def mix(x):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    key = np.uint64(0)
    responses, positions = np.asarray(responses)[..., None], np.asarray(positions)[..., None]
    with np.errstate(over="ignore"):
        for part in (*seed, responses, positions, np.arange(count)):
            key = mix((key ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15))
    return torch.from_numpy((key >> np.uint64(11)) * 2.0**-53)


def draw(logp_all: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Inverse-CDF samples (N,) of log-probabilities (N, V) at uniforms u (N,); sums in float64: V can be 150,000."""
    cdf = logp_all.exp().cumsum(-1, dtype=torch.double)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(max=logp_all.shape[-1] - 1)


def draw_token(policy: Policy, h: torch.Tensor, u: torch.Tensor, temperature: float):
    """Tokens (n,) and their log-probabilities (n,) from streams (n, D) at uniforms u (n,); argmax at temperature 0."""
    def chunk(h, u):
        logp_all = token_logp_all(policy.model, h, temperature)
        tokens = draw(logp_all, u) if temperature else logp_all.argmax(-1)
        return tokens, logp_all.gather(-1, tokens[:, None])[:, 0]

    return in_chunks(chunk, policy.model.config.vocab_size, h, u)


def prefill(policy: Policy, prompts: list[list[int]], cache: Cache, rows: torch.Tensor, u=None, delta=0.0) -> None:
    """Runs each prompt but for its last token at full depth, once for all the cache rows (P, G) that continue it. The
    last one predicts the first token of the response, so it may exit: the first step runs it. With uniform numbers
    u (P, T, E) the others may, too."""
    length = torch.tensor([len(prompt) - 1 for prompt in prompts])
    at_once = max(1, PREFILL // max(1, int(length.max())))
    for i in range(0, len(prompts), at_once):
        part, size = prompts[i : i + at_once], length[i : i + at_once, None]
        if size.max() == 0:
            continue
        ids = torch.zeros(len(part), int(size.max()), dtype=torch.long)
        for b, prompt in enumerate(part):
            ids[b, : len(prompt) - 1] = torch.tensor(prompt[:-1])
        place = Sequences(ids.shape, cache=cache, rows=send(rows[i : i + at_once], policy.device))
        present, ids = torch.arange(ids.shape[1]) < size, send(ids, policy.device)
        if u is None:
            place.run(policy.model, policy.model.embed(ids), 0, range(policy.n_layers), present)
        else:
            policy(ids, policy.n_layers * present, u[i : i + at_once, : ids.shape[1]], delta, place)
    cache.admit(rows, length)


def samples_per_prefill(samples: int, prompts: int, rows: int) -> int:
    """How many samples of a prompt share the pass that fills the cache with it: all, where every response has a row;
    else a divisor of `samples` of at most an eighth of the rows, since a group's rows must be free at once, and a
    large group would wait for its slowest response."""
    if samples * prompts <= rows:
        return samples
    return max(d for d in range(1, samples + 1) if samples % d == 0 and (8 * d <= rows or d == 1))


def refuse_prompts(prompts: list[list[int]], config, max_new_tokens: int, names: Sequence[str] | None = None) -> None:
    """Raises UserError for a prompt that is empty, leaves no room in the context or holds an id beyond the vocabulary;
    `names`: what to call each (default: prompt 0, 1, ...)."""
    for i, prompt in enumerate(prompts):
        name = names[i] if names else f"prompt {i}"
        if not 0 < len(prompt) <= config.max_position_embeddings - max_new_tokens:
            raise UserError(f"{name} has {len(prompt)} tokens: it must have one at least, and leave room for "
                            f"--max-new-tokens {max_new_tokens} in the model's context of "
                            f"{config.max_position_embeddings}; shorten either")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise UserError(f"{name} has ids from {min(prompt)} to {max(prompt)}, and the model a vocabulary of "
                            f"{config.vocab_size}: encode it with the model's own tokenizer")


def prescribed(policy: Policy, depths, shape: tuple[int, int]) -> torch.Tensor:
    """generate's `depths`, a row a response."""
    depths = torch.as_tensor(depths)
    if depths.dim() and depths.shape != shape:
        raise UserError(f"prescribed depths {tuple(depths.shape)}: must be one number, or {shape}")
    if not torch.isin(depths, policy.depth_of_outcome).all():
        raise UserError(f"prescribed depths must be among {policy.depth_of_outcome.tolist()}")
    return depths.expand(shape)


@torch.no_grad()
def generate(policy: Policy, prompts: list[list[int]], *, samples: int = 1, max_new_tokens: int,
             eos_ids: Sequence[int], temperature: float = 1.0, delta: float = 0.0, threshold=None, depths=None,
             prompt_exits: bool = False, seed: Sequence[int] = (0,), first_response: int = 0,
             rows: int | None = None, progress=None) -> list[Response]:
    """`samples` responses to each prompt, prompt by prompt.

    Exits are drawn with offset `delta`; or, with a `threshold`, taken where p_e exceeds it, without chance; or `depths`
    prescribes them: an int for every token that is generated, or one row of max_new_tokens depths a response. With
    `prompt_exits` the prompt's tokens exit as well, by draw or threshold, which no training has met. Response r's
    randomness is that of (seed, first_response + r, position), so neither `rows` nor the other prompts change it, but
    by rounding. At most `rows` responses are in the cache at a time (default: what fits in half of the free memory).
    `progress`, a tqdm bar, counts ended responses. Raises UserError for a prompt that is empty, leaves no room in the
    model's context or holds an id beyond its vocabulary, for depths that no outcome has or that are of another shape,
    and where a log-probability is not finite.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens}: must be at least 1")
    refuse_prompts(prompts, policy.model.config, max_new_tokens)
    if not prompts:  # as where a step has fewer of them than there are processes
        return []
    L, E = policy.n_layers, len(policy.exits)
    responses, eos_ids = [Response(prompt) for prompt in prompts for _ in range(samples)], frozenset(eos_ids)
    if depths is not None:
        depths = prescribed(policy, depths, (len(responses), max_new_tokens))

    def dice(number, positions):
        # The token's die comes first, so that a full-depth response does not depend on where exits would be.
        u = uniforms(seed, first_response + number, positions, 1 + E)
        if threshold is not None:
            u[..., 1:] = threshold  # a coin stops where u < p: so here wherever p > threshold
        return u

    longest = max(len(prompt) for prompt in prompts)
    slots = longest - 1 + max_new_tokens
    weight = policy.model.lm_head.weight
    rows = rows or fitting_rows(policy.model.config, slots, weight)
    # A prompt that exits does so by each response's own dice.
    group = 1 if prompt_exits else samples_per_prefill(samples, len(prompts), rows)
    groups = [prompt for prompt in prompts for _ in range(samples // group)]
    R = group * min(len(groups), rows // group)
    cache = Cache(policy.model.config, R, slots, E + 1, weight, Graphs() if policy.model.graphs else None)
    holds = torch.full((R,), -1)  # which response is in each row of the cache, -1: none
    token = torch.zeros(R, dtype=torch.long)  # its last token
    admitted = 0  # groups
    with adapters_rounded(policy):
        while admitted < len(groups) or (holds >= 0).any():
            free = (holds < 0).nonzero()[:, 0]
            enter = min(len(free) // group, len(groups) - admitted)
            # Admit, or compact. Several prompts share a prefill: it waits until an eighth of the rows is free.
            if enter and (8 * len(free) >= R or enter == len(groups) - admitted):
                new = free[: enter * group].view(enter, group)
                numbers = torch.arange(admitted * group, (admitted + enter) * group).view(enter, group)
                u = dice(numbers, np.arange(longest))[..., 1:] if prompt_exits else None
                prefill(policy, groups[admitted : admitted + enter], cache, new, u, delta)
                token[new] = torch.tensor([prompt[-1] for prompt in groups[admitted : admitted + enter]])[:, None]
                holds[new] = numbers
                admitted += enter
            elif admitted == len(groups) and 2 * len(free) >= len(holds) and cache.graphs is None:
                keep = (holds >= 0).nonzero()[:, 0]
                cache.select(keep)
                holds, token = holds[keep], token[keep]

            # Step.
            live = (holds >= 0).nonzero()[:, 0]  # the rows that hold a response
            number = holds[live]
            u = torch.zeros(len(holds), 1 + E, dtype=torch.double)
            u[live] = dice(number, cache.length[live])
            planned = torch.zeros(len(holds), dtype=torch.long)  # an empty row runs no layer
            planned[live] = L if depths is None else depths[number, torch.tensor([len(responses[i]) for i in number])]
            out = policy(send(token[:, None], policy.device), planned[:, None],
                         u[:, None, 1:] if depths is None else None, delta, cache)
            cache.end(out.h)
            at, taken = send(live, policy.device), out.depths[live, 0]
            tokens, logp_token = draw_token(policy, out.h[at, 0], send(u[live, 0], policy.device), temperature)
            logp_exit = logp_depth(policy, out.exit_logits[at, 0], taken, delta)

            # Record.
            tokens, logp_exit, logp_token = torch.stack(
                [tokens.double(), logp_exit.double(), logp_token.double()]).cpu()  # one wait for all three
            if not logp_token.isfinite().all():
                raise UserError("a token's log-probability is not finite: the weights, or the --dtype, overflow, or "
                                "--temperature is next to 0: try --dtype float32, or an earlier checkpoint")
            token[live] = tokens.long()
            drawn = zip(token[live].tolist(), taken.tolist(), logp_exit.tolist(), logp_token.tolist(), strict=True)
            ended = []
            for row, i, values in zip(live.tolist(), number.tolist(), drawn, strict=True):
                response = responses[i]
                response.append(*values)
                response.finished = response.token_ids[-1] in eos_ids
                if response.finished or len(response) == max_new_tokens:
                    ended.append(row)
            holds[ended] = -1
            if progress is not None:
                progress.update(len(ended))
    return responses


def generate_shared(policy: Policy, prompts: list[list[int]], *, first_response: int, samples: int = 1,
                    **options) -> list[Response]:
    """generate, the prompts divided among the ranks: every rank gets all responses."""
    mine = parallel.share(len(prompts))
    with policy.model.gathered():
        drawn = generate(policy, prompts[mine], samples=samples, first_response=first_response + mine.start * samples,
                         **options)
    return parallel.all_gather(drawn)


def in_parts(policy: Policy, prompts: list[list[int]], done: int, rows: int | None, desc: str, leave: bool = True,
             **options) -> Iterator[tuple[int, list[Response]]]:
    """generate_shared of the prompts from number `done` on, under a bar, in parts that the caller writes down: (number
    of its first prompt, responses). A kill loses the part under way, and each ends on a nearly empty cache."""
    size = 4 * (rows or 64) * parallel.size()
    with parallel.bar(total=len(prompts), initial=done, desc=desc, leave=leave) as bar:
        for i in range(done, len(prompts), size):
            yield i, generate_shared(policy, prompts[i : i + size], first_response=i, rows=rows, progress=bar,
                                     **options)
            bar.update(min(i + size, len(prompts)) - bar.n)  # what other ranks have drawn
