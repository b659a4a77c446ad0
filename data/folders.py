"""Run folders: a folder that is written whole, and the stage 1 that stage 2 starts from."""
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data import InputError


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write. It gets its name at the end, so a kill never leaves half of it."""
    part = target.with_name("part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    shutil.rmtree(target, ignore_errors=True)
    os.replace(part, target)


def stage1_model(out: str, source: str, resume: bool) -> Path:
    """OUT/sft/model. source: the sft folder of another run, which is copied to OUT/sft first.

    It is copied without its checkpoints. With resume, an OUT/sft that exists is kept.
    """
    target = Path(out) / "sft"
    if source and target.exists() and not resume:
        raise InputError(f"sft: {target} exists already; leave out --sft to start from it, or "
                         "choose another --out")
    copied = bool(source) and not target.exists()
    folder = Path(source) if copied else target
    for part in ("model/config.json", "config.json"):
        if not (folder / part).exists():
            key = "sft" if copied else "out"
            raise InputError(f"{key}: no trained model in {folder} ({part} is missing); run sft.py "
                             "first")
    if copied:
        with whole_folder(target) as part:
            left_out = shutil.ignore_patterns("checkpoints", "part")
            shutil.copytree(folder, part, ignore=left_out, dirs_exist_ok=True)
    return target / "model"
