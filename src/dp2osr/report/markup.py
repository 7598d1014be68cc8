"""A table for papers and notes, as Markdown and as LaTeX. All text is escaped; nothing in a cell is markup."""

from collections.abc import Sequence
from dataclasses import dataclass

_LATEX = {
    "\\": r"\textbackslash{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "–": "--",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "†": r"$^{\dagger}$",
    "[": "{[}",  # a row that begins with a bracket would be an option of the line break before it
    "]": "{]}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
_MARKDOWN = frozenset("\\`*_{}[]<>|#~")


@dataclass(frozen=True)
class Cell:
    """Text of a cell, and whether it is bold."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Grid:
    """A captioned table whose rows are in sections (name, rows); the first cell of a row is its label.

    spans: heads above the heads, (name, number of columns), over the columns after the label.
    """

    caption: str
    section_head: str
    heads: list[str]
    sections: list[tuple[str, list[list[Cell]]]]
    spans: tuple[tuple[str, int], ...] = ()


def latex_text(text: str) -> str:
    """Escape text for LaTeX, the signs of our tables as mathematics."""
    return "".join(_LATEX.get(char, char) for char in " ".join(text.split()))


def markdown_text(text: str) -> str:
    """Escape text for a cell or a line of Markdown."""
    return "".join(f"\\{char}" if char in _MARKDOWN else char for char in " ".join(text.split()))


def markdown(grid: Grid) -> str:
    """Return the table in GitHub's Markdown, the section as its first column, below its caption."""
    spanned = [name for name, size in grid.spans for _ in range(size)]
    heads = [f"{name} ({span})" for name, span in zip(grid.heads[1:], spanned, strict=True)] if spanned else []
    heads = [grid.section_head, grid.heads[0], *(heads or grid.heads[1:])]
    lines = [_row([markdown_text(head) for head in heads]), _row(["---", "---", *["---:"] * (len(heads) - 2)])]
    for section, rows in grid.sections:
        for row in rows:
            cells = [f"**{markdown_text(cell.text)}**" if cell.bold else markdown_text(cell.text) for cell in row]
            lines.append(_row([markdown_text(section), *cells]))
    return "\n".join([markdown_text(grid.caption), "", *lines, ""])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def latex(grid: Grid) -> str:
    """Return the table as a LaTeX float, each section under a line of its own; it needs the package booktabs."""
    width = len(grid.heads)
    lines = [
        "% \\usepackage{booktabs}",
        "\\begin{table}[t]",
        "\\centering",
        f"\\caption{{{latex_text(grid.caption)}}}",
        f"\\begin{{tabular}}{{l{'r' * (width - 1)}}}",
        "\\toprule",
        *_spans(grid.spans),
        _latex_row([latex_text(head) for head in grid.heads]),
    ]
    for section, rows in grid.sections:
        lines += ["\\midrule", f"\\multicolumn{{{width}}}{{l}}{{\\emph{{{latex_text(section)}}}}} \\\\"]
        for row in rows:
            cells = [latex_text(cell.text) for cell in row]
            bold = [f"\\textbf{{{text}}}" if cell.bold else text for text, cell in zip(cells, row, strict=True)]
            lines.append(_latex_row(bold))
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}", ""])


def _latex_row(cells: Sequence[str]) -> str:
    return f"{' & '.join(cells)} \\\\"


def _spans(spans: Sequence[tuple[str, int]]) -> list[str]:
    """Return the line of heads above the heads, with a rule under each."""
    if not spans:
        return []
    cells = [f"\\multicolumn{{{size}}}{{c}}{{{latex_text(name)}}}" for name, size in spans]
    rules, first = [], 2
    for _, size in spans:
        rules.append(f"\\cmidrule(lr){{{first}-{first + size - 1}}}")
        first += size
    return [f" & {' & '.join(cells)} \\\\", "".join(rules)]
