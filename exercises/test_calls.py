"""Tests of calls.py. The project's own check, data.schema.first_error, must agree with it."""
import json
import random

import pytest

from data.schema import first_error


def schema(required=(), **properties):
    return {"type": "object", "properties": properties, "required": list(required)}


TEXT = {"type": "string"}
CITY = schema(["city"], city=TEXT)
TRIP = schema(["start", "end"], start=TEXT, end=TEXT, days={"type": "integer"})
PICK = schema(["names", "pick"], names={"type": "array"}, pick={"enum": ["smallest", "largest"]})
FREE = {"type": "object", "properties": {"city": {}, "year": {"type": ["integer", "null"]}}}
MODE = schema([], level={"type": "integer", "enum": [1, 2, 3]}, flag={"type": "boolean"},
              limit={"type": "number"}, options={"type": "object"}, nothing={"type": "null"})
ODD = schema([], one={"enum": [1, "1", None]}, no={"enum": [False, "no"]}, zero={"enum": [0]})

VALID = [
    (CITY, {"city": "Tili"}), (CITY, {"city": ""}), (CITY, {"city": "Tili", "year": 3}),
    (TRIP, {"start": "Tili", "end": "Farel"}), (TRIP, {"end": "Tili", "start": "Tili"}),
    (TRIP, {"start": "Tili", "end": "Farel", "days": 0}),
    (TRIP, {"start": "Tili", "end": "Farel", "days": 2.0}),
    (PICK, {"names": [], "pick": "largest"}), (PICK, {"names": ["Borox", 7], "pick": "smallest"}),
    (FREE, {}), (FREE, {"city": [1, {}]}), (FREE, {"year": None}), (FREE, {"year": 1999}),
    (FREE, {"years": "x"}),
    (MODE, {}), (MODE, {"level": 2}), (MODE, {"level": 3.0}), (MODE, {"flag": False}),
    (MODE, {"limit": 1}), (MODE, {"limit": -0.5}), (MODE, {"options": {}}),
    (MODE, {"options": {"level": 9}}), (MODE, {"nothing": None}),
    (ODD, {"one": 1}), (ODD, {"one": "1"}), (ODD, {"one": None}), (ODD, {"one": 1.0}),
    (ODD, {"no": False}), (ODD, {"zero": 0.0})]

BROKEN = [
    (CITY, {}), (CITY, {"City": "Tili"}), (CITY, {"city": None}), (CITY, {"city": 3}),
    (CITY, {"city": ["Tili"]}), (CITY, {"city": {"name": "Tili"}}), (CITY, {"town": "Tili"}),
    (TRIP, {"start": "Tili"}), (TRIP, {"end": "Tili", "days": 1}),
    (TRIP, {"start": "Tili", "end": "Farel", "days": "1"}),
    (TRIP, {"start": "Tili", "end": "Farel", "days": 1.5}),
    (TRIP, {"start": "Tili", "end": "Farel", "days": True}),
    (TRIP, {"start": "Tili", "end": "Farel", "days": None}),
    (PICK, {"names": "Borox", "pick": "largest"}), (PICK, {"names": [], "pick": "Largest"}),
    (PICK, {"names": []}), (PICK, {"names": [], "pick": ["largest"]}),
    (PICK, {"names": {"0": "Borox"}, "pick": "largest"}),
    (FREE, {"year": "1999"}), (FREE, {"year": False}),
    (MODE, {"level": 4}), (MODE, {"level": "1"}), (MODE, {"level": True}), (MODE, {"flag": 0}),
    (MODE, {"flag": "true"}), (MODE, {"limit": "1"}), (MODE, {"limit": False}),
    (MODE, {"options": []}), (MODE, {"nothing": 0}),
    (ODD, {"one": True}), (ODD, {"one": 2}), (ODD, {"no": 0}), (ODD, {"zero": False}),
    (ODD, {"zero": None})]


@pytest.mark.parametrize("parameters, arguments", VALID)
def test_a_call_that_fits_is_accepted(exercise, parameters, arguments):
    assert first_error(parameters, arguments) is None
    assert exercise.call_error(parameters, arguments) is None


@pytest.mark.parametrize("parameters, arguments", BROKEN)
def test_a_broken_call_is_refused_with_a_sentence(exercise, parameters, arguments):
    assert first_error(parameters, arguments)
    reason = exercise.call_error(parameters, arguments)
    assert isinstance(reason, str) and reason


TYPES = ["string", "integer", "number", "boolean", "array", "object", "null"]
PLAIN = ["", "a", "b", "1", 0, 1, 2, -1, 0.0, 1.0, 0.5, True, False, None]
VALUES = [*PLAIN, [], ["a"], [1], {}, {"a": 1}]


def random_part(rng):
    part = {}
    if rng.random() < 0.7:
        part["type"] = rng.choice(TYPES) if rng.random() < 0.7 else rng.sample(TYPES, 2)
    if rng.random() < 0.4:
        part["enum"] = rng.sample(PLAIN, rng.randint(1, 6))
    return part


def test_random_calls_are_judged_as_the_project_judges_them(exercise):
    rng = random.Random(0)
    judged = {True: 0, False: 0}
    for _ in range(2000):
        names = rng.sample("abcdef", 4)
        parameters = schema(**{name: random_part(rng) for name in names[:rng.randint(0, 3)]})
        listed = list(parameters["properties"])
        parameters["required"] = rng.sample(listed, rng.randint(0, len(listed)))
        given = rng.sample(names, rng.randint(0, 4))
        arguments = {name: rng.choice(VALUES) for name in given}
        before = json.dumps([parameters, arguments])
        fits = first_error(parameters, arguments) is None
        assert (exercise.call_error(parameters, arguments) is None) == fits, before
        assert json.dumps([parameters, arguments]) == before  # the check changes nothing
        judged[fits] += 1
    assert min(judged.values()) > 500
