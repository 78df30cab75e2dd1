"""DeContext: the method against editors that see the picture as reference tokens."""

import torch

from ..models.lean import sent

LOW = 980                                                    # the least noisy timestep of training that it draws, of 1000


def decontext(editor, x_orig, contexts, *, generator, blocks=None, low=LOW):
    """Starve the target of the picture: reduce the attention that it pays to the picture's tokens.

        rho_l = mean over heads and target tokens of the attention's share that goes to reference tokens, in block l
        L     = mean over blocks l of rho_l(E(x'), eta, t, c);   t uniform in [low, 1000), eta fresh, no picture in z_t

    arXiv 2512.16625 ("DeContext"), and its released code for FLUX.1 Kontext, which holds the picture in bfloat16 and truncates
    it to 8 bits; neither is reproduced. It draws each prompt from 59 and has guidance 3.5 and pictures of 512 pixels; here the
    prompts given take turns (`any_prompt` draws), and guidance and size are the editor's own. Targets the denoiser's attention,
    by way of the encoder.
    blocks: how many single blocks, from the first one; None: those of `editor.context_blocks` (on Kontext the first 26 of
      38, as in the code; on klein the double blocks and the same share of the single ones, which is ours).
    low: the least noisy timestep. Later blocks do not run.
    Cost: encoder 1F 1B, denoiser 1F 1B up to the last of the blocks. native: 800 iterations of 0.0025 from zero.
    """
    if not hasattr(editor, "context_mass"):
        raise ValueError("decontext reduces the attention to a picture's reference tokens, and the denoiser of "
                         f"{editor.name} has none: choose an editor that has, such as flux-kontext or flux-klein")
    trained = editor.scheduler.config.num_train_timesteps
    if not 0 <= low < trained:
        raise ValueError(f"low {low}: a timestep from 0 to {trained - 1}")
    singles = [name for name in editor.tap_names if name.startswith("single") and name.count(".") == 1]
    if blocks is not None and not 1 <= blocks <= len(singles):
        raise ValueError(f"blocks {blocks}: from 1 to {len(singles)}, the number of single blocks of {editor.name}")
    chosen = editor.context_blocks if blocks is None else singles[:blocks]
    texts = [editor.prepare_text(context) for context in contexts]

    def objective(x_imu, step):
        n = step % len(contexts)
        E = editor.encode(editor.resize(x_imu))
        t = torch.randint(low, trained, (1,), generator=generator)
        eta = sent(torch.randn(editor.scaled(E).shape, generator=generator), E.device, E.dtype)
        rho = editor.context_mass(E, eta, t, texts[n], blocks=chosen).mean()
        return rho, {"context": rho}

    objective.passes = lambda steps: {"encoder_forward": steps, "encoder_backward": steps, "denoiser_forward": steps,
                                      "denoiser_backward": steps}
    objective.see = None                                     # it never looks at the original
    return objective
