"""Run folders: locks, a folder that is written whole, the stage 1 that stage 2 starts from."""
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from data import InputError, fingerprint, read_json

UNFINISHED = "unfinished"  # in the folder of a stage that gets more steps than its model has
locks: dict[Path, IO] = {}  # the open files; the system frees their locks when the process ends


def lock(path: Path) -> None:
    """Lock a file until this process ends. InputError if another process has locked it.

    A run folder is locked by its file `lock`, so no two programs write to one run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.resolve()
    if path in locks:
        return
    file = open(path, "a")  # noqa: SIM115  it stays open, or the lock would end
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path}: another program is writing there; wait for it, or choose "
                         "another --out") from None
    except OSError:  # a file system without locks
        pass
    locks[path] = file


def is_finished(folder: Path) -> bool:
    """Whether a stage has its model and does not get more steps."""
    return (folder / "model" / "config.json").exists() and not (folder / UNFINISHED).exists()


# What --resume may change. Of files the bytes are compared, not the paths.
FREE = ("out", "resume", "sft", "model", "traces", "data", "save_every", "threads", "graph")
# The contents that a stage depends on, in words.
CONTENTS = {"sha256_of_model_and_data": "another content of the model, traces or questions",
            "sha256_of_prompts": "other prompts (data/prompts.py)"}


def gets_steps(folder: Path, options: dict, finished: bool) -> bool:
    """Whether a resumed stage gets more steps than it was begun with. InputError if another option
    or the content of its files has changed.
    """
    begun = read_json(folder / "config.json")  # of stage 1 or an older run: without graph
    grows = options["steps"] > begun.get("steps", 0)
    for name, value in json.loads(json.dumps(options)).items():
        free = name in FREE or (name == "steps" and (grows or finished))
        if not free and value != begun.get(name):
            other = CONTENTS.get(name, f"{begun.get(name)!r}, not {value!r}")
            raise InputError(f"{name}: the run in {folder} was started with {other}")
    changed = [n for n in ("steps", "threads", "graph") if options.get(n, 0) != begun.get(n, 0)]
    if changed and (grows or not finished):
        print(f"{folder}: other {' and '.join(changed)} than at its start, so its weights will "
              "not be those of a run without a stop, bit for bit")
    return grows


def trained_by(out: Path) -> str:
    """A fingerprint of the options and data of both stages of a run, so of its models."""
    configs = [out / stage / "config.json" for stage in ("sft", "grpo")]
    return fingerprint(*[path for path in configs if path.exists()])


def read_results(out: Path) -> dict:
    """results.json of a run, or {} if it is missing or the models were trained again since."""
    path = out / "results.json"
    results = read_json(path) if path.exists() else {}
    return results if results.get("trained_by") in (None, trained_by(out)) else {}


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write. It gets its name at the end, so a kill never leaves half of it."""
    target = target.resolve()  # a link stays, and what it points to is written
    part = target.with_name("part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    readable = part.stat().st_mode & 0o666  # a new file's permissions; safetensors writes 0600
    for file in part.iterdir():
        if file.is_file():
            file.chmod(readable)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(part, target)


def stage1_folder(out: str, source: str) -> Path:
    """The sft folder that stage 2 starts from: OUT/sft, or while there is none the source."""
    target = Path(out) / "sft"
    return Path(source) if source and not target.exists() else target


def stage1_model(out: str, source: str, resume: bool) -> Path:
    """OUT/sft/model. source: the sft folder of another run, which is copied to OUT/sft first.

    It is copied without its checkpoints. With resume, an OUT/sft that exists is kept.
    """
    target = Path(out) / "sft"
    if source and target.exists() and not resume:
        raise InputError(f"sft: {target} exists already; leave out --sft to start from it, or "
                         "choose another --out")
    folder = stage1_folder(out, source)
    copied = folder != target
    for part in ("model/config.json", "config.json"):
        if not (folder / part).exists():
            key = "sft" if copied else "out"
            raise InputError(f"{key}: no trained model in {folder} ({part} is missing); run sft.py "
                             "first")
    if (folder / UNFINISHED).exists():
        raise InputError(f"{folder}: gets more steps; finish it with sft.py --resume first")
    if copied:
        lock(Path(out) / "lock")
        with whole_folder(target) as part:
            left_out = shutil.ignore_patterns("checkpoints", "part")
            shutil.copytree(folder, part, ignore=left_out, dirs_exist_ok=True)
    return target / "model"
