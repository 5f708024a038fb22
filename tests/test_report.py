"""The HTML page: whatever a model writes stays text, every token survives the trip, and the file is whole or absent."""

import copy
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

import report

HOSTILE = [
    *("<script>alert(1)</script>", "</script>", "</SCRIPT >", "<!--", "-->", "]]>", "</style>", "</div></main>", "<p>"),
    *("&", "&lt;", '"', "'", '" onmouseover="alert(1)', "\\", "\\u003c", "${1}", "%s", "<img src=http://x.example>"),
    *("\x00", "\x07", "\x1b[31m", "\r", "\x7f", "\x85", "\t", "\n", "\n\n", " ", "", "\u2028", "\u2029"),
    *("\u202e", "\ufeff", "\ud83d", "\udc00 tail", "\ufffd\ufffd", "語", "مرحبا", " 👩‍👧", "\uffff"),
]
VOID = {"meta"}


def make_record(strings=("14", " +", " 5", "\n"), marker="plain") -> dict:
    """3 exits of 7 layers; one problem, two models; every string of the page that comes from outside is given here."""
    T, metric = len(strings), dict(accuracy=0.625, accuracy_low=0.5, accuracy_high=0.75, exit_rate=0.1234, n=211)
    metric |= dict(layer_savings=0.0456, average_compute=0.9544, total_compute=81.26, length=90.04, finished=0.987)
    lens = [[[strings[k], 0.5], [strings[-k], 0.25]] for k in range(4)]
    run = {
        "tokens": list(strings), "depths": [[2, 4, 6, 7][t % 4] for t in range(T)], "correct": True, "finished": True,
        "exit_probs": [[0.12345, 0.5, 1.0]] * T, "top": [lens] * T, "value": marker,
    }  # fmt: skip
    base = run | {"depths": [7] * T, "exit_probs": [], "correct": False, "value": None}
    base_metric = metric | {"name": "base", "exit_histogram": {"7": 1.0}}
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


def luminance(colour: str) -> float:
    """WCAG 2 relative luminance, from its definition."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("string", HOSTILE)
def test_no_string_becomes_markup(tmp_path, string):
    """If it fails, a question or a sampled token can break the page or run a script in the reader's browser."""
    report.write_page(tmp_path / "page.html", make_record([string, "a", "b", string], string))
    text = (tmp_path / "page.html").read_bytes().decode("utf-8")
    walk, plain = Walk(text), Walk(report.page(make_record()))
    assert walk.tags == plain.tags  # attributes included: the hostile page has the elements of a harmless one
    assert [attrs for tag, attrs in walk.tags if tag == "script"] == [{"type": "application/json", "id": "data"}, {}]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)


def test_questions_answers_and_names_are_shown_as_written():
    """If it fails, escaping eats text instead of quoting it: '<b>' in a question must be readable as '<b>'."""
    string = "a < b & \"c\" 'd' <b>语</b>"
    text = Walk(report.page(make_record(marker=string)))
    for tag in ("title", "h1", "code", "small", "p", "b", "h3"):
        assert string in text.text(tag), tag
    assert f"✓ correct · {string}" in text.text("span")


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
    for got, run in zip(data["problems"][0], record["problems"][0]["runs"].values(), strict=True):
        assert [data["strings"][i] for i in got["tokens"]] == run["tokens"] and got["depths"] == run["depths"]
        assert len(got["top"]) == len(HOSTILE) and len(got["exit_probs"]) == len(run["exit_probs"])
        for t, depth in enumerate(run["depths"]):
            reached = sum(d <= depth for d in (2, 4, 6, 7))
            for flat, lens in zip(got["top"][t], run["top"][t][:reached], strict=True):
                assert [data["strings"][i] for i in flat[::2]] == [token for token, _ in lens]
                assert [m / 1000 for m in flat[1::2]] == [p for _, p in lens]
            if run["exit_probs"]:
                assert got["exit_probs"][t] == [123, 500, 1000][:reached]


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
    assert embedded(text)["problems"][0][1]["exit_probs"][2] == [None, None, 500]


@pytest.mark.parametrize("n", range(1, 13))
def test_each_depth_has_its_own_legible_colour(n):
    """If it fails, two depths look alike (to a colour-blind reader: lightness must fall), or text can't be read."""
    record = make_record()
    record["exits"], record["n_layers"], record["problems"] = list(range(1, n)), n, []
    text = report.page(record)
    rules = re.findall(r"\.d(\d+) \{ background: (#\w{6}); color: (#\w{3}); \}", text)
    assert [int(k) for k, _, _ in rules] == list(range(n))
    light = [luminance(ground) for _, ground, _ in rules]
    assert all(a > b + 0.01 for a, b in zip(light, light[1:], strict=False))
    for _, ground, ink in rules:
        high, low = sorted((luminance(ground), luminance(ink)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5
    legend = re.search(r'<div class="legend">(.*?)</div>', text)[1]
    assert [f'class="d{k}">{k + 1} of {n}<em> layers' in legend for k in range(n)] == [True] * n


def test_table_and_bars_carry_the_numbers():
    """If it fails, the page's numbers aren't those of the evaluation."""
    text = report.page(make_record())
    numbers, bars = (re.search(rf'class="{name}">.*?<tbody>(.*?)</tbody>', text)[1] for name in ("numbers", "hist"))
    rows = re.findall(r"<tr><th>(.*?)<small>.*?<td>(.*?)</td><td>(.*?)</td></tr>", numbers)
    assert {name: value for name, _, value in rows} == {
        "Accuracy": "62.5%<small>50.0% – 75.0%</small>", "Early exit rate": "12.3%", "Layer savings": "4.6%",
        "Average compute": "95.4%", "Total compute": "81.3", "Length": "90.0", "Finished": "98.7%", "Responses": "211",
    }  # fmt: skip
    assert re.findall(r'class="d(\d)" style="width:([\d.]+%)"></u></i><b>([\d.]+%)', bars) == [
        ("0", "0.00%", "0.0%"), ("0", "12.50%", "12.5%"), ("1", "0.00%", "0.0%"), ("1", "25.00%", "25.0%"),
        ("2", "0.00%", "0.0%"), ("2", "0.00%", "0.0%"), ("3", "100.00%", "100.0%"), ("3", "62.50%", "62.5%"),
    ]  # fmt: skip


def test_each_response_says_how_it_ended_and_what_it_cost():
    """If it fails, an unfinished response is taken for a wrong one, or a cost is off."""
    record = make_record()
    runs = record["problems"][0]["runs"]
    runs["cut"] = copy.deepcopy(runs["plain"]) | {"finished": False}
    walk = Walk(report.page(record))
    assert [t for t in walk.text("span") if t[0] in "✓✗…"] == ["✗ wrong", "✓ correct · plain", "… unfinished · plain"]
    costs = [text for text in walk.text("small") if text.startswith("average compute")]
    assert costs[:2] == [  # depths 2 + 4 + 6 + 7 of 4 x 7
        "average compute 100.0% · length 4 · total compute 4.0", "average compute 67.9% · length 4 · total compute 2.7"
    ]  # fmt: skip


def test_empty_record_makes_a_page():
    """If it fails, a model that answers nothing, or an evaluation without transcripts, ends in a traceback."""
    record = make_record()
    empty = dict(tokens=[], depths=[], exit_probs=[], top=[], correct=False, finished=False, value=None)
    record["problems"][0]["runs"] = {"base": empty}
    assert "average compute 0.0% · length 0" in report.page(record)
    assert Walk(report.page(record | {"problems": [], "metrics": []})).tags


@pytest.mark.parametrize("key, value", [("depths", [2]), ("exit_probs", [[0.5]]), ("top", [[]]), ("depths", [3] * 4)])
def test_mismatched_lists_are_refused_by_name(key, value):
    """If it fails, tokens silently get the depth or the probabilities of their neighbours."""
    record = make_record()
    record["problems"][0]["runs"]["plain"][key] = value
    with pytest.raises(ValueError, match="problem plain, plain: depths"):
        report.page(record)


def test_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """If it fails, an interrupted evaluation leaves half a page, litter, or no trace of the page before it."""
    path = tmp_path / "page.html"
    report.write_page(path, make_record(marker="first"))
    first = path.read_bytes()
    with pytest.raises(KeyError):
        report.write_page(path, {"title": "no more"})

    def fail(source, target):
        assert os.path.dirname(source) == str(tmp_path) and os.path.getsize(source) > 1000  # same disk, all written
        assert path.read_bytes() == first
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_page(path, make_record(marker="second"))
    assert path.read_bytes() == first and os.listdir(tmp_path) == ["page.html"]
    monkeypatch.undo()
    report.write_page(str(path), make_record(marker="second"))
    assert b"second" in path.read_bytes() and os.listdir(tmp_path) == ["page.html"]


def test_script_parses(tmp_path):
    """If it fails, the page opens without any token on it."""
    if not shutil.which("node"):
        pytest.skip("needs node")
    (tmp_path / "script.js").write_text(Walk(report.page(make_record())).text("script")[1], encoding="utf-8")
    subprocess.run(["node", "--check", tmp_path / "script.js"], check=True)
