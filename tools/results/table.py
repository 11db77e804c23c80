"""Tables of results, in Markdown."""


def markdown_table(header, rows):
    """Return a Markdown table: the first column aligned to the left, the others to the right.

    Rows that are shorter than the header end in empty cells.
    """
    alignment = ["---"] + ["---:"] * (len(header) - 1)
    lines = []
    for cells in [header, alignment, *rows]:
        texts = [str(cell) for cell in cells]
        texts += [""] * (len(header) - len(texts))
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


def markdown_rows(rows):
    """Return Markdown tables of the rows of a benchmark: one for all with the same columns."""
    tables = {}  # {columns: rows}
    for row in rows:
        tables.setdefault(tuple(row), []).append([cell(value) for value in row.values()])
    blocks = []
    for columns, cells in tables.items():
        header = [column.replace("_", " ") for column in columns]
        blocks.append(markdown_table(header, cells))
    return "\n\n".join(blocks)


def cell(value):
    """Return a value of a row as text: with its range, if it was measured in several rounds."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return f"{number(value['median'])} ({number(value['min'])} to {number(value['max'])})"
    return number(value) if isinstance(value, float) else str(value)


def number(value):
    """Return four digits, and never an exponent for a number of a table."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
