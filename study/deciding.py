"""Answers at once: how many layers runs the token that decides, and would more of them help?

    python evaluate.py RUN … --no-thinking --temperature 0 --threshold 0.5 --out OWN
    python evaluate.py RUN … --no-thinking --temperature 0 --threshold 1 --out FULL
    python -m study.deciding OWN FULL

An answer of stories is "ANSWER: box" and the eos. Its mean depth says little: the token before the eos decides, and the
others could be left to the first layer. By that token's depth the table gives the stories' share, and how many of them
are solved: at the depths taken (OWN), by the same weights at full depth (FULL), and by the base.
"""

from pathlib import Path
from statistics import fmean as mean

import flags
import runs
from data.hub import UserError
from evaluate import BASE
from study.evaluations import completions


def rows(own: dict, full: dict) -> list[dict]:
    """A row for each model but the base and range of the deciding token's depth: one layer, up to half, deeper."""
    L, found = max(max(row["depths"]) for row in own[BASE].values()), []
    for model in own.keys() - {BASE}:
        if model not in full or own[model].keys() != full[model].keys():
            raise UserError(f"{model} was not asked the same problems in both folders: evaluate it in both alike")
        depth = {i: row["depths"][-2] for i, row in own[model].items() if row["finished"] and len(row["depths"]) > 1}
        if not depth:
            raise UserError(f"{model} has no finished answer: raise evaluate.py's --max-new-tokens")
        for low, high in ((1, 1), (2, L // 2), (L // 2 + 1, L)):
            at = [i for i, d in depth.items() if low <= d <= high]
            found.append({"model": model, "mean_depth": mean(depth.values()), "low": low, "high": high,
                          "share": len(at) / len(depth), "n": len(at)} | {
                name: mean(of[i]["correct"] for i in at) if at else None
                for name, of in (("own", own[model]), ("full", full[model]), ("base", own[BASE]))})
    return sorted(found, key=lambda row: (row["model"], row["low"]))


def main() -> None:
    p = flags.Parser(description=__doc__)
    p.add_argument("own", type=Path, help="what evaluate.py wrote of runs at the depths they take")
    p.add_argument("full", type=Path, help="and of the same at full depth")
    args = p.parse_args()
    own, full = completions(args.own), completions(args.full)
    if own.keys() == {BASE}:
        raise UserError(f"{args.own} holds answers of no run, only the base's: give evaluate.py a run, too")
    found = rows(own, full)
    print(f"{'':24}{'layers':>8}{'stories':>9}{'share':>8}{'own depth':>11}{'full depth':>12}{'base':>8}")
    for row in found:
        layers = f"{row['low']}" if row["low"] == row["high"] else f"{row['low']}-{row['high']}"
        solved = [f"{row[name]:.1%}" if row["n"] else "" for name in ("own", "full", "base")]
        print(f"{row['model']:24}{layers:>8}{row['n']:>9}{row['share']:>8.1%}{solved[0]:>11}{solved[1]:>12}"
              f"{solved[2]:>8}" + (f"   mean depth {row['mean_depth']:.2f}" if row["low"] == 1 else ""))


if __name__ == "__main__":
    runs.run_main(main)
