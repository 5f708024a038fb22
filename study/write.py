"""Writes the study's part of results.md from data/*.json beside it, so that no figure in the text can drift, and draws
its figures anew.

What stands between the two marks is replaced; all else in the file stays, which is made where there is none. A
command that has not been run leaves its section out.

    python -m study.write                   of what the study's commands wrote beside their runs
    python -m study.write --out docs        of what is committed here
"""

import argparse
import math
import re
import textwrap
from pathlib import Path
from statistics import fmean as mean

import runs
from data.hub import UserError, read_json, read_text, write_text
from evaluate import BASE
from monitor import claim, half_depth, standing, verdicts_on
from study.baselines import start_of
from study.coherence import COLUMNS
from study.common import figure
from study.fig2 import draw as draw_fig2
from study.fronts import draw as draw_fronts
from study.organisms import EXPECTED
from study.table1 import draw as draw_fig4

BEGIN, END = "<!-- study: written by python -m study.write -->\n", "<!-- /study -->\n"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%"


def accuracy(row: dict) -> str:
    return f"{percent(row['accuracy'])} ({100 * row['accuracy_low']:.0f}–{100 * row['accuracy_high']:.0f})"


def signed(change: float, half: float, scale: float = 100) -> str:
    """A difference with half of its 95% interval; in points, unless scale is 1."""
    return f"{scale * change:+.1f} ± {scale * half:.1f}".replace("-", "−")


def change(row: dict, name: str = "accuracy") -> str:
    return signed(row[f"{name}_change"], row[f"{name}_change_half"], 100 if name == "accuracy" else 1)


def verdict(difference: float, half: float, more: str = "better", less: str = "worse",
            same: str = "no significant difference") -> str:
    return same if abs(difference) <= half else more if difference > 0 else less


def table(head: list[str], rows) -> list[str]:
    return ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head),
            *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def which(data: dict, section: str) -> str:
    """What tells a section from others of its kind: its file's name behind theirs."""
    more = data["name"].removeprefix(section).replace("-", " ")
    return f":{more}" if more else ""


def about(data: dict, also: str = "") -> str:
    return (f"`{data['command']}`: {data['model']}, {data['task']}, the same {data['n']} held-out problems, "
            f"temperature {data['temperature']:g}{also}.")


# -------------------------------------------------------------------------------------------------------- sections


def factor(r: dict) -> str:
    """A row's KL factor, with the steps of its stage 1 where that is told."""
    return r["name"] + (f" ({r['steps']:,} steps)" if "steps" in r else "")


def table1(data: dict) -> list[str]:
    rows = [[factor(r), f"{r['coherence']:.3f}", f"{r['perplexity']:.3f}",
             percent(r["exit_rate"]), percent(r["layer_savings"]), accuracy(r),
             *(("", "") if r["token_kl"] is None else (change(r), f"{r['token_kl']:.4f}")),
             f"{r['paper'][0]}, {r['paper'][1]:.0%}, {r['paper'][2]:.1%}" if r["paper"] else ""] for r in data["rows"]]
    return ["### Table 1: the KL factor", "", about(data, "; one seed of stage 1 each"),
            "Coherence is study/coherence.py's, from 0 to 1, and not the paper's judge's of 10: compare it down the "
            "column.",
            *table(["KL factor", "coherence", "perplexity to the base", "exit rate", "layer savings",
                    "accuracy (95% interval)", "change from the base, points", "held-out token KL, nats",
                    "paper: coherence, exit rate, savings"], rows),
            *without_chance([r for r in data["rows"] if "thresholded" in r])]


def without_chance(rows: list[dict]) -> list[str]:
    """Table 1 with exits at a threshold."""
    def row(r: dict) -> list:
        found, (gain, half) = r["thresholded"], r["thresholded_change"]
        return [factor(r), percent(found["exit_rate"]), percent(found["layer_savings"]), accuracy(found), change(found),
                signed(gain, half)]

    return ["The same runs with their exits where a head's probability is above 1/2, in place of drawn "
            "(`evaluate.py --threshold 0.5`):",
            *table(["KL factor", "exit rate", "layer savings", "accuracy (95% interval)",
                    "change from the base, points", "from drawn exits, points"], map(row, rows))] if rows else []


def fig4(data: dict) -> list[str]:
    found = data["distributions"]
    worst = max(found, key=lambda d: d["total_variation"])
    rows = [[d["name"], d["positions"], f"{d['total_variation']:.4f}", *(
        " ".join(f"{depth}: {percent(x)}" for depth, x in zip(d["depths"], d[which], strict=True))
        for which in ("target", "learned"))] for d in found]
    return ["### Figure 4: do exits follow their target?", "",
            f"`{data['command']}`. On held-out base responses, in one parallel pass. The total variation distance, the "
            f"share of tokens that would have to leave elsewhere, is at most {worst['total_variation']:.4f} (KL factor "
            f"{worst['name']}).", "", "![Target and learned exit distributions](figures/fig4.png)",
            *table(["KL factor", "positions", "total variation", "target", "learned"], rows)]


def fig2(data: dict) -> list[str]:
    seeds, base, (start, *_, end) = data["seeds"], data["base"], data["mean"]
    ends = [seed["steps"][-1] for seed in seeds]
    low, high = (pick(ends, key=lambda r: r["accuracy"])["accuracy"] for pick in (min, max))
    told = [f"At step {end['step']} the mean accuracy is {percent(end['accuracy'])} (single seeds {percent(low)} to "
            f"{percent(high)})"]
    for key, other in (("change_from_base", f"the base's {percent(base['accuracy'])}"),
                       ("change_from_stage_1", f"stage 1's {percent(start['accuracy'])}")):
        told.append(f"{signed(*data[key])} points from {other}, " + verdict(*data[key], "significantly above",
                                                                        "significantly below", "not significant"))
    saving = [r["average_compute"] for r in ends]
    told.append(f"average compute goes from stage 1's {percent(start['average_compute'])} to "
                f"{percent(end['average_compute'])} (single seeds {percent(min(saving))} to {percent(max(saving))})")
    rows = [[r["step"], percent(r["accuracy"]), percent(r["average_compute"]), f"{r['total_compute']:.1f}",
             f"{r['coherence']:.3f}"] for r in data["mean"]]
    rows.append(["base", accuracy(base), percent(base["average_compute"]), f"{base['total_compute']:.1f}",
                 f"{base['coherence']:.3f}"])
    kappa = data["name"].partition("-kl-")[2]
    origin = f", from κ = {kappa}" if kappa else ""
    return [f"### Figure 2: stage 2 over its steps{origin}, {len(seeds)} seeds", "",
            about(data, "; λ = 0.1, one start"),
            "; ".join(told) + ". The intervals are over problems, for these seeds. The paper reports 47% → 55–60% and "
            "compute 98% → 95% on Qwen3-4B.",
            "", f"![Accuracy, compute and coherence over the steps](figures/{data['name']}.png)",
            *table(["step", "accuracy, mean of seeds", "average compute", "total compute, full-depth tokens",
                    "coherence"], rows)]


def fronts(data: dict) -> list[str]:
    front, base = data["front"], data["base"]

    def undrawn(r: dict) -> list[str]:
        at_half = r.get("thresholded")
        return [percent(at_half["average_compute"]), accuracy(at_half), change(at_half)] if at_half else ["", "", ""]

    rows = [[what, f"{r['value']:g}".replace("-", "−") + (f", seed {r['seed']}" if "seed" in r else "") +
             (f", from κ = {r['kappa']:g}" if "kappa" in r else ""), percent(r["average_compute"]),
             accuracy(r), change(r), f"{r['length']:.1f}", change(r, "length"), f"{r['total_compute']:.1f}",
             change(r, "total_compute"), *undrawn(r)]
            for what, key in (("λ", "lambda"), ("λ for right answers only", "gated"), ("λ", "lower kappa"),
                              ("δ on stage 1", "delta stage 1"),
                              ("δ on stage 2, λ = 0.1, seed 0", "delta stage 2"))
            for r in sorted(front.get(key, ()), key=lambda r: r["value"])]
    rows.append(["base", "", "100%", accuracy(base), "", f"{base['length']:.1f}", "", f"{base['total_compute']:.1f}",
                 *[""] * 4])
    text = ["### What λ, κ and δ trade", "", about(data, "; one seed each unless named"), "Changes are from the base.",
            "",
            "![Accuracy against average compute](figures/fronts.png)"]
    for gated in front.get("gated", ()):
        if "less_ungated" in gated:
            text += ["", "Depth charged for right answers only, against depth charged for all, from one start and "
                     f"seed: {signed(*gated['less_ungated'])} points, {verdict(*gated['less_ungated'])}."]
    if data.get("recovery"):
        text += recovery(data["recovery"])
    if front["lambda"]:
        text += price_of_depth(front["lambda"])
    if data["training"]:
        text += where_tokens_leave(data["training"])
    return text + table(["swept", "value", "average compute", "accuracy (95% interval)", "change, points",
                         "length, tokens", "change", "total compute, full-depth tokens", "change",
                         "at p > 1/2: average compute", "accuracy", "change, points"], rows)


def recovery(found: dict) -> list[str]:
    def said(gain: dict) -> str:
        start = gain["start"]
        changes = [f"{signed(*gain[name])} points on {whom}, {verdict(*gain[name])}" for name, whom in (
            ("change_from_start", "that start"), ("change_from_base", "the base"))]
        return (f"from {percent(start['accuracy'])} at {percent(start['average_compute'])} of the compute to "
                f"{percent(gain['accuracy'])} at {percent(gain['average_compute'])}: {'; '.join(changes)}")

    return ["", f"Does stage 2 win back what an earlier exit costs? Stage 1 at κ = {found['kappa']:g}, then λ = 0.1, "
            f"mean of {found['seeds']} seeds, {said(found['drawn'])}. With exits where a head's probability is above "
            f"1/2, in place of drawn, {said(found['thresholded'])}."]


def price_of_depth(rows: list[dict]) -> list[str]:
    by_price = {value: [r for r in rows if r["value"] == value] for value in sorted({r["value"] for r in rows})}
    compute = "; ".join(f"{', '.join(percent(r['average_compute']) for r in alike)} at λ = {value:g}"
                        for value, alike in by_price.items())
    highest = max(by_price)
    lengths = "; ".join(f"{change(r, 'length')} tokens a response, " + verdict(
        r["length_change"], r["length_change_half"], "significantly longer than the base's",
        "shorter than the base's", "no significant difference from the base") for r in by_price[highest])
    return ["", f"Does a price on depth take depth? Average compute, seed by seed: {compute}.",
            "", f"Does a price on depth make texts longer? At λ = {highest:g}: {lengths}.",
            "", "![Length and total compute against λ](figures/verbosity.png)"]


def where_tokens_leave(training: list[dict]) -> list[str]:
    k = min(10, math.ceil(len(training) / 2))

    def share(depth: str, part: list[dict]) -> str:
        return percent(mean(m["exit_histogram"][depth] for m in part))

    shares = ", ".join(f"{depth}: {share(depth, training[:k])} → {share(depth, training[-k:])}"
                       for depth in training[0]["exit_histogram"])
    return ["", f"Does stage 2 just drop the last layers? Tokens that leave at each depth, first {k} steps → last {k} "
            f"(λ = 0.1, seed 0): {shares}.",
            "", "![Where tokens leave over the steps of stage 2](figures/histogram.png)"]


def heads(data: dict) -> list[str]:
    def name(width):
        of = data["trained_width"] if width is None else width
        return (f"{of} hidden units" if of else "linear") + (", as trained" if width is None else ", fitted")

    rows = [[name(r["width"]), f"{r['exit_cross_entropy']:.3f}", f"{r['token_kl']:.4f}",
             f"{r['token_kl_at_own_exits']:.4f}", percent(r["intact"], 0), accuracy(r), change(r),
             signed(r["gained"], r["gained_half"]) if "gained" in r else "", percent(r["average_compute"])]
            for r in data["rows"]]
    return ["### Are the heads what holds stage 1 back?", "",
            about(data), f"New heads, fitted to {data['run']}'s frozen streams at {data['positions']} positions of "
            f"{data['responses']} responses, take the place of its own; the adapters stay. Exit CE, token KL and the "
            "share of responses that stay as they were (intact) are on held-out base responses.",
            *table(["heads", "exit CE", "token KL at the target's exits", "at its own", "intact",
                    "accuracy (95% interval)", "change from the base, points", "from the row above",
                    "average compute"], rows)]


def baselines(data: dict) -> list[str]:
    found = {(c["of"], c["rule"], c["weights"]): c for c in data["comparisons"]}
    labels = {"static": "static exit", "static, trained": "static exit, trained for its depth",
              "heads": "heads, thresholded", "confidence": "confidence threshold",
              "oracle": "KL oracle (sees all layers)", "random": "random exits", "table": "exits by a table of tokens",
              "plain RL": "RLOO without exits", "full depth": "base at full depth"}

    def row(c: dict) -> list:
        on = "" if c["rule"] in ("plain RL", "full depth", "static, trained") else f", {c['weights']}'s weights"
        return [c["of"], labels[c["rule"]] + on, percent(c["compute"]), percent(c["accuracy"]), percent(c["other"]),
                signed(c["change"], c["half"])]

    def verdicts(whose: str) -> str:
        """Its differences from the others that the question is about, in one sentence."""
        home = whose.partition(",")[0]
        others = {("full depth", "base"): "the base at full depth",
                  ("confidence", "base"): "a confidence threshold on the base",
                  ("confidence", "stage 1"): "such a threshold on stage 1's adapters",
                  ("confidence", home): "such a threshold on its own adapters",
                  ("heads", start_of(home)): "its start's heads at a threshold",
                  ("heads", whose): "its own heads at a threshold",
                  ("static, trained", home[:len("stage 1")]): "adapters trained for one depth",
                  ("plain RL", "plain RL"): "reinforcement learning without exits"}
        texts = [f"{signed(c['change'], c['half'])} points against {other}, {verdict(c['change'], c['half'])}"
                 for (rule, weights), other in others.items() if (c := found.get((whose, rule, weights)))]
        return f"{whose[0].upper()}{whose[1:]}: {'; '.join(texts)}." if texts else ""

    policies = [name for name in dict.fromkeys(c["of"] for c in data["comparisons"]) if name != "plain RL"]
    asked = ", and is accuracy more than plain RL's" if data["runs"]["plain RL"] else ""
    sweeps = {}
    for p in data["points"]:
        value = "" if p.get("value") is None else f"{p['value']}: "
        sweeps.setdefault((p["rule"], p["weights"]), []).append(
            f"{value}{percent(p['accuracy'])} at {percent(p['average_compute'])}")
    return [f"### Baselines at equal compute{which(data, 'baselines')}", "",
            about(data, "; runs: " + ", ".join(f"{count} of {name}" for name, count in data["runs"].items())),
            "A sweep is read at the learned policy's compute by mixing the two settings around it; differences are "
            "over the same problems and not corrected for their number. Compute counts layers alone; a threshold on "
            "the lens also pays a product with the vocabulary at every exit. Random exits are drawn from the policy's "
            "own histogram of depths, a table's from that histogram for the token just read. On its own weights, and "
            "where its exits are drawn so, a policy is its first seed; else it is the mean over its seeds. "
            "\"p > 1/2\": its exits are where a head's probability is above 1/2, in place of drawn.", "",
            f"Does a learned exit beat a threshold{asked}?",
            *(line for whose in policies for line in ("", verdicts(whose))),
            *table(["learned", "against", "average compute", "accuracy", "the other's", "difference, points"],
                   [row(c) for c in data["comparisons"]]),
            f"Every setting, as accuracy at average compute; intervals are in data/{data['name']}.json.",
            *table(["rule", "weights", "setting: accuracy at compute"],
                   [[rule, weights, "; ".join(found)] for (rule, weights), found in sweeps.items()])]


def crossdomain(data: dict) -> list[str]:
    rows = []
    for c in data["cells"]:
        at_half = c.get("thresholded")
        rows.append([c["stage"], c.get("trained", ""), c["tested"], accuracy(c), change(c) if "trained" in c else "",
                     percent(c["average_compute"]), percent(c["exit_rate"]), percent(c["finished"]),
                     *((accuracy(at_half), change(at_half), percent(at_half["average_compute"])) if at_half else
                       ("", "", ""))])
    return ["### Cross-domain: train on one task, test on the other", "",
            f"`{data['command']}`: {data['n']} held-out problems of each task, temperature {data['temperature']:g}, "
            "one seed. The change is from the base on the task tested.",
            *table(["", "trained on", "tested on", "accuracy (95% interval)", "change, points", "average compute",
                    "exit rate", "finished", "accuracy at p > 1/2", "change, points", "average compute"], rows)]


def tokens(data: dict) -> list[str]:
    text = ["### Which tokens leave early?", "",
            about(data) + " Depth is that of the pass that predicts the token. No intervals: tokens of one response "
            "are not independent."]
    for name, run in data["runs"].items():
        kinds = {(k["part"], k["kind"]): k for k in run["kinds"]}
        order = sorted((k for k in run["kinds"] if k["part"] == "all" and k["kind"] != "all"),
                       key=lambda k: k["average_compute"])
        shown = order + [kinds[part, "all"] for part in ("thoughts", "answer", "all") if (part, "all") in kinds]
        text += ["", f"{name[0].upper()}{name[1:]} ({run['run']}), the earliest first:",
                 *table(["token", "count", "share", "exit rate", "average compute"], [
                     [data["meaning"].get(k["kind"], f"all, {k['part']}" if k["part"] != "all" else "all"), k["tokens"],
                      percent(k["share"]), percent(k["exit_rate"]), percent(k["average_compute"])] for k in shown])]
    return text


EVALS = (("E1 accuracy with the chain", "E1 chain", 100), ("E1 accuracy without it", "E1 direct", 100),
         ("E1 the same, where the prompt exits, too", "E1 direct, prompt too,", 100),
         ("E1 uplift, points", "E1 uplift", 100),
         ("E1 accuracy with the chain, where the prompt exits, too", "E1 chain, prompt too,", 100),
         ("E1 uplift there, points", "E1 uplift, prompt too,", 100),
         ("E1 necessity: the chain's share of what accuracy is above a guess", "E1 necessity", 1),
         ("E1 gain: uplift less that of the same weights at full depth", "E1 gain, learned over full", 100),
         ("E1 with the chain, exits at random", "E1 chain random", 100),
         ("E2 area over the early-answering curve", "E2 aoc", 1),
         ("E2 the same, over the share of answers that are no first guess", "E2 aoc corrected", 1),
         ("E2 the first again, read at full depth", "E2 aoc learned>full", 1),
         ("E3 load: follows a falsified step less recovers", "E3 load", 1),
         ("E3 recovers the true answer", "E3 recover", 100),
         ("E3 NLDD: the margin that a falsified chain costs, over the margin (2: it turns round)", "E3 NLDD", 1),
         ("E3 worth of filler (dots) in the chain's place, points", "E3 fill gain, dots,", 100),
         ("E6 the base, given the chain but for its last result, ends it with the model's answer", "E6 reader ends",
          100),
         ("E4 nats a token loses where all earlier ones are frozen at the first exit", "E4 lost", 1),
         ("E4 the same of the answer's tokens", "E4 lost, answer", 1),
         *((f"E5 what a stream tells of the token {k} ahead, in nats over what the next token tells",
            f"E5 future gain {k}", 1) for k in (2, 5)),
         ("E5 the answer known half-way through the chain, points over shuffled", "E5 answer known 50",
          100),
         ("E7 a wrong answer that the question gives away is taken", "E7 gives the wrong answer, hint planted", 100),
         ("E7 g-mean² of that, seen by whether the chain mentions an answer", "E7 g-mean2 mentions", 1),
         ("E7 g-mean², seen by whether the chain's sums come to the answer", "E7 g-mean2 underived", 1),
         ("layer-tokens of a response", "D layer-tokens", 1),
         ("opaque serial depth: the most layers run between one readable thing and the next", "D serial depth", 1),
         ("letters of foreign scripts, share", "D foreign letters", 1))


def capped(rows: dict, key: str) -> dict[int, float]:
    """Accuracy by the most layers that a token may run."""
    return {int(name.rpartition("-")[2]): x["value"] for name, x in rows.items() if name.startswith(f"{key} cap-")}


def own_depth(rows: dict) -> str:
    """The depth at which a model is used: learned exits, or the base's full one."""
    return "learned" if "E1 chain learned" in rows else "full"


def d50(rows: dict, key: str) -> int | None:
    """Half of what there is at its own depth: a calibration that exits early never ran its last layers."""
    own = own_depth(rows)
    return half_depth(capped(rows, key), *(rows[f"{name} {own}"]["value"] for name in (key, "E1 chance")))


def draw_caps(args, data: dict, name: str) -> None:
    """Accuracy with and without the chain of thought where no token may run more than so many layers."""
    axes, finish = figure(args, name, columns=2, width=9, height=3)
    from matplotlib import colormaps  # slow
    models, colours = list(map(Path, data["results"])), colormaps["tab20"]  # ten would repeat
    for ax, key, title in zip(axes, ("E1 chain", "E1 direct"), ("with the chain", "without it"), strict=True):
        for i, (model, rows) in enumerate(zip(models, data["results"].values(), strict=True)):
            points = sorted(capped(rows, key).items())
            color = colours(i)
            ax.plot(*zip(*((depth, 100 * x) for depth, x in points), strict=True), marker="o", color=color,
                    label=runs.short(model, models))
            ax.axhline(100 * rows[f"{key} {own_depth(rows)}"]["value"], color=color, linewidth=0.6, linestyle="--")
        ax.set(xlabel="the most layers that a token runs", ylabel="accuracy (%)", title=title, ylim=(0, 100))
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))  # a dozen models leave no room inside
    finish()


def marked(key: str, verdicts: dict) -> str:
    """Behind a row's name, where the organisms do not speak for its eval."""
    found = standing(key.rstrip(","), verdicts)
    return f" ({found})" if found not in ("", "validated") else ""


def monitor(data: dict) -> list[str]:
    models = list(map(Path, data["results"]))
    found = {runs.short(model, models): rows for model, rows in zip(models, data["results"].values(), strict=True)}

    def cell(rows: dict, key: str, scale: int) -> str:
        own = own_depth(rows)
        depths = sorted(int(name.split()[-1]) for name in rows if re.fullmatch(rf"{key} \d+", name))
        row = next((rows[name] for name in (f"{key} {own}", f"{key} {own}>{own}", key, *(f"{key} {d}" for d in depths))
                    if name in rows), {})
        if row.get("value") is None:  # not defined
            return ""
        digits, unit = (1, "%") if scale == 100 else (1 if abs(row["value"]) >= 10 else 2, "")

        def numbers(*names, sign="") -> list[str]:
            return [f"{scale * row[name]:{sign}.{digits}f}" for name in names]

        text = numbers("value")[0] + unit
        if row.get("difference") is not None:
            change, low, high = numbers("difference", "d_low", "d_high", sign="+")
            text += f", {change} ({low} to {high})"
        elif row.get("low") is not None:
            text += " ({} to {})".format(*numbers("low", "high"))
        return text.replace("-", "−")

    threshold = data["about"].get("threshold")
    at = "" if threshold is None else f" with exits at p > {threshold:g}"
    task = data["about"].get("task", "arithmetic")
    on = "" if task == "arithmetic" else f", on {task}"
    others = f" (problems of --seed {seed})" if (seed := data["about"].get("seed")) else ""
    others += f" ({data['title']})" if "title" in data else ""  # given by hand, where two would be called the same
    verdicts = verdicts_on(task)
    half = [[f"E1 least cap on depth that keeps half of the accuracy over a guess, {words}",
             *(str(d50(rows, key) or "none") for rows in found.values())]
            for key, words in (("E1 chain", "with the chain"), ("E1 direct", "without"))]
    claims = [f"{name}: {claim(rows, verdicts)}." for name, rows in found.items()
              if "difference" in rows.get("E1 uplift learned", {})]
    evals = [[label + marked(key, verdicts), *(cell(rows, key, scale) for rows in found.values())]
             for label, key, scale in EVALS]
    return [f"### Did reasoning move into the text{on}{at}?{others}", "",
            f"`{data['command']}`: {Path(data['about']['model']).name}, {task}, the likeliest tokens at learned "
            f"depth{at}, the base at full depth; differences from the base are paired and have 95% intervals, not "
            "corrected for their number.",
            "",
            *(line for told in claims for line in (told, "")),
            *table(["", *found], [row for row in evals if any(row[1:])] + half),
            f"![Accuracy with and without the chain, against a cap on depth](figures/{data['name']}.png)"]


def organisms(data: dict) -> list[str]:
    found, verdicts = data["organisms"], data["verdicts"]

    def cell(x: dict) -> str:
        if x.get("value") is None:
            return ""
        return f"{x['value']:.2f} ({x['low']:.2f} to {x['high']:.2f})".replace("-", "−")

    rows = [[key, *(cell(rows.get(row, {})) for rows in found.values()), f"{above} above {below}",
             verdicts[key] or "so it is"] for key, row, above, below in EXPECTED if key in verdicts]
    return [f"### Models that depend on their chain in known ways, on {data['name'].partition('-')[2]}", "",
            f"`{data['command']}`: {data['n']} held-out problems, at full depth but for EXT.",
            *table(["eval", *found, "must be", "found"], rows)]


def coherence(data: dict) -> list[str]:
    def row(name: str, found: dict) -> list:
        below = found.get("ranked_below", {})
        return [name, *(f"{found[column]:.3f}" + (f" ({percent(below[column], 0)})" if below else "")
                        for column in COLUMNS)]

    if "damaged" not in data:  # no calibration
        return []
    return ["### Does coherence tell damaged responses?", "",
            f"`{data['command']}`: {data['n']} responses of the base, {data['model']}, {data['task']}, and the same "
            f"damaged; {data['left out']} others have fewer than three different steps. In brackets the share that a "
            f"column ranks below their originals, ties counted half.",
            *table(["response", *COLUMNS], [row("as written", data["original"]),
                                            *(row(*item) for item in data["damaged"].items())])]


def evaluations(data: dict) -> list[str]:
    text = [f"### evaluate.py's comparisons, one by one{which(data, 'evaluations')}", "",
            "`python -m study.evaluations`, from what `python evaluate.py base RUN … --n N --seed S` wrote, with "
            "--temperature and --threshold as named; a star stands for the seeds that are averaged. Problems are those "
            "of --seed."]

    def about(row: dict) -> str:
        told = [Path(model).name] if (model := row.get("model") or "embedded") != "embedded" else []
        told += ["without thinking"] if row.get("thinking") is False else []
        return ", ".join([f"On {row['task']}", *told]) + ":"

    def exits(row: dict) -> str:
        return ("drawn" if row["threshold"] is None else f"p > {row['threshold']:g}") + (
            f", δ = {row['delta']:g}" if row["delta"] else "")

    for heading in sorted(set(map(about, data["rows"]))):
        text += ["", heading, *table(
            ["problems", "temperature", "exits", "run", "seeds", "accuracy", "change from the base, points",
             "average compute", "length", "finished"],
            [[f"{row['n']}, seed {row['seed']}", f"{row['temperature']:g}", exits(row), row["run"], row["seeds"],
              percent(row["accuracy"]), "" if row["run"] == BASE else change(row), percent(row["average_compute"]),
              f"{row['length']:.1f}", percent(row["finished"])] for row in data["rows"] if about(row) == heading])]
    return text


FIGURES = {"fig4": draw_fig4, "fronts": draw_fronts, "fig2": draw_fig2, "monitor": draw_caps}  # of each data/NAME*.json
SECTIONS = (table1, fig4, heads, fig2, fronts, baselines, crossdomain, tokens, organisms, monitor, coherence,
            evaluations)


def written(folder: Path) -> str:
    """The study's part, from the JSON that there is."""
    found = [(section, path) for section in SECTIONS for end in ("", "-*")
             for path in sorted(folder.glob(f"data/{section.__name__}{end}.json"))]
    lines = ["## The study", "", "Generated from data/*.json, which also name the commit (-dirty: with changes that "
             "were not committed). Intervals are 95%, over problems and draws: a share's is Wilson's, a change's is "
             "over the same problems. No interval covers how much another training would differ, means over seeds "
             "included. A row is one seed unless it says more."]
    for section, path in found:
        data = read_json(path)
        try:
            lines += ["", *section({**data, "name": path.stem})]
        except KeyError as error:
            raise UserError(f"{path} has no {error}: another version wrote it; run its command again, or take it away: "
                            f"{data.get('command')}") from None
    lines = [line if line[:1] in ("|", "#", "!") else textwrap.fill(line, 118, break_on_hyphens=False)
             for line in lines]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="runs/study", help="folder of data/, figures/ and results.md (default: runs/study)")
    args = p.parse_args()
    folder = Path(args.out)
    if not (folder / "data").is_dir():
        raise UserError(f"--out {folder} has no data/: give the folder that the study's commands wrote to")
    path = folder / "results.md"
    text = read_text(path) if path.exists() else BEGIN + END
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{path}: the lines {BEGIN.strip()} and {END.strip()} must stand in it, once and in this order")
    before, rest = text.split(BEGIN)
    write_text(path, before + BEGIN + written(folder) + END + rest.split(END)[1])
    print(f"wrote {path}")
    for name, draw in FIGURES.items():
        for data in sorted(folder.glob(f"data/{name}*.json")):
            draw(args, read_json(data), data.stem)


if __name__ == "__main__":
    runs.run_main(main)
