"""DANP: the attention to the words and the predicted noise, disturbed together."""

import torch
import torch.nn.functional as F

from ..baselines import level_grid, passes
from ..models.lean import sent
from ..models.schedulers import FlowScheduler

REDUCTIONS, TOKENS = ("balanced", "literal"), ("content", "all")


def danp(editor, x_orig, contexts, *, generator, prompts, timesteps=10, attention_weight=1.0, noise_weight=1.0, bins=128,
         tokens="content", reduction="balanced", batch=None):
    """DANP: empty the attention maps where they are high, fill them where they are low, and move the predicted noise.

        Att    = mean over layers of upsampled(mean over heads of softmax(Q K^T / sqrt(d)))       (tokens,h,w), of x' at t
        M      = 1 where Att, scaled to [0,1], is above Kapur's threshold of its histogram; held constant
        L_daa  = || M Att ||_2^2 - l_daa || (1 - M) Att ||_2^2
        L_nba  = - || eps_t(x', c) - eps_t(x, c) ||_2^2                                           one eta for both pictures
        L      = mean over t in T of L_daa + l_nba L_nba

    arXiv 2512.14333; no code was released. Targets the denoiser, by way of the encoder. T is fixed; eta is new at every step
    and timestep. One pass over x' gives maps and prediction; one over x, without gradient, gives those of the original.
    L need not fall from step to step: M is made anew from the maps of x' each time, so its threshold jumps as they change.
    What falls is the share of attention at the places where that of x is high.
    timesteps: T, as in `sifm` (the paper has 10). attention_weight, noise_weight: l_daa and l_nba (1 and 1). bins: of the
      histogram (128).
    reduction: the paper does not print the scale of L_nba. "balanced" (default, ours) divides L_daa by || Att ||_2^2 of x and
      L_nba by || eps_t ||_2^2 of x, so that both are shares; "literal" is the formula as it stands.
    tokens: whose columns of Att count: "content" (default, ours) those of the prompt's own words, or "all", to the letter. Then
      the start token, which has most of the attention, decides the threshold.
    Not printed either, and ours: heads and layers averaged, bicubic upsampling to the latent's size, noise added to the latent,
      no guidance. The paper starts at zero, where L_nba has no gradient; here the start is random.
    On editors of rectified flow eps_t is the velocity: the noise that it implies does not depend on it at sigma 1. The maps are
      those of image queries and text keys in the joint attention. Both are ours.
    batch: timesteps at once. Cost: encoder 1F 1B, denoiser 2|T|F |T|B. native: a zero start.
    """
    for value, known, option in ((reduction, REDUCTIONS, "reduction"), (tokens, TOKENS, "tokens")):
        if value not in known:
            raise ValueError(f"{option} {value!r}: choose one of {', '.join(known)}")
    T = editor.timesteps(timesteps) if isinstance(timesteps, int) else torch.as_tensor(timesteps)
    if min(len(T), 1 if batch is None else batch) < 1 or bins < 2:
        raise ValueError("danp needs at least one timestep, one timestep in a batch, and two bins")
    if not editor.probs_names or "out" not in editor.tap_names:
        raise ValueError(f"danp needs the denoiser's attention maps and its prediction, the tap out, and {editor.name} has not "
                         "both")
    words = [editor.word_positions(prompt) for prompt in prompts] if tokens == "content" else [None] * len(prompts)
    if not all(positions is None or positions for positions in words):
        raise ValueError("danp attends to the words of the prompt, and this prompt has none; --option tokens=all counts all "
                         "tokens")
    columns = [slice(None) if positions is None else torch.tensor(positions, device=editor.device) for positions in words]
    batches, taps = T.split(batch or len(T)), [*editor.probs_names, "out"]
    flow = isinstance(editor.scheduler, FlowScheduler)
    texts = [editor.prepare_text(c) for c in contexts]       # constant over steps, as are the times
    times = [[editor.prepare_timesteps(t, c) for t in batches] for c in contexts]
    E_orig = None

    @torch.no_grad()
    def see(x_orig):
        nonlocal E_orig
        E_orig = editor.encode(editor.resize(x_orig))

    see(x_orig)

    def seen(E, t, time, eta, n):
        """(Att (t,tokens,h,w), eps_t or the velocity (t,...)) of the picture with latent E, in one pass of the denoiser."""
        E = E.expand(len(t), -1, -1, -1)
        z_t = editor.noise_latent(E, eta, t)
        found = editor.features(E, z_t, time, texts[n], taps=taps)
        prediction = found.pop("out").to(E)
        maps = [upsampled(probs.to(E).mean(1)[..., columns[n]], E.shape[-2:]) for probs in found.values()]
        return sum(maps) / len(maps), prediction if flow else editor.noise_prediction(prediction, z_t, t)

    def objective(x_imu, step):
        n = step % len(contexts)
        bank = sent(torch.randn((len(T), *E_orig.shape[1:]), generator=generator), E_orig.device, E_orig.dtype)
        E = editor.encode(editor.resize(x_imu))
        E_imu, found = E.detach().requires_grad_(True), {"attention": 0.0, "noise": 0.0}
        for t, time, eta in zip(batches, times[n], bank.split(batch or len(T)), strict=True):
            with torch.no_grad():
                clean = seen(E_orig, t, time, eta, n)
            terms = losses(*seen(E_imu, t, time, eta, n), *clean, attention_weight, bins, reduction)
            attention, noise = (term.sum() / len(T) for term in terms)
            (attention + noise_weight * noise).backward(inputs=[E_imu])          # the sum over T is in E_imu.grad
            found = {"attention": found["attention"] + attention.detach(), "noise": found["noise"] + noise.detach()}
        loss = found["attention"] + noise_weight * found["noise"]
        return loss + ((E - E.detach()) * E_imu.grad).sum(), found

    objective.see = see
    objective.passes = lambda steps: passes(encoder=(steps + 1, steps), denoiser=(2 * len(T) * steps, len(T) * steps))
    if flow:
        objective.note = ("the paper has no editor of rectified flow: attention of image queries to text keys, and the "
                          "velocity in place of the noise, are ours")
    return objective


def losses(maps, prediction, clean_maps, clean_prediction, attention_weight, bins, reduction):
    """L_daa and L_nba, (B,) each, of maps (B,tokens,h,w) and predictions (B,...)."""
    mask, squares = above_threshold(maps.detach(), bins), maps.square()
    attention = (mask * squares).flatten(1).sum(1) - attention_weight * ((1 - mask) * squares).flatten(1).sum(1)
    noise = -(prediction - clean_prediction).flatten(1).square().sum(1)
    if reduction == "balanced":
        attention = attention / clean_maps.flatten(1).square().sum(1)
        noise = noise / clean_prediction.flatten(1).square().sum(1)
    return attention, noise


def above_threshold(maps, bins=128):
    """1 where maps (B,...), scaled to [0,1] each, lie above their threshold of maximum entropy (Kapur et al. 1985), else 0.

    The threshold is the edge between two bins of the histogram with the largest sum of both sides' entropies. Where a map is
    constant the mask is 0 everywhere.
    """
    rows = maps.flatten(1)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    place = ((rows - low) / (high - low).clamp(min=torch.finfo(rows.dtype).tiny) * bins).long().clamp(max=bins - 1)
    shares = torch.zeros(len(rows), bins, dtype=torch.float64, device=rows.device)
    shares.scatter_add_(1, place, torch.ones_like(place, dtype=torch.float64))
    shares = shares / rows.shape[1]
    below, entropy = shares.cumsum(1), torch.special.xlogy(shares, shares).cumsum(1)       # sums of p and of p log p
    above, rest = 1 - below, entropy[:, -1:] - entropy
    splits = (below > 0) & (above > 1e-12)
    both = torch.where(splits, below.log() - entropy / below + above.log() - rest / above, -torch.inf)
    last = torch.where(splits.any(1, keepdim=True), both.argmax(1, keepdim=True), bins)    # the last bin below the threshold
    return (place > last).to(maps).reshape(maps.shape)


def upsampled(layer, size):
    """A layer's attention (B, positions, tokens) as maps (B,tokens,h,w) of the latent's size, bicubically."""
    maps = layer.transpose(1, 2).unflatten(2, level_grid(layer.shape[1], *size))
    return F.interpolate(maps, size=size, mode="bicubic", align_corners=False)
