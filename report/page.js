const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent), depths = [...data.exits, data.n_layers];

const share = p => (100 * p).toFixed(1) + "%", decimal = x => x.toFixed(1);
const METRICS = [  // key, name, what it means, format
  ["accuracy", "Accuracy", "right final answers, with 95% interval", share],
  ["average_compute", "Average compute", "share of layers run per generated token", share],
  ["layer_savings", "Layer savings", "one minus average compute", share],
  ["exit_rate", "Early exit rate", "tokens that stopped before the last layer", share],
  ["length", "Length", "tokens per response", decimal],
  ["total_compute", "Total compute", "length × depth, in full-depth tokens", decimal],
  ["finished", "Finished", "responses that ended by themselves", share],
  ["n", "Responses", "graded", String],
];

// Shallow to deep. Lightness falls all the way, so that the order survives colour blindness and greyscale.
const RAMP = [[255, 231, 163], [250, 178, 110], [222, 115, 117], [132, 78, 148], [46, 70, 150]];
function colours(n) {  // [background, text] for n depths
  return Array.from({length: n}, (_, i) => {
    const at = i / Math.max(n - 1, 1) * (RAMP.length - 1), k = Math.min(Math.floor(at), RAMP.length - 2);
    const rgb = RAMP[k].map((from, c) => Math.round(from + (at - k) * (RAMP[k + 1][c] - from)));
    const [r, g, b] = rgb.map(c => ((c / 255 + 0.055) / 1.055) ** 2.4);
    return [`rgb(${rgb})`, 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff"];  // 0.179: WCAG's tie
  });
}

// Control characters and bidi overrides are drawn as pictures, so that no token is invisible or turns its neighbours.
const picture = c => c === "\n" ? "⏎" : c === "\t" ? "⇥" : c < " " ? String.fromCharCode(0x2400 + c.charCodeAt()) : "�";
const picturable = /[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/g;
const visible = s => s.replace(picturable, picture).replace(/^\p{Cf}*$/u, "∅");
const inText = s => visible(s).replace(/⏎/g, (c, i) => s[i] === "\n" ? "⏎\n" : c);
const quoted = id => visible(data.strings[id]).replace(/ /g, "␣");
const prose = s => String(s).replace(picturable, c => c === "\n" || c === "\t" ? c : "�");
const percent = m => m == null ? "–" : m === 0 ? "<0.1%" : m < 10 ? m / 10 + "%" : Math.round(m / 10) + "%";

function el(tag, name, ...inside) {  // strings become text nodes: the only way from the data to the page
  const node = document.createElement(tag);
  if (name) node.className = name;
  node.append(...inside);
  return node;
}
const row = (...cells) => el("tr", "", ...cells), th = (...inside) => el("th", "", ...inside);
const td = (...inside) => el("td", "", ...inside), depthLabel = k => th(el("span", "depth d" + k, depths[k]));
function bar(p, label, colour) {
  const fill = el("u", colour);
  fill.style.width = 100 * p + "%";
  return td(el("div", "bar", el("i", "", fill), el("b", "", label)));
}

function results() {
  const interval = m => el("small", "", `${share(m.accuracy_low)} – ${share(m.accuracy_high)}`);
  const cell = (m, key, format) => td(format(m[key]), key === "accuracy" ? interval(m) : "");
  const rows = METRICS.map(([key, name, meaning, format]) =>
    row(th(name, el("small", "", meaning)), ...data.metrics.map(m => cell(m, key, format))));
  const names = row(th(), ...data.metrics.map(m => th(prose(m.name))));
  return el("table", "", el("thead", "", names), el("tbody", "", ...rows));
}
function histogram(metric) {
  const shares = depths.map(depth => metric.exit_histogram[depth] ?? 0);
  const rows = shares.map((p, k) => row(depthLabel(k), bar(p, share(p), "d" + k)));
  return el("table", "", el("caption", "", prose(metric.name)), el("tbody", "", ...rows));
}
function kinds(models) {  // of those that exit; the kinds that run fewest layers in the last of them come first
  const order = Object.entries(models.at(-1).kinds).filter(([, [part]]) => part >= .001)  // of fewer tokens: noise
    .sort(([, a], [, b]) => a[1] - b[1]);
  const cell = (m, kind) => m.kinds[kind] ? bar(m.kinds[kind][1], share(m.kinds[kind][1]), "") : td();
  const rows = order.map(([kind, [part]]) => row(th(`${kind} (${share(part)})`), ...models.map(m => cell(m, kind))));
  const names = row(th(), ...models.map(m => th(prose(m.name))));
  return el("table", "", el("thead", "", names), el("tbody", "", ...rows));
}

function ticks(values) {  // round numbers, six at most, that enclose them
  const low = Math.min(...values), high = Math.max(...values);
  const step = [.01, .02, .05, .1, .2].find(s => Math.ceil(high / s) - Math.floor(low / s) <= 5) ?? .5;
  const end = Math.ceil(high / step - 1e-6), first = Math.max(0, Math.min(end - 1, Math.floor(low / step + 1e-6)));
  return Array.from({length: Math.max(end, first + 1) - first + 1}, (_, i) => (first + i) * step);
}
function plot() {  // a point a model; its name stands to the right, where names can't meet
  const svg = $("plot"), [left, right, top, bottom] = [44, 300, 10, 220], percents = p => Math.round(100 * p) + "%";
  const make = (tag, name, attributes, text) => {
    const node = document.createElementNS(svg.namespaceURI, tag);
    for (const [key, value] of Object.entries({class: name, ...attributes})) node.setAttribute(key, value);
    if (text != null) node.textContent = text;
    svg.append(node);
  };
  const line = (name, x1, y1, x2, y2) => make("line", name, {x1, y1, x2, y2});
  if (!data.metrics.length) return;
  const xs = ticks(data.metrics.map(m => m.average_compute));
  const ys = ticks(data.metrics.flatMap(m => [m.accuracy_low, m.accuracy_high]));
  const at = (p, all, from, to) => from + (p - all[0]) / (all.at(-1) - all[0]) * (to - from);
  const x = p => at(p, xs, left, right), y = p => at(p, ys, bottom, top);
  for (const p of xs) make("text", "", {x: x(p), y: bottom + 20, "text-anchor": "middle"}, percents(p));
  for (const p of ys) {
    line("", left, y(p), right, y(p));
    make("text", "", {x: left - 8, y: y(p) + 4, "text-anchor": "end"}, percents(p));
  }
  const sorted = [...data.metrics].sort((a, b) => b.accuracy - a.accuracy);
  let label = top - 15;
  for (const [i, m] of sorted.entries()) {
    const [cx, cy] = [x(m.average_compute), y(m.accuracy)];
    label = Math.max(label + 15, Math.min(cy, bottom - 15 * (sorted.length - 1 - i)));
    line("leader", cx, cy, right + 12, label);
    line("interval", cx, y(m.accuracy_low), cx, y(m.accuracy_high));
    make("circle", "", {cx, cy, r: 4.5});
    const name = prose(m.name), short = name.length > 22 ? name.slice(0, 10) + "…" + name.slice(-11) : name;
    make("text", "name", {x: right + 16, y: label + 4}, short);
  }
}

const told = new WeakMap();  // a token's span -> [its run, its index there]
function token(run, id, t) {
  const span = el("span", "d" + depths.indexOf(run.depths[t]), inText(data.strings[id]));
  span.tabIndex = t ? -1 : 0;  // one tab stop per response; the arrow keys walk inside it
  span.setAttribute("aria-describedby", "tip");
  told.set(span, [run, t]);
  return span;
}
function response(run) {
  const verdict = !run.finished ? "unfinished" : run.correct ? "correct" : "wrong";
  const mark = {correct: "✓ ", wrong: "✗ ", unfinished: "… "}[verdict] + verdict;
  const length = run.tokens.length, total = run.depths.reduce((a, b) => a + b, 0) / data.n_layers;
  const answer = run.value == null ? "" : " · " + prose(run.value), mean = share(total / (length || 1));
  const node = el("div", "response",
    el("h3", "", prose(run.name), el("span", verdict, mark + answer)),
    el("small", "", `average compute ${mean} · length ${length} · total compute ${decimal(total)}`),
    el("div", "tokens", ...run.tokens.map((id, t) => token(run, id, t))));
  Object.assign(node.dataset, {run: run.name, verdict});
  return node;
}
function problem({id, question, gold, runs}) {
  const node = el("article", "", el("small", "", prose(id)), el("p", "question", prose(question)),
    el("p", "", "Gold answer ", el("b", "", prose(gold))), el("div", "responses", ...runs.map(response)));
  const verdicts = new Set([...node.querySelectorAll(".response")].map(({dataset}) => dataset.verdict));
  Object.assign(node.dataset, {changed: verdicts.size > 1, words: `${id} ${question} ${gold}`.toLowerCase()});
  return node;
}

function filter() {
  const responses = [...document.querySelectorAll(".response")];
  const [run, verdict, words] = ["run", "verdict", "words"].map(name => $(name).value);
  for (const node of responses) {
    const its = node.dataset, problem = node.closest("article").dataset;
    node.hidden = run && run !== its.run || !problem.words.includes(words.trim().toLowerCase())
      || verdict && (verdict === "changed" ? problem.changed === "false" : verdict !== its.verdict);
  }
  for (const card of document.querySelectorAll("article"))
    card.hidden = !card.querySelector(".response:not([hidden])");
  $("count").textContent = `${responses.filter(node => !node.hidden).length} of ${responses.length} responses`;
}
function depthButton(depth, k) {  // marks its depth's tokens alone; pressed again, all
  const button = el("button", "d" + k, depth);
  button.setAttribute("aria-pressed", false);
  button.onclick = () => {
    const press = button.ariaPressed === "false";
    for (const other of $("depths").querySelectorAll("button")) other.ariaPressed = press && other === button;
    $("problems").className = press ? "only" + k : "";
  };
  return button;
}

function lens(pairs, written) {
  const top = pairs.map(([id, m]) =>
    el("span", id === written ? "written" : "", el("span", "t", quoted(id)), percent(m)));
  return td(el("div", "top", ...top));
}
function rung(k, run, t, chosen) {  // one depth of the ladder: its exit probability and its logit lens
  if (k > chosen) {
    const note = td(k === chosen + 1 ? "not run: the stream is frozen from here on" : "");
    note.colSpan = 2;
    return el("tr", "frozen", depthLabel(k), note);
  }
  const p = run.exit_probs[t] || [];  // empty for the base model; full depth has none
  const none = p.length && k === data.exits.length ? "full depth" : "–";
  const exit = p[k] != null ? bar(p[k] / 1000, percent(p[k]), "") : td(none);
  return el("tr", k === chosen ? "here" : "", depthLabel(k), exit, lens(run.top[t]?.[k] ?? [], run.tokens[t]));
}
const tip = $("tip");
let shown = null;
function show(span) {
  shown = span;
  tip.hidden = !span;
  if (!span) return;
  const [run, t] = told.get(span), depth = run.depths[t], chosen = depths.indexOf(depth);
  const fate = depth < data.n_layers ? `exit after ${depth} of ${data.n_layers} layers` : `all ${depth} layers`;
  const head = el("p", "", el("span", "t d" + chosen, quoted(run.tokens[t])), el("b", "", fate),
    el("span", "", `token ${t + 1} of ${run.tokens.length}`));
  const titles = row(th("layers"), th("p(exit)"), th("top tokens (logit lens)"));
  const rows = depths.map((_, k) => rung(k, run, t, chosen));
  tip.replaceChildren(head, el("table", "", el("thead", "", titles), el("tbody", "", ...rows)));
  place();
}
function place() {  // below the token where there is room, else above it
  if (!shown) return;
  const at = shown.getClientRects()[0], right = document.documentElement.clientWidth - tip.offsetWidth - 8;
  const fits = at.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.left = Math.max(8, Math.min(at.left - 24, right)) + "px";
  tip.style.top = (fits ? at.bottom + 8 : Math.max(8, at.top - 8 - tip.offsetHeight)) + "px";
}

document.title = $("title").textContent = prose(data.title);
$("headline").textContent = prose(data.headline ?? "");
$("subtitle").textContent = prose(data.subtitle);
$("shown").textContent = `Responses to the first ${data.problems.length} of ${data.metrics[0]?.n ?? 0} problems`;
$("layers").textContent = `layers run, of ${data.n_layers}`;
document.head.append(el("style", "", ...colours(depths.length).map(([ground, ink], k) =>
  `.d${k} { background: ${ground}; color: ${ink}; }
   .only${k} .tokens span:not(.d${k}) { background: none; color: var(--dim); }\n`)));
$("results").append(results());
plot();
$("histograms").append(...data.metrics.map(histogram));
const exiting = data.metrics.filter(m => m.exit_rate);
if (exiting.length) $("early").append(kinds(exiting)); else $("early").remove();
$("depths").append(...depths.map(depthButton));
const names = new Set(data.problems.flatMap(({runs}) => runs.map(run => run.name)));
$("run").append(...[...names].map(name => new Option(prose(name), name)));
$("problems").append(...data.problems.map(problem));
filter();

const focused = () => told.has(document.activeElement) ? document.activeElement : null;
$("filters").addEventListener("input", filter);
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
