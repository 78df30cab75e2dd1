"""The preview beside an immunized picture: the original, its edit, the immunized picture, its edit, and the perturbation.

Of several editors it has a row for each.
"""

from PIL import Image

from .. import cli
from ..memory import in_words, sparing


def write_preview(picture, immunized, path, editor, args):
    """Write the preview; its failure is a remark, because the immunized picture is finished and written."""
    from .. import images
    from .shares import group_of
    group, rows = group_of(editor), []
    group.apart = args.memory == "low" and len(group.editors) > 1
    try:
        for one, name in zip(group.editors, group.names, strict=True):
            with in_words(), group.at_work(one), sparing(one, args.memory):
                shown = _shown(picture, immunized, one, args, f", {name}" if len(group.editors) > 1 else "")
            rows.append(_preview(picture, immunized, shown, one.notice))
    except (ValueError, RuntimeError) as error:
        cli.say(f"{path}: no preview, because its edit failed: {cli.sentence(error)}; the immunized picture is not affected "
                "(--no-preview leaves the preview out)", quiet=args.quiet)
        return
    finally:
        group.apart = False
    images.write_picture(path, picture.coloured(_stacked(rows)), overwrite=True)


def _shown(picture, immunized, editor, args, of=""):
    """The columns of a preview beside the original and beside the immunized picture: edits, or the spaces' decodings."""
    if hasattr(editor, "decodings"):
        return [[(f"{name} decodes", found) for name, found in editor.decodings(image.convert("RGB"))]
                for image in (picture.image, immunized)]
    prompt = args.prompt[0] if args.prompt else args.any_prompt.texts(editor.kind)[0]
    with cli.progress(total=2 * len(editor.plan().timesteps), what=f"preview{of}", quiet=args.quiet) as bar:
        return [[(f"edited{of}: {prompt}", editor.edit(image.convert("RGB"), prompt, seed=args.seed,
                                                       on_step=lambda i, n: bar.update()))]
                for image in (picture.image, immunized)]


def _preview(picture, immunized, shown, notice):
    from .. import images
    from ..files import contact_sheet
    original = picture.put_together(picture.image)           # with its transparency, as the immunized one has it
    columns = [("original", original), *shown[0], ("immunized", immunized), *shown[1],
               ("perturbation x10", images.amplify(picture.image, immunized))]
    return contact_sheet.sheet(columns, footer=notice)


def _stacked(rows):
    """The rows of a preview below each other, on white."""
    if len(rows) == 1:
        return rows[0]
    made, top = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white"), 0
    for row in rows:
        made.paste(row, (0, top))
        top += row.height
    return made
