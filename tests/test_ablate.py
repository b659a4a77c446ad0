"""bench/ablate.py: a smoke run, what its rows replace, its arithmetic; the pages hold its tables, the folder its figures."""
import csv
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ablate
import ablation_report as report
import pytest
import torch
from conftest import build_tiny

import grpo
import sft
from agents import Call, Tool, ToolActor, Trace, Turn
from grpo import GRPOConfig

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "ablation"


def lines(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ----------------------------------------------------------------------------------------------------------- runs


def test_a_row_runs_with_the_stage_it_starts_from_and_is_not_run_twice(tmp_path):
    command = [sys.executable, ROOT / "bench" / "ablate.py", "--toy", "--rows", "by_turn", "--seeds", "0", "--out",
               tmp_path / "runs", "--results", tmp_path / "results"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stdout.splitlines() if line[:1].isdigit()] == [
        "1/2  sft, seed 0: stage 1", "2/2  by_turn, seed 0: credit by turn"]
    found = lines(tmp_path / "results" / "results.csv")
    assert [(line["row"], line["seed"]) for line in found] == [("sft", "0"), ("by_turn", "0")]
    for line in found:
        filled = set(ablate.COLUMNS) - {"rollouts_to_80", "em_half", "steps", "note", "valid_calls"}  # without a call
        assert all(line[name] for name in filled), line
    points = [(line["step"], line["arithmetic"]) for line in lines(tmp_path / "results" / "curves.csv")]
    assert points == [("0", ablate.arithmetic()), ("2", ablate.arithmetic())]
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names >= {f"{name}-{theme}.svg" for name in ("rows", "experiments") for theme in ("light", "dark")}
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "by_turn, seed 0" not in again.stdout
    assert lines(tmp_path / "results" / "results.csv") == found


def test_toy_runs_never_go_to_the_committed_results():
    command = [sys.executable, ROOT / "bench" / "ablate.py", "--toy", "--rows", "sft", "--seeds", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ablate.py: toy: choose a folder with --results")


def test_runs_come_after_their_stage_1_and_finished_runs_are_left_out(tmp_path):
    assert ablate.wanted(["grpo_stops_3", "grpo"], [0, 1], {("grpo", 0)}, tmp_path) == [
        ("sft_stops_3", 0), ("grpo_stops_3", 0), ("sft", 1), ("grpo", 1)]
    (tmp_path / "sft" / "1" / "sft" / "model").mkdir(parents=True)
    (tmp_path / "sft" / "1" / "sft" / "model" / "config.json").touch()
    assert ablate.wanted(["grpo", "sft"], [1], {("sft", 1)}, tmp_path) == [("grpo", 1)]
    seeds = [seed for _, seed in ablate.wanted(["grpo"], [], {("grpo", n) for n in (1, 3)}, tmp_path)]
    assert seeds == [0, 0, 2, 2, 4, 4]


def call(monkeypatch, folder, *words):
    monkeypatch.setattr(sys, "argv", ["ablate.py", "--results", str(folder), "--out", str(folder), *words])
    ablate.main()


def test_a_stage_1_that_is_made_again_adds_no_second_line(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(ablate, "arithmetic", lambda: "float32")
    monkeypatch.setattr(ablate, "run_row", lambda name, seed, *_: made.append(seed) or {
        "row": name, "seed": seed, "arithmetic": "float32"})
    for seed in ("0", "0", "1"):
        call(monkeypatch, tmp_path, "--here", "--rows", "sft", "--seeds", seed)
    assert made == [0, 0, 1]
    assert [line["seed"] for line in lines(tmp_path / "results.csv")] == ["0", "1"]


def test_runs_of_another_arithmetic_are_run_and_compared_by_themselves(tmp_path, monkeypatch):
    """A seed's stage 1 is another model there."""
    runs = [("float32", "grpo", 0.1), ("bfloat16", "grpo", 0.5), ("bfloat16", "std", 0.6), ("bfloat16", "grpo", 0.9),
            ("float32", "std", 0.4)]
    for arithmetic, name, em in runs:
        line = {"row": name, "seed": 0, "arithmetic": arithmetic, "em_sampled": em, "em_greedy": em / 2,
                "seconds": 30, "eval_seconds": 30}
        monkeypatch.setattr(ablate, "arithmetic", lambda line=line: line["arithmetic"])
        monkeypatch.setattr(ablate, "run_row", lambda *_, line=line: line)
        call(monkeypatch, tmp_path, "--here", "--rows", name, "--seeds", "0")
    written = lines(tmp_path / "results.csv")
    assert [(line["arithmetic"], line["row"], float(line["em_sampled"])) for line in written] == runs[:3] + runs[4:]
    made = report.tables(report.by_row(written), report.with_float32(ablate.ROWS))
    assert "`std` |" in made["parts"] and "| `grpo`: +0.100, one seed | `grpo`: +0.050, one seed |" in made["parts"]
    assert "`std float32` |" in made["parts"] and "| `grpo float32`: +0.300, one seed |" in made["parts"]
    assert "| all in bfloat16 | 2 | 1.0 | 1.0 | 2.0 |" in made["time"] and "| all in float32 | 2 |" in made["time"]
    assert "0.50" in made["readme"] and "0.10" not in made["readme"], "README shows bfloat16"


def test_a_figure_draws_the_arithmetic_with_more_of_its_rows():
    assert report.more_runs({"a": 1, "b float32": 1}, ["a", "b"]) == ""
    assert report.more_runs({"a": 1, "a float32": 1, "b float32": 1}, ["a", "b"]) == " float32"


def test_a_run_that_collapses_is_evaluated_and_says_so(tmp_path, monkeypatch):
    """Changes hold during training alone. A stopped run is evaluated at its last checkpoint."""
    during = {}

    def train(row, run, seed, toy):
        during["reward"] = grpo.reward
        for step in ("0000005", "0000010"):
            (run / "grpo" / "checkpoints" / step).mkdir(parents=True)
        raise SystemExit("step 12: loss is nan")

    row = ablate.Row("parts", "", train=train, changes=ablate.without("economy"))
    monkeypatch.setitem(ablate.ROWS, "broken", row)
    monkeypatch.setattr(ablate, "evaluate", lambda model, *_: {"em_sampled": 0.0, "policy": model.name})
    before = grpo.reward
    line = ablate.run_row("broken", 3, tmp_path, False)
    assert during["reward"] is not before and grpo.reward is before
    assert (line["note"], line["policy"], line["seed"]) == ("step 12: loss is nan", "0000010", 3)
    assert not list(tmp_path.glob("*/*/*/checkpoints"))


# ----------------------------------------------------------------------------------------------- what rows replace


def test_every_row_names_rows_and_options_that_exist():
    for name, row in ablate.ROWS.items():
        assert row.start in ablate.ROWS and row.against in ablate.ROWS
        config = sft.SFTConfig if row.train in (ablate.train_sft, ablate.train_continued) else GRPOConfig
        assert all(hasattr(config, option) for option in row.options), name
        assert all(hasattr(module, attribute) for module, attribute in row.changes), name


def test_the_answer_reward_alone_is_the_share_of_right_answers():
    config = GRPOConfig()
    for name, value in ablate.ROWS["grpo_answer"].options.items():
        setattr(config, name, value)
    for answer, reward in (("Bib", 1.0), ("Bob", 0.0)):
        trace = Trace("Who?", turns=[Turn("t", answer=answer)], status="answered")
        assert grpo.reward(trace, ["Bib"], config)["reward"] == reward


@pytest.mark.parametrize("part", grpo.PARTS)
@pytest.mark.parametrize("useful", [True, False])
def test_a_part_that_says_nothing_is_1_and_the_others_stay(part, useful):
    """A useless call takes grammar, valid and arguments away; the part that is left out keeps its 1."""
    name = "Bib" if useful else "Bob"
    turns = [Turn("t", [Call("f", {"x": "Ann"}, observation={"y": name})]), Turn("t", answer="Bib")]
    trace = Trace("Who is Ann?", [Tool("f", "", {}, {})], turns=turns, status="answered")
    config = GRPOConfig()
    before = grpo.reward(trace, ["Bib"], config)
    assert (before["economy"] > 0) == useful
    after = ablate.without(part)[grpo, "reward"](trace, ["Bib"], config)
    assert after[part] == 1.0
    assert all(after[other] == before[other] for other in ("em", "answer", *grpo.PARTS) if other != part)
    gain = (1 - before[part]) / len(grpo.PARTS)
    assert after["consistency"] == pytest.approx(before["consistency"] + gain)
    assert after["reward"] == pytest.approx(before["reward"] + config.w_consistency * gain)
    trace.status = "truncated"
    assert not any(ablate.without(part)[grpo, "reward"](trace, ["Bib"], config).values())


def test_unmasked_observations_are_scored():
    model = build_tiny(dtype=torch.float32)
    traces = [Trace(ids=[1, 2, 3, 4, 5, 6], mask=[0, 0, 1, 0, 0, 1]), Trace(ids=[7, 8, 9], mask=[0, 1, 1])]
    logprobs, _, mask = ablate.unmasked(model, traces)
    assert mask[:, :6].int().tolist() == [[0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0]] and not mask[:, 6:].any()
    own, _, _ = sft.trace_logprobs(model, traces)
    torch.testing.assert_close(logprobs[0, [2, 5]], own[0, [2, 5]])
    assert (logprobs[0, 3:5] < 0).all() and traces[0].mask == [0, 0, 1, 0, 0, 1]


@pytest.fixture
def actor(monkeypatch):
    """A function that makes a broken ToolActor. Before it breaks, tool t answers the call x with x."""
    def true(self, requests):
        self.asked += len(requests)
        return [{tool.name: arguments["x"]} for tool, arguments in requests]

    monkeypatch.setattr(ToolActor, "answer", true)
    return lambda kind: kind(SimpleNamespace(tokenizer=None), 64)


def test_broken_tools(actor):
    tool = SimpleNamespace(name="t")
    requests = [(tool, {"x": i % 7}) for i in range(2000)]
    assert actor(ablate.BlankActor).answer(requests) == [{}] * 2000
    shuffled = actor(ablate.ShuffledActor).answer(requests)
    assert all(o["t"] != i % 7 and o["t"] in range(7) for i, o in enumerate(shuffled))
    wrong = actor(ablate.WrongActor).answer(requests)
    share = sum(o != {"t": i % 7} for i, o in enumerate(wrong)) / 2000
    assert 0.17 < share < 0.23
    of_one_call = {str(o) for i, o in enumerate(wrong) if i % 7 == 0}
    assert len(of_one_call) > 1, "each call is drawn anew"


def test_broken_tools_answer_rollouts_and_whole_ones_the_held_out_questions(actor, monkeypatch):
    seen = []
    monkeypatch.setattr(grpo, "run_episodes", lambda agent, backend, traces, **_: seen.append(backend(requests)))
    monkeypatch.setattr(grpo, "measure", lambda *_: {"em": 1.0})
    monkeypatch.setattr(grpo, "means", lambda measures: {})
    requests = [(SimpleNamespace(name="t"), {"x": 1})]
    simulator = SimpleNamespace(actor=actor(ablate.BlankActor), traces=lambda questions, group, key: [Trace()])
    agent = SimpleNamespace(sampler=SimpleNamespace(capacity=1), temperature=1.0)
    changed = ablate.ROWS["tool_blank"].changes
    assert changed[grpo, "ToolActor"] is ablate.BlankActor
    changed[grpo, "score_heldout"](simulator, agent, [SimpleNamespace(golds=["a"], set="hotpot", rule="hotpotqa")])
    assert seen == [[{"t": 1}]] * 2
    assert simulator.actor.answer(requests) == [{}]


def looked_up(*observations):
    """A trace that made a call per observation, then answered; a prompt token, three tokens a turn."""
    turns = [Turn("t", [Call("f", {}, observation=o)]) for o in observations] + [Turn("t", answer="a")]
    trace = Trace(turns=turns, status="answered")
    trace.hear([1])
    for _ in turns:
        trace.say([2, 3], [-0.5, -0.5])
        trace.hear([4])
    return trace


def test_credit_by_turn_compares_turns_at_equal_states():
    """By hand: two traces saw b, two saw c; of the former one went on."""
    traces = [looked_up({"v": "b"}), looked_up({"v": "b"}, {"v": "d"}), looked_up({"v": "c"}), looked_up({"v": "c"})]
    config = GRPOConfig(group=4)
    rewards = [{"reward": r} for r in (0.0, 1.0, 0.5, 0.5)]
    ablate.set_turn_advantages(traces, rewards, config)
    assert [t.advantage for t in traces] == pytest.approx([-0.5, 0.5, 0.0, 0.0])
    first = (0.95 ** 2 + 0.5 * 0.95 * 2) / 4  # mean of the discounted rewards at the start
    assert traces[0].by_turn == pytest.approx([-0.5 + 0 - first, -0.5 + 0 - 0.95 / 2])
    assert traces[1].by_turn == pytest.approx([0.5 + 0.95 ** 2 - first, 0.5 + 0.95 - 0.95 / 2, 0.5])
    assert traces[2].by_turn == pytest.approx([0.5 * 0.95 - first, 0.0])


def test_states_of_other_groups_differ():
    traces = [looked_up({"v": "b"}) for _ in range(4)]
    config = GRPOConfig(group=2)
    ablate.set_turn_advantages(traces, [{"reward": r} for r in (0.0, 0.0, 1.0, 1.0)], config)
    assert [t.by_turn for t in traces] == [[0.0, 0.0]] * 4


def test_with_one_advantage_for_all_turns_pieces_give_the_update_of_whole_traces(monkeypatch):
    """Same gradient, so the same weights after a step, for traces of different numbers of turns."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    config = GRPOConfig(trace_tokens=20, clip_norm=1e9, lr=1e-2)
    after = []
    for update in (grpo.update, ablate.update_by_turn):
        model = build_tiny()
        optimizer = sft.make_optimizer(model, config.lr, 0.0)
        traces = [looked_up({"v": 1}), looked_up({"v": 1}, {"v": 2}), looked_up()]
        for trace, advantage in zip(traces, (0.5, -0.7, 0.2), strict=True):
            trace.advantage = advantage
            trace.by_turn = [advantage] * len(trace.turns)
        update(model, model, optimizer, traces, config, config.lr)
        after.append([weight.detach().clone() for weight in model.parameters()])
    for whole, pieces in zip(*after, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-12)


def test_rejection_sampling_learns_from_right_traces_alone(tmp_path, monkeypatch):
    """Every third trace counts as right. All of them are learned from once, in four rounds."""
    monkeypatch.setitem(ablate.TOY_OPTIONS, "grpo", {**ablate.TOY_OPTIONS["grpo"], "steps": 5, "max_turns": 1})
    ablate.train_sft(ablate.ROWS["sft"], tmp_path / "sft" / "0", 0, True)
    scored = []
    right = []
    learned = []

    def reward(trace, golds, config):
        scored.append(trace)
        if len(scored) % 3 == 0:
            right.append(trace)
        return {"em": float(len(scored) % 3 == 0)}

    monkeypatch.setattr(grpo, "reward", reward)
    monkeypatch.setattr(grpo, "score_heldout", lambda *_: ({"em_sampled": 0.0, "em_greedy": 0.0}, {}))
    monkeypatch.setattr(sft, "train_step", lambda model, parts, most: learned.append((len(scored), parts[0])))
    monkeypatch.setattr(ablate, "optimizer_step", lambda *_: None)
    run = tmp_path / "rejection" / "0"
    run.mkdir(parents=True)
    model = ablate.train_rejection(ablate.ROWS["rejection"], run, 0, True)
    assert (model / "config.json").exists()
    assert len(scored) == 5 * 2 * 2, "as many traces as GRPO samples"
    assert sorted(id(t) for _, batch in learned for t in batch) == sorted(map(id, right))
    assert sorted({when for when, _ in learned}) == [8, 12, 16, 20], "rounds of 2, 1, 1 and 1 rollouts"


# ---------------------------------------------------------------------------------------------------------- report


def rows_of(**values):
    return report.by_row([{"row": row, "seed": str(seed), "em_sampled": str(value), "em_half": "", "arithmetic": "bfloat16"}
                          for row, of_row in values.items() for seed, value in enumerate(of_row)])


def test_a_difference_within_its_interval_is_none():
    """The interval is Student's, of the differences by seed: those of a are .1, .2, .3, of b .1, -.1, .1."""
    found = rows_of(base=[0.5, 0.5, 0.5, 0.9], a=[0.6, 0.7, 0.8], b=[0.6, 0.4, 0.6], c=[0.75], same=[0.5, 0.5])
    assert report.difference(found["a"], found["base"]) == "no difference found (+0.200 ± 0.248)"
    assert report.difference(found["b"], found["base"]) == "no difference found (+0.033 ± 0.287)"
    assert report.difference(found["c"], found["base"]) == "+0.250, one seed"
    assert report.difference(found["same"], found["base"]) == "no difference found (+0.000 ± 0.000)"
    assert report.difference(found["a"], {}) == ""
    found["b"][0]["em_sampled"] = ""
    assert report.difference(found["b"], found["base"]) == "no difference found (+0.000 ± 1.271)"
    sure = rows_of(base=[0.5, 0.6, 0.7], a=[0.7, 0.8, 0.91])
    assert report.difference(sure["a"], sure["base"]) == "+0.203 ± 0.014"


def test_a_cell_has_mean_and_deviation_over_the_seeds_with_a_value():
    found = rows_of(a=[0.5, 0.6, 0.7], b=[0.25])
    assert report.cell(found["a"], "em_sampled") == "0.600 ± 0.100"
    assert report.cell(found["b"], "em_sampled") == "0.250"
    assert report.cell(found["a"], "em_half") == ""


def test_tables_go_between_their_marks_and_nowhere_else():
    page = "a\n<!-- table: x -->\n\nold\nold\n\n<!-- end -->\nb\n<!-- table: y -->\n<!-- end -->\n"
    made = {"x": "| new |\n", "y": "| y |\n"}
    filled = report.fill(page, made)
    assert filled == "a\n<!-- table: x -->\n\n| new |\n\n<!-- end -->\nb\n<!-- table: y -->\n\n| y |\n\n<!-- end -->\n"
    assert report.fill(filled, made) == filled
    with pytest.raises(KeyError):
        report.fill(page, {"x": ""})


def test_a_curve_has_the_means_until_the_next_evaluation(tmp_path):
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo" / "metrics.csv").write_text(
        "step,calls,reward,heldout_greedy,heldout_sampled\n0,2,.1,.2,.3\n1,3,.3,,\n2,4,.5,.6,.81\n3,4,.7,,\n4,,,.8,.9\n")
    assert ablate.curve(tmp_path) == [
        {"step": "0", "heldout_sampled": ".3", "heldout_greedy": ".2", "calls": 2.5, "reward": 0.2},
        {"step": "2", "heldout_sampled": ".81", "heldout_greedy": ".6", "calls": 4.0, "reward": 0.6},
        {"step": "4", "heldout_sampled": ".9", "heldout_greedy": ".8"}]
    config = tmp_path / "grpo" / "config.json"
    config.write_text('{"steps": 4}')
    assert ablate.speed(tmp_path) == {"steps": 4, "rollouts_to_80": 2, "em_half": 0.81}
    config.write_text('{"steps": 12}')
    assert ablate.speed(tmp_path)["em_half"] is None, "it stopped before half of the rollouts"
    assert ablate.speed(tmp_path / "none") == {}


def test_pages_and_figures_show_the_committed_results():
    found = report.by_row(lines(RESULTS / "results.csv"))
    rows = report.with_float32(ablate.ROWS)
    made = report.tables(found, rows)
    for page in (ROOT / "README.md", ROOT / "docs" / "ablation.md"):
        text = page.read_text(encoding="utf-8")
        assert report.fill(text, made) == text, page
    curves = {}
    for line in lines(RESULTS / "curves.csv"):
        curves.setdefault(report.row_of(line), []).append(line)
    for name, text in report.figures(found, curves, rows).items():
        assert (RESULTS / name).read_text(encoding="utf-8") == text, name


def test_every_line_of_the_results_is_of_a_row():
    for line in report.read(RESULTS / "results.csv"):
        row = ablate.ROWS[line["row"]]
        assert 0 <= int(line["seed"]) < row.seeds
        assert 0 <= float(line["em_sampled"]) <= 1
    keys = [(report.row_of(line), line["seed"]) for line in report.read(RESULTS / "results.csv")]
    assert len(keys) == len(set(keys))
