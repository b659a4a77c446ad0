"""Words, numbers, dates and names of a text, by hand. No test needs torch."""
import random
import time

import pytest

from data.words import (
    content,
    in_sources,
    is_number,
    leaves,
    names,
    near,
    numbers,
    plain,
    tokens,
    topics,
)

# text: its tokens
TOKENS = {
    "words": ("The old  co-op, by_the sea.", ["the", "old", "co", "op", "by", "the", "sea"]),
    "an accent": ("Beyoncé Škoda", ["beyonce", "skoda"]),
    "an accent of its own": ("Beyonce\u0301", ["beyonce"]),
    "a ligature and wide letters": ("ﬁlm Ｊａｗｓ", ["film", "jaw"]),
    "a straight possessive": ("Henrik Selberg's father", ["henrik", "selberg", "father"]),
    "a curly possessive": ("Beyoncé’s husband", ["beyonce", "husband"]),
    "the possessive of a plural": ("the tigers' den", ["the", "tiger", "den"]),
    "an apostrophe inside a name": ("O'Brien's", ["o", "brien"]),
    "a plural": ("tigers", ["tiger"]),
    "no plural": ("glass gas bus is", ["glass", "gas", "bus", "is"]),
    "stop words keep their s": ("does this", ["does", "this"]),
    "initials": ("E.T. and J.R.R. Tolkien", ["et", "and", "jrr", "tolkien"]),
    "a number with commas": ("26,105 people", ["26105", "people"]),
    "a float": (26105.0, ["26105"]),
    "an integer": (26105, ["26105"]),
    "a decimal": ("It is 3.50 m", ["it", "is", "3.5", "m"]),
    "zeros in front": ("007", ["7"]),
    "a negative number": ("-5 degrees", ["-5", "degree"]),
    "a hyphen is no sign": ("top-5", ["top", "5"]),
    "a subtraction": ("1815-12", ["1815", "12"]),
    "a percentage": ("12% or $5.", ["12", "or", "5"]),
    "commas of a list": ("1,2", ["1", "2"]),
    "a version": ("1.2.3", ["1.2", "3"]),
    "a number word": ("Five of twelve", ["5", "of", "12"]),
    "an ordinal": ("18th-century", ["18", "th", "century"]),
    "a range with a hyphen": ("1968-1972", ["1968", "1972"]),
    "a range with a dash": ("(1968–1972)", ["1968", "1972"]),
    "the day first": ("2 November 1932", ["1932-11-02", "1932", "november"]),
    "the day first, with of": ("the 2nd of November, 1932", ["the", "1932-11-02", "1932", "november"]),
    "the month first": ("November 2, 1932.", ["1932-11-02", "1932", "november"]),
    "a short month": ("Sept. 7, 1909; 1 Sep 1910", ["1909-09-07", "1909", "september", "1910-09-01", "1910", "september"]),
    "the date of compare": ("1932-11-02", ["1932-11-02", "1932", "november"]),
    "a name that begins like a month": ("Marco 12, 1990", ["marco", "12", "1990"]),
    "a month alone": ("in November 1932", ["in", "november", "1932"]),
    "sixteen digits": ("1234567890123456 1234567890123457", ["1234567890123456", "1234567890123457"]),
    "other digits": ("٣ people", ["3", "people"]),
    "another script": ("東京", ["東京"]),
    "true and none": (True, ["true"]),
    "nothing": ("", []),
    "no word": ("... -- '!", []),
}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_by_hand(name):
    text, expected = TOKENS[name]
    assert tokens(text) == expected


@pytest.mark.parametrize("a, b", [
    ("Beyonce", "Beyoncé’s"), ("Polish Russian War", "Polish-Russian War"), (26105.0, "26,105"), (5, "five"),
    ("Nov 2, 1932", "1932-11-02"), ("E.T.", "ET"), ("THE LORD", "the lord"), ("12 %", "12%"), ("ISTANBUL", "İstanbul")])
def test_the_same_in_two_spellings(a, b):
    assert tokens(a) == tokens(b)


@pytest.mark.parametrize("a, b", [("3.5", "35"), ("3.5", "3 5"), ("-5", "5"), ("1932-11-02", "1932-02-11"), ("glass", "glas"),
                                  ("1,000", "1.000"), ("Velka", "Velk")])
def test_not_the_same(a, b):
    assert tokens(a) != tokens(b)


def test_numbers_and_content_by_hand():
    assert numbers("In 1932, on 2 November 1933, 3.5 of 26,105 or -5 tigers; five, 18th") == [
        "1932", "1933-11-02", "1933", "3.5", "26105", "-5", "5", "18"]
    assert [is_number(word) for word in ("3.5", "-5", "12", "1932-11-02", "18th", "")] == [True] * 3 + [False] * 3
    assert content("Who is the wife of this director?") == ["wife", "director"]
    assert content("who is this") == ["who", "is", "this"] and content("") == []


NAMES = {
    "a name": ("the film Jaws by Steven Spielberg", [["jaw"], ["steven", "spielberg"]]),
    "a first word that only begins": ("Who directed Jaws?", [["jaw"]]),
    "a first word before of": ("Birthplace of Ada Bo", [["ada", "bo"]]),
    "a first word that is a name": ("Jaws director", [["jaw"]]),
    "one word": ("The", [["the"]]),
    "joined by of": ("The Lord of the Rings", [["lord", "ring"]]),
    "numbers after a name": ("Jaws 2 or Apollo 13", [["jaw", "2"], ["apollo", "13"]]),
    "a number before a name": ("13 Ghosts", [["ghost"]]),
    "a date after a name": ("Ada Bo 2 November 1932", [["ada", "bo"]]),
    "a date in figures after a name": ("Ada Bo 1932-11-02", [["ada", "bo"]]),
    "a hyphen": ("the Polish-Russian War", [["polish", "russian", "war"]]),
    "a possessive": ("Ada Bo's father", [["ada", "bo"]]),
    "a comma ends a name": ("of Reno, Truckee", [["reno"], ["truckee"]]),
    "and ends a name": ("of Ada and Bo", [["ada"], ["bo"]]),
    "letters as names": ("Who is older, A or B?", [["a"], ["b"]]),
    "no capitals": ("ada bo", []),
    "nothing": ("", []),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_by_hand(name):
    text, expected = NAMES[name]
    assert names(text) == expected


def test_topics_by_hand():
    assert topics("the wife of Ada Bo, 12 and 3.5") == [["ada", "bo"], ["12"], ["3.5"]]
    assert topics("the old tigers") == [["old"], ["tiger"]] and topics("") == []


@pytest.mark.parametrize("wanted, text, expected", [
    ("Ada Bo", "Ada Mary Joan Cy Bo", True), ("Ada Bo", "Ada Mary Joan Cy Dee Bo", False), ("Bo Ada", "Ada Bo", True),
    ("Ada Bo", "Ada", False), ("Ada", "x Ada", True), ("", "Ada", False), ("Ada", "", False),
    ("12", "112", False), ("1972", "1968–1972", True)])
def test_near_by_hand(wanted, text, expected):
    """The words of n wanted tokens stand within n + 3 tokens."""
    assert near(tokens(wanted), tokens(text)) is expected


def test_one_source_tells_a_whole_topic():
    sources = [{"steven", "allan", "spielberg"}, {"kate", "capshaw"}]
    assert in_sources(["steven", "spielberg"], sources) and in_sources([], sources)
    assert not in_sources(["steven", "capshaw"], sources) and not in_sources(["kate"], [])


def test_leaves_by_hand():
    assert leaves({"a": [1, True, None, {"b": "x"}], "c": 2.5, "d": [[], {}]}) == [1, "x", 2.5]
    assert leaves("x") == ["x"] and leaves(None) == leaves(False) == []


def odd_texts():
    """Texts that nobody would write, of up to 100,000 characters."""
    rng = random.Random("odd")
    letters = "aZ09.,-'’_ \n\t é\u0301ß²½٣東\ud800\U0001d7d8\u202e" + "’s 1,111 E.T. 2 May 1932"
    yield from ("9" * 100_000, "-" * 100_000, "1,111" * 20_000, "1" + ",111" * 25_000 + "x", "A.B." * 25_000, "1 May " * 16_000,
                "99 May 9999", "1999-00-99", "0.0" * 30_000, "'s" * 50_000, "A of " * 20_000, "\u0301" * 100_000, "A" * 100_000)
    yield from ("".join(rng.choices(letters, k=rng.choice([1, 5, 40]))) for _ in range(2000))


def test_any_text_is_read_and_fast():
    for text in odd_texts():
        start = time.process_time()
        found = tokens(text)
        assert near(found[:5], found) == bool(found)
        assert all(name for name in names(text)) and set(numbers(text)) <= set(found) and set(content(text)) <= set(found)
        assert tokens(" ".join(found)) is not None and topics(text) is not None and plain(text) is not None
        assert time.process_time() - start < 2, text[:20]
