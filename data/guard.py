"""How the code of a tool is called. It may do anything; the agent always gets an observation."""
import asyncio
import atexit
import inspect
import json
from collections.abc import Awaitable, Callable
from copy import deepcopy

from data.schema import strict_json

# One event loop for all calls: a client that a tool keeps between calls belongs to its loop.
LOOP = asyncio.Runner()
atexit.register(LOOP.close)


def guarded(function: Callable[..., object]) -> Callable[..., dict]:
    """Wrap a tool's code, which may be a coroutine. Only Ctrl-C gets out of a call.

    A value that is no object becomes {"result": value}. An exception, or a value that JSON can't
    hold, becomes {"error": "NAME: message"}.
    """
    def run(*values: object, **arguments: object) -> dict:
        try:
            # The code gets copies, because the arguments of a call are a part of its trace.
            result = function(*deepcopy(values), **deepcopy(arguments))
            if inspect.isawaitable(result):
                result = LOOP.run(_awaited(result))
            result = strict_json(json.dumps(result, default=as_json), most=100_000)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also sys.exit
            return {"error": failure(error)}
        return result if isinstance(result, dict) else {"result": result}
    return run


async def _awaited(result: Awaitable) -> object:
    return await result


def as_json(value: object) -> object:
    """A date, an array or number of numpy, or a model of pydantic as JSON. TypeError for others.

    >>> from datetime import date
    >>> as_json(date(1999, 12, 31))
    '1999-12-31'
    """
    for method in ("isoformat", "tolist", "model_dump"):
        if hasattr(value, method):
            return getattr(value, method)()
    return json.JSONEncoder().default(value)


def failure(error: BaseException) -> str:
    """The name and message of an exception. Its name alone if it fails to give its message."""
    try:
        text = f"{type(error).__name__}: {error}"[:200]
    except Exception:
        return type(error).__name__
    return text.encode(errors="replace").decode()  # half a character, from a broken file name
