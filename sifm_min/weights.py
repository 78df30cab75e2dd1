"""List, download and verify the weights of the editors, of the latent spaces and of LPIPS, with their licences.

`python -m sifm_min.weights list|download|verify`, a thin command over `models/checkpoints.py` and `metrics/fetch.py`.
What is fetched lies in the standard Hugging Face cache, that of LPIPS beside it (`HF_HOME`/sifm_min), where every command
of this package finds it without a network.
"""

import hashlib
import os
import re
import secrets
import shutil

from . import cli
from .metrics import backbones
from .models import checkpoints, latent_spaces
from .models.checkpoints import EDITORS, MAIN, Unavailable

LATENTS = {"latents": tuple(latent_spaces.SPACES.values()),
           **{space.command: (space,) for space in latent_spaces.SPACES.values()}}
LPIPS = {"lpips": tuple(backbones.NETWORKS), **{f"lpips-{name}": (name,) for name in backbones.NETWORKS}}

EXAMPLES = """examples:
  %(prog)s list
  %(prog)s download instruct-pix2pix
  %(prog)s download sd3 --no-t5
  %(prog)s download some-owner/some-editor --revision v1.0
  %(prog)s verify miniature instruct-pix2pix path/to/a/folder
  %(prog)s download latents
  %(prog)s download latents --weights path/to/a/folder
  %(prog)s download lpips-alex
  %(prog)s download lpips-vgg --weights vgg16-397923af.pth

list      makes no request. An editor is shipped with this package, or absent, partial or complete in the cache;
          `unpinned` means that no commit is known to be good: `main` is resolved at the first download, then kept;
          `without-t5` is all that Stable Diffusion 3 needs if its largest text encoder is declined
download  says licence and size, fetches what is missing (files that are complete stay), then verifies
verify    hashes every file and compares with the published checksum, the one by which the cache knows the file, and
          the SHA256SUMS of its folder

latents-sd1, latents-sdxl, latents-sd3, latents-flux1 and latents-flux2 are the tiny autoencoders of five latent spaces,
10 MB each, latents is all five; `--editor latents` uses those that are there, and for sd1 and sd3 else the copies that
ship. On a machine without a network, --weights takes a folder that has them, as taesd_encoder.safetensors and
taesd_decoder.safetensors, as taef2.safetensors, or as diffusers writes them; they are copied to
HF_HOME/sifm_min/latents.

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
    for name in names or (*EDITORS, "latents", *(f"lpips-{network}" for network in backbones.NETWORKS)):
        if name in LATENTS:
            records += [_latents_status(space) for space in LATENTS[name]]
        elif name in LPIPS:
            records += [_lpips_status(network) for network in LPIPS[name]]
        else:
            records.append(status(checkpoints.find(name)))
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
    return _report(name, source, checkpoint, verify(checkpoint, published), args)


def _report(name, source, checkpoint, files, args):
    """Print the result of `verify`; an exit code."""
    download = args.action == "download"
    for file in files:
        mark = {True: "ok", False: "BAD", None: "unknown"}[file["ok"]]
        if not args.json and not (download and file["ok"]):
            cli.out(f"{mark:7}  {file['sha256'] or '-' * 64}  {name}: {file['file']}")
        if file["problem"]:
            path = checkpoint.folder / file["file"]
            remedy = f"remove {os.path.realpath(path)} and download" if source.hub_id else "get the folder"
            cli.fail(f"{path} {file['problem']}; {remedy} again")
    if args.json:
        cli.out(cli.to_json({"name": source.name, "source": checkpoint.source, "revision": checkpoint.revision,
                             "folder": checkpoint.folder, "licence": source.licence, "files": files}))
    bad = sum(file["ok"] is False for file in files)
    at = f" at {checkpoint.revision}" if checkpoint.revision else ""
    cli.say(f"{name}{at}: {len(files)} files in {checkpoint.folder}, {f'{bad} BAD' if bad else 'none damaged'}",
            quiet=args.quiet)
    return cli.SOME_FAILED if bad else cli.OK


def _latents_status(space):
    problem = None
    try:
        checkpoint = latent_spaces.find(space)
    except Unavailable as error:
        checkpoint, problem = None, str(error)
    here = latent_spaces.is_here(space)
    size = sum((checkpoint.folder / file).stat().st_size for file in checkpoint.files) if checkpoint else space.size
    return {"name": space.command, "state": "complete" if checkpoint else "partial" if here else "absent", "missing": problem,
            "bytes": size, "source": checkpoint.source if checkpoint else space.hub_id, "pinned": True,
            "revision": space.revision, "gated": False, "licence": latent_spaces.LICENCE}


def _check_latents(name, args):
    """`_check` for the latent spaces: an exit code."""
    spaces = LATENTS[name]
    if args.weights:
        if not args.weights.is_dir():
            raise ValueError(f"--weights {args.weights} is not a folder; the latent spaces are files in one")
        given = _latents_in(args.weights, spaces)
        spaces = [checkpoint.space for checkpoint in given]
        for checkpoint in given:
            _keep_latents(checkpoint)
    if args.action == "verify" and len(spaces) > 1:
        spaces = latent_spaces.at_hand() or spaces
    code = cli.OK
    for space in spaces:
        if args.action == "download" and not args.weights:
            cli.say(f"{space.command}: {space.title}, about {_size(space.size)} from {space.hub_id} at {space.revision}, "
                    f"licence: {latent_spaces.LICENCE}", quiet=args.quiet)
        checkpoint = latent_spaces.stored(space) if args.weights or args.action == "verify" else latent_spaces.fetch(space)
        if args.weights:
            cli.say(f"{space.command}: {space.title}, copied from {args.weights}, licence: {latent_spaces.LICENCE}",
                    quiet=args.quiet)
        source = checkpoints.Source(name=space.command, licence=latent_spaces.LICENCE, hub_id=space.hub_id)
        files = verify(checkpoint, space.files if checkpoint.revision else {})
        found = _report(space.command, source, checkpoint, files, args)
        if found == cli.OK:
            try:
                latent_spaces.find(space).fit()
            except checkpoints.Unfit as error:
                cli.fail(f"{space.command}: {error}")
                found = cli.UNAVAILABLE
        code = max(code, found)
    return code


def _latents_in(folder, spaces):
    """The checkpoints of those among the spaces that a folder holds, at least one."""
    given, unfit = [], None
    for space in spaces:
        if not (names := latent_spaces.files_in(folder, space)):
            continue
        try:
            checkpoint = latent_spaces.open_folder(folder, space)
            if not checkpoint.recognised:
                raise checkpoints.Unfit(f"{folder / names[-1]} is not the published {space.stem}, so it is not kept as that; "
                                        f"`--editor latents:{folder}` takes it")
            given.append(checkpoint)
        except checkpoints.Unfit as error:
            if len(spaces) == 1 or space.stem in names[0]:
                raise
            unfit = unfit or error                           # files whose names do not say which space they are of
    if not given:
        raise unfit or Unavailable(latent_spaces.absence(folder, spaces[0]))
    return given


def _keep_latents(checkpoint):
    """Copy the files of a latent space, which fit its network, to their place beside the hub's cache."""
    checkpoint.fit()
    kept = checkpoint.space.kept
    if os.path.realpath(checkpoint.folder) == os.path.realpath(kept):
        return
    written = kept.with_name(f".{secrets.token_hex(8)}.part")
    try:
        written.mkdir(parents=True)
        for file in checkpoint.files:
            shutil.copyfile(checkpoint.folder / file, written / file)
        (written / "SHA256SUMS").write_text("".join(
            f"{checkpoints.sha256(written / file)}  {file}\n" for file in checkpoint.files), encoding="utf-8")
        if kept.exists():
            shutil.rmtree(kept)
        written.rename(kept)
    except OSError as error:
        raise Unavailable(f"{error.filename or kept} cannot be written ({error.strerror or error}): make room or make it "
                          "writable, or point HF_HOME to another folder") from error
    finally:
        shutil.rmtree(written, ignore_errors=True)


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
    if args.weights and (args.action != "download" or not (
            all(name in LATENTS for name in args.names) or [len(LPIPS.get(name, ())) for name in args.names] == [1])):
        raise ValueError(f"--weights is for download of one of {', '.join(list(LPIPS)[1:])}, or of {', '.join(LATENTS)}")
    if (args.revision or args.no_t5) and any(name in LPIPS or name in LATENTS for name in args.names):
        raise ValueError("--revision and --no-t5 are for editors; the files of LPIPS and of the latent spaces are pinned")
    if args.revision and args.action == "list":
        raise ValueError("--revision is for download and verify; list shows the revision that is used by default")
    if args.no_t5 and args.action == "list":
        raise ValueError("--no-t5 is for download and verify; list says `without-t5` of what is complete but for T5")
    if args.action == "list":
        return _list(args.names, args)
    if not args.names:
        raise ValueError(f"{args.action} needs a name: {', '.join((*EDITORS, *LATENTS, *LPIPS))}, a folder, or a hub id")
    if args.quiet:
        from huggingface_hub.utils import disable_progress_bars, logging
        disable_progress_bars()
        logging.set_verbosity_error()                        # its remarks on retries are remarks too
    check = {**dict.fromkeys(LPIPS, _check_lpips), **dict.fromkeys(LATENTS, _check_latents)}
    codes = []
    for name in args.names:
        try:
            codes.append(check.get(name, _check)(name, args))
        except Unavailable as error:                         # the others are worked on all the same
            if len(args.names) == 1:
                raise
            cli.fail(f"{name}: {cli.sentence(error)}")
            codes.append(cli.UNAVAILABLE)
    return max(codes)


def _parser():
    parser = cli.Parser("weights", "List, fetch and verify the weights of editors, latent spaces and LPIPS.", EXAMPLES)
    parser.add_argument("action", choices=("list", "download", "verify"))
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help="a known editor, latents, lpips, a folder, or a hub id (list: default all known ones)")
    parser.add_argument("--revision", metavar="REV", help="commit, tag or branch of a hub id instead of the pinned one")
    parser.add_argument("--no-t5", action="store_true",
                        help="leave out Stable Diffusion 3's T5 text encoder, 9.5 GB that it can do without")
    parser.add_argument("--weights", type=cli.path, metavar="FILE-OR-FOLDER",
                        help="fetched elsewhere, so no request is made: torchvision's file of an LPIPS network, or the folder "
                             "of the latent spaces' files")
    parser.shared()
    return parser


def main(argv=None):
    return cli.run_command(_body, _parser(), argv)


if __name__ == "__main__":
    cli.leave(main())
