"""Draw the figures of README.md and docs/ from docs/run/, which holds the files of one run.

  python docs/figures.py             draw all figures into docs/figures/, light and dark
  python docs/figures.py --check     draw nothing; exit with 1 if a figure is out of date
  python docs/figures.py --from RUN  copy the files of the run folder RUN to docs/run/, then draw
"""
import argparse
import csv
import json
import math
import re
import shutil
import sys
import textwrap
from itertools import chain, groupby
from pathlib import Path

from course import (
    draw_cache,
    draw_credit,
    draw_gallery,
    draw_gates,
    draw_ids,
    draw_order,
    draw_roles,
    draw_stops,
)
from picture import ACROSS, CHAR, COLORS, LEFT, LINE, WIDTH, Picture, key, panel
from tokenizers import Tokenizer

DOCS = Path(__file__).resolve().parent
CURVES = ["calls", "heldout_greedy", "heldout_sampled"]  # columns of grpo/metrics.csv

# ------------------------------------------------------------------------------ the files of a run


def copy_run(run: Path, to: Path) -> None:
    """Copy the files that the figures are made of."""
    to.mkdir(parents=True, exist_ok=True)
    traces = read_lines(run / "grpo" / "traces.jsonl")
    write_lines(to / "story.jsonl", choose_story(traces))
    group = choose_group(traces)
    for trace in group:
        del trace["logprobs"]  # nearly the same numbers as `old`
    write_lines(to / "group.jsonl", group)
    columns = ["step", *CURVES]
    lines = [",".join(columns)]
    for row in read_table(run / "grpo" / "metrics.csv"):
        lines.append(",".join(row[name] for name in columns))
    (to / "grpo.csv").write_text("\n".join(lines) + "\n", newline="\n")
    shutil.copy(run / "sft" / "model" / "tokenizer.json", to)


def choose_story(traces: list[dict]) -> list[dict]:
    """Two traces of one held-out question: before GRPO answered wrong, after GRPO right.

    It is the first such question of which stops_early is true, else the first such question.
    """
    held_out = [t for t in traces if t["key"][1] == "eval"]
    last = max(t["step"] for t in held_out)
    right = {t["question"]: t for t in held_out if t["step"] == last and t["rewards"]["em"] == 1}
    pairs = []
    for trace in held_out:
        wrong = trace["status"] == "answered" and trace["rewards"]["em"] == 0
        after = right.get(trace["question"])
        if trace["step"] == 0 and wrong and after and len(calls(after)) >= 2:
            pairs.append([trace, after])
    if not pairs:
        sys.exit("no held-out question with two or more lookups went from wrong to right")
    return next((pair for pair in pairs if stops_early(*pair)), pairs[0])


def stops_early(first: dict, second: dict) -> bool:
    """True if two clean traces differ only by the second one's last call, and by their answers."""
    clean = all(t["rewards"]["grammar"] == t["rewards"]["valid"] == 1 for t in (first, second))
    return clean and calls(first) == calls(second)[:-1]


def choose_group(traces: list[dict]) -> list[dict]:
    """The first group of training traces whose rewards differ."""
    training = [t for t in traces if t["key"][1] != "eval"]
    for _, group in groupby(training, key=lambda t: t["key"][:3]):
        group = list(group)
        if len({t["rewards"]["reward"] for t in group}) > 1:
            return group
    sys.exit("in every group, all rewards are equal")


def calls(trace: dict) -> list[tuple[str, dict]]:
    """Name and arguments of each call."""
    found = []
    for turn in trace["turns"]:
        found += [(call["name"], call["arguments"]) for call in turn["calls"]]
    return found


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, records: list[dict]) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(text, encoding="utf-8", newline="\n")


def read_table(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------ tokens


def token_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text of each token. The texts join to the decoded text.

    A token that ends inside a character has the text "". The token that ends the character has it.
    """
    texts = []
    pending = []
    for i in ids:
        pending.append(i)
        text = tokenizer.decode(pending, skip_special_tokens=False)
        inside = text.endswith("\ufffd")
        texts.append("" if inside else text)
        if not inside:
            pending = []
    return texts


def runs(texts: list[str], mask: list[int]) -> list[tuple[int, list[str]]]:
    """The texts in runs of equal mask: (1, own tokens) and (0, given tokens)."""
    pairs = zip(mask, texts, strict=True)
    return [(own, [text for _, text in run]) for own, run in groupby(pairs, key=lambda p: p[0])]


def wrap(texts: list[str], width: int) -> list[list[str]]:
    """Lines of at most `width` characters. They break after newlines and before spaces and tags."""
    words = []
    for text in texts:
        if not words or text.startswith((" ", "<")) or words[-1][-1].endswith("\n"):
            words.append([])
        words[-1].append(text)
    lines = [[]]
    for word in words:
        line = "".join(lines[-1])
        if line and (line.endswith("\n") or len(line) + len("".join(word)) > width):
            lines.append([])
        lines[-1] += word
    return lines


def trace_lines(texts: list[str], mask: list[int], width: int) -> list[tuple[int, list[str]]]:
    """The lines of the trace figure after the prompt: own tokens, and shortened given text."""
    lines = []
    for own, run in runs(texts, mask)[1:]:
        if own:
            lines += [(1, line) for line in wrap(run, width)]
            continue
        for result in re.findall(r"<tool_response>\n(.*?)\n</tool_response>", "".join(run), re.S):
            room = width - 35  # 35: the tags, the dots and the spaces beside the result
            shown = result if len(result) <= room else result[:room - 2] + " …"
            lines.append((0, [f"… <tool_response>{shown}</tool_response> …"]))
    return lines


def prompt_lines(trace: dict, texts: list[str], width: int) -> list[str]:
    """The prompt in short: the tokens before the question, the tools, the question."""
    prompt = texts[:trace["mask"].index(1)]
    start = "".join(prompt).rindex(trace["question"])
    lengths = [len("".join(prompt[:i])) for i in range(len(prompt))]
    before = sum(length < start for length in lengths)
    functions = [tool["function"] for tool in trace["tools"]]
    tools = [f"{f['name']}({', '.join(f['parameters']['properties'])})" for f in functions]
    lines = [f"… system prompt and tool schemas, {before} tokens:", f"… {', '.join(tools)} …",
             trace["question"]]
    return list(chain.from_iterable(textwrap.wrap(line, width) for line in lines))


# ----------------------------------------------------------------------------------------- figures


def legend(picture: Picture) -> None:
    """Show an own and a given token, and say what they are."""
    for name, color, box, meaning in (
            ("own", "own", "box", "written by the model (mask 1: in training, the loss counts it)"),
            ("given", "given", "", "given to the model; the loss ignores it (mask 0)")):
        picture.tokens(LEFT, [name], color, box)
        picture.text(LEFT + 72, picture.y + 19, meaning, color)
        picture.y += LINE
    picture.y += 14


def draw_trace(picture: Picture, run: dict) -> str:
    """One held-out question, before and after GRPO."""
    legend(picture)
    texts = token_texts(run["tokenizer"], run["story"][0]["ids"])
    for line in prompt_lines(run["story"][0], texts, ACROSS):
        picture.tokens(LEFT, [line], "given")
        picture.y += LINE
    first, second = [shown_lines(run["tokenizer"], trace) for trace in run["story"]]
    common = [a == b for a, b in zip(first, second, strict=False)]
    common = [*common, False].index(False)  # the number of equal lines at the beginning
    draw_lines(picture, "Before GRPO", run["story"][0], first)
    draw_lines(picture, "After GRPO", run["story"][1], second, common)
    return "A question before and after GRPO"


def shown_lines(tokenizer: Tokenizer, trace: dict) -> list[tuple[int, list[str]]]:
    """The lines of a trace that fit the picture."""
    texts = token_texts(tokenizer, trace["ids"])
    return trace_lines(texts, trace["mask"], ACROSS)


def draw_lines(picture: Picture, name: str, trace: dict, lines: list, skip: int = 0) -> None:
    """A headline, and a trace without its first `skip` lines."""
    number = len(calls(trace))
    result = "right" if trace["rewards"]["em"] else "wrong"
    picture.y += 14
    picture.add("line", x1=LEFT, x2=WIDTH - LEFT, y1=picture.y, y2=picture.y, stroke="grid")
    lookups = "1 lookup" if number == 1 else f"{number} lookups"
    picture.text(LEFT, picture.y + 32, f"{name}: answers after {lookups}, {result}", result,
                 font_weight="bold", font_size=22)
    picture.y += 46
    if skip:
        picture.text(LEFT, picture.y + 19, f"The same {skip} lines as above, then:", "given")
        picture.y += LINE
    for own, line in lines[skip:]:
        if not own:
            picture.tokens(LEFT, line, "given")
        elif "<answer" not in "".join(line):
            picture.tokens(LEFT, line, "own", "box")
        else:
            end = picture.tokens(LEFT, line, "own", "box")
            picture.add("rect", x=LEFT - 2, y=picture.y - 2, width=end - LEFT + 3, height=LINE + 1,
                        rx=5, fill="none", stroke=result, stroke_width=3)
            verdict = "right" if result == "right" else f"wrong: it is {trace['golds'][0]}"
            if end > WIDTH / 2 + 50:  # no room beside the answer
                picture.y += LINE
                end = LEFT
            picture.text(end + 14, picture.y + 19, verdict, result, font_weight="bold")
        picture.y += LINE


def draw_mask(picture: Picture, run: dict) -> str:
    """The tokens around the first observation, each with its mask."""
    legend(picture)
    trace = run["story"][1]
    texts = token_texts(run["tokenizer"], trace["ids"])
    parts = [[(own, text) for text in run] for own, run in runs(texts, trace["mask"])[1:4]]
    shown = [*parts[0][-7:], *parts[1], *parts[2][:10]]
    x = LEFT
    for own, text in shown:
        width = CHAR * len(text)
        if x + width > WIDTH - LEFT:
            x = LEFT
            picture.y += 2 * LINE + 6
        visible = text.replace(" ", "·")
        end = picture.tokens(x, [visible], "own" if own else "given", "box" if own else "back",
                             "none" if own else "grid")
        picture.text((x + end) / 2, picture.y + 46, str(own), "own" if own else "given",
                     text_anchor="middle", font_size=18)
        x = end + 4
    picture.y += 2 * LINE + 22
    picture.text(LEFT, picture.y, "One box per token, its mask below. · is a space, ↵ a new line.")
    picture.y += 14
    return "The mask of the tokens around an observation"


def draw_group(picture: Picture, run: dict) -> str:
    """One group of traces in numbers."""
    group = run["group"]
    rewards = [t["rewards"]["reward"] for t in group]
    mean = sum(rewards) / len(rewards)
    picture.text(LEFT, picture.y + 14, f"{len(group)} traces of one training question",
                 font_weight="bold", font_size=22)
    picture.y += 46
    answer = f"right answer: {group[0]['golds'][0]}"
    for line in [*textwrap.wrap(group[0]["question"], 70), answer]:
        picture.text(LEFT, picture.y, line, "given")
        picture.y += 30
    picture.y += 16
    zero = 620
    columns = {"trace": 76, "calls": 142, "answer": 170, "reward": 430, "advantage": zero}
    for name, x in columns.items():
        anchor = {"answer": "start", "advantage": "middle"}.get(name, "end")
        picture.text(x, picture.y, name, "given", text_anchor=anchor)
    top = picture.y + 12
    scale = 65 / max(abs(t["advantage"]) for t in group)
    for i, trace in enumerate(group):
        picture.y += 36
        answer = trace["turns"][-1]["answer"] if trace["turns"] else None
        color = "right" if trace["rewards"]["em"] else "wrong"
        verdict = f"{textwrap.shorten(answer or 'none', 12, placeholder='…')}, {color}"
        picture.text(columns["trace"], picture.y, str(i + 1), text_anchor="end")
        picture.text(columns["calls"], picture.y, str(len(calls(trace))), text_anchor="end")
        picture.text(columns["answer"], picture.y, verdict, color)
        picture.text(columns["reward"], picture.y, f"{rewards[i]:.3f}", text_anchor="end")
        length = scale * trace["advantage"]
        picture.add("rect", x=zero + min(length, 0.0), y=picture.y - 19, width=abs(length),
                    height=25, rx=3, fill="one" if length > 0 else "two")
        number = f"{trace['advantage']:+.2f}".replace("-", "−")
        side, anchor = (6, "start") if length >= 0 else (-6, "end")
        picture.text(zero + length + side, picture.y, number, text_anchor=anchor)
    picture.add("line", x1=zero, x2=zero, y1=top, y2=picture.y + 12, stroke="given")
    picture.text(zero - 12, picture.y + 36, "less likely", "two", text_anchor="end")
    picture.text(zero + 12, picture.y + 36, "more likely", "one")
    picture.y += 76
    picture.text(LEFT, picture.y, f"mean reward {mean:.3f}; advantage = reward − mean")
    picture.y += 14
    return "A group of traces: rewards and advantages"


def draw_curve(picture: Picture, run: dict) -> str:
    """Held-out EM and calls per trace against the steps of GRPO."""
    table = run["grpo"]
    series = {}
    for name in CURVES:
        series[name] = [(int(row["step"]), float(row[name])) for row in table if row[name]]
    steps = max(int(row["step"]) for row in table)
    picture.text(LEFT, picture.y + 14, "Held-out questions answered right (exact match)",
                 font_weight="bold", font_size=22)
    picture.y += 46
    first = series["heldout_sampled"][0][1]
    key(picture, LEFT, "one", "sampled, temperature 1")
    key(picture, 330, "two", "greedy")
    key(picture, 470, "given", f"after SFT, sampled: {first:.2f}", stroke_dasharray="7 6")
    ticks = [i / 5 for i in range(6)]
    panel(picture, 230, steps, ticks, [(series["heldout_greedy"], "two"),
                                       (series["heldout_sampled"], "one")], first)
    picture.text(LEFT, picture.y + 44, "Tool calls per training trace",
                 font_weight="bold", font_size=22)
    picture.y += 54
    most = math.ceil(max(value for _, value in series["calls"]))
    panel(picture, 130, steps, list(range(most + 1)), [(series["calls"], "one")])
    picture.text(WIDTH / 2, picture.y + 20, "steps of GRPO", text_anchor="middle")
    picture.y += 32
    return "Held-out EM and calls per trace during GRPO"


FIGURES = {"trace": draw_trace, "curve": draw_curve, "group": draw_group, "mask": draw_mask,
           "roles": draw_roles.draw, "gates": draw_gates.draw, "cache": draw_cache.draw,
           "ids": draw_ids.draw, "credit": draw_credit.draw, "order": draw_order.draw,
           "stops": draw_stops.draw, "gallery": draw_gallery.draw}


def draw(run: Path) -> dict[str, str]:
    """All figures of a run: file name -> SVG."""
    data = {"grpo": read_table(run / "grpo.csv"), "story": read_lines(run / "story.jsonl"),
            "group": read_lines(run / "group.jsonl"),
            "tokenizer": Tokenizer.from_file(str(run / "tokenizer.json"))}
    files = {}
    for name, function in FIGURES.items():
        for theme in COLORS:
            picture = Picture(theme)
            title = function(picture, data)
            files[f"{name}-{theme}.svg"] = picture.svg(title)
    return files


def outdated(files: dict[str, str], folder: Path) -> list[str]:
    """The names of the files in folder that are missing, differ, or are not made any more."""
    found = {path.name: path.read_bytes() for path in folder.glob("*")}
    made = {name: text.encode() for name, text in files.items()}
    return sorted(name for name in found | made if found.get(name) != made.get(name))


def main() -> None:
    """Parse the command line; copy, draw or check."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure is outdated")
    parser.add_argument("--from", dest="run", type=Path, help="run folder to copy from")
    options = parser.parse_args()
    if options.run:
        if not (options.run / "grpo" / "traces.jsonl").exists():
            parser.error(f"--from: no run in {options.run}")
        copy_run(options.run, DOCS / "run")
    files = draw(DOCS / "run")
    folder = DOCS / "figures"
    if options.check:
        names = outdated(files, folder)
        sys.exit(f"python docs/figures.py would change {', '.join(names)}" if names else 0)
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
