"""The command line of every program, made from a dataclass; how a program ends."""
import argparse
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_args

from safetensors import SafetensorError

from data import InputError, printable


def option(default, meaning: str, **more):
    """A config field. `meaning` is its --help text. more: `least`, the lowest value of a number,
    `choices`; `real` and `lora`, the defaults for a checkpoint and for its adapters; `unset`, what
    no value means; `bare`, the value of a flag that is given without one.
    """
    return field(default=default, metadata={"help": meaning, **more})


GRAPH = "decode with CUDA graphs (graph.py); no card has run them yet"  # --graph


def validate(config) -> None:
    """InputError for a value not in `choices` or below `least`. The default least is above 0."""
    for f in fields(config):
        value = getattr(config, f.name)
        least = f.metadata.get("least")
        choices = f.metadata.get("choices", (value,))
        if value not in choices:
            raise InputError(f"{f.name}: expected one of {', '.join(choices)}, found {value!r}")
        if type(value) in (int, float):
            fits = value > 0 if least is None else value >= least
            if not fits or value > 1e15:
                want = "above 0" if least is None else f"of at least {least}"
                raise InputError(f"{f.name}: expected a number {want}, found {value!r}")


@dataclass
class Config:
    """The options that all programs share."""
    out: str = option("run", "run folder")
    seed: int = option(0, "seed of the world and of everything random", least=0)
    threads: int = option(0, "CPU threads; 0: torch's choice", least=0)
    device: str = option("auto", "auto: the CPU for the miniature; for a checkpoint the GPU, if "
                         "there is one", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = option("auto", "auto: bfloat16 weights on a GPU that computes in bfloat16; "
                            "bfloat16 autocast in training on such a CPU; else float32",
                            choices=("auto", "float32", "bfloat16"))

    def __post_init__(self):
        for f in fields(self):
            if getattr(self, f.name) is None and "real" in f.metadata:  # not on the command line
                value = f.metadata["real"] if self.is_real() else f.default
                if self.is_real() and getattr(self, "lora", 0):
                    value = f.metadata.get("lora", value)
                setattr(self, f.name, value)
        validate(self)

    def is_real(self) -> bool:
        """Whether a real checkpoint is trained, which has other defaults than the miniature."""
        return bool(getattr(self, "model", ""))


@dataclass
class StageConfig(Config):
    """The options that both stages of training share."""
    clip_norm: float = option(1.0, "maximum norm of the gradient")
    micro_tokens: int = option(4096, "tokens of one training pass, with padding; less saves memory")
    lora: int = option(0, "rank of adapters, trained in place of a checkpoint's weights", least=0)
    offload: bool = option(False, "keep the optimizer's float32 weights and moments in CPU memory; "
                           "it changes nothing with --lora")
    resume: bool = option(False, "continue from the newest checkpoint, if there is one")


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake prints one line and not the whole usage."""

    def error(self, message: str):
        given = printable(" ".join(sys.argv[1:]))
        raise InputError(f"{printable(message)}; given: {given} (see --help)")


def add_options(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Add one --flag for each field of the dataclass."""
    for f in fields(config_class):
        kind = (get_args(f.type) or (f.type,))[0]  # int of int | None
        how = {"type": kind, "choices": f.metadata.get("choices")}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif kind is tuple:
            how = {"nargs": "+", "metavar": "FILE"}
        elif "bare" in f.metadata:
            how = {"nargs": "?", "const": f.metadata["bare"], "metavar": "FOLDER"}
        default = f.metadata.get("unset", "none") if f.default in (None, "", ()) else f.default
        if "real" in f.metadata:
            default = f"{default}; of a checkpoint {f.metadata['real']}"
            if "lora" in f.metadata:
                default += f", with --lora {f.metadata['lora']}"
        text = f"{f.metadata['help']} (default: {default})".replace("%", "%%")
        if f.metadata.get("positional"):
            parser.add_argument(f.name, help=f.metadata["help"])
        else:
            name = "--" + f.name.replace("_", "-")
            given = None if "real" in f.metadata else f.default
            parser.add_argument(name, default=given, help=text, **how)


def command_line(config_class: type, description: str):
    """Build the config from sys.argv."""
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, config_class)
    return config_class(**vars(parser.parse_args()))


# What to do if the memory is full.
LESS_MEMORY = {"sft.py": "lower --micro-tokens, or use --lora 16 or --offload",
               "grpo.py": "lower --questions, --sim-rows, --trace-tokens or --micro-tokens, or use "
                          "--lora 16 or --offload; --plan shows what each saves",
               "mtr.py": "lower --rows, --samples or --trace-tokens"}


def run_main(main: Callable[[], None]) -> None:
    """Run a program. A user's mistake prints one line on stderr and exits with code 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it raises KeyboardInterrupt
    sys.stdout.reconfigure(errors="replace")  # some terminals can't print every character
    try:
        return main()
    except (InputError, OSError, SafetensorError) as error:
        code, line = 2, str(error)
    except (RuntimeError, MemoryError) as error:
        full = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED",
                "bad_alloc")  # torch's words for it
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in full):
            raise
        program = Path(sys.argv[0]).name
        code, line = 2, f"out of memory; {LESS_MEMORY.get(program, LESS_MEMORY['mtr.py'])}"
    except KeyboardInterrupt:
        code, line = 130, "stopped; --resume continues a training run from its last checkpoint"
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(code)
