"""Messages to prompt ids, sampled ids to text: a checkpoint's tokenizer and chat template.

A prompt is rendered and encoded once; sampled ids are appended to it and never rendered again. A control
token that stands in a message's text stays text: only the template may write control tokens.
"""

import datetime
import json
import re
import secrets
from itertools import groupby
from pathlib import Path

import jinja2
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.hub import UserError, read_json, resolve

UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # control characters, but for tab and newline


class Tokenizer:
    """Holds a checkpoint's tokenizer, compiled chat template and the ids that end a response."""

    def __init__(self, hf: tokenizers.Tokenizer, template: jinja2.Template, template_file: Path,
                 special: dict[str, str], eos_ids: tuple[int, ...], pad_id: int):
        hf.no_truncation()  # both may be baked into tokenizer.json, and a prompt is never cut
        hf.no_padding()
        added = [token.content for token in hf.get_added_tokens_decoder().values()]
        control = [re.escape(content) for content in added if not content.isspace()]  # blanks control nothing
        self._control = re.compile("|".join(control) or r"(?!)")  # (?!) matches nowhere
        self._hf, self._special = hf, special
        self._template, self._template_file = template, template_file
        self.eos_ids, self.pad_id = eos_ids, pad_id

    @classmethod
    def from_pretrained(cls, name_or_path: str, revision: str | None = None) -> "Tokenizer":
        folder = resolve(name_or_path, revision, patterns=("*.json", "*.jinja"))
        path = folder / "tokenizer.json"
        if not path.exists():
            raise UserError(f"{path} is missing: only checkpoints with a tokenizer.json are supported")
        try:
            hf = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(f"{path} can't be read ({error}): download it again") from None
        config = _read_optional(folder / "tokenizer_config.json")
        special = {name: value["content"] if isinstance(value, dict) else value
                   for name, value in config.items()  # add_bos_token is a flag, others may be null
                   if name.endswith("_token") and isinstance(value, (str, dict))}
        source, template_file = _find_template(folder, config)
        eos_ids, pad_id = _find_eos(hf, folder, special), hf.token_to_id(special.get("pad_token", ""))
        return cls(hf, compile_template(source, template_file), template_file, special, eos_ids,
                   eos_ids[0] if pad_id is None else pad_id)

    def prompt_ids(self, messages: list[dict[str, str]], enable_thinking: bool = True) -> list[int]:
        """Ids of the rendered messages, up to where the model's answer begins.

        Without control tokens in the messages the rendering is encoded in one piece, as transformers does.
        Otherwise each of them hides behind a mark that nobody can guess while the template runs, and is then
        encoded as plain text. So it is in earlier assistant turns too: pass them without their thoughts.
        """
        mark, hidden = secrets.token_hex(16), []

        def hide(found: re.Match) -> str:
            hidden.append(found[0])
            return f"{mark}<{len(hidden) - 1}>"

        text = self._render([{**m, "content": self._control.sub(hide, m["content"])} for m in messages],
                            enable_thinking)
        ids = []
        for i, part in enumerate(re.split(rf"{mark}<(\d+)>", text)):  # odd parts are indices into hidden
            ids += self._encode_plain(hidden[int(part)]) if i % 2 else self.encode(part)
        return ids

    def _render(self, messages: list[dict[str, str]], enable_thinking: bool) -> str:
        try:
            return self._template.render(messages=messages, tools=None, documents=None, **self._special,
                                         add_generation_prompt=True, enable_thinking=enable_thinking)
        except Exception as error:  # the template is foreign code: any error is its own
            raise UserError(f"{self._template_file}: the chat template refuses these messages "
                            f"({type(error).__name__}: {error}): see what it expects") from None

    def encode(self, text: str) -> list[int]:
        """Ids of a text whose control tokens count as such; nothing is added in front or behind."""
        return self._hf.encode(text, add_special_tokens=False).ids

    def _encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a control token.

        The library's own switch (encode_special_tokens) spares only tokens flagged special, and <think> is
        not one; so this runs the stages that come after its search for added tokens by hand.
        """
        hf = self._hf
        text = hf.normalizer.normalize_str(text) if hf.normalizer else text
        pieces = hf.pre_tokenizer.pre_tokenize_str(text) if hf.pre_tokenizer else [(text, None)]
        return [token.id for piece, _ in pieces for token in hf.model.tokenize(piece)]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, control tokens visible.

        A model can sample ids that have no token, where its embedding matrix is larger than the tokenizer.
        They become <|id|>: dropping one would join its neighbours, say two digits, into what nobody wrote.
        """
        runs = groupby(ids, key=lambda i: self._hf.id_to_token(i) is not None)
        return "".join(self._hf.decode(list(run), skip_special_tokens=False) if known
                       else "".join(f"<|{i}|>" for i in run) for known, run in runs)

    def pieces(self, ids: list[int]) -> list[str]:
        """One printable string per token; bytes that are no character of their own become U+FFFD."""
        return [UNPRINTABLE.sub("\ufffd", self.decode([i])) for i in ids]

    def think_open(self, prompt_ids: list[int]) -> bool:
        """Whether the prompt ends inside a think block, so that the response begins in it."""
        return self.decode(prompt_ids[-16:]).rstrip().endswith("<think>")


def compile_template(source: str, file: Path) -> jinja2.Template:
    """The chat template, compiled as transformers does it, in a sandbox that hides Python's internals."""
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # without jinja's escaping of HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    env.filters["tojson"] = tojson
    # {% generation %} marks what the assistant wrote, for training only: it renders as its body
    source = re.sub(r"(\{%[-+]?\s*)(end)?generation(?=\s*[-+]?%\})",
                    lambda tag: tag[1] + ("endif" if tag[2] else "if true"), source)
    try:
        return env.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{file}: line {error.lineno} of the chat template: {error.message}: "
                        "download it again") from None


def _read_optional(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


def _find_template(folder: Path, config: dict) -> tuple[str, Path]:
    """Source of the chat template and the file it is from."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8"), path
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str):
        raise UserError(f"{folder} has no chat template (chat_template.jinja, or 'chat_template' in "
                        "tokenizer_config.json): use an instruction-tuned checkpoint")
    return template, folder / "tokenizer_config.json"


def _find_eos(hf: tokenizers.Tokenizer, folder: Path, special: dict[str, str]) -> tuple[int, ...]:
    """The ids that end a response. generation_config.json comes first: chat models often have two."""
    for name in ("generation_config.json", "config.json"):
        eos = _read_optional(folder / name).get("eos_token_id")
        if eos is not None:
            return tuple(eos) if isinstance(eos, list) else (eos,)
    eos = hf.token_to_id(special.get("eos_token", ""))
    if eos is None:
        raise UserError(f"{folder}: no eos token is named: add 'eos_token_id' to generation_config.json")
    return (eos,)
