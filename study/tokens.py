"""Which tokens leave early? Depth by kind of token (report/kinds.py), in the thoughts and in the answer.

A token's depth is that of the pass that predicts it. Writes tokens.json.

    python -m study.tokens
"""

import runs
from report.kinds import MEANING, by_kind
from study import common
from study.common import answers


def main() -> None:
    args = common.arguments(__doc__)
    _, tokenizer = runs.load_model(args)
    found = {"stage 1": common.stage_one(args), "stage 2": common.rl_run(args)}
    found = {name: (run, answers(args, run)) for name, run in found.items() if run}
    if not found:
        return
    common.save(args, "tokens", "tokens", meaning=MEANING, runs={
        name: {"run": run.name, "kinds": by_kind(answered.rows, answered.depth_of_outcome, tokenizer)}
        for name, (run, answered) in found.items()})


if __name__ == "__main__":
    runs.run_main(main)
