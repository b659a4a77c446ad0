"""The idea: three agents that are prompt templates over one sampler. No tensor in here.

    ToolMaker   reads a question, says of what kind it is, writes the tools it needs; they are validated
    AutoAgent   thinks, calls tools, reads observations, answers (ReAct)
    ToolActor   plays the tools: it simulates what a call returns, checked against the tool's return schema

The sampler they are given opens, appends to and samples conversations (model.Sampler). What it sampled is kept
as ids and never encoded again; what the program adds is encoded once; both enter the Trace with their loss mask.
"""
import importlib.util
import json
import re
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Callable

import jsonschema
import numpy as np

import data.tools
from data import InputError

# ------------------------------------------------------------------------------------------ protocol
# Qwen2.5's chat and tool format, to the letter: the chat_template of Qwen2.5-Instruct's tokenizer_config.json.


class Control(str):
    """A control token that the program puts. A plain str can't become one, whatever it spells."""


IM_START, IM_END = Control("<|im_start|>"), Control("<|im_end|>")
CALL, CALL_END = Control("<tool_call>"), Control("</tool_call>")
DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
TOOLS_HEAD = ("\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
              "You are provided with function signatures within <tools></tools> XML tags:\n<tools>")
TOOLS_TAIL = ["\n</tools>\n\nFor each function call, return a json object with function name and arguments within ",
              CALL, CALL_END, " XML tags:\n", CALL,
              '\n{"name": <function-name>, "arguments": <args-json-object>}\n', CALL_END]
GENERATE = [IM_START, "assistant\n"]  # the header of the turn that is to be sampled


def dumps(value: object) -> str:
    """JSON as the template prints it: spaces after , and :, insertion order, non-ASCII kept."""
    return json.dumps(value, ensure_ascii=False)


def turn(role: str, *content: str) -> list[str]:
    """One whole turn as pieces."""
    return [IM_START, f"{role}\n", *content, IM_END, "\n"]


def system_turn(text: str = DEFAULT_SYSTEM, schemas: list[dict] = ()) -> list[str]:
    """The first turn: instructions, and the tools if there are any."""
    tools = [TOOLS_HEAD, *("\n" + dumps(schema) for schema in schemas), *TOOLS_TAIL] if schemas else []
    return turn("system", text, *tools)


def assistant_content(text: str, calls: list[dict]) -> list[str]:
    """What stands between the assistant's header and its <|im_end|>: text, then calls, a newline between."""
    pieces = [text] if text else []
    for call in calls:
        newline = "\n" if pieces else ""
        pieces += [newline, CALL, f'\n{{"name": "{call["name"]}", "arguments": {dumps(call["arguments"])}}}\n', CALL_END]
    return pieces


def results_turn(results: list[str]) -> list[str]:
    """All results of a turn, in the order of its calls, as one user turn (the template names neither tool nor id)."""
    return [IM_START, "user" + "".join(f"\n<tool_response>\n{r}\n</tool_response>" for r in results), IM_END, "\n"]


def result_text(observation: dict) -> str:
    """JSON without '<': <tool_response> is plain text in Qwen2.5, a result must not be able to close it."""
    return dumps(observation).replace("<", "\\u003c")


def _jinja(pieces: list[str]) -> str:
    return "{{- " + json.dumps("".join(pieces)) + " }}"


CHAT_TEMPLATE = "".join((  # the same format for transformers' apply_chat_template, written beside a checkpoint
    "{%- if messages[0].role == 'system' %}{%- set head = messages[0].content %}{%- else %}",
    "{%- set head = ", json.dumps(DEFAULT_SYSTEM), " %}{%- endif %}",
    _jinja([IM_START, "system\n"]), "{{- head }}",
    "{%- if tools %}", _jinja([TOOLS_HEAD]), "{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}",
    _jinja(TOOLS_TAIL), "{%- endif %}", _jinja([IM_END, "\n"]),
    "{%- for m in messages %}{%- if m.role == 'tool' %}",
    "{%- if loop.first or loop.previtem.role != 'tool' %}", _jinja([IM_START, "user"]), "{%- endif %}",
    "{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}",
    "{%- if loop.last or loop.nextitem.role != 'tool' %}", _jinja([IM_END, "\n"]), "{%- endif %}",
    "{%- elif not (loop.first and m.role == 'system') %}", _jinja([IM_START]), "{{- m.role }}",
    "{%- if m.content or not m.tool_calls %}{{- '\\n' + m.content }}{%- endif %}",
    "{%- for call in m.tool_calls or [] %}{%- set f = call.function or call %}",
    _jinja(["\n", CALL, '\n{"name": "']), "{{- f.name + '\", \"arguments\": ' + (f.arguments | tojson) }}",
    _jinja(["}\n", CALL_END]), "{%- endfor %}", _jinja([IM_END, "\n"]), "{%- endif %}{%- endfor %}",
    "{%- if add_generation_prompt %}", _jinja(GENERATE), "{%- endif %}"))

# ------------------------------------------------------------------------------------------- prompts

AGENT_SYSTEM = ("Think inside <think></think>. Then call tools, or give the final answer, as short as it can be, "
                "inside <answer></answer>.")
MAKER_SYSTEM = ("Write the tools that help to answer the question. Think inside <think></think> what has to be looked "
                "up. Then give the question's kind, one of {kinds}, inside <kind></kind>. Then, inside <tools></tools>, "
                "one JSON object a line: name, description, parameters and returns, the last two as JSON schemas.")
ACTOR_SYSTEM = ("You play a tool. For each call give what the tool would return, one JSON object that fits "
                "its schema returns, or an error.")
SOURCE_HEAD = "All that this tool knows:"
CLOSED_BOOK = "<think>I guess.</think>\n<answer>"  # put into the agent's mouth where it must answer with no tool


# --------------------------------------------------------------------------------------------- tools


class Rejected(ValueError):
    """What a model wrote can't be used; the message says why in a few words that can stand in a prompt."""


def strict_json(text: str, most: int = 200) -> object:
    """JSON without NaN, infinities and repeated keys, of at most so many parts; Rejected for anything else.

    >>> strict_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    agents.Rejected: repeated key
    """
    def unique(pairs: list[tuple]) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise Rejected("repeated key")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise Rejected(f"{constant} is not JSON")

    if text.count("[") + text.count("{") > most:
        raise Rejected("too deep")
    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # 1e999 is infinity, "\\ud800" no character
        return value
    except Rejected:
        raise
    except (ValueError, RecursionError):
        raise Rejected("not JSON") from None


@dataclass(frozen=True, eq=False)
class Tool:
    """An OpenAI function, what it returns (no part of OpenAI's format), and, if it isn't simulated, its code."""
    name: str
    description: str
    parameters: dict
    returns: dict
    run: Callable[..., dict] | None = None
    source: str = ""  # texts that the ToolActor answers from, if any

    @property
    def schema(self) -> dict:
        """As OpenAI's API takes it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    @cached_property
    def definition(self) -> str:
        """All four parts as JSON: what the ToolMaker writes and the ToolActor reads, its source below."""
        head = f"\n{SOURCE_HEAD}\n{self.source}" if self.source else ""
        return dumps({**self.schema["function"], "returns": self.returns}) + head

    @cached_property
    def arguments_fit(self) -> jsonschema.Draft202012Validator:
        return jsonschema.Draft202012Validator(self.parameters)

    @cached_property
    def result_fits(self) -> jsonschema.Draft202012Validator:
        return jsonschema.Draft202012Validator(self.returns)


MAX_TOOLS, MAX_DEPTH, MAX_DESCRIPTION = 8, 6, 1024


def check_tools(tools: list[dict]) -> list[Tool]:
    """What the ToolMaker wrote -> tools, or Rejected.

    Checked: the four parts and no other; name of 1 to 64 letters, digits, _ or -, used once and by no utility
    tool; a description; both schemas valid JSON Schema, of type object with properties, required among them, no
    $ref, no pattern, no dependentSchemas, no deep nesting. Not checked: that the tool is of any use, or that the description is true."""
    if not 1 <= len(tools) <= MAX_TOOLS:
        raise Rejected(f"not 1 to {MAX_TOOLS} tools" if tools else "no tools")
    made: list[Tool] = []
    for tool in tools:
        if not isinstance(tool, dict) or set(tool) != {"name", "description", "parameters", "returns"}:
            raise Rejected("a tool has name, description, parameters, returns")
        check_schema(tool["returns"])
        made.append(_check_function(tool, made))
    return made


def _check_function(function: dict, others: list[Tool]) -> Tool:
    """The rules that the ToolMaker's tools and a user's have in common."""
    name, description = function["name"], function["description"]
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise Rejected("bad tool name")
    if name in UTILITIES or any(name == other.name for other in others):
        raise Rejected("tool name taken")
    if not isinstance(description, str) or not 0 < len(description.strip()) <= MAX_DESCRIPTION:
        raise Rejected("bad description")
    check_schema(function["parameters"])
    return Tool(**function)


def load_tools(path: Path) -> list[Tool]:
    """A user's tools; InputError names the tool and the rule it breaks. JSON: a list of OpenAI functions, with
    `returns` or without (any object is a result then), which the ToolActor plays. Python: the file is executed, its
    TOOLS are pairs of such a function and the Python function that is called."""
    path, made, place = Path(path), [], ""
    try:
        if path.suffix == ".py":
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            pairs = list(module.TOOLS)
        else:
            schemas = strict_json(path.read_text(encoding="utf-8"), most=100_000)
            if not isinstance(schemas, list):
                raise Rejected("expected a JSON list of tools")
            pairs = [(schema, None) for schema in schemas]
        if not pairs:
            raise Rejected("no tools; at least one is needed")
        for number, (schema, run) in enumerate(pairs, 1):
            place = f"tool {number}: "
            function = dict(schema.get("function", schema))
            place = f"tool {number} ({function.get('name')!r:.70}): "
            if missing := {"name", "description", "parameters"} - set(function):
                raise Rejected(f"no {sorted(missing)[0]}")
            if unknown := set(function) - {"name", "description", "parameters", "returns", "strict"}:
                raise Rejected(f"unknown part {sorted(unknown)[0]}")
            strict = function.pop("strict", False)
            if "returns" in function:
                check_schema(function["returns"])
            made.append(_check_function({"returns": {"type": "object"}, **function, "run": run and _guarded(run)}, made))
            if strict:
                _check_strict(function["parameters"])
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    except Exception as error:  # a user's file may raise anything
        reason = error if isinstance(error, Rejected) else f"{type(error).__name__}: {error}".replace("\n", " ")
        raise InputError(f"{path}: {place}{reason}") from None
    return made


def _guarded(function: Callable[..., dict]) -> Callable[..., dict]:
    """A real tool may fail, or return anything: for the agent that is an observation, not the end of the run."""
    def run(*values: object, **arguments: object) -> dict:
        try:
            result = strict_json(dumps(function(*values, **arguments)), most=100_000)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:200]}
        return result if isinstance(result, dict) else {"result": result}
    return run


def _check_strict(schema: object) -> None:
    """OpenAI's strict mode: every object closed, and every property required, all the way down."""
    if isinstance(schema, dict):
        if "properties" in schema or "object" in (schema.get("type"), *_list(schema.get("type"))):
            if schema.get("additionalProperties") is not False:
                raise Rejected("strict, but an object is open")
            if set(_list(schema.get("required"))) != set(schema.get("properties", {})):
                raise Rejected("strict, but a property is not required")
        for key, child in schema.items():
            for part in child.values() if key == "properties" and isinstance(child, dict) else [child]:
                _check_strict(part)
    for child in _list(schema):
        _check_strict(child)


def _list(value: object) -> list:
    return value if isinstance(value, list) else []


def check_schema(schema: object) -> None:
    """Rejected unless it is a closed-world JSON schema of an object (see check_tools)."""
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise Rejected("schema not of type object")
    properties = schema.get("properties")
    if not isinstance(properties, dict) or not all(isinstance(part, dict) for part in properties.values()):
        raise Rejected("schema without properties")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(r, str) and r in schema["properties"] for r in required):
        raise Rejected("required names no property")
    _check_depth(schema, 0)
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise Rejected("unknown type" if error.validator in ("anyOf", "enum") else "bad schema") from None


def _check_depth(node: object, depth: int, names: bool = False) -> None:
    """names: the keys of this object are names of properties, not keywords."""
    if depth > 2 * MAX_DEPTH:
        raise Rejected("schema too deep")
    if isinstance(node, dict):
        for key in ("$ref", "$dynamicRef", "pattern", "patternProperties", "dependentSchemas"):
            if key in node and not names:
                raise Rejected(f"schema with {key}")
        for key, child in node.items():
            _check_depth(child, depth + 1, key == "properties" and not names)
    elif isinstance(node, list):
        for child in node:
            _check_depth(child, depth + 1)


UTILITIES = {spec["name"]: Tool(**{**spec, "run": _guarded(spec["run"])})  # predefined, and run, not simulated
             for spec in data.tools.UTILITIES}
# What the ToolMaker sorts questions into, and which utility tools come with each kind.
KINDS = {"composition": (), "inference": (), "comparison": ("compare",),
         "arithmetic": ("calculator", "date_difference", "count")}
FALLBACK = Tool("lookup", "Look up a property of a subject.",
                {"type": "object", "properties": {"subject": {"type": "string"}, "property": {"type": "string"}},
                 "required": ["subject", "property"]},
                {"type": "object", "properties": {"value": {"type": "string"}}, "required": ["value"]})


# -------------------------------------------------------------------------------------------- parser


@dataclass
class Call:
    """One tool call: what was asked, why it was refused (if it was), what came back."""
    name: str = ""
    arguments: dict = field(default_factory=dict)
    error: str | None = None
    observation: dict = field(default_factory=dict)

    @property
    def succeeded(self) -> bool:
        return self.error is None and "error" not in self.observation


@dataclass
class Turn:
    """One turn of AutoAgent: a thought, then calls or an answer; or the name of what breaks the grammar."""
    thought: str = ""
    calls: list[Call] = field(default_factory=list)
    answer: str | None = None
    error: str | None = None

    def said(self) -> list[str]:
        """For people: thought, calls, answer, a line each; nothing in them moves a terminal's cursor."""
        calls = [f"  calls     {c.name}({', '.join(f'{k}={v!r}' for k, v in c.arguments.items())})" for c in self.calls]
        return [*map(_printable, [*([f"  thinks    {self.thought}"] if self.thought else []), *calls,
                                  *([f"  answers   {self.answer}"] if self.answer is not None else []),
                                  *([f"  malformed {self.error}"] if self.error else [])])]

    def heard(self) -> list[str]:
        """For people: what came back, a line a call."""
        return [_printable(f"  observes  {result_text(c.observation)}") for c in self.calls]


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


# None of these takes more than linear time, whatever a model writes: no two parts compete for the same text.
THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
CALLS = re.compile(r"<tool_call>(.*?)</tool_call>\s*", re.DOTALL)


def parse_turn(text: str) -> Turn:
    """A turn's text, <|im_end|> not included -> Turn; every string gives one, at worst with an error. What is
    quoted inside the thought is neither a call nor an answer; nothing may follow the answer or the last call."""
    if not (match := THOUGHT.fullmatch(text)):
        return Turn(error="no thought")
    thought, rest = match[1].strip(), match[2].strip()
    if "<think>" in thought:
        return Turn(error="nested thought")
    if match := ANSWER.fullmatch(rest):
        if "<" in match[1]:
            return Turn(error="tag in the answer")
        return Turn(thought, answer=match[1].strip())
    end = rest.rfind("</tool_call>") + len("</tool_call>")
    bodies = CALLS.findall(rest, 0, end)
    if not bodies:
        return Turn(error="neither call nor answer" if "<answer>" not in rest else "answer not alone")
    if CALLS.sub("", rest[:end]) + rest[end:]:
        return Turn(error="text beside the calls")
    return Turn(thought, [parse_call(body) for body in bodies])


def parse_call(text: str) -> Call:
    """The inside of <tool_call>: an object with exactly name and arguments. What can't be read is a Call with
    an error, an event that costs reward, not the end of the trace."""
    try:
        call = strict_json(text)
    except Rejected as error:
        return Call(error=str(error))
    if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
        return Call(error="a call has name and arguments")
    if not isinstance(call["name"], str) or not isinstance(call["arguments"], dict):
        return Call(error="name is a string, arguments an object")
    return Call(call["name"], call["arguments"])


# --------------------------------------------------------------------------------------------- trace


@dataclass
class Trace:
    """A question on its way to an answer: the one thing that all stages see. ids, mask and logprobs run in
    parallel and grow together: mask is 1 on what the trace's own role says, its <|im_end|> included, 0 elsewhere."""
    question: str = ""
    tools: list[Tool] = field(default_factory=list)
    key: tuple = ()  # what its random numbers depend on: (seed, question id, sample)
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # the sampler's; 0 where the mask is
    turns: list[Turn] = field(default_factory=list)
    status: str = "open"  # then answered, malformed or truncated

    def hear(self, ids: list[int]) -> None:
        """Add tokens that somebody else says."""
        self._add(ids, 0, [0.0] * len(ids))

    def say(self, ids: list[int], logprobs: list[float] | None = None) -> None:
        """Add tokens that this trace's role says: these are learned from."""
        self._add(ids, 1, logprobs or [0.0] * len(ids))

    def _add(self, ids: list[int], mask: int, logprobs: list[float]) -> None:
        assert len(ids) == len(logprobs), f"{len(ids)} ids, {len(logprobs)} log-probabilities"
        self.ids += ids
        self.mask += [mask] * len(ids)
        self.logprobs += logprobs

    @property
    def calls(self) -> list[Call]:
        return [call for turn in self.turns for call in turn.calls]

    @property
    def answer(self) -> str | None:
        return self.turns[-1].answer if self.turns else None

    def noise(self, n: int) -> np.ndarray:
        """Uniform numbers (n,) for the next n tokens: a function of the trace's key and the position alone."""
        if "_noise" not in self.__dict__ or len(self.ids) + n > len(self._noise):
            words = [zlib.crc32(repr(part).encode()) for part in self.key]
            self._noise = np.random.default_rng(words).random(max(1024, len(self.ids) + n), dtype=np.float32)
        return np.minimum(self._noise[len(self.ids):len(self.ids) + n], 1 - 1e-6)

    def record(self) -> dict:
        """For traces.jsonl: everything, the tools as schemas."""
        turns = [{"thought": t.thought, "calls": [vars(c) for c in t.calls], "answer": t.answer, "error": t.error}
                 for t in self.turns]
        return {"question": self.question, "status": self.status, "turns": turns, "key": list(self.key),
                "tools": [tool.schema for tool in self.tools], "ids": self.ids, "mask": self.mask}

    def story(self) -> str:
        """For people: all turns, and how it ended if not with an answer."""
        lines = [line for t in self.turns for line in (*t.said(), *t.heard())]
        return "\n".join([*lines, *([f"  {self.status}"] if self.status != "answered" else [])])


# --------------------------------------------------------------------------------------------- roles


class AutoAgent:
    """Thinks, acts, observes: many traces side by side, each a conversation that the sampler keeps open."""

    def __init__(self, sampler, max_turns: int, turn_tokens: int, trace_tokens: int, temperature: float = 1.0):
        self.sampler, self.temperature = sampler, temperature
        self.max_turns, self.turn_tokens, self.trace_tokens = max_turns, turn_tokens, trace_tokens

    @staticmethod
    def prompt(question: str, tools: list[Tool]) -> list[str]:
        """Tools and question as pieces, up to where the agent speaks."""
        return [*system_turn(AGENT_SYSTEM, [tool.schema for tool in tools]), *turn("user", question), *GENERATE]

    def start(self, traces: list[Trace], group: int = 1, closed_book: bool = False) -> None:
        """Open the traces; each run of `group` of them has question and tools in common, read once."""
        encode = self.sampler.tokenizer.encode
        for i in range(0, len(traces), group):
            prompt = encode(self.prompt(traces[i].question, traces[i].tools) + ([CLOSED_BOOK] if closed_book else []))
            for trace in traces[i:i + group]:
                trace.hear(prompt)
        for trace in traces:
            trace.status = "open" if len(trace.ids) < self.trace_tokens else "truncated"  # no room to speak
        live = [trace for trace in traces if trace.status == "open"]
        self.sampler.reset()
        self.rows = dict(zip(map(id, live), self.sampler.open([t.ids for t in live[::group]], group)))
        self.prefix = CLOSED_BOOK if closed_book else ""

    def act(self, traces: list[Trace]) -> None:
        """Every open trace says its next turn."""
        limits = [min(self.turn_tokens, self.trace_tokens - len(trace.ids)) for trace in traces]
        noise = np.stack([trace.noise(max(limits)) for trace in traces])
        said = self.sampler.sample([self.rows[id(t)] for t in traces], limits, noise, self.temperature)
        for trace, (ids, logprobs) in zip(traces, said):
            trace.say(ids, logprobs)
            if ids[-1] not in self.sampler.tokenizer.stop_ids:
                trace.turns.append(Turn(error="cut off at the token limit"))
                trace.status = "truncated"
                continue
            text = self.prefix + self.sampler.tokenizer.decode(ids[:-1])
            turn = parse_turn(text) if ids[-1] == self.sampler.tokenizer.end else Turn(error="ends without <|im_end|>")
            trace.turns.append(turn)
            trace.status = "malformed" if turn.error else "open" if turn.answer is None else "answered"

    def observe(self, traces: list[Trace]) -> None:
        """Hand the observations of the last turn to the traces that can go on."""
        for trace in traces:
            results = [result_text(call.observation) for call in trace.turns[-1].calls]
            ids = self.sampler.tokenizer.encode(["\n", *results_turn(results), *GENERATE])
            if len(trace.turns) == self.max_turns or len(trace.ids) + len(ids) >= self.trace_tokens:
                trace.status = "truncated"
                continue
            trace.hear(ids)
            self.sampler.append(self.rows[id(trace)], ids)


def run_episodes(agent: AutoAgent, backend, traces: list[Trace], group: int = 1, closed_book: bool = False) -> None:
    """The loop of the method (figure 1b): think and act, observe, until every trace has answered or run out."""
    agent.start(traces, group, closed_book)
    while live := [trace for trace in traces if trace.status == "open"]:
        agent.act(live)
        live = [trace for trace in live if trace.status == "open"]
        run_calls(live, backend)
        agent.observe(live)


def run_calls(traces: list[Trace], backend) -> None:
    """Give each call of the last turns its observation: refused calls an error, utility tools are run, and the
    backend (the ToolActor, as a rule) answers the rest in one batch."""
    asked = []
    for trace in traces:
        tools = {tool.name: tool for tool in trace.tools}
        for call in trace.turns[-1].calls:
            call.error = call.error or call_error(call, tools)
            if call.error:
                call.observation = {"error": call.error}
            elif tools[call.name].run:
                call.observation = tools[call.name].run(**call.arguments)
            else:
                asked.append((tools[call.name], call))
    answers = backend.answer([(tool, call.arguments) for tool, call in asked])
    for (_, call), observation in zip(asked, answers, strict=True):
        call.observation = observation


def call_error(call: Call, tools: dict[str, Tool]) -> str | None:
    """Why a call can't be made, in a line that the agent may learn from; None if it can."""
    return misfit(tools[call.name].arguments_fit, call.arguments) if call.name in tools else "unknown tool"


def misfit(validator: jsonschema.Draft202012Validator, value: dict) -> str | None:
    """What is wrong with a value by its schema, in a line; None if it fits."""
    try:
        error = next(validator.iter_errors(value), None)
    except (ArithmeticError, RecursionError):  # a number or a nesting that the schema's arithmetic can't hold
        return "arguments out of range"
    return error.message[:80] if error else None


def say_once(sampler, prompts: list[list[int]], limit: int, temperature: float, keys: list[tuple]) -> list[str]:
    """One reply to each prompt, in batches; "" where there is no room for one, or it doesn't end within the limit."""
    replies = [""] * len(prompts)
    fit = [i for i, prompt in enumerate(prompts) if len(prompt) + limit <= sampler.slots]
    for part in (fit[i:i + sampler.capacity] for i in range(0, len(fit), sampler.capacity)):
        sampler.reset()
        rows = sampler.open([prompts[i] for i in part])
        noise = np.stack([Trace(key=keys[i]).noise(limit) for i in part])
        for i, (ids, _) in zip(part, sampler.sample(rows, [limit] * len(part), noise, temperature)):
            replies[i] = sampler.tokenizer.decode(ids[:-1]) if ids[-1] == sampler.tokenizer.end else ""
    return replies


class ToolActor:
    """Plays the tools. It is told the tool's definition and the call: never the question, never the gold answer.
    Greedy and remembered, so a world that it makes up is at least one world."""
    TRIES, MEMORY = 3, 100_000
    NO_RESULT = {"error": "the tool gave no valid result"}

    def __init__(self, sampler, reply_tokens: int = 64):
        self.sampler, self.limit = sampler, reply_tokens
        self.memo: OrderedDict[str, dict] = OrderedDict()
        self.asked = self.remembered = self.invalid = 0

    @staticmethod
    def prompt(definition: str, arguments: dict) -> list[str]:
        """The tool and the call as pieces, up to where the actor speaks."""
        return [*system_turn(ACTOR_SYSTEM), *turn("user", f"{definition}\n{dumps(arguments)}"), *GENERATE]

    def answer(self, requests: list[tuple[Tool, dict]]) -> list[dict]:
        """An observation for each (tool, arguments), each distinct one simulated once, all in one batch."""
        keys = [tool.definition + json.dumps(arguments, sort_keys=True) for tool, arguments in requests]
        todo = {key: request for key, request in zip(keys, requests) if key not in self.memo}
        self.asked += len(keys)
        self.remembered += len(keys) - len(todo)
        for attempt in range(self.TRIES):
            if not todo:
                break
            prompts = [self.sampler.tokenizer.encode(self.prompt(tool.definition, args)) for tool, args in todo.values()]
            replies = say_once(self.sampler, prompts, self.limit, float(attempt > 0), [(k, attempt) for k in todo])
            for (key, (tool, _)), reply in zip(list(todo.items()), replies):
                observation = parse_observation(tool, reply)
                if observation is not None or attempt == self.TRIES - 1:
                    self.invalid += observation is None
                    self.memo[key] = self.NO_RESULT if observation is None else observation
                    del todo[key]
        answers = [self.memo[key] for key in keys]
        while len(self.memo) > self.MEMORY:
            self.memo.popitem(last=False)
        return answers


def parse_observation(tool: Tool, text: str) -> dict | None:
    """What the ToolActor wrote, if it is an object that fits the tool's return schema, or an error; else None."""
    try:
        value = strict_json(text)
    except Rejected:
        return None
    if isinstance(value, dict) and set(value) == {"error"} and isinstance(value["error"], str):
        return value
    return value if isinstance(value, dict) and misfit(tool.result_fits, value) is None else None


@dataclass
class Toolbox:
    """What the ToolMaker made of a question: its kind, its tools, the tries it took (0: the fallback); what it thought
    and why its try before was rejected."""
    kind: str
    made: list[Tool]
    tries: int
    thought: str = ""
    rejected: str = ""

    @property
    def tools(self) -> list[Tool]:
        return self.made + [UTILITIES[name] for name in KINDS[self.kind]]


class ToolMaker:
    """Classification, then generation, then validation (figure 1a): what is rejected is written again with the
    reason in the prompt; after three tries the question gets the one general tool."""
    TRIES = 3

    def __init__(self, sampler, reply_tokens: int = 480):
        self.sampler, self.limit = sampler, reply_tokens

    @staticmethod
    def prompt(question: str, rejected: str = "") -> list[str]:
        """The question, and why an earlier try was rejected, as pieces, up to where the maker speaks."""
        reason = f"\nRejected: {rejected}" if rejected else ""
        return [*system_turn(MAKER_SYSTEM.format(kinds=", ".join(KINDS))), *turn("user", question + reason), *GENERATE]

    @staticmethod
    def reply(thought: str, kind: str, tools: list[Tool]) -> str:
        """What a ToolMaker should say: the text that parse_tools reads."""
        return "\n".join([f"<think>{thought}</think>", f"<kind>{kind}</kind>", "<tools>", *(tool.definition for tool in tools), "</tools>"])

    def make(self, questions: list[str], key: tuple = ()) -> list[Toolbox]:
        """A Toolbox for each question; the first try is greedy, the others are sampled."""
        boxes: list[Toolbox | None] = [None] * len(questions)
        reasons = [""] * len(questions)
        for attempt in range(1, self.TRIES + 1):
            todo = [i for i, box in enumerate(boxes) if box is None]
            prompts = [self.sampler.tokenizer.encode(self.prompt(questions[i], reasons[i])) for i in todo]
            keys = [(*key, questions[i], attempt) for i in todo]
            for i, reply in zip(todo, say_once(self.sampler, prompts, self.limit, float(attempt > 1), keys)):
                try:
                    boxes[i] = Toolbox(*parse_tools(reply), attempt, TOOLS_REPLY.fullmatch(reply)[1].strip(), reasons[i])
                except Rejected as error:
                    reasons[i] = str(error)
        return [box or Toolbox("composition", [FALLBACK], 0) for box in boxes]


TOOLS_REPLY = re.compile(r"\s*<think>(?>(.*?)</think>)\s*<kind>(?>(.*?)</kind>)\s*<tools>(.*)</tools>\s*", re.DOTALL)


def parse_tools(text: str) -> tuple[str, list[Tool]]:
    """What the ToolMaker wrote -> kind and tools, or Rejected."""
    if not (match := TOOLS_REPLY.fullmatch(text)):
        raise Rejected("no think, kind and tools")
    if match[2].strip() not in KINDS:
        raise Rejected("unknown kind")
    lines = [line for line in match[3].split("\n") if line.strip()]
    return match[2].strip(), check_tools([strict_json(line) for line in lines])
