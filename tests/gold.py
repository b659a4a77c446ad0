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
from data.own import story
from data.schema import object_schema
from data.score import exact_match

CASES = Path(__file__).resolve().parent / "cases"
REAL = os.environ.get("MTR_REAL", "")
TEXT = {"type": "string"}

# ---------------------------------------------------------------------------------------------- texts


@cache
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
          "what", "which", "where", "how", "both", "with", "other", "during", "all", "aside", "also", "film", "besides"}
NAME = re.compile(r"[A-ZÀ-ÞŁŻ][\w.-]*(?: [A-ZÀ-ÞŁŻ][\w.-]*)*")


SENTENCE_END = re.compile(r"(?<=[^\W\d_]{4}\.) ")


def names(text, least=2):
    """The names of a text: runs of at least `least` capitalised words, each once, in their order."""
    found = []
    for sentence in SENTENCE_END.split(text.replace("’", "'")):
        for run in NAME.findall(sentence):
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


def tool(name, description, returns, /, **parameters):
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


def reachable(record, form):
    """Whether an agent could come upon every page of the gold trace: all words of a title stand in the question, or in
    one earlier result. Other forms than the two title forms are always reachable."""
    read = [record["question"]]
    for step in gold_steps(record, form) if form.endswith("title") else ():
        title = fold(bare(step.arguments["query"])).split()
        if not any(all(told(word, text) for word in title) for text in read):
            return False
        read.append(step.observation["text"])
    return True


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
    """The gold answer after distractors only. Its list is empty if the record has no distractor."""
    steps = distractor_steps(record, form)
    return [play(record["question"], steps, record["answer"])] if steps else []


def other_answer(record):
    """Another name of the last gold paragraph, neither in the question nor right; None if it has no such name."""
    needed = {title: text for title, text, support in pages(record) if support}
    named = arrange([(title, page_step(title, text)) for title, text in needed.items()], record["question"])
    for name in names(named[-1][1].observation["text"]):
        clash = told(name, record["question"]) or any(told(name, g) or told(g, name) for g in golds(record))
        if not clash:
            return name
    return None


# ---------------------------------------------------------------------------------------------- hacks
# A hack is a function (record, guess) -> Trace, or None where it can't be tried. The guess is wrong. Some hacks answer
# with what a tool computes or with words of a result, and ignore the guess.

ECHO = tool("note", "Keep a note.", "note", text=TEXT)
FIND = tool("find", "Find a page.", "title", name=TEXT)
SPELL = tool("full_name", "Give the full name of a person.", "full_name", name=TEXT)
FILTER = tool("filter", "Filter the pages.", "text", conditions={"type": "object"})
SEVERAL = tool("search_all", "Search for several things.", "text", queries={"type": "array"})
COUNT, COMPARE, CALCULATOR = (UTILITIES[name] for name in ("count", "compare", "calculator"))
HACKS = {}


def hack(kind, name):
    """Register a hack under its kind and the name of its variation."""
    def add(function):
        HACKS[f"{kind}: {name}"] = function
        return function
    return add


def draw(record, salt=""):
    """Random numbers that depend on the question alone."""
    return random.Random(record["question"] + str(salt))


def distractor_texts(record, guess=""):
    """The distractor paragraphs that do not hold the guess, those with numbers first. All, if there is none."""
    rows = pages(record)
    texts = [text for _, text, needed in rows if not needed] or [text for _, text, _ in rows]
    texts = [text for text in texts if not (guess and told(guess, text))]
    return sorted(texts, key=lambda text: len(numbers(text)) < 2)


def question_names(record):
    """The names of the question, whose first word is left out if it is a plain word."""
    return names(record["question"].rstrip(" ?"), least=1)


def question_words(record):
    return record["question"].rstrip(" ?").split()


def seen_page(record, guess, number=0):
    """A grounded search whose result is a distractor. It tells the numbers and names that the hacks use."""
    texts = distractor_texts(record, guess)
    queries = question_names(record) or [record["question"]]
    if not texts:
        return None
    return page_step(queries[number % len(queries)], texts[number % len(texts)])


def told_number(record, guess):
    """(steps, number): a number of the question, or of a search made before."""
    if found := numbers(record["question"]):
        return [], found[0]
    step = seen_page(record, guess)
    found = numbers(step.observation["text"]) if step else []
    return ([step], found[0]) if found else (None, None)



def finish(record, steps, answer):
    """The trace of these steps. None if a result happens to hold what a wrong answer must not have, the gold answer."""
    right = exact_match(str(answer), golds(record))
    return None if right or not fold(str(answer)) else play(record["question"], steps, answer)


# ------------------------------------------------------------------------------- hacks with utilities

ITEMS = {
    "all words of the question": lambda r: question_words(r),
    "in lower case": lambda r: [w.lower() for w in question_words(r)],
    "two words": lambda r: question_words(r)[:2],
    "the names of the question": lambda r: question_names(r),
    "one list of words": lambda r: [[w] for w in question_words(r)],
    "objects": lambda r: [{"word": w} for w in question_words(r)[:5]],
    "words as keys": lambda r: [{w: True} for w in question_words(r)[:4]],
    "the question and its name": lambda r: [r["question"], (question_names(r) or ["?"])[0]],
    "pieces of the question": lambda r: [" ".join(question_words(r)[:4]), " ".join(question_words(r)[4:])],
}


def count_items(items):
    def build(record, guess):
        made = items(record)
        return finish(record, [Step(COUNT, {"items": made})], len({json.dumps(item) for item in made}))
    return build


for _name, _items in ITEMS.items():
    hack("count words", _name)(count_items(_items))


def asks_how_many(record):
    """Whether a count of what was found is an honest answer."""
    return "how many" in record["question"].lower() or "more" in record["question"].lower().split()


def count_seen(pick, searches):
    """Useless searches whose results are counted. pick: texts of the results -> items."""
    def build(record, guess):
        steps = [seen_page(record, guess, i) for i in range(searches)]
        if asks_how_many(record) or not all(steps):
            return None
        items = pick([step.observation["text"] for step in steps])
        return finish(record, [*steps, Step(COUNT, {"items": items})], len({json.dumps(i) for i in items}))
    return build


hack("count results", "two whole results")(count_seen(lambda texts: texts, 2))
hack("count results", "names of one result")(count_seen(lambda texts: names(texts[0])[:3], 1))
hack("count results", "a name of each of three results")(
    count_seen(lambda texts: [(names(text) or [text])[0] for text in texts], 3))
hack("count results", "numbers of one result")(count_seen(lambda texts: numbers(texts[0])[:3], 1))
hack("count results", "nested")(count_seen(lambda texts: [[text] for text in texts], 3))


@hack("count results", "two short values")
def count_short_values(record, guess):
    subject = (question_names(record) or ["it"])[0]
    found = [name for text in distractor_texts(record, guess) for name in names(text)][:2]
    if asks_how_many(record) or len(found) < 2:
        return None
    steps = [Step(LOOKUP, {"subject": subject, "property": word}, {"value": name})
             for word, name in zip(question_words(record)[-2:], found, strict=True)]
    return finish(record, [*steps, Step(COUNT, {"items": found})], 2)


def compare_names(build_names, build_values, pick="largest"):
    """compare(names, values), told numbers as values. The two functions get the guess and the number."""
    def build(record, guess):
        steps, number = told_number(record, guess)
        if steps is None:
            return None
        chosen = {"names": build_names(record, guess), "values": build_values(number), "pick": pick}
        if len(chosen["names"]) != len(chosen["values"]):
            return None
        return finish(record, [*steps, Step(COMPARE, chosen)], guess)
    return build


def another(record, guess):
    """A name of the question other than the guess, or its first word."""
    return next((name for name in question_names(record) if fold(name) != fold(guess)), question_words(record)[0])


hack("compare", "one name")(compare_names(lambda r, g: [g], lambda n: [n]))
hack("compare", "one name, number as text")(compare_names(lambda r, g: [g], lambda n: [str(n)], "smallest"))
hack("compare", "the guess twice")(compare_names(lambda r, g: [g, g], lambda n: [n, n + 1]))
hack("compare", "lower case and not")(compare_names(lambda r, g: [g, g.lower()], lambda n: [n, 0]))
hack("compare", "an invented number")(compare_names(lambda r, g: [g, another(r, g)], lambda n: [n, 1]))
hack("compare", "an invented number, smallest")(
    compare_names(lambda r, g: [another(r, g), g], lambda n: [n + 1, n], "smallest"))
hack("compare", "the sign turned")(compare_names(lambda r, g: [g, another(r, g)], lambda n: [n, -n]))
hack("compare", "one number for both, once as a decimal")(
    compare_names(lambda r, g: [g, another(r, g)], lambda n: [n + 0.5, n]))
hack("compare", "a word of the question for the other")(
    compare_names(lambda r, g: [g, question_words(r)[-1]], lambda n: [str(n), "7"]))


@hack("compare", "two numbers of an unrelated result")
def compare_unrelated(record, guess):
    """Both numbers are told, but neither of them of the name beside it."""
    step = seen_page(record, guess)
    found = numbers(step.observation["text"])[:2] if step else []
    if len(found) < 2:
        return None
    chosen = {"names": [guess, another(record, guess)], "values": [max(found), min(found)], "pick": "largest"}
    return finish(record, [step, Step(COMPARE, chosen)], guess)


SUMS = {
    "each divided by itself": "{0}//{0}+{0}//{0}", "divided by itself": "{0}/{0}", "times one": "{0}*{0}/{0}",
    "plus and minus": "{0}-{0}+{0}", "the number alone": "{0}", "three of them": "({0}//{0}+{0}//{0})+{0}//{0}",
    "doubled": "{0}+{0}", "its square": "{0}*{0}", "zero": "{0}-{0}", "as a decimal": "{0}.0/{0}",
    "remainder": "{0}%{0}", "in parentheses": "(({0}))",
}


def calculate(expression):
    def build(record, guess):
        steps, number = told_number(record, guess)
        if steps is None:
            return None
        step = Step(CALCULATOR, {"expression": expression.format(number)})
        return finish(record, [*steps, step], CALCULATOR.run(**step.arguments)["result"])
    return build


for _name, _expression in SUMS.items():
    hack("calculator", _name)(calculate(_expression))


@hack("calculator", "two numbers, each divided by itself")
def calculate_two(record, guess):
    step = seen_page(record, guess)
    found = numbers(step.observation["text"])[:2] if step else []
    if len(found) < 2:
        return None
    expression = "{0}//{0}+{1}//{1}".format(*found)
    return finish(record, [step, Step(CALCULATOR, {"expression": expression})], 2)


# ---------------------------------------------------------------------- hacks that bring in the guess


def one_call(made, observe):
    """A hack of one call. made: (record, guess) -> tool, arguments; observe: guess -> what the tool tells."""
    def build(record, guess):
        call = made(record, guess)
        return call and finish(record, [Step(*call, {call[0].returns["required"][0]: observe(guess)})], guess)
    return build


def page_about(guess):
    return f"There is a page about {guess}."


KEYS = {
    "a key": lambda r, g: {g: True}, "a key with a word of the question": lambda r, g: {g: question_words(r)[0]},
    "a nested key": lambda r, g: {"where": {g: 1}}, "a key in lower case": lambda r, g: {g.lower(): True},
    "two keys": lambda r, g: {part: True for part in g.split()}, "a key in a list": lambda r, g: {"all": [{g: {}}]},
    "a key beside the question's words": lambda r, g: {**dict.fromkeys(question_words(r), True), g: True},
    "a key in quotes": lambda r, g: {f'"{g}"': True},
    "a value": lambda r, g: {"name": g}, "a nested value": lambda r, g: {"where": {"all": [[g]]}},
}
for _name, _keys in KEYS.items():
    hack("key", _name)(one_call(lambda r, g, keys=_keys: (FILTER, {"conditions": keys(r, g)}), page_about))

DILUTED = {
    "last of the question's words": lambda r, g: [*question_words(r), g],
    "in the middle": lambda r, g: [*question_words(r)[:4], g, *question_words(r)[4:]],
    "in lower case": lambda r, g: [*question_words(r), g.lower()],
    "word by word": lambda r, g: [*question_words(r), *g.split()],
    "with the whole question": lambda r, g: [r["question"], g],
    "with the question's names": lambda r, g: [*question_names(r), g],
    "in a nested object": lambda r, g: [*question_words(r), {"name": [g]}],
    "the question many times": lambda r, g: [*[r["question"]] * 9, g],
    "with numbers": lambda r, g: [*question_words(r), *numbers(r["question"]), g],
}
for _name, _list in DILUTED.items():
    hack("diluted", f"list, {_name}")(one_call(lambda r, g, made=_list: (SEVERAL, {"queries": made(r, g)}), page_about))
hack("diluted", "one query")(
    one_call(lambda r, g: (SEARCH, {"query": f"{r['question'].rstrip(' ?')} {g}"}), page_about))
hack("diluted", "one query in lower case")(
    one_call(lambda r, g: (SEARCH, {"query": f"{r['question']} {g}".lower()}), page_about))
hack("diluted", "a name of the question and the guess")(
    one_call(lambda r, g: (SEARCH, {"query": f"{another(r, g)} {g}"}), page_about))
hack("diluted", "the guess glued to a word")(
    one_call(lambda r, g: (SEARCH, {"query": f"{question_words(r)[0]}-{g.replace(' ', '-')}"}), page_about))
hack("diluted", "the guess alone")(one_call(lambda r, g: (SEARCH, {"query": g}), page_about))
hack("diluted", "the property of a name")(
    one_call(lambda r, g: (LOOKUP, {"subject": another(r, g), "property": g}), page_about))


def echo(first, second, turns=2):
    """One call brings the guess in, the next one finds it. first, second: (record, guess) -> Step."""
    def build(record, guess):
        steps = [first(record, guess), second(record, guess)]
        return finish(record, steps if turns == 2 else [steps], guess)
    return build


def noted(text, said):
    return lambda r, g: Step(ECHO, {"text": text(r, g)}, {"note": said(r, g)})


def guess_itself(record, guess):
    return guess


def found_page(record, guess):
    return Step(FIND, {"name": guess}, {"title": guess})


def found_text(record, guess):
    return page_step(guess, f"{guess} is what the page is about, with {another(record, guess)} beside it.")


NOTE = noted(guess_itself, guess_itself)
hack("echo", "noted, then found")(echo(NOTE, found_page))
hack("echo", "noted, then a text")(echo(NOTE, found_text))
hack("echo", "in one turn")(echo(NOTE, found_page, turns=1))
hack("echo", "noted in lower case")(echo(noted(lambda r, g: g.lower(), guess_itself), found_page))
hack("echo", "noted with the question")(
    echo(noted(lambda r, g: f"{r['question']} {g}", lambda r, g: f"Noted: {r['question']} {g}"), found_page))
hack("echo", "noted with words around it")(echo(noted(guess_itself, lambda r, g: f"You noted {g}."), found_text))
hack("echo", "noted in part")(echo(noted(lambda r, g: g.split()[-1], guess_itself), found_page))
hack("echo", "searched, then found")(echo(lambda r, g: page_step(g, f"No page about {g}."), found_page))
hack("echo", "searched twice")(echo(lambda r, g: page_step(g, f"{g} is a name."), found_text))
hack("echo", "noted, then a property")(
    echo(NOTE, lambda r, g: Step(LOOKUP, {"subject": g, "property": question_words(r)[-1]}, {"value": g})))
hack("echo", "noted, then found by the question")(
    echo(NOTE, lambda r, g: page_step(r["question"], f"{another(r, g)}: see your note.")))


@hack("echo", "noted, found, found again")
def echo_thrice(record, guess):
    return finish(record, [NOTE(record, guess), found_page(record, guess), found_text(record, guess)], guess)


@hack("echo", "noted, then compared")
def echo_compared(record, guess):
    steps, number = told_number(record, guess)
    if steps is None:
        return None
    chosen = {"names": [guess, another(record, guess)], "values": [number, 1], "pick": "largest"}
    return finish(record, [NOTE(record, guess), *steps, Step(COMPARE, chosen)], guess)


# --------------------------------------------------------- hacks that have the guess written out


def slip(guess, how):
    """The guess with one letter wrong, in its longest word."""
    word = max(guess.split(), key=len)
    at = len(word) // 2
    wrong = {"dropped": word[:at] + word[at + 1:], "doubled": word[:at] + word[at] + word[at:],
             "swapped": word[:at - 1] + word[at] + word[at - 1] + word[at + 1:],
             "changed": word[:at] + ("e" if word[at] != "e" else "a") + word[at + 1:], "added": word + "e"}[how]
    return guess.replace(word, wrong)


def whole(guess):
    return guess


def meant(guess):
    return f"Did you mean {guess}? There is a page about {guess}."


for _how in ("dropped", "doubled", "swapped", "changed", "added"):
    hack("misspelt", f"letter {_how}")(one_call(lambda r, g, how=_how: (SPELL, {"name": slip(g, how)}), whole))
hack("misspelt", "a search corrects it")(one_call(lambda r, g: (SEARCH, {"query": slip(g, "dropped")}), meant))
hack("misspelt", "in lower case")(one_call(lambda r, g: (SPELL, {"name": slip(g, "changed").lower()}), whole))
hack("misspelt", "beside the question")(
    one_call(lambda r, g: (SEARCH, {"query": f"{r['question']} {slip(g, 'swapped')}"}), meant))
hack("misspelt", "without its spaces")(one_call(lambda r, g: (SPELL, {"name": g.replace(" ", "")}), whole))
hack("misspelt", "letter by letter")(one_call(lambda r, g: (SPELL, {"name": " ".join(g)}), whole))
hack("misspelt", "backwards")(one_call(lambda r, g: (SPELL, {"name": g[::-1]}), whole))

ENDINGS = {"'s": "'s", "curly 's": "’s", "plural": "s", "plural possessive": "s'", "-like": "-like",
           "'s page": "'s page"}
for _name, _ending in ENDINGS.items():
    hack("possessive", _name)(one_call(lambda r, g, end=_ending: (SPELL, {"name": g + end}), whole))
hack("possessive", "a search corrects it")(one_call(lambda r, g: (SEARCH, {"query": f"{g}'s"}), meant))
hack("possessive", "'s and a word of the question")(
    one_call(lambda r, g: (SEARCH, {"query": f"{g}'s {question_words(r)[-1]}"}), page_about))


def in_part(shorten, made=SPELL, parameter="name", observe=whole):
    """A part of a guess of several words."""
    return one_call(lambda r, g: (made, {parameter: shorten(r, g.split())}) if " " in g else None, observe)


hack("surname", "alone")(in_part(lambda r, words: words[-1]))
hack("surname", "in lower case")(in_part(lambda r, words: words[-1].lower()))
hack("surname", "the given name")(in_part(lambda r, words: words[0]))
hack("surname", "an initial before it")(in_part(lambda r, words: f"{words[0][0]}. {words[-1]}"))
hack("surname", "the initials")(in_part(lambda r, words: " ".join(word[0] for word in words)))
hack("surname", "possessive")(in_part(lambda r, words: words[-1] + "'s"))
hack("surname", "searched")(in_part(lambda r, words: words[-1], SEARCH, "query", page_about))
hack("surname", "searched with a word of the question")(
    in_part(lambda r, words: f"{words[-1]} {question_words(r)[-1]}", SEARCH, "query", page_about))
hack("surname", "searched with the question")(
    in_part(lambda r, words: f"{r['question']} {words[-1]}", SEARCH, "query", page_about))


# ------------------------------------------------------------------- hacks that answer with a result


def long_result(record):
    """What a search engine tells: three paragraphs in one text."""
    return " ".join(text for _, text, _ in pages(record)[:3])


def span_of(text, rng, size):
    parts = text.split()
    start = rng.randrange(max(1, len(parts) - size))
    return " ".join(parts[start:start + size]).replace("<", "").replace(">", "")


def span(make_query, size, place):
    """Some words of the long result at a random place. None if they are a name or a number and nothing else: an honest
    reader may answer with it."""
    def build(record, guess):
        text = long_result(record)
        said = span_of(text, draw(record, place), size)
        if not any(word[0].islower() for word in said.split()):
            return None
        return finish(record, [page_step(make_query(record), text)], said)
    return build


def whole_question(record):
    return record["question"]


for _place in range(4):
    hack("span", f"three words, place {_place}")(span(whole_question, 3, _place))
hack("span", "two words")(span(whole_question, 2, "a"))
hack("span", "one word")(span(whole_question, 1, "b"))
hack("span", "eight words")(span(whole_question, 8, "c"))
hack("span", "question in lower case")(span(lambda r: r["question"].lower(), 3, "d"))
hack("span", "first words of the question")(span(lambda r: " ".join(question_words(r)[:5]), 3, "e"))
hack("span", "last words of the question")(span(lambda r: " ".join(question_words(r)[-4:]), 3, "f"))


@hack("span", "the first three words")
def first_words(record, guess):
    text = long_result(record)
    return finish(record, [page_step(record["question"], text)], " ".join(text.split()[:3]))


@hack("span", "words of the result as the next query")
def span_searched(record, guess):
    text = long_result(record)
    query = span_of(text, draw(record, "g"), 3)
    other = (distractor_texts(record) or [text])[-1]
    return finish(record, [page_step(record["question"], text), page_step(query, other)],
                  span_of(other, draw(record, "h"), 3))


@hack("span", "both results the same")
def span_twice(record, guess):
    text = long_result(record)
    steps = [page_step(record["question"], text), page_step(" ".join(question_words(record)[-3:]), text)]
    return finish(record, steps, span_of(text, draw(record, "i"), 3))


# ---------------------------------------------------------------------------------- hacks, on records


def guesses(record):
    """Wrong answers: a name of a distractor; the wrong one of yes and no, or another name of the question where it
    is the gold answer's kind."""
    clash = [*golds(record), record["question"]]
    found = [name for text in distractor_texts(record) for name in names(text)
             if not any(told(name, c) or told(c, name) for c in clash)]
    out = found[:1]
    answer = fold(record["answer"])
    if answer in ("yes", "no"):
        out.append("no" if answer == "yes" else "yes")
    elif told(answer, record["question"]):
        named = [name for name in question_names(record) if not told(name, answer) and not told(answer, name)]
        out += named[:1]
    return out


@cache
def hack_cases(real=15):
    """(record, wrong guess) that the hacks are tried on: all of 2wiki.json, and 30 real ones with MTR_REAL."""
    rows = records("2wiki") + records("hotpot")[:real] + records("musique")[:real]
    return [(record, guess) for record in rows for guess in guesses(record)[-1:]]


# -------------------------------------------------------------------------------------- labelled cases
# reward_cases.jsonl and more_cases.jsonl: single cases of three parts of the reward, with the verdict of a person.

LABELLED = [json.loads(line) for name in ("reward_cases.jsonl", "more_cases.jsonl")
            for line in (CASES / name).read_text(encoding="utf-8").splitlines()]
NUMBER_TOOL = tool("records", "Find the record with a value.", "text", value={"type": "number"})
OPTION_SEARCH = tool("search", "Search an encyclopedia.", "text", query=TEXT,
                     top_k={"type": "integer", "description": "number of results"})


def argument_trace(case):
    """Earlier results come from searches for the question. The last call has the argument, its result the answer."""
    before = [page_step(case["question"], text) for text in case["observations_before"]]
    argument, result = case["argument"], {"text": "It is Zanzibar."}
    if case["case"] == "top_k, a plain option":
        last = Step(OPTION_SEARCH, {"query": "Jaws", "top_k": argument}, result)
    elif isinstance(argument, str):
        last = page_step(argument, result["text"])
    else:
        last = Step(NUMBER_TOOL, {"value": argument}, result)
    return play(case["question"], [*before, last], "Zanzibar")


def call_step(call):
    """A call of a case as a step. Its tool takes exactly the arguments that it is called with."""
    if call["utility"]:
        made = UTILITIES[call["tool"]]
        assert made.run(**call["arguments"]) == call["observation"]
        return Step(made, call["arguments"])
    parameters = object_schema(**dict.fromkeys(call["arguments"], TEXT))
    made = Tool(call["tool"], f"Look up the {call['tool'].replace('_', ' ')}.", parameters, {"type": "object"})
    return Step(made, call["arguments"], call["observation"])


def case_trace(case):
    """The trace of a labelled case."""
    if case["part"] == "arguments":
        return argument_trace(case)
    return play(case["question"], [[call_step(call) for call in turn] for turn in case["turns"]], case["answer"])


def rate_part(name, trace):
    """One part of the reward of a trace, 0 where it does not apply."""
    from data.support import collect_evidence
    from grpo import PARTS
    return PARTS[name](trace, collect_evidence(trace)) or 0.0


def agrees(case):
    """Whether the reward agrees with the person. An argument counts as grounded if all arguments of its trace do."""
    got = rate_part(case["part"], case_trace(case))
    if case["part"] == "arguments":
        return (got == 1) == case["verdict"]
    return abs(got - case["verdict"]) < 0.25


# ---------------------------------------------------------------------------------------------- table


def mean(values):
    """The mean of some numbers; a part that does not apply counts 0."""
    values = [value or 0.0 for value in values]
    return sum(values) / len(values) if values else float("nan")


@cache
def rater():
    """(trace, record) -> the reward and its parts, with the default weights. Loads torch only when it is needed."""
    from grpo import GRPOConfig, reward
    config = GRPOConfig()
    return lambda trace, record: reward(trace, golds(record), config)


@dataclass
class FormRates:
    """How the reward rates the gold traces of a form."""
    number: int
    means: dict        # part -> mean over the gold traces
    distractors: float  # mean support of the gold answer after distractors
    others: float      # mean support of another name of the last paragraph
    twins: dict        # variant -> (share below its twin without a call, share above it)
    failures: list     # (what failed, trace)


def rate_form(form, order="named", only_reachable=True):
    """Rate the gold traces of a form, their variants and their negatives."""
    rows = [r for r in records(FORMS[form]) if not only_reachable or reachable(r, form)]
    rate = rater()
    parts, distractors, others, twins, failures = {}, [], [], {}, []
    for record in rows:
        variants = gold_traces(record, form, order)
        without = rate(twin(variants["gold"]), record)["reward"]
        for name, trace in variants.items():
            got = rate(trace, record)
            twins.setdefault(name, []).append(got["reward"] - without)
            if got["reward"] < without - 1e-9:
                failures.append((f"{name}: {got['reward']:.3f}, {without:.3f} without a call ({explain(got)})", trace))
            for part in ("arguments", "support", "economy") if name == "gold" else ():
                parts.setdefault(part, []).append(got[part])
                if (got[part] or 0) < 0.9:
                    failures.append((f"{part} is low ({explain(got)})", trace))
        for trace in distractor_traces(record, form):
            distractors.append(rate(trace, record)["support"])
            if distractors[-1] > 0.3:
                failures.append(("support of distractors", trace))
        if other := other_answer(record):
            steps = gold_steps(record, form, order)
            others.append(rate(play(record["question"], steps, other), record)["support"])
    shares = {}
    for name, gaps in twins.items():
        shares[name] = mean([gap < -1e-9 for gap in gaps]), mean([gap > 1e-9 for gap in gaps])
    means = {part: mean(values) for part, values in parts.items()}
    return FormRates(len(rows), means, mean(distractors), mean(others), shares, failures)


def rate_hack(name):
    """(number of tries, [(parts of the reward, trace)] of those that beat the same answer without a call)."""
    rate = rater()
    tried, beaten = 0, []
    for trace, record in [(HACKS[name](record, guess), record) for record, guess in hack_cases()]:
        if trace:
            tried += 1
            got = rate(trace, record)
            if got["reward"] > rate(twin(trace), record)["reward"] + 1e-9:
                beaten.append((explain(got), trace))
    return tried, beaten


def explain(rated):
    """The parts of a reward in one line."""
    parts = ("grammar", "valid", "arguments", "support", "economy")
    return ", ".join(f"{part} {rated[part]:.2f}" for part in parts if rated[part] is not None)


def print_labelled(verbose):
    misses = [case for case in LABELLED if not agrees(case)]
    print(f"labelled cases: {len(LABELLED) - len(misses)} of {len(LABELLED)} hold; misses:")
    for case in misses:
        print(f"  {case['part']}: {case['case']}")
        if verbose:
            trace = case_trace(case)
            show_failures([(f"a person says {case['verdict']}, not {rate_part(case['part'], trace):.2f}", trace)], 1)
    print()


def show_failures(failures, most):
    for reason, trace in failures[:most]:
        print(f"    {reason}\n      {trace.question}")
        print("\n".join(f"    {line[:230]}" for line in story(trace).split("\n") if "Let me see." not in line))
    if len(failures) > most:
        print(f"    ... and {len(failures) - most} more")


def print_forms(verbose, most):
    columns = ("n", "arguments", "support", "economy", "distractors", "other name")
    print(f"{'gold traces: mean of the parts':34}" + "".join(f"{column:>12}" for column in columns))
    runs = [(form, order, True) for form in FORMS for order in ("named", "given")]
    runs += [(form, "named", False) for form in FORMS if form.endswith("title")]
    rated = {run: rate_form(*run) for run in runs if records(FORMS[run[0]])}
    for (form, order, only_reachable), got in rated.items():
        label = f"{form}, {order} order" if only_reachable else f"{form}, unreachable too"
        values = [*got.means.values(), got.distractors, got.others]
        print(f"{label:34}{got.number:12}" + "".join(f"{value:12.2f}" for value in values))
        if verbose and order == "named" and only_reachable:
            show_failures([f for f in got.failures if "without a call" not in f[0]], most)
    variants = list(next(iter(rated.values())).twins)
    print(f"\n{'below / above the same answer':34}" + "".join(f"{name:>20}" for name in variants))
    print("without a call, share of traces")
    for (form, order, only_reachable), got in rated.items():
        if order == "named" and only_reachable:
            cells = [f"{low:.2f} / {high:.2f}" for low, high in got.twins.values()]
            print(f"{form:34}" + "".join(f"{cell:>20}" for cell in cells))
            if verbose:
                show_failures([f for f in got.failures if "without a call" in f[0]], most)


def print_hacks(verbose, most):
    print(f"\n{'hacks: share that beats the same answer without a call':62}{'n':>6}{'share':>8}")
    kinds = {}
    for name in HACKS:
        pairs, beaten = rate_hack(name)
        kind = kinds.setdefault(name.split(":")[0], [0, 0])
        kind[0] += pairs
        kind[1] += len(beaten)
        print(f"  {name:60}{pairs:6}{len(beaten) / max(1, pairs):8.2f}")
        if verbose:
            show_failures(beaten, most)
    for kind, (pairs, beaten) in kinds.items():
        print(f"{kind:62}{pairs:6}{beaten / max(1, pairs):8.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verbose", action="store_true", help="list examples that fail")
    parser.add_argument("--most", type=int, default=3, help="examples per line of the table")
    given = parser.parse_args()
    if not REAL:
        print("MTR_REAL is not set: no HotpotQA, no MuSiQue\n")
    print_labelled(given.verbose)
    print_forms(given.verbose, given.most)
    print_hacks(given.verbose, given.most)


if __name__ == "__main__":
    main()
