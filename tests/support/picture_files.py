"""Picture files written byte by byte: kinds that Pillow reads and cannot write. Samples are (H,W,S) integer arrays."""

import struct
import zlib

import numpy as np

PNG_COLOURS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}                 # colour type -> samples per pixel


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def packed(samples, bits, order=">"):
    """One row of samples of `bits` bits each, as bytes; rows end at whole bytes."""
    samples = np.asarray(samples).reshape(-1)
    if bits == 8:
        return samples.astype(np.uint8).tobytes()
    if bits in (16, 32):
        return samples.astype(f"{order}u{bits // 8}").tobytes()
    return np.packbits((samples[:, None] >> np.arange(bits)[::-1]) & 1).tobytes()


def png(samples, depth, colour_type, extra=b"", after=b""):
    """A PNG. extra: chunks between IHDR and IDAT; after: chunks behind IDAT."""
    samples = np.asarray(samples).reshape(*np.shape(samples)[:2], -1)
    height, width, count = samples.shape
    assert count == PNG_COLOURS[colour_type]
    rows = b"".join(b"\0" + packed(row, depth) for row in samples)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)) + extra
            + chunk(b"IDAT", zlib.compress(rows)) + after + chunk(b"IEND", b""))


def tiff(samples, bits, photometric, *, order="<", planar=1, deflate=False, rows_per_strip=None, tags=None, orientation=1,
         sample_format=1, extra_samples=(), colormap=None):
    """A TIFF of one page. tags: further {number: list of SHORT values}."""
    samples = np.asarray(samples).reshape(*np.shape(samples)[:2], -1)
    height, width, count = samples.shape
    rows_per_strip = rows_per_strip or height
    planes = [samples] if planar == 1 else [samples[..., i] for i in range(count)]
    strips = [b"".join(packed(row, bits, order) for row in plane[top:top + rows_per_strip])
              for plane in planes for top in range(0, height, rows_per_strip)]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    entries = {256: (4, [width]), 257: (4, [height]), 258: (3, [bits] * count), 259: (3, [8 if deflate else 1]),
               262: (3, [photometric]), 273: (4, [0] * len(strips)), 274: (3, [orientation]), 277: (3, [count]),
               278: (4, [rows_per_strip]), 279: (4, [len(strip) for strip in strips]), 284: (3, [planar]),
               339: (3, [sample_format] * count), **{tag: (3, values) for tag, values in (tags or {}).items()}}
    if extra_samples:
        entries[338] = (3, list(extra_samples))
    if colormap is not None:
        entries[320] = (3, list(colormap))
    start = 8 + 2 + 12 * len(entries) + 4
    outside = {tag: len(values) * (2 if kind == 3 else 4) for tag, (kind, values) in entries.items()}
    after = start + sum(size for size in outside.values() if size > 4)
    entries[273] = (4, [after + sum(map(len, strips[:i])) for i in range(len(strips))])
    head, body = struct.pack(order + "2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(entries)), b""
    for tag, (kind, values) in sorted(entries.items()):
        data = struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
        head += struct.pack(order + "HHI", tag, kind, len(values))
        head += data.ljust(4, b"\0") if len(data) <= 4 else struct.pack(order + "I", start + len(body))
        body += data if len(data) > 4 else b""
    return head + struct.pack(order + "I", 0) + body + b"".join(strips)


def icc_header(space="RGB"):
    """An ICC profile of this colour space without tags: enough to be carried, too little to convert by."""
    return struct.pack(">I4x4s4s4s4s12x4s88xI", 132, b"\4\0\0\0", b"mntr", space.encode().ljust(4), b"XYZ ", b"acsp", 0)
