"""The figure of chapter 5: traces that stop short, and EM against the teacher's rate."""
import csv
from pathlib import Path

from picture import LEFT, WIDTH, Picture, key, panel

TABLE = Path(__file__).resolve().with_name("stops.csv")


def draw(picture: Picture, run: dict) -> str:
    """Sampled and greedy EM after SFT, for chains of two, three and four lookups."""
    with open(TABLE, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    picture.text(LEFT, picture.y + 14, "After SFT: right answers against the teacher's habit",
                 font_weight="bold", font_size=22)
    picture.y += 46
    for hops in ("2", "3", "4"):
        picture.text(LEFT, picture.y, f"chains of {hops} lookups")
        if hops == "2":
            key(picture, 270, "one", "sampled")
            key(picture, 420, "two", "greedy")
        series = []
        for name, color in (("greedy", "two"), ("sampled", "one")):
            points = [(round(100 * float(row["stops_short"])), float(row[name]))
                      for row in rows if row["hops"] == hops]
            series.append((points, color))
        panel(picture, 130, 100, [0, 0.5, 1.0], series)
        picture.y += 30
    picture.text(WIDTH / 2, picture.y - 8, "% of the chains in which the teacher stops short",
                 text_anchor="middle")
    picture.y += 10
    return "EM after SFT against the teacher's rate of stopping short"
