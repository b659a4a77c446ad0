"""Real tools beside simulated ones: python mtr.py eval --real-tools docs/real_tools.py

Such a file is executed. Its TOOLS are pairs: a function as OpenAI's API takes it, and the Python function that a call
runs, with the call's arguments by name. What it returns is the observation; what it raises, an error observation. A
tool of the name that the ToolMaker gave one of its own takes that one's place; the others are offered beside them."""
from data.world import make_world

WORLD = make_world(0)  # where a search engine, a data base or an API would stand


def mayor(city: str) -> dict:
    """Looked up, not simulated."""
    return WORLD.real("mayor", {"city": city})


def letters(text: str) -> int:
    """Anything that JSON can hold may be returned; what isn't an object becomes {"result": ...}."""
    return sum(letter.isalpha() for letter in text)


def takes(**properties: str) -> dict:
    """A closed schema with all arguments required, as OpenAI's strict mode wants it."""
    return {"type": "object", "properties": {name: {"type": kind} for name, kind in properties.items()},
            "required": list(properties), "additionalProperties": False}


TOOLS = [
    ({"name": "mayor", "description": "The mayor of a city.", "parameters": takes(city="string"), "strict": True}, mayor),
    ({"name": "letters", "description": "The number of letters in a text.", "parameters": takes(text="string")}, letters),
]
