"""Is an answer right? One scorer a task, each 0 or 1 for an answer and its sample.

`exact`   equal to the reference up to white space
`number`  the last number after `####`, else the last number at all, as GSM8K is scored
`answer`  equal after case, articles, punctuation, currency and thousands signs are gone, numbers by value, as TAT-QA
`code`    the program passes the asserts in its prompt (MBPP) or the examples in its docstring (HumanEval); where the
          prompt has neither, as `exact`. It runs what the model wrote: see `gradientspace.sandbox`.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Mapping, Sequence

from gradientspace.data import Sample
from gradientspace.evaluation import normalise_white_space
from gradientspace.sandbox import passes

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_FENCE = re.compile(r"```(?:python)?\n(.*?)(?:```|\Z)", re.DOTALL)
_DOCSTRING = re.compile(r"(\"{3}|'{3})(.*?)(\1|\Z)", re.DOTALL)
_CODE_START = ("def ", "class ", "from ", "import ", "@")


def exact(answer: str, sample: Sample) -> float:
    return float(normalise_white_space(answer) == normalise_white_space(sample.reference))


def number(answer: str, sample: Sample) -> float:
    found, wanted = last_number(answer), last_number(sample.reference)
    return float(found is not None and wanted is not None and math.isclose(found, wanted, rel_tol=1e-6))


def last_number(text: str) -> float | None:
    """The last number after the last `####`, else of the whole text; thousands separators are dropped."""
    found = _NUMBER.findall(text.rsplit("####", 1)[-1]) or _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def answer(answer: str, sample: Sample) -> float:
    return float(normalise_answer(answer) == normalise_answer(sample.reference))


def normalise_answer(text: str) -> str:
    """Lower case without articles, punctuation and currency; numbers by value, `(8.9)` negative as in reports."""
    text = re.sub(r"\((\d[\d,.]*)%?\)", r"-\1", text.lower().strip())
    words = []
    for word in _ARTICLES.sub(" ", text).split():
        bare = word.strip("$€£%,;:!?\"'").replace(",", "")
        try:
            words.append(f"{float(bare):g}")
        except ValueError:
            words.append(bare.strip(string.punctuation))
    return " ".join(word for word in words if word)


def code(answer: str, sample: Sample) -> float:
    asserts = [line for line in sample.prompt.splitlines() if line.startswith("assert ")]
    if asserts:
        return float(passes("\n".join([source_of(answer), *asserts])))
    header = function_header(sample.prompt)
    docstring = _DOCSTRING.search(header)
    if docstring is None or ">>>" not in docstring.group(2):
        return exact(answer, sample)
    body = source_of(answer)
    program = body if re.search(r"^def ", body, re.MULTILINE) else f"{header}\n{body}"
    # The examples come from the prompt, whatever docstring the answer has.
    return float(passes(f"{program}\n{_DOCTEST}", {"EXAMPLES": docstring.group(2)}))


# Examples are judged by value, as their authors meant them: "x" is 'x', and `f(1) == 2` without an output must be true.
_DOCTEST = """
import ast, doctest
for example in doctest.DocTestParser().get_examples(EXAMPLES):
    value = eval(example.source)
    wanted = example.want.strip()
    if not wanted:
        assert value is True or value is None
    elif repr(value) != wanted:
        assert value == ast.literal_eval(wanted)
"""


def source_of(answer: str) -> str:
    """The code of an answer: what is in its first fence, else all of it."""
    fenced = _FENCE.search(answer)
    return fenced.group(1) if fenced else answer


def function_header(prompt: str) -> str:
    """The part of a prompt from its first line of code on."""
    lines = prompt.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith(_CODE_START)), len(lines))
    return "\n".join(lines[first:])


SCORERS: dict[str, Callable[[str, Sample], float]] = {"exact": exact, "number": number, "answer": answer, "code": code}


def score(answers: Sequence[str], samples: Sequence[Sample], scorers: Mapping[str, str]) -> list[float]:
    """1.0 for every right answer; `scorers` names the scorer of a source or domain, `exact` where it names none."""
    names = [scorers.get(s.source or "") or scorers.get(s.domain or "") or "exact" for s in samples]
    return [SCORERS[name](text, sample) for name, text, sample in zip(names, answers, samples, strict=True)]


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words over all n-grams (Li et al. 2016): how varied the answers are; 0 without any n-gram."""
    grams = []
    for words in (text.split() for text in texts):
        grams += zip(*(words[i:] for i in range(n)), strict=False)
    return len(set(grams)) / len(grams) if grams else 0.0
