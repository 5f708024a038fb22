"""Train on one task, test on the other, both ways: do exits learned on arithmetic serve stories, and the reverse?

The second task's stage 1 and stage 2 are trained with the flags of the first's. Writes crossdomain.json.

    python -m study.crossdomain                         the embedded model, arithmetic and stories
    python -m study.crossdomain --model M --other tom   GSM8K and theory of mind
"""

import runs
from data import tasks
from data.hub import UserError
from study import common
from study.common import answers, base_answers, point, undrawn


def main() -> None:
    args = common.arguments(__doc__, lambda p: p.add_argument("--other", default="stories", help="the second task "
                                                              "(default: stories)"))
    there = common.on_task(args, tasks.name_of(args.other))
    if there.task == args.task:
        raise UserError(f"--other {args.other} is the task itself: name another")
    tag = f"-{args.other.split('/')[-1].split('.')[0]}"
    trained = {}
    for home, suffix in ((args, ""), (there, tag)):
        s1 = common.stage_one(home, suffix)
        trained[home.task] = [("stage 1", s1), ("stage 2", common.rl_run(home, suffix=suffix))]
    if not any(run for found in trained.values() for _, run in found):
        return
    cells = [point(tested, base_answers(tested), stage="base", tested=tested.task) for tested in (args, there)]
    cells += [{**point(tested, answers(tested, run), stage=stage, trained=task, tested=tested.task),
               "thresholded": point(tested, undrawn(tested, run))}
              for task, found in trained.items() for stage, run in found if run for tested in (args, there)]
    common.save(args, "crossdomain", "crossdomain", cells=cells)


if __name__ == "__main__":
    runs.run_main(main)
