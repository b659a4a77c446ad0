"""The idea: three agents. Each is a prompt template and a parser; a sampler generates its text.

    ToolMaker   reads a question, classifies it and writes the tools it needs; they are validated
    AutoAgent   thinks, calls tools, reads observations, answers (ReAct)
    ToolActor   simulates the result of a call; the result must fit the tool's return schema

The sampler (model.Sampler) opens conversations, appends to them and generates. Sampled ids are
kept as they are: their text is parsed, but never encoded again. This file has no tensors.
"""
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, compress

import numpy as np

import data.tools
from data.chat import GENERATE, chat_turn, dumps, result_text, results_turn, system_turn
from data.prompts import CLOSED_BOOK, Prompts
from data.schema import Rejected, check_function, check_schema, first_error, object_schema
from data.turns import find_objects, read_object, read_turn, unwrap

# ------------------------------------------------------------------------------------------- tools

SOURCE_HEAD = "All that this tool knows:"


@dataclass(frozen=True, eq=False)
class Tool:
    """An OpenAI function and the schema of its result, which is not a part of OpenAI's format."""
    name: str
    description: str
    parameters: dict
    returns: dict
    run: Callable[..., dict] | None = None  # its code; None: the ToolActor simulates it
    source: str = ""  # paragraphs that the ToolActor answers from (mtr.py eval --grounded)

    @property
    def schema(self) -> dict:
        """The tool in the form that OpenAI's API takes."""
        parts = ("name", "description", "parameters")
        return {"type": "function", "function": {part: getattr(self, part) for part in parts}}

    @cached_property
    def definition(self) -> str:
        """Name, description, parameters and returns as JSON; then the source, if there is one."""
        source = f"\n{SOURCE_HEAD}\n{self.source}" if self.source else ""
        return dumps({**self.schema["function"], "returns": self.returns}) + source


MAX_TOOLS = 8


def check_tools(tools: list[dict]) -> list[Tool]:
    """Turn the ToolMaker's JSON into tools. Raises Rejected with the rule that is broken.

    Checked: exactly four parts; a name of 1 to 64 letters, digits, _ or -, that no other tool and
    no utility tool has; a description; both schemas (see data/schema.py). Not checked: whether the
    tools are of any use for the question.
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


# Utility tools are predefined and have code. The tools that the ToolMaker writes have none.
UTILITIES = {spec["name"]: Tool(**spec) for spec in data.tools.UTILITIES}
# The kinds of questions, each with its utility tools. A composition is a chain of lookups. In an
# inference, one word stands for several lookups. The fictional world has no arithmetic questions.
KINDS = {"composition": (), "inference": (), "comparison": ("compare",),
         "arithmetic": ("calculator", "date_difference", "count")}
FALLBACK = Tool("lookup", "Look up a property of a subject.",
                object_schema(subject=data.tools.TEXT, property=data.tools.TEXT),
                object_schema(value=data.tools.TEXT))


# ------------------------------------------------------------------------------------------ parser


@dataclass
class Call:
    """One tool call."""
    name: str = ""
    arguments: dict = field(default_factory=dict)
    error: str | None = None         # why it was refused: bad JSON, unknown tool, bad arguments
    observation: dict | None = None  # the result; {"error": ...} if the call was refused or failed

    @property
    def succeeded(self) -> bool:
        """Whether its result is no error. A real tool may report one as its only text."""
        result = self.observation or {}
        texts = [text for text in result.values() if isinstance(text, str) and text]
        failed = len(texts) == 1 and re.match(r"(?i)\w*(error|exception)\s*(:|\d|$)", texts[0])
        return not (self.error or result.get("error") or failed)


@dataclass
class Turn:
    """One turn of AutoAgent. The strict form: <think>...</think>, then calls or one <answer>.

    Any turn with a call or an answer is read. A closed thought and text beside the tags hold
    neither. Beside calls, an answer does not count. Two different answers are none.
    """
    thought: str = ""
    calls: list[Call] = field(default_factory=list)
    answer: str | None = None
    error: str | None = None  # why it is malformed
    departures: list[str] = field(default_factory=list)


def parse_turn(text: str, plain_answer: bool = False) -> Turn:
    """Parse a turn without its <|im_end|>. Every string gives a Turn, perhaps with an error.

    plain_answer: whether text without a tag is an answer.
    """
    notes: list[str] = []
    thought, calls, answer, error = read_turn(text, plain_answer, notes)
    parsed = [parse_call(call, notes) for call in calls]
    return Turn(thought, parsed, answer, error, list(dict.fromkeys(notes)))


def parse_call(text: str, notes: list[str]) -> Call:
    """Parse the JSON of a call. If it is bad, the Call has an error; the trace goes on."""
    try:
        call = unwrap(text, notes)
        if not isinstance(call.get("arguments"), dict):
            notes.append("arguments in another form")
        arguments = call.pop("arguments" if "arguments" in call else "parameters", None) or {}
        if isinstance(arguments, str):
            arguments = read_object(arguments, notes)
        name = call.pop("name", None)
        if call or not isinstance(name, str) or not isinstance(arguments, dict):
            raise Rejected("a call has name and arguments")
        return Call(name, arguments)
    except Rejected as error:
        notes.append("unreadable call")
        return Call(error=str(error))


# ------------------------------------------------------------------------------------------- trace


@dataclass(eq=False)
class Trace:
    """A conversation as tokens: AutoAgent's in a rollout, any agent's in SFT.

    ids, mask and logprobs are parallel lists. The mask is 1 on the tokens that the agent itself
    generates, including its <|im_end|>, and 0 on all others.
    """
    question: str = ""
    tools: list[Tool] = field(default_factory=list)
    key: tuple = ()  # names the trace, e.g. (seed, step, question id, sample); seeds its sampling
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # from the sampler; 0 where the mask is 0
    turns: list[Turn] = field(default_factory=list)
    status: str = "open"  # then "answered", "malformed", or "truncated" (out of turns or tokens)
    # Stage 2 sets these (see the equations in grpo.py). old and reference are parallel to ids.
    advantage: float = 0.0  # A_i
    weight: float = 0.0     # w_i
    old: list[float] = field(default_factory=list)        # log pi_old
    reference: list[float] = field(default_factory=list)  # log pi_ref

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

    def record(self) -> dict:
        """The trace as a JSON object, for traces.jsonl. `logprobs` and `old`: only of mask 1."""
        turns = [{**vars(t), "calls": [vars(call) for call in t.calls]} for t in self.turns]
        logprobs = [round(value, 5) for value in compress(self.logprobs, self.mask)]
        old = [round(value, 5) for value in compress(self.old, self.mask)]
        return {"question": self.question, "status": self.status, "turns": turns,
                "key": list(self.key), "tools": [tool.schema for tool in self.tools],
                "ids": self.ids, "mask": self.mask, "advantage": self.advantage,
                "weight": self.weight, "logprobs": logprobs, "old": old}


def uniforms(key: tuple, start: int, n: int) -> np.ndarray:
    """Uniform numbers (n,) for the tokens from position start, decided by key and position."""
    seed = [zlib.crc32(repr(part).encode()) for part in key]
    numbers = np.random.default_rng(seed).random(start + n, dtype=np.float32)[start:]
    # model.draw multiplies them by the last sum of the CDF, and rounding must not reach that sum.
    return np.minimum(numbers, 1 - 1e-6)


# ------------------------------------------------------------------------------------------- roles


class AutoAgent:
    """Thinks, acts and observes: many traces in parallel, each an open conversation."""

    def __init__(self, sampler, max_turns: int, turn_tokens: int, trace_tokens: int,
                 temperature: float = 1.0):
        """turn_tokens: new tokens per turn; trace_tokens: per trace, with prompt and results."""
        self.sampler = sampler
        self.max_turns = max_turns
        self.turn_tokens = turn_tokens
        self.trace_tokens = trace_tokens
        self.temperature = temperature

    @staticmethod
    def prompt(prompts: Prompts, question: str, tools: list[Tool]) -> list[str]:
        """The prompt, up to the first token that the agent generates."""
        system = system_turn(prompts.agent, [tool.schema for tool in tools])
        return [*system, *chat_turn("user", question), *GENERATE, prompts.begin]

    def start(self, traces: list[Trace], group: int = 1, closed_book: bool = False) -> None:
        """Open the traces. Each `group` consecutive traces have one prompt, prefilled once."""
        tokenizer = self.sampler.tokenizer
        self.prompts = tokenizer.prompts
        if closed_book:
            self.prompts = replace(self.prompts, begin=CLOSED_BOOK)
        for i in range(0, len(traces), group):
            prompt = self.prompt(self.prompts, traces[i].question, traces[i].tools)
            ids = tokenizer.encode(prompt)
            for trace in traces[i:i + group]:
                trace.hear(ids)
                trace.status = "open" if len(ids) < self.trace_tokens else "truncated"
        # A group has one prompt, so it is open or truncated as a whole.
        live = [trace for trace in traces if trace.status == "open"]
        self.sampler.reset()
        opened = self.sampler.open([trace.ids for trace in live[::group]], group)
        self.conversations = dict(zip(live, opened, strict=True))

    def rehearse(self) -> None:
        """Fill the caches and sample in the largest pass: memory runs out now or never."""
        rows = self.sampler.capacity
        width = min(self.sampler.PREFILL // rows, self.trace_tokens // 2)
        opened = self.sampler.open([[0] * (self.trace_tokens - width)], rows)
        for conversation in opened:
            self.sampler.append(conversation, [0] * width)
        self.sampler.sample(opened, [1] * rows, np.zeros((rows, 1), np.float32))

    def act(self, traces: list[Trace]) -> None:
        """Generate the next turn of each trace."""
        tokenizer = self.sampler.tokenizer
        closed_book = self.prompts.begin == CLOSED_BOOK
        limits = [min(self.turn_tokens, self.trace_tokens - len(trace.ids)) for trace in traces]
        numbers = [uniforms(trace.key, len(trace.ids), max(limits)) for trace in traces]
        conversations = [self.conversations[trace] for trace in traces]
        turns = self.sampler.sample(conversations, limits, np.stack(numbers), self.temperature)
        for trace, (ids, logprobs) in zip(traces, turns, strict=True):
            trace.say(ids, logprobs)
            if ids[-1] not in tokenizer.stop_ids:
                trace.turns.append(Turn())  # cut off
                trace.status = "truncated"
                continue
            if ids[-1] == tokenizer.end:
                said = tokenizer.decode(ids[:-1])
                # Without any tag it is plain text, not the thought that `begin` opens.
                if closed_book or "<" in said:
                    said = self.prompts.begin + said
                parsed = parse_turn(said, not trace.tools or bool(trace.calls))
                if closed_book and parsed.calls:
                    parsed = Turn(error="call with a closed book")
            else:
                parsed = Turn(error="ends with another stop token than <|im_end|>")
            trace.turns.append(parsed)
            if parsed.error:
                trace.status = "malformed"
            elif parsed.answer is not None:
                trace.status = "answered"

    def observe(self, traces: list[Trace]) -> None:
        """Append the observations of the last turn, unless turns or tokens have run out."""
        for trace in traces:
            results = [result_text(call.observation) for call in trace.turns[-1].calls]
            # The newline after the agent's <|im_end|> is part of the template, but not sampled.
            header = [*GENERATE, self.prompts.begin]
            ids = self.sampler.tokenizer.encode(["\n", *results_turn(results), *header])
            full = len(trace.ids) + len(ids) >= self.trace_tokens
            if full or len(trace.turns) == self.max_turns:
                trace.status = "truncated"
            else:
                trace.hear(ids)
                self.sampler.append(self.conversations[trace], ids)


Request = tuple[Tool, dict]  # a tool and the arguments of a call
Backend = Callable[[list[Request]], list[dict]]  # requests -> an observation for each


def run_episodes(agent: AutoAgent, backend: Backend, traces: list[Trace], group: int = 1,
                 closed_book: bool = False, watch: Callable[[], None] | None = None) -> None:
    """The loop of the method (MTR, figure 1b): think and act, then observe, until all traces end.

    watch() is called after the generation and after the observations of each turn.
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
    asked = []
    requests = []
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
    return first_error(tools[call.name].parameters, call.arguments)


def generate_replies(sampler, prompts: list[list[str]], limit: int, temperature: float,
                     keys: list[tuple]) -> list[str]:
    """One reply per prompt: "" if the prompt does not fit the cache or the reply does not end."""
    tokenizer = sampler.tokenizer
    ids_of = [tokenizer.encode(prompt) for prompt in prompts]
    replies = [""] * len(prompts)
    fit = [i for i, ids in enumerate(ids_of) if len(ids) + limit <= sampler.slots]
    for start in range(0, len(fit), sampler.capacity):
        part = fit[start:start + sampler.capacity]
        sampler.reset()
        conversations = sampler.open([ids_of[i] for i in part])
        numbers = np.stack([uniforms(keys[i], 0, limit) for i in part])
        turns = sampler.sample(conversations, [limit] * len(part), numbers, temperature)
        for i, (ids, _) in zip(part, turns, strict=True):
            if ids[-1] == tokenizer.end:
                replies[i] = tokenizer.decode(ids[:-1])
    return replies


class ToolActor:
    """Simulates tools. Its input is a tool definition and a call, never question or gold answer.

    Results are remembered, so the same call always gets the same result. The first try is greedy.
    """
    TRIES = 3         # per call
    MEMORY = 100_000  # remembered results
    NO_RESULT = {"error": "the tool gave no valid result"}

    def __init__(self, sampler, reply_tokens: int = 64):
        self.sampler = sampler
        self.reply_tokens = reply_tokens
        self.memo: dict[str, dict] = {}
        self.asked = 0       # calls
        self.remembered = 0  # calls that were in the memo, or repeated in one batch

    @staticmethod
    def prompt(prompts: Prompts, definition: str, arguments: dict) -> list[str]:
        """The prompt for one call."""
        request = f"{definition}\n{dumps(arguments)}"
        return [*system_turn(prompts.actor), *chat_turn("user", request), *GENERATE]

    def answer(self, requests: list[Request]) -> list[dict]:
        """The observation of each request. Distinct requests are simulated in one batch.

        An invalid reply is sampled again, at temperature 1.
        """
        keys = [tool.definition + json.dumps(given, sort_keys=True) for tool, given in requests]
        todo = {k: r for k, r in zip(keys, requests, strict=True) if k not in self.memo}
        self.asked += len(keys)
        self.remembered += len(keys) - len(todo)
        texts = self.sampler.tokenizer.prompts
        for attempt in range(self.TRIES):
            prompts = [self.prompt(texts, tool.definition, given) for tool, given in todo.values()]
            replies = generate_replies(self.sampler, prompts, self.reply_tokens,
                                       temperature=0.0 if attempt == 0 else 1.0,
                                       keys=[(key, attempt) for key in todo])
            for key, reply in zip(list(todo), replies, strict=True):
                tool, _ = todo[key]
                observation = parse_observation(tool, reply)
                if observation is not None:
                    self.memo[key] = observation
                    del todo[key]
        self.memo |= dict.fromkeys(todo, self.NO_RESULT)
        answers = [self.memo[key] for key in keys]
        while len(self.memo) > self.MEMORY:
            del self.memo[next(iter(self.memo))]  # the oldest entry
        return answers


def parse_observation(tool: Tool, text: str) -> dict | None:
    """Parse a ToolActor reply: an object that fits the return schema, or an error; else None."""
    try:
        value = read_object(text, [])
    except Rejected:
        return None
    if set(value) == {"error"} and isinstance(value["error"], str):
        return value
    return value if first_error(tool.returns, value) is None else None


@dataclass
class Toolbox:
    """The tools that the ToolMaker wrote for one question."""
    kind: str
    made: list[Tool]
    tries: int          # number of the accepted try; 0: the ToolMaker did not write `made`
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
    def prompt(prompts: Prompts, question: str, rejected: str = "") -> list[str]:
        """The prompt for one question, with the reason why an earlier try was rejected."""
        reason = f"\nRejected: {rejected}" if rejected else ""
        system = system_turn(prompts.maker.replace("{kinds}", ", ".join(KINDS)))
        return [*system, *chat_turn("user", question + reason), *GENERATE]

    @staticmethod
    def reply(thought: str, kind: str, tools: list[Tool]) -> str:
        """The reply that SFT trains on. parse_tools is the inverse."""
        lines = [f"<think>{thought}</think>", f"<kind>{kind}</kind>", "<tools>"]
        lines += [tool.definition for tool in tools]
        return "\n".join([*lines, "</tools>"])

    def make(self, questions: list[str], key: tuple = ()) -> list[Toolbox]:
        """A Toolbox for each question. The first try is greedy; `key` seeds the later ones."""
        boxes = [Toolbox("composition", [FALLBACK], 0) for _ in questions]
        reasons = [""] * len(questions)
        todo = list(range(len(questions)))
        texts = self.sampler.tokenizer.prompts
        for attempt in range(1, self.TRIES + 1):
            prompts = [self.prompt(texts, questions[i], reasons[i]) for i in todo]
            replies = generate_replies(self.sampler, prompts, self.reply_tokens,
                                       temperature=0.0 if attempt == 1 else 1.0,
                                       keys=[(*key, questions[i], attempt) for i in todo])
            for i, reply in zip(list(todo), replies, strict=True):
                try:
                    thought, kind, tools = parse_tools(reply)
                    boxes[i] = Toolbox(kind, tools, attempt, thought, reasons[i])
                    todo.remove(i)
                except Rejected as error:
                    reasons[i] = str(error)
        return boxes


# (?>...) never tries a later tag, so any text takes linear time.
TOOLS_REPLY = re.compile(
    r"(?>.*?<think>)(?>(.*?)</think>)(?>.*?<kind>)(?>(.*?)</kind>)(?>.*?<tools>)(.*)</tools>",
    re.DOTALL)


def parse_tools(text: str) -> tuple[str, str, list[Tool]]:
    """Parse a ToolMaker reply -> thought, kind, tools. Raises Rejected with the reason."""
    match = TOOLS_REPLY.match(text)
    if not match:
        raise Rejected("no think, kind and tools")
    thought, kind, body = map(str.strip, match.groups())
    if kind not in KINDS:
        raise Rejected("unknown kind")
    return thought, kind, check_tools([unwrap(tool, []) for tool in find_objects(body, [])])
