"""The figure of chapter 6: how one group of traces pushes its tokens."""
from picture import LEFT, WIDTH, Picture, segments

STRIP = 262  # where the first token of a trace is drawn
ROOM = WIDTH - LEFT - STRIP
MOST = 896   # L_max of Dr. GRPO: --trace-tokens of the miniature


def draw(picture: Picture, run: dict) -> str:
    """Reward, advantage and tokens of each trace; then the weight of a token in each loss."""
    group = run["group"]
    parts = [segments(trace) for trace in group]
    rewards = [trace["rewards"]["reward"] for trace in group]
    mean = sum(rewards) / len(rewards)
    std = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    picture.text(LEFT, picture.y + 14, "One group: each token is pushed by its trace's advantage",
                 font_weight="bold", font_size=22)
    picture.y += 52
    picture.text(LEFT, picture.y, f"mean reward {mean:.3f}, std {std:.3f};  A = reward − mean",
                 "given")
    picture.y += 40
    for name, x in (("trace", 76), ("reward", 156), ("A", 232)):
        picture.text(x, picture.y, name, "given", text_anchor="end")
    picture.text(STRIP, picture.y, "tokens, turn by turn", "given")
    scale = ROOM / max(sum(number for _, number in part) for part in parts)
    highest = max(abs(r - mean) for r in rewards)
    for i, (reward, part) in enumerate(zip(rewards, parts, strict=True)):
        picture.y += 50
        number = f"{reward - mean:+.2f}".replace("-", "−")
        color = "one" if reward > mean else "two"
        picture.text(76, picture.y, str(i + 1), text_anchor="end")
        picture.text(156, picture.y, f"{reward:.3f}", text_anchor="end")
        picture.text(232, picture.y, number, color, text_anchor="end")
        draw_strip(picture, part, (reward - mean) / highest, color, scale)
    picture.y += 48
    draw_legend(picture)
    draw_weights(picture, [sum(n for own, n in part if own) for part in parts])
    return "A group of traces: the push on each token, and its weight in each loss"


def draw_strip(picture: Picture, part: list, height: float, color: str, scale: float) -> None:
    """The tokens of a trace. Own tokens: a bar up or down, whose height is the advantage."""
    x = STRIP
    middle = picture.y - 7
    for own, number in part:
        width = scale * number
        if own:
            size = max(2.0, 22 * abs(height))
            top = middle - size if height > 0 else middle
            picture.add("rect", x=x + 0.5, y=float(top), width=width - 1, height=size, fill=color)
        else:
            picture.add("rect", x=x + 0.5, y=middle - 2.0, width=width - 1, height=4.0,
                        fill="given")
        x += width


def draw_legend(picture: Picture) -> None:
    """What up, down and grey mean."""
    for color, text in (("one", "up: the token becomes more likely; the height is A"),
                        ("two", "down: the token becomes less likely"),
                        ("given", "observation: in no sum, so no push")):
        picture.add("rect", x=LEFT, y=picture.y - 14, width=30, height=14, fill=color)
        picture.text(LEFT + 42, picture.y, text)
        picture.y += 30


def draw_weights(picture: Picture, lengths: list[int]) -> None:
    """A table of the weight of one token for each loss, times 10,000."""
    picture.y += 26
    picture.text(LEFT, picture.y, "Weight of one token × 10,000", font_weight="bold", font_size=22)
    n = len(lengths)
    rows = {"trace": [str(i + 1) for i in range(n)], "own tokens": [str(m) for m in lengths],
            "grpo, gspo": [f"{1e4 / (n * m):.1f}" for m in lengths],
            "dapo": [f"{1e4 / sum(lengths):.1f}"] * n,
            "dr_grpo": [f"{1e4 / (n * MOST):.1f}"] * n}
    picture.y += 6
    for name, cells in rows.items():
        picture.y += 32
        color = "given" if name == "trace" else "text"
        picture.text(LEFT, picture.y, name, color)
        for i, cell in enumerate(cells):
            picture.text(222 + i * 78, picture.y, cell, color, text_anchor="end")
    picture.y += 14
