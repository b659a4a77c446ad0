"""The idea: three agents that are prompt templates over one sampler. No tensors in this file.

    ToolMaker   reads a question, classifies it and writes the tools it needs; they are validated
    AutoAgent   thinks, calls tools, reads observations, answers (ReAct)
    ToolActor   simulates the result of a call; the result must fit the tool's return schema

The sampler (model.Sampler) opens conversations, appends to them and generates. Sampled ids are
never decoded and encoded again. All tokens enter a Trace together with their loss mask.
"""
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path

import jsonschema
import numpy as np

import data.tools
from data.schema import (
    Rejected,
    check_function,
    check_schema,
    first_error,
    object_schema,
    strict_json,
)

# ---------------------------------------------------------------------------------------- protocol
# Qwen2.5's chat and tool format: the chat_template of Qwen2.5-Instruct's tokenizer_config.json.
# A prompt is a list of strings. A plain `str` is text; a `Control` is one control token.


class Control(str):
    """A control token. Text can never encode to one."""


IM_START, IM_END = Control("<|im_start|>"), Control("<|im_end|>")
CALL, CALL_END = Control("<tool_call>"), Control("</tool_call>")
DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
TOOLS_HEAD = ("\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
              "You are provided with function signatures within <tools></tools> XML tags:\n<tools>")
TOOLS_TAIL = ["\n</tools>\n\nFor each function call, return a json object with function name and "
              "arguments within ", CALL, CALL_END, " XML tags:\n", CALL,
              '\n{"name": <function-name>, "arguments": <args-json-object>}\n', CALL_END]
GENERATE = [IM_START, "assistant\n"]  # header of the turn that is generated next


def dumps(value: object) -> str:
    """JSON as the template prints it: spaces after , and :, insertion order, non-ASCII kept."""
    return json.dumps(value, ensure_ascii=False)


def turn(role: str, *content: str) -> list[str]:
    """One whole turn."""
    return [IM_START, f"{role}\n", *content, IM_END, "\n"]


def system_turn(text: str = DEFAULT_SYSTEM, schemas: list[dict] = ()) -> list[str]:
    """The system turn: instructions, then the schemas of the tools, if there are any."""
    if not schemas:
        return turn("system", text)
    lines = ["\n" + dumps(schema) for schema in schemas]
    return turn("system", text, TOOLS_HEAD, *lines, *TOOLS_TAIL)


def assistant_content(text: str, calls: list[dict]) -> list[str]:
    """The content of an assistant turn: text, then calls, separated by newlines."""
    pieces = [text] if text else []
    for call in calls:
        body = f'\n{{"name": "{call["name"]}", "arguments": {dumps(call["arguments"])}}}\n'
        pieces += ["\n" if pieces else "", CALL, body, CALL_END]
    return pieces


def results_turn(results: list[str]) -> list[str]:
    """One user turn with the results of all calls of a turn, in the order of the calls."""
    texts = [f"\n<tool_response>\n{result}\n</tool_response>" for result in results]
    return [IM_START, "user" + "".join(texts), IM_END, "\n"]


def result_text(observation: dict) -> str:
    """JSON without "<". <tool_response> is plain text in Qwen2.5, so a result could close it."""
    return dumps(observation).replace("<", "\\u003c")


# ----------------------------------------------------------------------------------------- prompts

AGENT_SYSTEM = ("Think inside <think></think>. Then call tools, or give the final answer, as "
                "short as it can be, inside <answer></answer>.")
MAKER_SYSTEM = ("Write the tools that help to answer the question. Think inside <think></think> "
                "what has to be looked up. Then give the question's kind, one of {kinds}, inside "
                "<kind></kind>. Then, inside <tools></tools>, one JSON object a line: name, "
                "description, parameters and returns, the last two as JSON schemas.")
ACTOR_SYSTEM = ("You play a tool. For each call give what the tool would return, one JSON object "
                "that fits its schema returns, or an error.")
SOURCE_HEAD = "All that this tool knows:"
CLOSED_BOOK = "<think>I guess.</think>\n<answer>"  # start of the turn of an agent without tools


# ------------------------------------------------------------------------------------------- tools


@dataclass(frozen=True, eq=False)
class Tool:
    """An OpenAI function and the schema of its result, which is not a part of OpenAI's format."""
    name: str
    description: str
    parameters: dict
    returns: dict
    run: Callable[..., dict] | None = None  # code of a real tool; the ToolActor simulates the rest
    source: str = ""                        # texts that the ToolActor answers from

    @property
    def schema(self) -> dict:
        """The tool in the form that OpenAI's API takes."""
        function = {"name": self.name, "description": self.description,
                    "parameters": self.parameters}
        return {"type": "function", "function": function}

    @cached_property
    def definition(self) -> str:
        """All four parts as JSON, as the ToolMaker writes and the ToolActor reads them."""
        source = f"\n{SOURCE_HEAD}\n{self.source}" if self.source else ""
        return dumps({**self.schema["function"], "returns": self.returns}) + source

    @cached_property
    def argument_validator(self) -> jsonschema.Draft202012Validator:
        return jsonschema.Draft202012Validator(self.parameters)

    @cached_property
    def result_validator(self) -> jsonschema.Draft202012Validator:
        return jsonschema.Draft202012Validator(self.returns)


MAX_TOOLS = 8


def check_tools(tools: list[dict]) -> list[Tool]:
    """Turn the ToolMaker's JSON into tools. Rejected names the rule that is broken.

    Checked: exactly four parts; a name of 1 to 64 letters, digits, _ or -, used once; a
    description; both schemas (see data/schema.py). Not checked: whether the tool is useful.
    """
    if not 1 <= len(tools) <= MAX_TOOLS:
        raise Rejected(f"not 1 to {MAX_TOOLS} tools" if tools else "no tools")
    parts = {"name", "description", "parameters", "returns"}
    taken = set(UTILITIES)
    for tool in tools:
        if not isinstance(tool, dict) or set(tool) != parts:
            raise Rejected("a tool has name, description, parameters, returns")
        check_schema(tool["returns"])
        check_function(tool, taken)
        taken.add(tool["name"])
    return [Tool(**tool) for tool in tools]


def load_tools(path: Path) -> list[Tool]:
    """Read a user's own tools from a JSON or Python file (see data.tools.read_tools)."""
    return [Tool(**function) for function in data.tools.read_tools(path)]


# Utility tools are predefined and run. All other tools are simulated.
UTILITIES = {spec["name"]: Tool(**spec) for spec in data.tools.UTILITIES}
# The kinds of questions that the ToolMaker distinguishes, and the utility tools of each kind.
KINDS = {"composition": (), "inference": (), "comparison": ("compare",),
         "arithmetic": ("calculator", "date_difference", "count")}
TEXT = {"type": "string"}
FALLBACK = Tool("lookup", "Look up a property of a subject.",
                object_schema(subject=TEXT, property=TEXT), object_schema(value=TEXT))


# ------------------------------------------------------------------------------------------ parser


@dataclass
class Call:
    """One tool call."""
    name: str = ""
    arguments: dict = field(default_factory=dict)
    error: str | None = None         # why it was refused
    observation: dict | None = None  # what came back

    @property
    def succeeded(self) -> bool:
        return self.error is None and "error" not in (self.observation or {})


@dataclass
class Turn:
    """One turn of AutoAgent: a thought, then calls or an answer; or an error of the grammar."""
    thought: str = ""
    calls: list[Call] = field(default_factory=list)
    answer: str | None = None
    error: str | None = None


# These take linear time on any text, because no two parts can match the same characters.
THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
CALLS = re.compile(r"<tool_call>(.*?)</tool_call>\s*", re.DOTALL)


def parse_turn(text: str) -> Turn:
    """Parse a turn without its <|im_end|>. Every string gives a Turn, perhaps with an error.

    Tags inside the thought don't count. Nothing may follow the answer or the last call.
    """
    match = THOUGHT.fullmatch(text)
    if not match:
        return Turn(error="no thought")
    thought = match[1].strip()
    rest = match[2].strip()
    if "<think>" in thought:
        return Turn(error="nested thought")
    if match := ANSWER.fullmatch(rest):
        if "<" in match[1]:
            return Turn(error="tag in the answer")
        return Turn(thought, answer=match[1].strip())
    end = rest.rfind("</tool_call>") + len("</tool_call>")
    bodies = CALLS.findall(rest, 0, end)
    if not bodies:
        found = "<answer>" in rest
        return Turn(error="answer not alone" if found else "neither call nor answer")
    if CALLS.sub("", rest[:end]) + rest[end:]:
        return Turn(error="text beside the calls")
    return Turn(thought, [parse_call(body) for body in bodies])


def parse_call(text: str) -> Call:
    """Parse the body of a <tool_call>. A bad body gives a Call with an error; the trace goes on."""
    try:
        call = strict_json(text)
    except Rejected as error:
        return Call(error=str(error))
    if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
        return Call(error="a call has name and arguments")
    if not isinstance(call["name"], str) or not isinstance(call["arguments"], dict):
        return Call(error="name is a string, arguments an object")
    return Call(call["name"], call["arguments"])


# ------------------------------------------------------------------------------------------- trace


@dataclass
class Trace:
    """One question on its way to an answer. All stages work on traces.

    ids, mask and logprobs are parallel lists. The mask is 1 on tokens that the trace's role
    generates, including its <|im_end|>, and 0 on all others.
    """
    question: str = ""
    tools: list[Tool] = field(default_factory=list)
    key: tuple = ()  # (seed, question id, sample): the random numbers depend on it
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # from the sampler; 0 where the mask is 0
    turns: list[Turn] = field(default_factory=list)
    status: str = "open"      # then "answered", "malformed" or "truncated"
    # Stage 2 sets these (see grpo.py). old and reference are parallel to ids.
    advantage: float = 0.0  # A_i
    weight: float = 0.0     # w_i: the weight of each sampled token in the objective
    old: list[float] = field(default_factory=list)        # log-probabilities under pi_old
    reference: list[float] = field(default_factory=list)  # log-probabilities under pi_ref

    def hear(self, ids: list[int]) -> None:
        """Add tokens from outside: mask 0."""
        self._add(ids, 0, [0.0] * len(ids))

    def say(self, ids: list[int], logprobs: list[float] | None = None) -> None:
        """Add tokens that this role generates: mask 1."""
        self._add(ids, 1, logprobs or [0.0] * len(ids))

    def _add(self, ids: list[int], mask: int, logprobs: list[float]) -> None:
        assert len(ids) == len(logprobs), f"{len(ids)} ids, {len(logprobs)} log-probabilities"
        self.ids += ids
        self.mask += [mask] * len(ids)
        self.logprobs += logprobs

    @property
    def calls(self) -> list[Call]:
        return list(chain.from_iterable(turn.calls for turn in self.turns))

    @property
    def answer(self) -> str | None:
        return self.turns[-1].answer if self.turns else None

    def noise(self, n: int) -> np.ndarray:
        """Uniform numbers (n,) for the next n tokens. They depend on key and position only."""
        key = [zlib.crc32(repr(part).encode()) for part in self.key]
        start = len(self.ids)
        numbers = np.random.default_rng(key).random(start + n, dtype=np.float32)
        return np.minimum(numbers[start:], 1 - 1e-6)

    def record(self) -> dict:
        """The trace as JSON, for traces.jsonl."""
        turns = [{**vars(t), "calls": [vars(call) for call in t.calls]} for t in self.turns]
        return {"question": self.question, "status": self.status, "turns": turns,
                "key": list(self.key), "tools": [tool.schema for tool in self.tools],
                "ids": self.ids, "mask": self.mask}

    def story(self) -> str:
        """The trace for people: one line per thought, call, observation and answer."""
        lines = []
        for t in self.turns:
            if t.thought:
                lines.append(f"  thinks    {t.thought}")
            for call in t.calls:
                arguments = ", ".join(f"{k}={v!r}" for k, v in call.arguments.items())
                lines.append(f"  calls     {call.name}({arguments})")
            for call in t.calls:
                if call.observation is not None:
                    lines.append(f"  observes  {result_text(call.observation)}")
            if t.answer is not None:
                lines.append(f"  answers   {t.answer}")
            if t.error:
                lines.append(f"  malformed {t.error}")
        if self.status == "truncated":
            lines.append("  truncated")
        return "\n".join(printable(line) for line in lines)


def printable(line: str) -> str:
    """Escape newlines and all characters that could move the cursor of a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


# ------------------------------------------------------------------------------------------- roles


class AutoAgent:
    """Thinks, acts and observes: many traces in parallel, each an open conversation."""

    def __init__(self, sampler, max_turns: int, turn_tokens: int, trace_tokens: int,
                 temperature: float = 1.0):
        self.sampler = sampler
        self.max_turns = max_turns
        self.turn_tokens = turn_tokens
        self.trace_tokens = trace_tokens
        self.temperature = temperature

    @staticmethod
    def prompt(question: str, tools: list[Tool]) -> list[str]:
        """The prompt, up to the first token that the agent generates."""
        schemas = [tool.schema for tool in tools]
        return [*system_turn(AGENT_SYSTEM, schemas), *turn("user", question), *GENERATE]

    def start(self, traces: list[Trace], group: int = 1, closed_book: bool = False) -> None:
        """Open the traces. Every `group` neighbours share question and tools: one prefill."""
        self.prefix = CLOSED_BOOK if closed_book else ""
        for i in range(0, len(traces), group):
            prompt = self.prompt(traces[i].question, traces[i].tools)
            ids = self.sampler.tokenizer.encode([*prompt, self.prefix])
            for trace in traces[i:i + group]:
                trace.hear(ids)
                trace.status = "open" if len(ids) < self.trace_tokens else "truncated"
        live = [trace for trace in traces if trace.status == "open"]
        self.sampler.reset()
        opened = self.sampler.open([trace.ids for trace in live[::group]], group)
        self.conversations = dict(zip(map(id, live), opened, strict=True))

    def act(self, traces: list[Trace]) -> None:
        """Generate the next turn of each trace."""
        tokenizer = self.sampler.tokenizer
        limits = [min(self.turn_tokens, self.trace_tokens - len(trace.ids)) for trace in traces]
        noise = np.stack([trace.noise(max(limits)) for trace in traces])
        conversations = [self.conversations[id(trace)] for trace in traces]
        turns = self.sampler.sample(conversations, limits, noise, self.temperature)
        for trace, (ids, logprobs) in zip(traces, turns, strict=True):
            trace.say(ids, logprobs)
            if ids[-1] not in tokenizer.stop_ids:
                trace.turns.append(Turn(error="cut off at the token limit"))
                trace.status = "truncated"
                continue
            if ids[-1] == tokenizer.end:
                parsed = parse_turn(self.prefix + tokenizer.decode(ids[:-1]))
            else:
                parsed = Turn(error="ends without <|im_end|>")
            trace.turns.append(parsed)
            if parsed.error:
                trace.status = "malformed"
            elif parsed.answer is not None:
                trace.status = "answered"

    def observe(self, traces: list[Trace]) -> None:
        """Append the observations of the last turn, unless turns or tokens have run out."""
        for trace in traces:
            results = [result_text(call.observation) for call in trace.turns[-1].calls]
            ids = self.sampler.tokenizer.encode(["\n", *results_turn(results), *GENERATE])
            full = len(trace.ids) + len(ids) >= self.trace_tokens
            if full or len(trace.turns) == self.max_turns:
                trace.status = "truncated"
            else:
                trace.hear(ids)
                self.sampler.append(self.conversations[id(trace)], ids)


Backend = Callable[[list[tuple[Tool, dict]]], list[dict]]  # (tool, arguments) -> observations


def run_episodes(agent: AutoAgent, backend: Backend, traces: list[Trace], group: int = 1,
                 closed_book: bool = False, watch: Callable[[], None] | None = None) -> None:
    """The loop of the method (MTR, figure 1b): think and act, then observe, until all traces end.

    watch() is called after each half of the loop.
    """
    agent.start(traces, group, closed_book)
    while live := [trace for trace in traces if trace.status == "open"]:
        agent.act(live)
        if watch:
            watch()
        live = [trace for trace in live if trace.status == "open"]
        run_calls(live, backend)
        agent.observe(live)
        if watch:
            watch()


def run_calls(traces: list[Trace], backend: Backend) -> None:
    """Set the observation of each call in the last turns.

    Refused calls get an error. Tools with code are run. The backend, which is the ToolActor in
    training, answers all others in one batch.
    """
    asked, requests = [], []
    for trace in traces:
        tools = {tool.name: tool for tool in trace.tools}
        for call in trace.turns[-1].calls:
            call.error = call.error or call_error(call, tools)
            if call.error:
                call.observation = {"error": call.error}
            elif tools[call.name].run:
                call.observation = tools[call.name].run(**call.arguments)
            else:
                asked.append(call)
                requests.append((tools[call.name], call.arguments))
    for call, observation in zip(asked, backend(requests), strict=True):
        call.observation = observation


def call_error(call: Call, tools: dict[str, Tool]) -> str | None:
    """Why a call is refused, in one line that the agent can learn from. None if it is valid."""
    if call.name not in tools:
        return "unknown tool"
    return first_error(tools[call.name].argument_validator, call.arguments)


def generate_replies(sampler, prompts: list[list[str]], limit: int, temperature: float,
                     keys: list[tuple]) -> list[str]:
    """One reply per prompt, in batches. "" if the cache is too small or the limit cuts it off."""
    tokenizer = sampler.tokenizer
    ids_of = [tokenizer.encode(prompt) for prompt in prompts]
    replies = [""] * len(prompts)
    fit = [i for i, ids in enumerate(ids_of) if len(ids) + limit <= sampler.slots]
    for start in range(0, len(fit), sampler.capacity):
        part = fit[start:start + sampler.capacity]
        sampler.reset()
        conversations = sampler.open([ids_of[i] for i in part])
        noise = np.stack([Trace(key=keys[i]).noise(limit) for i in part])
        turns = sampler.sample(conversations, [limit] * len(part), noise, temperature)
        for i, (ids, _) in zip(part, turns, strict=True):
            if ids[-1] == tokenizer.end:
                replies[i] = tokenizer.decode(ids[:-1])
    return replies


class ToolActor:
    """Simulates tools. Its input is a tool definition and a call, never question or gold answer.

    Decoding is greedy and cached: the same call always gets the same result.
    """
    TRIES, MEMORY = 3, 100_000
    NO_RESULT = {"error": "the tool gave no valid result"}

    def __init__(self, sampler, reply_tokens: int = 64):
        self.sampler = sampler
        self.reply_tokens = reply_tokens
        self.memo: dict[str, dict] = {}
        self.asked = 0       # calls
        self.remembered = 0  # calls that were answered from the memo

    @staticmethod
    def prompt(definition: str, arguments: dict) -> list[str]:
        """The prompt for one call."""
        call = f"{definition}\n{dumps(arguments)}"
        return [*system_turn(ACTOR_SYSTEM), *turn("user", call), *GENERATE]

    def answer(self, requests: list[tuple[Tool, dict]]) -> list[dict]:
        """The observation of each (tool, arguments). Distinct calls are simulated in one batch.

        An invalid reply is sampled again, at temperature 1.
        """
        keys = [tool.definition + json.dumps(call, sort_keys=True) for tool, call in requests]
        new = {k: r for k, r in zip(keys, requests, strict=True) if k not in self.memo}
        self.asked += len(keys)
        self.remembered += len(keys) - len(new)
        for attempt in range(self.TRIES):
            prompts = [self.prompt(tool.definition, call) for tool, call in new.values()]
            replies = generate_replies(self.sampler, prompts, self.reply_tokens,
                                       temperature=float(attempt > 0),
                                       keys=[(key, attempt) for key in new])
            for key, reply in zip(list(new), replies, strict=True):
                observation = parse_observation(new[key][0], reply)
                if observation is not None:
                    self.memo[key] = observation
                    del new[key]
        self.memo |= dict.fromkeys(new, self.NO_RESULT)
        answers = [self.memo[key] for key in keys]
        while len(self.memo) > self.MEMORY:
            del self.memo[next(iter(self.memo))]  # the oldest entry
        return answers


def parse_observation(tool: Tool, text: str) -> dict | None:
    """Parse a ToolActor reply: an object that fits the return schema, or an error; else None."""
    try:
        value = strict_json(text)
    except Rejected:
        return None
    if not isinstance(value, dict):
        return None
    if set(value) == {"error"} and isinstance(value["error"], str):
        return value
    return value if first_error(tool.result_validator, value) is None else None


@dataclass
class Toolbox:
    """The tools that the ToolMaker wrote for one question."""
    kind: str
    made: list[Tool]
    tries: int          # 0: all tries were rejected, so `made` is the fallback
    thought: str = ""
    rejected: str = ""  # why the previous try was rejected

    @property
    def tools(self) -> list[Tool]:
        return self.made + [UTILITIES[name] for name in KINDS[self.kind]]


class ToolMaker:
    """Task classification, interface generation, validation (MTR, figure 1a).

    A rejected reply is generated again, with the reason in the prompt. After three rejected
    replies the question gets one general lookup tool.
    """
    TRIES = 3

    def __init__(self, sampler, reply_tokens: int = 480):
        self.sampler = sampler
        self.reply_tokens = reply_tokens

    @staticmethod
    def prompt(question: str, rejected: str = "") -> list[str]:
        """The prompt for one question, with the reason why an earlier try was rejected."""
        reason = f"\nRejected: {rejected}" if rejected else ""
        system = system_turn(MAKER_SYSTEM.format(kinds=", ".join(KINDS)))
        return [*system, *turn("user", question + reason), *GENERATE]

    @staticmethod
    def reply(thought: str, kind: str, tools: list[Tool]) -> str:
        """The text that parse_tools reads, for training."""
        lines = [f"<think>{thought}</think>", f"<kind>{kind}</kind>", "<tools>"]
        lines += [tool.definition for tool in tools]
        return "\n".join([*lines, "</tools>"])

    def make(self, questions: list[str], key: tuple = ()) -> list[Toolbox]:
        """A Toolbox for each question. The first try is greedy, later tries are sampled."""
        boxes = [Toolbox("composition", [FALLBACK], 0) for _ in questions]
        reasons = [""] * len(questions)
        todo = list(range(len(questions)))
        for attempt in range(1, self.TRIES + 1):
            prompts = [self.prompt(questions[i], reasons[i]) for i in todo]
            replies = generate_replies(self.sampler, prompts, self.reply_tokens,
                                       temperature=float(attempt > 1),
                                       keys=[(*key, questions[i], attempt) for i in todo])
            for i, reply in zip(list(todo), replies, strict=True):
                try:
                    thought, kind, tools = parse_tools(reply)
                    boxes[i] = Toolbox(kind, tools, attempt, thought, reasons[i])
                    todo.remove(i)
                except Rejected as error:
                    reasons[i] = str(error)
        return boxes


TOOLS_REPLY = re.compile(
    r"\s*<think>(?>(.*?)</think>)\s*<kind>(?>(.*?)</kind>)\s*<tools>(.*)</tools>\s*", re.DOTALL)


def parse_tools(text: str) -> tuple[str, str, list[Tool]]:
    """Parse a ToolMaker reply -> thought, kind, tools. Rejected says what is wrong."""
    match = TOOLS_REPLY.fullmatch(text)
    if not match:
        raise Rejected("no think, kind and tools")
    thought, kind, body = match[1].strip(), match[2].strip(), match[3]
    if kind not in KINDS:
        raise Rejected("unknown kind")
    lines = [line for line in body.split("\n") if line.strip()]
    return thought, kind, check_tools([strict_json(line) for line in lines])
