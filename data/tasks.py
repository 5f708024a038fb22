r"""The tasks: problems with a prompt, a gold answer and a grader, from files, the hub or our generators.

gsm8k       grade-school maths: {train,test}.jsonl, a parquet file, or openai/gsm8k from the hub
tom         theory of mind: ExploreToM's sample, a CSV file, or facebook/ExploreToM from the hub
arithmetic  generated word problems, answered with \boxed{19}
stories     generated Sally-Anne stories, answered with ANSWER: box
FILE.jsonl  your own: a line a problem, with question, answer and, for a choice, choices
FILE.py     your own: problems(split, n, seed), and grade or reward where the built-in ones won't do

Train and test are disjoint: generators and single files are divided by a hash of what a problem is about (stories: but
for the order in which a swap names its two).
"""

import csv
import hashlib
import importlib.util
import io
import math
import os
import re
import reprlib
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from data import arithmetic, stories
from data.grade import MAX_DIGITS, Grade, finished_answer, grade, normalise, number, plain
from data.hub import UserError, is_text, parse_object, resolve

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
ANSWER = 'Think step by step, then end with a line "ANSWER: " followed by {}.'
TOM_FILE = "ExploreToM-data-sample.csv"
GENERATED = 1000  # problems of a generator if no number is asked for


@dataclass(frozen=True)
class Problem:
    id: str  # task, split and the row of the source
    question: str
    gold: str
    kind: str  # "number" or "choice"
    choices: tuple[str, ...] | None = None
    cot: str | None = None  # a generator's chain of thought
    program: object = None  # what it computed the answer with
    instruction: str = ""  # says how to answer
    thinking: bool = True  # False: asked without the chat template's thinking mode, whatever --thinking says
    own_grade: Callable | None = None  # (problem, response) -> whether it is right, instead of data/grade.py
    own_reward: Callable | None = None  # (problem, response) -> r_task of eq. (1), instead of 1 for right
    own_hash: str = ""  # of the file that these two stand in

    def grade(self, text: str, finished: bool, think_open: bool = False) -> Grade:
        """Grade of a decoded response. One that has not finished, or not finished thinking, is never right."""
        if self.own_grade is None or finished_answer(text, finished, think_open) is None:
            return grade(text, self.gold, self.kind, self.choices, finished, think_open)
        right = own_verdict(self.own_grade, self, text, yes_or_no)
        return Grade(None, "own", right, right)

    def reward(self, text: str, finished: bool, right: bool, think_open: bool = False) -> float:
        """r_task of eq. (1): 1 if the response is right, else 0; or what the task's own reward says of it. 0 where it,
        or its thoughts, have not finished: an answer that is thought and never given would be paid for."""
        if self.own_reward is None or finished_answer(text, finished, think_open) is None:
            return float(right)
        value = own_verdict(self.own_reward, self, text, float)
        if not math.isfinite(value):
            raise UserError(f"the reward of problem {self.id} is {value}: it must be a finite number")
        return value


def prompts(problems: list[Problem], tokenizer, thinking: bool) -> list[list[int]]:
    """Ids of the problems' prompts. A model that was taught the generators' questions met them without an instruction;
    any other has to be told the form of the answer that the grader reads."""
    def conversation(p: Problem) -> list[dict[str, str]]:
        told = p.instruction and not (p.program and tokenizer.taught)
        return [{"role": "user", "content": f"{p.question}\n{p.instruction}" if told else p.question}]

    mode = [thinking and p.thinking for p in problems]
    if thinking and not all(mode) and not tokenizer.can_think:
        raise UserError(f"problem {problems[mode.index(False)].id} is to be asked without thinking, and the chat "
                        f"template of the model has no thinking mode: leave its 'thinking' out")
    ids = {on: iter(tokenizer.prompts([conversation(p) for p, m in zip(problems, mode, strict=True) if m == on], on))
           for on in (True, False)}
    return [next(ids[on]) for on in mode]


def name_of(task: str) -> str:
    """What a run records as its task: a built-in name as it is, a file by its absolute path."""
    if task in TASKS:
        return task
    path = Path(task).expanduser()
    if path.suffix not in (".py", ".jsonl"):
        raise UserError(f"--task {task}: choose one of {', '.join(TASKS)}, or a file of your own, .py or .jsonl")
    if not path.is_file():
        raise UserError(f"--task {task}: no such file (one that has moved since an earlier run: give its new place)")
    return os.path.abspath(path)  # not what a link leads to, which may have another name, as in the hub's cache


def load(task: str, split: str, data: str | None = None, n: int | None = None, seed: int = 0) -> list[Problem]:
    """The first n problems of a task's split (without n all, or 1000 of a generator) in an order that `seed` draws.

    data: gsm8k: a folder with {train,test}.jsonl or main/{train,test}-*.parquet, or one such file; tom: the CSV file
    or its folder. Of a single file one question in five (tom: story) is test. Raises UserError.
    """
    if split not in ("train", "test"):
        raise UserError(f"split {split!r} is unknown: choose train or test")
    if n is not None and n < 1:
        raise UserError(f"{n} problems asked for: ask for at least 1")
    task = name_of(task)
    if data is not None and task not in FILES:
        raise UserError(f"task {task} reads no data but its own: leave out --data {data}")
    if task in GENERATORS or task.endswith(".py"):
        return GENERATORS.get(task, own_module)(task, split, n or GENERATED, seed)
    problems = FILES[task](split, data) if task in FILES else own_file(task, split)
    if not problems:
        raise UserError(f"{data or task}: no problem falls into the {split} split, to which a hash of its text assigns "
                        f"it: give more problems, or " + ("a folder with a file per split" if task in FILES else
                                                          "a .py task, whose problems() makes the splits"))
    return sorted(problems, key=lambda p: _hash(f"{seed} {p.id}"))[:n]


def generated(task: str, split: str, n: int, seed: int) -> list[Problem]:
    source = arithmetic if task == "arithmetic" else stories
    problems = []
    for i, p in enumerate(arithmetic.distinct(source.make, split, n, seed)):
        choices = tuple(p["program"]["containers"]) if task == "stories" else None
        problems.append(Problem(f"{task}/{split}/{seed}/{i}", p["question"], p["answer"],
                                "choice" if choices else "number", choices, p["cot"], p["program"],
                                ANSWER.format(" or ".join(choices)) if choices else BOXED))
    return problems


def own_problem(row: dict, where: str, name: str) -> Problem:
    """A problem of the user's: question, answer and, for a choice, choices; instruction, if the usual one won't do;
    thinking, false if it is to be asked without."""
    written = is_text(row.get("answer"))
    if "answer" in row:
        row = row | {"answer": _spelt(row["answer"], "answer", where)}
    question, gold, choices = _field(row, "question", where), _field(row, "answer", where), row.get("choices")
    if choices is not None:
        # As the answer is: a number that was written as a text is one that Python spells so.
        said = [str(c) if written and type(c) in (int, float) else _spelt(c, "choices", where)
                for c in choices] if isinstance(choices, (list, tuple)) else [None]
        if not all(map(is_text, said)):
            raise UserError(f"{where}: 'choices' must be a list of texts, not {reprlib.repr(choices)}")
        choices = tuple(choice.strip() for choice in said)
    if type(thinking := row.get("thinking", True)) is not bool:
        raise UserError(f"{where}: 'thinking' must be true or false, not {thinking!r:.60}")
    # Of "5 May" or "5 pm" the number is only a part.
    kind = "number" if choices is None and number(gold) is not None and not re.search(
        r"[^\W\d_]{2}|\s[^\W\d_]", plain(gold)) else "choice"
    form = BOXED if kind == "number" else ANSWER.format(" or ".join(choices) if choices else "the answer alone")
    return Problem(name, question, gold, kind, choices, thinking=thinking,
                   instruction="" if is_text(row.get("instruction")) and not row["instruction"] else
                   _field(row, "instruction", where) if "instruction" in row else form)


def _spelt(value, name: str, where: str):
    """A number as a response would spell it; anything else as it is."""
    if type(value) is not int and (type(value) is not float or not math.isfinite(value)):  # Python's JSON knows NaN
        return value
    if abs(value) > 10**MAX_DIGITS:
        raise UserError(f"{where}: an {name!r} of more than {MAX_DIGITS} digits can't be graded")
    short = f"{value:.12g}" if type(value) is float else str(value)  # 1.1 * 3 is 3.3000000000000003
    if not math.isclose(value, float(short), rel_tol=1e-14):  # 1/3: a response would have to give all its digits
        raise UserError(f"{where}: the {name!r} {value!r} has more digits than a response will: round it, give a "
                        f"fraction as a text, '1/3', or write a grade() in a .py task")
    return short


def gradable(problem: Problem, where: str, met: dict) -> Problem:
    """Refuses a problem to which the built-in grader would call no response right: training would go on for nothing.
    So it would for half of one that was met with another answer."""
    forms = [normalise(choice, "choice") for choice in problem.choices or (problem.gold,)]
    if normalise(problem.gold, "choice") not in forms:
        raise UserError(f"{where}: the answer {problem.gold!r:.60} must be one of 'choices', "
                        f"{', '.join(problem.choices):.80}")
    if problem.own_grade:
        return problem
    best = f"\\boxed{{{problem.gold}}}" if problem.kind == "number" else f"ANSWER: {problem.gold}"
    if problem.kind == "number" and number(problem.gold) is None or not problem.grade(best, True).strict:
        raise UserError(f"{where}: no response can match the answer {problem.gold!r:.60}: give the final answer alone, "
                        f"in one line, or a .py task with a grade(); --task gsm8k --data FILE reads GSM8K's format")
    if problem.kind == "choice" and ("" in forms or len(set(forms)) < len(set(problem.choices or forms))):
        raise UserError(f"{where}: the grader ignores case, articles and punctuation, and so can't tell the answer "
                        f"{problem.gold!r:.60} from others: rename the choices, or give a .py task with a grade()")
    before, gold = met.setdefault((problem.question, problem.instruction), (where, problem.gold))
    if gold != problem.gold:
        raise UserError(f"{where}: asks what {before} asks, but has the answer {problem.gold!r:.40} for {gold!r:.40}: "
                        f"keep one of the two")
    return problem


def own_file(path: str, split: str) -> list[Problem]:
    """The problems of a .jsonl file of the user's that fall into a split."""
    problems, met, asked, repeated = [], {}, set(), 0
    for i, (where, row) in enumerate(_jsonl_rows(Path(path))):
        problem = gradable(own_problem(row, where, f"{Path(path).stem}/{split}/{i}"), where, met)
        asks = (problem.question, problem.instruction, problem.thinking, problem.choices)
        if asks in asked:
            repeated += 1  # which would count as evidence of its own
        elif _split(" ".join(problem.question.split())) == split:
            problems.append(problem)
        asked.add(asks)
    if repeated:
        print(f"{path}: {repeated} lines ask what one before them asks, and are left out", file=sys.stderr)
    return problems


def own_module(path: str, split: str, n: int, seed: int) -> list[Problem]:
    """The problems of a Python file of the user's: its problems(split, n, seed) gives dicts or Problems, and its
    grade(problem, response) and reward(problem, response), where there, judge the text of a response."""
    spec = importlib.util.spec_from_file_location(f"task_{Path(path).stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where a dataclass looks itself up
    with own_errors(f"--task {path}"):
        spec.loader.exec_module(module)
        if not callable(getattr(module, "problems", None)):
            raise UserError("it defines no problems(split, n, seed)")
        made = [dict(p) if isinstance(p, dict) else p  # one dict may be filled anew for each
                for p in islice(module.problems(split, n, seed), n)]
    problems, met, source = [], {}, hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    for i, p in enumerate(made):
        where = f"{path}, problem {i}"
        p = given_problem(p, where, f"{Path(path).stem}/{split}/{seed}/{i}")
        own = {f"own_{name}": getattr(module, name, getattr(p, f"own_{name}")) for name in ("grade", "reward")}
        problems.append(gradable(replace(p, **own, own_hash=source if any(own.values()) else ""), where, met))
    if not problems:
        raise UserError(f"{path}: problems({split!r}, {n}, {seed}) gives none")
    distinct = {}
    for p in problems:
        distinct.setdefault(repr(vars(p) | {"id": ""}), p)
    if repeated := len(problems) - len(distinct):
        print(f"{path}: {repeated} of {len(problems)} problems ask what one before them asks, and are left out",
              file=sys.stderr)
    problems = [*distinct.values()]
    (name, times), = Counter(p.id for p in problems).most_common(1)
    if times > 1:  # answers of several models are compared by it
        raise UserError(f"{path}: {times} of its Problems have the id {name!r}: name them apart")
    return problems


def given_problem(p, where: str, name: str) -> Problem:
    """What a problems() of the user's gave, a dict or a Problem, checked, as a Problem."""
    if isinstance(p, dict):
        return own_problem(p, where, name)
    if not isinstance(p, Problem):
        raise UserError(f"{where}: problems() must give dicts with 'question' and 'answer', not {p!r:.60}")
    if not all(is_text(text) for text in (p.id, p.question, p.gold)):
        raise UserError(f"{where}: its id, question and gold must be texts, not {p.id!r:.30}, {p.question!r:.30}, "
                        f"{p.gold!r:.30}")
    if not (is_text(p.kind) and p.kind in ("number", "choice")):
        raise UserError(f"{where}: its kind must be 'number' or 'choice', not {p.kind!r:.30}")
    return replace(p, choices=own_problem(vars(p) | {"answer": p.gold}, where, name).choices)


def yes_or_no(value) -> bool:
    if value != 0 and value != 1:  # a text, None or a share of the points would count as one of them
        raise UserError(f"grade() gave {value!r:.40}: it must be True or False")
    return bool(value)


def own_verdict(judge: Callable, problem: Problem, text: str, kind: Callable):
    with own_errors(f"problem {problem.id}, a response that ends in {text[-60:]!r}"):
        return kind(judge(problem, text))


@contextmanager
def own_errors(about: str):
    """Inside, the user's code runs: an error of its own becomes one line that says where."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{about}: {error}") from None
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]  # here, where a function of theirs takes other arguments
        where = f" ({frame.filename}:{frame.lineno})" if frame.filename != __file__ else ""
        raise UserError(f"{about}: {type(error).__name__}: {error}{where}") from error


def refuse_shared(train: list[Problem], args) -> None:
    """Raises UserError where the test split of a task or of data of the user's has a problem that is trained on, which
    proves nothing."""
    if not (args.task.endswith(".py") or args.data):
        return
    test = load(args.task, "test", data=args.data, n=None if args.data else 200, seed=args.seed)
    if shared := {p.question for p in train} & {p.question for p in test}:
        raise UserError(f"train and test share a problem, {min(shared)!r:.80}: let problems(), or the files of --data, "
                        f"tell them apart")


def gsm8k(split: str, data: str | None) -> list[Problem]:
    """GSM8K's problems of a split in the order of the file."""
    path = _existing(data) if data else resolve("openai/gsm8k", None, "dataset", ("main/*.parquet",))
    problems = []
    for i, (where, row) in enumerate(_gsm8k_rows(path, split)):
        question, answer = (_field(row, name, where) for name in ("question", "answer"))
        _, mark, gold = answer.rpartition("####")
        gold = gold.strip().replace(",", "")
        if not mark or number(gold) is None:
            raise UserError(f"{where}: 'answer' must end in '#### ' and a number: repair or remove the row")
        if path.is_file() and _split(" ".join(question.split())) != split:
            continue
        problems.append(Problem(f"gsm8k/{split}/{i}", question, gold, "number", instruction=BOXED))
    return problems


def _gsm8k_rows(path: Path, split: str) -> Iterator[tuple[str, dict]]:
    files = [path]
    if path.is_dir():
        jsonl = path / f"{split}.jsonl"
        files = [jsonl] if jsonl.exists() else sorted(path.glob(f"main/{split}-*.parquet"))
    if not files:
        raise UserError(f"{path} holds neither {split}.jsonl nor main/{split}-*.parquet: name the data set's "
                        "folder, or download it again")
    for file in files:
        yield from _parquet_rows(file) if file.suffix == ".parquet" else _jsonl_rows(file)


def tom(split: str, data: str | None) -> list[Problem]:
    """ExploreToM's problems of a split in the order of the file. A story's questions share their split."""
    path = _existing(data) if data else resolve("facebook/ExploreToM", None, "dataset", (TOM_FILE,))
    problems = []
    for i, (where, row) in enumerate(_csv_rows(path / TOM_FILE if path.is_dir() else path)):
        told = "infilled_story" if (row.get("infilled_story") or "").strip() else "story_structure"
        story, question, gold = (_field(row, name, where) for name in (told, "question", "expected_answer"))
        if _split(row.get("story_structure") or story) != split:
            continue
        choices = _choices(question)
        form = " or ".join(choices) if choices else "the place alone, in a few words"
        problems.append(Problem(f"tom/{split}/{i}", f"{story}\n\n{question}", gold, "choice", choices,
                                instruction=ANSWER.format(form)))
    return problems


def _choices(question: str) -> tuple[str, ...] | None:
    """The answers that a question of ExploreToM allows; None where it asks for a place."""
    if "yes or no" in question.lower():
        return "yes", "no"
    if "does not know about it" in question.lower():
        return "knows about it", "does not know about it"
    return None


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(file:line, row) of each line that isn't blank."""
    for i, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{i}", parse_object(line, f"{path}:{i}")


def _csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(file:line, row) of each row; the line is where the row ends, for a story may hold line breaks."""
    csv.field_size_limit(2**24)  # the default, 128 KB, is tight for a story
    reader = csv.DictReader(io.StringIO(_read(path)), strict=True)  # strict: no cut-off file
    try:
        for row in reader:
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        line = reader.reader.line_num  # the outer count leaves out the row that failed
        raise UserError(f"{path}:{line}: malformed CSV ({error}): download it again") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow.parquet  # slow to import, and needed for no other format
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: bad UTF-8
        raise UserError(f"{path} can't be read as parquet ({error}): download it again") from None
    for i, row in enumerate(rows):
        yield f"{path}, row {i}", row


def _read(path: Path) -> str:
    """Text of a UTF-8 file with any line ends, with or without byte order mark; not empty, no NUL."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): check the path") from None
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8: convert the file, or download it again") from None
    if "\0" in text:
        line = text[:text.index("\0")].count("\n") + 1
        raise UserError(f"{path}:{line}: a NUL byte: the file is damaged; download it again")
    if not text.strip():
        raise UserError(f"{path} is empty: write a problem a line, or download it again")
    return text


def _field(row: dict, name: str, where: str) -> str:
    """A column's text, which has to be there and to say something."""
    if name not in row:
        found = ", ".join(map(str, row)) or "none"
        raise UserError(f"{where}: column {name!r} is missing (found: {found}): rename or add it")
    text = row[name]
    if not is_text(text) or not text.strip():
        raise UserError(f"{where}: column {name!r} must be text, not {text!r:.60}: repair or remove the row")
    return text.strip()


def _existing(data: str) -> Path:
    path = Path(data).expanduser()
    if not path.exists():
        raise UserError(f"{path} doesn't exist: check the path, or leave it out to use the hub")
    return path


def _hash(text: str) -> int:
    """The same on every machine and in every run, unlike Python's own."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _split(key: str) -> str:
    return "test" if _hash(key) % 5 == 0 else "train"


FILES = {"gsm8k": gsm8k, "tom": tom}  # (split, data) -> all problems of the split, in the file's order
GENERATORS = {"arithmetic": generated, "stories": generated}  # (task, split, n, seed) -> n problems
TASKS = FILES | GENERATORS
