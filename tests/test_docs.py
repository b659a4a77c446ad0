"""The figures of the docs: which tokens they show, which traces they choose, and that they are up to date."""
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import grpo
import mtr
import sft
from data import InputError, options, own
from data.training import world_seed
from data.world import make_world

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))

import picture

DOCS = Path(__file__).resolve().parents[1] / "docs"
PROGRAM = DOCS / "figures.py"
spec = importlib.util.spec_from_file_location("figures", PROGRAM)
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.from_file(str(DOCS / "run" / "tokenizer.json"))


def run_program(*arguments, program=PROGRAM):
    return subprocess.run([sys.executable, program, *arguments], capture_output=True, text=True, timeout=60)


# -------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("text", ["", "Who is it?\n", "<think>I need the mayor.</think>\n<tool_call>\n{\"a\": 1}\n</tool_call><|im_end|>",
                                  "é 東京\n🙂", "  two  spaces "])
def test_the_texts_of_the_tokens_join_to_the_text(bpe, text):
    ids = bpe.encode(text).ids
    texts = figures.token_texts(bpe, ids)
    assert len(texts) == len(ids) and "".join(texts) == bpe.decode(ids, skip_special_tokens=False) == text


def test_a_character_of_several_tokens_is_the_text_of_its_last_token(bpe):
    ids = bpe.encode("🙂").ids
    assert figures.token_texts(bpe, ids) == [""] * (len(ids) - 1) + ["🙂"] and len(ids) > 1


def test_own_and_given_tokens_by_hand():
    assert figures.runs(list("abcdef"), [0, 0, 1, 1, 0, 1]) == [(0, ["a", "b"]), (1, ["c", "d"]), (0, ["e"]), (1, ["f"])]
    with pytest.raises(ValueError):
        figures.runs(["a", "b"], [1])


@pytest.mark.parametrize("texts, width, lines", [
    (["ab", " cd", " ef"], 6, [["ab", " cd"], [" ef"]]), (["ab", " cd", " ef"], 9, [["ab", " cd", " ef"]]),
    (["a", "\n", "b"], 9, [["a", "\n"], ["b"]]), (["a>\n", "</", "b", ">"], 3, [["a>\n"], ["</", "b", ">"]]),
    ([" step", ".</", "think", ">\n"], 8, [[" step", ".</", "think", ">\n"]]), (["abcdef"], 3, [["abcdef"]])])
def test_lines_break_after_newlines_and_before_spaces_and_tags(texts, width, lines):
    found = figures.wrap(texts, width)
    assert found == lines
    assert "".join(map("".join, found)) == "".join(texts)


def test_the_lines_of_a_trace_by_hand():
    given = ["\n", "<|im_start|>", "user\n<tool_response>\n", '{"a": 1}', "\n</tool_response>", "<|im_end|>"]
    texts = ["prompt", "<think>", "x\n", "call", *given, "<answer>", "y"]
    mask = [0, 1, 1, 1, *[0] * len(given), 1, 1]
    assert figures.trace_lines(texts, mask, 60) == [
        (1, ["<think>", "x\n"]), (1, ["call"]), (0, ['… <tool_response>{"a": 1}</tool_response> …']), (1, ["<answer>", "y"])]
    long = figures.trace_lines(["p", "x", f"<tool_response>\n{'1' * 90}\n</tool_response>"], [0, 1, 0], 60)
    assert len(long[1][1][0]) == 60 and "1 …</tool_response>" in long[1][1][0]


def test_the_prompt_is_shortened():
    tools = [{"function": {"name": "mayor", "parameters": {"properties": {"city": {}, "year": {}}}}},
             {"function": {"name": "size", "parameters": {"properties": {"city": {}}}}}]
    trace = {"question": "Who is it?", "tools": tools, "mask": [0, 0, 0, 0, 0, 1]}
    assert figures.prompt_lines(trace, ["system", "user\n", "Who", " is it?", "\n", "I"], 60) == [
        "… system prompt and tool schemas, 2 tokens:", "… mayor(city, year), size(city) …", "Who is it?"]
    assert figures.prompt_lines(trace, ["Who is it?", "x", "Who", " is it?", "\n", "I"], 60)[0].endswith("2 tokens:")
    assert max(map(len, figures.prompt_lines(trace, ["s", "u", "Who", " is it?", "\n", "I"], 20))) <= 20


# ------------------------------------------------------------------------------ the choice of traces


def trace(question, step, em, names="", key="eval", reward=0.0, **more):
    called = [{"name": name, "arguments": {"x": 1}} for name in names]
    return {"question": question, "step": step, "key": [0, key, question, 0], "status": "answered",
            "turns": [{"calls": called}, {"calls": []}],
            "rewards": {"em": em, "reward": reward, "grammar": 1.0, "valid": 1.0}} | more


def test_the_story_goes_from_wrong_to_right():
    traces = [trace("stays wrong", 0, 0, "a"), trace("was right", 0, 1, "ab"), trace("one lookup", 0, 0, ""),
              trace("no answer", 0, 0, "a", status="truncated"), trace("story", 0, 0, "a"), trace("later", 0, 0, "a"),
              trace("story", 5, 0, "a"), trace("story", 7, 1, "ab", key=7),
              trace("stays wrong", 9, 0, "ab"), trace("was right", 9, 1, "ab"), trace("one lookup", 9, 1, "a"),
              trace("no answer", 9, 1, "ab"), trace("story", 9, 1, "ab"), trace("later", 9, 1, "ab")]
    assert figures.choose_story(traces) == [traces[4], traces[12]]


@pytest.mark.parametrize("change", [{"turns": [{"calls": [{"name": "b", "arguments": {"x": 1}}]}]},
                                    {"rewards": {"em": 0, "grammar": 0.9, "valid": 1.0}},
                                    {"rewards": {"em": 0, "grammar": 1.0, "valid": 0.5}}])
def test_a_trace_that_only_stops_early_is_preferred(change):
    odd = trace("odd", 0, 0, "a") | change
    traces = [odd, trace("early", 0, 0, "a"), trace("odd", 9, 1, "ab"), trace("early", 9, 1, "ab")]
    assert [t["question"] for t in figures.choose_story(traces)] == ["early", "early"]
    assert figures.choose_story([odd, traces[2]]) == [odd, traces[2]]


def test_without_a_story_the_program_says_so():
    with pytest.raises(SystemExit, match="no held-out question"):
        figures.choose_story([trace("q", 0, 1, "ab"), trace("q", 9, 1, "ab")])


def test_the_group_is_the_first_with_different_rewards():
    flat = [trace("q", 0, 1, key=0, reward=1.0)] * 2
    held_out = [trace("q", 0, 0, reward=0.0), trace("q", 0, 1, reward=1.0)]
    mixed = [trace("r", 0, 1, key=0, reward=1.0), trace("r", 0, 0, key=0, reward=0.3)]
    later = [trace("r", 1, 1, key=1, reward=0.2), trace("r", 1, 0, key=1, reward=0.3)]
    assert figures.choose_group([*held_out, *flat, *mixed, *later]) == mixed
    with pytest.raises(SystemExit, match="all rewards are equal"):
        figures.choose_group([*held_out, *flat])


@pytest.mark.parametrize("last, ticks", [(1, [0, 1]), (2, [0, 1, 2]), (20, [0, 4, 8, 12, 16, 20]), (24, [0, 4, 8, 12, 16, 20, 24]),
                                         (48, [0, 10, 20, 30, 40]), (300, [0, 50, 100, 150, 200, 250, 300])])
def test_ticks_are_whole_numbers(last, ticks):
    assert picture.whole_ticks(last) == ticks


# ------------------------------------------------------------------------------ the committed files


def test_the_committed_figures_are_what_the_program_makes():
    result = run_program("--check")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_figures_are_small_svgs_of_text():
    files = figures.draw(DOCS / "run")
    assert set(files) == {f"{name}-{theme}.svg" for name in figures.FIGURES for theme in ("light", "dark")}
    for text in files.values():
        root = ET.fromstring(text)
        assert root.get("width") == "800" and "<path" not in text and len(text) < 100_000
    assert sum(path.stat().st_size for path in (DOCS / "run").iterdir()) < 300_000


def test_check_finds_a_changed_byte_a_missing_file_and_a_file_too_many(tmp_path):
    files = {"a.svg": "<svg/>\n", "b.svg": "·\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="\n")
    assert figures.outdated(files, tmp_path) == []
    (tmp_path / "a.svg").write_bytes(b"<svg/>\r\n")
    assert figures.outdated(files, tmp_path) == ["a.svg"]
    (tmp_path / "a.svg").unlink()
    (tmp_path / "old.svg").write_text("")
    assert figures.outdated(files, tmp_path) == ["a.svg", "old.svg"]
    assert figures.outdated(files, tmp_path / "none") == ["a.svg", "b.svg"]


def test_the_command_copies_draws_and_checks(tmp_path, bpe):
    """A run folder made from the committed files gives the committed files and figures again."""
    run, docs = tmp_path / "run", tmp_path / "docs"
    for folder in (run / "grpo", run / "sft" / "model"):
        folder.mkdir(parents=True)
    shutil.copytree(DOCS, docs, ignore=shutil.ignore_patterns("run", "figures"))
    program = docs / "figures.py"
    result = run_program("--from", run, program=program)
    assert result.returncode == 2 and result.stderr.endswith(f"--from: no run in {run}\n")
    committed = DOCS / "run"
    more = {"logprobs": [0.0]}
    group = [json.dumps(record | more) + "\n" for record in figures.read_lines(committed / "group.jsonl")]
    (run / "grpo" / "traces.jsonl").write_text((committed / "story.jsonl").read_text() + "".join(group))
    lines = [f"unused,{line}" for line in (committed / "grpo.csv").read_text().splitlines()]
    (run / "grpo" / "metrics.csv").write_text("\n".join(lines) + "\n")
    (run / "sft" / "model" / "tokenizer.json").write_bytes((committed / "tokenizer.json").read_bytes())
    result = run_program("--from", run, program=program)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    for name in ("story.jsonl", "group.jsonl", "grpo.csv", "tokenizer.json"):
        assert (docs / "run" / name).read_bytes() == (committed / name).read_bytes()
    for path in (DOCS / "figures").iterdir():
        assert (docs / "figures" / path.name).read_bytes() == path.read_bytes()
    assert run_program("--check", program=program).returncode == 0
    changed = docs / "figures" / "mask-dark.svg"
    changed.write_bytes(changed.read_bytes().replace(b"mask 1", b"mask 2"))
    result = run_program("--check", program=program)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "python docs/figures.py would change mask-dark.svg\n")


def test_the_numbers_of_the_group_agree(bpe):
    """The mean and the advantages in the figure follow from the rewards, as in Dr. GRPO."""
    group = figures.read_lines(DOCS / "run" / "group.jsonl")
    rewards = [t["rewards"]["reward"] for t in group]
    mean = sum(rewards) / len(rewards)
    assert [t["advantage"] for t in group] == pytest.approx([r - mean for r in rewards], abs=1e-6)
    text = figures.draw(DOCS / "run")["group-light.svg"]
    assert f"mean reward {mean:.3f}; advantage = reward − mean" in text and len(group) == 8


def test_the_strip_shows_the_tokens_of_the_trace_in_order(bpe):
    """The own and the given tokens of the trace figure are those of the masks."""
    first, second = figures.read_lines(DOCS / "run" / "story.jsonl")
    for record in (first, second):
        texts = figures.token_texts(bpe, record["ids"])
        own = [text for text, mask in zip(texts, record["mask"], strict=True) if mask]
        shown = [line for mine, line in figures.shown_lines(bpe, record) if mine]
        assert [text for line in shown for text in line] == own
    boxes = figures.draw(DOCS / "run")["mask-light.svg"].count(f'fill="{figures.COLORS["light"]["box"]}"')
    assert boxes == 7 + 10 + 1  # before and after the observation, and in the legend


# ---------------------------------------------------------------------------------------- the texts

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "bench" / "README.md"]


def commands(text):
    """The lines of a page's code blocks that run a program of the top level, without what follows four spaces."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    found = [re.search(r"python (mtr|sft|grpo)\.py.*", line) for line in lines]
    return [re.split(r" {3,}", match[0])[0] for match in found if match]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_command_of_a_page_is_accepted(page, monkeypatch):
    """The programs' own parsers read it. Nothing is run: the functions behind the commands only note their config."""
    noted = []
    monkeypatch.setattr(mtr, "COMMANDS", {name: (kind, noted.append) for name, (kind, _) in mtr.COMMANDS.items()})
    monkeypatch.setattr(mtr, "run_all", noted.append)
    for command in commands(page.read_text(encoding="utf-8")):
        program, *words = shlex.split(command)[1:]
        monkeypatch.setattr(sys, "argv", [program, *words])
        if program == "mtr.py":
            mtr.main()
        else:
            config_class = {"sft.py": sft.SFTConfig, "grpo.py": grpo.GRPOConfig}[program]
            noted.append(options.command_line(config_class, ""))
    least = {"README.md": 8, "docs/benchmarks.md": 8}.get(page.relative_to(ROOT).as_posix(), 0)
    assert least <= len(noted) == len(commands(page.read_text(encoding="utf-8")))


def test_a_wrong_command_is_noticed(monkeypatch):
    assert commands("    pip install x && python mtr.py show --out run    the tables") == ["python mtr.py show --out run"]
    monkeypatch.setattr(sys, "argv", ["sft.py", "--stepz", "3"])
    with pytest.raises(InputError):
        options.command_line(sft.SFTConfig, "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_link_to_a_file_resolves(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_each_figure_is_shown_and_no_placeholder_is_left():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for figure in (DOCS / "figures").glob("*.svg"):
        assert f"figures/{figure.name}" in text, figure.name
    assert not re.findall(r"\b(TABLE|RESULTS|MINUTES|TUNING)\b", text)


def test_the_smaller_torch_of_the_readme_is_the_pinned_one():
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    version, = re.findall(r"pip install (torch==\S+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert version in pins.splitlines()


def test_the_readme_is_short_and_its_map_is_right():
    """At most 10 kB. Each row of the map tells the number of lines of its files."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 10_000
    rows = [line for line in text.splitlines() if re.match(r"\| \[\w+(\.py|/)\]", line)]
    assert len(rows) == 7
    for row in rows:
        paths = [ROOT / path for path in re.findall(r"\]\(([^)]+)\)", row)]
        files = [file for path in paths for file in (sorted(path.glob("*.py")) if path.is_dir() else [path])]
        lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        assert row.split("|")[2].strip().replace(",", "") == str(lines), row


# ------------------------------------------------------------------------ the miniature in data/miniature

MINIATURE = ROOT / "data" / "miniature"


def test_the_trained_miniature_answers_as_measured():
    """Both stages load, and their sampled EM on a quarter of the held-out questions is near the value beside them."""
    measured = json.loads((MINIATURE / "measured.json").read_text(encoding="utf-8"))
    spec = importlib.util.spec_from_file_location("docs_miniature", DOCS / "miniature.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    again = program.measure(MINIATURE)
    assert set(again) == {"sft", "grpo"} and again["grpo"] > again["sft"] + 0.25
    for stage, value in again.items():
        assert abs(value - measured[stage]) <= 0.1
        assert (MINIATURE / stage / "model" / "model.safetensors").stat().st_size < 3_000_000


def test_without_a_run_the_miniature_answers(tmp_path, monkeypatch, capsys):
    """Only the default run folder is replaced, and only if it holds no trained agent."""
    monkeypatch.chdir(tmp_path)
    assert own.run_or_miniature("elsewhere") == "elsewhere" and not capsys.readouterr().out
    assert Path(own.run_or_miniature("run")) == MINIATURE
    assert "no finished run in run" in capsys.readouterr().out
    (tmp_path / "run" / "grpo" / "model").mkdir(parents=True)
    (tmp_path / "run" / "grpo" / "model" / "config.json").write_text("{}")
    assert own.run_or_miniature("run") == "run"


def test_the_questions_of_the_readme_are_of_the_miniatures_world():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    asked = [shlex.split(command)[-1] for command in commands(text) if " ask " in command and "--model" not in command]
    world = make_world(world_seed(str(MINIATURE)))
    assert asked and not any(own.unknown_words(world, question) for question in asked)
