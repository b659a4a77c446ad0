"""Real tools beside simulated ones: python mtr.py eval --real-tools docs/real_tools.py

This file is executed. TOOLS holds pairs: a tool in the format of OpenAI, MCP, Anthropic or
transformers, and the Python function that a call runs; it may be a coroutine. A call passes its
arguments by name. The return value is the observation; an exception becomes an error observation.
These tools are offered beside the ToolMaker's and the utility tools. If one of those has the same
name, this file's tool replaces it.
"""
from data.world import make_world

WORLD = make_world(0)  # in place of a search engine, a database or an API


def mayor(city: str) -> dict:
    """Look up a fact; the ToolActor is not asked."""
    return WORLD.real("mayor", {"city": city})


def letters(text: str) -> int:
    """Any JSON value or date may be returned. One that is no object becomes {"result": value}."""
    return sum(letter.isalpha() for letter in text)


def takes(**properties: str) -> dict:
    """A closed schema whose arguments are all required, as OpenAI's strict mode demands."""
    types = {name: {"type": kind} for name, kind in properties.items()}
    return {"type": "object", "properties": types, "required": list(properties),
            "additionalProperties": False}


TOOLS = [
    ({"name": "mayor", "description": "The mayor of a city.", "parameters": takes(city="string"),
      "strict": True}, mayor),
    ({"name": "letters", "description": "The number of letters in a text.",
      "parameters": takes(text="string")}, letters),
]
