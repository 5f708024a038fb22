"""What stage 1 learns from: the base model's own answers to the training and held-out problems, in teacher.jsonl.

They are sampled once at temperature 1, or taken from another run of stage 1 (--teacher). The file's first line says
what they depend on, each other one is a response. A kill loses those under way.
"""

from itertools import islice
from pathlib import Path

import parallel
import runs
from checkpoints import fingerprint
from data.hub import UserError, as_json, field, read_lines, read_text, write_text
from data.text import Tokenizer
from exits import Policy, Response, adapters_off
from sample import RESPONSES, in_parts


def origin(model, args) -> dict:
    """What the base's responses depend on. Another run may reuse them where all of it agrees but the model's name, for
    which the fingerprint stands."""
    return {"model": args.model, "base": fingerprint(model), "task": args.task, "thinking": args.thinking,
            "max_new_tokens": args.max_new_tokens}


def path_of(run: str) -> str:
    """--teacher's file, where a run was named."""
    return str(Path(run, "teacher.jsonl")) if Path(run).is_dir() else run


def read_responses(path, model, args) -> dict[str, list[Response]]:
    """The base's responses that a teacher.jsonl holds, by split. Raises UserError naming file, line and field."""
    kept: dict[str, list[Response]] = {"train": [], "test": []}
    lines, ours, config = read_lines(path), origin(model, args), model.config
    for _, theirs in islice(lines, 1):
        for name in ours.keys() - {"model"}:
            same = Path(str(theirs.get(name))).name == Path(str(ours[name])).name  # wherever a file lies by now
            if name not in theirs or not same:
                name = "model" if name == "base" else name
                raise UserError(f"{path} holds responses for {name} {theirs.get(name)!r:.80}, but this run has "
                                f"{ours[name]!r:.80}: give the flags of the run that sampled them, or start a new run "
                                f"without --teacher")
    for where, row in lines:
        prompt, tokens = (field(row, name, list, where, 0, config.vocab_size - 1)
                          for name in ("prompt_ids", "token_ids"))
        split, length = field(row, "split", str, where), len(prompt) + len(tokens)
        if split not in kept or not prompt or not tokens or length > config.max_position_embeddings:
            raise UserError(f"{where}: the split must be train or test, and the lists of ids neither empty nor longer "
                            f"than the model's context")
        kept[split].append(Response(prompt, tokens, [config.num_hidden_layers] * len(tokens),
                                    finished=field(row, "finished", bool, where)))
    return kept


def checked_responses(path, model, prompts: dict, args) -> dict[str, list[Response]]:
    """What a teacher.jsonl holds: with --teacher as many responses as asked for, else those to these very prompts."""
    kept = read_responses(path, model, args)
    for split, wanted in prompts.items():
        if args.teacher and len(kept[split]) < len(wanted):
            raise UserError(f"--teacher {args.teacher} holds {len(kept[split])} responses of split {split}, of "
                            f"{len(wanted)} asked for: lower --responses or --held-out")
        if args.teacher:
            kept[split] = kept[split][: len(wanted)]
            theirs, ours = {tuple(r.prompt_ids) for r in kept[split]}, set(map(tuple, wanted))
            if (args.data or "." in Path(args.task).name) and not theirs & ours:  # the task's name says little of files
                raise UserError(f"--teacher {args.teacher} holds responses to none of these prompts: start without it")
        elif [r.prompt_ids for r in kept[split]] != wanted[: len(kept[split])]:
            raise UserError(f"{path} holds responses to other prompts: the task's data or the chat template has "
                            f"changed; start a new run")
    return kept


def source_of(folder: Path | None, args) -> Path | None:
    """Whose responses a run in a folder starts from: its own teacher.jsonl once that is begun, else --teacher's."""
    if folder and (own := folder / "teacher.jsonl").exists():
        return own
    if not args.teacher:
        return None
    if not Path(args.teacher).is_file():
        raise UserError(f"--teacher {args.teacher}: no such file; give a stage-1 run, or its teacher.jsonl")
    return Path(args.teacher)


def kept_responses(run, policy: Policy, prompts: dict, args) -> dict[str, list[Response]]:
    """Begins the run's teacher.jsonl, with what there is already, and returns that."""
    path, source = run.folder / "teacher.jsonl", source_of(run.folder, args)
    text = read_text(source) if source else ""
    whole = text[: text.rfind("\n") + 1]  # lines: a kill may have cut the last one short
    write_text(path, whole or as_json(origin(policy.model, args)))
    return checked_responses(path, policy.model, prompts, args)


def base_responses(run, policy: Policy, tokenizer, problems: dict, prompts: dict, args) -> dict[str, list[Response]]:
    """The responses to each split's prompts, those that are missing sampled now."""
    kept = parallel.from_rank_0(lambda: kept_responses(run, policy, prompts, args))
    for split, wanted in prompts.items():
        done = kept[split]
        with adapters_off(policy):
            for i, new in in_parts(policy, wanted, len(done), args.rows, f"base, {split}",
                                   max_new_tokens=args.max_new_tokens, eos_ids=tokenizer.eos_ids,
                                   depths=policy.n_layers, seed=(args.seed, RESPONSES, split == "test")):
                run.log("teacher.jsonl", [
                    {"split": split, "id": problem.id, "prompt_ids": r.prompt_ids, "token_ids": r.token_ids,
                     "finished": r.finished} for problem, r in zip(problems[split][i:], new, strict=False)])
                done += new
                if i == 0 and split == "train":  # while it costs little to stop
                    runs.warn_unfinished(sum(r.finished for r in done) / len(done), "this stage learns nothing about "
                                         "how they end", tokenizer, args)
    return kept


def report_accuracy(problems, prompts, responses: list[Response], tokenizer: Tokenizer) -> None:
    """How many of the training problems the base solves: where that is none or all, stage 2 has nothing to learn from,
    and it may be the grader that fails; and how many responses of another run are to prompts that this one lacks."""
    right = [runs.grade(problem, r, tokenizer).strict
             for problem, prompt, r in zip(problems, prompts, responses, strict=True) if r.prompt_ids == prompt]
    ours = set(map(tuple, prompts))
    if others := sum(tuple(r.prompt_ids) not in ours for r in responses):
        runs.say(f"{others} of --teacher's {len(responses)} responses are to prompts that this run would not ask: of "
                 f"another seed, or where thinking or the problems have changed; start without it to sample its own")
    if right:
        share = sum(right) / len(right)
        print(f"the base solves {share:.1%} of {len(right)} training problems" + (
            "" if 0.02 < share < 0.98 else ": stage 2 learns from the difference between right and wrong; look at "
            "teacher.jsonl, whether the grader is right, or take other problems"))
