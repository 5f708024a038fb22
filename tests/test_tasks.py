"""Loading the tasks: what is read, how it is split, and what is said about a file that can't be used."""

import csv
import json
from argparse import Namespace
from fnmatch import fnmatch

import pyarrow.parquet
import pytest

import flags
from data import hub, tasks
from data.hub import UserError
from data.tasks import load, own_problem
from data.text import Tokenizer
from tests.commands import RL, ROOT, lines, run

ROW = {"question": "Natalia sold 48 clips, then half as many. How many?",
       "answer": "Then 48/2 = <<48/2=24>>24.\nIn all 48+24 = <<48+24=72>>1,072.\n#### 1,072"}
STORY = ("story_structure", "infilled_story", "question", "expected_answer")


def rows(n):
    return [{"question": f"What is {i} + 1?", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"}
            for i in range(n)]


def jsonl(path, items, end="\n"):
    path.write_bytes("".join(json.dumps(item, ensure_ascii=False) + end for item in items).encode())
    return str(path)


def parquet(path, items):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), path)
    return str(path)


def tom_csv(path, items, columns=STORY):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *items])
    return str(path)


def stories(n, questions=3):
    return [(f"Anne moved apple {i}.", f"Once upon a time,\nAnne moved apple {i}.",
             f"Does Anne think that Ben believes {q}? Answer yes or no.", "yes") for i in range(n)
            for q in range(questions)]


def asked(problem, taught: bool = False) -> str:
    tokenizer = Namespace(taught=taught, can_think=True, prompts=lambda conversations, thinking: conversations)
    ((message,),) = tasks.prompts([problem], tokenizer, True)
    assert message["role"] == "user"
    return message["content"]


def test_a_problem_can_be_asked_without_thinking(tmp_path):
    """Else a form that training leaves out is forgotten; and prompts of two forms must stay in order."""
    path = jsonl(tmp_path / "sums.jsonl", [{"question": f"What is {i} + 4?", "answer": i + 4, "thinking": i % 3 > 0}
                                           for i in range(40)])
    problems, tokenizer = load(path, "train"), Tokenizer.from_pretrained(ROOT / "data/tiny")

    def alone(p, on):
        return tokenizer.prompt_ids([{"role": "user", "content": asked(p)}], on)

    assert {p.thinking for p in problems} == {True, False} and alone(problems[0], True) != alone(problems[0], False)
    assert tasks.prompts(problems, tokenizer, True) == [alone(p, p.thinking) for p in problems]
    assert tasks.prompts(problems, tokenizer, False) == [alone(p, False) for p in problems]
    with pytest.raises(UserError, match="has no thinking mode: leave its 'thinking' out"):
        tasks.prompts(problems, Namespace(can_think=False), True)


# gsm8k

def test_gsm8k_row_becomes_a_problem(tmp_path):
    """Else a gold with a comma is never matched."""
    jsonl(tmp_path / "train.jsonl", [ROW])
    problem, = load("gsm8k", "train", str(tmp_path))
    assert problem.gold == "1072" and problem.kind == "number"
    assert asked(problem) == ("Natalia sold 48 clips, then half as many. How many?\n"
                              "Please reason step by step, and put your final answer within \\boxed{}.")
    assert problem.grade(r"\boxed{1072.0}", True).strict
    assert not problem.grade(r"\boxed{1072}", False).flexible
    assert not problem.grade(r"\boxed{1072}", True, think_open=True).flexible


@pytest.mark.parametrize("write, name", [(jsonl, "{}.jsonl"), (parquet, "main/{}-00000-of-00001.parquet")])
def test_a_folders_files_are_the_splits(tmp_path, write, name):
    """Else problems held out by the authors are trained on."""
    write(tmp_path / name.format("train"), rows(9))
    write(tmp_path / name.format("test"), rows(12)[9:])
    assert {p.gold for p in load("gsm8k", "train", str(tmp_path))} == {str(i) for i in range(1, 10)}
    assert {p.gold for p in load("gsm8k", "test", str(tmp_path))} == {"10", "11", "12"}


@pytest.mark.parametrize("write, name", [(jsonl, "all.jsonl"), (parquet, "all.parquet")])
def test_a_single_file_is_divided_without_overlap(tmp_path, write, name):
    """Else the same file given for training and testing measures memory. Repeated questions stay together."""
    again = [{**row, "question": f" {row['question']}\n"} for row in rows(300)]
    path = write(tmp_path / name, rows(300) + again)
    train, test = ({p.question for p in load("gsm8k", split, path)} for split in ("train", "test"))
    assert not train & test and len(train | test) == 300
    assert 30 <= len(test) <= 90  # 60 expected; 4.3 standard deviations either way


@pytest.mark.parametrize("task, repo, file", [
    ("gsm8k", "openai/gsm8k", "main/train-00000-of-00001.parquet"),
    ("tom", "facebook/ExploreToM", "ExploreToM-data-sample.csv")])
def test_only_the_tasks_files_are_asked_of_the_hub(monkeypatch, task, repo, file):
    """Else nothing is downloaded, or all there is."""
    asked = {}

    def snapshot_download(repo_id, repo_type, revision, allow_patterns):
        asked.update(repo=repo_id, type=repo_type, patterns=allow_patterns)
        raise ConnectionError("cut off")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=f"{repo}.*cut off"):
        load(task, "train")
    assert (asked["repo"], asked["type"]) == (repo, "dataset")
    assert all(fnmatch(file, pattern) for pattern in asked["patterns"])
    assert not any(fnmatch("README.md", pattern) for pattern in asked["patterns"])


def test_splits_are_drawn_by_a_fixed_hash():
    """Else the next run, with Python's own hash, trains on what this one held out. SHA-256 of nothing."""
    assert tasks._hash("") == 0xe3b0c44298fc1c14


def test_a_seed_draws_the_order_and_n_cuts_it(tmp_path):
    """Else runs with the same seed differ, or more problems means other problems."""
    jsonl(tmp_path / "test.jsonl", rows(40))

    def ids(n=None, seed=0):
        return [p.id for p in load("gsm8k", "test", str(tmp_path), n, seed)]

    assert ids() == ids() and ids(7) == ids()[:7] and len(ids(100)) == len(set(ids())) == 40
    assert ids(seed=1) != ids() and sorted(ids(seed=1)) == sorted(ids())


@pytest.mark.parametrize("prefix, end", [(b"", "\n"), (b"\xef\xbb\xbf", "\r\n"), (b"\n\n", "\n\n"),
                                         (b"", "\r")])
def test_byte_order_marks_line_ends_and_blank_lines_do_not_matter(tmp_path, prefix, end):
    """Else a file that went through Windows is called malformed."""
    jsonl(tmp_path / "train.jsonl", [{**row, "note": "a\u2028b"} for row in rows(4)], end)
    path = tmp_path / "train.jsonl"
    path.write_bytes(prefix + path.read_bytes())
    assert len(load("gsm8k", "train", str(tmp_path))) == 4


GOOD = json.dumps(ROW).encode() + b"\n"


@pytest.mark.parametrize("content, named", [
    (b"", r"train\.jsonl is empty"),
    (b" \n\n", r"train\.jsonl is empty"),
    (GOOD + b'{"question": ', r"train\.jsonl:2 can.t be read as JSON"),
    (GOOD + b"\n" + b"[" * 100_000, r"train\.jsonl:3 can.t be read as JSON"),
    (GOOD + b'["a"]\n', r"train\.jsonl:2 does not hold a JSON object"),
    (GOOD + b'{"question": "a", "solution": "b"}',
     r"train\.jsonl:2: column 'answer' is missing \(found: question, solution\)"),
    (GOOD + b"{}", r"train\.jsonl:2: column 'question' is missing \(found: none\)"),
    (GOOD + b'{"question": "a", "answer": 5}', r"train\.jsonl:2: column 'answer' must be text, not 5"),
    (GOOD + b'{"question": " ", "answer": "#### 5"}', r":2: column 'question' must be text"),
    (GOOD + b'{"question": "\\ud800", "answer": "#### 5"}', r":2: column 'question' must be text"),
    (GOOD + b'{"question": "a\\u0000", "answer": "#### 5"}', r":2: column 'question' must be text"),
    (GOOD + b'{"question": "a", "answer": "5"}', r":2: 'answer' must end in '#### ' and a number"),
    (GOOD + b'{"question": "a", "answer": "#### five"}', r"train\.jsonl:2: 'answer' must end in '#### '"),
    (GOOD + GOOD + b"a\0b", r"train\.jsonl:3: a NUL byte"),
    (GOOD + b"\xff\xfe", r"train\.jsonl:2: not UTF-8"),
])
def test_a_faulty_file_is_named_with_its_line(tmp_path, content, named):
    """Else one bad row among thousands ends in a traceback, or is dropped without a word."""
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=named) as error:
        load("gsm8k", "train", str(tmp_path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_other_faults_name_the_file_and_the_remedy(tmp_path):
    """Else a wrong flag is found out by reading our source."""
    with pytest.raises(UserError, match="missing doesn't exist: check"):
        load("gsm8k", "train", str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"holds neither train\.jsonl nor main/train-\*\.parquet: name"):
        load("gsm8k", "train", str(tmp_path))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(UserError, match=r"x\.parquet can't be read as parquet"):
        load("gsm8k", "train", str(tmp_path / "x.parquet"))
    with pytest.raises(UserError, match=r"x2\.parquet, row 0: column 'answer' is missing"):
        load("gsm8k", "train", parquet(tmp_path / "x2.parquet", [{"question": "a"}]))
    with pytest.raises(UserError, match="no problem falls into the (train|test) split"):
        for split in ("train", "test"):
            load("gsm8k", split, jsonl(tmp_path / "one.jsonl", [ROW]))
    with pytest.raises(UserError, match="task gsm: choose one of gsm8k, tom, arithmetic, stories"):
        load("gsm", "train")
    with pytest.raises(UserError, match="'dev' is unknown: choose train or test"):
        load("gsm8k", "dev")
    with pytest.raises(UserError, match="0 problems asked for"):
        load("arithmetic", "train", n=0)
    with pytest.raises(UserError, match="reads no data"):
        load("arithmetic", "train", "x.jsonl")


# theory of mind

def test_tom_row_becomes_a_problem(tmp_path):
    """Else the story, the question or the candidate answers don't reach the model."""
    path = tom_csv(tmp_path / "t.csv", stories(20))
    problem = load("tom", "train", path, n=1)[0]
    story, question, instruction = asked(problem).rsplit("\n", 2)
    assert story.startswith("Once upon a time,\nAnne moved apple ") and question.endswith("Answer yes or no.")
    assert instruction == 'Think step by step, then end with a line "ANSWER: " followed by yes or no.'
    assert problem.choices == ("yes", "no") and problem.kind == "choice"
    assert problem.grade("She does.\nANSWER: Yes.", True).strict
    assert problem.grade("ANSWER: yes, she does", True).flexible
    assert not problem.grade("ANSWER: yes or no", True).flexible


@pytest.mark.parametrize("question, choices", [
    ("Does Ann know about the party? Answer yes or no.", ("yes", "no")),
    ("What does Ann think about Bob's belief on it? (knows about it / does not know about it)",
     ("knows about it", "does not know about it")),
    ("In which room was the ball at the beginning?", None),
])
def test_tom_choices_come_from_the_question(question, choices):
    """Else an answer that names both candidates can't be told from a right one."""
    assert tasks._choices(question) == choices


def test_a_storys_questions_share_a_split(tmp_path):
    """Else the test asks about stories that were trained on."""
    path = tom_csv(tmp_path / "t.csv", stories(100))
    train, test = ({p.question.partition("Does")[0] for p in load("tom", split, path)}
                   for split in ("train", "test"))
    assert not train & test and len(train | test) == 100 and 5 <= len(test) <= 40
    assert len(load("tom", "train", path)) == 3 * len(train)


def test_tom_falls_back_on_the_plain_story_and_finds_the_file_in_a_folder(tmp_path):
    """Else rows that nobody rewrote as prose have an empty story."""
    tom_csv(tmp_path / "ExploreToM-data-sample.csv",
            [(f"Anne moved apple {i}.", "", "Where is it?", "the box") for i in range(20)])
    problem = load("tom", "train", str(tmp_path))[0]
    assert problem.question.startswith("Anne moved apple") and problem.choices is None
    assert "the place alone" in asked(problem)
    assert problem.grade("ANSWER: Box", True).strict


@pytest.mark.parametrize("content, named", [
    ("", "is empty"),
    ("story_structure,question,expected_answer\na,b\n", r"csv:2: column 'expected_answer' must be text"),
    ("story_structure,question\na,b\n",
     r"csv:2: column 'expected_answer' is missing \(found: story_structure, question\)"),
    ("question,expected_answer\na,b\n", r"csv:2: column 'story_structure' is missing"),
    ('story_structure,question,expected_answer\na,b,c\nd,"cut off', r"csv:3: malformed CSV"),
    ("story_structure,question,expected_answer\na,b,c\n\0", r"csv:3: a NUL byte"),
])
def test_a_faulty_csv_is_named_with_its_line(tmp_path, content, named):
    """Else a file cut off by a bad connection is read as a smaller data set."""
    path = tmp_path / "t.csv"
    path.write_text(content, encoding="utf-8", newline="")
    with pytest.raises(UserError, match=named):
        load("tom", "train", str(path))


def test_windows_line_ends_do_not_reach_the_story(tmp_path):
    """Else the model reads carriage returns."""
    path = tmp_path / "t.csv"
    tom_csv(path, stories(9))
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert load("tom", "train", str(path))[0].question.startswith("Once upon a time,\nAnne")


def test_long_stories_are_read(tmp_path):
    """Else the csv module stops at 128 KB a field."""
    path = tom_csv(tmp_path / "t.csv", [("x" * 200_000 + str(i), "", "Where?", "box") for i in range(9)])
    assert len(load("tom", "train", path)[0].question) > 200_000


# our own generators

@pytest.mark.parametrize("task, kind", [("arithmetic", "number"), ("stories", "choice")])
def test_generated_problems_carry_gold_thoughts_and_program(task, kind):
    """Else the embedded model is prompted with more than the bare question it was trained on, or another is not told
    what form of answer counts."""
    problems = load(task, "test", n=20)
    assert len(problems) == 20 == len({p.id for p in problems})
    for p in problems:
        told = asked(p).removeprefix(f"{p.question}\n")
        assert asked(p, taught=True) == p.question and (told == tasks.BOXED if kind == "number" else all(
            choice in told for choice in ("ANSWER:", *p.choices)))
        assert p.kind == kind and p.cot and p.program
        form = "\\boxed{%s}" if kind == "number" else "ANSWER: %s"
        assert p.grade(form % p.gold, True).strict and not p.grade(form % (p.gold + "0"), True).flexible
        assert p.choices is None or p.gold in p.choices and len(p.choices) == 3


@pytest.mark.parametrize("task", ["arithmetic", "stories"])
def test_generated_problems_are_a_prefix_of_more_and_splits_are_disjoint(task):
    """Else changing n changes the problems, or test questions are trained on."""
    train, test = (load(task, split, n=30, seed=3) for split in ("train", "test"))
    assert [p.question for p in load(task, "train", n=5, seed=3)] == [p.question for p in train[:5]]
    assert not {p.question for p in train} & {p.question for p in test}
    assert [p.question for p in load(task, "train", n=5, seed=4)] != [p.question for p in train[:5]]


# a task of one's own

def readme_blocks() -> list[str]:
    section = (ROOT / "README.md").read_text("utf-8").partition("## Your own task")[2].partition("\n## ")[0]
    return [block.partition("\n")[2] for block in section.split("```")[1::2]]


@pytest.mark.parametrize("name", ["pens.jsonl", "sums.py"])
def test_the_readmes_own_tasks_run(home, name):
    """Else the README shows what no longer works: its blocks are run as they stand, through all three commands."""
    blocks = dict(zip(("pens.jsonl", "sums.py"), readme_blocks(), strict=True))
    (home / name).write_text(blocks[name])
    few = ("--responses", 1, "--held-out", 1, "--max-new-tokens", 8, "--steps", 1, "--out", "a")
    run("distill.py", "--model", "toy", "--task", name, *few, cwd=home)
    run("rloo.py", "--init", "a", *RL[:-1], 1, "--save-every", 1, "--out", "b", cwd=home)
    done = run("evaluate.py", "a", "b", "--n", 1, "--out", "eval", cwd=home)
    assert name in done.stdout
    rows, (metrics,) = lines(home / "b" / "completions.jsonl"), lines(home / "b" / "metrics.jsonl")
    if name == "sums.py":
        assert not any(row["reward_task"] for row in rows)  # the toy answers nothing
        problem = load(str(home / name), "train", n=1)[0]
        best, wrong = (f"<think>7</think> \\boxed{{{gold}}}" for gold in (problem.gold, f"1{problem.gold}"))
        for said, right in ((best, True), (wrong, False), (f"{best}</think> It's 7.", False)):
            assert problem.grade(said, True).strict == right
            assert problem.reward(said, True, right) == right * (1 - len(said) / 20_000)
    assert metrics["reward_task"] == pytest.approx(sum(row["reward_task"] for row in rows) / len(rows))
    assert metrics["reward"] == pytest.approx(sum(metrics[f"reward_{part}"] for part in ("task", "depth", "kl")))


def test_a_line_of_ones_own_becomes_a_problem(tmp_path):
    """Else numbers, choices or an instruction of one's own are lost on the way."""
    given = [{"question": f"{i}?", "answer": 7, "note": "x"} for i in range(20)]
    given += [{"question": f"Where is {i}?", "answer": "box", "choices": ["bag", "box"]} for i in range(20)]
    given += [{"question": f"Say {i}", "answer": "hi", "instruction": "" if i == 4 else "Whisper."} for i in range(20)]
    path = jsonl(tmp_path / "mine.jsonl", given)
    train, test = (load(path, split) for split in ("train", "test"))
    assert len(train) + len(test) == 60 and not {p.question for p in train} & {p.question for p in test} and test
    shown = {p.question: p for p in (*train, *test)}
    number, choice, free = shown["3?"], shown["Where is 3?"], shown["Say 3"]
    assert (number.gold, number.kind) == ("7", "number") and "\\boxed" in asked(number)
    assert (choice.kind, choice.choices) == ("choice", ("bag", "box")) and "bag or box" in asked(choice)
    assert asked(free) == "Say 3\nWhisper." and free.kind == "choice" and asked(shown["Say 4"]) == "Say 4"
    assert number.grade("\\boxed{7.0}", True).strict and not choice.grade("ANSWER: bag", True).flexible
    assert load(path, "train", n=3, seed=1) != load(path, "train", n=3, seed=2)


@pytest.mark.parametrize("answer, kind, right, wrong", [
    ("5 May", "choice", "ANSWER: 5 May", "\\boxed{5 June}"),
    ("3 Idiots", "choice", "ANSWER: 3 idiots.", "\\boxed{3 Men}"),
    ("1,000.50", "number", "\\boxed{1000.5}", "\\boxed{1000}"), ("$5", "number", "\\boxed{5}", "\\boxed{6}"),
    ("1e3", "number", "\\boxed{1000}", "\\boxed{1}"), ("20%", "number", "\\boxed{20\\%}", "\\boxed{2}"),
    (1.1 * 3, "number", "\\boxed{3.3}", "\\boxed{3}"), (0.1 + 0.2, "number", "\\boxed{0.3}", "\\boxed{0}"),
    ("\\frac{51}{16}", "number", "\\boxed{3.1875}", "\\boxed{51}"),
])
def test_an_answer_with_words_is_more_than_its_number(tmp_path, answer, kind, right, wrong):
    """Else 5 June is right where the answer is 5 May."""
    path = jsonl(tmp_path / "mine.jsonl", [{"question": f"{i}?", "answer": answer} for i in range(20)])
    problem = load(path, "train", n=1)[0]
    assert problem.kind == kind
    assert problem.grade(right, True).strict and not problem.grade(wrong, True).strict


def test_numbers_among_choices_are_spelt_as_the_answer_is(tmp_path):
    """Else '1' is not one of 1.0 and 2.5."""
    (tmp_path / "mine.py").write_text("def problems(split, n, seed):\n    return [{'question': 'q', 'answer': 1.0, "
                                      "'choices': [1.0, 2.5, 3]}]\n")
    problem, = load(str(tmp_path / "mine.py"), "train", n=1)
    assert (problem.gold, problem.choices) == ("1", ("1", "2.5", "3")) and problem.grade("ANSWER: 1", True).strict
    assert own_problem({"question": "q", "answer": "1.0", "choices": [1.0, 2.0]}, "here", "mine").gold == "1.0"


def test_a_task_that_repeats_itself_gives_each_problem_once(tmp_path, capsys):
    """Else a repeated one counts as evidence of its own; and one dict that is filled anew for each problem becomes as
    many copies of the last."""
    (tmp_path / "mine.py").write_text("def problems(split, n, seed):\n    p = {}\n    for i in range(n):\n"
                                      "        p.update(question=f'{i % 4} + 1?', answer=i % 4 + 1)\n        yield p\n")
    problems = load(str(tmp_path / "mine.py"), "test", n=6)
    assert [(p.id[-1], p.question, p.gold) for p in problems] == [(str(i), f"{i} + 1?", str(i + 1)) for i in range(4)]
    assert "2 of 6 problems ask what one before them asks" in capsys.readouterr().err


def test_a_link_keeps_its_name(tmp_path):
    """Else a file of the hub's cache, a link to one without a suffix, is refused by a name that nobody gave."""
    jsonl(tmp_path / "3fa9c0", [{"question": f"{i}?", "answer": i} for i in range(20)])
    (tmp_path / "pens.jsonl").symlink_to("3fa9c0")
    assert tasks.name_of(str(tmp_path / "pens.jsonl")) == str(tmp_path / "pens.jsonl")
    assert len(load(str(tmp_path / "pens.jsonl"), "train")) > 10
    args = Namespace(model=None, task="gsm8k", data=str(tmp_path / "pens.jsonl"), device="cpu", dtype="float32",
                     cuda_graphs=False, shard=False)
    assert flags.settle(flags.Parser(), args).data == str(tmp_path / "pens.jsonl")


def test_a_problem_of_ones_own_keeps_its_own_grader(tmp_path):
    """Else the built-in one judges it, without a word."""
    (tmp_path / "mine.py").write_text("from data.tasks import Problem\n"
                                      "def problems(split, n, seed):\n    yield Problem('a', 'q', 'x', 'choice', "
                                      "own_grade=lambda p, text: text == 'y', own_reward=lambda p, text: 0.5)")
    problem, = load(str(tmp_path / "mine.py"), "train", n=1)
    grade = problem.grade("y", True)
    assert grade.strict and not problem.grade("ANSWER: x", True).strict and problem.reward("y", True, True) == 0.5


@pytest.mark.parametrize("made, told", [
    ("Problem(7, 'q', 'x', 'choice')", "id, question and gold must be texts, not 7"),
    ("Problem('a', 'q', 7, 'number')", "id, question and gold must be texts, not 'a', 'q', 7"),
    ("Problem('a', 'q', 'x', 'choice', ('x', None))", "'choices' must be a list of texts"),
    ("Problem('a', 'q', 'x', 'choice', ['y', 'z'])", "the answer 'x' must be one of 'choices'"),
    ("Problem('a', 'q', 'a', 'choice', 'ab')", "'choices' must be a list of texts"),
    ("{'question': 'q', 'answer': 'x', 'choices': ['x', '\\ud800']}", "'choices' must be a list of texts"),
    ("Problem('a', 'q', 'x', 'word')", "its kind must be 'number' or 'choice', not 'word'"),
    ("Problem('a', 'q', 'seven', 'number')", "no response can match the answer 'seven'"),
    ("Problem('a', 'q', 'x', 'choice', instruction=5)", "'instruction' must be text"),
    ("{'question': 'q', 'answer': 'x', 'thinking': numpy.array([1, 0])}", "'thinking' must be true or false"),
    ("{'question': 'q', 'answer': 'x', 'instruction': numpy.array(['', ''])}", "'instruction' must be text"),
    ("{'question': 'q', 'answer': 1, 'choices': [1, 10**5000]}", "more than 50 digits"),
    ("{'question': 'q', 'answer': 10**5000}", "more than 50 digits"),
    ("{'question': 'q', 'answer': -10**60}", "more than 50 digits")])
def test_a_problem_of_ones_own_that_is_no_text_is_named(tmp_path, made, told):
    """Else it ends in a traceback, hours later or at once."""
    (tmp_path / "mine.py").write_text(f"import numpy\nfrom data.tasks import Problem\n"
                                      f"def problems(split, n, seed):\n    yield {made}\n")
    with pytest.raises(UserError, match=f"mine.py, problem 0: .*{told}"):
        load(str(tmp_path / "mine.py"), "train", n=1)


def test_a_judge_that_was_edited_is_noticed(tmp_path):
    """Else a run goes on with another reward, without a word. What only gives problems is known by these."""
    def mark(code):
        (tmp_path / "mine.py").write_text(
            f"def problems(split, n, seed):\n    return [{{'question': 'q', 'answer': 5}}]\n{code}\n")
        return load(str(tmp_path / "mine.py"), "train", n=1)[0].own_hash

    assert mark("") == mark("# a word more")
    marks = [mark(f"def {judge}(problem, response):\n    return {value}") for judge in ("grade", "reward")
             for value in (0, 1)]
    assert len({mark(""), *marks}) == 5


def test_a_line_that_is_repeated_counts_once(tmp_path, capsys):
    """Else answers to one question pass for evidence of several."""
    lines = [json.dumps({"question": f"What is {i} + 1?", "answer": i + 1}) for i in range(40)]
    lines += [json.dumps({"question": "What is 3 + 1?", "answer": 4, "thinking": False})]  # asks otherwise
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    once = [load(str(tmp_path / "own.jsonl"), split) for split in ("train", "test")]
    assert capsys.readouterr().err == ""
    (tmp_path / "own.jsonl").write_text("\n".join(lines * 3))
    assert [load(str(tmp_path / "own.jsonl"), split) for split in ("train", "test")] == once
    assert "82 lines ask what one before them asks" in capsys.readouterr().err and sum(map(len, once)) == 41


def test_a_task_of_ones_own_may_define_dataclasses(tmp_path):
    """They look their module up by its name."""
    (tmp_path / "mine.py").write_text("from __future__ import annotations\nfrom dataclasses import dataclass\n"
                                      "@dataclass\nclass Case:\n    answer: str\n"
                                      "def problems(split, n, seed):\n"
                                      "    return [{'question': 'q', **vars(Case('a'))}]")
    assert load(str(tmp_path / "mine.py"), "train", n=1)[0].gold == "a"


@pytest.mark.parametrize("row, named", [
    ({"question": "a"}, "column 'answer' is missing"), ({"question": 1, "answer": "b"}, "'question' must be text"),
    ({"question": "a", "answer": None}, "'answer' must be text"),
    ({"question": "a", "answer": float("nan")}, "'answer' must be text, not nan"),
    ({"question": "a", "answer": ["b"]}, "'answer' must"),
    ({"question": "a", "answer": "b", "choices": "bc"}, "'choices' must be a list"),
    ({"question": "a", "answer": "b", "choices": [["b"]]}, "'choices' must be a list"),
    ({"question": "a", "answer": "b", "choices": ["c"]}, "the answer 'b' must be one of 'choices'"),
    ({"question": "a", "answer": "b", "instruction": 3}, "'instruction' must be text"),
    ({"question": "a", "answer": "b", "thinking": "no"}, "'thinking' must be true or false"),
    ({"question": "a", "answer": 3.0, "choices": [1.0, 2.0]}, "the answer '3' must be one of 'choices'"),
    ({"question": "a", "answer": 1 / 3}, "has more digits than a response will"),
    ({"question": "a", "answer": ".", "choices": [".", ","]}, "the grader ignores case, articles"),
    ({"question": "a", "answer": "Polish", "choices": ["polish", "Polish"]}, "the grader ignores case, articles"),
    ({"question": "a", "answer": "?!"[1:]}, "the grader ignores case, articles"),
    ({"question": "q", "answer": "y"}, "asks what .*mine.jsonl:1 asks, but has the answer 'y' for 'x'"),
    ({"question": "a", "answer": "3 plus 3 is 6.\n#### 6"}, "no response can match the answer '3 plus 3"),
])
def test_a_line_that_makes_no_problem_is_named(tmp_path, row, named):
    """Else it ends in a traceback, or in answers that no grader finds right."""
    path = jsonl(tmp_path / "mine.jsonl", [{"question": "q", "answer": "x"}, row])
    with pytest.raises(UserError, match=f"mine.jsonl:2: .*{named}"):
        load(path, "train")


@pytest.mark.parametrize("code, named", [
    ("def problems(split, n, seed)\n    return []", r"SyntaxError: .*"), ("import nothing_of_that_name", "nothing_of"),
    ("x = 1", r"it defines no problems\(split, n, seed\)"),
    ("def problems(split):\n    return []", r"TypeError: problems\(\) .*given$"),
    ("def problems(split, n, seed):\n    return []", "gives none"),
    ("from data.tasks import Problem\ndef problems(split, n, seed):\n    return [Problem('a', str(i), 'x', 'choice') "
     "for i in range(3)]", "2 of its Problems have the id 'a'"),
    ("from data.tasks import Problem\ndef problems(split, n, seed):\n    return [Problem('a', 'q', 'x', 'choice', "
     "thinking=None)]", "'thinking' must be true or false, not None"),
    ("def problems(split, n, seed):\n    return [{'question': 'x', 'answer': i} for i in range(2)]",
     "problem 1: asks what .*, problem 0 asks, but has the answer '1' for '0'"),
    ("def problems(split, n, seed):\n    return [1 / 0]", r"ZeroDivisionError: .*mine\.py:2\)"),
    ("def problems(split, n, seed):\n    return ['x']", "must give dicts"),
    ("def problems(split, n, seed):\n    return [{'question': 'x'}]", "problem 0: column 'answer' is missing"),
    ("def problems(split, n, seed):\n    return [{'question': 'x', 'answer': 'a\\nb'}]", "problem 0: no response can"),
])
def test_a_module_that_gives_no_problems_is_told_in_one_line(tmp_path, code, named):
    """Else the user looks for the fault in our code."""
    (tmp_path / "mine.py").write_text(code + "\n")
    with pytest.raises(UserError, match=named) as error:
        load(str(tmp_path / "mine.py"), "train", n=2)
    assert "mine.py" in str(error.value)


@pytest.mark.parametrize("judge, named", [
    ("grade", r"problem mine/train/0/0, a response that ends in 'x': ZeroDivisionError: .*mine\.py:4"),
    ("reward", r"problem mine/train/0/0, a response that ends in 'x': ZeroDivisionError: .*mine\.py:4")])
def test_a_judge_of_ones_own_decides_and_its_error_is_told(tmp_path, judge, named):
    """Else a grader or a reward of one's own is not asked, or fails inside a training step with a traceback of ours."""
    path = tmp_path / "mine.py"
    answer = "'a'" if judge == "reward" else "'no grader of ours\\n can find this'"
    code = (f"def problems(split, n, seed):\n    return [{{'question': 'q', 'answer': {answer}}}]\n"
            "def %s(problem, response):\n    ")
    better = 2.5 if judge == "reward" else True
    path.write_text(code % judge + f"return {{'good': 1, 'better': {better}, 'inf': float('inf')}}.get(response, 0)\n")
    (problem,) = load(str(path), "train", n=2)
    graded, unfinished = problem.grade("good", True), problem.grade("good", False)
    assert graded.strict == (judge == "grade") and not unfinished.flexible
    assert not problem.grade("good", True, think_open=True).flexible  # a thought is no answer, whatever it says
    assert problem.reward("better", True, problem.grade("better", True).strict) == (1 if judge == "grade" else 2.5)
    assert problem.reward("better", False, False) == problem.reward("better", True, False, think_open=True) == 0
    if judge == "reward":
        with pytest.raises(UserError, match="the reward of problem mine/train/0/0 is inf"):
            problem.reward("inf", True, True)
    else:  # a text or nothing would count as right or wrong
        with pytest.raises(UserError, match=r"problem mine/train/0/0, .*: grade\(\) gave inf: it must be True"):
            problem.grade("inf", True)
    path.write_text(code % judge + "raise SystemExit\n")  # which would end the training as if it were done
    (problem,) = load(str(path), "train", n=2)
    with pytest.raises(UserError, match="SystemExit"):
        problem.reward("x", True, problem.grade("x", True).strict)
    path.write_text(code % judge + "return 1 / 0\n")
    (problem,) = load(str(path), "train", n=2)
    with pytest.raises(UserError, match=named):
        problem.reward("x", True, problem.grade("x", True).strict)


def test_a_task_whose_splits_share_a_problem_is_refused(home):
    """Else the test asks what was trained on."""
    (home / "shared").mkdir()
    jsonl(home / "shared" / "train.jsonl", rows(8))
    jsonl(home / "shared" / "test.jsonl", [*rows(40)[30:], rows(1)[0]])  # one of eleven
    (home / "same.py").write_text("def problems(split, n, seed):\n    return [{'question': 'q', 'answer': 1}]\n")
    distill, rloo = ("distill.py", "--model", "toy"), ("rloo.py", "--init", "one", *RL)
    for command, task, shared in ((distill, ("same.py",), "q"), (rloo, ("same.py",), "q"),
                                  (distill, ("gsm8k", "--data", "shared", "--held-out", 1), "What is 0 + 1?"),
                                  (rloo, ("gsm8k", "--data", "shared"), "What is 0 + 1?")):
        done = run(*command, "--task", *task, cwd=home, ok=False)
        assert done.returncode == 2 and f"train and test share a problem, '{shared}'" in done.stderr


def test_a_file_of_another_kind_is_not_a_task(tmp_path):
    """Else a data file given as --task is looked for among the built-in ones."""
    for name, named in (("x.csv", "choose one of gsm8k"), ("x.jsonl", "no such file"), ("sum", "choose one of")):
        with pytest.raises(UserError, match=named):
            load(str(tmp_path / name), "train")


def test_bad_utf8_in_parquet_is_told(tmp_path):
    """Else one broken cell ends in a UnicodeDecodeError."""
    broken = pyarrow.array([b"q\xff"]).cast(pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"question": broken, "answer": pyarrow.array(["#### 1"])})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="x.parquet can't be read as parquet"):
        load("gsm8k", "train", str(tmp_path / "x.parquet"))
