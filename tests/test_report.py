"""The HTML page: whatever a model writes stays text, and every token survives the trip."""

import copy
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

import report

HOSTILE = [
    *("<script>alert(1)</script>", "</script>", "</SCRIPT >", "<!--", "-->", "]]>", "</style>", "</div></main>", "<p>"),
    *("&", "&lt;", '"', "'", '" onmouseover="alert(1)', "\\", "\\u003c", "${1}", "%s", "$script", "$$", "<img src=http://x.example>"),
    *("\x00", "\x07", "\x1b[31m", "\r", "\x7f", "\x85", "\t", "\n", "\n\n", " ", "", "\u2028", "\u2029"),
    *("\u202e", "\ufeff", "\ud83d", "\udc00 tail", "\ufffd\ufffd", "語", "مرحبا", " 👩‍👧", "\uffff"),
]
VOID = {"meta", "input"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(not BROWSER, reason="needs Chromium")


def make_record(strings=("14", " +", " 5", "\n"), marker="plain") -> dict:
    """3 exits of 7 layers; one problem, two models; every string of the page that comes from outside is given here."""
    T, metric = len(strings), dict(accuracy=0.625, accuracy_low=0.5, accuracy_high=0.75, exit_rate=0.1234, n=211)
    metric |= dict(layer_savings=0.0456, average_compute=0.9544, total_compute=81.26, length=90.04, finished=0.987)
    lens = [[[strings[k], 0.5], [strings[-k], 0.25]] for k in range(4)]
    run = {
        "tokens": list(strings), "depths": [[2, 4, 6, 7][t % 4] for t in range(T)], "correct": True, "finished": True,
        "exit_probs": [[0.12345, 0.5 + t / 100, 1.0] for t in range(T)], "top": [lens] * T, "value": marker,
    }  # fmt: skip
    base = run | {"depths": [7] * T, "exit_probs": [], "correct": False, "value": None}
    metric["kinds"] = [dict(zip(("part", "kind", "share", "average_compute"), row, strict=True)) for row in (
        ("all", "result", 0.25, 0.9375), ("all", "word", 0.75, 0.125), ("answer", "word", 0.5, 0.5),
        ("all", "all", 1, 0.5), ("answer", "all", 0.5, 0.625))]
    base_metric = metric | {"name": "base", "exit_histogram": {"7": 1.0}, "exit_rate": 0.0}
    metric |= {"name": marker, "exit_histogram": {"2": 0.125, "4": 0.25, "6": 0.0, "7": 0.625}}
    return {
        "title": marker, "subtitle": marker, "n_layers": 7, "exits": [2, 4, 6], "metrics": [base_metric, metric],
        "problems": [{"id": marker, "question": marker, "gold": marker, "runs": {"base": base, marker: run}}],
    }  # fmt: skip


class Walk(HTMLParser):
    """Every tag with its attributes, the text of every element, and a complaint where tags don't nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"attribute twice: {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, tag: str) -> list[str]:
        return [data for name, data in self.texts if name == tag]


def embedded(text: str) -> dict:
    return json.loads(Walk(text).text("script")[0])


def without_data(walk: Walk) -> list[tuple[str, str]]:
    first = walk.texts.index(("script", walk.text("script")[0]))
    return walk.texts[:first] + walk.texts[first + 1 :]


def luminance(colour: str) -> float:
    """WCAG 2 relative luminance of rgb(r,g,b), #000 or #fff, from its definition."""
    if colour[0] == "#":
        colour = {"#000": "0 0 0", "#fff": "255 255 255"}[colour]
    parts = [int(digits) / 255 for digits in re.findall(r"\d+", colour)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def browse(tmp_path, record: dict, probe: str, width: int = 1280):
    """What the JavaScript `probe` returns of the drawn page (d: its document, w: its window), without console output.

    The page stands in a frame, because a headless window is never as narrow as a telephone.
    """
    text = json.dumps(report.page(record)).replace("<", "\\u003c")
    (tmp_path / "outer.html").write_text(f"""<!doctype html><meta charset="utf-8"><pre></pre>
        <iframe style="border: 0; width: {width}px; height: 800px"></iframe><script>
        const frame = document.querySelector("iframe"), probe = (w, d) => {{ {probe} }};
        frame.onload = () => document.querySelector("pre").textContent =
            JSON.stringify(probe(frame.contentWindow, frame.contentDocument));
        frame.srcdoc = {text};
        </script>""", encoding="utf-8")
    flags = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
             "disable-component-update", "disable-sync", "enable-logging=stderr", "virtual-time-budget=5000",
             f"user-data-dir={tmp_path / 'profile'}", "dump-dom")
    done = subprocess.run([BROWSER, *(f"--{flag}" for flag in flags), (tmp_path / "outer.html").as_uri()],
                          capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    return json.loads(html.unescape(re.search("<pre>(.*?)</pre>", done.stdout, re.DOTALL)[1]))


@pytest.mark.parametrize("string", HOSTILE)
def test_no_string_becomes_markup(string):
    """If it fails, a question or a sampled token can break the page or run a script in the reader's browser."""
    record = make_record([string, "a", "b", string], string)
    text = report.page(record | {"headline": string})
    walk, plain = Walk(text), Walk(report.page(make_record()))
    assert embedded(text)["title"] == string
    assert walk.tags == plain.tags  # attributes included: the hostile page has the elements of a harmless one
    assert without_data(walk) == without_data(plain)
    assert [attrs for tag, attrs in walk.tags if tag == "script"] == [{"type": "application/json", "id": "data"}, {}]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)


def test_page_asks_for_nothing_from_outside():
    """If it fails, the page doesn't open offline, or tells somebody that it was opened."""
    text = report.page(make_record(HOSTILE, "http://x.example"))
    walk = Walk(text)
    for tag, attrs in walk.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form", "a"}
        assert not {"src", "href", "srcset", "action", "background", "data"} & set(attrs)
    styles = " ".join([*walk.text("style"), *(attrs.get("style", "") for _, attrs in walk.tags)])
    assert not re.search(r"url\(|@import|//", styles)
    assert not re.search(r"fetch|XMLHttp|import|https?:|innerHTML|adjacentHTML|\.write|eval", walk.text("script")[1])
    policy = [attrs["content"] for _, attrs in walk.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy and policy[0].startswith("default-src 'none';") and "http" not in policy[0]


def test_every_token_comes_back_from_the_embedded_data():
    """If it fails, the page shows other tokens, depths or probabilities than the model produced."""
    record = make_record(HOSTILE)
    data = embedded(report.page(record))
    assert (data["n_layers"], data["exits"]) == (7, [2, 4, 6]) and len(set(data["strings"])) == len(data["strings"])
    for got, run in zip(data["problems"][0]["runs"], record["problems"][0]["runs"].values(), strict=True):
        assert [data["strings"][i] for i in got["tokens"]] == run["tokens"] and got["depths"] == run["depths"]
        assert len(got["top"]) == len(HOSTILE) and len(got["exit_probs"]) == len(run["exit_probs"])
        for t, depth in enumerate(run["depths"]):
            reached = sum(d <= depth for d in (2, 4, 6, 7))
            for pairs, lens in zip(got["top"][t], run["top"][t][:reached], strict=True):
                assert [[data["strings"][i], m / 1000] for i, m in pairs] == lens
            if run["exit_probs"]:
                assert got["exit_probs"][t] == [123, 500 + 10 * t, 1000][:reached]


def test_nothing_is_embedded_past_a_tokens_own_depth():
    """If it fails, readers see what heads say about a frozen stream as if it had decided something."""
    record = make_record(["x"] * 4)
    run = record["problems"][0]["runs"]["plain"]
    run["top"] = [[[[f"lens at {depth}", 0.5]] for depth in (2, 4, 6, 7)]] * 4
    run["depths"] = [4] * 4
    strings = embedded(report.page(record))["strings"]
    assert "lens at 2" in strings and "lens at 4" in strings
    assert "lens at 6" not in strings and "lens at 7" not in strings


def test_probabilities_that_are_not_finite_become_null():
    """If it fails, one NaN makes the data no JSON at all, and the page shows no token."""
    record = make_record()
    record["problems"][0]["runs"]["plain"]["exit_probs"] = [[float("nan"), float("inf"), 0.5]] * 4
    text = report.page(record)
    assert not re.search(r"NaN|Infinity", Walk(text).text("script")[0])
    assert embedded(text)["problems"][0]["runs"][1]["exit_probs"][2] == [None, None, 500]


@needs_browser
def test_questions_answers_names_and_tokens_are_shown_as_written(tmp_path):
    """If it fails, escaping eats text instead of quoting it: '<b>' in a question must be readable as '<b>'."""
    string = "a < b & \"c\" 'd' <b>语</b>"
    got = browse(tmp_path, make_record(HOSTILE, string) | {"headline": string}, """
        return {texts: ["h1", "#headline", "code", "article small", ".question", "article p b", "caption", "thead th",
                    "h3", "option"].map(name => [...d.querySelectorAll(name)].map(node => node.textContent)),
                title: d.title, elements: d.querySelectorAll("p b b, td b b, h3 b, img").length,
                tokens: [...d.querySelectorAll(".tokens")].map(box => [...box.children].map(s => s.textContent))};""")
    for texts in got["texts"]:
        assert any(string in text for text in texts), texts
    assert got["title"] == string and got["elements"] == 0
    shown = dict(zip(HOSTILE, got["tokens"][1], strict=True))
    pictures = {"\n": "⏎\n", "\n\n": "⏎\n⏎\n", "\t": "⇥", "\x00": "␀", "\x1b[31m": "␛[31m", "": "∅", "\u202e": "�"}
    assert pictures.items() <= shown.items()
    for string in ("<script>alert(1)</script>", "&lt;", "\\u003c", "$script", " 👩‍👧", "مرحبا"):
        assert shown[string] == string


@needs_browser
def test_kinds_of_tokens_are_shown_the_earliest_first(tmp_path):
    """If it fails, a reader can't see which tokens need depth, or sees it of the wrong kind."""
    record, probe = make_record(), "return [...d.querySelectorAll('#early tr')].map(row => row.textContent);"
    rows = ["plain", "other words (75.0%)12.5%", "all of the answer (50.0%)62.5%",
            "digits of a result (after =) (25.0%)93.8%"]
    record["metrics"][1]["kinds"].append({"part": "all", "kind": "operator", "share": 0.0009, "average_compute": 0})
    assert browse(tmp_path, record, probe) == rows  # too few operators to tell
    two = [record["metrics"][1] | {"name": "a model of a long name"}, record["metrics"][1]]
    widths = browse(tmp_path, record | {"metrics": two},
                    "return [...d.querySelectorAll('#early i')].map(bar => bar.offsetWidth);")
    assert len(widths) == 6 and len(set(widths)) == 1  # so that bars can be compared
    del record["metrics"][1]  # the base alone runs all layers for every kind
    assert browse(tmp_path, record, "return d.querySelector('#early');") is None


@needs_browser
def test_each_depth_has_its_own_legible_colour(tmp_path):
    """If it fails, two depths look alike (to a colour-blind reader: lightness must fall), or text can't be read."""
    palettes = browse(tmp_path, make_record(), "return Array.from({length: 12}, (_, i) => w.colours(i + 1));")
    for n, palette in enumerate(palettes, 1):
        grounds, inks = zip(*[map(luminance, pair) for pair in palette], strict=True)
        assert len(palette) == n and all(a > b + 0.01 for a, b in zip(grounds, grounds[1:], strict=False))
        for pair in zip(grounds, inks, strict=True):
            assert (max(pair) + 0.05) / (min(pair) + 0.05) >= 4.5


@needs_browser
def test_page_carries_the_numbers(tmp_path):
    """If it fails, the page's numbers aren't those of the evaluation, or an unfinished response is taken for wrong."""
    record = make_record()
    runs = record["problems"][0]["runs"]
    runs["cut"] = copy.deepcopy(runs["plain"]) | {"finished": False}
    got = browse(tmp_path, record | {"headline": "One sentence."}, """
        const texts = name => [...d.querySelectorAll(name)].map(node => node.textContent);
        return {headline: texts("#headline"), shown: texts("#shown"), verdicts: texts("h3 span"),
                costs: texts(".response small"),
                rows: [...d.querySelectorAll("#results tbody tr")].map(({cells}) =>
                    [cells[0].firstChild.data, cells[2].firstChild.data, cells[2].textContent]),
                bars: [...d.querySelectorAll("#histograms u")].map(bar => [bar.className, bar.style.width,
                    ...[...bar.closest("tr").cells].map(cell => cell.textContent)])};""")
    assert got["headline"] == ["One sentence."]
    assert got["shown"] == ["Responses to the first 1 of 211 problems"]
    assert {name: value for name, value, _ in got["rows"]} == {
        "Accuracy": "62.5%", "Early exit rate": "12.3%", "Layer savings": "4.6%", "Average compute": "95.4%",
        "Total compute": "81.3", "Length": "90.0", "Finished": "98.7%", "Responses": "211",
    }  # fmt: skip
    assert got["rows"][0][2] == "62.5%50.0% – 75.0%"
    assert got["bars"] == [
        ["d0", "0%", "2", "0.0%"], ["d1", "0%", "4", "0.0%"], ["d2", "0%", "6", "0.0%"], ["d3", "100%", "7", "100.0%"],
        ["d0", "12.5%", "2", "12.5%"], ["d1", "25%", "4", "25.0%"], ["d2", "0%", "6", "0.0%"],
        ["d3", "62.5%", "7", "62.5%"],
    ]  # fmt: skip
    assert got["verdicts"] == ["✗ wrong", "✓ correct · plain", "… unfinished · plain"]
    assert got["costs"][:2] == [  # depths 2 + 4 + 6 + 7 of 4 x 7
        "average compute 100.0% · length 4 · total compute 4.0", "average compute 67.9% · length 4 · total compute 2.7"
    ]  # fmt: skip


@needs_browser
def test_a_token_tells_its_exits_to_mouse_and_keyboard(tmp_path):
    """If it fails, hovering or tabbing to a token shows nothing, or another token's probabilities."""
    hovered, left, focused, walked, escaped = browse(tmp_path, make_record(), """
        const token = d.querySelectorAll(".tokens")[1].children[1], tip = d.getElementById("tip");
        const over = node => node.dispatchEvent(new w.MouseEvent("mouseover", {bubbles: true}));
        const press = key => d.activeElement.dispatchEvent(new w.KeyboardEvent("keydown", {key, bubbles: true}));
        const told = () => tip.hidden ? null : [...tip.querySelectorAll("p, tbody tr")].map(node => node.innerText
            .split(/\\s+/).join(" ").trim());
        return [() => over(token), () => over(d.body), () => token.focus(), () => press("ArrowRight"),
                () => press("Escape")].map(act => { act(); return told(); });""")
    assert hovered == focused == ["␣+ exit after 4 of 7 layers token 2 of 4", "2 12% 14 50% 14 25%",
                                  "4 51% ␣+ 50% ⏎ 25%", "6 not run: the stream is frozen from here on", "7"]
    assert walked[0] == "␣5 exit after 6 of 7 layers token 3 of 4"
    assert left is None and escaped is None


@needs_browser
def test_filters_leave_what_they_name(tmp_path):
    """If it fails, a reader who asks for one run's wrong answers or for one depth looks at others."""
    record = make_record()
    record["problems"] += copy.deepcopy(record["problems"])
    record["problems"][1]["runs"]["plain"]["finished"] = False
    record["problems"][1]["id"] = "gsm8k/test/1"
    got = browse(tmp_path, record, """
        const choose = (name, value) => {
            d.getElementById(name).value = value;
            d.getElementById(name).dispatchEvent(new w.Event("input", {bubbles: true}));
        };
        const drawn = name => [...d.querySelectorAll(name)].filter(node => node.getClientRects().length);
        const left = () => [drawn("article").length, drawn(".response h3").map(h3 => h3.textContent),
                            d.getElementById("count").textContent];
        const marked = () => [...d.querySelectorAll(".tokens span")].map((span, i) =>
            w.getComputedStyle(span).backgroundColor === "rgba(0, 0, 0, 0)" ? "" : span.className).join("");
        const results = [left(), marked()];
        choose("verdict", "wrong"), results.push(left());
        choose("run", "plain"), results.push(left());
        choose("verdict", "unfinished"), results.push(left());
        choose("run", ""), choose("verdict", "changed"), choose("words", " GSM8K/"), results.push(left());
        choose("words", "no such"), results.push(left()), choose("words", ""), choose("verdict", "");
        const button = d.querySelectorAll("#depths button")[1];
        button.click(), results.push(marked(), button.getAttribute("aria-pressed"));
        button.click(), results.push(marked(), button.getAttribute("aria-pressed"));
        return results;""")
    base, cut, marked = "base✗ wrong", "plain… unfinished · plain", 2 * (4 * "d3" + "d0d1d2d3")
    assert got == [[2, [base, "plain✓ correct · plain", base, cut], "4 of 4 responses"], marked,
                   [2, [base, base], "2 of 4 responses"], [0, [], "0 of 4 responses"], [1, [cut], "1 of 4 responses"],
                   [1, [base, cut], "2 of 4 responses"], [0, [], "0 of 4 responses"],
                   "d1d1", "true", marked, "false"]


@needs_browser
def test_plot_stands_for_the_numbers(tmp_path):
    """If it fails, the figure that a reader remembers says something else than the table; or names cover each other."""
    record = make_record()
    metrics = [record["metrics"][0] | {"name": f"<b>{i}</b>", "accuracy": 0.6 + i / 1000, "accuracy_low": 0.55,
                                       "accuracy_high": 0.65, "average_compute": 1 - i / 20} for i in range(12)]
    ticks, points, names, same = browse(tmp_path, record | {"metrics": metrics}, """
        const all = name => [...d.querySelectorAll("#plot > " + name)], box = node => node.getBBox();
        return [all("text:not(.name)").map(node => node.textContent),
                all("circle").map(node => [node.getAttribute("cx"), node.getAttribute("cy")].map(Number)),
                all(".name").map(node => [node.textContent, box(node).y, box(node).y + box(node).height]),
                [[1, 1], [0, 0]].map(w.ticks)];""")
    assert ticks == ["40%", "60%", "80%", "100%", "55%", "60%", "65%"] and same == [[0.99, 1.0], [0.0, 0.01]]
    for (x, y), metric in zip(points, sorted(metrics, key=lambda m: -m["accuracy"]), strict=True):
        assert x == pytest.approx(44 + (metric["average_compute"] - 0.4) / 0.6 * 256)
        assert y == pytest.approx(220 - (metric["accuracy"] - 0.55) / 0.1 * 210)
    assert [name for name, _, _ in names] == [f"<b>{i}</b>" for i in reversed(range(12))]
    assert all(below[1] >= above[1] + 14.9 for above, below in zip(names, names[1:], strict=False))
    assert names[0][1] > 0 and names[-1][2] < 250


@needs_browser
def test_a_telephone_needs_no_sideways_scroll(tmp_path):
    """If it fails, the page slides sideways on a small screen, names are cut, or bars can't be compared."""
    record = make_record(["word" * 50, " +", " 5", "\n"], "a question, name or answer of some length " + 100 * "x")
    names = ("base", "stage 1 a-run-with-a-long-name", "s")
    record["metrics"] = [record["metrics"][0] | {"name": name} for name in names]
    got = browse(tmp_path, record, """
        const tip = d.getElementById("tip"), results = d.getElementById("results"), lines = d.createRange();
        const tips = [...d.querySelectorAll(".tokens span")].map(span => {
            span.focus();
            return tip.getBoundingClientRect();
        });
        return {window: w.innerWidth, page: d.documentElement.scrollWidth, body: d.body.scrollWidth,
                tips: tips.map(box => [box.left, box.right]), bars: [...d.querySelectorAll("#histograms i")].map(
                    bar => bar.getBoundingClientRect().width), filters: d.getElementById("filters").offsetHeight,
                table: [results.scrollWidth, results.clientWidth],
                names: [...d.querySelectorAll("#results thead th:not(:empty)")].map(th => {
                    lines.selectNodeContents(th);
                    return [lines.getClientRects().length, th.scrollWidth - th.clientWidth];
                })};""", width=400)
    assert got["window"] == 400 and got["page"] <= 400 and got["body"] <= 400
    assert all(0 <= left < right <= 400 for left, right in got["tips"])
    assert max(got["bars"]) - min(got["bars"]) < 0.1 and min(got["bars"]) > 50
    assert got["filters"] <= 128  # what page.css keeps free for them
    assert got["table"][0] > got["table"][1]  # it scrolls inside its own box
    assert got["names"] == [[1, 0]] * 3


@needs_browser
def test_a_page_of_many_exits_fits_its_window(tmp_path):
    """If it fails, of an exit after each of 36 layers the last can't be read, or the page slides sideways."""
    record = make_record()
    record |= {"n_layers": 36, "exits": list(range(1, 36))}
    for metric in record["metrics"]:
        metric["exit_histogram"] = {str(depth): 1 / 36 for depth in range(1, 37)}
    for run in record["problems"][0]["runs"].values():
        run |= {"depths": [1, 12, 35, 36], "exit_probs": run["exit_probs"] and 4 * [35 * [0.5]],
                "top": 4 * [36 * [run["top"][0][0]]]}
    page, top, bottom, hidden, way, reached = browse(tmp_path, record, """
        const tip = d.getElementById("tip");
        d.querySelectorAll(".tokens")[1].children[2].focus();
        const box = tip.getBoundingClientRect(), hidden = tip.scrollHeight > tip.clientHeight;
        tip.scrollTop = 1e6;
        const last = [...tip.querySelectorAll("tr")].at(-1).getBoundingClientRect().bottom;
        return [d.documentElement.scrollWidth, box.top, box.bottom, hidden, w.getComputedStyle(tip).pointerEvents,
                last <= box.bottom];""", width=400)
    assert page <= 400 and 0 <= top < bottom <= 800
    assert hidden and way == "auto" and reached  # it scrolls, and can be reached by the mouse


@needs_browser
def test_empty_record_makes_a_page(tmp_path):
    """If it fails, a model that answers nothing, or an evaluation without transcripts, leaves the page blank."""
    record = make_record()
    empty = dict(tokens=[], depths=[], exit_probs=[], top=[], correct=False, finished=False, value=None)
    record["problems"][0]["runs"] = {"base": empty}
    costs = "return d.querySelector('.response small').textContent"
    assert browse(tmp_path, record, costs) == "average compute 0.0% · length 0 · total compute 0.0"
    bare = record | {"problems": [], "metrics": []}
    assert browse(tmp_path, bare, "return d.getElementById('count').textContent") == "0 of 0 responses"


def test_script_parses(tmp_path):
    """If it fails, the page opens without any token on it."""
    if not shutil.which("node"):
        pytest.skip("needs node")
    (tmp_path / "script.js").write_text(Walk(report.page(make_record())).text("script")[1], encoding="utf-8")
    subprocess.run(["node", "--check", tmp_path / "script.js"], check=True)
