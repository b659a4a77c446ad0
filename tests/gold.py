"""Traces that need no model: gold traces of dataset records, their negatives, and hacks of the reward.

A step is a call with a scripted observation. Each turn is written as text, read by the parser and answered by a
scripted backend. From the repository root, `python tests/gold.py` prints how the reward rates all traces.
"""
import argparse
import html
import json
import os
import random
import re
import sys
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agents import UTILITIES, Tool, Trace, parse_turn, run_calls
from data.schema import object_schema
from data.score import exact_match

CASES = Path(__file__).resolve().parent / "cases"
REAL = os.environ.get("MTR_REAL", "")
TEXT = {"type": "string"}

# ---------------------------------------------------------------------------------------------- texts


def fold(text):
    """The words of a text in lower case, without accents, separated by single spaces."""
    letters = unicodedata.normalize("NFKD", text)
    plain = "".join(c for c in letters if not unicodedata.combining(c)).lower()
    return " ".join(re.findall(r"[^\W_]+", plain))


def bare(title):
    """A title without its parenthesis: "Jaws (film)" -> "Jaws"."""
    return re.sub(r" \([^)]*\)$", "", title)


def told(name, text):
    """Whether a text holds a name as whole words."""
    return f" {fold(bare(name))} " in f" {fold(text)} "


STARTS = {"a", "an", "the", "in", "on", "at", "he", "she", "it", "his", "her", "its", "they", "this", "when", "while",
          "after", "before", "by", "for", "from", "as", "and", "are", "is", "was", "were", "do", "does", "did", "who",
          "what", "which", "where", "how", "both", "with", "other", "alexander", "during", "all", "aside", "also"}
NAME = re.compile(r"[A-ZÀ-ÞŁŻ][\w.-]*(?: [A-ZÀ-ÞŁŻ][\w.-]*)*")


def names(text, least=2):
    """The names of a text: runs of at least `least` capitalised words, each once, in their order."""
    found = []
    for run in NAME.findall(text.replace("’", "'")):
        parts = run.strip(".-").split(" ")
        while parts and fold(parts[0]) in STARTS:
            parts = parts[1:]
        name = " ".join(parts)
        if len(parts) >= least and len(name) > 3 and name not in found:
            found.append(name)
    return found


def numbers(text):
    """The different whole numbers of two to four digits in a text, in their order."""
    return list(dict.fromkeys(int(n) for n in re.findall(r"(?<![\d.,–-])\d{2,4}(?![\d,–-])", text) if n[0] != "0"))


# -------------------------------------------------------------------------------------------- records


@cache
def records(name):
    """The records of "2wiki", "hotpot" or "musique". The last two are real and need MTR_REAL; without it: none."""
    if name == "2wiki":
        return json.loads((CASES / "2wiki.json").read_text(encoding="utf-8"))
    if not REAL:
        return []
    if name == "hotpot":
        path = Path(REAL) / "qa" / "hotpot_dev_distractor_v1.first53.json"
        return json.loads(path.read_text(encoding="utf-8"))
    path = Path(REAL) / "qa" / "musique_train.sample100.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def golds(record):
    return [record["answer"], *record.get("answer_aliases", [])]


def pages(record):
    """(title, text, whether it is supporting) of each paragraph of a record."""
    if "paragraphs" in record:
        return [(p["title"], p["paragraph_text"], p["is_supporting"]) for p in record["paragraphs"]]
    join = " " if "evidences" in record else ""
    needed = {title for title, _ in record["supporting_facts"]}
    return [(html.unescape(title), html.unescape(join.join(sentences)), title in needed)
            for title, sentences in record["context"]]


# ---------------------------------------------------------------------------------------------- tools


def tool(name, description, returns, **parameters):
    return Tool(name, description, object_schema(**parameters), object_schema(**{returns: TEXT}))


SEARCH = tool("search", "Search an encyclopedia.", "text", query=TEXT)
LOOKUP = tool("lookup", "Look up a property of a subject.", "value", subject=TEXT, property=TEXT)
# 2Wiki's relations: the parameter of the relation's own tool, and a sentence.
RELATIONS = {
    "director": ("film", "{0} was directed by {1}."),
    "composer": ("work", "The music of {0} is by {1}."),
    "performer": ("song", "{0} is a song recorded by {1}."),
    "publication date": ("work", "{0} was first shown on {1}."),
    "founded by": ("organization", "{0} was set up by {1}."),
    "inception": ("organization", "{0} was established in {1}."),
    "country": ("place", "{0} lies in {1}."),
    "country of citizenship": ("person", "{0} is a citizen of {1}."),
    "date of birth": ("person", "{0} was born on {1}."),
    "date of death": ("person", "{0} died on {1}."),
    "place of birth": ("person", "{0} was born in {1}."),
    "place of death": ("person", "{0} died in {1}."),
    "father": ("person", "{0} is a child of {1}."),
    "mother": ("person", "{0} is a child of {1}."),
    "spouse": ("person", "{0} was married to {1}."),
    "educated at": ("person", "{0} studied at {1}."),
}
RELATION_TOOLS = {
    relation: tool(relation.replace(" ", "_"), f"Look up the {relation}.", relation.replace(" ", "_"), **{of: TEXT})
    for relation, (of, _) in RELATIONS.items()}

# ---------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Step:
    """A call and its scripted result. A utility tool has code and needs none."""
    tool: Tool
    arguments: dict
    observation: dict | None = None


def play(question, steps, answer, tools=()):
    """The trace of a policy that makes these calls, one per turn, and then answers. A step may be a list: one turn."""
    turns = [step if isinstance(step, list) else [step] for step in steps]
    offered = {step.tool.name: step.tool for turn in turns for step in turn if step.tool is not UNKNOWN}
    trace = Trace(question, list({**offered, **{tool.name: tool for tool in tools}}.values()))
    for turn in turns:
        bodies = [json.dumps({"name": step.tool.name, "arguments": step.arguments}, ensure_ascii=False)
                  for step in turn]
        add_turn(trace, "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies))
        scripted = [step.observation for step in turn if step.tool.run is None and step.tool is not UNKNOWN]
        run_calls([trace], lambda requests, left=scripted: [left.pop(0) for _ in requests])
    add_turn(trace, f"<answer>{answer}</answer>")
    trace.status = "answered"
    return trace


def add_turn(trace, text):
    turn = parse_turn(f"<think>Let me see.</think>\n{text}")
    assert turn.error is None, (turn.error, text)
    trace.turns.append(turn)


UNKNOWN = tool("web_browser", "Open a page.", "text", page=TEXT)  # never offered: its calls are refused


def page_step(title, text):
    return Step(SEARCH, {"query": title}, {"text": text})


def triple_step(triple, form):
    """The call that finds out a triple of 2Wiki, in one of three forms."""
    subject, relation, value = triple
    of, sentence = RELATIONS[relation]
    if form == "2wiki tool":
        made = RELATION_TOOLS[relation]
        return Step(made, {of: subject}, {made.name: value})
    if form == "2wiki lookup":
        return Step(LOOKUP, {"subject": subject, "property": relation}, {"value": value})
    return Step(SEARCH, {"query": f"{subject} {relation}"}, {"text": sentence.format(subject, value)})


def sub_questions(record):
    """(query, index of its paragraph) of each hop of a record of MuSiQue. #1 is replaced by the first answer."""
    hops = record["question_decomposition"]
    out = []
    for hop in hops:
        query = re.sub(r"#(\d)", lambda match: hops[int(match[1]) - 1]["answer"], hop["question"])
        out.append((query, hop["paragraph_support_idx"]))
    return out


# Form: the set whose records it is made from.
FORMS = {"hotpot title": "hotpot", "2wiki tool": "2wiki", "2wiki lookup": "2wiki", "2wiki search": "2wiki",
         "musique question": "musique", "musique title": "musique"}


def gold_steps(record, form, order="named"):
    """One step per supporting paragraph or triple. order: "given", or "named": what the question names comes first,
    then what was named by the results so far."""
    if form == "musique question":
        texts = {p["idx"]: p["paragraph_text"] for p in record["paragraphs"]}
        return [page_step(query, texts[number]) for query, number in sub_questions(record)]
    if FORMS[form] == "2wiki":
        named = [(triple[0], triple_step(triple, form)) for triple in record["evidences"]]
    else:
        named = [(title, page_step(title, text)) for title, text, needed in pages(record) if needed]
    return [step for _, step in (named if order == "given" else arrange(named, record["question"]))]


def arrange(named, question):
    """(name, step) pairs in the order in which an agent could come upon the names."""
    left, out, read = list(named), [], question

    def known(pair):
        words = fold(bare(pair[0])).split()
        return told(pair[0], question), told(pair[0], read), sum(told(w, read) for w in words) / len(words)

    while left:
        best = max(left, key=known)
        left.remove(best)
        out.append(best)
        read += " " + json.dumps(best[1].observation, ensure_ascii=False)
    return out


def distractor_steps(record, form):
    """As many steps as the gold trace has, with paragraphs or triples that do not help."""
    gold = gold_steps(record, form)
    if FORMS[form] == "2wiki":
        return [triple_step(triple, form) for triple in record["distractor_evidences"]][:len(gold)]
    others = [(title, text) for title, text, needed in pages(record) if not needed]
    if form == "musique question":  # the same queries, other results
        queries = [step.arguments["query"] for step in gold]
        return [page_step(query, text) for query, (_, text) in zip(queries, others, strict=False)]
    return [page_step(title, text) for title, text in others[:len(gold)]]


# --------------------------------------------------------------------------------------------- traces


def useless_step(record):
    """A search for a plain word of the question. Its result is a distractor."""
    plain = [w for w in re.findall(r"\b[a-z]{4,}\b", record["question"]) if w not in STARTS]
    others = [text for _, text, needed in pages(record) if not needed]
    text = others[-1] if others else "Nothing was found."
    return page_step(plain[-1] if plain else record["question"].split()[-1].strip("?"), text)


def gold_traces(record, form, order="named"):
    """The gold trace and its variants, by name. All of them give the gold answer."""
    steps = gold_steps(record, form, order)
    refused = Step(UNKNOWN, {"page": bare(pages(record)[0][0])})
    variants = {"gold": steps, "a useless call": [useless_step(record), *steps], "a refused call": [refused, *steps],
                "distractors before": distractor_steps(record, form) + steps,
                "a repeated call": [steps[0], *steps]}
    return {name: play(record["question"], made, record["answer"]) for name, made in variants.items()}


def twin(trace):
    """The same question, tools and answer, without a call."""
    return play(trace.question, [], trace.answer, trace.tools)


def distractor_traces(record, form):
    """The gold answer after distractors only."""
    return play(record["question"], distractor_steps(record, form), record["answer"])


def other_answer(record):
    """Another name of the last gold paragraph, or None."""
    steps = gold_steps(record, "hotpot title" if "paragraphs" not in record else "musique title")
    for name in names(steps[-1].observation["text"]):
        clash = told(name, record["question"]) or any(told(name, g) or told(g, name) for g in golds(record))
        if not clash:
            return name
    return None


# ---------------------------------------------------------------------------------------------- table


def mean(values):
    values = [0.0 if value is None else value for value in values]
    return sum(values) / len(values) if values else float("nan")


def rate_forms(verbose):
    import grpo
    config = grpo.GRPOConfig()

    def rate(trace, record):
        return grpo.reward(trace, golds(record), config)

    print(f"{'gold form':18}{'n':>4}{'arguments':>11}{'support':>9}{'economy':>9}{'distractors':>13}")
    for form, name in FORMS.items():
        rows = records(name)
        got = [rate(gold_traces(record, form)["gold"], record) for record in rows]
        wrong = [rate(distractor_traces(record, form), record)["support"] for record in rows]
        means = [mean([row[part] for row in got]) for part in ("arguments", "support", "economy")]
        print(f"{form:18}{len(rows):4}{means[0]:11.2f}{means[1]:9.2f}{means[2]:9.2f}{mean(wrong):13.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--verbose", action="store_true", help="list the examples that fail")
    rate_forms(parser.parse_args().verbose)
