"""SIFM, the paper's method: Algorithm 1 of arXiv 2512.14320, in its symbols.

    phi_t(x, c)  =  the tapped activations of the denoiser on the noisy latent of picture x, prompt c, timestep t   (Eq. 3)
    L_t  =  ||phi_t(x_imu, c)||_1  -  lam * Dist(phi_t(x_imu, c), phi_t(x_orig, c))                                 (Eq. 6)
    g    =  mean over t in T of the gradient of L_t by x_imu;   delta <- clip(delta - alpha sign(g), -eps, eps)     (Eq. 7)

This file is phi and L; `pgd.py` is the loop. The distance drives the features from the original edit's trajectory
(semantic mismatch), the norm starves them (perceptual degradation). Where the paper is silent, each default says why.
"""

import torch

REDUCTIONS = ("balanced", "relative", "mean", "literal")
BALANCE = 10                                                 # 1 / 0.1: at the paper's lam both fractions count alike
AGGREGATES = ("loss-mean", "feature-mean")
NOISY = ("paper", "deploy")


def sifm(editor, x_orig, contexts, *, generator, lam=0.1, timesteps=10, taps=None, reduction="balanced",
         aggregate="loss-mean", noisy="paper", resample=False, batch=None):
    """The objective of SIFM: a function (x_imu, step) -> (loss, {"norm": ..., "dist": ...}) to minimise.

    x_orig: (1,3,H,W) in [0,1], native size; or B pictures with a list of B generators, which gives each the noise it would
    have alone, and a loss for each, (B,). contexts: one text context (1,L,C) per prompt; step n uses prompt n mod their
    number (the paper has one). timesteps: T, a count spread over what the editor visits, or the timesteps themselves.
    reduction: "relative" (norm and squared distance as fractions of the original's, so that lam means the same on every
      editor, size and layer), "balanced" (default: the same with the distance in tenths, so that both count alike at lam
      0.1: the paper found its optimum there and does not say of what scale, and as plain fractions the norm drowns the
      distance), "literal" (L1 sum and MSE mean as printed; the distance term is then inert: at lam 0.1 it is about 1e-6
      of the norm term), or "mean" (both means).
    aggregate: "loss-mean" (default: U-Net layers differ in shape, and averaged activations can cancel) or "feature-mean",
      Eq. 3 to the letter, for taps of one shape.
    noisy: "paper" noises the immunized picture's latent; "deploy" the original's, because what an instruction editor
      denoises never contains delta: there it enters through the image condition alone.
    resample: draw new noise at every step (the same for both pictures) instead of one bank for all.
    batch: timesteps run at once (None: all). Cost per step and picture: one VAE encode and backward, |T| forwards and
      backwards of the denoiser up to its last tap. Raises ValueError for unknown options and taps.
    """
    for value, known, option in ((reduction, REDUCTIONS, "reduction"), (aggregate, AGGREGATES, "aggregate"),
                                 (noisy, NOISY, "noisy")):
        if value not in known:
            raise ValueError(f"{option} {value!r}: choose one of {', '.join(known)}")
    T = editor.timesteps(timesteps) if isinstance(timesteps, int) else torch.as_tensor(timesteps)
    if min(len(T), len(contexts), 1 if batch is None else batch) < 1:
        raise ValueError("SIFM needs at least one prompt, one timestep, and one timestep in a batch")
    taps = list(editor.default_taps if taps is None else taps)
    batches = T.split(batch or len(T))
    B, generators = len(x_orig), generator if isinstance(generator, list) else [generator]
    if len(generators) != B:
        raise ValueError(f"SIFM needs a generator for each picture: {B}, not {len(generators)}")
    with torch.no_grad():
        E_orig = editor.encode(editor.resize(x_orig))        # (B,C,h,w)

    def draw():
        noise = torch.stack([torch.randn((len(T), *E_orig.shape[1:]), generator=own) for own in generators])
        return [eta.flatten(0, 1).to(E_orig) for eta in noise.split(batch or len(T), dim=1)]         # (B t,C,h,w)

    texts = [editor.prepare_text(c) for c in contexts]       # what neither the picture nor the step changes

    def phi(E, t, when, eta, text):
        E = E.repeat_interleave(len(t), 0)                   # all timesteps of a picture, then those of the next
        z_t = editor.noise_latent(E if noisy == "paper" else E_orig.repeat_interleave(len(t), 0), eta, t.repeat(B))
        found = [a.float() for a in editor.features(E, z_t, when, text, taps=taps).values()]
        if aggregate == "loss-mean":
            return found
        if len({a.shape for a in found}) > 1:
            raise ValueError(f"aggregate 'feature-mean' averages activations of one shape; {', '.join(taps)} differ")
        return [torch.stack(found).mean(0)]

    bank = draw()
    times, Phi_orig = {}, {}                                 # prompt -> per batch of T: computed once, as texts are

    def objective(x_imu, step):
        nonlocal bank
        n = step % len(contexts)
        if resample and step > 0:
            bank = draw()
        if n not in times:
            times[n] = [editor.prepare_timesteps(t.repeat(B), contexts[n]) for t in batches]
        if n not in Phi_orig or resample:
            with torch.no_grad():
                Phi_orig[n] = [phi(E_orig, *rest, texts[n]) for rest in zip(batches, times[n], bank, strict=True)]
        E = editor.encode(editor.resize(x_imu))
        E_imu = E.detach().requires_grad_(True)              # gradients of all of T meet here: one VAE backward per step
        norm, dist, g = 0.0, 0.0, torch.zeros_like(E_imu)
        for t, when, eta, original in zip(batches, times[n], bank, Phi_orig[n], strict=True):
            found = terms(phi(E_imu, t, when, eta, texts[n]), original, reduction)
            norm_t, dist_t = (term.view(B, -1).sum(1) / len(T) for term in found)                    # (B,)
            g = g + torch.autograd.grad((norm_t - lam * dist_t).sum(), E_imu)[0]
            norm, dist = norm + norm_t.detach(), dist + dist_t.detach()
        # The losses' values and, through E, their gradients.
        loss = (norm - lam * dist) + ((E - E.detach()) * g).flatten(1).sum(1)
        loss, norm, dist = (value if B > 1 else value[0] for value in (loss, norm, dist))
        return loss, {"norm": norm.tolist(), "dist": dist.tolist()}

    def passes(steps):
        """What `steps` steps cost, in single-picture passes; the original's features are forward passes as well."""
        prompts = steps if resample else min(steps, len(contexts))
        return {"encoder_forward": steps + 1, "encoder_backward": steps,
                "denoiser_forward": len(T) * (steps + prompts), "denoiser_backward": len(T) * steps}

    objective.passes = passes
    return objective


def terms(phi_imu, phi_orig, reduction):
    """Eq. 5's norm and Eq. 4's distance per timestep, (t,) each, averaged over the taps; activations (t, ...) in float32."""
    norms, dists = [], []
    for a, b in zip(phi_imu, phi_orig, strict=True):
        a, b = a.flatten(1), b.flatten(1)
        l1, l2 = a.abs().sum(1), (a - b).square().sum(1)
        if reduction in ("relative", "balanced"):
            l1, l2 = l1 / b.abs().sum(1), l2 / b.square().sum(1) * (BALANCE if reduction == "balanced" else 1)
        else:
            l2 = l2 / a.shape[1]
            l1 = l1 / a.shape[1] if reduction == "mean" else l1
        norms.append(l1)
        dists.append(l2)
    return torch.stack(norms).mean(0), torch.stack(dists).mean(0)
