"""One HTML page on which every token is coloured by the depth at which the model stopped working on it.

page.html is the frame, page.css the looks, and page.js draws everything else from the data. Here they become one file
that opens offline. The data travel as JSON alone and the script only makes text nodes of them: nothing that a model
writes can become markup.
"""

import json
import math
from pathlib import Path
from string import Template

from report.kinds import MEANING

METRICS = ("name", "n", "accuracy", "accuracy_low", "accuracy_high", "exit_rate", "layer_savings", "average_compute",
           "total_compute", "length", "finished", "exit_histogram")


def pack(record: dict) -> dict:
    """What the script draws: every string once, probabilities in thousandths, so that long responses stay small.

    What heads and lenses say past a token's own depth is left out: they read a frozen stream and decide nothing.
    """
    depths, ids = [*record["exits"], record["n_layers"]], {}

    def string_id(text):
        return ids.setdefault(text, len(ids))

    def thousandths(p):
        return round(1000 * p) if math.isfinite(p) else None

    def pack_run(name, run):
        reached = [depths.index(depth) + 1 for depth in run["depths"]]
        return run | {
            "name": name,
            "tokens": [string_id(token) for token in run["tokens"]],
            "exit_probs": [[thousandths(p) for p in ps[:k]] for ps, k in zip(run["exit_probs"], reached, strict=False)],
            "top": [[[(string_id(token), thousandths(p)) for token, p in lens] for lens in lenses[:k]]
                    for lenses, k in zip(run["top"], reached, strict=True)],
        }

    problems = [problem | {"runs": [pack_run(name, run) for name, run in problem["runs"].items()]}
                for problem in record["problems"]]
    metrics = [{key: metric[key] for key in METRICS} | {"kinds": {
        MEANING.get(kind["kind"], f"all of the {kind['part']}"): [kind["share"], kind["average_compute"]]
        for kind in metric["kinds"] if (kind["part"] == "all") != (kind["kind"] == "all")}}  # each kind, and each part
        for metric in record["metrics"]]
    return record | {"metrics": metrics, "problems": problems, "strings": list(ids)}


def page(record: dict) -> str:
    """The whole page as text.

    record: title, subtitle, perhaps headline (one sentence), n_layers, exits (depths in layers run), metrics (one dict
    per model, with the keys of METRICS; exit_histogram is {"depth": share}; and kinds, report.kinds.by_kind's rows),
    problems (id, question, gold, runs). runs maps a model's name to tokens, depths, correct, finished, value and, for
    each token, exit_probs (conditional, per exit; [] without heads) and top (per exit and at full depth, [token,
    probability] pairs).
    """
    frame, css, script = (Path(__file__).with_name(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    data = json.dumps(pack(record), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return Template(frame).substitute(css=css, script=script, data=data)
