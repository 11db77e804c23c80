"""Plots of results: lines with labels at their ends, and horizontal bars; as PNG files."""

import inspect

# The colors of Okabe and Ito (Wong, Nature Methods 8, 441, 2011) and a gray, ordered so that
# neighbors differ in lightness.
COLORS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#56B4E9", "#009E73", "#CC79A7", "#888888")
OURS, PEER = COLORS[2], COLORS[1]  # of bars
PEERS = ("nanoGPT", "transformers")
LINE_HEIGHT = 11  # of a label, in typographic points
BAR_HEIGHT = 0.34  # inches


def save_figure(draw, count, size, path):
    """Call draw with `count` panels (matplotlib Axes, side by side), and write a PNG file."""
    from matplotlib.figure import Figure  # not pyplot, whose backend is that of a notebook

    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    draw(*panels)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


# Lines ----------------------------------------------------------------------------------------


def save_lines(result, draw, path):
    """Draw a result into a PNG file.

    draw   function of the result and of one or more panels; its number of parameters says how many
    """
    count = len(inspect.signature(draw).parameters) - 1

    def draw_panels(*panels):
        draw(result, *panels)
        for panel in panels:
            panel.margins(y=0.12)
            panel.grid(alpha=0.3)

    save_figure(draw_panels, count, (8 if count < 3 else 11, 4), path)


def draw_line(panel, name, x, y, color, **style):
    """Draw a line with dots; return its labeled end, for label_points."""
    panel.plot(x, y, color=color, **{"marker": "o", "markersize": 4, **style})
    return name, x[-1], y[-1], color


def label_points(panel, *points):
    """Write a text to the right of each point (text, x, y, color).

    A text that would overlap the one below it is moved up.
    """
    panel.get_ylim()  # updates transData, which maps data to pixels
    lowest = float("-inf")
    for text, x, y, color in sorted(points, key=lambda point: point[2]):
        height = panel.transData.transform((x, y))[1] * 72 / panel.figure.dpi
        lowest = max(height, lowest + LINE_HEIGHT)
        panel.annotate(
            text,
            xy=(x, y),
            xytext=(6, lowest - height - 3),
            textcoords="offset points",
            color=color,
            fontsize="small",
        )


# Bars -----------------------------------------------------------------------------------------


def save_bars(rows, column, labels, unit, path):
    """Draw a column of a benchmark's rows into a PNG file: one horizontal bar for each row.

    labels   the columns that name a bar
    """
    rows = [row for row in rows if row.get(column) is not None]
    if rows:
        names = [", ".join(label(row, name) for name in labels if name in row) for row in rows]
        values = [row[column] for row in rows]
        size = (8, 1 + BAR_HEIGHT * len(rows))
        save_figure(lambda panel: draw_bars(panel, names, values, unit), 1, size, path)


def label(row, name):
    """Return a value of a row as part of a bar's label."""
    if name == "streams":
        return f"{row[name]} stream{'s' if row[name] > 1 else ''}"
    return f"{name} {row[name]}" if name in ("T", "batch", "position") else str(row[name])


def draw_bars(panel, names, values, unit):
    """Draw horizontal bars with their ranges and numbers, the first one at the top."""
    spreads = [v if isinstance(v, dict) else {"median": v, "min": v, "max": v} for v in values]
    medians = [value["median"] for value in spreads]
    below = [value["median"] - value["min"] for value in spreads]
    above = [value["max"] - value["median"] for value in spreads]
    colors = [PEER if name.startswith(PEERS) else OURS for name in names]
    places = range(len(names))
    panel.barh(places, medians, xerr=[below, above], color=colors, height=0.7, capsize=3)
    for place, value in enumerate(spreads):
        median = value["median"]
        text = f"{median:.3g}" if median < 1000 else f"{median:,.0f}"
        end = (value["max"], place)
        panel.annotate(text, end, xytext=(5, 0), textcoords="offset points", va="center")
    panel.set_yticks(places, names)
    panel.invert_yaxis()
    panel.set_xlabel(unit)
    panel.set_xlim(0, 1.15 * max(value["max"] for value in spreads))
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
