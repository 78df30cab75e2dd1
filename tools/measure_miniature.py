"""Measure a miniature editor on photographs: does it obey, does noise matter, does immunization thwart it.

    python tools/measure_miniature.py edits --editor miniature          100 samples: clean, noise, SIFM, unseen prompts
    python tools/measure_miniature.py edits --photos FOLDER             of your photographs instead of those that ship
    python tools/measure_miniature.py edits --noisy deploy              the same with another option of SIFM
    python tools/measure_miniature.py plain --samples 10                difference of SIFM's fast step from plain code
    python tools/measure_miniature.py bfloat16 --samples 20             loss of SIFM with denoiser and VAE in bfloat16

Results go to --work, one JSON line per sample; a run that was interrupted goes on, and --shard 0/2 and 1/2 share the work.
Shares are given with their 95 % Wilson interval. "of clean successes": among the samples whose edit obeys on the clean picture.
Mismatch and damage are those that both judges find. `tools/measure_judges.py` measures the judges themselves.
"""

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sifm_min  # noqa: E402
from sifm_min import images, miniature, pgd, sifm  # noqa: E402
from sifm_min.files.digests import digest, picture_sha256  # noqa: E402
from sifm_min.files.ledger import Ledger, read_rows  # noqa: E402
from sifm_min.files.weight_digests import hash_weights  # noqa: E402
from sifm_min.judging.intervals import wilson  # noqa: E402
from sifm_min.miniature import deciding, photographs  # noqa: E402
from sifm_min.miniature.verdict import Verdict  # noqa: E402


def edits(args):
    editor = sifm_min.load_editor(args.editor)
    args.work.mkdir(parents=True, exist_ok=True)
    hash_weights(editor, args.work)
    about, judges = editor.provenance(), deciding.sha256_of_judges()
    part, parts = (int(p) for p in args.shard.split("/"))
    samples = drawn(args)
    keys = [digest([[picture_sha256(one.image) for one in (sample, *sample.unseen)], sample.prompt, sample.unseen_prompts,
                    about["weights"], about["defaults"], judges, args.steps, args.edit_seed, args.noisy])
            for sample in samples]                           # what decides a row; rows of other runs are passed over
    with Ledger(args.work / f"edits-{part}of{parts}.jsonl") as ledger:
        done = {row["key"] for row in ledger.rows}
        for index in range(part, len(samples), parts):
            if keys[index] not in done:
                ledger.append({"key": keys[index], **measure(editor, samples[index], args)})
    known = {row["key"]: row for file in sorted(args.work.glob("edits-*of*.jsonl")) for row in read_rows(file)}
    summarise(args.editor, [known[key] for key in keys if key in known])


def drawn(args):
    """The samples: of the photographs that ship, or of a folder's, or of those of a list."""
    found = photographs.of_folder(args.photos, notes=args.list) if args.photos else None
    return miniature.samples(args.samples, args.seed, pictures=found)


def measure(editor, sample, args):
    """Verdicts (both judges and their consensus) of every edit of one sample, and the pictures' distances."""
    options = {} if args.noisy == "default" else {"noisy": args.noisy}
    started = time.perf_counter()
    prompt = sample.prompt
    sifm = sifm_min.immunize(sample.image, editor, prompt, method="sifm", steps=args.steps, **options)
    seconds = time.perf_counter() - started
    noise = sifm_min.immunize(sample.image, editor, prompt, method="noise")
    arms = {"clean": sample.image, "noise": noise.image, "sifm": sifm.image}
    asked = (sample, *sample.unseen)
    record = {"kind": sample.kind, "category": sample.category, "photograph": sample.photograph, "prompt": prompt,
              "seconds": seconds, "linf": sifm.report["linf_steps"]}
    for arm, picture in arms.items():
        cases = asked if arm != "noise" else asked[:1]
        outputs = editor.edit([picture] * len(cases), [case.prompt for case in cases], seed=args.edit_seed)
        record[arm] = [verdicts(case, output) for case, output in zip(cases, outputs, strict=True)]
    return record


def verdicts(sample, edited):
    found = {name: judge(sample, edited) for name, judge in miniature.judges.items()}
    consensus = Verdict.consensus(found.values())
    return {"obeyed": consensus.obeyed, "success": consensus.success, "mismatch": consensus.semantic_mismatch,
            "damage": consensus.perceptual_degradation,
            **{name: [v.semantic_mismatch, v.perceptual_degradation] for name, v in found.items()}}


def summarise(name, records):
    total = len(records)
    if not total:
        return
    print(f"{name}: {total} samples, wordings that were never trained")
    for arm in ("clean", "noise", "sifm"):
        print(f"  {arm:6} original prompt: obeyed {share(sum(r[arm][0]['obeyed'] for r in records), total)}, "
              f"thwarted {share(sum(r[arm][0]['success'] for r in records), total)}")
    for label, pick in (("original prompt", slice(0, 1)), ("five unseen prompts", slice(1, None))):
        for arm in ("noise", "sifm"):
            pairs = [(a, b) for r in records for a,
                     b in zip(r["clean"][pick], r[arm][pick], strict=False) if a["obeyed"]]
            if pairs:
                print(f"  {arm:6} {label}, of clean successes: "
                      f"still obeyed {share(sum(b['obeyed'] for _, b in pairs), len(pairs))}, "
                      f"thwarted {share(sum(b['success'] for _, b in pairs), len(pairs))}, "
                      f"mismatch {share(sum(b['mismatch'] for _, b in pairs), len(pairs))}, "
                      f"damage {share(sum(b['damage'] for _, b in pairs), len(pairs))}")
    kinds = defaultdict(list)
    for r in records:
        kinds[r["kind"]].append(r["clean"][0]["obeyed"])
    print("  clean, by kind: " + ", ".join(f"{kind} {sum(v)}/{len(v)}" for kind, v in sorted(kinds.items())))
    seconds = sorted(r["seconds"] for r in records)[total // 2]
    print(f"  SIFM: median {seconds:.1f} s a picture, at most {max(r['linf'] for r in records)}/255")


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
            verdict[name].append(verdicts(sample, edited)["success"])
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
    parser.add_argument("what", choices=("edits", "plain", "bfloat16"))
    parser.add_argument("--editor", default="miniature")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="photographs (default: those that ship)")
    parser.add_argument("--list", type=Path, metavar="FILE", help="the photographs to take, such as tools/evaluation.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--edit-seed", type=int, default=1,
                        help="of the attacker's noise; the default is not the one that SIFM draws its own noise from")
    parser.add_argument("--noisy", choices=("default", "paper", "deploy"), default="default")
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/measurements"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    {"edits": edits, "plain": plain, "bfloat16": bfloat16}[args.what](args)


if __name__ == "__main__":
    main()
