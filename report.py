"""One HTML page on which every token is coloured by the depth at which the model stopped working on it.

The page is a single file that opens offline: no fonts, scripts or images from elsewhere, light and dark. The frame and
the numbers are static HTML. The tokens travel as JSON (each string once, probabilities in thousandths) and are drawn by
a script that only makes text nodes: nothing that a model writes can become markup. What heads and lenses say past the
depth at which a token stopped is left out, for they read a frozen stream there and decide nothing.
"""

import html
import json
import math
import os
import re
from pathlib import Path

# Shallow to deep. Lightness falls all the way, so that the order survives colour blindness and greyscale.
RAMP = [(255, 231, 163), (250, 178, 110), (222, 115, 117), (132, 78, 148), (45, 58, 120)]

METRICS = [  # (key, name, what it means, format)
    ("accuracy", "Accuracy", "right final answers, with confidence interval", "{:.1%}"),
    ("average_compute", "Average compute", "layers run per token, of all layers", "{:.1%}"),
    ("layer_savings", "Layer savings", "one minus average compute", "{:.1%}"),
    ("exit_rate", "Early exit rate", "tokens that stopped before the last layer", "{:.1%}"),
    ("length", "Length", "tokens per response", "{:.1f}"),
    ("total_compute", "Total compute", "length × depth, in full-depth tokens", "{:.1f}"),
    ("finished", "Finished", "responses that ended by themselves", "{:.1%}"),
    ("n", "Responses", "graded", "{:d}"),
]

CSS = """
:root { color-scheme: light dark; --bg: #faf9f6; --card: #fff; --ink: #1c1d22; --dim: #63656e; --line: #e3e1da;
  --track: #efede7; --good: #17693f; --bad: #a3262a; --shade: 0 12px 40px #1c1d2230; --mark: #fdf3d7; }
@media (prefers-color-scheme: dark) { :root { --bg: #121318; --card: #1a1c22; --ink: #e9e8e4; --dim: #a0a2ac;
  --line: #2e3039; --track: #262831; --good: #7fd1a3; --bad: #f59a94; --shade: 0 12px 40px #000a; --mark: #383222; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 92rem; padding: 2.5rem clamp(1rem, 3vw, 2.5rem) 4rem; background: var(--bg);
  color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 0; font-size: clamp(1.5rem, 3.2vw, 2.1rem); line-height: 1.2; letter-spacing: -.02em; }
h2 { margin: 0 0 .5rem; font-size: 1rem; }
code, .tokens, .t { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { color: var(--dim); font-size: .84rem; overflow-wrap: anywhere; }
small { display: block; color: var(--dim); font-size: .78rem; font-weight: 400; line-height: 1.35; }
[class^=d] { forced-color-adjust: none; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
.legend { position: sticky; top: 0; z-index: 1; display: flex; margin: 1.5rem 0 1rem; padding: .5rem 0;
  background: var(--bg); }
.legend span { flex: 1; padding: .3rem .2rem; text-align: center; font-size: .8rem; font-weight: 600; }
.legend span:first-child { border-radius: 6px 0 0 6px; } .legend span:last-child { border-radius: 0 6px 6px 0; }
.legend em { font-style: normal; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.75rem 3.5rem;
  margin-bottom: 2.25rem; }
.figures div { overflow-x: auto; } .figures p { margin: 0 0 1.75rem; color: var(--dim); text-wrap: pretty; }
.figures p b { color: var(--ink); font-weight: 600; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; } thead th { color: var(--dim); font-size: .8rem; }
.numbers :is(th, td) { padding: .36rem 0 .36rem .8rem; vertical-align: top; }
.numbers tbody :is(th, td) { border-top: 1px solid var(--line); }
.numbers :is(td, thead th) { text-align: right; white-space: nowrap; }
.hist :is(th, td) { padding: .22rem 0 .22rem 1rem; } .hist tbody th { font-weight: 400; width: 1%; white-space: pre; }
.figures th:first-child { padding-left: 0; text-align: left; }
.bar { display: flex; align-items: center; gap: .45rem; font-size: .8rem; }
.bar i { flex: 1; height: 1.1rem; border-radius: 3px; background: var(--track); overflow: hidden; }
.bar u { display: block; height: 100%; } .bar b { width: 3rem; font-weight: 400; text-align: right; }
article { margin: 0 0 1.5rem; padding: 1.25rem 1.4rem 1.4rem; border: 1px solid var(--line); border-radius: 12px;
  background: var(--card); }
article p { max-width: 85ch; margin: .35rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
article p.q { font-size: 1.05rem; line-height: 1.5; }
.runs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 1.5rem;
  margin-top: 1.1rem; }
h3 { display: flex; flex-wrap: wrap; gap: 0 .6rem; margin: 0; font-size: .95rem; } h3 span { font-weight: 500; }
.correct { color: var(--good); } .wrong { color: var(--bad); } .unfinished { color: var(--dim); }
.runs small { margin: .1rem 0 .6rem; font-variant-numeric: tabular-nums; }
.tokens { font-size: 13px; line-height: 1.72; white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens span { margin-right: 1px; padding: .14em .5px; border-radius: 2.5px; cursor: help;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.tokens span:is(:hover, :focus) { outline: 2px solid var(--ink); outline-offset: 1px; position: relative; }
#tip { position: fixed; z-index: 2; width: min(29rem, 100vw - 16px); padding: .8rem .95rem .7rem; font-size: .82rem;
  line-height: 1.4; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  box-shadow: var(--shade); pointer-events: none; }
#tip p { display: flex; align-items: baseline; flex-wrap: wrap; gap: .2rem .6rem; margin: 0 0 .5rem; }
#tip p .t { font-size: .95rem; padding: .05rem .4rem; border-radius: 4px; overflow-wrap: anywhere; }
#tip p span:last-child { margin-left: auto; color: var(--dim); }
#tip :is(th, td) { padding: .2rem .35rem; } #tip thead th { font-size: .72rem; font-weight: 500; }
#tip tbody th { width: 1%; }
#tip th span { display: block; min-width: 1.7rem; padding: 0 .3rem; border-radius: 3px; text-align: center; }
#tip td:nth-child(2) { width: 6.6rem; } #tip .bar i { height: .45rem; } #tip .bar u { background: var(--dim); }
#tip .bar b { width: 2.3rem; }
#tip :is(.top, .top > span) { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 .8rem; }
#tip .top > span { flex-wrap: nowrap; gap: .3rem; color: var(--dim); }
#tip .top > .written { color: var(--ink); font-weight: 700; }
#tip .top .t { max-width: 11ch; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#tip .here { background: var(--mark); box-shadow: inset 3px 0 var(--ink); }
#tip .frozen { color: var(--dim); } #tip .frozen span { opacity: .7; }
@media (max-width: 40rem) { .legend em, .numbers th small { display: none; } article { padding: 1rem; }
  .figures :is(th, td) { padding-left: .5rem; } .numbers tbody td { white-space: normal; } }
"""

SCRIPT = r"""
const data = JSON.parse(document.getElementById("data").textContent), depths = [...data.exits, data.n_layers];
const tip = document.getElementById("tip"), told = new WeakMap();  // a token's span -> [its run, its index there]
let shown = null;

// Control characters and bidi overrides are drawn as pictures, so that no token is invisible or turns its neighbours.
const picture = c => c === "\n" ? "⏎" : c === "\t" ? "⇥" : c < " " ? String.fromCharCode(0x2400 + c.charCodeAt()) : "�";
const picturable = /[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/g;
const visible = s => s.replace(picturable, picture).replace(/^\p{Cf}*$/u, "∅");
const inText = s => visible(s).replace(/⏎/g, (c, i) => s[i] === "\n" ? "⏎\n" : c);
const quoted = id => visible(data.strings[id]).replace(/ /g, "␣");
const percent = m => m == null ? "–" : m === 0 ? "<0.1%" : m < 10 ? m / 10 + "%" : Math.round(m / 10) + "%";

function el(tag, name, ...inside) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  node.append(...inside);
  return node;
}
function bar(m) {
  const fill = el("u");
  fill.style.width = m / 10 + "%";
  return el("div", "bar", el("i", "", fill), el("b", "", percent(m)));
}
function topTokens(flat, written) {  // flat: string id, thousandths, string id, thousandths, ...
  const out = el("div", "top");
  for (let i = 0; i < flat.length; i += 2)
    out.append(el("span", flat[i] === written && "written", el("span", "t", quoted(flat[i])), percent(flat[i + 1])));
  return out;
}
function rung(k, run, t, chosen) {  // one depth of the ladder: its exit probability and its logit lens
  const depth = el("th", "", el("span", "d" + k, depths[k]));
  if (k > chosen) {
    const note = el("td", "", k === chosen + 1 ? "not run: the stream is frozen from here on" : "");
    note.colSpan = 2;
    return el("tr", "frozen", depth, note);
  }
  const p = run.exit_probs[t] || [];  // empty for the base model; full depth has none
  const exit = p[k] != null ? bar(p[k]) : p.length && k === data.exits.length ? "full depth" : "–";
  const lens = topTokens((run.top[t] || [])[k] || [], run.tokens[t]);
  return el("tr", k === chosen ? "here" : "", depth, el("td", "", exit), el("td", "", lens));
}
function show(span) {
  shown = span;
  tip.hidden = !span;
  if (!span) return;
  const [run, t] = told.get(span), depth = run.depths[t], chosen = depths.indexOf(depth);
  const fate = depth < data.n_layers ? `exit after ${depth} of ${data.n_layers} layers` : `all ${depth} layers`;
  const head = el("p", "", el("span", "t d" + chosen, quoted(run.tokens[t])), el("b", "", fate),
    el("span", "", `token ${t + 1} of ${run.tokens.length}`));
  const titles = ["layers", "p(exit)", "top tokens (logit lens)"].map(name => el("th", "", name));
  const rows = depths.map((_, k) => rung(k, run, t, chosen));
  tip.replaceChildren(head, el("table", "", el("thead", "", el("tr", "", ...titles)), el("tbody", "", ...rows)));
  place();
}
function place() {  // below the token where there is room, else above it
  if (!shown) return;
  const at = shown.getClientRects()[0], right = document.documentElement.clientWidth - tip.offsetWidth - 8;
  const fits = at.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.left = Math.max(8, Math.min(at.left - 24, right)) + "px";
  tip.style.top = (fits ? at.bottom + 8 : Math.max(8, at.top - 8 - tip.offsetHeight)) + "px";
}

for (const box of document.querySelectorAll(".tokens")) {
  const run = data.problems[box.dataset.problem][box.dataset.run];
  box.append(...run.tokens.map((id, t) => {
    const span = el("span", "d" + depths.indexOf(run.depths[t]), inText(data.strings[id]));
    span.tabIndex = t ? -1 : 0;  // one tab stop per response; the arrow keys walk inside it
    span.setAttribute("aria-describedby", "tip");
    told.set(span, [run, t]);
    return span;
  }));
}
const focused = () => told.has(document.activeElement) ? document.activeElement : null;
document.addEventListener("mouseover", e => show(told.has(e.target) ? e.target : focused()));
document.addEventListener("focusin", () => show(focused()));
document.addEventListener("focusout", () => show(null));
document.addEventListener("click", e => told.has(e.target) ? e.target.focus({preventScroll: true}) : focused()?.blur());
document.addEventListener("keydown", e => {
  const span = focused(), next = {ArrowRight: "nextSibling", ArrowLeft: "previousSibling"}[e.key];
  if (e.key === "Escape") { span?.blur(); show(null); }
  if (span && next) { e.preventDefault(); span[next]?.focus(); }
});
addEventListener("scroll", place, {passive: true});
addEventListener("resize", place);
"""


def colours(n: int) -> list[tuple[str, str]]:
    """(background, text) for n depths, shallow first; text is black or white, whichever reads better on it."""
    out = []
    for i in range(n):
        at = i / max(n - 1, 1) * (len(RAMP) - 1)
        k = min(int(at), len(RAMP) - 2)
        rgb = [round(a + (at - k) * (b - a)) for a, b in zip(RAMP[k], RAMP[k + 1], strict=True)]
        linear = [((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        out.append(("#{:02x}{:02x}{:02x}".format(*rgb), "#000" if luminance > 0.179 else "#fff"))  # 0.179: WCAG's tie
    return out


def escape(text) -> str:
    """Text as HTML: markup escaped; lone surrogates, control characters and bidi overrides replaced."""
    unprintable = r"[\ud800-\udfff\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
    return html.escape(re.sub(unprintable, "\ufffd", str(text)))


def pack(record: dict) -> dict:
    """What the script draws: strings once, probabilities in thousandths, nothing past a token's own depth."""
    depths, ids = [*record["exits"], record["n_layers"]], {}

    def string_id(text):
        return ids.setdefault(text, len(ids))

    def thousandths(p):
        return round(1000 * p) if math.isfinite(p) else None

    def flat(lens):
        return [x for text, p in lens for x in (string_id(text), thousandths(p))]

    def pack_run(where, run):
        T = len(run["tokens"])
        if len(run["depths"]) != T or not {len(run["exit_probs"]), len(run["top"])} <= {0, T}:
            raise ValueError(f"{where}: depths, exit_probs and top must be as long as the {T} tokens")
        if strange := set(run["depths"]) - set(depths):
            raise ValueError(f"{where}: depths {sorted(strange)} are none of {depths}")
        reached = [depths.index(depth) + 1 for depth in run["depths"]]
        return {
            "tokens": [string_id(token) for token in run["tokens"]],
            "depths": run["depths"],
            "exit_probs": [[thousandths(p) for p in ps[:k]] for ps, k in zip(run["exit_probs"], reached, strict=False)],
            "top": [[flat(lens) for lens in lenses[:k]] for lenses, k in zip(run["top"], reached, strict=False)],
        }

    problems = [
        [pack_run(f"problem {problem['id']}, {name}", run) for name, run in problem["runs"].items()]
        for problem in record["problems"]
    ]
    return {"n_layers": depths[-1], "exits": depths[:-1], "problems": problems, "strings": list(ids)}


def table(name: str, corner: str, columns: list[str], rows: list[tuple[str, list[str]]]) -> str:
    """An HTML table from a row of headings and (heading, cells) rows; headings of rows and cells are HTML already."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr><th>{th}</th>" + "".join(f"<td>{td}</td>" for td in cells) + "</tr>" for th, cells in rows)
    return f'<table class="{name}"><thead><tr><th>{corner}</th>{head}</tr></thead><tbody>{body}</tbody></table>'


def metrics_table(metrics: list[dict]) -> str:
    """One column per model, one row per metric."""
    rows = [
        (f"{name}<small>{meaning}</small>", [form.format(metric[key]) for metric in metrics])
        for key, name, meaning, form in METRICS
    ]
    intervals = [f"<small>{m['accuracy_low']:.1%} – {m['accuracy_high']:.1%}</small>" for m in metrics]
    rows[0][1][:] = [cell + interval for cell, interval in zip(rows[0][1], intervals, strict=True)]
    return table("numbers", "", [metric["name"] for metric in metrics], rows)


def histogram(metrics: list[dict], depths: list[int]) -> str:
    """Share of generated tokens at each depth: one row per depth, one column of bars per model."""
    rows = []
    for k, depth in enumerate(depths):
        shares = [metric["exit_histogram"].get(str(depth), 0.0) for metric in metrics]
        bars = [f'<i><u class="d{k}" style="width:{share:.2%}"></u></i><b>{share:.1%}</b>' for share in shares]
        rows.append((f"{depth} of {depths[-1]}", [f'<div class="bar">{bar}</div>' for bar in bars]))
    return table("hist", "layers", [metric["name"] for metric in metrics], rows)


def card(problem: dict, problem_idx: int, n_layers: int) -> str:
    """A problem and its responses side by side: verdict and compute over the empty box that the script fills."""
    runs = []
    for run_idx, (name, run) in enumerate(problem["runs"].items()):
        verdict = "unfinished" if not run["finished"] else "correct" if run["correct"] else "wrong"
        mark = {"correct": "✓", "wrong": "✗", "unfinished": "…"}[verdict]
        answer = "" if run["value"] is None else f" · {escape(run['value'])}"
        T, total = len(run["depths"]), sum(run["depths"]) / n_layers
        runs.append(f"""<div><h3>{escape(name)}<span class="{verdict}">{mark} {verdict}{answer}</span></h3>
<small>average compute {total / max(T, 1):.1%} · length {T} · total compute {total:.1f}</small>
<div class="tokens" data-problem="{problem_idx}" data-run="{run_idx}"></div></div>""")
    return f"""<article><small>{escape(problem["id"])}</small><p class="q">{escape(problem["question"])}</p>
<p>Gold answer <b>{escape(problem["gold"])}</b></p><div class="runs">{"".join(runs)}</div></article>"""


def page(record: dict) -> str:
    """The whole page as text.

    record: title, subtitle, n_layers, exits (depths in layers run), metrics (one dict per model: name, the keys of
    METRICS, accuracy_low, accuracy_high, exit_histogram {"depth": share}), problems (id, question, gold, runs). runs
    maps a model's name to tokens, depths, correct, finished, value and, for each token, exit_probs (conditional, per
    exit; [] without heads) and top (per exit and at full depth, [token, probability] pairs).
    """
    L, depths = record["n_layers"], [*record["exits"], record["n_layers"]]
    pairs = enumerate(colours(len(depths)))
    palette = "".join(f".d{k} {{ background: {ground}; color: {ink}; }}\n" for k, (ground, ink) in pairs)
    legend = "".join(f'<span class="d{k}">{depth} of {L}<em> layers</em></span>' for k, depth in enumerate(depths))
    data = json.dumps(pack(record), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(record["title"])}</title><style>{CSS}{palette}</style></head><body>
<header><h1>{escape(record["title"])}</h1><code>{escape(record["subtitle"])}</code></header>
<div class="legend">{legend}</div>
<div class="figures"><div><p><b>Colour is depth:</b> how many of the {L} layers ran before the token was written. Pale
and warm stopped early, dark and cool used the full stack. <b>Hover, tap or tab to a token</b> (← → walk on) for what
each exit said: the probability of stopping there, once reached, and the tokens that the read-out at that depth ranks
first (the logit lens), with the token that was written in bold. Past the depth at which a token stopped its stream is
frozen and decides nothing, so those rows are blank. ⏎ is a line break, ␣ a space, ∅ a token without visible text.</p>
<h2>Where tokens stop</h2>{histogram(record["metrics"], depths)}</div>
<div><h2>Results</h2>{metrics_table(record["metrics"])}</div></div>
<main>{"".join(card(problem, i, L) for i, problem in enumerate(record["problems"]))}</main>
<div id="tip" role="tooltip" hidden></div>
<script type="application/json" id="data">{data}</script>
<script>{SCRIPT}</script></body></html>
"""


def write_page(path: str | Path, record: dict) -> None:
    """Write the page whole or not at all: a crash leaves the old file or none, never half of one."""
    text, path = page(record), Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
