"""What texts tell: words, numbers, dates and names, and what one call adds to them. grpo.py builds
its reward on it."""
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, combinations, product

# ------------------------------------------------------------------------------------------- tokens

MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September",
          "October", "November", "December"]
MONTH = f"({'|'.join(month[:3] for month in MONTHS)})[a-z]*\\.?"
DAY = r"(\d\d?)(?:st|nd|rd|th)?"
DAY_FIRST = re.compile(rf"\b{DAY} (?:of )?{MONTH},? (\d{{4}})\b")
MONTH_FIRST = re.compile(rf"\b{MONTH} {DAY},? (\d{{4}})\b")
ISO = r"\d{4}-\d\d-\d\d(?!\w)"
NUMBER = r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\w)"
TOKEN = re.compile(rf"{ISO}|{NUMBER}|[^\W_]+")
NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
                "ten", "eleven", "twelve"]
# Words that do not say what is asked or looked up.
STOP = set(re.findall(r"\w+", """
    a about after all also am an and any are as at be been before both but by did do does each first
    for from had has have he her him his how if in into is it its last me more most no not of on or
    other second she than that the their them then there these they this those to was we were what
    when where which who whom whose why will with would yes you"""))


def flat(lists: Iterable[Iterable]) -> list:
    """One list of the items of all lists."""
    return list(chain.from_iterable(lists))


def plain(text: str) -> str:
    """The text without accents and possessive 's, with dates as 1932-11-02. The case stays."""
    def iso(year: str, month: str, day: str) -> str:
        number = [name[:3] for name in MONTHS].index(month) + 1
        return f"{year}-{number:02}-{int(day):02}"

    text = unicodedata.normalize("NFKD", text.replace("\u2019", "'"))
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = re.sub(r"(?<=\w)'s\b", "", text)
    text = re.sub(r"\b(?:[A-Za-z]\.){2,}", lambda found: found[0].replace(".", ""), text)
    text = DAY_FIRST.sub(lambda date: iso(date[3], date[2], date[1]), text)
    return MONTH_FIRST.sub(lambda date: iso(date[3], date[1], date[2]), text)


def normal(word: str) -> list[str]:
    """The tokens of one match of TOKEN."""
    word = word.lower()
    if re.fullmatch(ISO, word):
        year, month, _ = map(int, word.split("-"))
        return [word, str(year), MONTHS[month % 12 - 1].lower()]
    if re.fullmatch(NUMBER, word):
        return [f"{float(word.replace(',', '')):.15g}"]
    if word in NUMBER_WORDS:
        return [str(NUMBER_WORDS.index(word))]
    plural = len(word) > 3 and word[-1] == "s" != word[-2]
    return [word[:-1] if plural else word]


def tokens(text: object) -> list[str]:
    """Words in lower case without plural s, numbers by value, dates also as year and month.

    >>> tokens("Beyonc\u00e9's 26,105 tigers, born 2 November 1932")
    ['beyonce', '26105', 'tiger', 'born', '1932-11-02', '1932', 'november']
    """
    return flat(map(normal, TOKEN.findall(plain(str(text)))))


def content(text: object) -> list[str]:
    """The tokens that are no stop words; all tokens if there are no others."""
    found = tokens(text)
    return [token for token in found if token not in STOP] or found


def is_number(token: str) -> bool:
    """Whether a token is a number. Dates are none."""
    return bool(re.fullmatch(r"-?\d+(\.\d+)?", token))


def numbers(text: object) -> list[str]:
    """The numbers and dates among the tokens."""
    return [token for token in tokens(text) if is_number(token) or re.fullmatch(ISO, token)]


def names(text: object) -> list[list[str]]:
    """The tokens of each name: capitalised words and numbers after them, perhaps joined by "of".

    A first word that only begins the sentence is left out.

    >>> names("Birthplace of the director of The Lord of the Rings, or Jaws 2")
    [['lord', 'ring'], ['jaw', '2']]
    """
    words = re.findall(r"[^\W_]+|[^\w\s'-]", plain(str(text)))
    runs: list[list[str]] = [[]]
    for i, word in enumerate(words):
        follows = words[i + 1] if i + 1 < len(words) else ""
        opening = i == 0 and follows and (word.lower() in STOP or follows in ("of", "for", "in"))
        if (word[0].isupper() and not opening) or (runs[-1] and word.isdecimal()):
            runs[-1] += normal(word)
        elif word not in ("of", "the", "de", "von", "van", "for"):
            runs.append([])
    return [[word for word in run if word not in STOP] or run for run in runs if run]


def topics(text: object) -> list[list[str]]:
    """What a text is about: its names and numbers; without a name, each of its other words."""
    return (names(text) or [[word] for word in content(text)]) + [[n] for n in numbers(text)]


def near(wanted: list[str], text: list[str]) -> bool:
    """Whether all wanted tokens stand close to each other in the tokens of a text."""
    width = len(wanted) + 3
    if not wanted or not set(wanted) <= set(text):
        return False
    starts = range(max(1, len(text) - width + 1))
    return any(set(wanted) <= set(text[i:i + width]) for i in starts)


def is_told(topic: Iterable[str], sources: list[list[str]]) -> bool:
    """Whether one source holds all words of a topic."""
    return any(set(topic) <= set(source) for source in sources)


# ------------------------------------------------------------------------------ arguments of a call

LIMIT = re.compile(r"\b(top_?k|k|limit|max\w*|num\w*|page|number of results|how many)\b", re.I)


def is_option(name: str, value: object, schema: dict) -> bool:
    """Whether an argument chooses how the tool works, such as a number of results or a language."""
    if value is None or isinstance(value, bool) or "enum" in schema or "const" in schema:
        return True
    if schema.get("type") == "integer" and LIMIT.search(f"{name} {schema.get('description', '')}"):
        return True
    return name in ("lang", "language", "locale") and len(str(value)) <= 5


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
    found = [key for key in value if key not in known]
    for key, part in value.items():
        found += arguments(part, known.get(key), key)
    return found


def is_grounded(value: object, sources: list[list[str]], known: set[str], named: bool) -> bool:
    """Whether an argument was told: its names and numbers, and at least half of its other words.

    known: the starts of the words in all sources and in the tool's definition. named: the call
    holds a name that was told. Then up to three words that say what is asked about it are free.
    """
    text = re.sub(r"(?<=\S) *\([^()]*\)$", "", str(value))  # "Jaws (film)" is "Jaws"
    if not all(is_told(topic, sources) for topic in names(text) + [[n] for n in numbers(text)]):
        return False
    words = [word for word in tokens(text) if word not in STOP] or flat(names(text))
    untold = sum(word[:5] not in known for word in words)
    return bool(words) and (untold <= len(words) / 2 or (named and untold <= 3))


# ------------------------------------------------------------------------------------ what is new

SHORT = 12  # words of a result that is a value, not running text

@dataclass
class Evidence:
    """One call as the reward sees it. Words are tokens."""
    call: object             # an agents.Call
    turn: int                # index of its turn
    repeated: bool           # an equal call came before
    grounded: list[bool]     # for each argument: was it told before?
    own: set[str]            # the words of its arguments
    topics: list[list[str]]  # each name and number in its arguments
    told: list[str]          # the words of its observation; [] if it is no evidence
    new: set[str]            # of these, the words that neither question nor arguments hold
    thing: tuple[str, ...]   # the name in the question that its arguments are about, or ()

    @property
    def result(self) -> set[str]:
        """The words of its observation, evidence or not."""
        return set(tokens(leaves(self.call.observation)))


def weigh(call, tool, question: str, sources: list[list[str]], turn: int, repeated: bool
          ) -> Evidence:
    """The evidence of a call of a tool. Sources: tokens of the question and of earlier results."""
    given = arguments(call.arguments, tool.parameters if tool else {})
    definition = tokens(tool.definition) if tool else []
    known = {word[:5] for word in chain(*sources, definition)}  # "director" stands for "directed"
    named = any(is_told(name, sources) for name in flat(map(names, given)))
    grounded = [is_grounded(value, sources, known, named) for value in given]
    own = set(flat(map(tokens, [*given, *leaves(call.arguments)])))
    untold = [word for word in own if word[:5] not in known]
    told = without(observed(call.observation), untold) if call.succeeded else []
    plain_words = all(set(tokens(v)) <= STOP for v, g in zip(given, grounded, strict=True) if not g)
    if len(told) <= SHORT and not plain_words:  # it may only write out what the agent brought up
        told = []
    things = names(question) or [[word] for word in content(question)]
    shares = [(len(own & set(thing)) / len(thing), len(thing), thing) for thing in things]
    share, _, thing = max(shares, default=(0, 0, []))
    return Evidence(call, turn, repeated, grounded, own, flat(map(topics, given)), told,
                    set(told) - set(sources[0]) - own, tuple(thing) if share >= 0.5 else ())


def without(text: list[str], echo: list[str]) -> list[str]:
    """The tokens of a text that are not in echo, not even in another spelling."""
    close = flat(get_close_matches(word, set(text), len(text) or 1, 0.74) for word in echo)
    return [word for word in text if word not in close]


NOTHING = re.compile(r"\b(no|not|nothing|none|unknown)\b.*\b(found|information|results?|records?|"
                     r"data|match(es)?|available|known|exists?)\b", re.I)


def observed(observation: dict) -> list[str]:
    """The tokens of an observation. [] if it only says that nothing was found."""
    text = " ; ".join(map(str, leaves(observation)))
    found = tokens(text)
    return [] if len(found) <= SHORT and NOTHING.search(text) else found


def computed(e: Evidence, question: str, sources: list[list[str]]) -> bool:
    """Whether a utility's result follows from what was told: at least two different inputs.

    sources: tokens of the question and of earlier results. compare and count work on results only.
    """
    name = e.call.name
    given = e.call.arguments
    asked = name != "count" or re.search(r"how many|number", question, re.I)
    if not (asked and e.call.succeeded and all(e.grounded)):
        return False
    inputs = [value for value in given.values() if isinstance(value, str)]
    if name == "calculator":  # a number that is used twice can make any result
        inputs = numbers(*inputs)
        return len(set(inputs)) == len(inputs) > 1 and all(is_told([n], sources) for n in inputs)
    if name in ("compare", "count"):
        inputs = given["values" if name == "compare" else "items"]
        sources = sources[1:]
    words = {tuple(tokens(value)) for value in inputs}
    together = [set(chain(*words))] if name == "count" else words  # it counts one list
    return len(words) > 1 and all(is_told(part, sources) for part in together)


def holding(answer: list[str], lookups: list[Evidence]) -> list[Evidence]:
    """The lookups whose result holds the answer. Their arguments don't, or an earlier one holds it.
    """
    found: list[Evidence] = []
    for e in lookups:
        completes = e.own and e.own <= set(answer) and len(e.told) <= SHORT  # "Ada" to "Ada Bo"
        is_new = not set(answer) <= e.own and not completes
        if near(answer, e.told) and (found or is_new):
            found.append(e)
    return found


def is_difference(answer: list[str], lookups: list[Evidence]) -> bool:
    """Whether the answer is the difference of two numbers from two short results."""
    short = [e for e in lookups if len(e.told) <= SHORT]
    for a, b in combinations(short, 2):
        for x, y in product(filter(is_number, a.told), filter(is_number, b.told)):
            if tokens(abs(float(x) - float(y))) == answer:
                return True
    return False


def leaves(value: object) -> list:
    """The strings and numbers inside a JSON value, without true, false and null."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return flat(map(leaves, value))
    return [] if value is None or isinstance(value, bool) else [value]
