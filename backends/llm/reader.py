"""The bundled reader: an extractive answerer. It is not a language model and never calls itself one.

It answers a prompt with sentences that already stand in the prompt. That is enough to try flowc in the first minute,
with no download and no GPU, and to test plans end to end: it is deterministic, takes milliseconds, and what it says
can be checked against the passage mark that it prints. It cannot reason, rephrase, count or translate.

How a prompt is read (`read_prompt`):

- the *context* is every numbered passage (`[1] Title: text`, as `flowc.ir.values.Docs` prints them, lists of `Docs`
  included); without any, every paragraph that is neither the question nor an instruction;
- the *question* is the last line that starts with `Question:` or `Q:`, else the last question sentences (ending in `?`)
  outside the context, else the last paragraph.

What it says to it:

- to a question with a context: one to three sentences, scored by BM25 over the prompt's own sentences (Robertson and
  Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009, section 3.2) with their passage, its rank
  and its title as a prior; less for code, fragments and changelog lines, more for sentences that define or give
  reasons. They come in the order of the prompt, each run from one passage followed by its mark: `Tuples are immutable.
  [2]`;
- to "Split into simple questions, one a line: Q": the question, cut at its conjunctions, one part a line;
- to "Rewrite as a search query: Q" and the like: the words of the question that carry meaning;
- to "Summarise ...": the sentences nearest to the whole context;
- to "... Answer yes or no": `yes` or `no`, as `choose` would;
- to a question without any context ("Write a passage that answers: Q"): the question without its question words, as a
  statement. It adds no knowledge, and does not pretend to.

How good: of the FAQ questions for which BM25 finds a relevant passage among its four best, the answer quotes a
relevant one for 72 % (quoting always the first passage: 52 %); see tests/backends/llm/test_reader.py.

Temperature, seed and their like change nothing. A token, for `max_tokens`, is a word or a sign.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from flowc.runtime.protocols import BackendInfo, ChooseRequest, GenerateRequest, Generation, IsCancelled, OnText

from .common import check_choice, check_request, plain_chat, speak
from .extract import (
    Passage,
    Ranked,
    Weights,
    coverage,
    inverse_frequencies,
    is_code,
    rank_sentences,
    split_sentences,
    terms,
)

__all__ = ["ReaderBackend", "Reading", "answer", "read_prompt", "split_question", "support"]

NEAR_BEST = 0.62  # a further sentence must reach this share of the best sentence's score ...
NEAR_BEST_ELSEWHERE = 0.78  # ... and this if it comes from another passage
MOST_SENTENCES = 3
MOST_CODE = 40  # tokens of a line of code that an announcing sentence may bring along
ENOUGH_WORDS = 40  # an answer that is this long already takes no further sentence
SUPPORTED = 0.6  # the share of an answer's words, by IDF, that the context must hold to support it
ANSWERED = 0.5  # the share of a question's words, by IDF, that the context must hold for a yes

_TOKEN = re.compile(r"\w+|[^\w\s]")
_MARK = re.compile(
    r"^[ \t]*(?:\w+:[ \t]*)?(?:\[(?:,[ \t])*)?\[?\[(\d+)\][ \t]", re.M
)  # at the start of a line, maybe after "Context:"
_LIST = re.compile(r"^[ \t]*(?:\w+:[ \t]*)?\[(?:,[ \t])*\[\d+\][ \t]", re.M)  # str([docs, ...]), empty results left out
_JOINT = re.compile(
    r"(?:(?:,[ \t])+|\])\[?\[(1)\][ \t]"
)  # such a list puts the end of one result and the start of the next on one line
_PASSAGE_END = re.compile(  # where the last passage ends: an empty line, a cue such as "Answer:", a labelled line
    r"\n[ \t]*\n|\n(?=[ \t]*(?:[\w'-]+[ \t]+){0,3}"
    r"(?:(?i:question|q|answer|draft|task|user|instructions?)[ \t]*:|[\w'-]+[ \t]*:[ \t]*(?:\n|\Z)))"
)
_SENTENCE_BREAK = re.compile(r"\n|[a-z)][.!] |>>>|[{}=]")
_CODE_WORD = re.compile(
    r"[={}<>;]|\b(?:following|this|example|like|follows|is|are|import|by|as|be|to|of|Note|\w{2,20}ed)$"
)
_QUESTION_LINE = re.compile(r"^[ \t]*(?:[\w-]+[ \t]+){0,2}(?:question|q)[ \t]*:[ \t]*(\S.*?)[ \t]*$", re.I | re.M)
_CUE_LINE = re.compile(r"^[ \t]*(?:[\w'-]+[ \t]+){0,4}[\w'-]+[ \t]*:[ \t]*$", re.M)  # "Answer:", "A better answer:"
_LABEL = re.compile(r"^[^?:]{0,100}:\s+(?=\S)")  # "Write a passage that answers: "
_CONTEXT_CUE = re.compile(
    r"^[ \t]*(?:\w+:[ \t]*)?(?:context|facts|notes|sources|passages|documents|background|findings)[ \t]*:", re.I | re.M
)
_SHORT_LABEL = re.compile(r"^(?:[\w'-]+ ){0,2}[\w'-]+: ")  # "Draft: "
_ANSWER = re.compile(
    r"^[ \t]*(?:[\w'-]+[ \t]+){0,2}(?:answer|draft|claim|statement)[ \t]*:[ \t]*(\S(?:.|\n(?![ \t]*\n))*)", re.I | re.M
)
_SPLIT = re.compile(
    r"\b(?:split|break|decompose|divide)\b[^?]*\b(?:sub-?)?questions?\b|\bsub-?questions?\b[^?\n]*:", re.I
)
_KEYWORDS = re.compile(r"\bsearch (?:query|queries|terms)\b|\bkeywords?\b|\bquery for\b|\brewrite\b[^?]*\bquer", re.I)
_SUMMARY = re.compile(r"\b(?:summar[iy]\w*|condense|shorten|tl;?dr|main points?|key points?)\b", re.I)
_TASK = re.compile(f"{_SPLIT.pattern}|{_KEYWORDS.pattern}|{_SUMMARY.pattern}|^(?:You are|Answer|Write|Use) ", re.I)
_YES_OR_NO = re.compile(r"\b(?:yes or no|yes/no|\"yes\" or \"no\"|'yes' or 'no')\b", re.I)
_SUPPORT = re.compile(
    r"\b(?:supports?|supported|grounded|faithful|backed|follow from|entail\w*|sufficient|enough|complete|correct|"
    r"good)\b[^?\n]*\?|\b(?:judge|check|verify|grade)\b",
    re.I,
)
_YES = frozenset("yes y true supported sufficient good pass accept done enough correct relevant".split())
_NO = frozenset("no n false unsupported insufficient bad fail reject continue more incorrect irrelevant not".split())
_QUESTION_HEAD = re.compile(  # "How do I", "Why doesn't", "What is"
    r"^(?:and |so |then |but )?"
    r"(?:(?:what|which|who|whom|whose|when|where|why|how)\b(?:'s|’s)?"
    r"(?: (?:much|many|long|far|often|come|about|exactly))?[ ,]*)?"
    r"(?:(?:do|does|did|can|could|should|would|will|must|may|might|is|are|was|were|am|has|have|had|"
    r"don['’]t|doesn['’]t|didn['’]t|can['’]t|isn['’]t|aren['’]t|won['’]t|shouldn['’]t)\b ?)?"
    r"(?:(?:i|you|we|one|there|it possible to)\b ?)?",
    re.I,
)
_ASKING = (
    r"(?:what|which|who|whom|whose|when|where|why|how|"
    r"is|are|was|were|do|does|did|can|could|should|would|will|must|has|have)\b"
)
_CONJUNCTION = re.compile(
    rf",?\s+(?:and|or|but)(?:\s+(?:also|then))?\s+(?={_ASKING})|;\s+|,\s+(?={_ASKING})|\?\s+",
    re.I,
)
_COMPARED = re.compile(
    r"^(?:what(?:'s| is| are) the )?(?:main |key )?(?:differences? between|compare)\s+"
    r"(.+?)\s+(?:and|with|to|vs\.?|versus)\s+(.+?)[?.]*$",
    re.I,
)


@dataclass(frozen=True, slots=True)
class Reading:
    """A prompt taken apart: what is asked, the passages to answer from, and the words around both."""

    question: str
    passages: tuple[Passage, ...]
    instruction: str


def read_prompt(prompt: str) -> Reading:
    """What a prompt asks and what it gives to answer from."""
    passages, rest = _numbered_passages(_tidy(prompt))
    question, instruction = _find_question(rest)
    if not passages:
        passages, instruction = _bare_paragraphs(instruction)
    return Reading(question, tuple(passages), instruction.strip())


def _tidy(prompt: str) -> str:
    """The prompt without runs of blanks, so that no pattern here takes more than linear time over them."""
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[^\S\n]+", " ", prompt))


def _numbered_passages(prompt: str) -> tuple[list[Passage], str]:
    """The numbered passages, and the prompt with an empty line in place of each."""
    first = _MARK.search(prompt)
    if first is None:
        return [], prompt
    marks = [(m.start(), m.end(), int(m[1])) for m in _MARK.finditer(prompt)]
    if _LIST.search(prompt):
        marks += [(m.start(), m.end(), int(m[1])) for m in _JOINT.finditer(prompt, first.end())]
        marks.sort()
    passages, rest = [], [prompt[: marks[0][0]]]
    for i, (_, begin, number) in enumerate(marks):
        stop, following = marks[i + 1][::2] if i + 1 < len(marks) else (len(prompt), 0)
        # What stands before the passage's successor is its text, empty lines and all; else it ends where prose would.
        end = None if following == number + 1 else _PASSAGE_END.search(prompt, begin, stop)
        done = end.start() if end else stop
        text = prompt[begin:done].strip()
        open_ends = min(text.count("]") - text.count("["), len(text) - len(text.rstrip("]")))
        text = text[: len(text) - max(0, open_ends)].rstrip()  # less the end of a printed list
        if text:
            title, text = _split_title(text)
            passages.append(Passage(f"[{number}]", title, text))
        rest.append(prompt[done:stop])
    return passages, "\n\n".join(rest)


def _split_title(text: str) -> tuple[str, str]:
    """A passage's title and its text: a title is one or two short segments, each closed by a colon and a space."""
    at = segments = 0
    while segments < 2:
        colon = text.find(": ", at, at + 110)
        segment = text[at : max(at, colon)]
        if colon < 0 or len(segment.split()) > 11 or _SENTENCE_BREAK.search(segment) or not text[colon + 2 :].strip():
            break
        if at and _CODE_WORD.search(segment):
            break
        at = colon + 2
        segments += not segment.isdigit()  # a PEP's number stands before its title
    return text[: max(0, at - 2)], text[at:]


def _find_question(text: str) -> tuple[str, str]:
    """The question in the words around the context, and those words without it."""
    labelled = list(_QUESTION_LINE.finditer(text))
    if labelled:
        last = labelled[-1]
        return last[1], text[: last.start()] + text[last.end() :]
    for match in reversed(list(re.finditer(r"^.*\S.*$", text, re.M))):
        sentences = split_sentences(match[0])
        asking = [s for s in sentences if s.rstrip("\"'”’) ").endswith("?")]
        if asking:
            question = _LABEL.sub("", " ".join(asking)) or " ".join(asking)
            at = text.find(question, match.start())
            return question, text[:at] + text[at + len(question) :] if at >= 0 else text.replace(match[0], "")
    paragraphs = [p.strip() for p in re.split(r"\n[ \t]*\n", _CUE_LINE.sub("", text)) if p.strip()]
    if not paragraphs:
        return "", text
    last_paragraph = paragraphs[-1]
    head, colon, body = last_paragraph.partition(":")
    if colon and body.strip() and len(head.split()) <= 14:
        last_paragraph = body.strip()
    at = text.rfind(last_paragraph)
    return last_paragraph, text[:at] + text[at + len(last_paragraph) :] if at >= 0 else text


def _bare_paragraphs(text: str) -> tuple[list[Passage], str]:
    """The paragraphs long enough to hold an answer, for prompts that number no passages, and the others."""
    found, others = [], _CUE_LINE.findall(text)
    context = _CONTEXT_CUE.search(text)
    if context:  # what stands before it is the role and the task
        others.append(text[: context.start()])
        text = text[context.end() :]
    for paragraph in re.split(r"\n[ \t]*\n", _CUE_LINE.sub("\n\n", text)):
        body = " ".join(paragraph.split())
        is_task = context is None and _TASK.search(body)  # a context may well speak of keywords
        if len(body.split()) >= 8 and not body.endswith(":") and not is_task:
            found.append(Passage("", "", _SHORT_LABEL.sub("", body)))
        else:
            others.append(body)
    return found, "\n\n".join(others)


def _choose_sentences(ranked: Sequence[Ranked], budget: int) -> list[Ranked]:
    """The best sentence and up to two that are nearly as good and say something else, within `budget` tokens."""
    chosen: list[Ranked] = []
    if not ranked or ranked[0].score <= 0:
        return chosen
    said: set[str] = set()
    spent = 0
    for candidate in ranked:
        if len(chosen) == MOST_SENTENCES or candidate.score < NEAR_BEST * ranked[0].score:
            break
        cost = count_tokens(candidate.text) + 3  # its mark
        elsewhere = bool(chosen) and candidate.passage != chosen[0].passage
        if elsewhere and candidate.score < NEAR_BEST_ELSEWHERE * ranked[0].score:
            continue
        if chosen and (spent + cost > budget or sum(len(c.text.split()) for c in chosen) >= ENOUGH_WORDS):
            continue
        new = set(terms(candidate.text))
        if chosen and len(new & said) > 0.6 * max(1, len(new)):
            continue
        chosen.append(candidate)
        said |= new
        spent += cost
    return sorted(chosen, key=lambda r: (r.passage, r.position))


def _with_announced_code(chosen: list[Ranked], ranked: Sequence[Ranked], budget: int) -> list[Ranked]:
    """`chosen` with the line of code that follows a sentence ending in a colon, where it is short and fits."""
    by_place = {(r.passage, r.position): r for r in ranked}
    have = {(r.passage, r.position) for r in chosen}
    left = budget - sum(count_tokens(r.text) + 3 for r in chosen)
    out = []
    for sentence in chosen:
        out.append(sentence)
        place = (sentence.passage, sentence.position + 1)
        code = by_place.get(place)
        if sentence.text.endswith(":") and code and place not in have and is_code(code.text):
            cost = count_tokens(code.text)
            if cost <= min(left, MOST_CODE):
                out.append(code)
                left -= cost
    return out


def answer(question: str, passages: Sequence[Passage], max_tokens: int = 256) -> str:
    """One to three sentences of `passages` that answer `question`, in their order, with their marks."""
    ranked = rank_sentences(question, passages)
    chosen = _choose_sentences(ranked, max_tokens)
    chosen = _with_announced_code(chosen, ranked, max_tokens)
    parts = []
    for passage, run in groupby(chosen, key=lambda r: r.passage):
        sentences = list(run)
        text = sentences[0].text.removeprefix("- ")
        for before, after in pairwise(sentences):
            text += (" " if after.position == before.position + 1 else " ... ") + after.text.removeprefix("- ")
        mark = passages[passage].mark
        parts.append(f"{text.rstrip(':').rstrip()} {mark}" if mark else text)
    return " ".join(parts)


def split_question(question: str) -> list[str]:
    """The simple questions in a compound one; the question itself if it is simple.

    >>> split_question("What is a generator and how does it differ from a list?")
    ['What is a generator?', 'How does it differ from a list?']
    >>> split_question("What is the difference between a list and a tuple?")
    ['What is a list?', 'What is a tuple?', 'What is the difference between a list and a tuple?']
    """
    question = " ".join(question.split())
    compared = _COMPARED.match(question)
    if compared:
        return [f"What is {compared[1]}?", f"What is {compared[2].rstrip('?.')}?", question]
    parts = [part.strip(" ,;?.") for part in _CONJUNCTION.split(question)]
    parts = [part for part in parts if part]
    if len(parts) < 2:
        return [question] if question else []
    return [part[0].upper() + part[1:] + "?" for part in parts]


def _statement(question: str) -> str:
    """The question without its question words; it says what is asked for and nothing more."""
    parts = []
    for sentence in split_sentences(question) or [""]:
        words = sentence.strip().rstrip("?!. ")
        rest = _QUESTION_HEAD.sub("", words).strip() or words
        if rest:
            parts.append(rest[0].upper() + rest[1:] + ".")
    return " ".join(parts)


def _keywords(question: str) -> str:
    words = (word.rstrip(".-") for word in re.findall(r"[\w.+#-]+(?:\(\))?", question))
    return " ".join(word for word in words if terms(word)) or question


def support(claim: str, passages: Sequence[Passage]) -> float:
    """The share of the claim's words, weighted by IDF over the context's sentences, that one passage or the best three
    hold.

    Words that the context lacks weigh as much as its rarest word. 1 for a claim quoted from the context, 0 for one
    without shared words.
    """
    units = [terms(s) for p in passages for s in split_sentences(f"{p.title}. {p.text}" if p.title else p.text)]
    idf = inverse_frequencies(units)
    rarest = max(idf.values(), default=1.0)
    words = terms(re.sub(r"\[\d+\]", " ", claim))
    held = sorted(
        ({t for s in split_sentences(f"{p.title}. {p.text}") for t in terms(s)} for p in passages),
        key=lambda have: -coverage(words, have, idf, rarest),
    )
    return coverage(words, set().union(*held[:3]), idf, rarest)


def count_tokens(text: str) -> int:
    return len(_TOKEN.findall(text))


def _says_yes(prompt: str) -> bool:
    """Whether the context bears out what the prompt asks about; the rule of `ReaderBackend.choose`."""
    passages, rest = _numbered_passages(_tidy(prompt))
    labelled = [m[1] for m in _ANSWER.finditer(rest)]
    inline = re.search(
        r"(?:answer|draft|claim|statement)\b[^?\n]{0,80}\?[ \t]*(\S[^\n]*(?:\n(?![ \t]*\n).*)*)", rest, re.I
    )
    claim = labelled[-1] if labelled else inline[1] if inline and _SUPPORT.search(rest) else ""
    if claim:
        claim = re.split(r"\n(?=[^\n]*\?[ \t]*(?:\n|$))", claim)[0]
        if passages:
            return support(claim, passages) >= SUPPORTED
        others, _ = _bare_paragraphs(rest.replace(claim, ""))
        return support(claim, others) >= SUPPORTED if others else bool(re.search(r"\[\d+\]", claim))
    reading = read_prompt(prompt)
    return bool(reading.passages) and support(reading.question, reading.passages) >= ANSWERED


def _compose(prompt: str, max_tokens: int) -> str:
    """The reader's whole answer to a prompt, before limits and stop strings."""
    reading = read_prompt(prompt)
    if _SPLIT.search(reading.instruction):
        return "\n".join(split_question(reading.question))
    if _KEYWORDS.search(reading.instruction):
        return _keywords(reading.question)
    if _YES_OR_NO.search(prompt):
        return "yes" if _says_yes(prompt) else "no"
    if not reading.passages:
        if _SUMMARY.search(reading.instruction):
            return answer("", [Passage("", "", reading.question)], max_tokens)
        return _statement(reading.question)
    asked = "" if _SUMMARY.search(reading.instruction) and "?" not in reading.question else reading.question
    return answer(asked, reading.passages, max_tokens) or _statement(reading.question)


class ReaderBackend:
    """Answers by quoting the prompt: the bundled extractive reader, for the first minute without a model.

    Deterministic, independent of the batch, no dependencies. See the module's text for how it reads and what it says.
    """

    kind = "extractive-reader"

    def __init__(self, *, name: str = "reader", max_batch: int = 64) -> None:
        self.name = name
        self.max_batch = max_batch

    def batch_key(self, request: GenerateRequest) -> Hashable:
        return self.name

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        on_text: OnText | None = None,
        is_cancelled: IsCancelled | None = None,
    ) -> Sequence[Generation | Exception]:
        """Quotes an answer for every prompt, word by word."""
        out: list[Generation | Exception] = []
        for item, request in enumerate(requests):
            try:
                error = check_request(request)
                if error is not None:
                    raise error
                text, reason = _first_tokens(_compose(request.prompt, request.max_tokens), request.max_tokens)
                said = speak(
                    item,
                    text,
                    request,
                    prompt_tokens=count_tokens(request.prompt),
                    count_tokens=count_tokens(text),
                    finish_reason=reason,
                    on_text=on_text,
                    is_cancelled=is_cancelled,
                )
                out.append(said)
            except Exception as e:  # a bad request, or the listener's failure: this item's alone
                out.append(e)
        return out

    def choose(self, requests: Sequence[ChooseRequest]) -> Sequence[int | Exception]:
        """The option that the context speaks for, by overlap of words; ties to the first.

        Where one option says yes and another no (or true and false, supported and unsupported, ...), it is the yes iff

        - the prompt gives an answer to be judged ("Answer: ...", "Does the context support this answer? ...") and the
          context holds at least 60 % of its words by IDF; without any context, iff the answer carries a passage mark;
        - else iff the context holds at least half of the question's words by IDF.

        Otherwise every option scores the best sentence of the context that shares words with it, by that sentence's
        score for the question times the share of the option's words in it; without a context, by its words in the
        question.
        """
        out: list[int | Exception] = []
        for request in requests:
            error = check_choice(request)
            out.append(error if error is not None else _choose(request))
        return out

    def count_tokens(self, text: str) -> int:
        """Words and signs."""
        return count_tokens(text)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        return plain_chat(messages)

    def info(self) -> BackendInfo:
        return BackendInfo(self.name, self.kind, {"note": "quotes sentences of the prompt; not a language model"})

    def close(self) -> None:
        """Nothing is held open."""


def _choose(request: ChooseRequest) -> int:
    heads = [next(iter(re.findall(r"\w+", option.lower())), "") for option in request.options]
    yes = next((i for i, head in enumerate(heads) if head in _YES), None)
    no = next((i for i, head in enumerate(heads) if head in _NO), None)
    if yes is not None and no is not None:
        return yes if _says_yes(request.prompt) else no
    reading = read_prompt(request.prompt)
    passages = reading.passages or (Passage("", "", reading.question),)
    ranked = rank_sentences(reading.question, passages, Weights(rank=0.0, lead=0.0))  # what is said counts, not where
    sentences = [(r.score, set(terms(r.text))) for r in ranked]
    idf = inverse_frequencies([unit for _, unit in sentences])

    def score(option: str) -> float:
        wanted = terms(option)
        return max(((s + 1e-6) * coverage(wanted, unit, idf, 1.0) for s, unit in sentences), default=0.0)

    return max(range(len(request.options)), key=lambda i: score(request.options[i]))


def _first_tokens(text: str, limit: int) -> tuple[str, str]:
    """`text` cut after `limit` tokens, and why it ends."""
    ends = [m.end() for m in _TOKEN.finditer(text)]
    if len(ends) <= limit:
        return text, "stop"
    return (text[: ends[limit - 1]] if limit else ""), "length"
