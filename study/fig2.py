"""The paper's Figure 2: stage 2 over its steps, several seeds, every checkpoint on the same held-out problems.

Writes fig2.json and fig2.png: a light line a seed, their mean in bold, the base model dashed. With --kl-factor F they
are fig2-kl-F.json and so on, of stage 2 from that calibration.

    python -m study.fig2
"""

from statistics import fmean as mean

import flags
import runs
from checkpoints import checkpoint, checkpoints
from evaluate import paired
from study import common
from study.common import answers, base_answers, correct, mean_correct, point

SHOWN = {"accuracy": "accuracy (%)", "average_compute": "average compute (% of layers)",
         "total_compute": "total compute (full-depth tokens)", "coherence": "coherence (0 to 1)"}


def on_schedule(run) -> dict:
    """A run's checkpoints by step, but for those that an interruption left between."""
    every = runs.read_config(run)["args"]["save_every"]
    steps = {int(folder.name.removeprefix("step-")): folder for folder in checkpoints(run)}
    return {step: folder for step, folder in steps.items() if step % every == 0 or step == max(steps)}


def main() -> None:
    args = common.arguments(__doc__, lambda p: p.add_argument(
        "--kl-factor", type=flags.number(0, 1e6, above=True), help="of the stage 1 to start from (default: s1's)"))
    name = f"fig2-kl-{args.kl_factor:g}" if args.kl_factor else "fig2"
    start, rl = common.from_kappa(args, args.kl_factor)
    if not rl:
        return
    found = [{0: checkpoint(start)} | on_schedule(run) for run in rl]
    steps = sorted(set.intersection(*map(set, found)))

    def measured(answered, **about):
        return point(args, answered, **about, **common.coherence_of(args, answered))

    base = measured(base_answers(args))
    seeds = [{"run": run.name, "steps": [measured(answers(args, of[step]), step=step) for step in steps]}
             for run, of in zip(rl, found, strict=True)]
    ended = mean_correct([answers(args, of[steps[-1]]) for of in found])
    data = common.save(
        args, name, "fig2", base=base, seeds=seeds, change_from_base=paired(correct(base_answers(args)), ended),
        change_from_stage_1=paired(correct(answers(args, found[0][0])), ended),
        mean=[{"step": step, **{name: mean(seed["steps"][i][name] for seed in seeds) for name in SHOWN}}
              for i, step in enumerate(steps)])
    draw(args, data, name)


def draw(args, data: dict, name: str) -> None:
    axes, finish = common.figure(args, name, len(SHOWN), width=2.6 * len(SHOWN), height=2.8)
    for ax, (name, label) in zip(axes, SHOWN.items(), strict=True):
        scale = 100 if "%" in label else 1
        for seed in data["seeds"]:
            ax.plot(*line(seed["steps"], name, scale), color="C0", alpha=0.35, linewidth=0.8)
        of_all = f"mean of {len(data['seeds'])} seeds"
        ax.plot(*line(data["mean"], name, scale), color="C0", linewidth=2.2, label=of_all)
        ax.axhline(scale * data["base"][name], color="0.3", linestyle="--", label="base model")
        ax.set(xlabel="step of stage 2", ylabel=label)
    axes[0].legend()
    finish()


def line(rows: list[dict], name: str, scale: float):
    return [row["step"] for row in rows], [scale * row[name] for row in rows]


if __name__ == "__main__":
    runs.run_main(main)
