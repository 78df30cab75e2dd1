"""DiffusionGuard: the prediction at an edit's noisiest step, made large."""

import torch

from ..baselines import passes
from ..models.lean import sent
from ..models.schedulers import FlowScheduler


def diffusionguard(editor, x_orig, contexts, *, generator):
    """DiffusionGuard: maximise the norm of what the denoiser predicts at the first, noisiest step of an edit.

        L = - || eps_t(z_T, E(x'), c) ||_2         z_T the start of the editor's own edit, t its timestep, eta fresh

    Choi et al. 2025 (ICLR; arXiv 2410.05694), and its released code for inpainting. Targets the denoiser, by the encoder.
    Early steps decide the layout of an edit, and in an instruction editor z_T is pure noise: the picture enters beside it.
    The original takes the first timestep of a sampler in 4 steps, about 751 of 1000, the empty prompt, and 800 iterations;
      here they are the editor's own, the prompt's, and the protocol's. It edits inside masks, and shrinks the mask at random
      at every step for masks to come; instruction editors and img2img have no mask.
    By img2img z_T is the latent of x', noised as far as the editor's strength says. On editors of rectified flow (ours) the
      velocity takes the place of eps_t: at sigma 1 the noise that it implies is eta, without a gradient.
    Cost: encoder 1F 1B, denoiser 1F 1B. native: 800 iterations of 0.00196 from zero. Raises ValueError where img2img starts at
      pure noise, because z_T then has nothing of the picture.
    """
    plan = editor.plan_at(*editor.resize(x_orig).shape[2:])
    texts = [editor.prepare_text(context) for context in contexts]
    flow = isinstance(editor.scheduler, FlowScheduler)
    if flow and editor.kind == "img2img" and plan.timesteps[0] >= editor.scheduler.config.num_train_timesteps:
        raise ValueError("diffusionguard looks at the start of an edit, which by img2img of this strength and number of steps "
                         "is pure noise and has nothing of the picture: give a smaller strength")

    def objective(x_imu, step):
        E = editor.encode(editor.resize(x_imu))
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
