"""Contact sheets: pictures side by side, each below its caption."""

import re

from PIL import Image, ImageDraw

from .fonts import Letters

FONT_SIZE, LINE, GAP, NARROWEST = 18, 23, 12, 200            # pixels


def sheet(columns, footer="", cell=384, folders=None):
    """Pictures side by side, each below its caption, as one RGB image: columns are (caption, PIL image).

    Each picture is fitted into cell x cell, small ones scaled up by a whole factor without smoothing. Captions and the
    `footer`, a remark that runs below them all, are wrapped. Transparency is shown on white. folders: where fonts are
    searched for letters that Pillow's own font lacks (default: the system's).
    """
    if not columns:
        raise ValueError("a contact sheet needs at least one picture")
    pictures = [_fitted(_on_white(image), cell) for _, image in columns]
    width, height = max(NARROWEST, *(p.width for p in pictures)), max(p.height for p in pictures)
    letters = Letters([footer, *(caption for caption, _ in columns)], FONT_SIZE, folders)
    captions = [wrapped(caption, letters, width, lines=5) for caption, _ in columns]
    top = GAP + LINE * max(map(len, captions)) + GAP
    total = GAP + len(columns) * (width + GAP)
    remarks = wrapped(footer, letters, total - 2 * GAP, lines=8)
    made = Image.new("RGB", (total, top + height + GAP + (len(remarks) * LINE + GAP if remarks else 0)), "white")
    draw = ImageDraw.Draw(made)
    for i, (image, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = GAP + i * (width + GAP)
        for row, line in enumerate(caption):
            letters.draw(draw, left, GAP + row * LINE, line)
        made.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
    for row, line in enumerate(remarks):
        letters.draw(draw, GAP, top + height + GAP + row * LINE, line)
    return made


def wrapped(text, letters, width, lines):
    """Text as at most `lines` lines that fit the width: long words are broken, a text that is too long ends in dots."""
    rows = []
    for word in letters.legible(text).split():
        if rows and letters.length(f"{rows[-1]} {word}") <= width:
            rows[-1] += f" {word}"
            continue
        rows.append("")
        for letter in re.findall(r"\[U\+[0-9A-F]+\]|.", word):
            if letters.length(rows[-1] + letter) > width:
                rows.append("")
            rows[-1] += letter
    if len(rows) > lines:
        rows = rows[:lines]
        while letters.length(rows[-1] + "...") > width:
            rows[-1] = rows[-1][:-1]
        rows[-1] += "..."
    return rows


def _on_white(image):
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def _fitted(image, cell):
    long = max(image.size)
    if long <= cell:
        return image.resize((image.width * (cell // long), image.height * (cell // long)), Image.Resampling.NEAREST)
    return image.resize((max(image.width * cell // long, 1), max(image.height * cell // long, 1)), Image.Resampling.LANCZOS)
