"""Copy the trained models of a run to data/miniature, so that `python mtr.py ask` works at once.

  python docs/miniature.py RUN

Both stages are stored in bfloat16. measured.json holds the sampled EM of the copies on a quarter of
the run's held-out questions.
"""
import json
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import InputError
from data.folders import whole_folder
from data.options import run_main
from data.training import choose_questions, world_seed
from data.world import make_world
from grpo import GRPOConfig, Simulator, score_heldout
from model import load, save_model
from run import set_up

TARGET = Path(__file__).resolve().parents[1] / "data" / "miniature"


def measure(folder: Path) -> dict[str, float]:
    """Sampled EM of both stages on a quarter of the held-out questions, all weights in float32."""
    seed = world_seed(str(folder))
    config = GRPOConfig(out=str(folder), seed=seed)
    set_up(config)
    _, held_out = choose_questions(config, make_world(seed))
    simulator = Simulator(folder / "sft" / "model", config)
    simulator.make_tools(held_out)
    scores = {}
    for stage in ("sft", "grpo"):
        model, _ = load(folder / stage / "model")
        agent = simulator.agent(model, len(held_out), 1.0)
        scores[stage] = score_heldout(simulator, agent, held_out)[0]["em_sampled"]
    return scores


def main() -> None:
    """python docs/miniature.py RUN"""
    if len(sys.argv) != 2:
        raise InputError("expected one argument, the folder of a finished run")
    run = Path(sys.argv[1])
    if run.resolve() == TARGET or world_seed(str(run)) != 0:
        raise InputError(f"{run}: expected a run of seed 0, because README asks about its world")
    with whole_folder(TARGET) as part:
        for stage in ("sft", "grpo"):
            model, tokenizer = load(run / stage / "model", dtype=torch.bfloat16)
            save_model(model, tokenizer, part / stage / "model")
            shutil.copy(run / stage / "config.json", part / stage)
        (part / "measured.json").write_text(json.dumps(measure(part), indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
