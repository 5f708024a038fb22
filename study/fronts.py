"""Accuracy against compute: what lambda, the KL factor and the inference offset delta trade, beside the baselines'.

Writes fronts.json and three figures: fronts.png (with the KL factors of study.table1 and the simpler exits of
study.baselines, where these have run), verbosity.png (does a price on depth make texts longer?) and histogram.png
(where tokens leave, over the steps of stage 2).

    python -m study.fronts
"""

import sys
from pathlib import Path
from statistics import fmean as mean

import runs
from data.hub import read_json, read_lines
from evaluate import BASE, paired
from study import common
from study.common import answers, correct, mean_correct, point, undrawn

LAMBDAS = (0, 0.03, 0.1, 0.3, 1, 3)
DELTAS = (-4, -2, -1, 0, 1, 2)


def main() -> None:
    args = common.arguments(__doc__)
    s1 = common.stage_one(args)
    if s1 is None:
        return
    front = {key: [] for key in ("lambda", "gated", "lower kappa", "delta stage 1", "delta stage 2")}
    for lam in LAMBDAS:
        for seed in range(args.seeds if lam == 0.1 or not args.train else 1):  # all that there are; one is trained
            if run := common.rl_run(args, lam, seed):
                front["lambda"].append(point(args, answers(args, run), value=lam, seed=seed,
                                             thresholded=point(args, undrawn(args, run))))
    s2 = common.rl_run(args)
    if run := common.stage_two(args, "rl-0.1-gated", 0.1, 0, s1, "--gate-depth-on-correct"):
        front["gated"].append(point(args, answers(args, run), value=0.1, seed=0))
        if s2:
            front["gated"][0]["less_ungated"] = paired(*(correct(answers(args, of)) for of in (s2, run)))
    recovery = from_lower_kappa(args, front["lower kappa"])
    for name, run in (("delta stage 1", s1), ("delta stage 2", s2)):
        for delta in DELTAS if run else ():
            front[name].append(point(args, answers(args, run, delta=delta), value=delta))
    training = [{"step": m["step"], **{name: m[name] for name in ("exit_histogram", "average_compute", "length")}}
                for _, m in (read_lines(s2 / "metrics.jsonl") if s2 else ())]
    data = common.save(args, "fronts", "fronts", base=point(args, common.base_answers(args)), front=front,
                       recovery=recovery, training=training)
    draw(args, data, "fronts")


def from_lower_kappa(args, rows: list[dict]) -> dict | None:
    """Does stage 2 win back what an earlier exit costs? Appends a row for each seed and returns what all come to."""
    kappa, start, found = common.lower_kappa(args)
    if not found:
        return None
    after = [answers(args, run) for run in found]
    for run, answered in zip(found, after, strict=True):
        rows.append(point(args, answered, value=0.1, seed=runs.read_config(run)["args"]["seed"], kappa=kappa))
    return {"kappa": kappa, "seeds": len(found), "drawn": gain(args, answers(args, start), after),
            "thresholded": gain(args, undrawn(args, start), [undrawn(args, run) for run in found])}


def gain(args, before, after: list) -> dict:
    """From one run's answers to those of several."""
    ended, points = mean_correct(after), [point(args, answered) for answered in after]
    return {"start": point(args, before), "accuracy": mean(ended),
            "average_compute": mean(row["average_compute"] for row in points),
            "change_from_base": paired(correct(common.base_answers(args)), ended),
            "change_from_start": paired(correct(before), ended)}


def made(args, ours: dict, name: str, part: str) -> list[dict]:
    """What another of the study's commands has written of the same problems, if it has."""
    path = Path(args.out) / "data" / f"{name}.json"
    found = read_json(path) if path.exists() else {}
    same = all(found.get(key) == ours[key] for key in ("model", "problems", "temperature"))
    if found and not same:
        print(f"{path} is about another model, other problems or another temperature: left out; run study.{name} with "
              f"the same flags", file=sys.stderr)
    return found[part] if same else []


def draw(args, data: dict, name: str) -> None:
    factors = [row for row in made(args, data, "table1", "rows") if row["name"] != BASE]
    draw_fronts(args, data, name, factors, made(args, data, "baselines", "points"))
    if data["front"]["lambda"]:
        draw_verbosity(args, data)
    if data["training"]:
        draw_histogram(args, data["training"])


def draw_fronts(args, data: dict, name: str, factors: list[dict], simpler: list[dict]) -> None:
    def curve(ax, rows, label, **style):
        rows = sorted(rows, key=lambda row: row["average_compute"])
        if rows:
            ax.plot([100 * row["average_compute"] for row in rows], [100 * row["accuracy"] for row in rows],
                    label=label, **style)

    axes, finish = common.figure(args, name, 2 if simpler else 1, width=9 if simpler else 4)
    front = data["front"]
    for ax in axes:
        curve(ax, [data["base"]], "base model", color="k", marker="*", markersize=9, linestyle="")
        curve(ax, front["lambda"], "stage 2, each λ and seed", color="C3", marker="o", linestyle="")
        curve(ax, [row["thresholded"] for row in front["lambda"] if "thresholded" in row],
              "… exits at p > 1/2, not drawn", color="C3", marker="D", linestyle="", markerfacecolor="w")
        curve(ax, front["delta stage 2"], "stage 2, λ = 0.1: δ swept", color="C3", linestyle="-", marker=".")
        curve(ax, front["lower kappa"], "stage 2 from a lower κ", color="C3", marker="s", linestyle="",
              markerfacecolor="w")
    curve(axes[0], front["delta stage 1"], "stage 1: δ swept", color="C0", marker=".")
    curve(axes[0], factors, "stage 1: κ swept", color="C2", marker="s", linestyle=":")
    curve(axes[0], [row["thresholded"] for row in factors if "thresholded" in row], "… exits at p > 1/2, not drawn",
          color="C9", marker="p", linestyle="--")
    lower = next((p["weights"] for p in simpler if p["weights"].startswith("stage 2 from")), "")
    for rule, weights, style in (
            ("confidence", "base", dict(color="C1", marker="^")),
            ("confidence", "stage 1", dict(color="C1", marker="^", linestyle="--", markerfacecolor="w")),
            ("heads", "stage 1", dict(color="C9", marker="p", linestyle="--")),
            ("heads", lower, dict(color="C9", marker="p", linestyle=":", markerfacecolor="w")),
            ("confidence", "stage 2", dict(color="C1", marker="^", linestyle=":", markerfacecolor="w")),
            ("oracle", "base", dict(color="0.5", marker="v")),
            ("oracle", "stage 2", dict(color="0.5", marker="v", linestyle=":")),
            ("static, trained", "stage 1", dict(color="C4", marker="x")),
            ("static, trained", "stage 2", dict(color="C4", marker="x", linestyle="--")),
            ("random", "stage 2", dict(color="C5", marker="D", linestyle="")),
            ("plain RL", None, dict(color="C6", marker="P", linestyle=""))):  # None: each seed has weights of its own
        rows = [p for p in simpler if p["rule"] == rule and weights in (None, p["weights"])]
        curve(axes[-1], rows, f"{rule}, {weights}" if weights else rule, **style)
    for ax in axes:  # last, since a limit set stops the axis from growing
        ax.set(xlabel="average compute (% of layers)", ylabel="accuracy (%)", ylim=(0, None))
    axes[0].legend(fontsize=7, loc="lower right")
    if simpler:
        axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    finish()


def draw_verbosity(args, data: dict) -> None:
    axes, finish = common.figure(args, "verbosity", 2, height=2.6)
    rows, base = data["front"]["lambda"], data["base"]
    lambdas = sorted({row["value"] for row in rows})  # the axis is categorical, since 0 has no logarithm
    labels = {"length": "change of length (tokens)", "total_compute": "change of total compute\n(full-depth tokens)"}
    for ax, (name, label) in zip(axes, labels.items(), strict=True):
        ax.errorbar([lambdas.index(row["value"]) for row in rows], [row[f"{name}_change"] for row in rows],
                    [row[f"{name}_change_half"] for row in rows], fmt="o", color="C0", elinewidth=0.8, capsize=2)
        ax.axhline(0, color="0.3", linestyle="--", label=f"base model: {base[name]:.1f} a response")
        ax.set_xticks(range(len(lambdas)), [f"{lam:g}" for lam in lambdas])
        ax.set(xlabel="λ, price of depth", ylabel=label)
        ax.legend()
    finish()


def draw_histogram(args, training: list[dict]) -> None:
    (ax,), finish = common.figure(args, "histogram", width=5)
    depths = list(training[0]["exit_histogram"])
    shades = [str(0.9 - 0.75 * i / (len(depths) - 1)) for i in range(len(depths))]  # the deeper the darker
    ax.stackplot([m["step"] for m in training],
                 [[100 * m["exit_histogram"][depth] for m in training] for depth in depths], colors=shades,
                 labels=depths, linewidth=0)
    ax.set(xlabel="step of stage 2", ylabel="tokens (%)", ylim=(0, 100), xlim=(0, training[-1]["step"]))
    ax.legend(title="depth", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    finish()


if __name__ == "__main__":
    runs.run_main(main)
