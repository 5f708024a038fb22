r"""Did a response give the right answer?

A number is taken from the last \boxed{...}, else the last `#### x`, else from "answer is x", else it is the last
number. A choice is taken from the last ANSWER:, else the last \boxed{...}, else from "answer is x", else it is the
last line. The strict verdict counts the first two rules of each list, and is what a reward should use; the flexible
one counts all. A box or an ANSWER: that holds something else is wrong: the later rules are not tried. Every step is
linear in the text, whatever a model writes.
"""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

STRICT = ("boxed", "####", "ANSWER:")
MAX_DIGITS = 50  # of a number and of its exponent's value: exact arithmetic beyond could take for ever

LETTER = "A-Za-zÀ-ÖØ-öø-ɏЀ-ӿ"  # of units, Latin and Cyrillic: a Greek one is rather a variable, or pi
SIGN = "぀-ヿ㐀-鿿가-힣"  # of Chinese, Japanese and Korean, where a unit follows without a blank
MONEY = "$€£¥₹₽₩₺₴₫"
# One spelling: ASCII's for its full-width twins, but for the comma, which also lists numbers (5，100); a blank for all
# blanks; a full stop, and never a decimal point, for those of other scripts. NFKC would make 52 of 5².
SPELT = ({0xFF01 + i: chr(0x21 + i) for i in range(0x5E)} | dict.fromkeys(map(ord, "。｡।॥"), ". ") | {0xFFE5: "¥"}
         | dict.fromkeys((0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000), " "))
del SPELT[ord("，")]
AROUND = " \t\r\n_`\"'“”‘’.,;:!?()[]{}$\\…„‚«»‹›¿¡、，،؛؟「」『』《》〈〉【】"  # what may stand around a choice
COMPOSED = 1000  # characters that are composed: what a model repeats would take the square of its length
# A sign counts only where nothing stands in front that it could subtract from: 10-5 ends in 5, not in -5.
NUMBER = re.compile(rf"""(?<![A-Za-z0-9]) (?P<sign>(?<![)\]}}%])[-+])? [{MONEY}]?
    (?P<body> (?: [0-9]{{1,3}}(?:,[0-9]{{3}})+(?![0-9]) | [0-9]+ ) (?:\.[0-9]+)? | (?<![0-9.])\.[0-9]+ )
    (?: [eE](?P<exponent>[-+]?[0-9]+) | /(?P<divisor>[0-9]+) )?""", re.VERBOSE)
# dollars, km/h, m^2, %, 元; but 2x is no number, nor is 2 x^2
UNIT = re.compile(rf"""[ ]?[%¢{MONEY}]?\.?[ ]? | [ ]?%?(?:[ ]|(?:/[ ]?)?(?=[{LETTER}]{{2}}|[{SIGN}]))[{LETTER}{SIGN}]
    (?: [{LETTER}{SIGN} ./'²³-] | (?:(?<=[ms])|(?<=[ms][ ])|(?<=[a-z]{{2}})|(?<=[a-z]{{2}}[ ])) \^\{{?[23]\}}? )*""",
    re.VERBOSE)
SCALED = re.compile(rf"""\s*(?: (?: hundred|thousand|lakh|million|crore|billion|trillion|dozen
    | (?:and\s+)?(?:an?\s+|one\s+|two\s+|three\s+)?(?:half|halve|third|quarter) )s?\b
    | (?:and\s+)?(?:two\s+|three\s+|four\s+|five\s+|seven\s+)?
        (?:fifth|sixth|seventh|eighth|ninth|tenth|twelfth|hundredth|thousandth)s\b
    | (?:plus|minus|times|over|point|or|to)\s+(?!\w+\s+(?:decimal|significant))(?:[0-9]
        |(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|hundred|thousand)\b)
    | (?:bn|pi|тысяч[аиу]?|миллион(?:а|ов)?|миллиард(?:а|ов)?|тыс|млн|млрд|с\s+половиной)\b
    | (?:squared|cubed)\b(?!\s+\w) | (?-i:[nx])\s*\Z
    | [十百千万萬亿億만억] | [{SIGN}]{{1,3}}半(?:小时|小時|[个個]?月|(?![{SIGN}])) )""",
    re.IGNORECASE | re.VERBOSE)  # no unit: it multiplies or adds
MIXED = re.compile(rf"""(?<![0-9.,/A-Za-z]) (?P<sign>(?<![)\]}}%])[-+])? [{MONEY}]?
    (?P<whole> [0-9]{{1,3}}(?:,[0-9]{{3}})+ | [0-9]{{1,9}} ) \s+
    (?P<part>[0-9]{{1,9}})/(?P<of>[0-9]{{1,9}}) (?!/?[0-9]|\.[0-9])""", re.VERBOSE)  # 5 1/2
THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(?: [0-9]{3})+(?![0-9/])")  # 1 000
ANSWER_IS = re.compile(r"\banswer(?:\s+is|[\s*_]*:)[\s:*$(\[\\]*", re.IGNORECASE)
OPERATION = re.compile(r"\s*(?:[-+*/×÷=^x]|\\(?:times|cdot|div)\b)\s*[0-9($]")


class Grade(NamedTuple):
    value: str | None  # the answer found, normalised; None without one and in an unfinished response
    rule: str | None  # the rule that found it
    strict: bool
    flexible: bool


def grade(text: str, gold: str, kind: str, choices: tuple[str, ...] | None = None, finished: bool = True,
          think_open: bool = False) -> Grade:
    """Grade of a whole decoded response; `kind` is "number" or "choice".

    The caller has cut trailing control tokens (<|im_end|> and the like), and says whether an eos came
    (`finished`) and whether the prompt ended inside a think block (`think_open`). A response that has not
    finished, or not finished thinking, is never right.
    """
    answer = finished_answer(text, finished, think_open)
    if answer is None:
        return Grade(None, None, False, False)
    value, rule = extract(answer, kind, choices)
    gold = normalise(gold, kind, choices)
    right = value == gold
    named = value is not None and choices is not None and mentioned(value, choices) == {gold}
    return Grade(value, rule, right and rule in STRICT, right or named)


def after_thinking(text: str, think_open: bool = False) -> str | None:
    """What follows the last </think>: all of it if there is no thinking, None while a think block is open."""
    _, closed, answer = text.rpartition("</think>")
    return None if "<think>" in answer or (think_open and not closed) else answer


def finished_answer(text: str, finished: bool, think_open: bool) -> str | None:
    """What follows the thoughts; None where the response, or its thoughts, have not finished."""
    return after_thinking(text, think_open) if finished else None


def extract(answer: str, kind: str, choices: tuple[str, ...] | None = None) -> tuple[str | None, str | None]:
    """(value, rule) of a response without its thoughts; (None, None) where no rule applies."""
    if kind == "number":
        return _extract_number(answer)
    span, rule = _choice_span(answer)
    return None if span is None else normalise(span, "choice", choices), rule


def _extract_number(answer: str) -> tuple[str | None, str | None]:
    boxed = last_boxed(answer)
    if boxed is not None:
        return normalise(boxed, "number"), "boxed"
    for span in reversed(re.findall(r"####[ \t]*([^\n#]*)", answer)):
        if number(span) is not None:  # #### also begins a heading in Markdown
            return normalise(span, "number"), "####"
    answer = unmixed(plain(answer))
    for lead in reversed(list(ANSWER_IS.finditer(answer))):
        found = NUMBER.match(answer, lead.end())
        if found and not OPERATION.match(answer, found.end()) and not SCALED.match(answer, found.end()):
            return normalise(found[0], "number"), "answer is"  # in "3*6 = 18" the first number isn't it
    found = [match for match in NUMBER.finditer(answer) if not SCALED.match(answer, match.end())]
    return (normalise(found[-1][0], "number"), "last number") if found else (None, None)


def _choice_span(answer: str) -> tuple[str | None, str | None]:
    marks = list(re.finditer(r"ANSWER[*_ ]*[:：]", answer))  # **ANSWER**: as well
    if marks:
        span = answer[marks[-1].end():].lstrip("*_$ \t\r\n").partition("\n")[0]
        inside = last_boxed(span) if span.startswith("\\boxed") else None  # as many models write it by habit
        return span if inside is None else inside, "ANSWER:"
    boxed = last_boxed(answer)
    if boxed is not None:
        return boxed, "boxed"
    leads = list(ANSWER_IS.finditer(answer))
    if leads:
        return re.split(r"[.。\n]", answer[leads[-1].end():], maxsplit=1)[0], "answer is"
    lines = answer.strip().split("\n")
    return (lines[-1], "last line") if lines[-1] else (None, None)


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} whose braces balance (of the inner one, if nested)."""
    opened, last = [], (-1, -1)
    for brace in re.finditer(r"(\\boxed\s*)?\{|\}", text):
        if brace[0] != "}":
            opened.append((brace.end(), brace[1]))
        elif opened:
            start, is_box = opened.pop()
            if is_box:
                last = max(last, (start, brace.start()))
    return None if last[0] < 0 else text[slice(*last)]


def plain(text: str) -> str:
    r"""Text without LaTeX's dress of numbers: \$ \% \! \, \; {,} \text{} \frac{a}{b}, and in SPELT's spelling."""
    text = text.translate(SPELT).replace("\u2212", "-").replace("{,}", ",").replace("\\!", "").replace("\\,", "")
    text = re.sub(r"\\[;: ]", " ", text)
    text = re.sub(r"\\([$%])", r"\1", text)
    text = re.sub(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"(?<=[0-9])(?=\\[cdt]?frac)", " ", text)  # 1\frac{1}{2} must not become 11/2
    return re.sub(r"\\[cdt]?frac\s*(?:([0-9])|\{\s*(-?[0-9][0-9,.]*)\s*\})\s*(?:([0-9])|\{\s*([0-9]+)\s*\})",
                  r"\1\2/\3\4 ", text)  # nor \frac{1}{2}5 1/25


def unmixed(text: str) -> str:
    """Text with 5 1/2 as 11/2."""
    def fraction(found: re.Match) -> str:
        whole, part, of = (int(found[name].replace(",", "")) for name in ("whole", "part", "of"))
        return f"{found['sign'] or ''}{whole * of + part}/{of}"

    return MIXED.sub(fraction, text)


def number(span: str) -> Fraction | None:
    """The exact value of a span that is one number, with at most a currency and a unit; else None."""
    span = re.sub(r"~|°|\^\{?\\circ\}?", " ", plain(span)).strip().strip("$*").strip()
    span = re.sub(rf"^([-+]?) *(?:[{MONEY}] *)?(?=[0-9.])", r"\1", span)
    thousands = THOUSANDS.match(span)
    span = unmixed(thousands[0].replace(" ", "") + span[thousands.end():] if thousands else span)
    found = NUMBER.match(span)
    unit = found and re.sub(r"\s+", " ", span[found.end():])
    if (found is None or len(found[0]) > MAX_DIGITS or not UNIT.fullmatch(unit)
            or any(SCALED.match(re.sub(r"^ ?/ ?", rest, unit)) for rest in ("", "over "))):  # /dozen, /two
        return None
    exponent, divisor = int(found["exponent"] or 0), int(found["divisor"] or 1)
    if abs(exponent) > MAX_DIGITS or divisor == 0:
        return None
    value = Fraction(found["body"].replace(",", "")) * Fraction(10) ** exponent / divisor
    return -value if found["sign"] == "-" else value


def normalise(span: str, kind: str, choices: tuple[str, ...] | None = None) -> str:
    """One spelling for equal answers: a number in lowest terms, a choice in lower case without article, unless that
    is itself a choice, as A of A to D."""
    if kind == "number":
        value = number(span)
        return plain(span).strip() if value is None else str(value)
    span = unicodedata.normalize("NFC", span[:COMPOSED]) + span[COMPOSED:]
    words = plain(span).replace("*", "").strip(AROUND).lower().split()
    own = {choice.strip(AROUND).lower() for choice in choices or ()}
    article = len(words) > 1 and words[0] in {"the", "a", "an"} - own
    return " ".join(words[article:])


def mentioned(span: str, choices: tuple[str, ...]) -> set[str]:
    """The choices that a span names as whole words, or whole numbers; a longer one hides the shorter ones inside it."""
    named = set()
    for choice in sorted({normalise(choice, "choice") for choice in choices}, key=len, reverse=True):
        # Of 1.5, -1 or 1-2 a choice of 1 is only a part, of No.1 and Box-1 not.
        before = r"(?<![0-9][.,/-])(?<!(?<!\w)[.,/-])" if choice[:1].isdigit() else ""
        after = r"(?!/|\s?[-/.,][0-9])" if choice[-1:].isdigit() else ""
        span, count = re.subn(rf"(?<!\w){before}{re.escape(choice)}(?!\w){after}", "|", span)
        if count:
            named.add(choice)
    return named
