"""The paper's Table 1 and Figure 4: what the KL factor of (4) buys and costs, and whether exits follow their target.
Beside it each row with its exits where a head's probability is above a half, in place of drawn.

Writes table1.json, fig4.json and fig4.png.

    python -m study.table1
"""

import math

import runs
from data.hub import read_json
from evaluate import BASE, paired
from study import common
from study.common import answers, base_answers, correct, point, undrawn

PAPER = {"0.25": (1.1, 0.59, 0.224), "0.5": (5.5, 0.49, 0.081), "1": (7.5, 0.47, 0.064), "2": (8.4, 0.43, 0.053),
         "4": (8.5, 0.37, 0.046), BASE: (8.9, 0.0, 0.0)}  # coherence of 10, exit rate, layer savings


def total_variation(p: list[float], q: list[float]) -> float:
    """Half of the sum of |p - q|: the share of tokens that would have to leave elsewhere."""
    return sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2


def main() -> None:
    args = common.arguments(__doc__)
    factors = (0.25, 0.5, 1, 2, 4, 16)
    if args.model == "embedded":  # of which a row is trained in an hour or so
        factors += (64,)
    found = {f"{factor:g}": run for factor in factors if (run := common.kl_run(args, factor))}
    if not found:
        return

    def row(name: str, answered: common.Answers, held_out: dict) -> dict:
        return point(args, answered, name=name, paper=PAPER.get(name), **common.coherence_of(args, answered),
                     **{key: held_out.get(key) for key in ("token_kl", "token_kl_at_own_exits")})

    rows, distributions = [], []
    for name, run in found.items():
        answered, at_half, held_out = answers(args, run), undrawn(args, run), read_json(run / "complete.json")
        rows.append(row(name, answered, held_out) | {
            "steps": runs.read_config(run)["args"]["steps"],
            "thresholded": point(args, at_half), "thresholded_change": paired(correct(answered), correct(at_half))})
        target, learned = (held_out[which]["distribution"] for which in ("target", "learned"))
        distributions.append({"name": name, "depths": answered.depth_of_outcome, "target": target, "learned": learned,
                              "positions": held_out["positions"], "total_variation": total_variation(target, learned)})
    rows.append(row(BASE, base_answers(args), {}))
    common.save(args, "table1", "table1", rows=rows)
    draw(args, common.save(args, "fig4", "table1", distributions=distributions), "fig4")


def draw(args, data: dict, name: str) -> None:
    distributions = data["distributions"]
    columns = min(4, len(distributions))
    axes, finish = common.figure(args, name, columns, math.ceil(len(distributions) / columns), 7.5, 3.6)
    for ax, d in zip(axes, distributions, strict=False):
        at = range(len(d["depths"]))
        for shift, which, color in ((-0.2, "target", "0.65"), (0.2, "learned", "C0")):
            ax.bar([x + shift for x in at], [100 * share for share in d[which]], 0.4, color=color, label=which)
        ax.set_xticks(at, d["depths"])
        ax.set_title(f"κ = {d['name']}", fontsize=9)
    axes[0].legend()
    for ax in axes[len(distributions):]:
        ax.axis("off")
    for ax in axes[::columns]:
        ax.set_ylabel("tokens (%)")
    for ax in axes[-columns:]:
        ax.set_xlabel("depth (layers run)")
    finish()


if __name__ == "__main__":
    runs.run_main(main)
