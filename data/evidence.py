"""What one call of a trace adds to what was told before, for the reward in grpo.py.

Words are tokens of data/words.py. Sources are sets of tokens: of the question, and of each result
of earlier turns."""
import re
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, combinations, product

from data.utilities import UTILITIES
from data.words import (
    STOP,
    content,
    flat,
    in_sources,
    is_number,
    leaves,
    names,
    near,
    numbers,
    tokens,
    topics,
)

# A utility tool is known by its code: a user's tool may have the same name.
NAME_OF = {spec["run"]: spec["name"] for spec in UTILITIES}
SHORT_RESULT = 12  # words; a longer result is running text

# ------------------------------------------------------------------------------ arguments of a call

LIMIT = re.compile(r"top_?k|k|n|limit|offset|page(_size)?|max_?results?|num_?results?", re.I)
LANGUAGE = re.compile(r"lang|language|locale|lang(uage)?_code", re.I)


def is_option(name: str, value: object, schema: dict) -> bool:
    """Whether an argument chooses how the tool works, such as a number of results or a language."""
    if value is None or isinstance(value, bool) or "enum" in schema or "const" in schema:
        return True
    if isinstance(value, int | float):
        described = re.search(r"(number of|how many) results", str(schema.get("description")), re.I)
        return bool(described or LIMIT.fullmatch(name))
    return bool(LANGUAGE.fullmatch(name))


def arguments(value: object, schema: object, name: str = "") -> list:
    """The strings and numbers of an argument that need a source: no options, but unknown keys."""
    schema = schema if isinstance(schema, dict) else {}
    if is_option(name, value, schema):
        return []
    if isinstance(value, list):
        return flat(arguments(item, schema.get("items")) for item in value)
    if not isinstance(value, dict):
        return [value]
    known = schema.get("properties", {})
    unknown = [key for key in value if key not in known]
    return unknown + flat(arguments(part, known.get(key), key) for key, part in value.items())


def is_grounded(value: object, sources: list[set[str]], known: set[str], named: bool) -> bool:
    """Whether an argument was told: its names and numbers, and at least half of its other words.

    known: the starts of the words in all sources and in the tool's schema. named: the call
    holds a name that was told. Then up to three words that say what is asked about it are free."""
    text = re.sub(r"(?<=\S) *\([^()]*\)$", "", str(value))  # "Jaws (film)" is "Jaws"
    for topic in names(text) + [[n] for n in numbers(text)]:
        # "Ada Bo Birthplace": after a told name of two words, more capitalised words may be plain.
        begins = topic[:2] if len(topic) > 2 else topic
        if not in_sources(topic, sources) and not in_sources(begins, sources):
            return False
    words = [word for word in tokens(text) if word not in STOP] or flat(names(text))
    untold = sum(word[:5] not in known for word in words)
    return bool(words) and (untold <= len(words) / 2 or (named and untold <= 3))


# ------------------------------------------------------------------------------------ what is new


@dataclass(eq=False)
class Evidence:
    """One call as the reward sees it. Words are tokens."""
    call: object             # an agents.Call
    utility: str             # the name of its tool if that is a utility tool, else ""
    turn: int                # index of its turn
    grounded: list[bool]     # for each argument: was it told before?
    argument_words: set[str]
    topics: list[list[str]]  # each name and number in its arguments
    result_words: list[str]  # [] if its result is no evidence
    new_words: set[str]      # of these, the ones that neither question nor arguments hold
    entity: tuple[str, ...]  # the name in the question that its arguments are about, or ()
    repeated: bool = False   # whether an equal call came before; grpo.py sets it

    @property
    def is_short(self) -> bool:
        """Whether its result is a value, not running text."""
        return len(self.result_words) <= SHORT_RESULT

    def completes(self, words: list[str]) -> bool:
        """Whether its short result only completes its arguments to these words: Ada to Ada Bo."""
        return self.is_short and bool(self.argument_words) and self.argument_words <= set(words)

    @property
    def result(self) -> set[str]:
        """The words of its observation, evidence or not."""
        return set(content(leaves(self.call.observation)))


def evidence_of(call, tool, turn: int, question: str, sources: list[set[str]]) -> Evidence:
    """The evidence of a call (an agents.Call) of a tool (an agents.Tool, or None)."""
    given = arguments(call.arguments, tool.parameters if tool else {})
    utility = NAME_OF.get(tool.run, "") if tool else ""
    if utility == "calculator":
        given = [spaced(value) for value in given]
    schema = tokens(tool.schema) if tool else []
    known = {word[:5] for word in chain(*sources, schema)}  # "direc": director, directed
    named = any(in_sources(name, sources) for name in flat(map(names, given)))
    grounded = [is_grounded(value, sources, known, named) for value in given]
    argument_words = set(flat(map(tokens, [*given, *leaves(call.arguments)])))
    made_up = [word for word in argument_words if word[:5] not in known]
    result_words = observed(call.observation) if call.succeeded else []
    if utility:
        tells = all(grounded) and computed(call, question, sources)
    else:
        tells = is_evidence(given, grounded, len(result_words))
    result_words = without_echo(result_words, made_up) if tells else []
    return Evidence(call=call, utility=utility, turn=turn, grounded=grounded,
                    argument_words=argument_words, topics=flat(map(topics, given)),
                    result_words=result_words, entity=entity_of(argument_words, question),
                    new_words=set(result_words) - sources[0] - argument_words)


def entity_of(words: set[str], question: str) -> tuple[str, ...]:
    """The name in the question that these words are about: at least half of it is among them."""
    entities = names(question) or [[word] for word in content(question)]
    shares = [(len(words & set(e)) / len(e), len(e), e) for e in entities]
    share, _, entity = max(shares, default=(0, 0, []))
    return tuple(entity) if share >= 0.5 else ()


NOTHING = re.compile(  # "No results", "could not find it", "There is no information", "N/A"
    r"\b(no|not|nothing|none|0)\b( \w+){0,3} (found|find|information|results?|records?|entr(y|ies)|"
    r"pages?|match(es)?|available|exists?|in the (database|index))\b|\b(couldn|can)['’]t find\b|"
    r"^\W*(not found|n/?a|none|null|unknown|nothing|no (results?|match|entries|such \w+))\b[^,]*$",
    re.I)


def observed(observation: dict) -> list[str]:
    """The tokens of a result. [] if it only says that nothing was found."""
    text = " ; ".join(map(str, leaves(observation, booleans=True)))
    found = tokens(text)
    return [] if len(found) <= SHORT_RESULT and NOTHING.search(text) else found


def is_evidence(given: list, grounded: list[bool], length: int) -> bool:
    """Whether the result of a lookup is evidence. A short one is not if an argument is ungrounded:
    the tool may only write out what the agent made up. An argument of stop words makes nothing up.
    """
    pairs = zip(given, grounded, strict=True)
    return length > SHORT_RESULT or all(ok or set(tokens(value)) <= STOP for value, ok in pairs)


def without_echo(text: list[str], echo: list[str]) -> list[str]:
    """The tokens of a text that are not in echo, not even in another spelling. Numbers have one."""
    close = {word for word in text if len(word) > 3 and any(word in long for long in echo)}
    close.update(echo)
    for word in {word for word in echo if not word[-1].isdigit()}:
        close.update(get_close_matches(word, set(text), len(text) or 1, 0.74))
    return [word for word in text if word not in close]


def spaced(expression: object) -> str:
    """An expression in which each minus is an operator, not the sign of a number."""
    return str(expression).replace("-", " - ")


def computed(call, question: str, sources: list[set[str]]) -> bool:
    """Whether a utility's result follows from what was told: at least two inputs that differ."""
    given = call.arguments
    if call.name == "calculator":  # a number that is used twice can make any result
        inputs = numbers(spaced(given.get("expression")))
        return len(set(inputs)) == len(inputs) > 1 and all(in_sources([n], sources) for n in inputs)
    if call.name == "date_difference":
        return given.get("start") != given.get("end")
    inputs = {tuple(tokens(value)) for value in leaves(given.get("values") or given.get("items"))}
    results = sources[1:]  # compare and count work on what was looked up
    if call.name == "count":  # the items of one list, if the question asks for their number
        asked = re.search(r"how many|number", question, re.I)
        return bool(asked) and len(inputs) > 1 and in_sources(chain(*inputs), results)
    named = {tuple(tokens(name)) for name in leaves(given.get("names"))}
    return min(len(named), len(inputs)) > 1 and all(in_sources(value, results) for value in inputs)


def computed_by(answer: list[str], question: str, evidence: list[Evidence], choice: bool
                ) -> list[Evidence] | None:
    """The utilities that computed the answer from what was told. None if no utility has a say.

    choice: the answer is yes, no, or named in the question. A `compare` that gives another name of
    the question refutes it."""
    asked = set(tokens(question))
    given = [set(answer), set(answer) - asked]  # "10 days" if it asks for days
    gave = [e for e in evidence if e.utility and e.result in given]
    compares = [e for e in evidence if e.utility == "compare" and e.result_words]
    refuted = choice and any(e.result <= asked for e in compares)
    return [e for e in gave if e.result_words and not e.repeated] if gave or refuted else None


def with_answer(answer: str, lookups: list[Evidence]) -> list[Evidence]:
    """The lookups whose results hold the answer, or, if it is a list, at least one of its items."""
    for items in ([answer], re.split(r"[,;&]|\band\b", answer)):
        found = [with_item(content(item), lookups) for item in items if tokens(item)]
        if found and all(found):
            return [e for e in lookups if any(e in group for group in found)]
    return []


def with_item(answer: list[str], lookups: list[Evidence]) -> list[Evidence]:
    """The lookups whose result holds these words. The arguments of the first one must not."""
    found: list[Evidence] = []
    for e in lookups:
        is_new = not set(answer) <= e.argument_words and not e.completes(answer)
        if near(answer, e.result_words) and (found or is_new):
            found.append(e)
    return found


def is_used(e: Evidence, evidence: list[Evidence]) -> bool:
    """Whether a name or number in the result of a call is an argument in a later turn."""
    later = [other for other in evidence if other.turn > e.turn and other.result_words]
    used = flat(other.topics for other in later if not other.repeated)
    used = [topic for topic in used if set(topic) <= set(e.result_words) and not e.completes(topic)]
    return not e.repeated and any(set(topic) & e.new_words for topic in used)


def is_difference(answer: list[str], lookups: list[Evidence]) -> bool:
    """Whether the answer is the difference of two numbers from two short results."""
    short = [e for e in lookups if e.is_short]
    for a, b in combinations(short, 2):
        for x, y in product(filter(is_number, a.result_words), filter(is_number, b.result_words)):
            if tokens(abs(float(x) - float(y))) == answer:
                return True
    return False
