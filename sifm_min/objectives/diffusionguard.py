"""DiffusionGuard: the prediction at an edit's noisiest step, made small."""

import torch

from ..baselines import passes
from ..models.lean import sent
from ..models.schedulers import FlowScheduler


def diffusionguard(editor, x_orig, contexts, *, generator, noisiest_of=4):
    """DiffusionGuard: maximise the norm of what the denoiser predicts at the first, noisiest step of an edit.

        L = - || eps_t(z_T, E(x'), c) ||_2         z_T the start of an edit in `noisiest_of` steps, t its timestep, eta fresh

    Choi et al. 2025 (ICLR; arXiv 2410.05694), and its released code for inpainting. Targets the denoiser, by the encoder.
    Early steps decide the layout of an edit, and in an instruction editor z_T is pure noise: the picture enters beside it.
    noisiest_of: the steps of the edit whose first one counts (the original: 4 of the sampler's).
    The original edits inside masks, and shrinks the mask at random at every step for masks to come. Instruction editors and
      img2img have no mask: neither is here. It runs 800 iterations, here the protocol's.
    By img2img z_T is the latent of x', noised as far as the editor's strength says. On editors of rectified flow (ours) the
      velocity takes the place of eps_t: at sigma 1 the noise that it implies is eta, without a gradient.
    Cost: encoder 1F 1B, denoiser 1F 1B. native: 800 iterations of 0.00196 from zero.
    """
    if noisiest_of < 1:
        raise ValueError(f"noisiest_of {noisiest_of}: an edit has at least one step")
    texts = [editor.prepare_text(context) for context in contexts]
    flow = isinstance(editor.scheduler, FlowScheduler)

    def objective(x_imu, step):
        pixels = editor.resize(x_imu)
        E = editor.encode(pixels)
        plan = editor.plan_at(*pixels.shape[2:], noisiest_of)
        eta = sent(torch.randn(editor.scaled(E).shape, generator=generator), E.device, E.dtype)
        z_T, t = plan.scale_input(editor.first_latent(E, eta, plan), 0), plan.timesteps[:1]
        prediction = editor.predict(E, z_T, t, texts[step % len(texts)]).to(E)
        return -(prediction if flow else editor.noise_prediction(prediction, z_T, t)).norm()

    objective.passes = lambda steps: passes(encoder=(steps, steps), denoiser=(steps, steps))
    objective.see = None                                     # it never looks at the original
    if flow:
        objective.note = ("the paper has no editor of rectified flow: the velocity in place of the noise, at the noisiest step "
                          "of an edit, is ours")
    return objective
