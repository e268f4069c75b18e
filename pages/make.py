"""Self-contained web pages: a run's index.html, and a comparison of folders of images.

A page is template.html with everything inside it: curves are SVG, images are data URIs, and nothing
is loaded from elsewhere. Without JavaScript, a page still shows its curves, its tables and one
slide of images. The same inputs give the same bytes.
"""

import base64
import functools
import io
import json
import math
import re
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

SMALL = 128  # images of up to this many pixels a side keep every pixel
SIDE = 192  # larger images are scaled down to this
MAX_SLIDES = 40  # of more snapshots, a page shows the first, the last and some between them

TEMPLATE = (Path(__file__).parent / "template.html").read_text(encoding="utf-8")
# Headings for the pictures in samples/, by the first part of the file name.
HEADINGS = dict(step="Samples", region="Regions", round="Training pairs", thresholds="Thresholds")
# These columns of log.jsonl have no curve. Times would make the pages of equal runs differ.
NO_CURVE = ("step", "seconds")


# --------------------------------------------------------------------------------------------------
# Pieces of a page


def page(title, subtitle, content):
    """Fills in template.html. title and subtitle are plain text, content is HTML."""
    values = dict(title=escape(title), subtitle=escape(subtitle), content=content)
    return Template(TEMPLATE).substitute(values)


def table(header, rows, marked=()):
    """Rows of plain texts -> an HTML table. marked: pairs (row, column) of cells in bold."""
    lines = ["".join(f'<th scope="col">{escape(text)}</th>' for text in header)]
    for r, row in enumerate(rows):
        line = f'<th scope="row">{escape(row[0])}</th>'
        for c, text in enumerate(row[1:], 1):
            bold = ' class="marked"' if (r, c) in marked else ""
            line += f"<td{bold}>{escape(text)}</td>"
        lines.append(line)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>\n{body}\n</table></div>\n'


def ticks(low, high):
    """One to five round numbers from low to high: multiples of 1, 2 or 5 times a power of 10."""
    at_least = (high - low) / 4
    power = 10 ** math.floor(math.log10(at_least))
    size = next((k * power for k in (1, 2, 5) if k * power >= at_least), 10 * power)
    return [k * size for k in range(math.ceil(low / size), math.floor(high / size) + 1)]


def plot(name, lines, skipped, width, height):
    """SVG of one quantity over the updates.

    lines: {"training" or "held-out": points (update, value)}. skipped: updates to mark below.
    """
    points = [point for line in lines.values() for point in line]
    low = min(y for _, y in points)
    high = max(y for _, y in points)
    margin = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
    low -= margin
    high += margin
    first = min(x for x, _ in points)
    last = max(max(x for x, _ in points), first + 1)
    values = [f"{y:.6g}" for y in ticks(low, high)]
    left = 12 + 8 * max(len(value) for value in values)
    right = width - 10
    top = 10
    bottom = height - 34

    def place(x, y):
        across = left + (right - left) * (x - first) / (last - first)
        down = bottom - (bottom - top) * (y - low) / (high - low)
        return f"{across:.1f}", f"{down:.1f}"

    parts = []
    for value in values:
        _, down = place(first, float(value))
        parts.append(f'<path class="grid" d="M{left},{down}H{right}"/>')
        parts.append(f'<text class="y" x="{left - 6}" y="{down}" dy="4">{value}</text>')
    for x in ticks(first, last):
        if x == int(x):
            across, _ = place(x, low)
            parts.append(f'<text class="x" x="{across}" y="{bottom + 15}">{x:g}</text>')
    parts.append(f'<text class="x" x="{(left + right) / 2}" y="{height - 4}">update</text>')
    for kind, line in lines.items():
        path = " ".join(",".join(place(x, y)) for x, y in line)
        parts.append(f'<polyline class="{kind}" points="{path}"/>')
        # A few points are dots, too, and say their values when the mouse is over them.
        if len(line) <= MAX_SLIDES:
            for x, y in line:
                across, down = place(x, y)
                value = f"<title>{kind}, update {x}: {y:.6g}</title>"
                parts.append(
                    f'<circle class="{kind}" cx="{across}" cy="{down}" r="3">{value}</circle>'
                )
    for x in skipped:
        across, _ = place(x, low)
        value = f"<title>update {x} was skipped</title>"
        parts.append(f'<path class="skipped" d="M{across},{bottom}v-8">{value}</path>')
    label = escape(f"{name}: {', '.join(lines)}")
    body = "\n".join(parts)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">\n{body}\n</svg>\n'


def data_uri(image):
    """PIL image -> (data URI, width, height)."""
    is_small = max(image.size) <= SMALL
    if not is_small:
        image = image.copy()
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=is_small, quality=75, method=2)
    text = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/webp;base64,{text}", *image.size


def figure(cells, caption):
    """cells: a list of (data URI, width, height, label). All labels are "" or none."""
    parts = []
    for k, (uri, width, height, label) in enumerate(cells, 1):
        alt = escape(f"{label or f'image {k}'}: {caption}")
        crisp = ' class="crisp"' if max(width, height) <= SMALL else ""
        picture = f'<img{crisp} src="{uri}" width="{width}" height="{height}" alt="{alt}">'
        text = f"<small>{escape(label)}</small>" if label else ""
        parts.append(f"<span>{picture}{text}</span>")
    body = "".join(parts)
    return f"<figure><figcaption>{escape(caption)}</figcaption><div>{body}</div></figure>\n"


def viewer(slides, shown, columns, layout="", beside_first=False):
    """Slides to page through, with a slider and buttons.

    slides: a list of (name, heading, figures), where figures are (cells, caption).
    shown: the slide to begin with. columns: the images in a row of a figure.
    layout: the CSS grid of a slide's figures; by default, as many in a row as there is room for.
    beside_first: show the first slide and the chosen one side by side.
    """
    last = len(slides) - 1
    layout = f"; --layout: {layout}" if layout else ""
    parts = [f'<div class="viewer" style="--columns: {columns}{layout}">\n']
    if last > 0:
        parts.append(
            '<div class="bar" hidden><button aria-label="back">&#8592;</button>'
            f'<input type="range" max="{last}" value="{shown}" aria-label="choose what is shown">'
            '<button aria-label="forward">&#8594;</button><output></output>'
        )
        if beside_first:
            label = f"beside {escape(slides[0][0])}"
            parts.append(f'<label><input type="checkbox" checked> {label}</label>')
        parts.append("</div>\n")
    parts.append('<div class="slides">\n')
    for i, (name, heading, figures) in enumerate(slides):
        is_shown = i == shown or (beside_first and i == 0)
        hidden = "" if is_shown else " hidden"
        parts.append(f'<div class="slide" data-name="{escape(name)}"{hidden}>\n')
        parts.append(f'<h3>{escape(heading)}</h3>\n<div class="figures">\n')
        parts += [figure(cells, caption) for cells, caption in figures]
        parts.append("</div>\n</div>\n")
    parts.append("</div>\n</div>\n")
    return "".join(parts)


def some_of(items, count):
    """At most `count` of a list's items: the first, the last, and some evenly between them."""
    if len(items) <= count:
        return items
    return [items[round(k * (len(items) - 1) / (count - 1))] for k in range(count)]


# --------------------------------------------------------------------------------------------------
# The page of a run


def curves(rows, before):
    """A plot for every number in the log, the reward first. X and test_X share a plot.

    rows: those of log.jsonl. before: {test_X: value before training}.
    """
    plots = {}
    for row in [dict(before, step=0), *rows]:
        for name, value in row.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name in NO_CURVE or not is_number or not math.isfinite(value):
                continue
            kind = "held-out" if name.startswith("test_") else "training"
            lines = plots.setdefault(name.removeprefix("test_"), {})
            lines.setdefault(kind, []).append((row["step"], value))
    skipped = [row["step"] for row in rows if "skipped" in row]
    names = sorted(plots, key=lambda name: name != "reward")
    parts = []
    for i, name in enumerate(names):
        is_large = i == 0
        width = 560 if is_large else 260
        height = 300 if is_large else 170
        legend = ""
        if "held-out" in plots[name]:
            legend = " ".join(f'<i class="{kind}">{kind}</i>' for kind in sorted(plots[name]))
        size = ' class="large"' if is_large else ""
        svg = plot(name, plots[name], skipped, width, height)
        parts.append(f"<div{size}><h3>{escape(name)} {legend}</h3>\n{svg}</div>\n")
    note = ""
    if skipped:
        note = f'<p><i class="skipped">Skipped updates</i>: {", ".join(map(str, skipped))}</p>\n'
    return f'<div class="curves">\n{"".join(parts)}</div>\n{note}'


def settings_table(config, paper):
    """The settings of config.json, with the paper's value if there is one. paper: see run_page."""
    known = paper or {}
    rows = []
    marked = []
    for name, value in config.items():
        if name == "sampler":
            value = ", ".join(f"{key} {part}" for key, part in value.items())
        if name not in ("method", "before"):
            if known.get(name) not in (None, value):
                marked.append((len(rows), 1))
            rows.append([name, str(value), str(known.get(name, ""))])
    if paper:
        note = "<p>Bold values differ from the paper's.</p>\n"
        return table(["setting", "value", "paper"], rows, marked) + note
    note = ""
    if paper == {}:
        note = "<p>The paper has no settings for this model: all values are ours.</p>\n"
    return table(["setting", "value"], [row[:2] for row in rows]) + note


@functools.cache
def read_picture(path, modified):
    """A picture that save_grid wrote with captions -> its figures. None if it has no captions.

    modified: the time of the file, so that we read it once and again when it has changed.
    """
    with Image.open(path) as picture:
        if "grid" not in picture.info:
            return None
        grid = json.loads(picture.info["grid"])
        picture = picture.convert("RGB")
    columns = grid["columns"]
    labels = grid["labels"]
    num_rows = math.ceil(len(grid["captions"]) * len(labels) / columns)
    width = picture.width // columns
    height = picture.height // num_rows
    figures = []
    for i, caption in enumerate(grid["captions"]):
        cells = []
        for k, label in enumerate(labels):
            row, column = divmod(i * len(labels) + k, columns)
            x = column * width
            y = row * height
            cell = picture.crop((x, y, x + width, y + height))
            cells.append((*data_uri(cell), label))
        figures.append((cells, caption))
    return figures


def picture_section(kind, numbered):
    """The section of one kind of picture. numbered: a list of (number, path), in order."""
    unit = "round" if kind == "round" else "update"
    slides = []
    for number, path in some_of(numbered, MAX_SLIDES):
        figures = read_picture(path, path.stat().st_mtime_ns)
        name = f"{unit} {int(number)}" if number else ""
        if figures:
            slides.append((name, name, figures))
    if not slides:
        return ""
    cells, _ = slides[0][2][0]
    # Figures with labels compare images themselves.
    has_labels = any(label for *_, label in cells)
    html = f"<h2>{escape(HEADINGS.get(kind, kind))}</h2>\n"
    if len(numbered) > MAX_SLIDES:
        html += f"<p>{MAX_SLIDES} of {len(numbered)} are shown.</p>\n"
    return html + viewer(slides, len(slides) - 1, len(cells), beside_first=not has_labels)


def all_pictures(folder):
    """The pictures of samples/: those of the updates first, then region_*, round_* and so on."""
    kinds = {"step": []}
    for path in sorted(folder.glob("*.png")):
        kind, number = re.fullmatch(r"(.*?)_?(\d*)", path.stem).groups()
        kinds.setdefault(kind, []).append((number, path))
    return "".join(picture_section(kind, numbered) for kind, numbered in kinds.items())


def run_page(folder, method, config, rows, paper):
    """The text of a run's index.html.

    folder: its pictures. config and rows: what config.json and log.jsonl hold. paper: the paper's
    settings for this model, {} if it has none, or None to say nothing about them.
    """
    names = [method, config.get("model"), config.get("reward")]
    title = " · ".join(name for name in names if name)
    before = config.get("before", {})
    first = before.get("test_reward")
    subtitle = f"update {rows[-1]['step'] if rows else 0} of {config['train_steps']}"
    rewards = [row["test_reward"] for row in rows if "test_reward" in row]
    if rewards and first is not None:
        subtitle += f", held-out reward {first:.6g} before and {rewards[-1]:.6g} now"
    content = (
        f'<div class="top"><section><h2>Curves</h2>\n{curves(rows, before)}</section>\n'
        f"<section><h2>Settings</h2>\n{settings_table(config, paper)}</section></div>\n"
    )
    return page(title, subtitle, content + all_pictures(folder))


# --------------------------------------------------------------------------------------------------
# The page that compares folders


def comparison_page(tables, notes, slides):
    """The text of evaluate.py --html.

    tables: a list of (header, rows, marked) for table(). notes: lines of text to show below them.
    slides: a list of (prompt, figures), with a figure for each folder.
    """
    parts = ["<h2>Metrics</h2>\n"]
    parts += [table(*each) for each in tables]
    parts += [f"<p>{escape(note)}</p>\n" for note in notes]
    named = []
    for i, (prompt, figures) in enumerate(slides, 1):
        named.append((f"prompt {i} of {len(slides)}", prompt, figures))
    parts.append("<h2>Images</h2>\n")
    folders = [caption for _, caption in slides[0][1]]
    layout = f"repeat({len(folders)}, minmax(6rem, 14rem))"
    parts.append(viewer(named, 0, columns=1, layout=layout))
    return page("Comparison", ", ".join(folders), "".join(parts))
