"""Edit pictures with an instruction, as an attacker would: exactly what the published pipeline does."""

from . import cli
from .files import reports, writing
from .files.weight_digests import hash_weights
from .immunize import EDITS, editor_of, find, question, set_strength, tell_skipped

EXAMPLES = """examples:
  %(prog)s photo.png --prompt "make her a witch" -o out
  %(prog)s out/photo_immunized.png --prompt "make her a witch" --editor instruct-pix2pix --seed 7 -o out

writes NAME_edited.png per picture, with the picture's size, transparency and colour profile, and NAME_edited.json, which
says how it was made. A folder resumes where it stopped. Exit codes: 0 all done, 1 some pictures failed, 2 usage,
3 weights unavailable, 130 or 143 interrupted."""


def _parser():
    parser = cli.Parser("edit", "Edit pictures by an instruction, as an attacker would.", EXAMPLES)
    add = parser.add_argument
    add("pictures", nargs="+", type=cli.path, metavar="PICTURE-OR-FOLDER")
    add("--prompt", required=True, type=cli.prompt, help="the instruction")
    add("-o", "--output", required=True, type=cli.path, metavar="DIR", help="where results go (created if absent)")
    parser.editor()
    add("--negative-prompt", default="", help="what the edit should avoid")
    add("--steps", type=cli.count, help="denoising steps (default: the editor's)")
    add("--guidance", type=cli.number, help="weight of the instruction (default: the editor's)")
    add("--image-guidance", type=cli.number, help="weight of the picture, of instruction editors (default: the editor's)")
    add("--true-guidance", type=cli.number, help="of FLUX.1, above 1: guidance by a second pass (default: the editor's)")
    add("--size", type=cli.count, help="long side at which the picture is edited (default: the editor's)")
    parser.shared("device", "dtype", "vae-dtype", "seed", "overwrite")
    return parser


def _body(args):
    from . import images
    from .models.checkpoints import Unfit

    pictures, left_out = find(args.pictures, args.output, EDITS)
    editor = editor_of(args)
    set_strength([editor], args.strength)
    if fault := editor.plan(args.steps).fault:
        raise Unfit(f"{args.editor}: {fault}")
    writing.make_folder(args.output)
    if pictures:
        hash_weights(editor, args.output)
    cli.say_editor(editor, quiet=args.quiet)

    def one(path):
        target, report_path = (args.output / f"{path.stem}{ending}" for ending in EDITS)
        asked = question(path, editor, args)
        before = reports.earlier(report_path, asked, [target], overwrite=args.overwrite)
        if before and target.exists():
            return tell_skipped(path, before, args)
        picture = images.read(path)
        cli.say_notes(path, picture.info["notes"], quiet=args.quiet)
        with cli.progress(total=len(editor.plan(args.steps).timesteps), what=path.name, quiet=args.quiet) as bar:
            edited = editor.edit(picture.image, args.prompt, negative_prompt=args.negative_prompt, seed=args.seed,
                                 steps=args.steps, guidance=args.guidance, image_guidance=args.image_guidance,
                                 true_guidance=args.true_guidance, size=args.size, on_step=lambda i, n: bar.update())
        if picture.icc and picture.mode in ("L", "LA"):
            cli.say(f"{path}: its colour profile is for grey pixels, and the edit has colours: left out", quiet=args.quiet)
        report = {"finished": True, "asked": asked, "results": [target.name], "picture": str(path), "edited": str(target),
                  "prompt": args.prompt, "seed": args.seed, "notes": picture.info["notes"], "editor": editor.provenance()}
        reports.write_results(
            report_path, lambda finished: cli.to_json(report | {"finished": finished}, indent=1) + "\n",
            {target: lambda path: images.write_picture(path, picture.coloured(edited, alpha=True), overwrite=True)},
            overwrite=args.overwrite)
        cli.result(reports.in_short(report), str(target), as_json=args.json)

    return cli.each_file(pictures, one, output=args.output, left_out=left_out, done="edited", quiet=args.quiet,
                         debug=args.debug, as_json=args.json)


def main(argv=None):
    return cli.run_command(_body, _parser(), argv)


if __name__ == "__main__":
    cli.leave(main())
