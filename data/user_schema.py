"""The schemas of a user's tools. Any valid JSON Schema is accepted if no call can crash on it."""
import re
from collections.abc import Iterator

from jsonschema import Draft3Validator
from jsonschema.exceptions import best_match
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import specification_with

from data.schema import Rejected, UserSchema, reason


def check_user_schema(schema: object, part: str) -> UserSchema:
    """A schema that first_error can use. Rejected if it is not valid, with the part and the place.

    Valid: type object, the metaschema of its draft, `required` names properties, each $ref leads to
    a schema inside it, each pattern is a regular expression of Python.
    """
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise Rejected(f"{part}: schema not of type object")
    if not isinstance(schema.get("$schema", ""), str):
        raise Rejected(f"{part}: $schema is no text")
    schema = UserSchema(schema)
    try:
        draft = type(schema.validator)
        if draft is Draft3Validator:
            raise Rejected("$schema of draft 3; expected draft 4 or later")
        check_draft(schema, draft)
        for node in subschemas(schema):
            check_patterns(node)
        if unknown := set(schema.get("required", [])) - set(schema.get("properties", {})):
            raise Rejected(f"required names no property: {min(unknown)}")
    except ValueError as error:  # Rejected, or an $id or $schema that is no address
        raise Rejected(f"{part}: {error}") from None
    return schema


def check_draft(schema: object, draft: type) -> None:
    """Rejected unless this is a schema of a draft, with the place of the first bad keyword."""
    error = best_match(draft(draft.META_SCHEMA).iter_errors(schema))
    if error:
        place = "/".join(map(str, error.absolute_path))
        raise Rejected(f"bad schema at {place}: {reason(error)}")


def check_patterns(node: dict) -> None:
    """Rejected unless all patterns of a schema compile."""
    patterns = list(node.get("patternProperties", {}))
    # For additionalProperties, jsonschema joins all patterns to one.
    for pattern in (node.get("pattern", ""), *patterns, "|".join(patterns)):
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise Rejected(f"bad pattern {pattern!r:.70} ({error})") from None


def subschemas(schema: UserSchema) -> Iterator[dict]:
    """The schema and all schemas in it. Rejected if a $ref leads out of it or to no schema."""
    draft = type(schema.validator)
    create = specification_with(draft.ID_OF(draft.META_SCHEMA)).create_resource
    root = create(schema)
    todo = [(root, Registry().resolver_with_root(root))]  # an empty registry: nothing is fetched
    seen: set[int] = set()
    while todo:
        resource, resolver = todo.pop()
        node = resource.contents
        if not isinstance(node, dict) or id(node) in seen:
            continue
        seen.add(id(node))
        if validator_for(node, draft) is not draft:
            raise Rejected(f"$schema {node['$schema']} inside a schema of another draft")
        yield node
        todo += [(part, resolver.in_subresource(part)) for part in resource.subresources()]
        for key in ("$ref", "$dynamicRef", "$recursiveRef"):
            if key not in node:
                continue
            try:
                found = resolver.lookup(str(node[key]))
                check_draft(found.contents, draft)
            except (Unresolvable, Rejected):
                raise Rejected(f"{key} {node[key]!r:.70} leads to no schema in this one") from None
            if found.contents is node:
                raise Rejected(f"{key} {node[key]!r:.70} leads to itself")
            todo.append((create(found.contents), found.resolver))


def check_strict(parameters: UserSchema) -> None:
    """OpenAI's strict mode: every object is closed and all its properties are required."""
    for node in subschemas(parameters):
        kinds = node.get("type") or ""  # a string or a list
        if "properties" in node or "object" in kinds:
            if node.get("additionalProperties") is not False:
                raise Rejected("strict, but an object is open")
            if set(node.get("required", [])) != set(node.get("properties", {})):
                raise Rejected("strict, but a property is not required")
