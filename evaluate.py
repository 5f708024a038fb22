"""Compare the base model, stage 1 and stage 2 on held-out problems: accuracy, depth, and a page to look at.

    python evaluate.py                          the newest complete stage-2 run and the stage-1 run it came from
    python evaluate.py RUN RUN …                any runs of one model, beside the base model
    python evaluate.py --delta -1               exits less often than trained (eagerness at inference)
    python evaluate.py --merge RUN --out DIR    writes base + LoRA as a plain Hugging Face checkpoint, without exits

Writes evaluation.json, completions.jsonl and page.html, which opens offline.
"""

import json
import math
import os
import shutil
import time
from contextlib import nullcontext

import torch
from safetensors.torch import save_file
from tqdm import tqdm

import report
import runs
from data import tasks
from data.hub import UserError, read_json, resolve
from exits import Policy, adapters_off, batch_of, generate, load_policy, merge, token_logp_all
from model import Transformer

Z = 1.96  # 95% intervals


def wilson(share: float, n: int) -> tuple[float, float]:
    """95% interval of a share of n independent outcomes (Wilson 1927); unlike share ± 2 SE it is sound near 0 and 1."""
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def measure(rows: list[dict], outcomes: list[int]) -> dict:
    """The README's metrics over responses, pooled over generated tokens; total compute is per response."""
    n, L = len(rows), outcomes[-1]
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
            "exit_histogram": {str(d): depths.count(d) / len(depths) for d in outcomes}}


def answer(policy: Policy, problems, prompts, tokenizer, base: bool, args) -> list[dict]:
    """One response to each problem, graded: from the policy, or from the base model at full depth."""
    with adapters_off(policy) if base else nullcontext(), tqdm(total=len(prompts), desc="answers", leave=False) as bar:
        got = generate(policy, prompts, max_new_tokens=args.max_new_tokens, eos_ids=tokenizer.eos_ids,
                       temperature=args.temperature, delta=args.delta, depths=policy.n_layers if base else None,
                       seed=(args.seed,), batch_size=args.rows, progress=bar)
    rows = []
    for i, length in enumerate(got.lengths.tolist()):
        tokens, finished = got.tokens[i, :length].tolist(), bool(got.finished[i])
        grade = runs.grade(problems[i], prompts[i], tokens, finished, tokenizer)
        rows.append({"id": problems[i].id, "prompt_ids": prompts[i], "token_ids": tokens,
                     "depths": got.depths[i, :length].tolist(), "text": tokenizer.decode(tokens), "finished": finished,
                     "gold": problems[i].gold, "value": grade.value, "rule": grade.rule, "correct": grade.strict,
                     "flexible": grade.flexible})
    return rows


@torch.no_grad()
def transcript(policy: Policy, row: dict, tokenizer, base: bool, args) -> dict:
    """A response as the page shows it: every token's depth, exit probabilities and the top tokens of each lens."""
    batch = batch_of(policy, [row])
    with adapters_off(policy) if base else nullcontext():
        out = policy(batch.ids, depths=batch.depths, source=batch.source)
    top = []
    for h in (*out.streams, out.h):
        best = token_logp_all(policy.model, h[batch.where]).exp().topk(3)
        top.append([list(zip(tokenizer.pieces(ids), map(float, p), strict=True))
                    for ids, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)])
    exit_probs = [] if base else torch.sigmoid(out.exit_logits[batch.where] + args.delta).tolist()
    return {"tokens": tokenizer.pieces(row["token_ids"]), "depths": row["depths"], "exit_probs": exit_probs,
            "top": [list(per_exit) for per_exit in zip(*top, strict=True)], "correct": row["correct"],
            "finished": row["finished"], "value": row["value"]}


def table(metrics: list[dict]) -> str:
    """The comparison as text, one model a line."""
    lines = [f"{'':24}{'accuracy (95% CI)':>22}{'exit rate':>11}{'savings':>9}{'compute':>9}{'total':>8}"
             f"{'length':>8}{'finished':>10}"]
    for m in metrics:
        accuracy = f"{m['accuracy']:.1%} ({m['accuracy_low']:.0%}-{m['accuracy_high']:.0%})"
        lines.append(f"{m['name']:24}{accuracy:>22}{m['exit_rate']:>11.1%}{m['layer_savings']:>9.1%}"
                     f"{m['average_compute']:>9.3f}{m['total_compute']:>8.1f}{m['length']:>8.1f}{m['finished']:>10.1%}")
    return "\n".join(lines)


def chosen_runs(args) -> dict[str, runs.Path]:
    """Column name -> run: those given, else the newest complete stage-2 run behind the stage-1 run it came from."""
    folders = [runs.Path(run) for run in args.runs]
    if not folders:
        newest = runs.newest("rloo", model=args.model) or runs.newest("distill", model=args.model)
        if newest is None:
            raise UserError(f"no complete run under {runs.RUNS}/: run python distill.py first, or name runs to compare")
        init = runs.read_config(newest)["args"].get("init")
        folders = ([runs.Path(init)] if init else []) + [newest]
    stages = [{"distill": "stage 1", "rloo": "stage 2"}[runs.read_config(folder)["stage"]] for folder in folders]
    if len({tuple(read_json(runs.checkpoint(folder) / "exit_config.json")["exits"]) for folder in folders}) > 1:
        raise UserError("the runs have different exits: compare runs of one --exit-every")
    return {stage if stages.count(stage) == 1 else f"{stage} {folder.name}": folder
            for stage, folder in zip(stages, folders, strict=True)}


def write_merged(run: runs.Path, out: runs.Path, args) -> None:
    """Base + LoRA as a plain Hugging Face checkpoint: our weights, the base's config and tokenizer files."""
    config = runs.read_config(run)["args"]
    if out.exists():
        raise UserError(f"--out {out} exists: choose a new folder")
    model = Transformer.from_pretrained(config["model"], config["revision"], getattr(torch, args.dtype), "cpu")
    merge(load_policy(model, runs.checkpoint(run)))
    partial = out.with_name(f".partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters() if "lora_" not in name}
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    source = resolve(config["model"], config["revision"])
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja", ".txt") and path.name != "model.safetensors.index.json":
            shutil.copyfile(path, partial / path.name)
    os.replace(partial, out)
    print(f"wrote {out}: {config['model']} + the adapters of {run}; it has no exits and runs at full depth everywhere")


def main() -> None:
    p = runs.parser(__doc__)
    p.add_argument("runs", nargs="*", help="runs to compare (default: the newest complete ones)")
    p.add_argument("--n", type=int, help="held-out problems, 200 / 100")
    p.add_argument("--temperature", type=float, default=1.0, help="of the tokens; 0 is argmax (default: 1)")
    p.add_argument("--delta", type=float, default=0.0, help="added to every exit logit: above 0 exits more")
    p.add_argument("--show", type=int, default=6, help="problems on the page (default: 6)")
    p.add_argument("--merge", metavar="RUN", help="write base + LoRA of RUN to --out as a plain checkpoint, and end")
    args = p.parse_args()
    if args.merge:
        if not args.out:
            raise UserError("--merge needs --out DIR, the folder to write")
        args.dtype = args.dtype or "float32"
        return write_merged(runs.Path(args.merge), runs.Path(args.out), args)

    columns = chosen_runs(args)
    for run in columns.values():
        runs.inherit(args, run)  # from the first; the others must be of the same model
    args = runs.settle(args, n=(200, 100))
    problems = tasks.load(args.task, "test", data=args.data, n=args.n, seed=args.seed)
    out = runs.Path(args.out) if args.out else runs.RUNS / f"evaluate-{time.strftime('%Y%m%d-%H%M%S')}"
    out.mkdir(parents=True, exist_ok=True)
    print(f"{args.model}: {len(problems)} held-out problems of {args.task}, temperature {args.temperature}, delta "
          f"{args.delta}, thinking {'on' if args.thinking else 'off'}, at most {args.max_new_tokens} new tokens")

    metrics, completions = [], []
    shown = [{"id": p.id, "question": p.question, "gold": p.gold, "runs": {}} for p in problems[: args.show]]
    for i, (name, run) in enumerate(columns.items()):
        model, tokenizer = runs.load_model(args)
        policy = load_policy(model, runs.checkpoint(run))
        prompts = runs.prompt_ids(problems, tokenizer, args.thinking)
        print(f"  {name}: {run}")
        for label, base in ((("base", True),) if i == 0 else ()) + ((name, False),):
            rows = answer(policy, problems, prompts, tokenizer, base, args)
            measured = measure(rows, policy.outcomes.tolist())
            metrics.append({"name": label, "run": None if base else str(run), **measured})
            completions += [{"model": label, **row} for row in rows]
            for problem, row in zip(shown, rows, strict=False):
                problem["runs"][label] = transcript(policy, row, tokenizer, base, args)

    print(table(metrics))
    runs.warn_unfinished(min(m["finished"] for m in metrics), args)
    runs.write_text(out / "completions.jsonl", "".join(json.dumps(row) + "\n" for row in completions))
    runs.write_text(out / "evaluation.json", json.dumps({"args": vars(args), "metrics": metrics}, indent=2) + "\n")
    report.write_page(out / "page.html", {
        "title": "Early exits, token by token", "n_layers": policy.n_layers, "exits": list(policy.exits),
        "subtitle": f"{runs.Path(args.model).name}, {args.task}, temperature {args.temperature}, delta {args.delta}",
        "metrics": metrics, "problems": shown})
    print(f"wrote {out}/page.html, evaluation.json, completions.jsonl")


if __name__ == "__main__":
    runs.run_main(main)
