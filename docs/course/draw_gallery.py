"""The figure of chapter 8: six short runs of GRPO, healthy and sick."""
import csv
from pathlib import Path

from picture import LEFT, WIDTH, Picture, key

RUNS = Path(__file__).resolve().parents[1] / "ablation" / "sick"
# run: its title, and the columns that tell
SHOWN = {"healthy": ("healthy", ("entropy", "flat_groups")),
         "sick_unmasked": ("observations in the loss", ("entropy",)),
         "sick_lr": ("learning rate × 10", ("finished",)),
         "sick_flat": ("flat groups", ("flat_groups",)),
         "sick_tool": ("broken tool", ("consistency",)),
         "sick_reward": ("hacked reward", ("consistency",))}
ACROSS = (WIDTH - 2 * LEFT - 30) // 2  # width of a panel
HEIGHT = 120


def draw(picture: Picture, run: dict) -> str:
    """Reward and held-out EM, a panel per run."""
    key(picture, LEFT, "two", "reward")
    key(picture, LEFT + 150, "one", "held-out questions answered right (sampled EM)")
    picture.y += 36
    for number, (name, (title, columns)) in enumerate(SHOWN.items()):
        with open(RUNS / f"{name}.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        left = LEFT + number % 2 * (ACROSS + 30)
        picture.text(left, picture.y, title, font_weight="bold")
        tell = "; ".join(f"{column} {span(rows, column)}" for column in columns)
        picture.text(left, picture.y + 22, tell, "given", font_size=15)
        panel(picture, left, rows)
        if number % 2 == 1:
            picture.y += HEIGHT + 84
    for line in ("24 rollouts each; the grey lines are 0, 0.5 and 1",
                 "below a title: a column of metrics.csv, its first and its last value"):
        picture.text(WIDTH / 2, picture.y - 8, line, "given", text_anchor="middle")
        picture.y += 26
    picture.y -= 18
    return "Six runs of GRPO, healthy and sick"


def span(rows: list[dict], column: str) -> str:
    """The first and the last value of a column."""
    values = [float(row[column]) for row in rows if row[column]]
    return f"{values[0]:.2f} to {values[-1]:.2f}"


def panel(picture: Picture, left: float, rows: list[dict]) -> None:
    """One run: both curves over its steps, on axes from 0 to 1. EM is known every four steps."""
    top = picture.y + 36
    last = int(rows[-1]["step"])
    for tick in (0.0, 0.5, 1.0):
        y = top + HEIGHT * (1 - tick)
        picture.add("line", x1=left, x2=left + ACROSS, y1=y, y2=y, stroke="grid")
    for name, color in (("reward", "two"), ("heldout_sampled", "one")):
        points = []
        for row in rows:
            if row[name]:
                x = left + ACROSS * int(row["step"]) / last
                points.append(f"{x:.1f},{top + HEIGHT * (1 - float(row[name])):.1f}")
        picture.add("polyline", points=" ".join(points), fill="none", stroke=color, stroke_width=4)
