"""Sentences, stems and BM25 over one prompt: what the bundled reader ranks with. Standard library only."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Passage", "Ranked", "coverage", "inverse_frequencies", "rank_sentences", "split_sentences", "stem", "terms"]

# Robertson and Zaragoza's usual k1; b is low because a long sentence of prose is not a worse answer than a short one.
K1, B = 1.2, 0.35

STOP_WORDS = frozenset(
    """a about above after again all also am an and any anyone are as at be been before being below between both but by
    can could did do does doing done down during each else etc few for from further get gets give go goes got had
    has have having he her here his how however i if in into is it its itself just kind like ll made make makes
    many may me might more most much must my need no nor not now of off on once one only onto or other our out over
    own please quite re really same say see shall she should so some somehow something such tell than that the
    their them then there these they thing things this those through to too under until up us use used uses using
    ve very want was way ways we well were what when where whether which while who whom whose why will with within
    without won would yes you your don doesn didn isn aren wasn weren couldn wouldn shouldn hasn haven hadn t s d
    m""".split()
)
_WORD = re.compile(r"[A-Za-z]\+\+|[A-Za-z_][A-Za-z0-9_]*|\d+(?:\.\d+)*")
_ENDINGS = (  # (ending, what takes its place, shortest word it is taken from)
    ("ability", "abl", 9), ("ibility", "ibl", 9), ("ization", "iz", 9), ("ation", "", 8), ("tion", "t", 7),
    ("ment", "", 8), ("ness", "", 7), ("ing", "", 6), ("ed", "", 5), ("ly", "", 6),
)  # fmt: skip

_SENTENCE_END = re.compile(
    r"""[.!?…]["'”’)\]]*(?:\s\[\d+\])*\s+(?!\[\d+\])(?=["'“‘(\[`*]*[A-Z0-9_>@…])   # a full stop, maybe a mark
      | (?<=:)\s+(?=>>>\s|def\ |import\ |from\ \w+\ import|class\ \w+[(:]|\#)   # a colon before code
      | (?<!\s)\s+(?=>>>\s)""",  # an interpreter prompt
    re.VERBOSE,
)
_NEW_LINE = re.compile(r"\s*(?:[-*•]|\d+[.)])\s|\s*(?:>>>|\.\.\.|#|\$)|\s{2,}\S|[^a-zA-Z]*$")  # list item, code, rule
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|vs|cf|al|approx|resp|incl|Mr|Mrs|Dr|St|No|Fig|Sec|pp|ed)\.|(?:^|\s)\(?[A-Z]\.|(?:^|\s)[ivx]+\.)$"
)

_SOURCE_MARKS = re.compile(r"(?:\s\[\d+\])+$")
_CODE = re.compile(
    r">>>|(?:^|\s)\.\.\.\s| [-+*/|&]?= | == |[{};]|\bdef \w+\(|\bimport \w+$|\bprint\(|#include|\bself\.|->|\s\$ |"
    r"\bTraceback\b|^for \w+ in .*:|\w=\w|\w\[\w+\]|  # "
)
_CHANGELOG = re.compile(
    r"^\W*(?:New in version|Changed in version|Deprecated since|Added in|Removed in|Availability:|Source code:|"
    r"See also|Raises an auditing|Contributed by|\(Contributed|Part of the Stable ABI|Return value:|PEP \d+)"
)
_POINTER = re.compile(r"^(?:(?:Please )?[Ss]ee |Refer to |Further explanation|For (?:more|further|details|a complete))")
_DANGLING = re.compile(
    r"^(?:This|That|These|Those|It|Its|They|Such|However|But|And|So|Also|Then|Thus|Therefore|Hence|For example|"
    r"For instance|Here|In (?:this|that|these) |Otherwise|Instead|Similarly|Finally|Another|Yes\b|No\b|He|She|Both)\b"
)
_DEFINES = re.compile(
    r"^(?:(?:An?|The)\s)?[\w.()“”‘’\"'`-]+(?:\s+[\w.()-]+){0,4}\s+"
    r"(?:is|are|means|refers to|provides?|allows?|returns?|lets|stands for)\b"
)
_WHY = re.compile(r"\bwhy\b", re.I)
_REASON = re.compile(
    r"\b(?:because|since|reasons?|so that|in order to|therefore|thus|otherwise|to avoid|advantages?|means that|"
    r"considered)\b",
    re.I,
)
_HOW = re.compile(
    r"\bhow (?:do|can|could|should|would|to|does one)\b|\bis (?:there|it possible)\b|\bcan i\b",
    re.I,
)
_ADVICE = re.compile(
    r"^(?:To |Use |Call |Try |You (?:can|need|could|should|must)|If you|Yes)|\b(?:use|using|you can|call|calling)\b"
)
_WHEN = re.compile(r"\bwhen\b", re.I)
_TIME = re.compile(r"\b(?:when|whenever|after|before|once|\d{4})\b", re.I)
_WHO = re.compile(r"\bwho\b", re.I)
_PERSON = re.compile(r"\b[A-Z][a-z]+ (?:van |de )?[A-Z][a-z]+\b")
_WHAT = re.compile(r"\bwhat (?:is|are|does)\b|\bdefine\b|\bmean(?:s|ing)?\b", re.I)
_CUES = ((_WHY, _REASON), (_HOW, _ADVICE), (_WHEN, _TIME), (_WHO, _PERSON), (_WHAT, _DEFINES))  # (asked, answering)


def stem(word: str) -> str:
    """The lower-case word less its commonest English endings: `execut` for execute, executes, executed, execution.

    The rules of Porter (1980) that merge forms of one word and seldom forms of different words.
    """
    if len(word) <= 3 or not word.isalpha():
        return word
    if word.endswith("ies") and len(word) > 4:
        word = word[:-3] + "y"
    elif word.endswith(("sses", "shes", "ches", "xes")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    for ending, new, shortest in _ENDINGS:
        if len(word) >= shortest and word.endswith(ending):
            word = word[: -len(ending)] + new
            if not new and len(word) > 3 and word[-1] == word[-2] and word[-1] not in "lsz":
                word = word[:-1]
            break
    return word[:-1] if word.endswith("e") and len(word) > 4 else word


def terms(text: str) -> list[str]:
    """The stems of the words that carry meaning, in the order of the text, with repetitions."""
    return [stem(word) for word in map(str.lower, _WORD.findall(text)) if word not in STOP_WORDS]


def split_sentences(text: str) -> list[str]:
    """The sentences of `text`, in order, each on one line; code and list items stand apart.

    A line break ends a sentence unless the line looks wrapped: no full stop, and a length that text is wrapped to, or a
    small letter after it.

    >>> split_sentences("Use sorted(), e.g. on lists. It returns a new list: >>> sorted([2, 1])")
    ['Use sorted(), e.g. on lists.', 'It returns a new list:', '>>> sorted([2, 1])']
    """
    return [sentence for line in _unwrapped(text) for sentence in _sentences_of_line(line)]


def _unwrapped(text: str) -> list[str]:
    """The lines of `text`, those that were only wrapped joined again, without empty ones."""
    lines: list[str] = []
    last = ""  # the source line before this one
    for raw in text.split("\n"):
        line = " ".join(raw.split())
        wrapped = last and last[-1] not in ".!?:;…" and (60 <= len(last) <= 100 or line[:1].islower())
        if line and wrapped and not _NEW_LINE.match(raw) and not _NEW_LINE.match(last):
            lines[-1] += " " + line
        elif line:
            lines.append(line)
        last = line
    return lines


def _sentences_of_line(text: str) -> list[str]:
    sentences, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        end = match.start() + len(match.group().rstrip())
        if end > start and not _ABBREVIATION.search(text[start:end]):
            sentences.append(text[start:end].strip())
            start = match.end()
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if sentence]


@dataclass(frozen=True, slots=True)
class Passage:
    """One passage of a prompt. `mark` is its name there (`[2]`), "" for a bare paragraph."""

    mark: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Ranked:
    """A sentence of a passage with its score; `passage` and `position` count from 0."""

    score: float
    passage: int
    position: int
    text: str


def inverse_frequencies(units: Sequence[Iterable[str]]) -> dict[str, float]:
    """The inverse document frequency of every term over `units` (each the terms of one unit); always positive."""
    counts = Counter(term for unit in units for term in set(unit))
    return {term: math.log(1 + (len(units) - n + 0.5) / (n + 0.5)) for term, n in counts.items()}


def coverage(wanted: Iterable[str], held: Iterable[str], idf: dict[str, float], unknown: float) -> float:
    """The share of `wanted` that stands in `held`, weighted by IDF, in [0, 1]; terms outside `idf` weigh `unknown`."""
    need, have = set(wanted), set(held)
    total = sum(idf.get(term, unknown) for term in need)
    return sum(idf.get(term, unknown) for term in need & have) / total if total else 0.0


def is_code(sentence: str) -> bool:
    """Whether a sentence looks like program text rather than prose."""
    return bool(_CODE.search(sentence)) or _prose_share(sentence) < 0.82


def _prose_share(sentence: str) -> float:
    return sum(c.isalpha() or c == " " for c in sentence) / len(sentence)


def _bm25(query: dict[str, float], unit: Sequence[str], mean_length: float) -> float:
    counts = Counter(unit)
    norm = K1 * (1 - B + B * len(unit) / mean_length)
    return sum(w * counts[t] * (K1 + 1) / (counts[t] + norm) for t, w in query.items() if t in counts)


def _quality(sentence: str, position: int, last: bool, question: str) -> float:
    """How well a sentence stands alone, about 1 for a sentence of prose; a factor on its score."""
    sentence = _SOURCE_MARKS.sub("", sentence)
    words = sentence.split()
    quality = 1.0
    if _CODE.search(sentence):
        quality *= 0.45
    if _prose_share(sentence) < 0.82:
        quality *= 0.6
    if _CHANGELOG.match(sentence) and not re.search(r"\bversion|\bwhen\b|\bnew\b|\bchanged?\b", question, re.I):
        quality *= 0.3
    if _POINTER.match(sentence):
        quality *= 0.6
    if sentence.endswith("?"):
        quality *= 0.35  # a question is no answer
    elif sentence.endswith(":"):
        quality *= 0.7  # announces what the answer leaves out
    elif sentence[-1] not in ".!)”\"'…":
        quality *= 0.6 if last else 0.8  # cut off by the end of the passage, or a heading
    if position == 0 and sentence[:1].islower() and "(" not in words[0]:
        quality *= 0.6  # begins in the middle of a sentence
    if position and _DANGLING.match(sentence):
        quality *= 0.85
    if len(words) < 5:
        quality *= 0.55
    elif len(words) > 45:
        quality *= 0.8
    if _DEFINES.match(sentence):
        quality *= 1.06
    for asked, answering in _CUES:
        if asked.search(question) and answering.search(sentence):
            quality *= 1.2
    return quality


@dataclass(frozen=True, slots=True)
class Weights:
    """What the parts of a score weigh. The defaults were searched on half of the Python FAQ and hold on the other
    half."""

    passage: float = 0.35  # the sentence's whole passage, beside the sentence
    title: float = 0.1  # question terms in the passage's title
    rank: float = 0.5  # the retriever's order, which saw more than words
    pair: float = 0.4  # two neighbouring question terms that are neighbours in the sentence too
    lead: float = 0.25  # the first sentence of a passage usually says what it is about


def rank_sentences(question: str, passages: Sequence[Passage], weights: Weights = Weights()) -> list[Ranked]:
    """Every sentence of `passages`, best first; ties in the order of the prompt.

    A `question` without words that carry meaning ranks by nearness to the whole context.
    """
    sentences = [split_sentences(p.text) for p in passages]
    stems = [[terms(s) for s in group] for group in sentences]
    units = [unit for group in stems for unit in group]
    idf = inverse_frequencies(units)
    asked = terms(question)
    if not asked:
        counts = Counter(term for unit in units for term in set(unit))
        asked = [term for term, n in counts.most_common() if n > 1][:12]
    query = {term: idf[term] for term in asked if term in idf}
    pairs = {(a, b) for a, b in pairwise(asked) if a != b}
    mean_sentence = sum(map(len, units)) / max(1, len(units)) or 1.0
    whole = [[term for unit in group for term in unit] for group in stems]
    mean_passage = sum(map(len, whole)) / max(1, len(whole)) or 1.0
    ceiling = sum(query.values()) or 1.0  # scores are shares of it, so that the weights mean the same in every prompt
    ranked = []
    for p, passage in enumerate(passages):
        titled = sum(query[t] for t in set(terms(passage.title)) if t in query) / ceiling
        about = _bm25(query, whole[p], mean_passage) / ceiling
        prior = weights.passage * about + weights.title * titled + (weights.rank / (1 + p) if passage.mark else 0.0)
        for i, sentence in enumerate(sentences[p]):
            unit = stems[p][i]
            score = _bm25(query, unit, mean_sentence) / ceiling
            near = sum(min(query.get(a, 0.0), query.get(b, 0.0)) for a, b in pairwise(unit) if (a, b) in pairs)
            score += weights.pair * near / ceiling + prior + (weights.lead if i == 0 else 0.0)
            score *= _quality(sentence, i, i + 1 == len(sentences[p]), question)
            ranked.append(Ranked(score, p, i, sentence))
    return sorted(ranked, key=lambda r: (-r.score, r.passage, r.position))
