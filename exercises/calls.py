"""Exercise of chapter 2: the check of a call."""


def call_error(schema, arguments):
    """Why the arguments of a call do not fit the parameters of a tool. None if they fit.

    schema: {"type": "object", "properties": {name: part}, "required": [names]}. "required" may be
    missing; then no argument is required. A part is a dict with any of two rules:
        "type"  one of "string", "integer", "number", "boolean", "array", "object", "null",
                or a list of them, of which one must hold
        "enum"  a list of strings, numbers, booleans and nulls, of which the value must equal one
    arguments: a dict of JSON values by name, as Python's json module reads them.

    The rules are those of JSON Schema. A whole number such as 1.0 is an integer, and it equals 1.
    true and false are neither numbers, nor do they equal 1 and 0. An argument that the properties
    don't list is accepted. What is inside an array or an object is not checked.
    Returns a sentence for the agent (a string that is not empty), or None.
    """
    raise NotImplementedError
