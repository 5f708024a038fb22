"""Does a learned exit beat simpler ones, and does it cost or gain accuracy beside reinforcement learning without exits?

    static       every token stops at one depth
    …, trained   the same, where stage 1 was trained for that depth alone, and then stage 2 at lambda 0
    confidence   stops at the first exit whose lens is sure of a token, max_x p(x) >= tau (as CALM does)
    heads        stops at the first exit where the learned head says p > C: what sampling the exits costs
    oracle       stops at the first exit whose lens is within EPS nats of this token's own final distribution: no rule,
                 for it runs all layers first, but a bound for those that guess from the lens
    random       depths drawn from the learned policy's own histogram, whatever the token is
    table        the same, from its own histogram for the token just read: is a head more than a list of tokens?
    plain RL     stage 2 with the exits closed: same adapters to start from, steps, seeds and rate, lambda 0. From
                 fresh adapters it may end elsewhere: on stories 9 points lower, for no fault of the exits

Same prompts, problems, random numbers and read-out; on the base's weights, and on the adapters of both stages, at s1's
KL factor and at a quarter of it. Compute counts layers alone: confidence also pays a product with the vocabulary at
every exit, which is not in these figures.

    python -m study.baselines
"""

import hashlib
from itertools import pairwise
from pathlib import Path
from statistics import fmean as mean

import torch
import torch.nn.functional as F

import flags
import runs
from checkpoints import checkpoint, digest, exits_of, load_policy, save_policy
from data.hub import read_json, write_json
from distill import lens_kl
from evaluate import measure, paired
from exits import Policy, token_logits
from sample import draw
from study import common
from study.common import answers, correct, mean_correct, point, thresholded, undrawn
from study.regimes import closed, random_depths

TAUS = (0.5, 0.7, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999)
PS = (0.01, 0.02, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9)  # of an exit
EPS = (0.3, 0.1, 0.03, 0.01, 0.001)  # nats
SURE = 30.0  # an exit logit: sigmoid(30) is 1 but for 1e-13


# ------------------------------------------------------------------------------------------------------- exit rules


def confidence(tau: float):
    """In the heads' place: a logit of ±SURE for "the lens's likeliest token has probability >= tau"."""
    def rule(policy: Policy) -> dict:
        def logit(h: torch.Tensor, exit_idx: int) -> torch.Tensor:  # (..., D) -> (...)
            return torch.where(token_logits(policy.model, h).softmax(-1).amax(-1) >= tau, SURE, -SURE)

        policy.heads.forward = logit
        return {}

    return rule


def choosing(policy: Policy, choose) -> dict:
    """Before every pass over the rows' next tokens, choose(plain pass, its arguments) says which outcome (R,) each
    takes."""
    plain = policy.forward

    def forward(ids, depths, u, delta, cache):
        outcome = choose(plain, ids, depths, u, cache)
        return plain(ids, depths.minimum(policy.depth_of_outcome[outcome][:, None]), place=cache)

    policy.forward = forward
    return {}


def oracle(eps: float):
    def rule(policy: Policy) -> dict:
        def near_enough(plain, ids, depths, u, cache):
            """By a pass of its own through all layers, which leaves no trace: what it wrote is written again."""
            filled = cache.filled.clone()
            full = plain(ids, depths, place=cache)
            cache.filled, cache.site = filled, None
            kl_e = lens_kl(policy.model, full.h[:, 0], [h[:, 0] for h in full.at_exits])  # (R, E)
            return F.pad(kl_e <= eps, (0, 1), value=True).int().argmax(-1).cpu()

        return choosing(policy, near_enough)

    return rule


def static(depth: int):
    return lambda policy: {"depths": depth}


def histogram_of(answered: common.Answers) -> list[float]:
    return list(measure(answered.rows, answered.depth_of_outcome)["exit_histogram"].values())


def mark(answered: common.Answers) -> str:
    """Tells what is drawn as these answers from what was drawn as others."""
    return hashlib.sha256(str(histogram_of(answered)).encode()).hexdigest()[:8]


def shuffled(args, histogram: list[float]):
    """Depths drawn i.i.d. from the histogram of other answers."""
    shape = (len(args.problems), args.max_new_tokens)
    return lambda policy: {"depths": random_depths(policy, histogram, shape, args.seed)}


def by_token(answered: common.Answers):
    """Depths drawn from other answers' histogram for the token just read, of all tokens where they never read it."""
    read = [([row["prompt_ids"][-1], *row["token_ids"][:-1]], row["depths"]) for row in answered.rows]

    def rule(policy: Policy) -> dict:
        counts = torch.zeros(policy.model.config.vocab_size, len(answered.depth_of_outcome))
        for tokens, depths in read:
            counts.index_put_((torch.tensor(tokens), torch.searchsorted(policy.depth_of_outcome, torch.tensor(depths))),
                              torch.tensor(1.0), accumulate=True)
        counts = torch.where(counts.sum(-1, keepdim=True) > 0, counts, counts.sum(0))
        logs = counts.log()  # draw sees to it that they add up
        return choosing(policy, lambda plain, ids, depths, u, cache: draw(logs[ids[:, 0].cpu()], u[:, 0, 0].cpu()))

    return rule


# ------------------------------------------------------------------------------------------------------------ plain RL


def closed_start(args):
    """s1 with exits that never open."""
    source, folder = common.stage_one(args), Path(args.runs) / "full"
    if source is None:
        return None
    if (folder / "complete.json").exists():
        common.refuse_other_start(folder, "made of", read_json(folder / "complete.json").get("start"), source)
        return folder
    (folder / "step-000000").mkdir(parents=True, exist_ok=True)
    save_policy(closed(load_policy(runs.load_model(args)[0], source)), folder / "step-000000")
    write_json(folder / "config.json", runs.read_config(source))
    write_json(folder / "complete.json", {"closed": True, "start": digest(checkpoint(source))})
    return folder


def plain_rl(args, seed: int):
    return common.stage_two(args, f"full-{seed}", 0.0, seed, closed_start(args))


# ------------------------------------------------------------------------------------------------------- comparing


def compute_of(answered) -> float:
    return excess(answered, 0) / sum(len(row["depths"]) for row in answered.rows)


def excess(answered, compute: float) -> float:
    """Full-depth tokens that the answers ran beyond an average compute."""
    return sum(d / answered.depth_of_outcome[-1] - compute for row in answered.rows for d in row["depths"])


def at_compute(sweep: list, compute: float) -> list[float] | None:
    """Each problem's accuracy under a sweep of answers at a given average compute: between the two settings around it,
    answers mixed in the ratio that gives that compute over all their tokens. None outside of the sweep."""
    for low, high in pairwise(sorted(sweep, key=compute_of)):
        below, above = excess(low, compute), excess(high, compute)
        if below <= 0 <= above and below < above:
            share = below / (below - above)
            return [(1 - share) * x + share * y for x, y in zip(correct(low), correct(high), strict=True)]
    return None


def pooled(answered: list) -> tuple[list[float], float]:
    """Accuracy of each problem, and average compute, as means over runs."""
    return mean_correct(answered), mean(map(compute_of, answered))


def start_of(stage: str) -> str:
    """Whose weights a stage began with."""
    return stage.replace("stage 2 from", "stage 1 at").replace("stage 2", "stage 1")


def compared(whose: str, home: str, rule: str, name: str) -> bool:
    """Whether the answers `whose`, by the weights `home`, are set against a rule's sweep on the weights `name`: the
    base's, s1's or its own. Exits that are not drawn are with confidence alone, for the heads' sweep has them as a
    point; and, after stage 2, with the heads that it began with: what has RL added?"""
    drawn = whose == home
    if rule == "heads" and not drawn:
        return name == start_of(home) != home
    return name in ("base", "stage 1", home) and (drawn or rule == "confidence")


def against(name: str, mine: list[float], other: list[float] | None, **about) -> list[dict]:
    """A comparison, in accuracy over the same problems; none where the other has no such compute."""
    if other is None:
        return []
    change, half = paired(other, mine)
    return [{"of": name, **about, "accuracy": mean(mine), "other": mean(other), "change": change, "half": half}]


def on_weights(args, name: str, source, exits: list[int], learned: dict, base) -> tuple[list, list]:
    """Points and comparisons of the rules on one set of weights. `learned`: name -> whose weights, and the answers of
    each run; `base`: the base's answers."""
    comparisons = []
    full = base if name == "base" else answers(args, source, "full depth", static(base.depth_of_outcome[-1]))
    points = [point(args, full, rule="full depth", weights=name)]
    for rule, make, values in (("static", static, exits), ("confidence", confidence, TAUS), ("oracle", oracle, EPS),
                               *([] if name == "base" else [("heads", thresholded, PS)])):
        sweep = [answers(args, source, f"{rule} {value:g}", make(value)) for value in values]
        points += [point(args, a, rule=rule, weights=name, value=v) for a, v in zip(sweep, values, strict=True)]
        for whose, (home, each) in learned.items():
            if compared(whose, home, rule, name):
                # Seed 0's adapters against seed 0 alone: the mean over seeds would be compared with one's luck.
                accuracy, compute = pooled(each[:1] if name == home else each)
                comparisons += against(whose, accuracy, at_compute([*sweep, full], compute), rule=rule, weights=name,
                                       compute=compute)
    drawn = [whose for whose, (home, _) in learned.items() if whose == home and name in ("base", home)]
    own = [whose for whose, (home, _) in learned.items() if name == home]
    for rule, those, how, make in (("random", drawn, "random as", lambda a: shuffled(args, histogram_of(a))),
                                   ("table", own, "table of", by_token)):
        for whose in those:
            first = learned[whose][1][0]
            found = answers(args, source, f"{how} {whose} {mark(first)}", make(first))
            points.append(point(args, found, rule=rule, weights=name, value=whose))
            comparisons += against(whose, correct(first), correct(found), rule=rule, weights=name,
                                   compute=compute_of(first))
    return points, comparisons


def at_one_depth(args, means: dict, base) -> tuple[list, list]:
    """The same of what was trained for one depth alone, against the means over runs of what was learned."""
    points, comparisons = [], []
    fixed = {depth: run for depth in args.depths if (run := common.one_depth(args, depth))}
    tuned = {depth: run for depth, start in fixed.items()
             if (run := common.stage_two(args, f"rl-0-0-static-{depth}", 0.0, 0, start))}
    for stage, of_depth in (("stage 1", fixed), ("stage 2", tuned)):
        sweep = [undrawn(args, run) for run in of_depth.values()]
        points += [point(args, a, rule="static, trained", weights=stage, value=depth)
                   for a, depth in zip(sweep, of_depth, strict=True)]
        for whose, (accuracy, compute) in means.items():
            if whose.startswith(stage):
                comparisons += against(whose, accuracy, at_compute([*sweep, base], compute), rule="static, trained",
                                       weights=stage, compute=compute)
    return points, comparisons


def main() -> None:
    args = common.arguments(__doc__, lambda p: p.pair(
        "--depths", (2, 3, 4), (), nargs="*", type=flags.whole(1), help="that stage 1, and then stage 2, are trained "
        "for alone (default: 2 3 4 / none)"))
    s1, rl = common.from_kappa(args, None)
    if s1 is None:
        return
    exits, base = exits_of(checkpoint(s1)), common.base_answers(args)
    kappa, low, rl_low = common.lower_kappa(args)
    plain = common.over_seeds(args, lambda seed: plain_rl(args, seed))
    trained = {"stage 1": [s1], "stage 2": rl, f"stage 1 at κ = {kappa:g}": [low] if low else [],
               f"stage 2 from κ = {kappa:g}": rl_low}
    trained = {name: found for name, found in trained.items() if found}
    learned = {}
    for name, found in trained.items():
        learned[name] = name, [answers(args, run) for run in found]
        learned[f"{name}, p > 1/2"] = name, [undrawn(args, run) for run in found]
    points = [point(args, each[0], rule="learned", weights=name) for name, (_, each) in learned.items()]
    points += [point(args, answers(args, run), rule="plain RL", weights=run.name) for run in plain]
    sources = {"base": tuple(exits), **{name: found[0] for name, found in trained.items()}}
    means = {whose: pooled(each) for whose, (_, each) in learned.items()}
    parts = [*(on_weights(args, name, source, exits, learned, base) for name, source in sources.items()),
             at_one_depth(args, means, base)]
    points += [row for rows, _ in parts for row in rows]
    comparisons = [row for _, rows in parts for row in rows]
    if plain:
        without = mean_correct([answers(args, run) for run in plain])
        comparisons += against("plain RL", without, correct(base), rule="full depth", weights="base", compute=1.0)
        for whose, (accuracy, compute) in means.items():
            comparisons += against(whose, accuracy, without, rule="plain RL", weights="plain RL", compute=compute)
    for whose, (accuracy, compute) in means.items():
        comparisons += against(whose, accuracy, correct(base), rule="full depth", weights="base", compute=compute)
    common.save(args, "baselines", "baselines", points=points, comparisons=comparisons,
                runs={**{name: len(found) for name, found in trained.items()}, "plain RL": len(plain)})


if __name__ == "__main__":
    runs.run_main(main)
