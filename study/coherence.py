"""Coherence without a judge: how likely the base model finds a response, how much it repeats itself, did it finish.

    perplexity   exp of the mean -log p(token | what stands before it), the base model at full depth; pooled over tokens
    repetition   share of a response's 4-grams of tokens that it has written before; the mean over responses
    finished     share of responses that ended by themselves
    coherence    the mean over responses of finished x (1 - repetition) x exp(mean log p of its tokens), in 0..1

No column sees every fault: a loop looks likely, a cut response too. That is what the product is for, and it is kept
because it ranks responses that are damaged on purpose below their own originals, which `--calibrate` measures anew.
Read it beside the base's own value, on the same problems: its height depends on model and task. It says nothing of
whether an answer is right, nor whether a thought makes sense to a reader: for that there is study/judge.py.

    python -m study.coherence FOLDER               of evaluate.py, or a stage-2 run: writes coherence.json into it
    python -m study.coherence FOLDER --calibrate   the base's responses in it, damaged in known ways
"""

import math
import random
import re
from pathlib import Path

import torch
from tqdm import tqdm

import flags
import runs
from data.hub import UserError, field, read_json, read_lines, write_json
from exits import Policy, Response, adapters_off, micro_batches, per_response, score

N_GRAM = 4
COLUMNS = ("perplexity", "repetition", "finished", "coherence")


def repetition(tokens: list[int]) -> float:
    """Share of the n-grams that stood in the response before."""
    grams = [tuple(tokens[i : i + N_GRAM]) for i in range(len(tokens) - N_GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.no_grad()
def each(policy: Policy, rows: list[dict], micro_batch: int) -> list[dict]:
    """Of each row (prompt_ids, token_ids, finished): nll, the sum of -log p over its tokens in nats, and the columns.

    The base reads the response at full depth, adapters off, whatever depths it was written at.
    """
    responses = [Response(row["prompt_ids"], row["token_ids"], [policy.n_layers] * len(row["token_ids"]),
                          finished=row["finished"]) for row in rows]
    nll = torch.zeros(len(rows), dtype=torch.double)
    with adapters_off(policy), tqdm(total=len(rows), desc="read by the base", leave=False) as bar:
        for index, batch in micro_batches(policy, responses, micro_batch):
            nll[index] = -per_response(score(policy, batch).logp_token.double(), batch).cpu()
            bar.update(len(index))
    found = []
    for r, total in zip(responses, nll.tolist(), strict=True):
        repeated = repetition(r.token_ids)
        found.append({"nll": total, "length": len(r), "perplexity": math.exp(total / len(r)), "repetition": repeated,
                      "finished": float(r.finished),
                      "coherence": r.finished * (1 - repeated) * math.exp(-total / len(r))})
    return found


def pooled(found: list[dict]) -> dict:
    """n and the four columns of what `each` found, over responses; the perplexity over all their tokens."""
    means = {name: sum(one[name] for one in found) / len(found) for name in COLUMNS[1:]}
    return {"n": len(found), "perplexity": math.exp(sum(one["nll"] for one in found) /
                                                    sum(one["length"] for one in found)), **means}


# ---------------------------------------------------------------------------------------------- planted degradations


def sentences(tokens: list[int], pieces: list[str]) -> list[list[int]]:
    """The tokens, divided after a line's end, or a full stop that a blank follows. No text is encoded again: another
    division into tokens would look unlikely for no fault of the text."""
    parts, part = [], []
    for token, piece, following in zip(tokens, pieces, [*pieces[1:], ""], strict=True):
        part.append(token)
        if piece.endswith("\n") and not following.isspace() or re.search(r"[.!?]$", piece) and following[:1] == " ":
            parts.append(part)
            part = []
    return [*parts, part] if part else parts


def body(texts: list[str]) -> range:
    """Which sentences are steps: the thoughts, or where there are no thoughts all but the last sentence."""
    end = next((i for i, text in enumerate(texts) if "</think>" in text), len(texts) - 1)
    return range("<think>" in texts[0], end)


def swapped(steps, rng):
    i = rng.choice([i for i in range(len(steps) - 1) if steps[i] != steps[i + 1]])
    return steps[:i] + [steps[i + 1], steps[i]] + steps[i + 2 :]


def shuffled(steps, rng):
    order = steps
    while order == steps:
        order = rng.sample(steps, len(steps))
    return order


def dropped(steps, rng, count=1):
    gone = rng.sample(range(len(steps) - 1), count)  # not the last one: without it the response is only shorter
    return [step for i, step in enumerate(steps) if i not in gone]


def looped(steps, rng, times):
    i = rng.randrange(len(steps))
    return steps[:i] + [steps[i]] * times + steps[i + 1 :]


DAMAGE = {  # name -> what it makes of the steps, or the share of the response at which it is cut
    "two steps swapped": swapped, "all steps shuffled": shuffled,
    "one step dropped": dropped, "half of the steps dropped": lambda s, rng: dropped(s, rng, len(s) // 2),
    "a step said 3 times": lambda s, rng: looped(s, rng, 3), "a step said 10 times": lambda s, rng: looped(s, rng, 10),
    "cut at 90%": 0.9, "cut in half": 0.5,
}


def damaged(row: dict, parts: list[list[int]], steps: range, how, rng) -> dict:
    """The row with those of its sentences damaged that are steps; what surrounds them stays, the eos included."""
    if isinstance(how, float):
        return row | {"token_ids": row["token_ids"][: max(1, int(how * len(row["token_ids"])))], "finished": False}
    parts = parts[: steps.start] + how(parts[steps.start : steps.stop], rng) + parts[steps.stop :]
    return row | {"token_ids": [token for part in parts for token in part]}


def calibrate(policy: Policy, tokenizer, rows: list[dict], micro_batch: int, seed: int) -> dict:
    """The columns of the rows and of each planted degradation, with the share of damaged responses that a column ranks
    below their own original, ties counted half. Rows of fewer than three different steps are left out."""
    usable = []
    for row in rows:
        parts = sentences(row["token_ids"], tokenizer.pieces(row["token_ids"]))
        steps = body([tokenizer.decode(part) for part in parts])
        if row["finished"] and len({tuple(parts[i]) for i in steps}) > 2:
            usable.append((row, parts, steps))
    if not usable:
        raise UserError("no finished response of three steps or more to damage: evaluate more problems (--n)")
    before = each(policy, [row for row, _, _ in usable], micro_batch)
    record = {"n": len(usable), "left out": len(rows) - len(usable), "original": pooled(before), "damaged": {}}
    for name, how in DAMAGE.items():
        rng = random.Random(f"{seed} {name}")
        after = each(policy, [damaged(*row, how, rng) for row in usable], micro_batch)
        below = {}
        for column in COLUMNS:
            sign = -1 if column in ("perplexity", "repetition") else 1  # those two rise
            pairs = [sign * (a[column] - b[column]) for a, b in zip(after, before, strict=True)]
            below[column] = sum(1.0 if d < 0 else 0.5 * (d == 0) for d in pairs) / len(pairs)
        record["damaged"][name] = {**pooled(after), "ranked_below": below}
    return record


# ----------------------------------------------------------------------------------------------------------- command


def about(folder: Path) -> tuple[dict, Path]:
    """The flags that a folder's responses were sampled under, and the file that says so."""
    for name in ("evaluation.json", "config.json"):
        if (where := folder / name).exists():
            saved = field(read_json(where), "args", dict, where)
            return saved | {"model": field(saved, "model", str, where),
                            "revision": field(saved, "revision", str, where, default=None)}, where
    raise UserError(f"{folder}: neither evaluation.json nor config.json is in it: give a folder that evaluate.py or "
                    f"rloo.py wrote")


def read(folder: Path, n: int, vocab_size: int = 2**24) -> dict[str, list[dict]]:
    """The rows of a folder's completions, checked, n of each group, chosen at random: an evaluation's groups are its
    models, a run's the tenths of its steps."""
    rows = []
    for path in sorted(folder.glob("completions*.jsonl")):  # a long run has completions-STEP.jsonl, too
        for where, row in read_lines(path):
            for name in ("prompt_ids", "token_ids"):
                if not field(row, name, list, where, 0, vocab_size - 1):
                    raise UserError(f"{where}: {name} is empty: is the file what evaluate.py or rloo.py wrote?")
            if isinstance(row.get("text"), str):  # a model can sample a NUL, which `field` takes for damage
                row["text"] = row["text"].replace("\0", "\ufffd")
            for name, kind in (("finished", bool), ("text", str), ("id", str)):
                field(row, name, kind, where)
            rows.append(row | {"model": field(row, "model", str, where, default=None),
                               "step": field(row, "step", int, where, 0, default=0)})
    if not rows:
        raise UserError(f"{folder}: no completions in it: give a folder that evaluate.py or rloo.py wrote")
    tenth, groups = math.ceil((1 + max(row["step"] for row in rows)) / 10), {}
    for row in rows:
        first = row["step"] // tenth * tenth
        groups.setdefault(row["model"] or f"steps {first}-{first + tenth - 1}", []).append(row)
    # The same places of every model; not evenly spaced, for a task's forms may take turns.
    return {name: [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), min(n, len(rows))))]
            for name, rows in groups.items()}


def table(columns: dict[str, dict]) -> str:
    width = max(map(len, columns)) + 2
    lines = [f"{'':{width}}{'n':>6}" + "".join(f"{name:>12}" for name in COLUMNS)]
    for name, found in columns.items():
        lines.append(f"{name:{width}}{found['n']:>6}" + "".join(f"{found[column]:>12.3f}" for column in COLUMNS))
    return "\n".join(lines)


def main() -> None:
    p = flags.parser(__doc__, out="file to write (default: coherence.json, or coherence-calibration.json, in "
                                       "the folder)")
    p.add_argument("folder", type=Path, help="what evaluate.py wrote, or a stage-2 run")
    flags.micro_batch(p)
    p.add_argument("--n", type=flags.whole(1), default=200, help="responses of each model, chosen at random "
                   "(default: 200)")
    p.add_argument("--calibrate", action="store_true", help="damage the base's responses, and see what ranks them "
                   "lower")
    args = p.parse_args()
    flags.check_out_file(args.out)
    saved, where = about(args.folder)
    task = field(saved, "task", str, where)
    flags.inherit(args, {"args": saved}, where, task=False)
    args = flags.settle(p, args)
    model, tokenizer = runs.load_model(args)
    policy = Policy(model)
    groups = read(args.folder, args.n, model.config.vocab_size)
    out = Path(args.out) if args.out else args.folder / f"coherence{'-calibration' if args.calibrate else ''}.json"
    record = {"command": runs.command("-m", "study.coherence"), "commit": runs.commit(),
              "model": Path(args.model).name, "task": Path(task).name, "folder": args.folder.name}
    if args.calibrate:
        if "base" not in groups:
            raise UserError(f"{args.folder}: no responses of the base model in it: give a folder that evaluate.py "
                            f"wrote")
        record |= calibrate(policy, tokenizer, groups["base"], args.micro_batch, args.seed)
        print(table({"original": record["original"]} | record["damaged"]))
        lowest = min(found["ranked_below"]["coherence"] for found in record["damaged"].values())
        print(f"of every damage, coherence ranks at least {lowest:.1%} of the responses below their originals")
    else:
        record["columns"] = {name: pooled(each(policy, rows, args.micro_batch)) for name, rows in groups.items()}
        print(table(record["columns"]))
    write_json(out, record)
    print(f"wrote {out}")


if __name__ == "__main__":
    runs.run_main(main)
