"""Draws the README's picture: held-out prompts before and after `python refl.py`, with labels.

  $ python refl.py
  $ python results/experiments/front_page.py runs/refl-toy-toy_pref

Both rows come from the run's own samples/, so they have the same prompts and image seeds.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PICTURE = Path(__file__).resolve().parents[1] / "pictures" / "front_page.png"
SIDE = 128  # pixels of an image in samples/
CELLS = (0, 3, 6, 8, 11, 13, 19, 26)  # of the grid of 8 columns: eight different prompts
LABEL_WIDTH = 150


def draw(run):
    steps = sorted(Path(run, "samples").glob("step_*.png"))
    rows = {"before": steps[0], "after": steps[-1]}
    picture = Image.new("RGB", (LABEL_WIDTH + SIDE * len(CELLS), SIDE * len(rows)), "white")
    font = ImageFont.load_default(size=32)
    pen = ImageDraw.Draw(picture)
    for y, (label, path) in enumerate(rows.items()):
        grid = Image.open(path)
        pen.text((16, SIDE * y + SIDE // 2), label, fill="black", font=font, anchor="lm")
        for x, cell in enumerate(CELLS):
            left, top = SIDE * (cell % 8), SIDE * (cell // 8)
            tile = grid.crop((left, top, left + SIDE, top + SIDE))
            picture.paste(tile, (LABEL_WIDTH + SIDE * x, SIDE * y))
    picture.save(PICTURE)
    print(PICTURE)


if __name__ == "__main__":
    draw(sys.argv[1])
