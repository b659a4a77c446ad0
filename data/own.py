"""A user's own question to a run: are all of its words of this world; what is printed of it."""
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from data import InputError, printable, read_json
from data.chat import result_text
from data.options import Config
from data.world import COMPARED, HELD_OUT, INFERENCE, RELATIONS, World, make_questions

TEMPLATES = "Who What is the of Of and whose"  # the words of all questions beside names and facts


def vocabulary(world: World) -> set[str]:
    """All words that a question about a world can have. The facts are not read."""
    texts = [TEMPLATES, *RELATIONS, *INFERENCE, *COMPARED.values()]
    for names in world.names.values():
        texts += names
    return set(" ".join(texts).split())


def unknown_words(world: World, text: str) -> list[str]:
    """The words of a question that this world does not have, each with a hint if only its case
    differs. A word is letters, digits, hyphens and apostrophes.

    >>> from data.world import make_world
    >>> unknown_words(make_world(0), "Who is the mayor of tili in France?")
    ['tili (it is written Tili)', 'in', 'France']
    """
    known = vocabulary(world)
    written = {word.lower(): word for word in sorted(known)}
    found = []
    for word in dict.fromkeys(re.findall(r"[\w'’-]+", text)):
        if word not in known:
            right = written.get(word.lower())
            found.append(f"{word} (it is written {right})" if right else word)
    return found


def examples(world: World) -> list[str]:
    """Three held-out questions: of two lookups, a comparison, of more lookups."""
    questions = [q for q in make_questions(world) if q.set in HELD_OUT]
    chains = [q for q in questions if q.kind == "composition"]
    return [next(q.text for q in chains if len(q.steps) == 2),
            next(q.text for q in questions if q.kind == "comparison"),
            next(q.text for q in chains if len(q.steps) > 2)]


def run_or_miniature(out: str) -> str:
    """The run folder. Without --out and without a run, the trained miniature in data/miniature."""
    if out != Config.out or (Path(out) / "grpo" / "model" / "config.json").exists():
        return out
    print(f"no finished run in {out}: the miniature that comes with the code answers", flush=True)
    return str(Path(__file__).with_name("miniature"))


def check_question(out: str, world: World, text: str) -> None:
    """InputError if the question has words that the run's world lacks. A run that was trained on
    files accepts all words.
    """
    for stage, option in (("sft", "traces"), ("grpo", "data")):
        if read_json(Path(out) / stage / "config.json").get(option):
            return  # it was trained on files, so it may know other words
    unknown = [printable(word) for word in unknown_words(world, text)]
    if unknown:
        lines = "".join(f'\n  "{example}"' for example in examples(world))
        raise InputError(f"question: not in this run's world: {', '.join(unknown)}. "
                         f"Three questions to try:{lines}")


def show_tools(box) -> None:
    """Print the tools that the ToolMaker wrote for a question (box: an agents.Toolbox)."""
    print(f"\nToolMaker: {box.kind}")
    if box.tries == 0:
        print("  its tools were rejected, so there is one general tool")
    for tool in box.tools:
        print(printable(f"  {signature(tool)}  {tool.description}"), flush=True)


def signature(tool) -> str:
    """An agents.Tool as a function: mayor(city) -> mayor. Optional parameters have a ?."""
    required = tool.parameters.get("required", ())
    properties = tool.parameters.get("properties", {})
    given = [name if name in required else f"{name}?" for name in properties]
    return f"{tool.name}({', '.join(given)}) -> {', '.join(tool.returns.get('properties', {}))}"


def story(trace) -> str:
    """An agents.Trace for people: one line per thought, call, observation and answer."""
    lines = []
    for t in trace.turns:
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
        if t.departures and all(call.observation is not None for call in t.calls):
            lines.append(f"  departs   {', '.join(t.departures)}")
    if trace.status == "truncated":
        lines.append("  truncated")
    return "\n".join(printable(line) for line in lines)


def show_end(trace, decode: Callable[[list[int]], str]) -> None:
    """Print what the story of an agents.Trace lacks: a last turn without calls or answer."""
    last = trace.turns[-1] if trace.turns else None
    if last is None:
        print("  the definitions of its tools leave no tokens to answer")
    elif not last.calls and last.answer is None:  # malformed or cut off
        length = trace.mask[::-1].index(0)  # the last turn is the run of ones at the end
        print(f"  the turn  {decode(trace.ids[-length:])!r}")


def show_answers(traces: list) -> None:
    """Print how many traces of a question gave each answer, the most common first."""
    answers = [t.answer if t.status == "answered" else f"(no answer: {t.status})" for t in traces]
    print()
    for answer, number in Counter(answers).most_common():
        print(printable(f"{number} of {len(traces)}  {answer}"))
