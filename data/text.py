"""Messages to prompt ids, sampled ids to text: a checkpoint's tokenizer and chat template.

A prompt is rendered and encoded once; sampled ids are appended to it and never rendered again. A control
token that stands in a message's text stays text: only the template may write control tokens.
"""

import datetime
import json
import re
import secrets
from functools import cached_property
from itertools import groupby
from pathlib import Path

import jinja2
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.hub import UserError, field, read_json, read_text, resolve

# The chat template of the models trained here (data/make_tiny.py, data/finetune.py).
OURS = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)
LENGTH = 2**20  # characters of a prompt, at most
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # control characters, but for tab and newline


def thoughts(pieces: list[str]) -> int:
    """How many of a response's tokens, given as texts, are thoughts: up to the one that completes </think>, which a
    tokenizer may split. 0 if none does."""
    text = ""
    for i, piece in enumerate(pieces):
        text += piece
        if "</think>" in text[-len(piece) - len("</think>"):]:
            return i + 1
    return 0


class Tokenizer:
    """Holds a checkpoint's tokenizer, chat template and the ids that end a response."""

    def __init__(self, hf: tokenizers.Tokenizer, template: str, template_file: Path, special: dict[str, str],
                 eos_ids: tuple[int, ...]):
        hf.no_truncation()  # both may be baked into tokenizer.json, and a prompt is never cut
        hf.no_padding()
        added = [token.content for token in hf.get_added_tokens_decoder().values()]
        control = [re.escape(content) for content in added if not content.isspace()]  # blanks control nothing
        self._control = re.compile("|".join(control) or r"(?!)")  # (?!) matches nowhere
        self._hf, self._special = hf, special
        self._template_file = template_file
        try:
            self._template = compile_template(template)
        except Exception as error:  # foreign code: any error is its own
            raise self._fails(error) from None
        self.taught = template == OURS  # a model that has learned a generator's questions, and how they are answered
        self.eos_ids = eos_ids
        self.size = 1 + max(hf.get_vocab().values(), default=-1)

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
        config, where = _read_optional(folder / "tokenizer_config.json"), folder / "tokenizer_config.json"
        special = {name: field(value, "content", str, f"{where}, {name}") if isinstance(value, dict) else value
                   for name, value in config.items()  # add_bos_token is a flag, others may be null
                   if name.endswith("_token") and isinstance(value, (str, dict))}
        source, template_file = _find_template(folder, config)
        return cls(hf, source, template_file, special, _find_eos(hf, folder, special))

    def prompt_ids(self, messages: list[dict[str, str]], enable_thinking: bool = True) -> list[int]:
        """Ids of the rendered messages, up to where the model's answer begins."""
        return self.prompts([messages], enable_thinking)[0]

    def prompts(self, conversations: list[list[dict[str, str]]], enable_thinking: bool = True) -> list[list[int]]:
        """prompt_ids of many conversations at once, which is much faster.

        Without control tokens in the messages the rendering is encoded in one piece, as transformers does.
        Otherwise each of them hides behind a mark that nobody can guess while the template runs, and is then
        encoded as plain text. So it is in earlier assistant turns too: pass them without their thoughts.
        """
        hidden = {}  # number of each control token met

        def parts(conversations, mark: str) -> list[list[str]]:
            """The rendered texts, split at the marks: odd parts are numbers of control tokens."""
            def hide(found: re.Match) -> str:
                return f"{mark}<{hidden.setdefault(found[0], len(hidden))}>"

            texts = self.render([[{**m, "content": self._control.sub(hide, m["content"])} for m in messages]
                                 for messages in conversations], enable_thinking)
            return [re.split(rf"{mark}<(\d+)>", text) for text in texts]

        mark = "f" + secrets.token_hex(16)[1:]
        texts = parts(conversations, mark)
        # Of a mark that the template changes, cuts or counts something is left in the prompt: where it is of another
        # length, and another at each place, that shows. One begins with a letter and one with a 0, so that a template
        # that capitalises words never leaves both as they are.
        other = f"{int(mark, 16) ^ 16**32 - 1:032x}{secrets.token_hex(4)}"
        marked = [i for i, some in enumerate(conversations) if any(self._control.search(m["content"]) for m in some)]
        if [texts[i] for i in marked] != parts([conversations[i] for i in marked], other):
            raise UserError(f"{self._template_file}: the chat template changes the text of messages, which is not "
                            f"supported where one holds a control token ({min(hidden)}): take such problems out, or "
                            f"edit the template")
        tokens, prompts = list(hidden), []
        for text in texts:
            ids = []
            for i, part in enumerate(text):
                ids += self._encode_plain(tokens[int(part)]) if i % 2 else self.encode(part)
            prompts.append(ids)
        return prompts

    @cached_property
    def can_think(self) -> bool:
        """Whether the template's thinking mode changes the prompt."""
        messages = [{"role": "user", "content": "."}]
        return self.prompt_ids(messages, True) != self.prompt_ids(messages, False)

    def render(self, conversations: list[list[dict[str, str]]], enable_thinking: bool) -> list[str]:
        texts = []
        try:
            for messages in conversations:
                texts.append(self._template.render(messages=messages, tools=None, documents=None, **self._special,
                                                   add_generation_prompt=True, enable_thinking=enable_thinking))
                if len(texts[-1]) > LENGTH:
                    raise jinja2.TemplateError(f"a prompt of {len(texts[-1])} characters")
                texts[-1].encode()  # which fails where it isn't text
        except Exception as error:  # foreign code: any error is its own
            raise self._fails(error) from None
        return texts

    def _fails(self, error: Exception) -> UserError:
        line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
        return UserError(f"{self._template_file}: the chat template fails ({line}{type(error).__name__}: "
                         f"{str(error)[:500]}): see what it expects, or download it again")

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
        """One printable string per token; bytes that are no character of their own become U+FFFD. Each is decoded
        behind another token: some decoders take the blank from a text's start."""
        before = self.encode("a")
        start = len(self.decode(before))
        return [UNPRINTABLE.sub("\ufffd", self.decode([*before, i])[start:]) for i in ids]

    def think_open(self, prompt_ids: list[int]) -> bool:
        """Whether the prompt ends by opening a think block, so that the response begins in it."""
        return self.decode(prompt_ids[-16:]).rstrip().endswith("<think>")


def compile_template(source: str) -> jinja2.Template:
    """The chat template, compiled as transformers does it, in a sandbox that hides Python's internals."""
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # without jinja's escaping of HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.globals["raise_exception"] = raise_exception
    # One day for ever: with today's a run's prompts would be others tomorrow, and it could not go on.
    env.globals["strftime_now"] = datetime.datetime(2026, 1, 1).strftime
    env.filters["tojson"] = tojson
    # {% generation %} marks what the assistant wrote, for training only: it renders as its body
    source = re.sub(r"(\{%[-+]?\s*)(end)?generation(?=\s*[-+]?%\})",
                    lambda tag: tag[1] + ("endif" if tag[2] else "if true"), source)
    return env.from_string(source)


def _read_optional(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


def _find_template(folder: Path, config: dict) -> tuple[str, Path]:
    """Source of the chat template and the file it is from."""
    path, where = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if path.exists():
        return read_text(path), path
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if not isinstance(template, str):
        raise UserError(f"{folder} has no chat template (chat_template.jinja, or 'chat_template' in "
                        "tokenizer_config.json): use an instruction-tuned checkpoint")
    return template, where


def _find_eos(hf: tokenizers.Tokenizer, folder: Path, special: dict[str, str]) -> tuple[int, ...]:
    """The ids that end a response. generation_config.json comes first: chat models often have two."""
    for name in ("generation_config.json", "config.json"):
        eos = _read_optional(folder / name).get("eos_token_id")
        if eos is not None:
            eos = eos if isinstance(eos, list) and eos else [eos]
            return tuple(field({"eos_token_id": eos}, "eos_token_id", list, folder / name, 0, 2**24))
    eos = hf.token_to_id(special.get("eos_token", ""))
    if eos is None:
        raise UserError(f"{folder}: no eos token is named: add 'eos_token_id' to generation_config.json")
    return (eos,)
