"""JSON that a model wrote, and the rules that a tool's definition must follow."""
import json
import re
from functools import cached_property

import jsonschema
from referencing import Registry

from data import printable


class Rejected(ValueError):
    """A model's output can't be used. The message says why, in words that can stand in a prompt."""


# A string that is not closed reaches to the end. Else each quote would scan to the end in vain.
STRING = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)


def strict_json(text: str, most: int = 200) -> object:
    """Parse JSON. Rejected for NaN, infinities, repeated keys and more than `most` containers.

    >>> strict_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    data.schema.Rejected: repeated key
    """
    def unique(pairs: list[tuple]) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise Rejected("repeated key")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise Rejected(f"{constant} is not JSON")

    outside = STRING.sub("", text)
    if outside.count("[") + outside.count("{") > most:
        raise Rejected("too deep")
    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
        # Encoding again finds 1e999, which is read as infinity, and lone surrogates.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        return value
    except Rejected:
        raise
    except (ValueError, RecursionError):
        raise Rejected("not JSON") from None


def object_schema(**properties: dict) -> dict:
    """The schema of an object with these properties, all of them required."""
    return {"type": "object", "properties": properties, "required": list(properties)}


MAX_DEPTH = 12
MAX_DESCRIPTION = 1024
# References could reach outside the schema. The others could take exponential time.
FORBIDDEN = ("$ref", "$dynamicRef", "pattern", "patternProperties", "dependentSchemas")


def check_function(function: dict, taken: set[str]) -> None:
    """Rejected unless name, description and parameters follow the rules. taken: names in use."""
    description = function["description"]
    check_name(function["name"], taken)
    if not isinstance(description, str) or not 0 < len(description.strip()) <= MAX_DESCRIPTION:
        raise Rejected("bad description")
    check_schema(function["parameters"])


def check_name(name: object, taken: set[str]) -> None:
    """Rejected unless this is a new name of letters, digits, _ and -."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise Rejected("bad tool name")
    if name in taken:
        raise Rejected("tool name taken")


def check_schema(schema: object) -> None:
    """Rejected unless this is a plain JSON schema of type object that lists its properties."""
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise Rejected("schema not of type object")
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        raise Rejected("schema without properties")
    if not all(isinstance(part, dict) for part in properties.values()):
        raise Rejected("schema without properties")
    required = schema.get("required", [])
    names = list(properties)  # a list, because `required` may hold values that can't be hashed
    if not isinstance(required, list) or any(name not in names for name in required):
        raise Rejected("required names no property")
    check_keywords(schema)
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        unknown = error.validator in ("anyOf", "enum")  # so the metaschema limits `type`
        raise Rejected("unknown type" if unknown else "bad schema") from None


def check_keywords(schema: dict) -> None:
    """Rejected for a forbidden keyword, or for a schema that is nested too deep."""
    todo = [(schema, 0)]
    while todo:
        node, depth = todo.pop()
        if depth > MAX_DEPTH:
            raise Rejected("schema too deep")
        if isinstance(node, list):
            todo += [(child, depth + 1) for child in node]
        elif isinstance(node, dict):
            for key, child in node.items():
                if key in FORBIDDEN:
                    raise Rejected(f"schema with {key}")
                if key == "properties" and isinstance(child, dict):
                    # The keys of this object are names of properties, not keywords. The values
                    # are two levels below the node.
                    todo += [(part, depth + 2) for part in child.values()]
                else:
                    todo.append((child, depth + 1))


class UserSchema(dict):
    """A schema that a user wrote, after its check in data/user_schema.py."""

    @cached_property
    def validator(self) -> jsonschema.protocols.Validator:
        """Validates by the draft in its $schema. Its registry is empty, so nothing is fetched."""
        draft = jsonschema.validators.validator_for(self, jsonschema.Draft202012Validator)
        return draft(self, registry=Registry())


def first_error(schema: dict, value: dict) -> str | None:
    """The first reason why a value does not fit a schema, in one line. None if it fits."""
    try:
        plain = jsonschema.Draft202012Validator
        validator = schema.validator if isinstance(schema, UserSchema) else plain(schema)
        error = next(validator.iter_errors(value), None)
    except KeyboardInterrupt:
        raise
    except BaseException:  # a large number, a wrong $schema or $id inside; endless: a Rust panic
        return "arguments out of range"
    return reason(error) if error else None


def reason(error: jsonschema.ValidationError) -> str:
    """Why a value does not fit. If its message begins with a long value, place and rule instead:
    items/0/zip: breaks pattern '^[0-9]{5}$'"""
    if len(error.message) <= 80 or error.message[0].isupper():  # a capital: the rule comes first
        return error.message[:80]
    error = jsonschema.exceptions.best_match([error])  # of an anyOf, the part that fits best
    place = printable("/".join(map(str, error.absolute_path)))[-30:]
    rule = f"{place}: breaks {error.validator} {error.validator_value!r}".removeprefix(": ")
    return rule[:100]
