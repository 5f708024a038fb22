"""Files from a local folder or the Hugging Face hub, and the error that every bad input raises."""

import json
from pathlib import Path

from huggingface_hub import constants, errors, snapshot_download

MODEL_FILES = ("*.json", "*.safetensors", "*.jinja")  # never *.bin or *.py: both would run foreign code


class UserError(Exception):
    """A bad input, told in one line that names it and the remedy; a script prints it and exits with 2."""

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # a quoted library error may run over several lines


def resolve(name_or_path: str, revision: str | None = None, repo_type: str | None = None,
            patterns: tuple[str, ...] = MODEL_FILES) -> Path:
    """A local folder as it is, else the hub repository of that name: its cached folder, downloaded if needed.

    Honours HF_HOME and HF_HUB_OFFLINE. Offline, the hub client may return a folder that lacks files: the
    caller checks for the ones it needs. Raises UserError.
    """
    path, kind = Path(name_or_path).expanduser(), repo_type or "model"
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is a file: give the {kind}'s folder")
    try:
        return Path(snapshot_download(str(name_or_path), repo_type=repo_type, revision=revision,
                                      allow_patterns=list(patterns)))
    except errors.HFValidationError:
        raise UserError(f"{path}: no such folder, nor a name that a {kind} on the hub can have") from None
    except Exception as error:  # the client's errors have no base in common
        raise UserError(f"{kind} {name_or_path!r}: no such folder, and {_cause(error, revision)}") from None


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


def read_json(path: Path) -> dict:
    """The object that a JSON file holds. Raises UserError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: a complete checkpoint folder is needed") from None
    except (ValueError, OSError, RecursionError) as error:  # ValueError: bad JSON or bad UTF-8
        raise UserError(f"{path} can't be read as JSON ({error}): download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object: download it again")
    return value
