"""What report.html shows of a run, as one JSON text. docs/report_template.html draws it."""
import json
import platform
import re
import shlex
import subprocess
import sys
from itertools import chain, groupby
from pathlib import Path

from data import read_json
from data.tokenizer import Tokenizer
from data.training import world_seed
from data.world import RELATIONS, World, make_world


def page_json(out: Path, facts: dict, limit: int) -> str:
    """The data of a run's page: ASCII, at most `limit` bytes, no "<". facts: table and curves."""
    config = read_json(out / "grpo" / "config.json")
    world = None if config.get("data") else make_world(world_seed(out))  # None: question files
    groups, ids, unread = read_groups(out / "grpo" / "traces.jsonl", world)
    decode = Tokenizer(out / "sft" / "model").decode if ids else None
    tokens = {i: decode([i]) for i in ids}  # U+FFFD: half a character
    page = facts | origin() | {"config": config, "unread": unread, "tokens": tokens}
    page["groups"] = choose(groups, limit - len(encode(page)) - len(',"groups":'))
    return encode(page)


def encode(value: object) -> str:
    """ASCII JSON that can't end a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def origin() -> dict[str, str]:
    """Command, commit ("" without a git repository) and processor of this process."""
    here = shlex.quote(str(Path(__file__).parent))
    git = f"git -C {here} describe --always --dirty --exclude='*' 2>/dev/null"
    info = Path("/proc/cpuinfo")  # Linux
    names = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return {"command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
            "commit": subprocess.getoutput(git), "processor": [*names, platform.machine()][0]}


def read_groups(path: Path, world: World | None) -> tuple[list[dict], set[int], int]:
    """The groups of traces.jsonl, their token ids, and how many lines could not be read. A group is
    one question in one step. A held-out question is one group over all steps; its step is None."""
    groups = {}
    ids = set()
    unread = 0
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            trace = json.loads(line, parse_constant=lambda name: None)  # NaN
            _, step, question, _ = trace["key"]
            prompt = tuple(trace["ids"][:(trace["mask"] + [1]).index(1)])
            shared = {name: trace.pop(name) for name in ("question", "golds", "tools")}
            shared |= {"step": None if step == "eval" else step, "prompt": prompt, "traces": []}
            ids.update(trace["ids"])
            shorten(trace, len(prompt), world)
            groups.setdefault((step, question, prompt), shared)["traces"].append(trace)
        except (ValueError, KeyError, TypeError):  # half a line, or another version's
            unread += 1
    return list(groups.values()), ids, unread


def shorten(trace: dict, n: int, world: World | None) -> None:
    """Cut the n tokens of the prompt off. Replace `mask` by the lengths of its runs, `old` by its
    gap to the sampler. Add the truth to the calls that the world can answer."""
    for call in chain.from_iterable(turn["calls"] for turn in trace["turns"]):
        if world and call["error"] is None and call["name"] in RELATIONS:
            call["truth"] = world.real(call["name"], call["arguments"])
    pairs = zip(trace.pop("old"), trace["logprobs"], strict=False)  # old may be []
    trace["gap"] = [round(a - b, 4) or 0 for a, b in pairs]  # -0.0 takes 4 bytes
    trace["logprobs"] = [round(value, 3) or 0 for value in trace["logprobs"]]
    trace["ids"] = trace["ids"][n:]
    trace["runs"] = [len(list(run)) for _, run in groupby(trace.pop("mask")[n:])]


def choose(groups: list[dict], room: int) -> list[dict]:
    """Every n-th group of training, held-out questions at every n-th evaluation and at the last,
    with the smallest n that fits in `room` bytes."""
    every = 1
    while every <= len(groups):
        kept = [group for group in groups if group["step"] is not None][::every]
        for group in [group for group in groups if group["step"] is None]:
            *most, last = group["traces"]
            kept.append(group | {"traces": [*most[::every], last]})
        if len(encode(kept)) <= room:
            return kept
        every += 1 + every // 5
    return []
