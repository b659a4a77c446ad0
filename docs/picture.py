"""SVG pictures, in a light and a dark theme. figures.py and the course draw with it."""
import math
from html import escape
from itertools import groupby

WIDTH = 800
LEFT = 24
CHAR = 12  # width of a character of a token
ACROSS = (WIDTH - 2 * LEFT) // CHAR  # characters per line
LINE = 29  # height of a line of tokens
COLORS = {
    "light": {"back": "#ffffff", "text": "#1f2328", "given": "#6e7781", "grid": "#d8dee4",
              "own": "#0a3069", "box": "#cfe4ff", "right": "#1a7f37", "wrong": "#cf222e",
              "one": "#0969da", "two": "#bc4c00"},
    "dark": {"back": "#0d1117", "text": "#e6edf3", "given": "#8b949e", "grid": "#30363d",
             "own": "#dbecff", "box": "#1c4a8c", "right": "#3fb950", "wrong": "#ff7b72",
             "one": "#58a6ff", "two": "#f0883e"}}


class Picture:
    """An SVG file that is written from top to bottom. `y` is where the next part begins."""

    def __init__(self, theme: str):
        self.colors = COLORS[theme]
        self.parts = []
        self.y = LEFT

    def add(self, tag: str, content: str = "", **attributes) -> None:
        """Add an element. A color is given by its name; the _ in an attribute's name becomes -."""
        text = ""
        for name, value in attributes.items():
            value = self.colors.get(value, value)
            value = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value
            text += f' {name.replace("_", "-")}="{value}"'
        self.parts.append(f"<{tag}{text}>{escape(content, quote=False)}</{tag}>")

    def text(self, x: float, y: float, content: str, color: str = "text", **more) -> None:
        self.add("text", content, x=x, y=y, fill=color, **more)

    def tokens(self, x: float, texts: list[str], color: str, box: str = "", edge: str = "none"
               ) -> float:
        """A line of tokens at y in cells of equal width per character -> where it ends."""
        for text in texts:
            shown = text.replace("\n", "↵")
            width = CHAR * len(shown)
            if box:
                self.add("rect", x=x, y=self.y, width=width - 1, height=LINE - 3, rx=4, fill=box,
                         stroke=edge)
            word = shown.strip(" ")
            if word:
                start = x + CHAR * (len(shown) - len(shown.lstrip(" ")))
                self.text(start, self.y + 19, word, color, textLength=CHAR * len(word),
                          font_size=20, font_family="ui-monospace, monospace")
            x += width
        return x

    def svg(self, title: str) -> str:
        """The file. The fonts are generic families, so each reader's own fonts are used."""
        height = math.ceil(self.y + LEFT / 2)
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
                f'viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" '
                f'font-size="20">\n<title>{escape(title)}</title>\n'
                f'<rect width="{WIDTH}" height="{height}" fill="{self.colors["back"]}"/>')
        return "\n".join([head, *self.parts, "</svg>\n"])


def key(picture: Picture, x: float, color: str, name: str, **more) -> None:
    """One entry of a legend: a piece of the line and its name."""
    picture.add("line", x1=x, x2=x + 34, y1=picture.y - 6, y2=picture.y - 6, stroke=color,
                stroke_width=4, **more)
    picture.text(x + 42, picture.y, name)


def panel(picture: Picture, height: int, steps: int, ticks: list[float], series: list,
          dashed: float | None = None) -> None:
    """Axes and curves. series: (points, color). Points that stand apart get a dot."""
    left = 76
    top = picture.y + 20

    def place(step: float, value: float) -> tuple[float, float]:
        x = left + (WIDTH - LEFT - 8 - left) * step / steps
        return round(x, 1), round(top + height * (1 - value / ticks[-1]), 1)

    for tick in ticks:
        _, y = place(0, tick)
        picture.add("line", x1=left, x2=WIDTH - LEFT, y1=y, y2=y, stroke="grid")
        picture.text(left - 12, y + 7, str(tick), "given", text_anchor="end")
    for step in whole_ticks(steps):
        x, _ = place(step, 0)
        picture.add("line", x1=x, x2=x, y1=top + height, y2=top + height + 6, stroke="given")
        picture.text(x, top + height + 27, str(step), "given", text_anchor="middle")
    if dashed is not None:
        _, y = place(0, dashed)
        picture.add("line", x1=left, x2=WIDTH - LEFT, y1=y, y2=y, stroke="given", stroke_width=3,
                    stroke_dasharray="7 6")
    for points, color in series:
        places = [place(*point) for point in points]
        path = " ".join(f"{x},{y}" for x, y in places)
        picture.add("polyline", points=path, fill="none", stroke=color, stroke_width=4)
        for x, y in places:
            picture.add("circle", cx=x, cy=y, r=5, fill=color)
    picture.y = top + height + 36


def whole_ticks(last: int) -> list[int]:
    """Whole numbers from 0 to at most `last`, at most nine of them, 1, 2, 4, 5 or 10... apart."""
    gaps = (1, 2, 4, 5, 10, 20, 50, 100, 200, 500, 1000)
    gap = next(gap for gap in gaps if last <= 8 * gap)
    return list(range(0, last + 1, gap))


def segments(trace: dict) -> list[tuple[int, int]]:
    """The tokens after the prompt: (1, number of own ones), (0, number of given ones), ..."""
    start = trace["mask"].index(1)
    return [(own, len(list(part))) for own, part in groupby(trace["mask"][start:])]
