r"""The grader, against tables written by hand. LaTeX is spelt as models write it."""

import time

import pytest

from data.grade import Grade, extract, grade, number


@pytest.mark.parametrize("response, value, rule", [
    # the rules in order, and the last match of each
    (r"So \boxed{17}, no: \boxed{18}", "18", "boxed"),
    ("\\boxed{18}\n#### 19\nThe answer is 20. 21", "18", "boxed"),
    ("#### 17\n#### 18\nThe answer is 20. 21", "18", "####"),
    ("The answer is 17. The final answer is 18. It took 21 s", "18", "answer is"),
    ("First 17, then 18", "18", "last number"),
    ("No idea.", None, None),
    ("", None, None),
    # boxes
    (r"\boxed{\boxed{5}}", "5", "boxed"),
    (r"{ \boxed {5}", "5", "boxed"),
    (r"\boxed{5} and \boxed{6", "5", "boxed"),
    (r"\boxed{\frac{1}{2}}", "1/2", "boxed"),
    (r"\boxed{-\dfrac{6}{3}}", "-2", "boxed"),
    (r"\boxed{\frac{-6}{3}}", "-2", "boxed"),
    (r"\boxed{1{,}234}", "1234", "boxed"),
    (r"\boxed{12\,345}", "12345", "boxed"),
    (r"\boxed{1,\!234}", "1234", "boxed"),
    (r"\boxed{\$18.00}", "18", "boxed"),
    (r"\boxed{50\%}", "50", "boxed"),
    (r"\boxed{50 %}", "50", "boxed"),
    (r"\boxed{18\text{ dollars}}", "18", "boxed"),
    (r"\boxed{540\text{ m}^2}", "540", "boxed"),
    (r"\boxed{540\ \text{cm}^{3}}", "540", "boxed"),
    (r"\boxed{540\;\text{ft}^2}", "540", "boxed"),
    (r"\boxed{18~\text{kg}}", "18", "boxed"),
    (r"\boxed{90^\circ}", "90", "boxed"),
    (r"\boxed{90^{\circ}}", "90", "boxed"),
    (r"\boxed{\frac12}", "1/2", "boxed"),
    (r"\boxed{\frac3{4}}", "3/4", "boxed"),
    (r"\boxed{\cfrac{2,000}4}", "500", "boxed"),
    (r"\boxed{\frac{1}{2}5}", "1/2 5", "boxed"),
    (r"\boxed{18\textit{ eggs}}", "18", "boxed"),
    (r"\boxed{\$18/\text{day}}", "18", "boxed"),
    (r"\boxed{5/x}", "5/x", "boxed"),
    (r"\boxed{5/pi}", "5/pi", "boxed"),
    (r"\boxed{5 / dozen}", "5 / dozen", "boxed"),
    (r"\boxed{18/two}", "18/two", "boxed"),
    ("#### 3.14 to two decimal places", "157/50", "####"),
    (r"\boxed{5 \text{ y}}", "5", "boxed"),
    (r"\boxed{- 5}", "-5", "boxed"),
    (r"\boxed{5 x}", "5 x", "boxed"),
    (r"\boxed{5 N}", "5", "boxed"),
    (r"\boxed{5 or six}", "5 or six", "boxed"),
    (r"\boxed{2^3}", "2^3", "boxed"),
    (r"\boxed{2x^2}", "2x^2", "boxed"),
    (r"\boxed{5 x^2}", "5 x^2", "boxed"),
    (r"\boxed{5 n^2 - n}", "5 n^2 - n", "boxed"),
    (r"\boxed{5 \text{ m/s}^2}", "5", "boxed"),
    (r"\boxed{5 \text{ km/h}.}", "5", "boxed"),
    (r"\boxed{18元}", "18", "boxed"),
    (r"\boxed{18\text{ 元}}", "18", "boxed"),
    (r"\boxed{7个苹果}", "7", "boxed"),
    (r"\boxed{7 Äpfel}", "7", "boxed"),
    (r"\boxed{18 км}", "18", "boxed"),
    (r"\boxed{18 €}", "18", "boxed"),
    (r"\boxed{18\text{€}}", "18", "boxed"),
    (r"\boxed{₹18}", "18", "boxed"),
    (r"\boxed{18°C}", "18", "boxed"),
    (r"\boxed{2π}", "2π", "boxed"),
    (r"\boxed{5 π}", "5 π", "boxed"),
    (r"\boxed{18万}", "18万", "boxed"),
    (r"\boxed{12 and a half}", "12 and a half", "boxed"),
    (r"\boxed{2 dozen}", "2 dozen", "boxed"),
    (r"\boxed{\text{18}}", "18", "boxed"),
    (r"\boxed{−18}", "-18", "boxed"),
    (r"\boxed{1e3}", "1000", "boxed"),
    (r"\boxed{.5}", "1/2", "boxed"),
    (r"\boxed{$18$}", "18", "boxed"),
    # other scripts' digits, signs, full stops and blanks
    (r"\boxed{18。}", "18", "boxed"),
    (r"\boxed{18元。}", "18", "boxed"),
    (r"\boxed{１８．５}", "37/2", "boxed"),
    (r"\boxed{￥18}", "18", "boxed"),
    (r"\boxed{18 ₽}", "18", "boxed"),
    (r"\boxed{\text{€}18}", "18", "boxed"),
    (r"\boxed{-\text{€} 18}", "-18", "boxed"),
    (r"\boxed{18।}", "18", "boxed"),
    ("\\boxed{1\u00a0000\u00a0€}", "1000", "boxed"),
    ("\\boxed{1\u202f000\u2009000}", "1000000", "boxed"),
    ("#### 18。", "18", "####"),
    ("#### 18 元。", "18", "####"),
    ("答案是5。10不对", "10", "last number"),
    (r"\boxed{5²}", "5²", "boxed"),
    (r"\boxed{5½}", "5½", "boxed"),
    (r"\boxed{5。5}", "5. 5", "boxed"),
    (r"\boxed{5，100}", "5，100", "boxed"),
    # a box that holds something else is the answer all the same, and wrong
    (r"It is 18. \boxed{eighteen}", "eighteen", "boxed"),
    (r"It is 18. \boxed{}", "", "boxed"),
    (r"\boxed{17 or 18}", "17 or 18", "boxed"),
    (r"\boxed{x = 18}", "x = 18", "boxed"),
    (r"\boxed{2x}", "2x", "boxed"),
    (r"\boxed{1\frac{1}{2}}", "3/2", "boxed"),
    (r"\boxed{3/0}", "3/0", "boxed"),
    # the line of GSM8K; the same mark begins a heading in Markdown
    ("#### 1,234.", "1234", "####"),
    ("####18 eggs", "18", "####"),
    ("#### -$5", "-5", "####"),
    ("#### 18\n#### Conclusion", "18", "####"),
    ("#### Step 3\nso 7", "7", "last number"),
    ("#### 3. Add 4", "4", "last number"),
    # the answer in words
    ("Final answer: **$1{,}200**.", "1200", "answer is"),
    (r"The answer is: \(-5\).", "-5", "answer is"),
    ("ANSWER: 18 eggs, of 20", "18", "answer is"),
    ("**Answer**: 18 eggs.\nThat is 3 a day.", "18", "answer is"),
    ("The answer is 3 * 6 = 18.", "18", "last number"),
    ("The answer is 3 x 6 = 18.", "18", "last number"),
    (r"The answer is $3 \times 6 = 18$.", "18", "last number"),
    ("The answer is clear: 18.", "18", "last number"),
    # the last number
    ("$29.00.", "29", "last number"),
    ("So 42... done", "42", "last number"),
    ("10-5", "5", "last number"),
    ("10 - 5", "5", "last number"),
    ("(10)-5", "5", "last number"),
    ("答案是-5", "-5", "last number"),
    ("it is -5", "-5", "last number"),
    ("$-5", "-5", "last number"),
    ("He earns $18. Therefore, $...", "18", "last number"),
    ("1,2345", "2345", "last number"),
    ("1.2.3", "3", "last number"),
    ("thus...5", "5", "last number"),
    ("30 g of CO2", "30", "last number"),
    ("答案是18。", "18", "last number"),
])
def test_number_is_extracted(response, value, rule):
    """Else right answers count as wrong and wrong ones as right, and RL learns the grader's quirks."""
    assert extract(response, "number") == (value, rule)


@pytest.mark.parametrize("response, value, rule", [
    ("She thinks so.\nANSWER: the box", "box", "ANSWER:"),
    ("ANSWER: bag\nNo.\nANSWER: Box.", "box", "ANSWER:"),
    ("ANSWER: bag ANSWER: box", "box", "ANSWER:"),
    ("**ANSWER:** An *old  box*", "old box", "ANSWER:"),
    ('ANSWER:\n"box"\nbye', "box", "ANSWER:"),
    (r"ANSWER: \text{box}", "box", "ANSWER:"),
    (r"ANSWER: $\boxed{\text{the box}}$.", "box", "ANSWER:"),
    (r"ANSWER: bag, not \boxed{box}", r"bag, not \boxed{box", "ANSWER:"),
    ("**ANSWER**: box", "box", "ANSWER:"),
    ("ANSWER : box", "box", "ANSWER:"),
    ("ANSWER：box", "box", "ANSWER:"),
    ("ANSWER: {box}", "box", "ANSWER:"),
    ("ANSWER: box?", "box", "ANSWER:"),
    ("ANSWER: 箱子。", "箱子", "ANSWER:"),
    ("ANSWER: 「箱子」", "箱子", "ANSWER:"),
    ("ANSWER：箱子！", "箱子", "ANSWER:"),
    ("ANSWER: «да»", "да", "ANSWER:"),
    ("ANSWER: да…", "да", "ANSWER:"),
    ("ANSWER: ¿sí?", "sí", "ANSWER:"),
    ("ANSWER: हाँ।", "हाँ", "ANSWER:"),
    ("ANSWER: C# ", "c#", "ANSWER:"),
    ("ANSWER: m²", "m²", "ANSWER:"),
    ("The answer is 箱子。不是篮子。", "箱子", "answer is"),
    (r"ANSWER: \(\text{box}\)", "box", "ANSWER:"),
    (r"\boxed{\text{ANSWER: box}}", "box", "ANSWER:"),
    ("ANSWER: box or bag", "box or bag", "ANSWER:"),
    ("ANSWER: ~p", "~p", "ANSWER:"),
    ("\\boxed{bag}\nANSWER: box", "box", "ANSWER:"),
    (r"\boxed{\text{the box}}", "box", "boxed"),
    ("The final answer is the box. It was the bag.", "box", "answer is"),
    ("Answer: box", "box", "answer is"),
    ("It moved.\nThe box.\n\n", "box", "last line"),
    ("ANSWER:", "", "ANSWER:"),
    (" \n", None, None),
])
def test_choice_is_extracted(response, value, rule):
    """Else a story's answer is read from the wrong place, or a different spelling counts as wrong."""
    assert extract(response, "choice") == (value, rule)


@pytest.mark.parametrize("gold, response, strict, flexible", [
    ("18", r"\boxed{18.00}", True, True),
    ("18", r"\boxed{\frac{36}{2}}", True, True),
    ("1,000", "#### 1000", True, True),
    ("0.1", r"\boxed{0.1}", True, True),
    ("18", "The answer is 18", False, True),
    ("18", "18", False, True),
    ("18", r"It is 18, \boxed{eighteen}", False, False),
    ("18", r"\boxed{180}", False, False),
    ("0.1", r"\boxed{0.10000000000000000000000001}", False, False),
    ("5", r"\boxed{-5}", False, False),
    ("5.5", r"\boxed{5\frac{1}{2}}", True, True),
    ("-3/2", r"\boxed{-1 1/2 \text{ feet}}", True, True),
    ("5", r"\boxed{\$5\text{ million}}", False, False),
    ("5", r"\boxed{5 millionaires}", True, True),
    ("5", r"\boxed{5 and three quarters}", False, False),
    ("5", r"\boxed{5 hundredths}", False, False),
    ("5", r"\boxed{5 plus three}", False, False),
    ("5", r"\boxed{5 тысяч}", False, False),
    *(("5", rf"\boxed{{5{scaled}}}", False, False) for scaled in (
        "个半", "个半小时", "小时半", "点半。", " sixths", " sevenths", " and five eighths", " ninths", " twelfths",
        " point five", " point one", " bn", " млн", " тыс.", " млрд", " с половиной",
        " squared", " cubed", " pi")),
    *(("5", rf"\boxed{{5{unit}}}", True, True) for unit in (
        " m", " k", " K", " M", " mn", " points", " mills", " milk", " K-pop songs", " squared metres", " xylophones",
        " pies", " pints", "个半球", " с", " тысячников", "个", " minutes", " boxes", " M's")),
    ("5", r"\boxed{5 and four fifths}", False, False),
    ("5", r"\boxed{5 times a week}", True, True),
    ("5", "#### 5 times", True, True),
    ("5", "She went 5 times.", False, True),
    ("40", r"\boxed{40 fifth graders}", True, True),
    ("5", r"\boxed{5 overs}", True, True),
    ("5", r"\boxed{5 тысячелетий}", True, True),
    ("1000", r"\boxed{1\ 000}", True, True),
    ("-1000", r"\boxed{-1 000 dollars}", True, True),
    ("1000", r"\boxed{1 00}", False, False),
    ("5", "The answer is 5 million.", False, False),
    ("5", "#### 5 million", False, False),
    ("11/2", "The answer is 5 1/2.", False, True),
    ("2469/2", r"\boxed{1,234 1/2}", True, True),
    ("-5.5", r"\boxed{-\$5 1/2}", True, True),
    ("8", r"\boxed{1" + "0" * 60 + "8}", False, False),
])
def test_numbers_are_compared_by_value_and_only_boxes_and_marks_are_strict(gold, response, strict, flexible):
    """Else 18 and 18.00 differ, or a reward pays for numbers in passing."""
    got = grade(response, gold, "number")
    assert (got.strict, got.flexible) == (strict, flexible)


KNOWS = ("knows about it", "does not know about it")
LETTERS = ("A", "B", "C", "D")


@pytest.mark.parametrize("gold, choices, response, strict, flexible", [
    ("box", ("bag", "box"), "ANSWER: the box", True, True),
    ("The Box", None, "ANSWER: box", True, True),
    ("box", ("bag", "box"), "ANSWER: in the box", False, True),
    ("cafe\u0301", ("cafe\u0301", "box"), "ANSWER: caf\u00e9", True, True),
    ("caf\u00e9", ("caf\u00e9", "box"), "ANSWER: at the cafe\u0301", False, True),
    ("box", ("bag", "box"), "ANSWER: box or bag", False, False),
    ("box", ("bag", "box"), "ANSWER: box, not bag", False, False),
    ("box", ("bag", "box"), "ANSWER: boxes", False, False),
    ("box", ("bag", "box"), "ANSWER:", False, False),
    ("box", ("bag", "box"), "", False, False),
    ("box", None, "ANSWER: in the box", False, False),
    ("box", None, "The answer is the box.", False, True),
    ("box", ("bag", "box"), "She looks in the box.", False, True),
    ("box", ("bag", "box"), "Not the bag: she looks in the box.", False, False),
    ("box", ("box", "red box"), "ANSWER: in the red box", False, False),
    ("red box", ("box", "red box"), "ANSWER: in the red box", False, True),
    ("no", ("yes", "no"), "ANSWER: another", False, False),
    ("no", ("yes", "no"), "ANSWER: know", False, False),
    ("no", ("yes", "no"), "ANSWER: piano", False, False),
    ("no", ("yes", "no"), "ANSWER: No.", True, True),
    ("no", ("yes", "no"), "ANSWER: no, or yes", False, False),
    ("A", LETTERS, "ANSWER: A (the box)", False, True),
    ("B", LETTERS, "ANSWER: A B", False, False),
    ("B", LETTERS, "ANSWER: A or B", False, False),
    ("B", LETTERS, "ANSWER: the B", True, True),
    ("1", ("1", "2"), "ANSWER: it is 1.", False, True),
    ("1", ("1", "2"), "ANSWER: it is 1.5", False, False),
    ("1", ("1", "2"), "ANSWER: it is -1", False, False),
    ("10", ("10", "20"), "ANSWER: about 10,000", False, False),
    ("1", ("1", "2"), "ANSWER: 1-2", False, False),
    ("2", ("1", "2"), "ANSWER: Box-2", False, True),
    ("(B)", ("(A)", "(B)"), "ANSWER: A B", False, False),
    ("(A)", ("(A)", "(B)"), "ANSWER: A (the box)", False, True),
    ("2", ("2", "3"), "ANSWER: 1/2 of it", False, False),
    ("knows about it", KNOWS, "ANSWER: does not know about it", False, False),
    ("does not know about it", KNOWS, "ANSWER: Does not know about it", True, True),
])
def test_a_choice_counts_only_when_it_alone_is_named(gold, choices, response, strict, flexible):
    """Else naming every candidate wins, and "no" is found in "know"."""
    got = grade(response, gold, "choice", choices)
    assert (got.strict, got.flexible) == (strict, flexible)


NO_ANSWER = Grade(None, None, False, False)


@pytest.mark.parametrize("response, think_open, strict", [
    ("<think>\nmaybe 17\n</think>\n\n\\boxed{18}", False, True),
    ("maybe \\boxed{17}\n</think>\n\n\\boxed{18}", True, True),
    ("maybe \\boxed{17}\n</think>\n\n\\boxed{18}", False, True),  # closing tag only
    ("<think>\n\\boxed{18}\n</think>\n\nI don't know.", False, False),
    ("<think>a</think> b </think> \\boxed{18}", False, True),
    ("\\boxed{18}", False, True),
    ("<think>\n\\boxed{18}", False, None),
    ("\\boxed{18}", True, None),
    ("<think>a</think> \\boxed{18} <think> wait", False, None),
])
def test_only_the_text_behind_the_thoughts_is_graded(response, think_open, strict):
    """Else a number in passing within the thoughts, or a half thought, is taken for the answer."""
    got = grade(response, "18", "number", think_open=think_open)
    assert got == NO_ANSWER if strict is None else got.strict == strict


def test_a_response_that_was_cut_off_has_no_answer_whatever_it_says():
    """Else truncation is counted as wrong, or half a number as right."""
    assert grade(r"\boxed{18}", "18", "number", finished=False) == NO_ANSWER
    assert grade("ANSWER: box", "box", "choice", finished=False) == NO_ANSWER


@pytest.mark.parametrize("text", [
    "\\boxed{", "{", "1", "1,111", "1 ", "1.", "1e9", "####", "#### 1=\n", "answer is ", "answer is 3*6 ",
    "\u0301\u0316", "。", "answer:(", "\\text{", "\\frac{1", "1\\frac", "\\boxed ", "ANSWER:", "<think>", "\n",
    " ", "box ", "- ", "~",
])
@pytest.mark.parametrize("frame", ["{}", "\\boxed{{{}}}", "#### 5{}=", "ANSWER: {}="])
def test_time_stays_linear_in_whatever_a_model_repeats(text, frame):
    """Else one looping response holds up a training step for minutes: models repeat themselves for ever."""
    start = time.process_time()
    for kind in ("number", "choice"):
        grade(frame.format(text * 20_000), "18", kind, ("bag", "box"))
    assert time.process_time() - start < 2


@pytest.mark.parametrize("span", [
    "1e999999999", "1e-999999999", "9" * 10_000, "1/" + "9" * 10_000, "1e" + "9" * 10_000,
    "0." + "0" * 10_000 + "1", "1/0", "٣", "½", "1__0", "0x10", "nan", "inf", "1 2"])
def test_what_is_no_plain_number_is_refused_at_once(span):
    """Else Fraction builds a number of a billion digits, or int() raises on one of 10,000."""
    assert number(span) is None
    assert not grade(rf"\boxed{{{span}}}", "18", "number").flexible
    assert not grade(span, "18", "number").strict


def test_large_numbers_within_the_limit_are_exact():
    assert number("1" + "0" * 40) == 10**40 == number("1e40")
    assert number("0.1") * 10 == 1 and number("1,234,567.5") * 2 == 2469135
