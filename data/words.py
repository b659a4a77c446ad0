"""The words, numbers, dates and names in a text, for the reward in grpo.py."""
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain

MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September",
          "October", "November", "December"]
MONTH = f"({'|'.join(f'{month}|{month[:3]}' for month in MONTHS)}|Sept)\\.?"
DAY = r"(\d\d?)(?:st|nd|rd|th)?"
DAY_FIRST = re.compile(rf"\b{DAY} (?:of )?{MONTH},? (\d{{4}})\b", re.I)
MONTH_FIRST = re.compile(rf"\b{MONTH} {DAY},? (\d{{4}})\b", re.I)
ISO = r"\d{4}-\d\d-\d\d(?!\d)"
NUMBER = r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
SCALED = re.compile(rf"(?<!,)({NUMBER}) (thousand|million|billion)\b")
SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9}
TOKEN = re.compile(rf"{ISO}|{NUMBER}|[^\W_]+")  # "12km" is two tokens
NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
                "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen",
                "seventeen", "eighteen", "nineteen", "twenty"]
TENS = {"thirty": "30", "forty": "40", "fifty": "50", "sixty": "60", "seventy": "70",
        "eighty": "80", "ninety": "90"}
INITIALS = re.compile(r"\b(?:[A-Z]\b\.? ?){2,}")  # U.S., J. K., J K
# Letters that Unicode does not split into a letter and an accent, and other signs.
LETTERS = str.maketrans({"\u2019": "'", "\u2212": "-", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L",
                         "đ": "d", "ß": "ss", "æ": "ae", "Æ": "Ae", "œ": "oe"})
# Words that do not say what is asked or looked up.
STOP = set(re.findall(r"\w+", """
    a about after all also am an and any are as at be been before both but by did do does each first
    for from had has have he her him his how if in into is it its last me more most no not of on or
    other second she than that the their them then there these they this those to was we were what
    when where which who whom whose why will with would yes you wikipedia imdb"""))


def flat(lists: Iterable[Iterable]) -> list:
    """One list of the items of all lists."""
    return list(chain.from_iterable(lists))


@lru_cache(100)
def plain(text: str) -> str:
    """The text without accents and possessive 's, with dates as 1932-11-02. The case stays."""
    def iso(year: str, month: str, day: str) -> str:
        number = [name[:3] for name in MONTHS].index(month[:3].title()) + 1
        return f"{year}-{number:02}-{int(day):02}"

    text = unicodedata.normalize("NFKD", text.translate(LETTERS))
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = re.sub(r"(?<=\w)'s\b", "", text)
    text = INITIALS.sub(lambda found: re.sub(r"[. ]", "", found[0]) + " ", text)
    text = SCALED.sub(lambda n: f"{float(n[1].replace(',', '')) * SCALES[n[2]]:.0f}", text)
    text = DAY_FIRST.sub(lambda date: iso(date[3], date[2], date[1]), text)
    return MONTH_FIRST.sub(lambda date: iso(date[3], date[1], date[2]), text)


@lru_cache(10_000)
def normal(word: str) -> list[str]:
    """The tokens of one match of TOKEN."""
    word = word.lower()
    if re.fullmatch(ISO, word):
        year, month, _ = map(int, word.split("-"))
        return [word, str(year), MONTHS[month % 12 - 1].lower()]
    if re.fullmatch(NUMBER, word):
        word = word.replace(",", "")
        return [f"{float(word):.15g}" if len(word) < 16 else word]
    if word in NUMBER_WORDS and word not in STOP:  # "one" is a stop word
        return [str(NUMBER_WORDS.index(word))]
    word = TENS.get(word, word)
    plural = len(word) > 3 and word[-1] == "s" != word[-2] and word not in STOP
    return [word[:-1] if plural else word]


def tokens(text: object) -> list[str]:
    """Words in lower case without plural s, numbers by value, dates also as year and month.

    >>> tokens("Beyonc\u00e9's 26,105 tigers, born 2 November 1932")
    ['beyonce', '26105', 'tiger', 'born', '1932-11-02', '1932', 'november']
    """
    return flat(map(normal, TOKEN.findall(plain(str(text)))))


def content(text: object) -> list[str]:
    """The tokens without stop words. A text of stop words only keeps them."""
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
    words = re.findall(rf"{ISO}|[^\W_]+|[^\w\s'-]", plain(str(text)))
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


def in_sources(topic: Iterable[str], sources: list[set[str]]) -> bool:
    """Whether one source holds all words of a topic."""
    wanted = set(topic)
    return any(wanted <= source for source in sources)


def leaves(value: object, booleans: bool = False) -> list:
    """The strings and numbers inside a JSON value, and true and false if `booleans` is set."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return flat(leaves(part, booleans) for part in value)
    left_out = value is None or (isinstance(value, bool) and not booleans)
    return [] if left_out else [value]
