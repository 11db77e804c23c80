"""What do the three changes, and a step on two ranks, look like? Drawings for README.md and docs/.

    python -m experiments.drawings

Each function draw_NAME of drawing_panels.py draws docs/drawings/NAME.png, or the frames of
NAME.gif. Nothing is measured: drawing_data.py computes what they draw.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image  # Pillow, which matplotlib requires

from common.errors import run_program
from configurator import configure
from experiments import drawing_panels as panels
from experiments.drawing_data import training_step

FOLDER = Path("docs/drawings")
DPI = 110
GIF_COLORS = 24  # of all frames together; the others become the most similar of them
SHOW_FIRST = 1500  # milliseconds
SHOW_LAST = 5000


@dataclass
class DrawingsConfig:
    """No options."""


@dataclass
class Drawing:
    draw: Callable  # draw(*panels); of a moving drawing draw(frame, *panels)
    panels: str  # their arrangement: a letter for each, rows separated by ";"
    height: float  # inches
    frames: int = 0  # of a moving drawing
    milliseconds: int = 0  # of a frame
    widths: tuple | None = None  # of the columns of panels, relative to each other
    heights: tuple | None = None  # of the rows


RING_FRAMES = sum(panels.RING_CHUNKS)
BLOCKS_FRAMES = panels.TOKENS // panels.ROWS
ROTATION_FRAMES = panels.LAST_POSITION - panels.DISTANCE + 1
STEP_FRAMES = len(training_step(fsdp=False))
DRAWINGS = {
    "mask": Drawing(panels.draw_mask, "ABC", 3.3),
    "groups": Drawing(panels.draw_groups, "ABC", 1.5),
    "ring": Drawing(panels.draw_ring, "AB", 3.6, RING_FRAMES, 2000, widths=(1, 1.7)),
    "blocks": Drawing(panels.draw_blocks, "ABCD", 3.2, BLOCKS_FRAMES, 800),
    "rotation": Drawing(
        panels.draw_rotation, "ABCD", 3, ROTATION_FRAMES, 500, widths=(1, 1, 1, 1.8)
    ),
    "step": Drawing(panels.draw_step, "AB;CC", 5.5, STEP_FRAMES, 1400, heights=(2.3, 1)),
}


def make_panels(drawing):
    """Return a figure and its panels."""
    figure = Figure(figsize=(8, drawing.height), layout="constrained")
    mosaic = figure.subplot_mosaic(
        drawing.panels, width_ratios=drawing.widths, height_ratios=drawing.heights
    )
    return figure, list(mosaic.values())


def draw_frames(drawing):
    """Return the frames of a moving drawing, as images in RGB."""
    figure, axes = make_panels(drawing)
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    images = []
    for frame in reversed(range(drawing.frames)):
        for panel in axes:
            panel.clear()
        for legend in list(figure.legends):
            legend.remove()
        drawing.draw(frame, *axes)
        canvas.draw()
        figure.set_layout_engine("none")  # the panels of all frames are where the last one has them
        images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    return images[::-1]


def with_palette(images):
    """Return RGB images in mode P, all with the most frequent colors of them together."""
    pixels = np.stack([np.asarray(image, dtype=np.int32) for image in images])  # (N, H, W, 3)
    codes = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    codes, indices, counts = np.unique(codes, return_inverse=True, return_counts=True)
    colors = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1)
    palette = colors[np.argsort(-counts)[:GIF_COLORS]]
    distances = torch.cdist(torch.tensor(colors).float(), torch.tensor(palette).float())
    nearest = distances.argmin(1).byte().numpy()  # for each of the colors
    frames = []
    for frame in nearest[indices].reshape(pixels.shape[:3]):
        frames.append(Image.fromarray(frame))
        frames[-1].putpalette(palette.astype(np.uint8).tobytes())
    return frames


def save_gif(drawing, path):
    """Write a moving drawing that repeats forever.

    Its last frame is also its first one: where pictures do not move, a reader sees the finished
    picture.
    """
    frames = with_palette(draw_frames(drawing))
    times = [SHOW_FIRST] + [drawing.milliseconds] * (len(frames) - 1) + [SHOW_LAST]
    frames[-1].save(path, save_all=True, append_images=frames, duration=times, loop=0)


def main(argv):
    configure(DrawingsConfig, argv, __doc__)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, drawing in DRAWINGS.items():
        path = FOLDER / (f"{name}.gif" if drawing.frames else f"{name}.png")
        with matplotlib.rc_context({"axes.titlesize": "medium"}):
            if drawing.frames:
                save_gif(drawing, path)
            else:
                figure, axes = make_panels(drawing)
                drawing.draw(*axes)
                figure.savefig(path, dpi=DPI)
        print(path)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
