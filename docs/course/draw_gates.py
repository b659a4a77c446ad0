"""Figure of chapter 2: a tool, a call and an observation, and the three gates between them."""
from picture import LEFT, WIDTH, Picture

LANE = 390     # width of the boxes on the left
REFUSED = 462  # where the boxes on the right begin
BOLD = {"font_weight": "bold", "font_size": 18}
STEPS = [
    ("ToolMaker writes a tool", "mayor(city: string) → mayor", "two",
     "Gate 1: is the tool well formed?", "check_tools",
     ["refused: tool name taken", "The next prompt says why.",
      "After three tries, the question", "gets one general tool."]),
    ("AutoAgent writes a call", 'mayor({"city": "Tili"})', "one",
     "Gate 2: does the call fit?", "call_error",
     ["refused: unknown tool", "The observation says why.",
      "The trace goes on. AutoAgent", "may call again."]),
    ("ToolActor writes an observation", '{"mayor": "Nisan"}', "right",
     "Gate 3: does it fit the schema?", "parse_observation",
     ['refused: {"mayor": 7}', "ToolActor writes it again.",
      "After three tries, AutoAgent", "reads that it got no result."])]


def draw(picture: Picture, run: dict) -> str:
    """Three steps from top to bottom. A refusal leaves to the right."""
    middle = LEFT + LANE / 2
    for title, example, color, question, function, refused in STEPS:
        box(picture, LEFT, LANE, 70, color, [(title, color, BOLD),
                                             (example, "text", mono(17))], fill_opacity=0.2)
        picture.y += 70
        arrow(picture, (middle, picture.y), (middle, picture.y + 26), "given")
        picture.y += 26
        box(picture, LEFT, LANE, 70, "text", [(question, "text", BOLD),
                                              (function, "given", mono(17))], fill_opacity=0.0,
            stroke="text", stroke_width=3)
        arrow(picture, (LEFT + LANE, picture.y + 35), (REFUSED, picture.y + 35), "wrong")
        top = picture.y
        picture.y -= 21
        lines = [(refused[0], "wrong", BOLD)]
        lines += [(line, "text", {"font_size": 18}) for line in refused[1:]]
        box(picture, REFUSED, WIDTH - LEFT - REFUSED, 112, "wrong", lines, fill_opacity=0.0,
            stroke="wrong", stroke_width=2)
        picture.y = top + 70
        arrow(picture, (middle, picture.y), (middle, picture.y + 44), "right")
        picture.text(middle + 14, picture.y + 29, "accepted", "right")
        picture.y += 44
    box(picture, LEFT, LANE, 44, "one", [("AutoAgent reads the observation", "one", BOLD)],
        fill_opacity=0.2)
    picture.y += 56
    return "A tool, a call and an observation, and the gate behind each"


def mono(size: int) -> dict:
    return {"font_size": size, "font_family": "ui-monospace, monospace"}


def box(picture: Picture, x: float, width: float, height: float, color: str, lines: list,
        **more) -> None:
    """A box at y with lines of text (content, color, attributes)."""
    picture.add("rect", x=x, y=picture.y, width=width, height=height, rx=8, fill=color, **more)
    y = picture.y + height / 2 + 6 - 13 * (len(lines) - 1)
    for content, text_color, attributes in lines:
        picture.text(x + 14, y, content, text_color, **attributes)
        y += 26


def arrow(picture: Picture, start: tuple, end: tuple, color: str) -> None:
    """An arrow to the right or down."""
    (x, y), (to_x, to_y) = start, end
    down = x == to_x
    stop_x, stop_y = (to_x, to_y - 10) if down else (to_x - 10, to_y)
    picture.add("line", x1=x, y1=y, x2=stop_x, y2=stop_y, stroke=color, stroke_width=3)
    sides = [(to_x - 7, stop_y), (to_x + 7, stop_y)] if down else [(stop_x, to_y - 7),
                                                                 (stop_x, to_y + 7)]
    points = " ".join(f"{a:g},{b:g}" for a, b in [(to_x, to_y), *sides])
    picture.add("polygon", points=points, fill=color)
