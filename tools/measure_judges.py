"""Measure the two judges of photographs: what they say about pictures whose truth is known, and about an editor's edits.

    python tools/measure_judges.py judges --photos FOLDER                        targets, sources, other edits, damage
    python tools/measure_judges.py judges --photos FOLDER --use evaluate         the same on fresh photographs
    python tools/measure_judges.py edits --photos FOLDER --editor NAME --sheets  clean edits and the noise control

FOLDER holds photographs and LICENSES.jsonl with a use for each; the thresholds were chosen on those for "train". The measures
go to --work, one JSON line a picture; a run that was interrupted goes on, and a later run applies the thresholds of the day
to what is there. Shares have their 95 % Wilson interval.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import damages  # noqa: E402
import photosets  # noqa: E402

import sifm_min  # noqa: E402
from sifm_min import images  # noqa: E402
from sifm_min.files import contact_sheet  # noqa: E402
from sifm_min.files.digests import digest, picture_sha256  # noqa: E402
from sifm_min.files.ledger import Ledger  # noqa: E402
from sifm_min.files.weight_digests import hash_weights  # noqa: E402
from sifm_min.judging.intervals import wilson  # noqa: E402
from sifm_min.miniature import deciding, fidelity, pictures, recogniser, thresholds  # noqa: E402
from sifm_min.miniature.verdict import Verdict  # noqa: E402

STRENGTHS = (0.5, 1, 2)                                      # of the limits in damages.py


def drawn(args):
    """(name, sample) of so many samples, the categories in turn; the same samples for every run."""
    rows = photosets.in_turn(photosets.read_rows(args.list) if args.list else photosets.marked(args.photos, args.use))
    for i in range(args.samples):
        row = rows[(i + args.skip) % len(rows)]
        yield row["id"], pictures.draw_sample(args.photos / row["file"], f"judges {i}", size=args.size)


def measured(sample, edited):
    """The measures of both judges, as a dict."""
    probabilities, damage = recogniser.read_edit(sample.image, edited)
    asked = probabilities[recogniser.class_of(sample.kind, sample.option)]
    named = max(probabilities, key=probabilities.get)
    return {"oracle": asdict(fidelity.measures_of(sample, edited)), "asked": asked, "damage": damage, "named": named}


def verdicts(found):
    """{judge: Verdict} by the thresholds of the day."""
    return {"exact oracle": fidelity.Measures(**found["oracle"]).verdict,
            "recogniser": recogniser.verdict_by(found["asked"], found["damage"])}


def arms(sample, seed):
    """{arm: picture} whose truth is known."""
    network, generator = fidelity.reference(), torch.Generator().manual_seed(seed)
    lost = fidelity.autoencoded(sample.target)
    found = {"exact target": sample.target, "autoencoded target": images.to_image(lost), "untouched source": sample.image,
             "autoencoded source": images.to_image(fidelity.autoencoded(sample.image)),
             "target of another edit": sample.unseen[0].target, "target of a third edit": sample.unseen[1].target}
    for name, (function, limit) in damages.PIXELS.items():
        for times in STRENGTHS:
            spoiled = function(lost, times * limit, generator).clamp(0, 1)
            found[f"{name} x {times}"] = images.to_image(spoiled)
    with torch.no_grad():
        latent = network.encode(2 * images.to_pixels(sample.target) - 1)[0]
        for name, (smooth, limit) in damages.LATENTS.items():
            for times in STRENGTHS:
                spoiled = network.decode(damages.latent_noise(latent, times * limit, generator, smooth)) / 2 + 0.5
                found[f"{name} x {times}"] = images.to_image(spoiled.clamp(0, 1))
    return found


def key_of(sample, *more):
    """The key of a row: what was measured, and by what. Thresholds are applied later."""
    return digest([[picture_sha256(picture) for picture in (sample.image, sample.target)], sample.prompt, *more])


def judges(args):
    """Print the share that each judge calls mismatch and damaged, arm by arm."""
    rows, networks = [], deciding.sha256_of_networks()
    with Ledger(args.work / f"judges-{args.use}-{args.size}.jsonl") as ledger:
        done = {row.get("key"): row for row in ledger.rows}
        for index, (name, sample) in enumerate(drawn(args)):
            key = key_of(sample, networks, index, STRENGTHS)
            if key not in done:
                done[key] = {"key": key, "index": index, "photograph": name, "kind": sample.kind, "option": sample.option,
                             "arms": {arm: measured(sample, picture) for arm, picture in arms(sample, index).items()}}
                ledger.append(done[key])
            rows.append(done[key])
    summarise(rows)


def edits(args):
    """Print what the judges say of clean edits and of the noise control's, how often they agree, and make contact sheets."""
    editor = sifm_min.load_editor(args.editor)
    hash_weights(editor, args.work)
    about, rows, networks = editor.provenance(), [], deciding.sha256_of_networks()
    path = args.work / f"edits-{Path(args.editor).name}-{args.use}-{args.size}.jsonl"
    with Ledger(path) as ledger:
        done = {row.get("key"): row for row in ledger.rows}
        for index, (name, sample) in enumerate(drawn(args)):
            key = key_of(sample, networks, about["weights"], about["defaults"], args.edit_seed)
            if key not in done:
                noisy = sifm_min.immunize(sample.image, editor, sample.prompt, method="noise").image
                outputs = editor.edit([sample.image, noisy], [sample.prompt] * 2, seed=args.edit_seed)
                found = {"clean": measured(sample, outputs[0]), "noise": measured(sample, outputs[1])}
                done[key] = {"key": key, "index": index, "photograph": name, "kind": sample.kind, "option": sample.option,
                             "prompt": sample.prompt, "arms": found}
                ledger.append(done[key])
                if args.sheets:
                    columns = [(f"source: {sample.prompt}", sample.image), ("exact target", sample.target),
                               ("autoencoded", images.to_image(fidelity.autoencoded(sample.target))),
                               *((caption(arm, found[arm]), output)
                                 for arm, output in zip(("clean", "noise"), outputs, strict=True))]
                    contact_sheet.sheet(columns).save(args.work / f"{path.stem}-{index:03}.png")
            rows.append(done[key])
    summarise(rows)
    for row in rows:
        if not all(v.obeyed for v in verdicts(row["arms"]["clean"]).values()):
            print(f"  {row['index']} {row['kind']} {row['option']}: {caption('clean', row['arms']['clean'])}")


def caption(arm, found):
    """The findings of both judges and their measures, in one line."""
    said = {name: "".join(letter for letter, finding in zip("MD", (v.semantic_mismatch, v.perceptual_degradation), strict=True)
                          if finding) or "obeyed" for name, v in verdicts(found).items()}
    o = found["oracle"]
    return (f"{arm}: oracle {said['exact oracle']} (p {o['progress']:.2f} r {o['residual']:.2f} o {o['outside']:.2f} "
            f"d {o['structure']:.2f} c {o['contrast']:.2f}), recogniser {said['recogniser']} (asked {found['asked']:.2f} "
            f"damage {found['damage']:.2f}, {found['named']})")


def summarise(rows):
    """Print a line for each arm: both judges' findings, and the strict consensus."""
    print(f"{len(rows)} samples; thresholds fixed on {thresholds.FIXED}; percent [95 % interval]")
    for arm in rows[0]["arms"]:
        found = [verdicts(row["arms"][arm]) for row in rows]
        print(f"{arm}:")
        for name in deciding.judges:
            print(f"  {name:13} mismatch {share([v[name].semantic_mismatch for v in found])}, "
                  f"degraded {share([v[name].perceptual_degradation for v in found])}, "
                  f"obeyed {share([v[name].obeyed for v in found])}")
        agreed = [Verdict.consensus(v.values()) for v in found]
        print(f"  {'consensus':13} thwarted {share([v.success for v in agreed])}, obeyed {share([v.obeyed for v in agreed])}")


def share(findings):
    low, high = wilson(sum(findings), len(findings))
    return f"{100 * sum(findings) / len(findings):.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("judges", "edits"))
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--use", choices=("train", "evaluate"), default="train")
    parser.add_argument("--list", type=Path, metavar="FILE",
                        help="the photographs to take in place of those for --use, such as tools/evaluation.jsonl")
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--skip", type=int, default=0, help="photographs to pass over at the start")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--editor", default="miniature")
    parser.add_argument("--edit-seed", type=int, default=1)
    parser.add_argument("--sheets", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("build/judges"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    {"judges": judges, "edits": edits}[args.what](args)


if __name__ == "__main__":
    main()
