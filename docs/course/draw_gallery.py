"""The figure of chapter 8: six short runs of GRPO, healthy and sick."""
import csv
from pathlib import Path

from picture import LEFT, WIDTH, Picture, key

RUNS = Path(__file__).resolve().parents[1] / "ablation" / "sick"
SHOWN = {"healthy": "healthy", "sick_unmasked": "observations in the loss",
         "sick_lr": "learning rate × 10", "sick_flat": "flat groups",
         "sick_tool": "broken tool", "sick_reward": "hacked reward"}
ACROSS = (WIDTH - 2 * LEFT - 30) // 2  # width of a panel
HEIGHT = 120


def draw(picture: Picture, run: dict) -> str:
    """Reward and EM of each step, a panel per run."""
    key(picture, LEFT, "two", "reward")
    key(picture, LEFT + 150, "one", "right answers (EM) in training")
    picture.y += 26
    for number, (name, title) in enumerate(SHOWN.items()):
        with open(RUNS / f"{name}.csv", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["reward"]]
        left = LEFT + number % 2 * (ACROSS + 30)
        panel(picture, left, title, rows)
        if number % 2 == 1:
            picture.y += HEIGHT + 62
    picture.text(WIDTH / 2, picture.y - 8, "24 rollouts each; the grey lines are 0, 0.5 and 1",
                 "given", text_anchor="middle")
    picture.y += 8
    return "Six runs of GRPO, healthy and sick"


def panel(picture: Picture, left: float, title: str, rows: list[dict]) -> None:
    """One run: both curves over its steps, on axes from 0 to 1."""
    top = picture.y + 14
    picture.text(left, picture.y, title, font_weight="bold")
    for tick in (0.0, 0.5, 1.0):
        y = top + HEIGHT * (1 - tick)
        picture.add("line", x1=left, x2=left + ACROSS, y1=y, y2=y, stroke="grid")
    for name, color in (("reward", "two"), ("em", "one")):
        points = []
        for i, row in enumerate(rows):
            x = left + ACROSS * i / (len(rows) - 1)
            points.append(f"{x:.1f},{top + HEIGHT * (1 - float(row[name])):.1f}")
        picture.add("polyline", points=" ".join(points), fill="none", stroke=color, stroke_width=4)
