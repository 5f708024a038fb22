r"""The tasks: problems with a prompt, a gold answer and a grader, from files, the hub or our generators.

gsm8k       grade-school maths: {train,test}.jsonl, a parquet file, or openai/gsm8k from the hub
tom         theory of mind: ExploreToM's sample, a CSV file, or facebook/ExploreToM from the hub
arithmetic  generated word problems, answered with \boxed{19}
stories     generated Sally-Anne stories, answered with ANSWER: box

Train and test are disjoint: generators and single files are divided by a hash of what a problem is about.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data import arithmetic, stories
from data.grade import Grade, grade, number
from data.hub import UserError, resolve

TASKS = ("gsm8k", "tom", "arithmetic", "stories")
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
    cot: str | None = None  # a right chain of thought, where the source has one
    program: object = None  # what a generator computed the answer with
    instruction: str = ""  # says how to answer; the embedded model was trained without

    @property
    def messages(self) -> list[dict[str, str]]:
        content = f"{self.question}\n{self.instruction}" if self.instruction else self.question
        return [{"role": "user", "content": content}]

    def grade(self, text: str, finished: bool, think_open: bool = False) -> Grade:
        return grade(text, self.gold, self.kind, self.choices, finished, think_open)


def load(task: str, split: str, data: str | None = None, n: int | None = None,
         seed: int = 0) -> list[Problem]:
    """The first n problems of a task's split (without n all, or 1000 of a generator) in an order that
    `seed` draws.

    data: gsm8k: a folder with {train,test}.jsonl or main/{train,test}-*.parquet, or one .jsonl or .parquet
    file; tom: the CSV file or its folder. Without it both come from the hub. A single file is divided,
    whatever its name: one question in five (tom: story) is test, by a hash of its text. Raises UserError.
    """
    if task not in TASKS:
        raise UserError(f"task {task!r} is unknown: choose one of {', '.join(TASKS)}")
    if split not in ("train", "test"):
        raise UserError(f"split {split!r} is unknown: choose train or test")
    if n is not None and n < 1:
        raise UserError(f"{n} problems asked for: ask for at least 1")
    if task in ("arithmetic", "stories"):
        if data is not None:
            raise UserError(f"task {task} is generated and reads no data: leave out {data}")
        return generated(task, split, n or GENERATED, seed)
    problems = gsm8k(split, data) if task == "gsm8k" else tom(split, data)
    if not problems:
        raise UserError(f"{data or task}: no problem falls into the {split} split: give a larger file, or a "
                        "folder with a file per split")
    return sorted(problems, key=lambda p: _hash(f"{seed} {p.id}"))[:n]


def generated(task: str, split: str, n: int, seed: int) -> list[Problem]:
    source = arithmetic if task == "arithmetic" else stories
    problems = []
    for i, p in enumerate(source.problems(split, n, seed)):
        choices = tuple(p["program"]["containers"]) if task == "stories" else None
        problems.append(Problem(f"{task}/{split}/{seed}/{i}", p["question"], p["answer"],
                                "choice" if choices else "number", choices, p["cot"], p["program"]))
    return problems


def gsm8k(split: str, data: str | None) -> list[Problem]:
    """GSM8K's problems of a split in the order of the file."""
    path = _existing(data) if data else resolve("openai/gsm8k", None, "dataset", ("main/*.parquet",))
    problems = []
    for i, (where, row) in enumerate(_gsm8k_rows(path, split)):
        question, answer = (_field(row, name, where) for name in ("question", "answer"))
        cot, mark, gold = answer.rpartition("####")
        gold = gold.strip().replace(",", "")
        if not mark or number(gold) is None:
            raise UserError(f"{where}: 'answer' must end in '#### ' and a number: repair or remove the row")
        if path.is_file() and _split(" ".join(question.split())) != split:
            continue
        cot = re.sub(r"<<[^>]*>>", "", cot).strip()  # the calculator's marks
        problems.append(Problem(f"gsm8k/{split}/{i}", question, gold, "number", None, cot, None, BOXED))
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
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{i}: malformed JSON ({error}): repair or remove the line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{i}: not a JSON object: repair or remove the line")
        yield f"{path}:{i}", row


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
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} can't be read as parquet ({error}): download it again") from None
    for i, row in enumerate(rows):
        yield f"{path}, row {i}", row


def _read(path: Path) -> str:
    """Text of a UTF-8 file with any line ends, with or without byte order mark; not empty, no NUL."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): check the path") from None
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8: convert the file, or download it again") from None
    if "\0" in text:
        line = text[:text.index("\0")].count("\n") + 1
        raise UserError(f"{path}:{line}: a NUL byte: the file is damaged; download it again")
    if not text.strip():
        raise UserError(f"{path} is empty: download it again")
    return text


def _field(row: dict, name: str, where: str) -> str:
    """A column's text, which has to be there and to say something."""
    if name not in row:
        found = ", ".join(map(str, row)) or "none"
        raise UserError(f"{where}: column {name!r} is missing (found: {found}): rename or add it")
    text = row[name]
    if not isinstance(text, str) or not text.strip() or re.search("[\0\ud800-\udfff]", text):
        # JSON can spell NUL and half surrogate pairs, which no tokenizer takes
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
