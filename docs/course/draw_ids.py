"""The figure of chapter 4: different ids that decode to the same text."""
from picture import CHAR, LEFT, LINE, Picture

KEPT = ("own", "box", "none")
OTHER = ("two", "back", "two")


def strip(picture: Picture, name: str, tokenizer, ids: list[int], colors: tuple[str, str, str]
          ) -> None:
    """A name, and a row of tokens with the id of each below. colors: of text, box and edge."""
    text, box, edge = colors
    picture.text(LEFT, picture.y + 19, name)
    x = LEFT + 12 * CHAR
    for i in ids:
        shown = tokenizer.decode([i], skip_special_tokens=False).replace(" ", "·")
        width = CHAR * max(4, len(shown) + 1)  # at least as wide as an id
        picture.add("rect", x=x, y=picture.y, width=width, height=LINE - 3, rx=4, fill=box,
                    stroke=edge)
        place = {"x": x + width / 2, "text_anchor": "middle"}
        picture.text(y=picture.y + 19, content=shown, color=text, font_size=20,
                     font_family="ui-monospace, monospace", **place)
        picture.text(y=picture.y + 46, content=str(i), color=text, font_size=18, **place)
        x += width + 5
    picture.y += 2 * LINE + 8


def draw(picture: Picture, run: dict) -> str:
    """Two texts, each as two lists of ids."""
    tokenizer = run["tokenizer"]

    def encode(*texts: str) -> list[int]:
        return [i for text in texts for i in tokenizer.encode(text).ids]

    apart = encode("Regar", " is", " ", "father", ".")
    head(picture, "Ids that a model sampled, and the ids of their text")
    strip(picture, "sampled", tokenizer, apart, KEPT)
    strip(picture, "read again", tokenizer, encode(tokenizer.decode(apart)), OTHER)
    picture.y += 14
    head(picture, "A control token, and text that looks like one")
    strip(picture, "Control", tokenizer, encode("<|im_end|>"), KEPT)
    strip(picture, "plain str", tokenizer, encode("<|", "im", "_end", "|>"), OTHER)
    picture.text(LEFT, picture.y + 12, "One box per token, its id below. · is a space.", "given")
    picture.y += 22
    return "Different ids that decode to the same text"


def head(picture: Picture, text: str) -> None:
    """A headline."""
    picture.text(LEFT, picture.y + 14, text, font_weight="bold", font_size=22)
    picture.y += 40
