"""The figure of chapter 3: the KV cache of a group in the middle of a rollout."""
from picture import LEFT, LINE, WIDTH, Picture, segments

PROMPT = 96  # width of the prompt, which isn't drawn to scale
TURN = 4  # the turn that all rows have ended, or finished before


def legend(picture: Picture) -> None:
    """The three kinds of slots."""
    for x, name, fill, edge in (
            (LEFT, "prompt", "grid", "given"), (150, "own tokens", "box", "one"),
            (322, "observations", "back", "given"), (510, "free", "", "grid")):
        dash = {} if fill else {"stroke_dasharray": "4 4"}
        picture.add("rect", x=x, y=picture.y, width=26, height=20, rx=3, fill=fill or "none",
                    stroke=edge, **dash)
        picture.text(x + 34, picture.y + 17, name)
    picture.y += LINE + 20


def draw(picture: Picture, run: dict) -> str:
    """Eight rows with one prompt. The finished rows lie below the active rows."""
    picture.text(LEFT, picture.y + 14, f"The KV cache of one group after turn {TURN}",
                 font_weight="bold", font_size=22)
    picture.y += 36
    legend(picture)
    rows = [(chr(ord("a") + i), segments(trace)[:2 * TURN - 1],
             len(trace["turns"]) <= TURN) for i, trace in enumerate(run["group"])]
    rows.sort(key=lambda row: row[2])  # the active rows first, else in their order
    most = max(sum(n for _, n in parts) for _, parts, _ in rows)
    left = LEFT + 30
    scale = (WIDTH - 2 * LEFT - 30 - PROMPT - 70) / most
    active = sum(not finished for *_, finished in rows)
    for number, (name, parts, finished) in enumerate(rows):
        if number == active:
            draw_border(picture, active)
        picture.text(LEFT, picture.y + 20, name, "given" if finished else "text")
        picture.add("rect", x=left, y=picture.y, width=WIDTH - LEFT - left, height=26, rx=3,
                    fill="none", stroke="grid", stroke_dasharray="4 4")
        shade = {"opacity": 0.45} if finished else {}
        picture.add("rect", x=left, y=picture.y, width=PROMPT, height=26, rx=3, fill="grid",
                    stroke="given", **shade)
        picture.text(left + PROMPT / 2, picture.y + 19, "read once" if name == "a" else "copy",
                     "given" if finished else "text", text_anchor="middle", font_size=17)
        x = left + PROMPT
        for own, tokens in parts:
            picture.add("rect", x=round(x, 1), y=picture.y, width=round(scale * tokens, 1),
                        height=26, rx=3, fill="box" if own else "back",
                        stroke="one" if own else "given", **shade)
            x += scale * tokens
        if finished:
            picture.text(x + 6, picture.y + 19, "end", "given", font_size=17)
        picture.y += 36
    note = "One row per conversation. The prompt is drawn shorter than it is."
    picture.text(LEFT, picture.y + 20, note, "given")
    picture.y += 34
    return "The KV cache of a group of eight traces"


def draw_border(picture: Picture, active: int) -> None:
    """The line between the active and the finished rows."""
    picture.y += 6
    picture.add("line", x1=LEFT, x2=WIDTH - LEFT, y1=picture.y, y2=picture.y, stroke="two",
                stroke_width=3)
    note = f"the next pass computes the {active} rows above; the rows below have finished"
    picture.text(LEFT, picture.y + 24, note, "two")
    picture.y += 40
