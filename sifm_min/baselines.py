"""What SIFM is compared with: the seven methods of the paper's tables, and the control that every figure needs beside it.

Each is an objective on the loop of `pgd.py`, called like `sifm.sifm`, and written from its formula: no code and no asset of
the originals is here. By default all run under the paper's protocol: the same budget, 100 iterations of 1/255, the same
random start. How each original was run is its preset "native" (`NATIVE`, at the end); a preset never changes the budget,
which is a promise to whoever looks at the picture.

    E(x)  the VAE encoder's posterior mean, unscaled (on InstructPix2Pix the image condition);  z(x)  the same in the
    denoiser's scale;  z_t = noise_latent(z, eta, t);  eps_t(x, c)  the noise that the denoiser takes to be in z_t(x)
    x     the picture as it is;   x'  the immunized one;   every loss is minimised

Originals that sample the posterior take its mean here, so that one seed gives one result. Costs are passes of one picture
in each step, forward and backward (1F 1B); what a run took in all is in its report.
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

NOT_IN_THE_PAPER = ("the paper leaves this method out on Stable Diffusion 3, as incompatible with its transformer; "
                    "this rectified-flow form is ours")


def noise(editor, x_orig, contexts, *, generator):
    """Uniform random noise at the same budget: no objective, so the loop returns its random start as it is.

    Whatever this control achieves is no merit of a method. Cost: nothing.
    """
    return None


# ----------------------------------------------------------------------------------------------------- the encoder alone

def photoguard_encoder(editor, x_orig, contexts, *, generator, variant="zero"):
    """PhotoGE, the encoder attack of PhotoGuard: the picture is to look to the encoder like nothing at all.

        L = || z(x') - z_target ||_2

    Salman et al. 2023 (arXiv 2302.06588), and the notebooks of MadryLab/photoguard. variant: "zero", the zero
    latent of the image-to-image notebook; or "grey", the latent of a mid-grey picture, for the grey card of the inpainting
    demo. It targets the encoder and knows no prompt. On InstructPix2Pix zero is what the editor is shown where there is
    no picture, so the edit becomes text-to-image; on SD3 it is the zero of the denoiser's scale. Cost: encoder 1F 1B.
    native: 1000 iterations from 0.010 linearly down to a hundredth of it.
    """
    _one_of(variant, ("zero", "grey"))
    target = _latent(editor, torch.full_like(editor.resize(x_orig), 0.5)) if variant == "grey" else 0

    def objective(x_imu, step):
        return (editor.scaled(editor.encode(editor.resize(x_imu))) - target).norm()

    objective.passes = lambda steps: passes(encoder=(steps + (variant == "grey"), steps))
    return objective


def editshield(editor, x_orig, contexts, *, generator, variant="eot"):
    """ED, EditShield: the latent is to move as far as it can, wherever that is, also after the picture was transformed.

        eot       L = - MSE( E(tau(x')), E(tau(x)) )          tau drawn at every step
        plain     L = - MSE( E(x'), E(x) )
        released  L = - MSE( [z_t(x'); E(x')], [z_s(x); E(x)] ) + 0.1 MSE(x', x)

    Chen et al. 2024 (ECCV), and Allen-piexl/Editshield. It targets the encoder and knows no prompt. tau is the picture as it
    is, a crop (80 to 100 % of each side), a Gaussian blur (sigma 0.5 to 1.5 pixels) or a rotation (up to 5 degrees), each
    as likely: the paper names the kinds, the strengths are ours. The released code takes one fixed transformation for an
    expectation, and in one script compares a rotated picture with one that is not; here both are transformed alike.
    "released" is the loss that its scripts run, a penalty in place of a bound, where t, s and both noises are drawn
    independently of one another, s and its noise once: mostly noise, but what moves it off delta = 0, where the other two
    have no gradient. Of its faults three are not kept: no projection, pixels in [0,1] for a VAE trained on [-1,1], and
    8-bit wraparound.
    Cost: encoder 2F 1B (eot), 1F 1B (the others). native: released, 30 iterations of 0.001 from zero; Adam at that rate
    there, steps by the sign here.
    On SD3, whose denoiser sees no condition beside the latent, "released" is refused.
    """
    _one_of(variant, ("eot", "plain", "released"))
    if variant == "released" and editor.kind != "instruct":
        raise ValueError("editshield's released loss compares what an instruction editor's denoiser takes, latent and picture; "
                         "this editor's takes the latent alone: choose eot or plain")
    with torch.no_grad():
        resized = editor.resize(x_orig)
        E_orig = editor.encode(resized)

    def seen(E):
        t, eta = _draw(editor, E, generator)
        return torch.cat([editor.noise_latent(E, eta, t), E], 1)

    F_orig = seen(E_orig) if variant == "released" else None

    def objective(x_imu, step):
        pixels = editor.resize(x_imu)
        if variant == "plain":
            return -F.mse_loss(editor.encode(pixels), E_orig)
        if variant == "released":
            shift, penalty = F.mse_loss(seen(editor.encode(pixels)), F_orig), F.mse_loss(x_imu, x_orig)
            return 0.1 * penalty - shift, {"shift": shift, "penalty": penalty}
        tau = transformation(pixels, generator)
        with torch.no_grad():
            aim = editor.encode(tau(resized))
        return -F.mse_loss(editor.encode(tau(pixels)), aim)

    objective.passes = lambda steps: passes(encoder=(1 + steps * (2 if variant == "eot" else 1), steps))
    return objective


def transformation(pixels, generator):
    """One of EditShield's transformations, drawn at random: a differentiable function of pixels like these, (B,3,H,W)."""
    height, width = pixels.shape[2:]
    kind = ("none", "crop", "blur", "rotate")[torch.randint(4, (1,), generator=generator).item()]
    a, b, c = torch.rand(3, generator=generator).tolist()
    if kind == "none":
        return lambda pixels: pixels
    if kind == "blur":
        reach = torch.arange(-4, 5, dtype=pixels.dtype, device=pixels.device)
        weights = (-reach.square() / (2 * (0.5 + a) ** 2)).softmax(0).expand(3, 1, 1, -1)

        def blur(pixels):
            pixels = F.conv2d(F.pad(pixels, (4, 4, 0, 0), mode="replicate"), weights, groups=3)
            return F.conv2d(F.pad(pixels, (0, 0, 4, 4), mode="replicate"), weights.transpose(2, 3), groups=3)
        return blur
    if kind == "crop":                                       # this share of each side, wherever it fits
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

        g = (dz/dx')^T r,   r = eps_t(x', c) - eta, as if r did not depend on x';   t uniform over training, eta fresh

    Xue et al. 2024 (arXiv 2311.12832), and xavihart/Diff-Protect, with w(t) = 1. variant: "minus" descends along
    g, SDS(-), the paper's proposal; "plus" ascends, SDS(+). There is no loss whose gradient g is: what is reported is the
    mean square of r, the denoiser's training loss, negative for "plus". It targets the encoder through the denoiser's
    score at the prompt. Cost: encoder 1F 1B, denoiser 1F 0B.
    native: a zero start, and the caption "a photo" in place of the edit's prompt, which is the caller's to give.
    On SD3 (ours): its released code expects a U-Net that predicts noise; r = (1 - sigma)(v - (eta - z)) is the same residual.
    """
    _one_of(variant, ("minus", "plus"))
    sign = 1 if variant == "minus" else -1

    def objective(x_imu, step):
        E = editor.encode(editor.resize(x_imu))
        t, eta = _draw(editor, E, generator)
        with torch.no_grad():
            residual = _noise_prediction(editor, E, eta, t, contexts[step % len(contexts)]) - eta
        z = editor.scaled(E)
        return sign * (residual.square().mean() + ((z - z.detach()) * residual).sum())

    objective.passes = lambda steps: passes(encoder=(steps, steps), denoiser=(steps, 0))
    return _noted(objective, editor, NOT_IN_THE_PAPER)


def mist(editor, x_orig, contexts, *, generator, variant="fused"):
    """MIST: the latent is drawn to that of a high-contrast pattern, and the denoiser is made to err.

        textural  L = MSE( z(x'), z(Y) )
        semantic  L = - MSE( eps_t(x', c), eta )               t uniform over training, eta fresh
        fused     L = textural + w semantic,  w = 10000 / 16384

    Liang and Wu 2023 (arXiv 2305.12683), and psyker-team/mist, whose sum in one term and mean in the other are both means
    here: at 512 pixels on SD 1.x, where a latent has 16384 elements, this is the released loss divided by that, and at
    other sizes the two terms keep that balance. Y is a tiled word, drawn here (`pattern`); the original's picture is under
    the GPL. The paper does not say which variant it ran; fused is the original's default. It targets the encoder and, at
    the prompt, the denoiser. Cost: encoder 1F 1B, denoiser 1F 1B (textural: none).
    native: the protocol's loop as it is; the caption "a photo" or "a painting" is the caller's to give.
    On SD3 (ours): the released code expects a U-Net that predicts noise; eps_t is then what the velocity says of it.
    """
    _one_of(variant, ("fused", "textural", "semantic"))
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
    return _noted(objective, editor, NOT_IN_THE_PAPER)


def ace(editor, x_orig, contexts, *, generator, variant="ace+"):
    """ACE: the denoiser's error is to be the same whatever the timestep, because it always predicts one target.

        ace   L = MSE( eps_t(x', c), z(Y) )                    t uniform over the noisier 40 % of training, eta fresh
        ace+  L = ace + 100 MSE( z(x'), z(Y) )

    Zheng et al. 2025 (ICLR; arXiv 2310.04687), and caradryanl/ACE, whose mode "fused" is ace+. Y is the pattern that MIST has
    here. The original takes turns between such steps and training a LoRA on the result; under the paper's protocol the
    editor stays as it is. It targets the denoiser's prediction at the prompt and, in ace+, the encoder. It was made against
    fine-tuning: an instruction editor starts from pure noise, so what it does to z_t has no part in an edit.
    Cost: encoder 1F 1B, denoiser 1F 1B. native: 250 iterations (5 rounds of 50) of 0.0025 from zero.
    On SD3 (ours): the released code expects a U-Net that predicts noise and a LoRA on it; eps_t is what the velocity says.
    """
    _one_of(variant, ("ace+", "ace"))
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
    return _noted(objective, editor, NOT_IN_THE_PAPER)


WORD = (".###.#.####.#...#",                                 # what the pattern says, five dots high
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
    """PhotoGD, the diffusion attack of PhotoGuard: the edit itself is to come out as a grey picture.

        L = mean over `repeats` draws of eta of || 2 edit_K(x', c; eta) - 1 ||_2     (a grey picture is zero on [-1,1])

    Salman et al. 2023 (arXiv 2302.06588), and the notebooks of MadryLab/photoguard, whose target picture is multiplied by
    zero. edit_K: K = `unroll` denoising steps of the editor, with its guidance, without noise in between (an ancestral
    sampler steps as plain Euler), and the decoder. On InstructPix2Pix they start from the noise eta and x' enters as
    the image condition; on SD3 from the latent of x' noised with eta as far as the editor's strength says, and go down over
    K of the noise levels of an edit, evenly chosen. resample: eta is
    drawn anew at every step, as in the original; otherwise it is one bank of `repeats` draws. It targets the whole edit
    at the prompt. Every denoising step is checkpointed (except on a miniature, whose activations are small), so that memory
    holds the activations of one, whatever K and `repeats`. Cost, for each of `repeats`: decoder 1F 1B, and K guided steps
    (3 evaluations in a batch, on SD3 2) of the denoiser, each evaluation 2F 1B (checkpointing runs it again; 1F 1B on a
    miniature); and once for all: encoder 1F 1B.
    native: the L-infinity call of its notebook: 200 iterations of 0.003 from zero, the mean of 5 draws. The notebook
    executes another, in the L2 norm with 10, and with an empty prompt.
    """
    if unroll < 2 or repeats < 1:                            # a published sampler's only step would start at the clean end
        raise ValueError(f"unroll {unroll}, repeats {repeats}: at least two denoising steps and one draw are needed")
    if editor.kind != "instruct" and unroll > (most := len(editor.plan().timesteps)):
        raise ValueError(f"unroll {unroll}: an edit by this editor has {most} denoising steps")
    with torch.no_grad():
        nothing = editor.context([""])
        shape = editor.encode(editor.resize(x_orig)).shape

    def draw():
        return torch.randn((repeats, *shape[1:]), generator=generator)

    bank = draw()

    def objective(x_imu, step):
        nonlocal bank
        if resample and step > 0:
            bank = draw()
        E = editor.encode(editor.resize(x_imu))
        E_imu = E.detach().requires_grad_(True)              # the draws' gradients meet here: their graphs do not add up
        value, g = 0.0, torch.zeros_like(E_imu)
        for eta in sent(bank, E.device, E.dtype).split(1):
            edited = short_edit(editor, E_imu, eta, contexts[step % len(contexts)], nothing, unroll)
            loss = (2 * edited - 1).norm() / repeats
            value, g = value + loss.detach(), g + torch.autograd.grad(loss, E_imu)[0]
        return value + ((E - E.detach()) * g).sum()

    def count(steps):
        times = steps * repeats
        evaluations = times * unroll * len(editor.guide().views)
        runs = evaluations * (1 if editor.is_small else 2)
        return passes(encoder=(steps + 1, steps), denoiser=(runs, evaluations), decoder=(times, times))

    objective.passes = count
    return objective


def short_edit(editor, E, eta, context, nothing, steps):
    """What the editor makes of a picture given by its E (1,C,h,w), in a few deterministic steps: pixels, not clipped.

    eta: the noise it starts with, like E. context, nothing: of the prompt and of the empty one. Differentiable, and all
    that is kept for the way back are the arguments of each step's denoising, which is then run again; a miniature keeps all.
    """
    scheduler = editor.scheduler
    if scheduler.draws_noise:
        scheduler = schedulers.Scheduler(replace(scheduler.config, sampler=schedulers.EULER))
    if editor.kind == "instruct":
        plan = scheduler.plan(steps)
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
    """SA, the Semantic Attack: where the words are found in the picture, they are to be found no more.

        Att_t(x) = sum over layers of upsampled(mean over heads, sum over the words' tokens of softmax(Q K^T / sqrt(d)))
        M        = 1 where the mean over T of Att_t(x) exceeds its mean over the picture
        L        = mean over t in T of || M Att_t(x') ||_1 / || M ||_1

    Lo et al. 2024 (CVPR); no code was released, and of step, threshold, layers, T and noise nothing is given: these are
    ours, so call its results those of an attack like SA. content: the text of what is to be protected, such as "man"
    (the original's way); otherwise each prompt in turn. The softmax runs over all tokens, and the columns of the text's own
    are summed: neither start, end nor padding. All layers that attend to text, bicubically upsampled to the latent's size;
    heads averaged. T: a count spread over what the editor visits, or the timesteps; one noise for each, drawn once; batch:
    how many at once. On SD3, which has no cross-attention, its joint attention's image queries and text keys, with all
    keys in the softmax: the paper reports SA there and does not say how. It targets the denoiser's attention at the words.
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
        raise ValueError("semantic-attack looks for the words of the prompt in the picture, and this prompt has none")
    columns = [torch.tensor(positions, device=editor.device) for positions in columns]
    batches = T.split(batch or len(T))
    with torch.no_grad():
        E_orig = editor.encode(editor.resize(x_orig))
    bank = torch.randn((len(T), *E_orig.shape[1:]), generator=generator).to(E_orig).split(batch or len(T))
    masks = {}                                               # of each prompt, from the picture as it is: made once

    def attention(E, t, eta, n):
        """Att_t, (t,h,w)."""
        size = E.shape[-2:]
        E = E.expand(len(t), -1, -1, -1)
        found = editor.features(E, editor.noise_latent(E, eta, t), t, contexts[n], taps=editor.probs_names)
        layers = [probs.to(E).mean(1)[..., columns[n]].sum(-1) for probs in found.values()]      # (t, tokens) each
        layers = [layer.unflatten(1, (1, *_grid(layer.shape[1], *size))) for layer in layers]
        return sum(F.interpolate(layer, size=size, mode="bicubic", align_corners=False) for layer in layers)[:, 0]

    def objective(x_imu, step):
        n = step % len(prompts)
        if n not in masks:
            with torch.no_grad():
                clean = torch.cat([attention(E_orig, t, eta, n) for t, eta in zip(batches, bank, strict=True)]).mean(0)
            masks[n] = (clean > clean.mean()).to(clean)
        E = editor.encode(editor.resize(x_imu))
        E_imu = E.detach().requires_grad_(True)              # gradients of all of T meet here, as in sifm.py
        value, g = 0.0, torch.zeros_like(E_imu)
        for t, eta in zip(batches, bank, strict=True):
            loss = (masks[n] * attention(E_imu, t, eta, n)).abs().sum() / masks[n].sum() / len(T)
            value, g = value + loss.detach(), g + torch.autograd.grad(loss, E_imu)[0]
        return value + ((E - E.detach()) * g).sum()

    objective.passes = lambda steps: passes(encoder=(steps + 1, steps),
                                            denoiser=(len(T) * (steps + min(steps, len(prompts))), len(T) * steps))
    return _noted(objective, editor, "the paper does not say what this attack is on Stable Diffusion 3, which has no "
                                     "cross-attention; its joint attention in that place is ours")


def _grid(tokens, height, width):
    """(rows, columns) of the level of a network, halved with rounding up as often as it takes, that has so many tokens."""
    while height * width > tokens:
        height, width = -(-height // 2), -(-width // 2)
    return height, width


# ---------------------------------------------------------------------------------------------------------------- helpers

def passes(*, encoder=(0, 0), denoiser=(0, 0), **others):
    """Forward and backward passes as a report states them."""
    counts = {"encoder": encoder, "denoiser": denoiser, **others}
    return {f"{part}_{way}": count for part, pair in counts.items()
            for way, count in zip(("forward", "backward"), pair, strict=True)}


def _one_of(variant, known):
    if variant not in known:
        raise ValueError(f"variant {variant!r}: choose one of {', '.join(known)}")


@torch.no_grad()
def _latent(editor, pixels):
    return editor.scaled(editor.encode(pixels))


def _draw(editor, E, generator, lowest=0):
    """A timestep of training, (1,), no cleaner than `lowest`, and the noise to go with it, like E."""
    t = torch.randint(lowest, editor.scheduler.config.num_train_timesteps, (1,), generator=generator)
    return t, sent(torch.randn(E.shape, generator=generator), E.device, E.dtype)


def _noise_prediction(editor, E, eta, t, context):
    """eps_t: the noise that the denoiser takes to be in the latent noised with eta."""
    z_t = editor.noise_latent(E, eta, t)
    return editor.noise_prediction(editor.predict(E, z_t, t, context).to(E), z_t, t)


def _noted(objective, editor, note):
    """Where the editor is of rectified flow, Stable Diffusion 3 or what was made of it, the report carries the note."""
    if isinstance(editor.scheduler, schedulers.FlowScheduler):
        objective.note = note
    return objective


# ---------------------------------------------------------------------------------------------------------------- presets

@dataclass(frozen=True)
class Native:
    """How an original was run. budget: its own, in words; settings: of the loop and the objective, as `immunize` takes them."""

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
    "ace": Native("caradryanl/ACE", "8/255 on [-1,1], which is 4/255", {"steps": 250, "step_size": 0.0025, "init": "zero"}),
}
