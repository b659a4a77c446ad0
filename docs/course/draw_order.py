"""The figure of chapter 7: the order of outcomes on a line from 0 to 1."""
from picture import LEFT, WIDTH, Picture

START, END = 60, WIDTH - 60  # reward 0 and reward 1
POINTS = (  # reward, color, what earns it; the first stands highest
    (1.0, "right", "1: right, consistency 1"),
    (0.0, "wrong", "0: no answer (malformed, or cut off)"),
    (0.76, "right", "0.76: right, without a call"),
    (0.06, "wrong", "0.06: wrong, without a call"),
    (0.3, "wrong", "0.30: wrong, consistency 1"))


def place(reward: float) -> float:
    """The x of a reward."""
    return START + (END - START) * reward


def draw(picture: Picture, run: dict) -> str:
    """Bands for wrong and right, five kinds of traces above, a group's eight traces below."""
    picture.text(LEFT, picture.y + 14, "Right before wrong, wrong before no answer",
                 font_weight="bold", font_size=22)
    picture.y += 60
    line = picture.y + 34 * len(POINTS) + 10
    for i, (reward, color, text) in enumerate(POINTS):
        x = place(reward)
        y = picture.y + 34 * i
        picture.add("line", x1=x, x2=x, y1=y + 8, y2=line, stroke=color, stroke_width=2)
        at, anchor = (x - 6, "start") if reward < 0.5 else (x + 6, "end")
        picture.text(at, y, text, color, text_anchor=anchor)
    for low, high, color, name in ((0.0, 0.3, "wrong", "wrong"), (0.7, 1.0, "right", "right")):
        picture.add("rect", x=place(low), y=line, width=place(high) - place(low), height=30,
                    fill=color)
        picture.text(place((low + high) / 2), line + 22, name, "back", text_anchor="middle",
                     font_weight="bold")
    picture.add("line", x1=place(0.3), x2=place(0.7), y1=line + 15, y2=line + 15, stroke="given",
                stroke_dasharray="7 6", stroke_width=2)
    picture.text(place(0.5), line + 5, "no trace", "given", text_anchor="middle")
    for tick in (0.0, 0.3, 0.7, 1.0):
        picture.text(place(tick), line + 56, f"{tick:g}", "given", text_anchor="middle")
    picture.y = line + 100
    draw_group(picture, [trace["rewards"]["reward"] for trace in run["group"]])
    return "The reward of outcomes, from 0 to 1"


def draw_group(picture: Picture, rewards: list[float]) -> None:
    """A dot for each trace of a group; equal rewards stand on each other."""
    picture.y += 34
    picture.add("line", x1=START, x2=END, y1=picture.y + 12, y2=picture.y + 12, stroke="grid")
    for i, reward in enumerate(rewards):
        below = rewards[:i].count(reward)
        picture.add("circle", cx=place(reward), cy=picture.y - 22 * below, r=9,
                    fill="right" if reward > 0.5 else "wrong")
    picture.text(LEFT, picture.y + 44, f"The {len(rewards)} traces of one training question "
                 "(the group of chapter 6)", "given")
    picture.y += 54
