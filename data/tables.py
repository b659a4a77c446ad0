"""Tables in the terminal, and what they mean: {column: (title, meaning)}, {row: meaning}."""
from collections.abc import Iterable

SCORES = {
    "em_sampled": ("sampled EM",
                   "share of answers exactly right, each token drawn at temperature 1"),
    "bar": ("0      1", "sampled EM as a bar"),
    "em_greedy": ("greedy EM", "share of answers exactly right, the likeliest token each time"),
    "clean_turns": ("clean turns",
                    "share of turns in the strict form: thought, then calls or answer"),
    "valid_calls": ("valid calls", "share of calls that name a tool and fit its parameters"),
    "calls": ("calls", "mean number of calls per question")}
BY_SET = {
    "hotpot": ("hotpot", "sampled EM: chains of two lookups, and comparisons"),
    "musique": ("musique", "sampled EM: chains of two, three and four lookups"),
    "2wiki": ("2wiki", 'sampled EM: comparisons, chains, words such as "grandfather"'),
    "bamboogle": ("bamboogle", "sampled EM: three lookups in an order that training never has"),
    "support": ("support", "share of questions with an answer that the calls support"),
    "f1": ("F1", "mean overlap in words of the answer with the right answer")}
ROWS = {
    "untrained": "random weights",
    "sft": "the model after SFT",
    "grpo": "the model after GRPO",
    "grpo_real": "grpo, but the world's real tools answer the calls",
    "grpo_blanked": "grpo, but every observation is empty",
    "majority": "no model: always the most common answer in training",
    "closed_book": "sft, but it has to answer at once, without tools",
    "sft_continued": "sft, then more SFT in place of GRPO",
    "sft_blanked": "sft, but every observation is empty",
    "sft_shuffled": "sft, but every observation is that of another call",
    "grpo_shuffled": "grpo, but every observation is that of another call"}
SIMULATOR = {
    "ToolMaker valid": "share of questions whose tools were valid at once",
    "ToolMaker exact": "share of questions whose tools are the teacher's",
    "ToolMaker accepted": "share of questions with valid tools, at any try",
    "ToolMaker regenerated": "share of questions with valid tools at a later try",
    "ToolMaker fallback": "share of questions with one general tool instead",
    "ToolActor recall": "share of the world's facts that it gives",
    "ToolActor fidelity": "share of its results in row grpo that are true"}


def print_table(rows: list[dict], columns: dict[str, str]) -> None:
    """Print rows as columns {key: title}. Each column is as wide as its longest cell."""
    lines = [list(columns.values())]
    lines += [[cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = [text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells]))


def cell(value: object) -> str:
    """A table cell: three digits of a float, - for no value."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def print_scores(rows: list[dict], columns: dict[str, tuple[str, str]]) -> None:
    """Print a table, and below it what each column means."""
    titles = {name: title for name, (title, _) in columns.items()}
    print()
    print_table(rows, {"row": "row"} | titles)
    print_meanings(columns.values())


def print_meanings(pairs: Iterable[tuple[str, str]]) -> None:
    """Print names and their meanings, one per line."""
    print()
    for name, meaning in pairs:
        print(f"{name:<13}  {meaning}")
