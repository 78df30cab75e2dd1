"""The preview beside an immunized picture: the original, its edit, the immunized picture, its edit, and the perturbation."""

from .. import cli
from ..memory import in_words


def write_preview(picture, immunized, path, editor, args):
    """Write the preview; its failure is a remark, because the immunized picture is finished and written."""
    from .. import images
    try:
        with in_words():
            sheet = _preview(picture, immunized, _shown(picture, immunized, editor, args), editor.notice)
    except (ValueError, RuntimeError) as error:
        cli.say(f"{path}: no preview, because its edit failed: {cli.sentence(error)}; the immunized picture is not affected "
                "(--no-preview leaves the preview out)", quiet=args.quiet)
        return
    images.write_picture(path, sheet, overwrite=True)


def _shown(picture, immunized, editor, args):
    """The columns of a preview beside the original and beside the immunized picture: edits, or the spaces' decodings."""
    if hasattr(editor, "decodings"):
        return [[(f"{name} decodes", found) for name, found in editor.decodings(image.convert("RGB"))]
                for image in (picture.image, immunized)]
    with cli.progress(total=2 * len(editor.plan().timesteps), what="preview", quiet=args.quiet) as bar:
        return [[(f"edited: {args.prompt[0]}", editor.edit(image.convert("RGB"), args.prompt[0], seed=args.seed,
                                                           on_step=lambda i, n: bar.update()))]
                for image in (picture.image, immunized)]


def _preview(picture, immunized, shown, notice):
    from .. import images
    from ..files import contact_sheet
    original = picture.put_together(picture.image)           # with its transparency, as the immunized one has it
    columns = [("original", original), *shown[0], ("immunized", immunized), *shown[1],
               ("perturbation x10", images.amplify(picture.image, immunized))]
    return picture.coloured(contact_sheet.sheet(columns, footer=notice))
