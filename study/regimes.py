"""A model written by and read from in depth regimes, which monitor.py defines: what its evals are made of."""

import re
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import runs
from data.text import Tokenizer
from exits import Policy, Response, token_logp_all
from fast.packing import Packed, Sequences, send
from model import rope
from sample import NEVER, generate, uniforms
from study.forms import FORMS, Form

CLOSED = -1e4  # an exit logit that is never drawn; its negative always is
DRAWS, CHAINS, RANDOM = range(3)  # purposes of random numbers


@dataclass
class Subject:
    """A model under the evals. Whose heads are closed has no exits of its own: its learned depth is the full one."""

    policy: Policy
    reader: Policy  # the base model, heads closed
    tokenizer: Tokenizer
    problems: list
    task: str  # of forms.FORMS
    args: object  # seed, rows, max_new_tokens, threshold
    histogram: list[float] | None = None  # (E + 1,) of the depths it draws

    @property
    def form(self) -> Form:
        return FORMS[self.task]

    @property
    def own(self) -> list[str]:
        return ["full"] if float(self.policy.heads.bias.detach().max()) == CLOSED else ["learned", "full"]

    def prompts(self, thinking: bool = True, questions=None) -> list[list[int]]:
        """Of the problems, or of other questions in their place."""
        questions = questions or [p.question for p in self.problems]
        return self.tokenizer.prompts([[{"role": "user", "content": q}] for q in questions], thinking)


def closed(policy: Policy) -> Policy:
    """The policy with exits that are never drawn."""
    policy.heads.bias.data.fill_(CLOSED)
    return policy


@contextmanager
def within(policy: Policy, regime: str):
    """Inside, of cap-l, nothing runs deeper than l: its exit is always taken."""
    bias = policy.heads.bias.data
    at = policy.exits.index(int(regime.removeprefix("cap-"))) if regime.startswith("cap-") else []  # none
    before = bias[at].clone()
    bias[at] = -CLOSED
    try:
        yield
    finally:
        bias[at] = before


def random_depths(policy: Policy, histogram, shape, seed: int) -> torch.Tensor:
    """Depths of any shape, each drawn from a histogram (E + 1,)."""
    rng = np.random.default_rng([seed, RANDOM])
    return policy.depth_of_outcome[torch.from_numpy(rng.choice(len(histogram), size=shape, p=histogram))]


def respond(s: Subject, prompts: list[list[int]], regime: str, prompt_exits: bool = False) -> list[Response]:
    """A response to each prompt in a regime, of the likeliest tokens; with `prompt_exits` the prompt is in it, too."""
    count, depths = s.args.max_new_tokens, None
    if regime == "full":
        depths = s.policy.n_layers
    elif regime == "random":
        depths = random_depths(s.policy, s.histogram, (len(prompts), count), s.args.seed)
    with within(s.policy, regime):
        return generate(s.policy, prompts, max_new_tokens=count, eos_ids=s.tokenizer.eos_ids, depths=depths,
                        temperature=0.0, threshold=s.args.threshold, prompt_exits=prompt_exits,
                        seed=(s.args.seed, CHAINS), rows=s.args.rows)


@torch.no_grad()
def streams(s: Subject, texts: list[list[int]], starts: list[int], regime: str, numbers=None):
    """Teacher-forced passes of 64 texts of ids at a time, every position from `starts` on in the regime: yields the
    texts' places in the list (n,) and the streams (n, T, D). A text's draws are those of its number (default: its
    place)."""
    numbers = range(len(texts)) if numbers is None else numbers
    for i in range(0, len(texts), 64):
        part = texts[i : i + 64]
        T = max(map(len, part))
        ids, depths = torch.zeros(2, len(part), T, dtype=torch.long)
        u = torch.full((len(part), T, len(s.policy.exits)), NEVER, dtype=torch.double)
        for b, text in enumerate(part):
            free = torch.arange(starts[i + b], len(text))
            ids[b, : len(text)], depths[b, : len(text)] = torch.tensor(text), s.policy.n_layers
            if regime == "random":
                depths[b, free] = random_depths(s.policy, s.histogram, len(free), s.args.seed + 1 + numbers[i + b])
            elif regime != "full" and s.args.threshold is not None:
                u[b, free] = s.args.threshold
            elif regime != "full":
                u[b, free] = uniforms((s.args.seed, DRAWS), [numbers[i + b]], free.numpy(), len(s.policy.exits))
        with within(s.policy, regime):
            yield range(i, i + len(part)), s.policy(send(ids, s.policy.device), depths,
                                                    None if regime in ("full", "random") else u).h


def force(s: Subject, prefixes: list[list[int]], starts: list[int], regime: str) -> list[str]:
    """The likeliest answer after each text of ids, token by token: a number of two digits at most, as every value has,
    or a word, which goes on while it may become one of the task's answers."""
    def said(i: int) -> str:
        return s.tokenizer.decode(texts[i][len(prefixes[i]) :]).lstrip()  # a blank behind an answer ends it

    texts, live = [list(prefix) for prefix in prefixes], list(range(len(prefixes)))
    while live:
        found = []
        # Under its own number: the second digit is read past the exits that the first was read past.
        for rows, h in streams(s, [texts[i] for i in live], [starts[i] for i in live], regime, live):
            last = torch.tensor([len(texts[live[row]]) - 1 for row in rows])
            found += token_logp_all(s.policy.model, h[torch.arange(len(last)), last]).argmax(-1).tolist()
        for i, token in zip(live, found, strict=True):
            texts[i].append(token)
        live = [i for i in live if s.form.goes_on(said(i))]
    return [re.match(r"\d+|[^\W\d]+|", said(i))[0] for i in range(len(texts))]


def logp_answers(s: Subject, prefixes, starts, answers: list[str], regime: str) -> np.ndarray:
    """log p of an answer, with its closing brace if it has one, after each text of ids: (n,)."""
    ends, logp = [s.tokenizer.encode(s.form.answer.format(answer)) for answer in answers], []
    for rows, h in streams(s, [prefix + end for prefix, end in zip(prefixes, ends, strict=True)], starts, regime):
        for b, row in enumerate(rows):
            at = slice(len(prefixes[row]) - 1, len(prefixes[row]) + len(ends[row]) - 1)
            table = token_logp_all(s.policy.model, h[b, at])
            logp.append(float(table.gather(-1, torch.tensor(ends[row], device=table.device)[:, None]).sum()))
    return np.array(logp)


def chain_of(s: Subject, response: Response) -> list[str]:
    """The lines of a response's chain of thought."""
    text = s.tokenizer.decode(response.token_ids).partition("</think>")[0]
    return [line for line in text.removeprefix("<think>\n").split("\n") if line]


def answers_of(s: Subject, responses: list[Response]) -> list[str | None]:
    """What each response to a problem answers; None where it did not come to that."""
    return [runs.grade(p, r, s.tokenizer).value for p, r in zip(s.problems, responses, strict=True)]


def thinking(s: Subject, prompt: list[int], lines: list[str], ended: bool = True) -> list[int]:
    """A prompt and lines of a chain; where it has ended, the answer comes next."""
    text = "<think>\n" + "".join(f"{line}\n" for line in lines)
    return prompt + s.tokenizer.encode(text + (f"</think>\n\n{s.form.stub}" if ended else ""))


# -------------------------------------------------------------------------------------------------- another past


class Twice(Sequences):
    """A place of texts that stand twice, (B, 2T): in the second half each position sees itself at its own depth, and
    the first half's positions before it at theirs. For every token at once, how it fares on another past."""

    def run(self, model, h, segment, layers, running):
        h = h.flatten(0, 1)
        if segment == 0:
            self.tables = [torch.cat([table, table]) for table in rope(self.shape[1] // 2, model.config, h)]
            self.present = running
        site = SeesFirst(self, h, running)
        return h.index_copy(0, site.run_at, model.run(h[site.run_at], layers, site)).unflatten(0, self.shape)


class SeesFirst(Packed):
    def attend(self, layer: int, q, k, v):
        q, k, v = (self.unpack(x, at).transpose(1, 2)
                   for x, at in ((q, self.run_at), (k, self.all_at), (v, self.all_at)))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        past = torch.ones(self.shape[1] // 2, self.shape[1] // 2, dtype=torch.bool, device=q.device).tril()
        now = torch.eye(len(past), dtype=torch.bool, device=q.device)
        mask = torch.cat([torch.cat([past, past & ~now]), torch.cat([now & ~now, now])], 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(0, 1).flatten(1).index_select(0, self.run_at)


def on_frozen_past(policy: Policy, texts: list[list[int]], firsts: list[int], depth: int) -> torch.Tensor:
    """The streams (B, T, D) of texts of at most T ids, each at full depth when those of the tokens before it that
    predict too, from `first` - 1 on, are frozen at `depth`."""
    T, L = max(map(len, texts)), policy.n_layers
    ids, depths = torch.zeros(2, len(texts), 2 * T, dtype=torch.long)
    for b, (text, first) in enumerate(zip(texts, firsts, strict=True)):
        ids[b, : len(text)] = ids[b, T : T + len(text)] = torch.tensor(text)
        depths[b, : first - 1], depths[b, first - 1 : len(text)] = L, depth
        depths[b, T + first - 1 : T + len(text)] = L
    return policy(send(ids, policy.device), depths, place=Twice(ids.shape)).h[:, T:]


@torch.no_grad()
def past_depth(policy: Policy, texts: list[list[int]], firsts: list[int], depth: int):
    """Of each text of T ids, whose tokens from `first` on are predicted on a past frozen at `depth`: log p (T - first,)
    of each, and whether it is the likeliest."""
    found = []
    for i in range(0, len(texts), 32):
        part, start = texts[i : i + 32], firsts[i : i + 32]
        h = on_frozen_past(policy, part, start, depth)
        for b, (text, first) in enumerate(zip(part, start, strict=True)):
            table = token_logp_all(policy.model, h[b, first - 1 : len(text) - 1])
            tokens = send(torch.tensor(text[first:]), policy.device)
            found.append((table.gather(-1, tokens[:, None])[:, 0].cpu(), (table.argmax(-1) == tokens).cpu()))
    return found
