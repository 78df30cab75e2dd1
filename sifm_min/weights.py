"""List, download and verify the weights of the editors and of LPIPS, with their licences.

`python -m sifm_min.weights list|download|verify`, a thin command over `models/checkpoints.py` and `metrics/fetch.py`.
What is fetched lies in the standard Hugging Face cache, that of LPIPS beside it (`HF_HOME`/sifm_min), where every command
of this package finds it without a network.
"""

import hashlib
import os
import re

from . import cli
from .metrics import backbones
from .models import checkpoints
from .models.checkpoints import EDITORS, MAIN, Unavailable

LPIPS = {"lpips": tuple(backbones.NETWORKS), **{f"lpips-{name}": (name,) for name in backbones.NETWORKS}}

EXAMPLES = """examples:
  %(prog)s list
  %(prog)s download instruct-pix2pix
  %(prog)s download sd3 --no-t5
  %(prog)s download some-owner/some-editor --revision v1.0
  %(prog)s verify miniature instruct-pix2pix path/to/a/folder
  %(prog)s download lpips-alex
  %(prog)s download lpips-vgg --weights vgg16-397923af.pth

list      makes no request. An editor is shipped with this package, or absent, partial or complete in the cache;
          `unpinned` means that no commit is known to be good: `main` is resolved at the first download, then kept;
          `without-t5` is all that Stable Diffusion 3 needs if its largest text encoder is declined
download  says licence and size, fetches what is missing (files that are complete stay), then verifies
verify    hashes every file and compares with the published checksum, the one by which the cache knows the file, and
          the SHA256SUMS of its folder

lpips-alex, lpips-vgg and lpips-squeeze are the backbones of the metric LPIPS, lpips is all three; `compare` uses alex.
torchvision's file is fetched, its convolutions are kept (alex: 10 of 244 MB), in HF_HOME/sifm_min/lpips, and it is
removed; on a machine without a network, --weights takes that file.

HF_HOME moves the cache, HF_TOKEN opens gated repositories, HF_HUB_OFFLINE=1 forbids all requests.
"""


def status(source):
    """The state of an editor as a JSON-ready dict; `revision` is the commit in use, or None. Sends no request."""
    folder, complete = source.folder or source.file, "shipped" if source.name in EDITORS else "complete"
    if folder:
        size, missing, present = 0, None, folder.exists()
        try:
            checkpoint = _open(source)
            size = sum((checkpoint.folder / file).stat().st_size for file in checkpoint.files)
        except Unavailable as error:
            missing = str(error)
    else:
        folder, missing = checkpoints.cached(source.hub_id, source.revision)
        present, complete, size = folder is not None, "complete", source.size
        if missing and present and not checkpoints.cached(source.hub_id, source.revision, t5=False)[1]:
            missing, complete, size = None, "without-t5", source.size_without_t5
    return {
        "name": source.name,
        "state": "absent" if not present else "partial" if missing else complete,
        "missing": missing and str(missing),
        "bytes": size or None,
        "source": source.hub_id or str(source.folder or source.file),
        "pinned": source.hub_id is None or source.revision is not None,
        "revision": source.revision or (folder.name if source.hub_id and folder else None),
        "gated": source.gated,
        "licence": source.licence,
    }


def _open(source, **options):
    """The checkpoint of a source; of a single file, only the components inside it."""
    return checkpoints.open_checkpoint(source.name, () if source.file else None, **options)


def verify(checkpoint, published=None):
    """Hash the files of a checkpoint: a list of {"file", "sha256", "ok", "problem"}.

    published: file -> SHA-256 that it must have. `ok` is None where there is nothing to compare with. A file of weights
    must also be whole by its own header, and whatever the folder's SHA256SUMS lists must be there.
    """
    listed = {}
    if checkpoint.has("SHA256SUMS"):
        lines = re.findall(r"^(\w{64}) [ *](.+)$", checkpoint.text("SHA256SUMS"), re.M)
        listed = {name: digest for digest, name in lines}
    found = []
    for file in dict.fromkeys([*([MAIN] if checkpoint.path(MAIN).is_file() else []), *checkpoint.files, *listed]):
        path = checkpoint.folder / file
        if not checkpoint.has(file):
            found.append({"file": file, "sha256": None, "ok": False, "problem": "is listed in SHA256SUMS and missing"})
            continue
        digest, problems, compared = checkpoints.sha256(path), [], False
        if checkpoints.is_weights(file):
            try:
                checkpoints.header(path)
            except Unavailable:
                problems.append("is cut short or damaged")
        # The cache keeps a file under the name by which the hub knows its content: the SHA-256 of a large file, git's
        # hash of a small one.
        blob = os.path.basename(os.readlink(path)) if checkpoint.revision and path.is_symlink() else ""
        git = _git_hash(path.read_bytes()) if len(blob) == 40 else ""
        for whose, expected, actual in (
            ("the published checksum", (published or {}).get(file), digest),
            ("SHA256SUMS", listed.get(file), digest),
            ("the hub's checksum", blob if len(blob) in (40, 64) else None, git or digest),
        ):
            compared = compared or expected is not None
            if expected not in (None, actual):
                problems.append(f"is not the file of {whose} {expected}")
        found.append({"file": file, "sha256": digest, "ok": False if problems else True if compared else None,
                      "problem": "; ".join(problems)})
    return found


def _git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# ------------------------------------------------------------------------------------------------------------ command


def _size(size):
    if not size:
        return "-"
    scale, unit = next((pair for pair in ((1e9, "GB"), (1e6, "MB")) if size >= pair[0]), (1e3, "kB"))
    return f"{size / scale:.1f} {unit}"


def _list(names, args):
    records = []
    for name in names or (*EDITORS, *(f"lpips-{network}" for network in backbones.NETWORKS)):
        records += [_lpips_status(network) for network in LPIPS[name]] if name in LPIPS else [status(checkpoints.find(name))]
    rows = [("NAME", "STATE", "SIZE", "REVISION", "ACCESS", "FROM", "LICENCE")]
    for record in records:
        revision = (record["revision"] or "-")[:12] if record["pinned"] else "unpinned"
        about = "" if os.path.exists(record["source"]) or not record["bytes"] else "~"
        rows.append((record["name"], record["state"], about + _size(record["bytes"]), revision,
                     "gated" if record["gated"] else "open", record["source"], record["licence"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    for line in records if args.json else lines:
        cli.out(cli.to_json(line) if args.json else line)


def _check(name, args):
    """Fetch one editor (download) and verify it (both); an exit code."""
    source, download = checkpoints.find(name), args.action == "download"
    if download and source.hub_id:
        size = source.size_without_t5 if args.no_t5 else source.size
        size = f"about {_size(size)}" if size else "a size that the hub will tell"
        cli.say(f"{name}: {size} from {source.hub_id} at {args.revision or source.revision or 'main (unpinned)'}, "
                f"licence: {source.licence}", quiet=args.quiet)
    checkpoint = _open(source, t5=not args.no_t5, revision=args.revision, offline=None if download else True)
    published = source.files if checkpoint.revision == source.revision else {}
    files = verify(checkpoint, published)
    for file in files:
        mark = {True: "ok", False: "BAD", None: "unknown"}[file["ok"]]
        if not args.json and not (download and file["ok"]):
            cli.out(f"{mark:7}  {file['sha256'] or '-' * 64}  {name}: {file['file']}")
        if file["problem"]:
            path = checkpoint.folder / file["file"]
            remedy = f"remove {os.path.realpath(path)} and download" if checkpoint.revision else "get the folder"
            cli.fail(f"{path} {file['problem']}; {remedy} again")
    if args.json:
        cli.out(cli.to_json({"name": source.name, "source": checkpoint.source, "revision": checkpoint.revision,
                             "folder": checkpoint.folder, "licence": source.licence, "files": files}))
    bad = sum(file["ok"] is False for file in files)
    at = f" at {checkpoint.revision}" if checkpoint.revision else ""
    cli.say(f"{name}{at}: {len(files)} files in {checkpoint.folder}, {f'{bad} BAD' if bad else 'none damaged'}",
            quiet=args.quiet)
    return cli.SOME_FAILED if bad else cli.OK


def _lpips_status(network):
    source = backbones.NETWORKS[network]
    return {"name": f"lpips-{network}", "state": "complete" if source.kept.is_file() else "absent", "missing": None,
            "bytes": source.size, "source": source.url, "pinned": True, "revision": source.sha256, "gated": False,
            "licence": backbones.LICENCE}


def _check_lpips(name, args):
    """`_check` for the backbones of LPIPS: an exit code."""
    from .metrics import fetch, lpips_weights
    code = cli.OK
    for network in LPIPS[name]:
        source, label = backbones.NETWORKS[network], f"lpips-{network}"
        if args.action == "download":
            origin = args.weights or f"about {_size(source.size)} from {source.url}"
            cli.say(f"{label}: {source.title}, {origin}, of which {_size(source.kept_size)} are kept, "
                    f"licence: {backbones.LICENCE}", quiet=args.quiet)
        try:
            if args.action == "download":
                with cli.progress(total=source.size, what=label, unit="B", quiet=args.quiet) as bar:
                    weights = fetch.backbone(network, file=args.weights, on_bytes=bar.update)
            else:
                weights = lpips_weights(network)
        except checkpoints.Unfit as error:
            if args.action == "download":
                raise
            cli.fail(cli.sentence(error))
            weights, code = None, cli.SOME_FAILED
        if args.json:
            cli.out(cli.to_json({"name": label, "source": source.url, "revision": source.sha256, "file": source.kept,
                                 "licence": backbones.LICENCE, "sha256": weights and weights.sha256,
                                 "ok": weights is not None}))
        elif args.action == "verify":
            cli.out(f"{'ok' if weights else 'BAD':7}  {weights.sha256 if weights else '-' * 64}  {label}: {source.kept.name}")
        if weights:
            cli.say(f"{label}: {source.kept}, not damaged", quiet=args.quiet)
    return code


def _body(args):
    if args.weights and (args.action != "download" or [len(LPIPS.get(name, ())) for name in args.names] != [1]):
        raise ValueError(f"--weights is for download of one of {', '.join(list(LPIPS)[1:])}")
    if (args.revision or args.no_t5) and any(name in LPIPS for name in args.names):
        raise ValueError("--revision and --no-t5 are for editors; the files of LPIPS are pinned by their hash")
    if args.revision and args.action == "list":
        raise ValueError("--revision is for download and verify; list shows the revision that is used by default")
    if args.no_t5 and args.action == "list":
        raise ValueError("--no-t5 is for download and verify; list says `without-t5` of what is complete but for T5")
    if args.action == "list":
        return _list(args.names, args)
    if not args.names:
        raise ValueError(f"{args.action} needs a name: {', '.join((*EDITORS, *LPIPS))}, a folder, or a hub id")
    if args.quiet:
        from huggingface_hub.utils import disable_progress_bars, logging
        disable_progress_bars()
        logging.set_verbosity_error()                        # its remarks on retries are remarks too
    return max([_check_lpips(name, args) if name in LPIPS else _check(name, args) for name in args.names])


def _parser():
    parser = cli.Parser("weights", "List, fetch and verify the weights of the editors and of LPIPS.", EXAMPLES)
    parser.add_argument("action", choices=("list", "download", "verify"))
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help="a known editor, lpips, a folder, or a hub id (list: default all known ones)")
    parser.add_argument("--revision", metavar="REV", help="commit, tag or branch of a hub id instead of the pinned one")
    parser.add_argument("--no-t5", action="store_true",
                        help="leave out Stable Diffusion 3's T5 text encoder, 9.5 GB that it can do without")
    parser.add_argument("--weights", type=cli.path, metavar="FILE",
                        help="torchvision's file of an LPIPS network, fetched elsewhere: no request is made")
    parser.shared()
    return parser


def main(argv=None):
    return cli.run_command(_body, _parser(), argv)


if __name__ == "__main__":
    cli.leave(main())
