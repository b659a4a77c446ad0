"""What a call adds to what was told, by hand. No test needs torch."""
import random
import time
from dataclasses import replace

import pytest

from agents import UTILITIES, Call, Tool
from data.evidence import (
    arguments,
    computed,
    entity_of,
    evidence_of,
    is_difference,
    is_grounded,
    is_option,
    observed,
    with_answer,
    without_echo,
)
from data.words import names, tokens

TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
QUESTION = "Where was the director of Jaws born, in 1946?"
LONG = "a text of more than twelve words that a search engine might well tell about {}"


def sources(*texts):
    return [set(tokens(text)) for text in texts]


def make(given, observation, question=QUESTION, results=(), name="search", error=None, **properties):
    """The evidence of a call after these results. Every argument without a schema is a text."""
    made = dict.fromkeys(given, TEXT) | properties
    tool = UTILITIES.get(name) or Tool(name, f"The {name}.", {"type": "object", "properties": made}, {"type": "object"})
    return evidence_of(Call(name, given, error, observation), tool, len(results), question, sources(question, *results))


# -------------------------------------------------------------------------------------- arguments of a call


@pytest.mark.parametrize("name, value, schema, expected", [
    ("top_k", 5, WHOLE, True), ("topk", 5, WHOLE, True), ("limit", 5, WHOLE, True), ("max_results", 5, WHOLE, True),
    ("n", 5, {**WHOLE, "description": "Number of results."}, True), ("page", 2, WHOLE, True),
    ("n", 5, {**WHOLE, "description": "how many pages to read"}, True),
    ("year", 1946, WHOLE, False), ("year", 1946, {**WHOLE, "description": "The year."}, False),
    ("limit", "5", TEXT, False), ("limit", 5, {"type": "number"}, True), ("number", 42, WHOLE, False), ("park", 5, WHOLE, False),
    ("language", "en", TEXT, True), ("lang", "de", TEXT, True), ("locale", "en-GB", TEXT, True),
    ("language", "Sumerian", TEXT, True), ("query", "en", TEXT, False),
    ("unit", "land", {"enum": ["land"]}, True), ("kind", "x", {"const": "x"}, True), ("unit", "land", TEXT, False),
    ("sure", True, {}, True), ("sure", None, {}, True), ("sure", 0, {}, False), ("sure", "true", TEXT, False)])
def test_options_by_hand(name, value, schema, expected):
    assert is_option(name, value, schema) is expected


@pytest.mark.parametrize("value, schema, expected", [
    ({"person": "Ada", "top_k": 5}, {"person": TEXT, "top_k": WHOLE}, ["Ada"]),
    ({"units": ["land", "sea"]}, {"units": {"type": "array", "items": {"enum": ["land", "sea"]}}}, []),
    ({"places": ["Ada", ["Bo", 3]]}, {"places": {"type": "array"}}, ["Ada", "Bo", 3]),
    ({"where": {"city": "Velka", "unit": "land"}},
     {"where": {"type": "object", "properties": {"city": TEXT, "unit": {"enum": ["land"]}}}}, ["Velka"]),
    ({"where": {"Velka": True}}, {"where": {"type": "object"}}, ["Velka"]),
    ({"where": {"city": {"Velka": None}}}, {"where": {"type": "object"}}, ["city", "Velka"]),
    ({"all": [{"Velka": {}}]}, {"all": {"type": "array"}}, ["Velka"]),
    ({"all": [{"city": "Velka"}]}, {"all": {"items": {"properties": {"city": TEXT}}}}, ["Velka"]),
    ({"city": "Velka"}, {}, ["city", "Velka"]), ({"x": [None, True, [], {}]}, {"x": True}, []), ({}, {}, [])])
def test_arguments_by_hand(value, schema, expected):
    """Unknown keys count, at any depth. Options and keys of the schema don't."""
    assert arguments(value, {"type": "object", "properties": schema}) == expected


@pytest.mark.parametrize("schema", [None, True, {}, {"properties": {"x": True}}, {"items": False}], ids=str)
def test_any_schema_has_arguments(schema):
    assert set(arguments({"x": ["a", 1]}, schema)) >= {"a", 1}


# A value, what was told (question first), whether it is grounded. The tool's own words are "birthplace" and "person".
GROUNDED = {
    "a name": ("Jaws", [QUESTION], True),
    "another name": ("Orca", [QUESTION], False),
    "a part of a name": ("Spielberg", ["Steven Allan Spielberg"], True),
    "a middle name left out": ("Steven Spielberg", ["Steven Allan Spielberg"], True),
    "a name of two sources": ("Steven Capshaw", ["Steven Spielberg", "Kate Capshaw"], False),
    "two names of two sources": ("Steven Spielberg and Kate Capshaw", ["Steven Spielberg", "Kate Capshaw"], True),
    "a parenthesis behind it": ("Jaws (film)", [QUESTION], True),
    "nothing but a parenthesis": ("(Orca)", [QUESTION], False),
    "a possessive": ("Jaws's director", [QUESTION], True),
    "a number": (1946, [QUESTION], True),
    "another number": (1947, [QUESTION], False),
    "a number inside one": (46, [QUESTION], False),
    "a told name, but not its number": ("Jaws 2", [QUESTION], False),
    "a date of words": ("1932-11-02", ["born 2 November 1932"], True),
    "the year of a date": ("1932", ["born 2 November 1932"], True),
    "a name and a date": ("Ada Bo 2 November 1932", ["Ada Bo, born 2 November 1932"], True),
    "the date of a year": ("1932-11-02", ["born 1932"], False),
    "the sign of a number": (-1946, [QUESTION], False),
    "half of the words": ("director wealth", [QUESTION], True),
    "less than half of the words": ("director wealth income", [QUESTION], False),
    "the same stem": ("directing", [QUESTION], True),
    "the tool's own words": ("birthplaces", [QUESTION], True),
    "words from nowhere": ("wealth", [QUESTION], False),
    "a stop word": ("that", [QUESTION + " that"], False),
    "no word": ("...", [QUESTION], False),
    "nothing": ("", [QUESTION], False),
}


@pytest.mark.parametrize("name", GROUNDED)
def test_grounded_by_hand(name):
    value, texts, expected = GROUNDED[name]
    known = {word[:5] for word in tokens(" ".join(texts) + " birthplace person")}
    assert is_grounded(value, sources(*texts), known, named=False) is expected


@pytest.mark.parametrize("value, named, expected", [
    ("net wealth income", True, True), ("net wealth yearly income", True, False), ("net wealth income", False, False),
    ("Orca wealth", True, False)])
def test_three_words_are_free_beside_a_told_name(value, named, expected):
    assert is_grounded(value, sources(QUESTION), {"direc"}, named) is expected


def test_what_is_asked_is_free_beside_a_told_name():
    """The name may stand in another argument of the call."""
    assert make({"subject": "Jaws", "property": "gross income"}, {}).grounded == [True, True]
    assert make({"subject": "Orca", "property": "gross income"}, {}).grounded == [False, False]
    assert make({"property": "gross income"}, {}).grounded == [False]
    assert make({"query": "Jaws gross income"}, {}).grounded == [True]


# ---------------------------------------------------------------------------------------------- what is new


@pytest.mark.parametrize("observation, expected", [
    ({"text": "No results."}, []), ({"text": "Nothing was found."}, []), ({"text": "not available"}, []),
    ({"text": "There is no information about Jaws."}, []), ({"value": "unknown", "why": "no such record exists"}, []),
    ({"text": "No."}, ["no"]), ({"text": "It was found."}, ["it", "was", "found"]), ({}, []),
    ({"text": "It has no outlet."}, ["it", "has", "no", "outlet"]), ({"people": 12, "sure": True}, ["12", "true"]),
    ({"a": ["Reno", {"b": "Truckee"}]}, ["reno", "truckee"])])
def test_observed_by_hand(observation, expected):
    assert observed(observation) == expected


def test_a_long_text_may_say_that_something_was_not_found():
    text = LONG.format("the wreck, which was not found")
    assert observed({"text": text}) == tokens(text)


@pytest.mark.parametrize("text, echo, expected", [
    ("a page about lorn", ["lorn"], "a page about"), ("a page about spielberg", ["spielbreg"], "a page about"),
    ("a page about spielberg", ["spilberg"], "a page about"), ("a page about velka", ["lorn"], "a page about velka"),
    ("born 1946 1947", ["1946"], "born 1947"), ("born 1947", ["1946"], "born 1947"), ("", ["x"], ""), ("x", [], "x")])
def test_without_by_hand(text, echo, expected):
    """What the agent brought up goes, also in another spelling. A number has no other spelling."""
    assert without_echo(text.split(), echo) == expected.split()


def test_a_call_by_hand():
    e = make({"query": "Jaws 1946 director", "Velka": True}, {"text": "Jaws is by Steven Spielberg, born 18 December 1946"},
             Velka={"type": "boolean"})
    assert e.grounded == [True] and e.argument_words == {"jaw", "1946", "director"} and e.entity == ("jaw",)
    assert [tuple(topic) for topic in e.topics] == [("jaw", "1946"), ("1946",)]
    assert e.result_words == ["jaw", "is", "by", "steven", "spielberg", "born", "1946-12-18", "1946", "december"]
    assert e.new_words == {"is", "by", "steven", "spielberg", "1946-12-18", "december"} and e.result == set(e.result_words) - {"is", "by"}
    assert (e.turn, e.repeated) == (0, False)


@pytest.mark.parametrize("given, observation, expected", [
    ({"query": "Jaws"}, {"text": "Spielberg"}, {"spielberg"}),
    ({"query": "Orca"}, {"text": "Spielberg"}, set()),                       # a short result of a name from nowhere
    ({"query": "the"}, {"text": "Spielberg"}, {"spielberg"}),                # which brings up nothing
    ({}, {"text": "Spielberg"}, {"spielberg"}),
    ({"query": "Jaws"}, {"error": "Spielberg"}, set()), ({"query": "Jaws"}, {"text": "Jaws, born 1946"}, set()),
    ({"query": "Jaws", "name": "Spielberg"}, {"text": "Spielberg"}, set()),
    ({"query": "Jaws", "name": "Spilberg"}, {"text": "Spielberg"}, set())])
def test_new_words_by_hand(given, observation, expected):
    assert make(given, observation).new_words == expected


def test_a_long_result_of_a_name_from_nowhere_tells_all_but_this_name():
    e = make({"query": "Spilberg"}, {"text": LONG.format("Spielberg and Velka")})
    assert "velka" in e.new_words and "spielberg" not in e.result_words


def test_a_refused_call_tells_nothing():
    assert make({"query": "Jaws"}, {"text": "Spielberg"}, error="unknown tool").result_words == []


def utility(name, *results, question=QUESTION, **given):
    """Whether a utility's result is computed from what the question and these results told."""
    return computed(Call(name, given), question, sources(question, *results))


@pytest.mark.parametrize("expected, given, results", [
    (True, "1946 - 12", ["12 people"]), (True, "(26105 + 1946) / 3.5", ["26,105 people", "3.5 m"]),
    (False, "1946 - 13", ["12 people"]), (False, "1946", []), (False, "1946 - 1946", []),
    (False, "1946//1946 + 12//12", ["12"]), (False, "1946*1946/1946", []), (False, "46 - 19", []), (False, "1 + 1", []),
    (False, "", [])])
def test_a_calculator_needs_two_told_numbers_each_once(expected, given, results):
    assert utility("calculator", *results, expression=given) is expected


def test_a_date_difference_needs_two_dates():
    assert utility("date_difference", start="1932-11-02", end="1932-11-05")
    assert not utility("date_difference", start="1932-11-02", end="1932-11-02")


@pytest.mark.parametrize("expected, names, values, results", [
    (True, ["Jaws", "Orca"], [12, 15], ["12", "15"]), (True, ["Jaws", "Orca"], ["12", "15"], ["12 and 15"]),
    (True, ["Jaws", "Orca"], ["1932-11-02", "1932-11-03"], ["2 November 1932", "3 November 1932"]),
    (False, ["Jaws", "Orca"], [12, 16], ["12", "15"]),      # an invented value
    (False, ["Jaws", "Orca"], [12, 12.0], ["12", "15"]),    # the same value twice
    (False, ["Jaws"], [12], ["12", "15"]), (False, ["Jaws", "jaws"], [12, 15], ["12", "15"]),
    (False, ["Jaws", "Orca"], [12, 1946], ["12"]),          # the question's number was not looked up
    (False, [], [], [])])
def test_compare_needs_two_names_and_two_values_of_results(expected, names, values, results):
    assert utility("compare", *results, names=names, values=values, pick="largest") is expected


@pytest.mark.parametrize("expected, items, results, question", [
    (True, ["Jaws", "Lincoln"], ["Jaws, E.T. and Lincoln"], "How many films?"),
    (True, ["Jaws", "Lincoln"], ["Jaws, E.T. and Lincoln"], "Tell me the number of films."),
    (False, ["Jaws", "Lincoln"], ["Jaws, E.T. and Lincoln"], "Which films?"),
    (False, ["Jaws", "Lincoln"], ["Jaws", "Lincoln"], "How many films?"),   # no list, but two results
    (False, ["Jaws", "Jaws"], ["Jaws, E.T. and Lincoln"], "How many films?"),
    (False, ["How", "many"], ["Jaws"], "How many films?"), (False, [], ["Jaws"], "How many films?")])
def test_count_needs_the_items_of_one_result(expected, items, results, question):
    assert utility("count", *results, question=question, items=items) is expected


def test_a_utility_tells_only_what_follows_from_told_inputs():
    results = ["Jaws was shown 2 November 1932, Orca 12 days later"]
    good = {"expression": "1946 - 12"}
    assert make(good, {"result": 1934}, name="calculator", results=results).new_words == {"1934"}
    assert make({"expression": "1946 - 13"}, {"result": 1933}, name="calculator", results=results).new_words == set()
    dates = {"start": "1932-11-02", "end": "1932-11-14"}
    assert make(dates, {"days": 12}, name="date_difference", results=results).result_words == []
    assert make(dates, {"days": 12}, name="date_difference", results=[*results, "14 November 1932"]).result_words == ["12"]
    longer = {"result": LONG.format("Velka")}  # a utility's result is never evidence for its length
    assert make({"expression": "1946 - 13"}, longer, name="calculator", results=results).result_words == []


def evidence(*rows):
    """One lookup per row (words of the arguments, result)."""
    return [replace(make({}, {"text": text}), argument_words=set(tokens(own))) for own, text in rows]


@pytest.mark.parametrize("answer, rows, expected", [
    ("Dumo", [("Jaws", "in Dumo")], [0]), ("Dumo", [("Jaws", "in Velka")], []), ("", [("Jaws", "in Velka")], []),
    ("Dumo", [("Dumo", "Dumo it is")], []),                                   # its own argument holds the answer
    ("Dumo", [("Jaws", "Dumo or Lorn"), ("Dumo", "Dumo it is")], [0, 1]),     # a call that verifies the answer
    ("Dumo", [("Dumo", "Dumo it is"), ("Jaws", "Dumo or Lorn")], [1]),
    ("Ada Bo", [("Bo", "Ada Bo")], []),                                       # a short result that completes the argument
    ("Ada Bo", [("Bo", LONG.format("Ada Bo"))], [0]), ("Ada Bo", [("Bo wife", "Ada Bo")], [0]),
    ("Ada Bo", [("Jaws", "Ada is not the same as the old Bo")], []), ("tiger", [("Jaws", "two tigers")], [0]),
    ("Reno and Truckee", [("Jaws", "Reno"), ("Orca", "Truckee"), ("it", "x")], [0, 1]), ("Reno, and Elko", [("Jaws", "Reno")], []),
    ("Reno, Elko, and Truckee", [("Jaws", "Elko; Reno"), ("Orca", "Truckee")], [0, 1]), (", ; and", [("Jaws", "Reno")], []),
    ("Reno and Elko", [("Jaws", "Reno is as far from the old town of " + LONG.format("Elko"))], [0])])
def test_holding_by_hand(answer, rows, expected):
    lookups = evidence(*rows)
    assert with_answer(answer, lookups) == [lookups[i] for i in expected]


@pytest.mark.parametrize("answer, results, expected", [
    ("10", ["built in 1900", "built in 1910"], True), ("10", ["1910", "1900"], True), ("1.5", ["3", "1.5"], True),
    ("11", ["1900", "1910"], False), ("10", ["1900 and 1910"], False), ("10", ["1900", LONG.format(1910)], False),
    ("10 years", ["1900", "1910"], False), ("", ["1900", "1910"], False), ("10", [], False)])
def test_a_difference_by_hand(answer, results, expected):
    assert is_difference(tokens(answer), evidence(*[("", result) for result in results])) is expected


@pytest.mark.parametrize("own, question, expected", [
    ("Kazan", "Who is older, Elia Kazan or Moustapha Akkad?", "elia kazan"),
    ("Moustapha Akkad birthday", "Who is older, Elia Kazan or Moustapha Akkad?", "moustapha akkad"),
    ("Mary", "Is Ada Mary Bo old?", ""), ("birthday", "Who is older, Elia Kazan or Moustapha Akkad?", ""),
    ("lake", "is the lake salt?", "lake"), ("", QUESTION, ""), ("Jaws", "", ""), ("", "", "")])
def test_the_thing_that_words_are_about(own, question, expected):
    assert " ".join(entity_of(set(tokens(own)), question)) == expected


# ---------------------------------------------------------------------------------- what nobody would write


def odd_texts():
    """Texts of up to 8,000 characters."""
    rng = random.Random("odd")
    letters = "aZ09.,-'’_ \n\té\u0301½٣東\ud800" + "No data 1,111 E.T. 2 May 1932"
    yield from ("", "9" * 8_000, "Ada Bo " * 1_200, "1,111" * 1_600, "()" * 4_000, "x " * 4_000, "A" * 8_000, "( " * 4_000)
    yield from ("".join(rng.choices(letters, k=rng.choice([1, 10, 60]))) for _ in range(200))


def test_any_text_can_be_weighed_and_fast():
    for text in odd_texts():
        start = time.process_time()
        calls = [("search", {"query": text}), ("search", {text: {text: 1}}), ("compare", {"names": ["x"], "values": [text]}),
                 ("count", {"items": [text]}), ("calculator", {"expression": text})]
        for name, given in calls:
            e = make(given, {"text": text, "more": ["Velka", 1e300]}, results=[text], name=name)
            assert len(e.grounded) >= 1 and e.new_words <= set(e.result_words)
            assert with_answer(text[:500], [e]) in ([], [e]) and entity_of({"ada"}, text) is not None
        assert time.process_time() - start < 4, text[:20]


def test_a_hundred_words_from_nowhere_and_a_long_result_are_fast():
    rng = random.Random("words")
    made = [" ".join("".join(rng.choices("abcdefghij", k=7)) for _ in range(n)) for n in (100, 3_000)]
    start = time.process_time()
    e = make({"query": made[0]}, {"text": made[1]})
    assert e.grounded == [False] and time.process_time() - start < 6


@pytest.mark.parametrize("given", [{"expression": 5}, {"expression": None}, {"values": 3, "names": "x"}, {"items": {"a": [None]}},
                                   {"start": [], "end": {}}, {}], ids=str)
@pytest.mark.parametrize("name", UTILITIES)
def test_any_call_of_a_utility_can_be_weighed(name, given):
    assert make(given, {"error": "no"}, name=name, error="does not fit").result_words == []


def test_the_names_of_a_question_are_things():
    for name in names("Who is older, Elia Kazan or Moustapha Akkad?"):
        assert entity_of(set(name), "Who is older, Elia Kazan or Moustapha Akkad?") == tuple(name)
