"""Score stage 1 by the number of lookups, for teachers that stop short at different rates.

    python bench/ablate.py --rows sft sft_stops_0 sft_stops_3 sft_stops_6 sft_stops_9 --seeds 0 \\
        --results runs/stops
    python docs/course/stops.py       writes docs/course/stops.csv

Asked are 300 questions of two, three and four lookups, which no stage was trained on: stage 1 saw
such questions about other worlds. `stopped` is the share of sampled traces with fewer calls than
lookups.
"""
import argparse
import csv
import random
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from agents import run_episodes
from data.world import make_questions, make_world
from grpo import GRPOConfig, Simulator, measure
from model import load
from run import set_up

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUNS = {0.0: "sft_stops_0", 0.3: "sft_stops_3", 0.6: "sft_stops_6", 0.7: "sft", 0.9: "sft_stops_9"}
ROWS = 100  # traces at once


def score(folder: Path, each: int) -> list[dict]:
    """A row for each number of lookups. folder: the model of a stage 1 of seed 0."""
    config = GRPOConfig()
    set_up(config)
    world = make_world(0)
    chains = [q for q in make_questions(world) if q.set == "train" and q.kind == "composition"]
    simulator = Simulator(folder, config)
    agent = simulator.agent(load(folder)[0], ROWS, 1.0)
    rows = []
    for hops in (2, 3, 4):
        pool = [q for q in chains if len(q.steps) == hops]
        asked = random.Random(hops).sample(pool, each)
        simulator.make_tools(asked)
        row = {"hops": hops, "n": each}
        for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
            agent.temperature = temperature
            traces = simulator.traces(asked, 1, "stops")
            with world.sealed():
                for i in range(0, each, ROWS):
                    run_episodes(agent, simulator.actor.answer, traces[i:i + ROWS])
            scores = [measure(t, q.golds)["em"] for t, q in zip(traces, asked, strict=True)]
            row[name] = round(fmean(scores), 3)
            if name == "sampled":
                row["stopped"] = round(fmean([len(t.calls) < hops for t in traces]), 3)
        rows.append(row)
    return rows


def main() -> None:
    """Parse the command line; score every run; write the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ablation",
                        help="folder of the runs of bench/ablate.py")
    parser.add_argument("--each", type=int, default=300, help="questions of each number of lookups")
    parser.add_argument("--to", type=Path, default=HERE / "stops.csv")
    options = parser.parse_args()
    with open(options.to, "w", newline="", encoding="utf-8") as file:
        columns = ["stops_short", "hops", "n", "sampled", "greedy", "stopped"]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for share, name in RUNS.items():
            folder = options.runs / name / "0" / "sft" / "model"
            writer.writerows({"stops_short": share, **row} for row in score(folder, options.each))


if __name__ == "__main__":
    main()
