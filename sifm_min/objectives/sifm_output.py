"""SIFM at the denoiser's output: another reading of what the paper leaves open, chosen on photographs that no table reports."""

from ..sifm import sifm


def sifm_output(editor, x_orig, contexts, *, generator, lam=1000.0, timesteps=4, resample=False, batch=None):
    """SIFM (see sifm.py) with other choices for what the paper does not say: the prediction itself is moved.

    Taps (Eq. 3): the denoiser's output alone, its last tap. What an edit adds up is this prediction, so a change of it is a
      change of the edit; deep features may change without.
    Weight (Eq. 6): lam 1000, so the distance decides and the norm hardly counts.
    Noise: instruction editors get the original's noisy latent ("deploy"), for in an edit the perturbation reaches the denoiser
      beside the noise alone; img2img gets the picture's own, as the paper has it.
    timesteps: 4 where SIFM has 10, spread over an edit's.
    Cost per step: encoder 1F 1B, denoiser |T|F |T|B, all of it. Raises ValueError as `sifm` does.
    """
    return sifm(editor, x_orig, contexts, generator=generator, lam=lam, timesteps=timesteps, taps=[editor.tap_names[-1]],
                noisy="deploy" if editor.kind == "instruct" else "paper", resample=resample, batch=batch)
