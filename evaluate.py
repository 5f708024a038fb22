"""Compare the base model, stage 1 and stage 2 on held-out problems: accuracy, depth, and a page to look at.

    python evaluate.py                          the newest complete run and, of stage 2, the stage-1 run it came from
    python evaluate.py RUN RUN …                any runs of one model, beside the base model
    python evaluate.py base --model MODEL       the base model alone
    python evaluate.py --delta -1               exits less often than trained (eagerness at inference)
    python evaluate.py --threshold 0.5          exits where a head says so with more than 0.5, without a draw
    python evaluate.py --merge RUN --out DIR    writes base + LoRA as a plain Hugging Face checkpoint, without exits

Writes evaluation.json, completions.jsonl and page.html, which opens offline. Where it was stopped, the same command
with the folder as --out goes on after the last responses there, if begun.json says that it is the same.
"""

import math
import os
import shutil
from dataclasses import asdict, fields
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

import flags
import parallel
import report
import runs
from checkpoints import checkpoint, checkpoints, digest, exits_of, fingerprint, load_policy, merge, write_tensors
from data import tasks
from data.hub import UserError, as_json, field, read_json, read_lines, resolve, write_json, write_text
from exits import Policy, Response, adapters_off, collate, token_logp_all
from fast.chunks import in_chunks
from model import Transformer
from report.kinds import by_kind
from sample import in_parts

Z = 1.96  # 95% intervals
BASE = "base"


def wilson(share: float, n: int) -> tuple[float, float]:
    """95% interval of a share of n independent outcomes (Wilson 1927); unlike share ± 2 SE it is sound near 0 and 1."""
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def measure(rows: list[dict], depth_of_outcome: list[int]) -> dict:
    """The README's metrics over responses, pooled over generated tokens; total compute is per response.
    accuracy_flexible also counts answers that stand elsewhere than the instruction asks (data/grade.py)."""
    n, L = len(rows), depth_of_outcome[-1]
    depths = [d for row in rows for d in row["depths"]]
    accuracy = sum(row["correct"] for row in rows) / n
    low, high = wilson(accuracy, n)
    compute = sum(depths) / len(depths) / L
    return {"n": n, "accuracy": accuracy, "accuracy_low": low, "accuracy_high": high,
            "accuracy_flexible": sum(row["flexible"] for row in rows) / n,
            "exit_rate": sum(d < L for d in depths) / len(depths),
            "layer_savings": 1 - compute, "average_compute": compute,
            "total_compute": sum(depths) / L / n, "length": len(depths) / n,
            "finished": sum(row["finished"] for row in rows) / n,
            "exit_histogram": {str(d): depths.count(d) / len(depths) for d in depth_of_outcome}}


def answer(policy: Policy, problems, prompts, tokenizer, label: str, rows: list[dict], out: Path, args) -> list[dict]:
    """A row of completions.jsonl in `out` for each problem, from the policy or from the base model at full depth; goes
    on after the `rows` that stand there, and writes each part down when it is drawn."""
    base = label == BASE
    with adapters_off(policy, base):
        for i, responses in in_parts(
                policy, prompts, len(rows), args.rows, "answers", leave=False, max_new_tokens=args.max_new_tokens,
                eos_ids=tokenizer.eos_ids, temperature=args.temperature, delta=args.delta, threshold=args.threshold,
                seed=(args.seed,), depths=policy.n_layers if base else None):
            new = graded(problems[i : i + len(responses)], responses, tokenizer)
            rows += new
            if parallel.rank() == 0:
                with open(out / "completions.jsonl", "a", encoding="utf-8") as file:
                    file.writelines(as_json({"model": label, **row}) for row in new)
    return rows


def graded(problems, responses: list[Response], tokenizer) -> list[dict]:
    """What became of one response to each problem: a row of completions.jsonl."""
    rows = []
    for problem, response in zip(problems, responses, strict=True):
        grade = runs.grade(problem, response, tokenizer)
        rows.append({"id": problem.id, "text": runs.text_of(response, tokenizer), **asdict(response),
                     "gold": problem.gold, "value": grade.value, "rule": grade.rule, "correct": grade.strict,
                     "flexible": grade.flexible})
    return rows


def response_of(row: dict) -> Response:
    return Response(**{part.name: row[part.name] for part in fields(Response)})


@torch.no_grad()
def transcript(policy: Policy, row: dict, tokenizer, base: bool, args) -> dict:
    """A response as the page shows it: every token's depth, exit probabilities and the top tokens of each lens."""
    response = response_of(row)
    batch = collate([response], policy.n_layers, policy.device)
    with adapters_off(policy, base):
        out = policy(batch.ids, batch.depths, place=batch.place)

    def best(h):
        return tuple(token_logp_all(policy.model, h).exp().topk(3))

    top = []
    for h in (*out.at_exits, out.h):
        p, ids = in_chunks(best, policy.model.config.vocab_size, h[batch.predicting])
        top.append([list(zip(tokenizer.pieces(some), map(float, q), strict=True))
                    for some, q in zip(ids.tolist(), p.tolist(), strict=True)])
    exit_probs = [] if base else torch.sigmoid(out.exit_logits[batch.predicting] + args.delta).tolist()
    return {"tokens": tokenizer.pieces(response.token_ids), "depths": response.depths, "exit_probs": exit_probs,
            "top": [list(per_exit) for per_exit in zip(*top, strict=True)], "correct": row["correct"],
            "finished": response.finished, "value": row["value"]}


def table(metrics: list[dict]) -> str:
    """The comparison as text, one model a line."""
    width = max(len(m["name"]) for m in metrics) + 2
    lines = [f"{'':{width}}{'accuracy (95% CI)':>20}{'exit rate':>11}{'savings':>9}{'compute':>9}{'total':>8}"
             f"{'length':>8}{'finished':>10}"]
    for m in metrics:
        accuracy = f"{m['accuracy']:.1%} ({m['accuracy_low']:.0%}-{m['accuracy_high']:.0%})"
        lines.append(f"{m['name']:{width}}{accuracy:>20}{m['exit_rate']:>11.1%}{m['layer_savings']:>9.1%}"
                     f"{m['average_compute']:>9.3f}{m['total_compute']:>8.1f}{m['length']:>8.1f}{m['finished']:>10.1%}")
    return "\n".join(lines)


def paired(before, after, shares: bool = True) -> tuple[float, float]:
    """Mean difference and half of its 95% interval, taken problem by problem: narrower, where both solve mostly the
    same ones. Where few problems differ, or none, that would claim too much: so of `shares`, not of lengths or compute,
    the interval counts one more that is won and one that is lost, as Bonett and Price (2012) do."""
    after, before = (torch.tensor([float(x) for x in of], dtype=torch.double) for of in (after, before))
    gain = after - before
    counted = torch.cat([gain, gain.new_tensor([1, -1])]) if shares else gain
    half = Z * float(counted.std(correction=0)) / math.sqrt(len(counted))
    return float(gain.mean()), min(1.0, half) if shares else half


def headline(base: dict, before: dict, other: dict, rows: dict[str, list[dict]]) -> str:
    """What happened, in one sentence; in another, what a run changed on the one `before` it."""
    of_base, of_before, of_other = ([row["correct"] for row in rows[m["name"]]] for m in (base, before, other))
    gain, half = paired(of_base, of_other)
    inside = "a significant difference" if abs(gain) > half else "no significant difference"
    finished = ("" if abs(other["finished"] - base["finished"]) < 0.01 else  # what is cut off counts as wrong
                f"; finished are {other['finished']:.1%} against {base['finished']:.1%}")
    beside = "" if before is base else "; {:+.1f} ± {:.1f} points from {}, which runs {:.0f}%".format(
        *(100 * x for x in paired(of_before, of_other)), before["name"], 100 * before["average_compute"])
    return (f"{other['name']}: {other['accuracy']:.1%} against the base's {base['accuracy']:.1%} "
            f"({100 * gain:+.1f} ± {100 * half:.1f} points on the same {len(rows[BASE])} problems: {inside}), "
            f"running {other['average_compute']:.0%} of its layers{finished}{beside}")


def chosen_runs(args) -> dict[str, Path]:
    """Column name -> run: those given, else the newest complete one, behind the stage-1 run it came from."""
    folders = [Path(run) for run in args.runs if run != BASE]
    if not args.runs:
        newest = runs.newest("rloo", "distill", model=args.model and flags.name_of(args.model))
        if newest is None:
            raise UserError(f"no complete run under {runs.RUNS}/: run python distill.py first, name runs to compare, "
                            f"or evaluate.py base")
        folders = [*stage_one_of(newest), newest]
    configs = refuse_unlike(folders, args) if args.runs else [runs.read_config(folder) for folder in folders]
    stages = [{"distill": "stage 1", "rloo": "stage 2"}[config["stage"]] for config in configs]
    columns = {}
    for folder, stage in zip(folders, stages, strict=True):
        alike = [other for other, its in zip(folders, stages, strict=True) if its == stage]
        name = stage if len(alike) == 1 else f"{stage} {runs.short(folder, alike)}"
        columns[name + runs.incomplete(folder)] = folder
    return columns


def stage_one_of(run: Path) -> list[Path]:
    """The stage-1 run that a run came from, or none: where it is one itself, or its start is gone or not comparable."""
    config = runs.read_config(run)
    init = field(config["args"], "init", str, runs.run_of(run) / "config.json", default=None)
    if not init:
        return []
    first = runs.find(init, beside=run)
    if not first.is_dir():
        runs.say(f"{init}, where it started, is not there any more, and is left out")
        return []
    first = as_it_was(first, config.get("start"))
    if exits_of(checkpoint(first)) != exits_of(checkpoint(run)):
        runs.say(f"{first} has other exits by now, and is left out")
        return []
    return [first]


def as_it_was(run: Path, start: str | None) -> Path:
    """A run, or, where it has got on since a stage 2 started from it, the checkpoint that this started from."""
    if start in (None, digest(checkpoint(run))):
        return run
    if found := [folder for folder in checkpoints(run) if digest(folder) == start]:
        return found[0]
    runs.say(f"{run} is no longer what stage 2 started from: it has been trained on, or made anew")
    return run


def refuse_unlike(folders: list[Path], args) -> list[dict]:
    """The runs' configs. Raises UserError where they are not about the same, or have other exits."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"{' '.join(args.runs)} names a run twice: name each once")
    configs, unlike = [runs.read_config(folder) for folder in folders], {}
    task = args.task and tasks.name_of(args.task)
    for name in (*flags.INHERITED, "dtype"):
        found = [(folder, config["args"].get(name)) for folder, config in zip(folders, configs, strict=True)
                 if name != "data" or task in (None, config["args"].get("task"))]  # those of another task are not read
        other = next((one for one in found if one[1] != found[0][1]), None)
        if other and getattr(args, name) is None:
            unlike[f"--{flags.flag(name)}"] = "{} has {} {!r:.80}, and {} has {!r:.80}".format(
                found[0][0], name, found[0][1], *other)
    if unlike:
        raise UserError(f"{'; '.join(unlike.values())}: compare runs about the same, or give {' and '.join(unlike)} "
                        f"for all of them")
    if len({tuple(exits_of(checkpoint(folder))) for folder in folders}) > 1:
        raise UserError("the runs have different exits: compare runs of one --exit-every")
    return configs


def check_row(row: dict, where: str, config) -> None:
    """Refuses a row of completions.jsonl unless it holds a response that the model can have given."""
    field(row, "model", str, where)
    for name, most in (("prompt_ids", config.vocab_size - 1), ("token_ids", config.vocab_size - 1),
                       ("depths", config.num_hidden_layers)):
        field(row, name, list, where, 0, most)
    field(row, "finished", bool, where)
    for name in ("depths", "logp_exit", "logp_token"):
        if not isinstance(row.get(name), list) or len(row[name]) != len(row["token_ids"]):
            raise UserError(f"{where}: {name} must be a list with a number for each of token_ids: delete this line "
                            f"and the model's after it")


def go_on(args, problems, prompts, model: Transformer, tokenizer, columns: dict[str, Path], chosen: dict[str, Path]):
    """The folder to write, and what the same command left there when it was stopped: a model's rows by its label,
    graded anew, for a grade() of one's own may have failed and been mended. Of a run that has got on meanwhile,
    nothing."""
    weights = {BASE: fingerprint(model)} | {name: digest(folder) for name, folder in chosen.items()}
    about = {"args": {name: value for name, value in vars(args).items()
                      if name not in (*runs.FREE_ON_RESUME, "runs", "out", "show")},
             "problems": runs.problems_hash(problems, judge=False), "runs": list(map(str, columns.values())),
             "weights": weights}
    out, kept = Path(args.out) if args.out else runs.free_folder("evaluate"), {}
    runs.make_folder(out)
    runs.lock_folder(out)
    begun, done = out / "begun.json", out / "completions.jsonl"
    before = read_json(begun) if begun.exists() else {}
    known = field(before, "weights", dict, begun, default={})
    empty = not done.exists() or not done.stat().st_size  # where a kill came before begun.json
    # The runs' weights may have changed, and then their rows are dropped below; the base's must not have.
    same = empty or (before | {"weights": weights} == about and known.get(BASE) == weights[BASE])
    for where, row in read_lines(done) if same and not empty else ():
        check_row(row, where, model.config)
        label = row.pop("model")
        if known.get(label) == weights.get(label, ""):
            kept.setdefault(label, []).append(row)
    if not same or any([row["prompt_ids"] for row in rows] != prompts[: len(rows)] for rows in kept.values()):
        raise UserError(f"--out {out} holds an evaluation of another model, of other runs or problems, or under other "
                        f"flags: choose another folder, or delete it")
    kept = {label: graded(problems[: len(rows)], [response_of(row) for row in rows], tokenizer)
            for label, rows in kept.items()}
    # First: the other way round a kill between would leave rows that pass for the new weights'.
    write_text(done, "".join(as_json({"model": label, **row}) for label, rows in kept.items() for row in rows))
    write_json(begun, about)
    return out, kept


def write_merged(run: Path, out: Path, p, args) -> None:
    """Base + LoRA as a plain Hugging Face checkpoint: our weights, the base's config and tokenizer files."""
    runs.inherit(args, run, task=False)
    args = flags.settle(p, args)
    where = flags.location(args.model)
    if out.exists():
        raise UserError(f"--out {out} exists: choose a new folder")
    model = Transformer.from_pretrained(where, args.revision, getattr(torch, args.dtype), "cpu")
    merge(load_policy(model, run))
    unfinished = out.with_name(f".partial-{out.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    weights = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    write_tensors(weights, unfinished / "model.safetensors")
    for path in resolve(where, args.revision).iterdir():
        if path.suffix in (".json", ".jinja", ".txt") and path.name != "model.safetensors.index.json":
            shutil.copyfile(path, unfinished / path.name)
    os.replace(unfinished, out)
    print(f"wrote {out}: {args.model} + the adapters of {run}; it has no exits and runs at full depth everywhere")


@parallel.shared
def main() -> None:
    p = flags.parser(__doc__, out="folder to write, or to go on in (default: runs/evaluate-TIME)")
    p.add_argument("runs", nargs="*", help="runs to compare (default: the newest complete ones), or 'base'")
    p.pair("--n", 200, 100, type=flags.whole(1), help="held-out problems, {} / {}")
    p.add_argument("--temperature", type=flags.number(0, 1e4), default=1.0, help="of the tokens; 0 is argmax (default: "
                   "1)")
    p.add_argument("--delta", type=flags.number(-1e4, 1e4), default=0.0, help="added to every exit logit: above 0 "
                   "exits more (default: 0, as in training)")
    flags.threshold(p)
    p.add_argument("--show", type=flags.whole(0), default=6, help="problems on the page (default: 6)")
    p.add_argument("--merge", metavar="RUN", help="write base + LoRA of RUN to --out as a plain checkpoint, and end")
    args = p.parse_args()
    if args.merge:
        if not args.out:
            raise UserError("--merge needs --out DIR, the folder to write")
        if args.runs:
            raise UserError(f"{' '.join(args.runs)}: --merge takes one run and compares none: leave the others out")
        if parallel.rank() == 0:
            write_merged(Path(args.merge), Path(args.out), p, args)
        return

    columns = parallel.from_rank_0(lambda: chosen_runs(args))
    # Once, for a run may train on and write another checkpoint meanwhile.
    chosen = parallel.from_rank_0(lambda: {name: checkpoint(run) for name, run in columns.items()})
    for run in reversed(columns.values()):  # stage 2 may have had a task of its own
        runs.inherit(args, run)
    args = flags.settle(p, args)
    if not columns and (args.threshold is not None or args.delta):
        raise UserError("--threshold and --delta are about exits, and the base has none: name a run, or leave them out")
    problems = tasks.load(args.task, "test", data=args.data, n=args.n, seed=args.seed)
    runs.warn_fewer("--n", args.n, len(problems))
    for taken in ("config.json", "evaluation.json"):
        if args.out and Path(args.out, taken).exists():
            raise UserError(f"--out {args.out} holds {taken} already: choose another folder")

    drawn = f"temperature {args.temperature}"
    if columns:
        drawn += ", exits " + ("drawn" if args.threshold is None else f"at p > {args.threshold}")
        drawn += f", delta {args.delta}" if args.delta else ""
    metrics, by_label = [], {}
    shown = [{"id": p.id, "question": p.question, "gold": p.gold, "runs": {}} for p in problems[: args.show]]
    for name, run in (columns or {BASE: None}).items():
        model = policy = None  # of the run before: two bases may not fit
        model, tokenizer = runs.load_model(args)
        policy = load_policy(model, chosen[name]) if run else Policy(model)
        if not metrics:
            args.revision = model.revision  # the commit, where a branch was named or none
            prompts = runs.prompt_ids(problems, model, tokenizer, args)
            out, kept = parallel.from_rank_0(partial(go_on, args, problems, prompts, model, tokenizer, columns, chosen))
            print(f"{runs.describe(args, tokenizer)}, {len(problems)} held-out problems, {drawn}; to {out}")
        runs.share_out(policy, args)
        print(f"  {name}: {run or args.model}")
        # The base once, by the first run, its adapters off.
        for label in ([] if metrics else [BASE]) + ([name] if run else []):
            base, depth_of_outcome = label == BASE, policy.depth_of_outcome.tolist()
            rows = answer(policy, problems, prompts, tokenizer, label, kept.get(label, []), out, args)
            metrics.append({"name": label, "run": None if base else str(run), **measure(rows, depth_of_outcome),
                            "kinds": by_kind(rows, depth_of_outcome, tokenizer)})
            by_label[label] = rows
            for problem, row in zip(shown, rows, strict=False) if parallel.rank() == 0 else ():
                problem["runs"][label] = transcript(policy, row, tokenizer, base, args)

    if parallel.rank():
        return
    print(table(metrics))
    runs.warn_unfinished(min(m["finished"] for m in metrics), "an unfinished one never counts as right", tokenizer,
                         args)
    said = [headline(metrics[0], before, m, by_label) for before, m in pairwise(metrics)]
    write_text(out / "page.html", report.page({
        "title": "Early exits, token by token", "n_layers": policy.n_layers, "exits": list(policy.exits),
        "subtitle": f"{Path(args.model).name}, {Path(args.task).name}, {drawn}",
        "headline": said[-1] if said else "", "metrics": metrics, "problems": shown}))
    # Last: a folder that has it is complete.
    write_json(out / "evaluation.json", {"args": vars(args), "metrics": metrics, "headlines": said})
    print(f"wrote {out}/page.html, evaluation.json, completions.jsonl")
    print("\n".join(said))


if __name__ == "__main__":
    runs.run_main(main)
