"""One double and one single block of FLUX at full width beside diffusers', with the same weights: `tools/bench.py blocks`.

Forward, and backward to the tokens, as a method does it: weights are frozen. Times are CPU seconds, the least of --repeat.
"""

import time

import torch
import torch.nn.functional as F

from sifm_min.models.flux import DoubleBlock, Flux1Config, Flux2Config, Places, SingleBlock, coordinates, rotation
from sifm_min.models.modulation import Modulation

EDITORS = {"flux-kontext": Flux1Config(guidance_embeds=True),
           "flux-klein": Flux2Config(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680,
                                     guidance_embeds=False)}


def add(commands, shared):
    """Add the subcommand to the parser of bench.py."""
    command = commands.add_parser("blocks", parents=[shared], help="blocks of FLUX at full width, beside diffusers'")
    command.add_argument("--editor", choices=EDITORS, default="flux-kontext")
    command.add_argument("--text", type=int, default=64, help="tokens of the text")
    command.add_argument("--side", type=int, default=8, help="tokens on a side of target and reference")
    command.set_defaults(run=bench)


def bench(args):
    config = EDITORS[args.editor]
    generator = torch.Generator().manual_seed(0)
    places = coordinates(config, args.text, [(args.side,) * 2] * 2, "cpu")
    cos, sin = rotation(config, places)
    places = Places(cos, sin, args.text, args.side**2)
    theirs = cos.repeat_interleave(2, 1), sin.repeat_interleave(2, 1)
    text, pictures, temb = (torch.randn(1, count, config.width, generator=generator) for count in
                            (args.text, 2 * args.side**2, 1))
    for kind, calls, inputs in (("double", double(config, temb[:, 0], places, theirs, generator), [pictures, text]),
                                ("single", single(config, temb[:, 0], places, theirs, generator),
                                 [torch.cat([text, pictures], 1)])):
        found = [race(call, inputs) for call in calls]
        apart = max((a - b).abs().max().item() for a, b in zip(found[0][2], found[1][2], strict=True))
        for _ in range(args.repeat - 1):
            found = [[*map(min, old[:2], race(call, inputs)[:2]), old[2]] for old, call in zip(found, calls, strict=True)]
        for way, mine, other in zip(("forward", "backward"), found[0], found[1], strict=False):
            print(f"{args.editor} {kind:7}{way:9} ours {mine:7.2f} s, diffusers {other:7.2f} s, ours / diffusers "
                  f"{mine / other:.2f}", flush=True)
        print(f"{args.editor} {kind:7}largest difference of the outputs {apart:.1e}", flush=True)


def double(config, temb, places, theirs, generator):
    """Two functions of the tokens of pictures and text: our double block, and diffusers'."""
    ours, other = pair(config, "double", generator)
    if not config.SHARED:
        vectors = ours.prepare(temb)
        return lambda x, c: ours(x, c, vectors, places)[:2], lambda x, c: other(x, c, temb, theirs)[::-1]
    shared = [Modulation(config.width, 6, bias=False).requires_grad_(False) for _ in range(2)]
    vectors, raw = [make(temb) for make in shared], [make.linear(F.silu(temb)) for make in shared]
    return lambda x, c: ours(x, c, vectors, places)[:2], lambda x, c: other(x, c, *raw, theirs)[::-1]


def single(config, temb, places, theirs, generator):
    """Two functions of all tokens: our single block, and diffusers'."""
    ours, other = pair(config, "single", generator)
    if not config.SHARED:
        vectors, text = ours.prepare(temb), places.text
        return (lambda x: ours(x, vectors, places)[:1],
                lambda x: [torch.cat(other(x[:, text:], x[:, :text], temb, theirs), 1)])
    shared = Modulation(config.width, 3, bias=False).requires_grad_(False)
    vectors, raw = shared(temb), shared.linear(F.silu(temb))
    return lambda x: ours(x, vectors, places)[:1], lambda x: [other(x, None, raw, theirs)]


def pair(config, kind, generator):
    """(our block, diffusers' block with the same weights), frozen."""
    from diffusers.models.transformers import transformer_flux, transformer_flux2
    ours = (DoubleBlock if kind == "double" else SingleBlock)(config).requires_grad_(False)
    sizes = config.width, config.num_attention_heads, config.attention_head_dim
    if config.SHARED:
        name = "Flux2TransformerBlock" if kind == "double" else "Flux2SingleTransformerBlock"
        other = getattr(transformer_flux2, name)(*sizes, mlp_ratio=config.mlp_ratio)
    else:
        other = getattr(transformer_flux, "FluxTransformerBlock" if kind == "double" else "FluxSingleTransformerBlock")(*sizes)
    for parameter in ours.parameters():
        parameter.normal_(std=0.02, generator=generator)
    other.requires_grad_(False).load_state_dict(ours.state_dict())
    return ours.eval(), other.eval()


def race(call, inputs):
    """[CPU seconds forward, backward, outputs] of one call."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    start = time.process_time()
    outputs = call(*leaves)
    middle = time.process_time()
    torch.autograd.grad([out.sum() for out in outputs], leaves)
    return [middle - start, time.process_time() - middle, [out.detach() for out in outputs]]
