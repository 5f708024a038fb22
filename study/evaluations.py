"""What evaluate.py wrote of runs, as one table: the same problems and exits beside each other, a run's seeds averaged.

    python -m study.evaluations runs/evaluate-… runs/evaluate-…

Writes evaluations.json, so that what is said of them in a text outlives the folders.
"""

import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean as mean

import flags
import runs
from data.hub import UserError, field, read_json, read_lines, write_json
from evaluate import BASE, paired

SETTING = {"model": str, "task": str, "thinking": bool, "max_new_tokens": int, "n": int, "seed": int,
           "temperature": float, "threshold": float, "delta": float}
MEANS = ("accuracy", "average_compute", "length", "finished")


def kind(run: str) -> str:
    """A run, with a star in place of its seed."""
    return str(Path(run).parent / re.sub(r"^(rl-[\d.]+(?:e[-+]?\d+)?|full)-\d+", r"\1-*", Path(run).name))


def run_name(run: str | None) -> str:
    """A run's path, from here where it lies below, however it was given; or BASE."""
    if run is None:
        return BASE
    return str(Path(run).relative_to(Path.cwd()) if Path(run).is_relative_to(Path.cwd()) else run)


def completions(folder: Path) -> dict[str, dict[str, dict]]:
    """Model -> problem -> its row in an evaluation's completions.jsonl."""
    models, where = defaultdict(dict), folder / "completions.jsonl"
    if not where.exists():
        raise UserError(f"{folder} holds no completions.jsonl: give a folder that evaluate.py wrote")
    for at, row in read_lines(where):
        models[field(row, "model", str, at)][field(row, "id", str, at)] = row
    if BASE not in models:  # who is asked first
        raise UserError(f"{where} holds no answers of the base: let evaluate.py finish, or give another evaluation")
    return models


def read(folder: Path) -> tuple[tuple, dict[str, tuple[dict, dict]]]:
    """The setting of an evaluation; and by run, or BASE, its metrics and which problems it solves."""
    where = folder / "evaluation.json"
    found = read_json(where)
    given = field(found, "args", dict, where)
    solved = {model: {problem: float(row["correct"]) for problem, row in of_model.items()}
              for model, of_model in completions(folder).items()}
    given |= {"n": len(next(iter(solved.values())))}  # a task may have fewer than were asked for
    return (tuple(field(given, name, of, where, default=None) for name, of in SETTING.items()),
            {run_name(m["run"]): (m, solved.get(m["name"], {})) for m in found["metrics"]})


def rows(folders: list[Path]) -> list[dict]:
    """A row for the base of each setting, and one for each kind of run, with the mean of its seeds."""
    settings = defaultdict(dict)
    for folder in folders:
        setting, models = read(folder)
        for run, found in models.items():
            if settings[setting].setdefault(run, found)[1] != found[1]:
                raise UserError(f"{folder} has other answers of {run} than another of the folders: leave one of them "
                                f"out")
    out = []
    for setting, models in sorted(settings.items(), key=str):
        kinds = defaultdict(list)
        for run in models:
            kinds[kind(run)].append(run)
        base = models[BASE][1]
        for name, alike in sorted(kinds.items(), key=lambda item: (item[0] != BASE, item[0])):
            metrics, solved = zip(*(models[run] for run in alike), strict=True)
            if any(one.keys() != base.keys() for one in solved):
                raise UserError(f"{alike[0]} was asked other problems than the base of the same setting: give "
                                f"evaluations of one version")
            gain, half = paired(base.values(), [mean(one[problem] for one in solved) for problem in base])
            out.append({**dict(zip(SETTING, setting, strict=True)), "run": name, "seeds": len(alike),
                        **{key: mean(m[key] for m in metrics) for key in MEANS},
                        "accuracy_change": gain, "accuracy_change_half": half})
    return out


def main() -> None:
    p = flags.Parser(description=__doc__)
    p.add_argument("folders", nargs="+", type=Path, help="what evaluate.py wrote")
    p.add_argument("--out", default="runs/study", help="folder of data/ (default: runs/study)")
    args = p.parse_args()
    path = Path(args.out) / "data" / "evaluations.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"command": runs.command("-m", "study.evaluations"), "commit": runs.commit(),
                      "rows": rows(args.folders)})
    print(f"wrote {path}")


if __name__ == "__main__":
    runs.run_main(main)
