"""The methods that SIFM is compared with: the seven of the paper's tables, and the noise control.

Each is an objective for the loop of `pgd.py`, called like `sifm.sifm`, and written from its formula, without code or assets of
the originals. By default all run under one protocol: the paper's budget and 100 iterations, steps of 1/255 and a random start,
which are ours. The preset "native" (`NATIVE`, at the end) runs a method with its original's settings. No preset changes the
budget, because it limits how visible the perturbation is.

    E(x)   the mean of the VAE's posterior, unscaled: the image latent
    z(x)   the same in the denoiser's scale;   z_t = noise_latent(E, eta, t), the noisy latent
    eps_t(x, c)   the noise that the denoiser predicts in z_t(x) for the context c
    x      the original;   x'  the immunized picture;   every loss is minimised

Where an original samples the posterior, this file takes the mean, so that one seed gives one result. "Cost" counts passes of
one picture per step, forward and backward (1F 1B); a report has the sums of its run.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint

from . import images
from .models import schedulers
from .models.lean import sent
from .purifiers.draws import blurred

NOT_IN_THE_PAPER = ("the paper leaves this method out on Stable Diffusion 3, as incompatible with its transformer; "
                    "this rectified-flow form is ours")


def noise(editor, x_orig, contexts, *, generator):
    """Uniform random noise at the same budget: without an objective, the loop returns its random start.

    It is the control: a method must do better than this. Cost: nothing.
    """
    return None


# ----------------------------------------------------------------------------------------------------- the encoder alone

def photoguard_encoder(editor, x_orig, contexts, *, generator, variant="zero"):
    """PhotoGE, PhotoGuard's attack on the encoder: make the latent that of an empty picture.

        L = || z(x') - z_target ||_2

    Salman et al. 2023 (arXiv 2302.06588), and the notebooks of MadryLab/photoguard. Targets the encoder; uses no prompt.
    variant: "zero", the zero latent of the image-to-image notebook, or "grey", the latent of a mid-grey picture, as in the
      inpainting demo. On InstructPix2Pix zero is also the image latent of guidance without a picture, so the edit becomes
      text-to-image. On SD3 it is zero in the denoiser's scale.
    Cost: encoder 1F 1B. native: 1000 iterations from 0.010 linearly down to a hundredth of it.
    """
    _check_variant(variant, ("zero", "grey"))
    target = _latent(editor, torch.full_like(editor.resize(x_orig), 0.5)) if variant == "grey" else 0

    def objective(x_imu, step):
        return (editor.scaled(editor.encode(editor.resize(x_imu))) - target).norm()

    objective.passes = lambda steps: passes(encoder=(steps + (variant == "grey"), steps))
    objective.see = None
    return objective


def editshield(editor, x_orig, contexts, *, generator, variant="eot"):
    """ED, EditShield: move the latent as far as possible in any direction, also after the picture was transformed.

        eot       L = - MSE( E(tau(x')), E(tau(x)) )          tau drawn at every step
        plain     L = - MSE( E(x'), E(x) )
        released  L = - MSE( [z_t(x'); E(x')], [z_s(x); E(x)] ) + 0.1 MSE(x', x)

    Chen et al. 2024 (ECCV), and Allen-piexl/Editshield. Targets the encoder; uses no prompt.
    tau: the picture unchanged, a crop (80 to 100 % of each side), a Gaussian blur (sigma 0.5 to 1.5 pixels) or a rotation
      (up to 5 degrees), with equal probability. The paper names the kinds; the strengths are ours, and so is that the crop
      lies anywhere (there: in the middle). The released code has
      one fixed transformation in place of an expectation, and one of its scripts compares a rotated picture with an
      unrotated one; here both are transformed alike.
    "released" is the loss of its scripts, with a penalty in place of a bound. t, s and both noises are drawn independently, s
      and its noise once. The loss is therefore mostly noise, but unlike the other two it has a gradient at delta = 0. The code
      does not project, gives pixels in [0,1] to a VAE trained on [-1,1], and wraps around in 8 bits; this one does none of
      that. A second penalty in one of its scripts, on blurred pictures, is left out. It is refused on SD3, whose denoiser sees
      no image latent beside the noisy one.
    Cost: encoder 2F 1B (eot), 1F 1B (the others). native: released, 30 iterations of 0.001 from zero; the original uses
      Adam at that rate, this loop the gradient's sign.
    """
    _check_variant(variant, ("eot", "plain", "released"))
    if variant == "released" and editor.kind != "instruct":
        raise ValueError("editshield's released loss compares the inputs of an instruction editor's denoiser, noisy latent and "
                         "image latent; this editor's denoiser has the noisy latent alone: choose eot or plain")
    with torch.no_grad():
        resized = editor.resize(x_orig)
        E_orig = editor.encode(resized) if variant != "eot" else None

    def denoiser_input(E):
        t, eta = _draw(editor, E, generator)
        return torch.cat([editor.noise_latent(E, eta, t), E], 1)

    F_orig = denoiser_input(E_orig) if variant == "released" else None

    def objective(x_imu, step):
        pixels = editor.resize(x_imu)
        if variant == "plain":
            return -F.mse_loss(editor.encode(pixels), E_orig)
        if variant == "released":
            distance, penalty = F.mse_loss(denoiser_input(editor.encode(pixels)), F_orig), F.mse_loss(x_imu, x_orig)
            return 0.1 * penalty - distance, {"shift": distance, "penalty": penalty}
        tau = transformation(pixels, generator)
        with torch.no_grad():
            aim = editor.encode(tau(resized))
        return -F.mse_loss(editor.encode(tau(pixels)), aim)

    objective.passes = lambda steps: passes(encoder=(2 * steps if variant == "eot" else 1 + steps, steps))
    return objective


def transformation(pixels, generator):
    """One of EditShield's transformations, drawn at random: a differentiable function of pixels like these, (B,3,H,W)."""
    height, width = pixels.shape[2:]
    kind = ("none", "crop", "blur", "rotate")[torch.randint(4, (1,), generator=generator).item()]
    a, b, c = torch.rand(3, generator=generator).tolist()
    if kind == "none":
        return lambda pixels: pixels
    if kind == "blur":
        return partial(blurred, sigma=0.5 + a, radius=4)
    if kind == "crop":                                       # this share of each side, at a random place
        share = 0.8 + 0.2 * a
        rows = [[share, 0, (1 - share) * (2 * b - 1)], [0, share, (1 - share) * (2 * c - 1)]]
    else:
        angle = math.radians(5) * (2 * a - 1)
        sine, cosine = math.sin(angle), math.cos(angle)
        rows = [[cosine, -sine * height / width, 0], [sine * width / height, cosine, 0]]
    grid = F.affine_grid(sent(torch.tensor([rows]), pixels.device, pixels.dtype), [1, 3, height, width], align_corners=False)
    return lambda pixels: F.grid_sample(pixels, grid.expand(len(pixels), -1, -1, -1), padding_mode="reflection",
                                        align_corners=False)


# ------------------------------------------------------------------------------------------ encoder and denoiser together

def sds(editor, x_orig, contexts, *, generator, variant="minus"):
    """SDS, of Diff-Protect: score distillation, which leaves out the denoiser's Jacobian.

        g = (dz/dx')^T r,   r = eps_t(x', c) - eta, held constant;   t uniform over training, eta fresh

    Xue et al. 2024 (arXiv 2311.12832), and xavihart/Diff-Protect, with w(t) = 1. The gradient reaches the picture through the
    encoder alone; the denoiser's score for the prompt weighs it.
    variant: "minus" descends along g, SDS(-), the paper's proposal; "plus" ascends, SDS(+). No loss has the gradient g; the
      value returned is the mean square of r, the denoiser's training loss, negated for "plus".
    Cost: encoder 1F 1B, denoiser 1F 0B. native: a zero start. (The original uses the caption "a photo" in place of the
      edit's prompt; pass it as the prompt.)
    On SD3 (ours): the released code needs a U-Net that predicts noise; r = (1 - sigma)(v - (eta - z)) is the same residual.
    """
    _check_variant(variant, ("minus", "plus"))
    sign = 1 if variant == "minus" else -1

    def objective(x_imu, step):
        E = editor.encode(editor.resize(x_imu))
        t, eta = _draw(editor, E, generator)
        with torch.no_grad():
            residual = _noise_prediction(editor, E, eta, t, contexts[step % len(contexts)]) - eta
        z = editor.scaled(E)
        return sign * (residual.square().mean() + ((z - z.detach()) * residual).sum())

    objective.passes = lambda steps: passes(encoder=(steps, steps), denoiser=(steps, 0))
    objective.see = None
    return _noted(objective, editor, NOT_IN_THE_PAPER)


def mist(editor, x_orig, contexts, *, generator, variant="fused"):
    """MIST: move the latent to that of a high-contrast pattern, and increase the denoiser's error.

        textural  L = MSE( z(x'), z(Y) )
        semantic  L = - MSE( eps_t(x', c), eta )               t uniform over training, eta fresh
        fused     L = textural + w semantic,  w = 10000 / 16384

    Liang and Wu 2023 (arXiv 2305.12683), and psyker-team/mist. Targets the encoder and, with the prompt, the denoiser.
    The original sums in one term and averages in the other; here both are means. At 512 pixels on SD 1.x, where a latent
      has 16384 elements, this is the released loss divided by 16384; at other sizes the two terms keep that balance.
    Y: a tiled word, drawn by `pattern`, because the original's picture is under the GPL.
    variant: the paper does not say which one it ran; fused is the original's default.
    Cost: encoder 1F 1B, denoiser 1F 1B (textural: none). native: the protocol's loop. (Its captions, "a photo" or "a
      painting", can be passed as the prompt.)
    On SD3 (ours): the released code needs a U-Net that predicts noise; eps_t is computed from the velocity.
    """
    _check_variant(variant, ("fused", "textural", "semantic"))
    target = _latent(editor, pattern(editor.resize(x_orig))) if variant != "semantic" else None
    weight = {"fused": 10_000 / 16_384, "textural": 0, "semantic": 1}[variant]

    def objective(x_imu, step):
        E = editor.encode(editor.resize(x_imu))
        loss, terms = 0, {}
        if variant != "semantic":
            loss = F.mse_loss(editor.scaled(E), target)
            terms["textural"] = loss
        if variant != "textural":
            t, eta = _draw(editor, E, generator)
            error = F.mse_loss(_noise_prediction(editor, E, eta, t, contexts[step % len(contexts)]), eta)
            loss = loss - weight * error
            terms["semantic"] = -error
        return loss, terms

    denoised = variant != "textural"
    objective.passes = lambda steps: passes(encoder=(steps + (target is not None), steps),
                                            denoiser=(steps * denoised, steps * denoised))
    objective.see = None
    return _noted(objective, editor, NOT_IN_THE_PAPER)


def ace(editor, x_orig, contexts, *, generator, variant="ace+"):
    """ACE: make the denoiser predict one fixed target at every timestep, so that its error is always the same.

        ace   L = MSE( eps_t(x', c), z(Y) )                    t uniform over the noisier 40 % of training, eta fresh
        ace+  L = ace + 100 MSE( z(x'), z(Y) )

    Zheng et al. 2025 (ICLR; arXiv 2310.04687), and caradryanl/ACE, whose mode "fused" is ace+. Targets the denoiser's
    prediction for the prompt and, in ace+, the encoder. Y is MIST's pattern.
    The original alternates these steps with training a LoRA on the result; under the paper's protocol the editor stays
      fixed. It was made against fine-tuning: an instruction editor starts from pure noise, so changes of z_t do not reach
      its edits.
    Cost: encoder 1F 1B, denoiser 1F 1B. native: 250 iterations (5 rounds of 50) of 0.0025 from zero.
    On SD3 (ours): the released code needs a U-Net that predicts noise, and a LoRA on it; eps_t is computed from the velocity.
    """
    _check_variant(variant, ("ace+", "ace"))
    target = _latent(editor, pattern(editor.resize(x_orig)))
    trained = editor.scheduler.config.num_train_timesteps

    def objective(x_imu, step):
        E = editor.encode(editor.resize(x_imu))
        t, eta = _draw(editor, E, generator, lowest=trained * 6 // 10)
        score = F.mse_loss(_noise_prediction(editor, E, eta, t, contexts[step % len(contexts)]), target)
        if variant == "ace":
            return score
        latent = F.mse_loss(editor.scaled(E), target)
        return score + 100 * latent, {"score": score, "latent": latent}

    objective.passes = lambda steps: passes(encoder=(steps + 1, steps), denoiser=(steps, steps))
    objective.see = None
    return _noted(objective, editor, NOT_IN_THE_PAPER)


WORD = (".###.#.####.#...#",                                 # the pattern's word, five dots high
        "#....#.#....##.##",
        ".##..#.###..#.#.#",
        "...#.#.#....#...#",
        "###..#.#....#...#")


def pattern(pixels):
    """The target picture of MIST and ACE at the size of these pixels: a white word on black, three times eight, (1,3,H,W)."""
    height, width = pixels.shape[2:]
    tile = Image.new("L", (len(WORD[0]) + 3, len(WORD) + 3))
    tile.putdata([255 * (1 <= x <= len(WORD[0]) and 1 <= y <= len(WORD) and WORD[y - 1][x - 1] == "#")
                  for y in range(tile.height) for x in range(tile.width)])
    whole = Image.new("L", (3 * tile.width, 8 * tile.height))
    for x in range(3):
        for y in range(8):
            whole.paste(tile, (x * tile.width, y * tile.height))
    return images.to_pixels(whole.resize((width, height), Image.Resampling.NEAREST)).to(pixels)


# --------------------------------------------------------------------------------------------------------- the whole edit

def photoguard_diffusion(editor, x_orig, contexts, *, generator, unroll=4, repeats=1, resample=True):
    """PhotoGD, PhotoGuard's attack on the diffusion: make the edit itself a grey picture.

        L = mean over `repeats` draws of eta of || 2 edit_K(x', c; eta) - 1 ||_2     (a grey picture is zero on [-1,1])

    Salman et al. 2023 (arXiv 2302.06588), and the notebooks of MadryLab/photoguard, which multiply the target picture by
    zero. Targets the whole edit with the prompt.
    edit_K: K = `unroll` denoising steps of the editor with its guidance, without noise in between (an ancestral sampler
      steps as plain Euler), and the decoder. On InstructPix2Pix they start from the noise eta, and x' enters as the image
      latent. On SD3 they start from the latent of x', noised with eta as far as the editor's strength says, and visit K of
      an edit's noise levels, evenly chosen.
    resample: draw eta anew at every step, as the original does; otherwise use one bank of `repeats` draws.
    Every denoising step is checkpointed (except on small editors), so that memory holds the activations of one step for any
      K and `repeats`.
    Cost: once, encoder 1F 1B; for each of `repeats`, decoder 1F 1B and K guided steps of the denoiser, each of 3
      evaluations in one batch (2 on SD3), each evaluation 2F 1B because of checkpointing (1F 1B on small editors).
    native: the L-infinity call in its notebook: 200 iterations of 0.003 from zero, the mean of 5 draws. There the call is a
      comment, and one in the L2 norm with 10 draws runs; both have an empty prompt, so pass "" for that.
    """
    if unroll < 2 or repeats < 1:                            # with one step a sampler would start at the clean end
        raise ValueError(f"unroll {unroll}, repeats {repeats}: at least two denoising steps and one draw are needed")
    if editor.kind != "instruct" and unroll > (most := len(editor.plan().timesteps)):
        raise ValueError(f"unroll {unroll}: an edit by this editor has {most} denoising steps")
    with torch.no_grad():
        nothing = editor.context([""])
        resized = editor.resize(x_orig)
        size, shape = resized.shape[2:], editor.encode(resized).shape

    def draw():
        return torch.randn((repeats, *shape[1:]), generator=generator)

    bank = draw()

    def objective(x_imu, step):
        nonlocal bank
        if resample and step > 0:
            bank = draw()
        E = editor.encode(editor.resize(x_imu))
        E_imu = E.detach().requires_grad_(True)              # the draws' gradients are summed: one graph at a time
        value, g = 0.0, torch.zeros_like(E_imu)
        for eta in sent(bank, E.device, E.dtype).split(1):
            edited = short_edit(editor, E_imu, eta, contexts[step % len(contexts)], nothing, unroll, size)
            loss = (2 * edited - 1).norm() / repeats
            value, g = value + loss.detach(), g + torch.autograd.grad(loss, E_imu)[0]
        return value + ((E - E.detach()) * g).sum()

    def count(steps):
        times = steps * repeats
        evaluations = times * unroll * len(editor.guide().views)
        runs = evaluations * (1 if editor.is_small else 2)
        return passes(encoder=(steps + 1, steps), denoiser=(runs, evaluations), decoder=(times, times))

    objective.passes, objective.see = count, None
    return objective


def short_edit(editor, E, eta, context, nothing, steps, size=(512, 512)):
    """The edit of a picture given by its E (1,C,h,w), in a few deterministic steps: pixels, not clipped.

    eta: the noise to start with, shaped like E. context, nothing: of the prompt and of the empty one. size: of the picture,
    (height, width) in pixels, which the noise levels of some schedulers depend on. Differentiable. The
    graph keeps the arguments of each denoising step alone and runs the step again in the backward pass, except on small
    editors.
    """
    if editor.scheduler.draws_noise:
        plan = schedulers.Scheduler(replace(editor.scheduler.config, sampler=schedulers.EULER)).plan(steps)
    elif editor.kind == "instruct":
        plan = editor.plan_at(*size, steps)
    else:                                                    # the noise levels of an edit, but only so many of them
        plan = editor.plan()
        kept = torch.linspace(0, len(plan.timesteps), steps + 1).round().long()[:-1]
        plan.timesteps, plan.sigmas = plan.timesteps[kept], torch.cat([plan.sigmas[kept], plan.sigmas[-1:]])
    latent = editor.first_latent(E, eta, plan)
    run = editor.predict if editor.is_small else partial(checkpoint, editor.predict, use_reentrant=False,
                                                             preserve_rng_state=False)
    latent = editor.denoise(latent, plan, E, context, nothing, guide=editor.guide(), predict=lambda *inputs: run(*inputs).to(E))
    return editor.decode(latent)


# ------------------------------------------------------------------------------------------------------ attention to words

def semantic_attack(editor, x_orig, contexts, *, generator, prompts, content=None, timesteps=10, batch=None):
    """SA, the Semantic Attack: remove the attention to the words from where it is in the original.

        Att_t(x) = sum over layers of upsampled(mean over heads, sum over the words' tokens of softmax(Q K^T / sqrt(d)))
        M        = 1 where the mean over T of Att_t(x) exceeds its mean over the picture
        L        = mean over t in T of || M Att_t(x') ||_1 / || M ||_1

    Lo et al. 2024 (CVPR). Targets the denoiser's attention to the words. No code was released, and the paper gives neither
    step, threshold, layers, T nor noise: these are ours, and so is that the map is masked and not the picture. Report its
    results as those of an attack like SA.
    content: the text of what is to be protected, such as "man" (the original's way); otherwise each prompt in turn.
    The softmax runs over all tokens; the columns of the text's own tokens are summed, without start, end and padding. All
      layers that attend to text are used, bicubically upsampled to the latent's size, with their heads averaged.
    timesteps: T, a count spread over what the editor visits, or the timesteps themselves; one noise for each, drawn once.
      batch: how many run at once.
    On SD3, which has no cross-attention, the maps are its joint attention's, of image queries and text keys, with all keys
      in the softmax. The paper reports SA there and does not say how.
    Cost: encoder 1F 1B, denoiser |T|F |T|B. native: a zero start.
    """
    if content is not None:
        prompts = [content]
        with torch.no_grad():
            contexts = [editor.context(prompts)]
    T = editor.timesteps(timesteps) if isinstance(timesteps, int) else torch.as_tensor(timesteps)
    if min(len(T), 1 if batch is None else batch) < 1:
        raise ValueError("semantic-attack needs at least one timestep, and one timestep in a batch")
    if not editor.probs_names:
        raise ValueError(f"semantic-attack needs the denoiser's attention maps, and {editor.name} returns none")
    columns = [editor.word_positions(prompt) for prompt in prompts]
    if not all(columns):
        raise ValueError("semantic-attack attends to the words of the prompt, and this prompt has none")
    columns = [torch.tensor(positions, device=editor.device) for positions in columns]
    batches = T.split(batch or len(T))
    with torch.no_grad():
        E_orig = editor.encode(editor.resize(x_orig))
    bank = torch.randn((len(T), *E_orig.shape[1:]), generator=generator).to(E_orig).split(batch or len(T))
    masks = {}                                               # prompt -> mask, made once from the original
    told, leaves = list(contexts), []                        # of the immunized picture: see objectives/text_refinement.py

    def see(x_orig):
        nonlocal E_orig
        with torch.no_grad():
            E_orig = editor.encode(editor.resize(x_orig))
        masks.clear()

    def attention(E, t, eta, n, context):
        """Att_t, (t,h,w)."""
        size = E.shape[-2:]
        E = E.expand(len(t), -1, -1, -1)
        maps = editor.features(E, editor.noise_latent(E, eta, t), t, context, taps=editor.probs_names)
        layers = [probs.to(E).mean(1)[..., columns[n]].sum(-1) for probs in maps.values()]      # (t, tokens) each
        layers = [layer.unflatten(1, (1, *level_grid(layer.shape[1], *size))) for layer in layers]
        return sum(F.interpolate(layer, size=size, mode="bicubic", align_corners=False) for layer in layers)[:, 0]

    def objective(x_imu, step):
        n = step % len(prompts)
        if n not in masks:
            with torch.no_grad():
                clean = torch.cat([attention(E_orig, t, eta, n, contexts[n])
                                   for t, eta in zip(batches, bank, strict=True)]).mean(0)
            masks[n] = (clean > clean.mean()).to(clean)
        E = editor.encode(editor.resize(x_imu))
        E_imu, value = E.detach().requires_grad_(True), 0.0  # gradients of all of T are summed here, as in sifm.py
        for t, eta in zip(batches, bank, strict=True):
            loss = (masks[n] * attention(E_imu, t, eta, n, told[n])).abs().sum() / masks[n].sum() / len(T)
            loss.backward(inputs=[E_imu, *leaves])
            value = value + loss.detach()
        return value + ((E - E.detach()) * E_imu.grad).sum()

    objective.see, objective.texts, objective.leaves, objective.contexts = see, told, leaves, contexts
    objective.passes = lambda steps: passes(encoder=(steps + 1, steps),
                                            denoiser=(len(T) * (steps + min(steps, len(prompts))), len(T) * steps))
    return _noted(objective, editor, "the paper does not say what this attack is on Stable Diffusion 3, which has no "
                                     "cross-attention; its joint attention in that place is ours")


def level_grid(tokens, height, width):
    """(rows, columns) of the network's level with this many tokens: the latent's size halved, rounding up, until it fits."""
    while height * width > tokens:
        height, width = -(-height // 2), -(-width // 2)
    return height, width


# ---------------------------------------------------------------------------------------------------------------- helpers

def passes(*, encoder=(0, 0), denoiser=(0, 0), **others):
    """Forward and backward passes as a report states them."""
    counts = {"encoder": encoder, "denoiser": denoiser, **others}
    return {f"{part}_{way}": count for part, pair in counts.items()
            for way, count in zip(("forward", "backward"), pair, strict=True)}


def _check_variant(variant, known):
    if variant not in known:
        raise ValueError(f"variant {variant!r}: choose one of {', '.join(known)}")


@torch.no_grad()
def _latent(editor, pixels):
    return editor.scaled(editor.encode(pixels))


def _draw(editor, E, generator, lowest=0):
    """A timestep of training, (1,), at or above `lowest`, and noise shaped like E."""
    t = torch.randint(lowest, editor.scheduler.config.num_train_timesteps, (1,), generator=generator)
    return t, sent(torch.randn(E.shape, generator=generator), E.device, E.dtype)


def _noise_prediction(editor, E, eta, t, context):
    """eps_t: the noise that the denoiser predicts in the latent noised with eta."""
    z_t = editor.noise_latent(E, eta, t)
    return editor.noise_prediction(editor.predict(E, z_t, t, context).to(E), z_t, t)


def _noted(objective, editor, note):
    """The objective, with the note for the report if the editor is of rectified flow (Stable Diffusion 3)."""
    if isinstance(editor.scheduler, schedulers.FlowScheduler):
        objective.note = note
    return objective


# ---------------------------------------------------------------------------------------------------------------- presets

@dataclass(frozen=True)
class Native:
    """The settings of an original. budget: its own, in words; settings: of loop and method, as `immunize` takes them."""

    source: str
    budget: str
    settings: dict = field(default_factory=dict)


NATIVE = {
    "photoguard-encoder": Native("MadryLab/photoguard, image-to-image notebook", "0.06 on [-1,1], which is 0.03",
                                 {"steps": 1000, "step_size": 0.01, "schedule": "linear", "init": "random"}),
    "photoguard-diffusion": Native("MadryLab/photoguard, inpainting notebook, L-infinity call", "0.05",
                                   {"steps": 200, "step_size": 0.003, "init": "zero", "repeats": 5}),
    "editshield": Native("Allen-piexl/Editshield, scripts", "none enforced; 30 steps of 0.001 reach 0.03",
                         {"steps": 30, "step_size": 0.001, "init": "zero", "variant": "released"}),
    "semantic-attack": Native("Lo et al. 2024, as far as it says", "0.06, on [0,1] or [-1,1]", {"init": "zero"}),
    "sds": Native("xavihart/Diff-Protect, configuration file", "16/255", {"init": "zero"}),
    "mist": Native("psyker-team/mist", "16/255"),
    "danp": Native("arXiv 2512.14333", "0.03", {"init": "zero"}),
    "diffusionguard": Native("the released code of arXiv 2410.05694, for inpainting", "16/255 on [-1,1], which is 0.031",
                             {"steps": 800, "step_size": 0.00196, "init": "zero"}),
    "tdae": Native("arXiv 2512.14341, as far as it says", "not printed", {"init": "zero"}),
    "decontext": Native("the released code of arXiv 2512.16625, for FLUX.1 Kontext", "0.1 on [-1,1], which is 0.05",
                        {"steps": 800, "step_size": 0.0025, "init": "zero"}),
    "ace": Native("caradryanl/ACE", "8/255 on [-1,1], which is 4/255", {"steps": 250, "step_size": 0.0025, "init": "zero"}),
}
