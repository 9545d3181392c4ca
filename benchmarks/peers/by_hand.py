"""The workloads of `examples/` as a careful engineer writes them without a compiler, for benchmarks/workloads.py.

Each takes `ops`, whose calls give futures (`.result()`): LangGraph's tasks, or those of a thread pool. What is
independent is started together, as its documentation shows it; nothing is reordered across statements by magic. The
answers are those of the workflows in `examples/`, word for word: the benchmark checks that.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from examples import agent_chain as chain
from examples import planner_coder, react, text_to_sql, tree_search, troubleshooting
from flowc.dsl.agent import ANSWER, OBSERVATION, read_action


class Future(Protocol):
    def result(self) -> Any: ...


class Ops(Protocol):
    """Calls of the models and the index; each gives a future."""

    def search(self, query: str, k: int) -> Future: ...
    def generate(self, prompt: str, max_tokens: int, stop: tuple[str, ...] = ()) -> Future: ...
    def choose(self, prompt: str, options: Sequence[str]) -> Future: ...


Program = Callable[[Ops, str], str]


def _ask(ops: Ops, context: object, question: str, max_tokens: int) -> Future:
    return ops.generate(f"Context:\n{context}\n\nQuestion: {question}\nAnswer:", max_tokens)


def _agent(ops: Ops, system: str, task: str, max_tokens: int) -> Future:
    return ops.generate(f"{system}\n\nTask: {task}\n{ANSWER}", max_tokens)


def one_shot(ops: Ops, question: str) -> str:
    passages = ops.search(question, 4).result()
    return str(_ask(ops, passages, question, 96).result())


def hyde(ops: Ops, question: str) -> str:
    hypothetical = ops.generate(f"Write a short passage that answers: {question}", 64).result()
    passages = ops.search(f"{question} {hypothetical}", 4).result()
    return str(_ask(ops, passages, question, 96).result())


def sub_questions(ops: Ops, question: str) -> str:
    parts = ops.generate(f"Split into simple questions, one a line:\n{question}", 64).result().splitlines()
    asked = [part for part in parts[:4] if part.strip()]
    found = [ops.search(part, 3) for part in asked]
    notes = [_ask(ops, passages.result(), part, 64) for part, passages in zip(asked, found, strict=True)]
    context = "\n\n".join(note.result() for note in notes)
    return str(_ask(ops, context, question, 128).result())


def iterative(ops: Ops, question: str) -> str:
    passages = ops.search(question, 3).result()
    draft = _ask(ops, passages, question, 96).result()
    for _ in range(3):
        prompt = f"Context:\n{passages}\n\nAnswer: {draft}\nDoes the context support it?"
        if ops.choose(prompt, ("yes", "no")).result() == "yes":
            break
        passages = ops.search(f"{question} {draft}", 4).result()
        draft = _ask(ops, passages, question, 96).result()
    return str(draft)


def iter_retgen(ops: Ops, question: str) -> str:
    answer = ""
    for _ in range(3):
        passages = ops.search(f"{question} {answer}", 4).result()
        answer = _ask(ops, passages, question, 64).result()
    return answer


def multistep(ops: Ops, question: str) -> str:
    known = ""
    for step in range(3):
        following = ops.generate(
            f"Question: {question}\nKnown so far:\n{known}\nSub-question {step + 1}, one line:", 24
        ).result()
        passages = ops.search(f"{question} {following}", 3).result()
        found = _ask(ops, passages, following, 48).result()
        known += f"- {following.strip()}: {found}\n"
        if ops.choose(f"{known}\nIs this enough to answer: {question}?", ("yes", "no")).result() == "yes":
            break
    return str(_ask(ops, known, question, 96).result())


def recomp(ops: Ops, question: str) -> str:
    passages = ops.search(question, 4).result()
    asked = [_ask(ops, passage, f"What here helps with: {question}", 32) for passage in passages]
    notes = [note.result().strip() for note in asked]
    return str(_ask(ops, "\n".join(f"- {note}" for note in notes if note), question, 64).result())


def flare(ops: Ops, question: str) -> str:
    passages = ops.search(question, 3).result()
    written = ""
    for _ in range(3):
        prompt = f"Context:\n{passages}\n\nQuestion: {question}\nAnswer: {written}"
        sentence = ops.generate(prompt, 24, ("\n",)).result()
        if ops.choose(f"{prompt}{sentence}\nIs the last sentence certain?", ("yes", "no")).result() == "no":
            passages = ops.search(sentence or question, 3).result()
            prompt = f"Context:\n{passages}\n\nQuestion: {question}\nAnswer: {written}"
            sentence = ops.generate(prompt, 24, ("\n",)).result()
        written += f"{sentence} "
    return written


def self_rag(ops: Ops, question: str) -> str:
    needed = ops.choose(f"Question: {question}\nDoes answering it need the documentation?", ("yes", "no"))
    if needed.result() == "no":
        return str(_ask(ops, question, question, 64).result())
    supported, others, started = [], [], []
    for passage in ops.search(question, 3).result():
        about = f"Context:\n{passage}\n\nQuestion: {question}\n"
        relevance = ops.choose(f"{about}Is the context relevant?", ("yes", "no"))
        started.append((about, relevance, ops.generate(f"{about}Answer:", 48)))
    answers = [answer.result() for _, _, answer in started]
    supports = [
        ops.choose(f"{about}Answer: {answer}\nIs it supported?", ("fully", "partly", "not"))
        for (about, _, _), answer in zip(started, answers, strict=True)
    ]
    for (_, relevance, _), answer, support in zip(started, answers, supports, strict=True):
        kept = relevance.result() == "yes" and support.result() != "not"
        (supported if kept else others).append(answer)
    return "\n".join(supported or others)


def three_agents(ops: Ops, question: str) -> str:
    first, second = ops.search(question, 4), ops.search(f"example: {question}", 2)
    context = f"{first.result()}\n{second.result()}"
    facts = _agent(
        ops,
        "You pick the facts that matter out of the context.",
        f"Context:\n{context}\n\nQuestion: {question}",
        128,
    ).result()
    draft = _agent(
        ops,
        "You answer from the given facts, and from nothing else.",
        f"Context:\n{facts}\n\nQuestion: {question}",
        96,
    ).result()
    task = f"Context:\n{draft}\n\nQuestion: {question}"
    return str(_agent(ops, "You shorten a text and keep its meaning.", task, 64).result())


def agent_chain(ops: Ops, question: str) -> str:
    def say(role: str, context: str) -> Future:
        system = f"{chain.ROLES[role]} You are careful, brief and never invent anything."
        return _agent(ops, system, f"Context:\n{context}\n\nQuestion: {question}", 32)

    facts = say("reader", ops.search(question, 3).result()).result()
    sound = say("sceptic", facts).result()
    taught, dated = say("teacher", sound), say("historian", sound)
    lesson, version = taught.result(), dated.result()
    program = say("coder", f"{lesson}\n{version}").result()
    shown = say("tester", program).result()
    gaps = say("critic", f"{lesson}\n{program}\n{shown}").result()
    text = say("writer", f"{lesson}\n{program}\n{shown}\n{gaps}").result()
    return str(say("publisher", say("editor", text).result()).result())


def fan_in(ops: Ops, question: str) -> str:
    views = ("correctness", "speed", "readability", "safety")
    context = f"Context:\n{ops.search(question, 4).result()}\n\nQuestion: {question}\n"
    reports = [ops.generate(f"{context}Report on {view} only.\nAnswer:", 48) for view in views]
    joined = "\n".join(f"{view}: {report.result()}" for view, report in zip(views, reports, strict=True))
    return str(_ask(ops, joined, question, 64).result())


def tree_of_thoughts(ops: Ops, question: str) -> str:
    frontier = [f"Context:\n{ops.search(question, 2).result()}\n\nQuestion: {question}\n"]
    for _ in range(2):
        asked = [f"{path}{hint}\nAnswer:" for path in frontier for hint in tree_search.HINTS]
        written = [ops.generate(prompt, 24) for prompt in asked]
        thoughts = [f"{prompt}{text.result()}\n" for prompt, text in zip(asked, written, strict=True)]
        grades = [ops.choose(f"{thought}How good is the last thought?", tree_search.GRADES) for thought in thoughts]
        frontier = tree_search.best(thoughts, [grade.result() for grade in grades], 2)
    return str(ops.generate(f"{frontier[0]}In short.\nAnswer:", 48).result())


def reason_and_act(ops: Ops, question: str) -> str:
    solver = react.solver
    task = f"Context:\n{ops.search(question, 3).result()}\n\nQuestion: {question}"
    transcript = f"{solver._preamble()}\n\nTask: {task}\n"
    for _ in range(4):
        reply = ops.generate(transcript, 48, (OBSERVATION,)).result()
        action = read_action(reply, solver.toolbox.names)
        if not action.tool:
            return action.text
        observation = solver.toolbox(action.tool, action.arguments)
        transcript = f"{transcript}{reply}\n{OBSERVATION} {observation}\n"
    raise RuntimeError("no answer")


def plan_and_code(ops: Ops, question: str) -> str:
    coder = "You write one Python program, and nothing else."
    passages = ops.search(question, 3).result()
    task = f"Context:\n{passages}\n\nQuestion: {question}"
    plan = _agent(ops, "You write a plan of three short steps.", task, 48).result()
    program = _agent(ops, coder, f"Context:\n{passages}\n{plan}\n\nQuestion: {question}", 64).result()
    for _ in range(2):
        complaint = planner_coder.check(program)
        if not complaint:
            break
        task = f"Context:\n{passages}\n{plan}\n{program}\n\nQuestion: {question} It fails with: {complaint}"
        program = _agent(ops, coder, task, 64).result()
    return str(program)


def debate(ops: Ops, question: str) -> str:
    context = f"Context:\n{ops.search(question, 3).result()}"
    pro = con = ""
    for _ in range(2):
        said = f"{context}\nFor: {pro}\nAgainst: {con}\n\nQuestion: {question}"
        both = (
            _agent(ops, "You argue for the proposal, from the context alone.", said, 48),
            _agent(ops, "You argue against the proposal, from the context alone.", said, 48),
        )
        pro, con = (one.result() for one in both)
    winner = ops.choose(f"{context}\nFor: {pro}\nAgainst: {con}\nWho is right?", ("for", "against")).result()
    return f"{winner}: {pro if winner == 'for' else con}"


def map_reduce(ops: Ops, question: str) -> str:
    asked = [_ask(ops, passage, question, 32) for passage in ops.search(question, 8).result()]
    notes = [note.result() for note in asked]
    while len(notes) > 1:
        pairs = ["\n".join(notes[i : i + 2]) for i in range(0, len(notes), 2)]
        merged = [_ask(ops, pair, question, 32) for pair in pairs]
        notes = [note.result() for note in merged]
    return str(notes[0])


def sql(ops: Ops, question: str) -> str:
    system = f"You write one SQLite query. The schema: {text_to_sql.SCHEMA}"
    text = _agent(ops, system, f"Question: {question}", 48).result()
    for _ in range(2):
        try:
            return f"{text.strip()}\n{text_to_sql.query(text)}"
        except sqlite3.Error as error:
            task = f"Question: {question}\nThis failed: {text}\nThe error: {error}"
            text = _agent(ops, system, task, 48).result()
    return f"{text_to_sql.FALLBACK}\n{text_to_sql.query(text_to_sql.FALLBACK)}"


def guide(ops: Ops, question: str) -> str:
    general = ops.search(question, 2)
    kind = ops.choose(f"Problem: {question}\nWhat is it about?", troubleshooting.KINDS).result()
    if kind == "import":
        special = ops.search(f"module search path {question}", 2).result()
        advice = _ask(ops, special, f"Where does {question} look?", 32).result()
    elif kind == "performance":
        special = ops.search(f"profile time {question}", 2).result()
        prompt = f"Context:\n{special}\nIs the time spent in Python or in waiting?"
        slow = ops.choose(prompt, ("python", "waiting")).result()
        advice = _ask(ops, special, f"What if it is {slow}?", 32).result()
    elif kind == "concurrency":
        special = ops.search(f"threads locks {question}", 2).result()
        advice = _ask(ops, special, f"Which lock for {question}?", 32).result()
    else:
        advice = "No special guide applies."
    return str(_ask(ops, f"{general.result()}\n{advice}", question, 64).result())


PROGRAMS: dict[str, Program] = {
    "one_shot": one_shot,
    "hyde": hyde,
    "sub_questions": sub_questions,
    "iterative": iterative,
    "iter_retgen": iter_retgen,
    "multistep": multistep,
    "recomp": recomp,
    "flare": flare,
    "self_rag": self_rag,
    "three_agents": three_agents,
    "agent_chain": agent_chain,
    "fan_in": fan_in,
    "tree_search": tree_of_thoughts,
    "react": reason_and_act,
    "planner_coder": plan_and_code,
    "debate": debate,
    "map_reduce": map_reduce,
    "text_to_sql": sql,
    "troubleshooting": guide,
}
"""By the stem of the example's file."""
