"""GSM8K and the other generation tasks of lm-evaluation-harness, with exits on (python -m pip install lm-eval).

    python bench/harness.py RUN --tasks gsm8k_cot_zeroshot --limit 100
    python bench/harness.py base --model MODEL --tasks …      the base model at full depth

Prompts go through the checkpoint's chat template, and a response counts from after its thoughts: one that is cut while
it thinks is empty. Its limit is --max-new-tokens, where that is given, else the task's, often meant for no thoughts
(--no-thinking). Sampling is the task's, mostly argmax, which Qwen3 advises against while it thinks; exits are drawn as
trained. The harness scores by its own rules (gsm8k's strict one knows no \\boxed{}), bench/gsm8k_boxed.yaml by those of
evaluate.py.
Of the flags that all scripts share --task and --data do nothing here, and --shard is refused.
Tasks that rank given answers are refused: they would have to be read at some depth, and full depth shows no exit.
"""

import json
import sys
from pathlib import Path

ROOT = str(Path(__file__).parent.parent)
sys.path.insert(0, ROOT)
import flags  # noqa: E402
import parallel  # noqa: E402
import runs  # noqa: E402
from checkpoints import load_policy  # noqa: E402
from data.grade import after_thinking, grade  # noqa: E402
from data.hub import UserError, write_text  # noqa: E402
from exits import Policy  # noqa: E402
from sample import generate  # noqa: E402

sys.path.remove(ROOT)  # some tasks import the library `evaluate`, and would find evaluate.py
try:
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
except ImportError:
    lm_eval, LM, TaskManager = None, object, None


class Exits(LM):
    """A policy as the harness wants a model: text in, text out."""

    def __init__(self, policy: Policy, tokenizer, args, base: bool):
        super().__init__()
        self.policy, self.tokenizer, self.args = policy, tokenizer, args
        self.depths = policy.n_layers if base else None
        self.answered = {}  # task -> responses

    tokenizer_name = property(lambda self: str(self.args.model))

    def apply_chat_template(self, chat_history, add_generation_prompt=True) -> str:
        if not add_generation_prompt:
            raise UserError("the task begins the answer itself, which is not implemented: choose another")
        return self.tokenizer.render([chat_history], self.args.thinking)[0]

    def generate_until(self, requests) -> list[str]:
        groups = {}  # how to sample -> requests
        for i, request in enumerate(requests):
            how = dict(request.args[1])
            how.pop("until", None)
            tokens, sampled = how.pop("max_gen_toks", self.args.max_new_tokens), how.pop("do_sample", None)
            tokens = self.args.asked or tokens  # the task's limit is seldom meant for thoughts
            temperature = how.pop("temperature", float(bool(sampled)))
            temperature = 0.0 if sampled is False else temperature
            if how:
                raise UserError(f"the task samples with {how}, which is not implemented: choose another")
            groups.setdefault((tokens, temperature), []).append(i)
        texts = [""] * len(requests)
        for (tokens, temperature), group in groups.items():
            prompts = [self.tokenizer.encode(requests[i].args[0]) for i in group]
            with parallel.bar(total=len(group), desc=f"answers of at most {tokens} tokens") as bar:
                responses = generate(self.policy, prompts, max_new_tokens=tokens, temperature=temperature,
                                     eos_ids=self.tokenizer.eos_ids, delta=self.args.delta,
                                     threshold=self.args.threshold, depths=self.depths, seed=(self.args.seed,),
                                     rows=self.args.rows, progress=bar)
            for i, r in zip(group, responses, strict=True):
                text = after_thinking(runs.text_of(r, self.tokenizer), self.tokenizer.think_open(r.prompt_ids))
                text = (text or "").lstrip()  # thoughts end in a blank line, and many tasks' answers before one
                until = requests[i].args[1].get("until") or ()
                for stop in [until] if isinstance(until, str) else until:
                    text = text.partition(stop)[0] if stop else text
                texts[i] = text
                self.answered.setdefault(requests[i].task_name, []).append(r)
        return texts

    def loglikelihood(self, requests):
        raise UserError("the task ranks given answers, which shows no exit: choose one that generates")

    loglikelihood_rolling = loglikelihood


def graded(doc: dict, answers: list[str]) -> dict[str, bool]:
    """Is the answer to a row of GSM8K right by evaluate.py's grader? For gsm8k_boxed.yaml. (evaluate.py counts one that
    was cut as wrong, too; here it has what it says.)"""
    return {"exact_match": grade(answers[0], doc["answer"].split("####")[-1].strip(), "number").strict}


def main() -> None:
    p = flags.parser(__doc__, out="file to write (default: none)")
    p.add_argument("run", help="a run's folder, or 'base'")
    p.add_argument("--tasks", nargs="+", required=True, help="the harness's names")
    p.add_argument("--include-path", help="folder of further tasks, as YAML files")
    p.add_argument("--limit", type=flags.whole(1), help="problems of each task (default: all)")
    p.add_argument("--delta", type=flags.number(-1e4, 1e4), default=0.0, help="added to every exit logit (default: 0)")
    flags.threshold(p)
    args = p.parse_args()
    args.asked = args.max_new_tokens
    flags.check_out_file(args.out)
    if lm_eval is None:
        raise UserError("lm-evaluation-harness is not installed: python -m pip install lm-eval")
    base = args.run == "base"
    if not base:
        runs.inherit(args, Path(args.run), task=False)
    args = flags.settle(p, args)
    model, tokenizer = runs.load_model(args)
    policy = Policy(model) if base else load_policy(model, args.run)
    lm = Exits(policy, tokenizer, args, base)
    found = lm_eval.simple_evaluate(lm, tasks=args.tasks, limit=args.limit, apply_chat_template=True,
                                    task_manager=TaskManager(include_path=args.include_path), random_seed=args.seed,
                                    bootstrap_iters=0)
    for task, scores in found["results"].items():
        if responses := lm.answered.get(task):  # none to a group of tasks
            depths = [depth for r in responses for depth in r.depths]
            scores |= {"average_compute": sum(depths) / len(depths) / policy.n_layers,
                       "finished": sum(r.finished for r in responses) / len(responses)}
        print(f"{task}: " + ", ".join(f"{name} {score:.4f}" for name, score in scores.items()
                                      if isinstance(score, float)))
    if args.out:
        write_text(Path(args.out), json.dumps({"args": vars(args), **{
            name: found[name] for name in ("results", "samples")}}, indent=1, default=str) + "\n")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    runs.run_main(main)
