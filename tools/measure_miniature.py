"""Measure SIFM on a miniature editor: readings of what the paper leaves open, plain code, bfloat16.

    python tools/measure_miniature.py readings --samples 12             what to choose where the paper does not say
    python tools/measure_miniature.py plain --samples 10                difference of SIFM's fast step from plain code
    python tools/measure_miniature.py bfloat16 --samples 20             loss of SIFM with denoiser and VAE in bfloat16

`readings` runs on the photographs that ship, which no table of methods reports; `sifm_min.evaluate` makes those tables, on
other photographs. Its results go to --work, one JSON line each; a run that was interrupted goes on, and --shard 0/2 and 1/2
share the work. Shares have their 95 % Wilson interval. Thwarted, mismatch and damage are what both judges find; the measures
behind them are means. `tools/measure_judges.py` measures the judges themselves.
"""

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from measure_judges import measured, verdicts  # noqa: E402

import sifm_min  # noqa: E402
from sifm_min import images, miniature, pgd, sifm  # noqa: E402
from sifm_min.files.digests import digest, picture_sha256  # noqa: E402
from sifm_min.files.ledger import Ledger, read_rows  # noqa: E402
from sifm_min.files.weight_digests import hash_weights  # noqa: E402
from sifm_min.judging.intervals import wilson  # noqa: E402
from sifm_min.miniature import deciding, photographs  # noqa: E402
from sifm_min.miniature.verdict import Verdict  # noqa: E402

# Readings of what the paper leaves open, beside the controls: name -> (method, options). "last" is the editor's last tap.
READINGS = {
    "noise": ("noise", {}), "photoguard-encoder": ("photoguard-encoder", {}), "sifm": ("sifm", {}),
    "deploy": ("sifm", {"noisy": "deploy"}), "4 timesteps, deploy": ("sifm", {"noisy": "deploy", "timesteps": 4}),
    "output": ("sifm", {"noisy": "deploy", "timesteps": 4, "taps": "last"}),
    "output, distance alone (sifm-output)": ("sifm-output", {}),
    "output, 2 high timesteps": ("sifm-output", {"timesteps": [999, 624]}),
    "output, 2 low timesteps": ("sifm-output", {"timesteps": [499, 249]})}


def readings(args):
    """Measure every one of `READINGS` on each sample, and print the table of those samples that all of them have."""
    editor = sifm_min.load_editor(args.editor)
    args.work.mkdir(parents=True, exist_ok=True)
    hash_weights(editor, args.work)
    about, judges = editor.provenance(), deciding.sha256_of_judges()
    part, parts = (int(p) for p in args.shard.split("/"))
    samples = drawn(args)
    keys = [digest([[picture_sha256(one.image) for one in (sample, *sample.unseen)], sample.prompt, sample.unseen_prompts,
                    about["weights"], about["defaults"], judges, args.steps, args.edit_seed])
            for sample in samples]                           # what decides a row; rows of other runs are passed over
    with Ledger(args.work / f"readings-{part}of{parts}.jsonl") as ledger:
        done = {(row["key"], row["reading"]) for row in ledger.rows}
        for index in range(part, len(samples), parts):
            for name in ("clean", *READINGS):
                if (keys[index], name) not in done:
                    ledger.append({"key": keys[index], "reading": name, **measure(editor, samples[index], name, args)})
    rows = [row for file in sorted(args.work.glob("readings-*of*.jsonl")) for row in read_rows(file) if row["key"] in keys]
    summarise(args.editor, rows)


def drawn(args):
    """The samples: of the photographs that ship, or of a folder's."""
    found = photographs.of_folder(args.photos) if args.photos else None
    return miniature.samples(args.samples, args.seed, pictures=found)


def measure(editor, sample, name, args):
    """The verdicts and the measures of the edits of one sample after one reading, for its prompt and its unseen ones."""
    picture, seconds = sample.image, 0.0
    if name != "clean":
        method, options = READINGS[name]
        options = {key: [editor.tap_names[-1]] if value == "last" else value for key, value in options.items()}
        started = time.perf_counter()
        picture = sifm_min.immunize(sample.image, editor, sample.prompt, method=method, steps=args.steps, **options).image
        seconds = time.perf_counter() - started
    asked = (sample, *sample.unseen)
    outputs = editor.edit([picture] * len(asked), [case.prompt for case in asked], seed=args.edit_seed)
    return {"seconds": seconds, "edits": [counted(case, output) for case, output in zip(asked, outputs, strict=True)]}


def counted(sample, edited):
    """The consensus of both judges on an edit, and the numbers behind it."""
    found = measured(sample, edited)
    consensus = Verdict.consensus(verdicts(found).values())
    return {"obeyed": consensus.obeyed, "thwarted": consensus.success, "mismatch": consensus.semantic_mismatch,
            "damage": consensus.perceptual_degradation, "score of damage": found["damage"],
            **{name: found["oracle"][name] for name in ("residual", "structure", "contrast")}}


def summarise(name, rows):
    """Print the table: shares and means over the edits that both judges accept on the clean picture."""
    found = defaultdict(dict)
    for row in rows:
        found[row["key"]][row["reading"]] = row
    whole = [each for each in found.values() if each.keys() >= {"clean", *READINGS}]
    working = [(each, i) for each in whole for i, edit in enumerate(each["clean"]["edits"]) if edit["obeyed"]]
    print(f"{name}: {len(whole)} pictures, {len(working)} edits that both judges accept on the clean picture")
    if not working:
        return
    shares, means = ("thwarted", "mismatch", "damage"), ("residual", "structure", "contrast", "score of damage")
    print("| reading | " + " | ".join((*shares, *means, "seconds")) + " |\n|" + "---|" * (2 + len(shares) + len(means)))
    for reading in ("clean", *READINGS):
        edits = [each[reading]["edits"][i] for each, i in working]
        cells = [share(sum(edit[what] for edit in edits), len(edits)) for what in shares]
        cells += [f"{sum(edit[what] for edit in edits) / len(edits):.3f}" for what in means]
        seconds = sum(each[reading]["seconds"] for each in whole) / len(whole)
        print(f"| {reading} | " + " | ".join(cells) + f" | {seconds:.1f} |")


def share(count, total):
    low, high = wilson(count, total)
    return f"{count}/{total} = {100 * count / max(1, total):.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def plain(args):
    """Compare whole runs with runs of the same loss in plain code."""
    editor = sifm_min.load_editor(args.editor)
    beside(args, editor, {"fast": (editor, sifm.sifm), "plain": (editor, plainly)})


def bfloat16(args):
    """Compare whole runs with runs in which denoiser, text encoder and VAE are in bfloat16."""
    editor = sifm_min.load_editor(args.editor, dtype=torch.float32)
    half = sifm_min.load_editor(args.editor, dtype=torch.bfloat16, vae_dtype=torch.bfloat16)
    beside(args, editor, {"float32": (editor, sifm.sifm), "bfloat16": (half, sifm.sifm)})


def beside(args, attacker, runs):
    """Two runs for each picture, {name: (editor, objective)}: signs of the first step, final loss, and verdicts on the
    attacker's edits of the results."""
    (one, other), signs, losses, verdict = runs, [], [], {name: [] for name in runs}
    for index, sample in enumerate(drawn(args)):
        prompt, pixels = sample.prompt, images.to_pixels(sample.image)
        ended = {}
        for name, (editor, objective) in runs.items():
            with torch.no_grad():
                contexts = editor.contexts([prompt])
            generator, told = torch.Generator().manual_seed(0), []
            run = objective(editor, pixels, contexts, generator=generator)
            steps = []

            def keep(x, step, run=run, steps=steps):
                found = run(x, step)
                if step == 0:
                    steps.append(torch.autograd.grad(found[0], x, retain_graph=True)[0].sign())
                return found
            delta = pgd.pgd(pixels, keep, 0.03, steps=args.steps, step_size=1 / 255, generator=generator,
                            on_step=lambda step, loss, terms, told=told: told.append(loss))
            picture = images.quantize(images.picture(sample.image), delta, 0.03)
            edited = attacker.edit(picture, prompt, seed=args.edit_seed)
            verdict[name].append(miniature.judge(sample, edited).success)
            ended[name] = steps[0], told[-1]
        signs.append((ended[one][0] == ended[other][0]).float().mean().item())
        losses.append(abs(ended[one][1] / ended[other][1] - 1))
        print(f"  {index}: signs {100 * signs[-1]:.3f} %, final loss {ended[one][1]:.4f} and {ended[other][1]:.4f}", flush=True)
    print(f"{args.editor}: {args.samples} pictures, {args.steps} steps; of the first step's signs {100 * min(signs):.3f} % "
          f"agree at the least and {100 * sum(signs) / len(signs):.4f} % in the mean; final losses differ by "
          f"{100 * max(losses):.2f} % at the most, {100 * sum(losses) / len(losses):.2f} % in the mean")
    for name, found in verdict.items():
        print(f"  thwarted, {name}: {share(sum(found), len(found))}")
    print(f"  another verdict: {sum(a != b for a, b in zip(*verdict.values(), strict=True))} of {len(losses)}")


def plainly(editor, x_orig, contexts, *, generator):
    """SIFM's objective of one prompt, the same loss in plain code: for each timestep an encoding, the whole denoiser, and a
    gradient down to the pixels; plain layers, which keep what training would need."""
    networks = (editor.denoiser, editor.vae)
    T, taps = editor.timesteps(10), editor.default_taps

    def phi(x, t, eta):
        E = editor.encode(editor.resize(x))
        z_t = editor.noise_latent(E, eta, t)
        # Request every activation, so that the whole network runs; only the tapped ones are used.
        found = editor.features(E, z_t, t, contexts[0], taps=editor.tap_names)
        return [found[tap] for tap in taps]

    bank = torch.randn((len(T), *editor.encode(editor.resize(x_orig)).shape[1:]), generator=generator).split(1)
    with torch.no_grad():
        Phi_orig = [phi(x_orig, t, eta) for t, eta in zip(T.split(1), bank, strict=True)]

    def objective(x_imu, step):
        for network in networks:
            network.requires_grad_(True)
        norm = dist = g = 0
        for t, eta, original in zip(T.split(1), bank, Phi_orig, strict=True):
            x = x_imu.detach().requires_grad_(True)
            norm_t, dist_t = (part.sum() / len(T) for part in sifm.terms(phi(x, t, eta), original, "balanced"))
            g = g + torch.autograd.grad(norm_t - 0.1 * dist_t, x)[0]
            norm, dist = norm + norm_t.item(), dist + dist_t.item()
        for network in networks:
            network.requires_grad_(False)
        return norm - 0.1 * dist + ((x_imu - x_imu.detach()) * g).sum(), {"norm": norm, "dist": dist}

    return objective


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("readings", "plain", "bfloat16"))
    parser.add_argument("--editor", default="miniature")
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="photographs (default: those that ship)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--edit-seed", type=int, default=1,
                        help="of the attacker's noise; the default is not the one that SIFM draws its own noise from")
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/measurements"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    {"readings": readings, "plain": plain, "bfloat16": bfloat16}[args.what](args)


if __name__ == "__main__":
    main()
