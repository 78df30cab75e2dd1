"""A TrueType font of a few letters, written byte by byte: each letter is a bar of its own height, a missing one a box."""

import struct

UNITS = 1000


def _box(width, height):
    """A glyph: one rectangle of four points on the baseline."""
    points = [(100, 0), (100, height), (100 + width, height), (100 + width, 0)]
    xs = [points[0][0], *(b[0] - a[0] for a, b in zip(points, points[1:], strict=False))]
    ys = [points[0][1], *(b[1] - a[1] for a, b in zip(points, points[1:], strict=False))]
    data = struct.pack(">hhhhhHH", 1, 100, 0, 100 + width, height, 3, 0) + b"\1" * 4 + struct.pack(">8h", *xs, *ys)
    return data + bytes(-len(data) % 4)


def build(letters):
    """The bytes of a font that has these letters."""
    codes = sorted(map(ord, set(letters)))
    glyphs = [_box(600, 700)] + [_box(200, 100 + 500 * (i + 1) // len(codes)) for i in range(len(codes))]
    places = [sum(map(len, glyphs[:i])) for i in range(len(glyphs) + 1)]
    groups = b"".join(struct.pack(">III", code, code, i + 1) for i, code in enumerate(codes))
    cmap = struct.pack(">HHHHI", 0, 1, 3, 10, 12) + struct.pack(">HHIII", 12, 0, 16 + len(groups), 0, len(codes)) + groups
    count = len(glyphs)
    tables = {
        b"cmap": cmap, b"glyf": b"".join(glyphs), b"loca": struct.pack(f">{count + 1}I", *places),
        b"head": struct.pack(">IIIIHHqqhhhhHHhhh", 0x10000, 0, 0, 0x5F0F3CF5, 0, UNITS, 0, 0, 0, 0, 1000, 1000, 0, 8, 2, 1, 0),
        b"hhea": struct.pack(">IhhhHhhhhhh8xhH", 0x10000, 800, -200, 0, 1000, 0, 0, 1000, 1, 0, 0, 0, count),
        b"hmtx": struct.pack(">Hh", 900, 100) * count, b"maxp": struct.pack(">IH26x", 0x10000, count),
    }
    at = 12 + 16 * len(tables)
    head, body = struct.pack(">IHHHH", 0x10000, len(tables), 64, 2, 48), b""
    for name, data in sorted(tables.items()):
        head += struct.pack(">4sIII", name, 0, at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    return head + body


def write(path, letters):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(build(letters))
