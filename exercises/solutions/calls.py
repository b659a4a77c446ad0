"""Solution: the check of a call."""
TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list,
         "object": dict, "null": type(None)}


def is_type(value, name):
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, TYPES[name])


def same(a, b):
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def call_error(schema, arguments):
    for name in schema.get("required", []):
        if name not in arguments:
            return f"{name} is required"
    for name, part in schema["properties"].items():
        if name not in arguments:
            continue
        value = arguments[name]
        types = part.get("type", list(TYPES))
        types = [types] if isinstance(types, str) else types
        if not any(is_type(value, one) for one in types):
            return f"{name} must be {' or '.join(types)}"
        if "enum" in part and not any(same(value, choice) for choice in part["enum"]):
            return f"{name} must be one of {part['enum']}"
    return None
