"""SIFM, the paper's method: Algorithm 1 of arXiv 2512.14320, in its symbols.

    phi_t(x, c)  =  the tapped activations of the denoiser on the noisy latent of picture x, prompt c, timestep t   (Eq. 3)
    L_t  =  ||phi_t(x_imu, c)||_1 (Eq. 5)  -  lam * MSE(phi_t(x_imu, c), phi_t(x_orig, c)) (Eq. 4)                  (Eq. 6)
    g    =  mean over t in T of the gradient of L_t by x_imu (Eq. 7);   delta <- clip(delta - alpha sign(g), -eps, eps)

E is the VAE encoder's latent, eta the noise, z_t the noisy latent; `pgd.py` is the loop. A larger distance moves the features
away from the original's (semantic mismatch), a smaller norm weakens them (perceptual degradation). The defaults depart in:

- Scale (Eq. 6): norm and squared distance are fractions of the original's L1 norm and squared L2 norm, and the distance counts
  tenfold, so that lam = 0.1 gives both terms the same weight. The paper gives lam but no scale.
- Taps (Eq. 3): each tap has its own loss, and these are averaged. Eq. 3 averages activations, but their shapes differ.
- Start: delta is random, since at zero the distance has no gradient. Its box is budget and pixel range at once (`pgd.py`).

The paper leaves open layers (here `default_taps`), timesteps (10, spread over an edit's), alpha (1/255) and guidance (none);
instruction editors also see E(x). As printed: reduction "literal", aggregate "feature-mean", taps of one shape, init "zero".
"""

import torch

from .models.lean import sent

REDUCTIONS, AGGREGATES, NOISY = ("balanced", "relative", "literal"), ("loss-mean", "feature-mean"), ("paper", "deploy")
BALANCE, KEPT = 10, 8                                        # factor of the distance; prompts whose originals stay in memory


def sifm(editor, x_orig, contexts, *, generator, lam=0.1, timesteps=10, taps=None, reduction="balanced",
         aggregate="loss-mean", noisy="paper", resample=False, batch=None):
    """The objective of SIFM: a function (x_imu, step) -> (loss, {"norm": ..., "dist": ...}) to minimise.

    x_orig: (1,3,H,W) in [0,1], native size. contexts: one text context (1,L,C) per prompt; step n uses prompt n mod their
      number (the paper has one). timesteps: T, a count spread over what the editor visits, or the timesteps themselves.
    reduction: "balanced"; "relative", the same without the factor ten; or "literal", L1 sum and MSE mean as printed: at lam 0.1
      the distance is then about 1e-6 of the norm.
    aggregate: "loss-mean" (default) or "feature-mean", Eq. 3 to the letter, for taps of one shape.
    noisy: "paper" noises the immunized picture's latent; "deploy" the original's, so that delta reaches the denoiser of an
      instruction editor through the image latent alone, as in a real edit, which starts from pure noise.
    resample: draw new noise at every step (the same for both pictures) instead of one bank for all. batch: timesteps run at
      once (None: all). Cost per step: encoder 1F 1B, denoiser |T|F |T|B up to its last tap. Raises ValueError for bad options.
    """
    for value, known, option in ((reduction, REDUCTIONS, "reduction"), (aggregate, AGGREGATES, "aggregate"),
                                 (noisy, NOISY if editor.kind == "instruct" else NOISY[:1], "noisy")):
        if value not in known:
            raise ValueError(f"{option} {value!r}: choose one of {', '.join(known)}")
    T = editor.timesteps(timesteps) if isinstance(timesteps, int) else torch.as_tensor(timesteps)
    if min(len(T), len(contexts), 1 if batch is None else batch) < 1:
        raise ValueError("SIFM needs at least one prompt, one timestep, and one timestep in a batch")
    taps, batches = list(editor.default_taps if taps is None else taps), T.split(batch or len(T))
    with torch.no_grad():
        E_orig = editor.encode(editor.resize(x_orig))        # (1,C,h,w)
    texts = [editor.prepare_text(c) for c in contexts]       # constant over pictures and steps, as are the times
    times = [[editor.prepare_timesteps(t, c) for t in batches] for c in contexts]

    def draw():
        eta = torch.randn((len(T), *E_orig.shape[1:]), generator=generator)
        return sent(eta, E_orig.device, E_orig.dtype).split(batch or len(T))

    def phi(*, E, t, time, eta, text):
        """Eq. 3 before the mean over taps: activations (t, ...) in float32. time: timestep t as the denoiser wants it."""
        z_t = editor.noise_latent((E if noisy == "paper" else E_orig).expand(len(t), -1, -1, -1), eta, t)
        tapped = editor.features(E.expand(len(t), -1, -1, -1), z_t, time, text, taps=taps)
        activations = [a.float() for a in tapped.values()]
        if aggregate == "feature-mean" and len({a.shape for a in activations}) > 1:
            raise ValueError(f"aggregate 'feature-mean' averages activations of one shape; {', '.join(taps)} differ")
        return activations if aggregate == "loss-mean" else [torch.stack(activations).mean(0)]

    bank, Phi_orig = draw(), {}                              # prompt -> per batch of T, computed once
    told, leaves = list(texts), []                           # the texts for x_imu: text_refinement.py replaces them

    def objective(x_imu, step):
        nonlocal bank
        n = step % len(contexts)
        bank = draw() if resample and step > 0 else bank
        inputs = [{"t": t, "time": time, "eta": eta, "text": texts[n]}
                  for t, time, eta in zip(batches, times[n], bank, strict=True)]
        if n not in Phi_orig or resample:
            if len(contexts) > KEPT:
                Phi_orig.clear()                             # one of many comes back too late to be worth its memory
            with torch.no_grad():
                Phi_orig[n] = [phi(E=E_orig, **at) for at in inputs]
        E = editor.encode(editor.resize(x_imu))
        E_imu, norm, dist = E.detach().requires_grad_(True), 0.0, 0.0
        for at, phi_orig in zip(inputs, Phi_orig[n], strict=True):
            norm_t, dist_t = (x.sum() / len(T) for x in terms(phi(E=E_imu, **at | {"text": told[n]}), phi_orig, reduction))
            (norm_t - lam * dist_t).backward(inputs=[E_imu, *leaves])        # adds to E_imu.grad: g by E
            norm, dist = norm + norm_t.detach(), dist + dist_t.detach()
        loss = norm - lam * dist + ((E - E.detach()) * E_imu.grad).sum()     # passes g on to x_imu: see pgd.py
        return loss, {"norm": norm, "dist": dist}

    def passes(steps, again=False):                          # of single pictures; again: of a second evaluation of each step
        prompts = steps if resample else 0 if again else steps if len(contexts) > KEPT else min(steps, len(contexts))
        return {"encoder_forward": steps + (not again), "encoder_backward": steps,
                "denoiser_forward": len(T) * (steps + prompts), "denoiser_backward": len(T) * steps}

    objective.passes, objective.passes_again = passes, lambda steps: passes(steps, again=True)
    objective.texts, objective.leaves = told, leaves
    return objective


def terms(phi_imu, phi_orig, reduction):
    """Eq. 5's norm and Eq. 4's distance per timestep, (t,) each, averaged over the taps; activations (t, ...) in float32."""
    pairs = []
    for a, b in zip(phi_imu, phi_orig, strict=True):
        a, b = a.flatten(1), b.flatten(1)
        l1, l2 = a.abs().sum(1), (a - b).square().sum(1)
        if reduction == "literal":
            pairs.append((l1, l2 / a.shape[1]))
        else:
            pairs.append((l1 / b.abs().sum(1), l2 / b.square().sum(1) * (BALANCE if reduction == "balanced" else 1)))
    return tuple(torch.stack(values).mean(0) for values in zip(*pairs, strict=True))
