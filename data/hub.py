"""Files: from a local folder or the Hugging Face hub, read with checks, written whole; the error of every bad input."""

import json
import math
import os
import re
import reprlib
import sys
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants, errors, snapshot_download
from huggingface_hub.utils import validate_repo_id

MODEL_FILES = ("*.json", "*.safetensors", "*.jinja")  # never *.bin or *.py: both would run foreign code


class UserError(Exception):
    """A bad input, told in one line that names it and the remedy; a script prints it and exits with 2."""

    def __str__(self) -> str:
        # What it quotes may hold line breaks, characters that a terminal obeys, and a million more.
        text = "".join(c if c.isprintable() else " " for c in " ".join(super().__str__().splitlines()))
        return text if len(text) <= 1200 else f"{text[:900]} … {text[-200:]}"


def resolve(name_or_path: str, revision: str | None = None, kind: str = "model",
            patterns: tuple[str, ...] = MODEL_FILES) -> Path:
    """A local folder as it is, else the hub repository of that name: its cached folder, downloaded if needed.

    Honours HF_HOME and HF_HUB_OFFLINE. Offline, the hub client may return a folder that lacks files: the
    caller checks for the ones it needs. Raises UserError.
    """
    path = Path(name_or_path).expanduser()
    check_name(name_or_path, kind)
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(str(name_or_path), repo_type=kind, revision=revision,
                                      allow_patterns=list(patterns)))
    except Exception as error:  # the client's errors have no base in common
        raise UserError(f"{kind} {name_or_path!r}: no such folder, and {_cause(error, revision)}") from None


def check_name(name_or_path: str, kind: str = "model") -> None:
    """Refuses what is neither a folder nor a name that the hub could have, without asking it."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return
    if path.exists():
        raise UserError(f"{path} is a file: give the {kind}'s folder")
    try:
        validate_repo_id(str(name_or_path))
    except errors.HFValidationError:
        raise UserError(f"{path}: no such folder, nor a name that a {kind} on the hub can have") from None


def _cause(error: Exception, revision: str | None) -> str:
    """Why the hub gave nothing, and what to do."""
    if isinstance(error, errors.GatedRepoError):
        return "the hub wants its terms accepted first: do so on its page, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has none of that name that you may read: check the spelling, or run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub has no revision {revision!r} of it: check the spelling"
    missing = isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled))
    if missing and constants.HF_HUB_OFFLINE:
        return (f"HF_HUB_OFFLINE is set while the cache {constants.HF_HUB_CACHE} lacks it"
                + (f" (revision {revision})" if revision else "")
                + ": unset HF_HUB_OFFLINE to download it, or give a local folder")
    if missing:
        return "the hub can't be reached: check the network, or give a local folder"
    return f"the download failed ({type(error).__name__}: {str(error)[:200]}): try again"


def read_text(path: Path) -> str:
    """A UTF-8 file's text. Raises UserError naming the file."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; is the folder complete?") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} can't be read ({error})") from None


def read_json(path: Path) -> dict:
    """The object that a JSON file holds. Raises UserError naming the file."""
    return parse_object(read_text(path), path)


def parse_object(text: str, where) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} can't be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} does not hold a JSON object")
    return value


def read_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """(file:line, object) of each line of a file that is written line by line, but for what follows the last line
    break: it is being written, or a kill cut it short. Raises UserError."""
    for number, line in enumerate(read_text(path).split("\n")[:-1], start=1):
        yield f"{path}:{number}", parse_object(line, f"{path}:{number}")


def is_text(value) -> bool:
    """Whether it is a text that a path or a tokenizer can take: JSON can also spell NUL and half surrogate pairs."""
    return isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "an object",
         list: "a list of whole numbers"}


def field(record: dict, name: str, kind: type, where, low: float = -math.inf, high: float = sys.float_info.max,
          default=...):
    """record[name], checked: an int, float (finite; an int will do), bool, str, dict, or list of ints, with numbers in
    low..high. Without a default it has to be there; null counts as absent. Raises UserError naming file and field."""
    value = record.get(name)
    value = default if value is None else value
    if value is ...:
        raise UserError(f"{where}: field {name!r} is missing; is the file complete?")
    if value is None:
        return None

    def fits(x, *kinds):  # a bool is an int to isinstance
        return type(x) in kinds and low <= x <= high and (type(x) is int or math.isfinite(x))

    sound = {str: lambda: is_text(value), int: lambda: fits(value, int), float: lambda: fits(value, int, float),
             list: lambda: isinstance(value, list) and all(fits(x, int) for x in value)}
    if not sound.get(kind, lambda: isinstance(value, kind))():
        bounds = f" from {low:g} to {high:g}" if kind in (int, float, list) and math.isfinite(low) else ""
        raise UserError(f"{where}: {name} = {reprlib.repr(value)}: must be {KINDS[kind]}{bounds}")
    return float(value) if kind is float else value


def as_json(value, indent: int | None = None) -> str:
    """JSON of a record, with null in place of NaN and infinities, which JSON doesn't have."""
    def finite(value):
        if isinstance(value, dict):
            return {name: finite(x) for name, x in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(x) for x in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), indent=indent, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Whole or not at all: a kill or a power cut leaves the old file or the new one."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
        fsync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    fsync(path.parent)


def write_json(path: Path, value: dict) -> None:
    write_text(path, as_json(value, indent=2))


def fsync(path: Path) -> None:
    """Makes a file's content, or the renames in a folder, outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
