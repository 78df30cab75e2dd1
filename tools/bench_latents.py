"""The bench of `--editor latents`, beside a loop on diffusers' AutoencoderTiny; tools/bench.py is its command.

    latents    one step of the method `latent` for two and for five spaces, and with it a photograph of 100 steps

The peer is the loop as one writes it from the paper: networks as from_pretrained leaves them, the original's latents computed
once, all spaces in one graph, and torch.autograd.grad of the sum of the shifts' logarithms at the pixels. Without --weights
both sides have the same random weights in the published shapes. diffusers has no pool branch of taef2: with --weights, its
peer runs without.
"""

import sys
from functools import partial
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench_measuring import agreement, cells, clock, compared, figure, heads, keep_memory, rounds_of, save, table  # noqa: E402
from bench_peers import picture, quiet  # noqa: E402

from sifm_min import images  # noqa: E402
from sifm_min.editors import latents, shifts  # noqa: E402
from sifm_min.models.latent_spaces import SPACES  # noqa: E402
from sifm_min.models.tiny_vae import AutoencoderTiny, TinyVAEConfig  # noqa: E402

STEPS = 100                                                  # of a photograph: the protocol's


def bench_latents(args):
    keep_memory(False)
    editor = read(args)
    lacking, peers = peers_of(editor, args)
    pixels, x = (each.to(args.device) for each in picture(args.size))
    found = {"bench": "latents", "size": args.size, "dtype": str(editor.loop_dtype).removeprefix("torch."),
             "weights": str(args.weights) if args.weights else "random", "peer": lacking or "naive, float32",
             "clock": clock(args), "counts": {}}
    pairs = {}
    for count in args.spaces:
        if count > len(editor.spaces):
            print(f"{count} spaces: there are {len(editor.spaces)}")
            continue
        some = latents.Latents(editor.spaces[:count], device=editor.device, loop_dtype=editor.loop_dtype)
        pairs[count] = [partial(ours(some, pixels), x)] + ([] if lacking else [partial(Naive(peers[:count], pixels), x)])
        for frame in some.frames(args.size, args.size):      # the original's latents, which all steps but the first have
            some.latents(images.resize(pixels, *frame))
    rounds = rounds_of(pairs, args)
    own = clock(args)
    for count, pair in rounds.items():
        one = compared(pair)
        if "peer" in one and all(same for _, same in peers[:count]):
            one["cosine"], one["same_sign"] = agreement(*(side["value"] for side in pair[0]))
        one["photograph"] = {side: STEPS * one[side][own] for side in ("ours", "peer") if side in one}
        found["counts"][count] = one
    print(f"{args.size}x{args.size}, {found['weights']} weights, loop in {found['dtype']}; peer: {found['peer']}")
    table(["spaces", *heads(own), f"photograph of {STEPS} steps, ours, s", "peer", "cosine"],
          [[count, *cells(one, own), figure(one["photograph"]["ours"], 0), figure(one["photograph"].get("peer"), 0),
            figure(one.get("cosine"), 6)] for count, one in found["counts"].items()])
    print(f"\nA step is measured; a photograph is {STEPS} of them, without reading, report and preview.")
    return save(args, found)


def read(args):
    """The editor `latents`: of the files in --weights, or of random weights in the published shapes."""
    if args.weights:
        return latents.load_latents(f"{latents.NAME}:{args.weights}", device=args.device, dtype=args.dtype and torch.float32)
    torch.manual_seed(0)
    spaces = []
    for space in SPACES.values():
        network = AutoencoderTiny(TinyVAEConfig(latent_channels=space.channels)).requires_grad_(False).to(args.device)
        if args.device == "cpu":
            network = network.to(memory_format=torch.channels_last)      # as a file is loaded
        spaces.append(latents.LatentSpace(space.name, network, None, True))
    return latents.Latents(spaces, device=args.device)


def peers_of(editor, args):
    """(the reason why there is no peer or "", [(diffusers' network, True if it computes the same)])."""
    if args.alone:
        return "asked for ours alone", None
    try:
        quiet()
    except ImportError as error:
        return f"diffusers is not compared with: {error}", None
    import diffusers
    peers = []
    for space in editor.spaces:
        config, weights = space.network.config, space.network.state_dict()
        peer = diffusers.AutoencoderTiny(
            latent_channels=config.latent_channels, num_encoder_blocks=config.num_encoder_blocks,
            num_decoder_blocks=config.num_decoder_blocks, encoder_block_out_channels=config.encoder_block_out_channels,
            decoder_block_out_channels=config.decoder_block_out_channels)
        same = {name: value.contiguous() for name, value in weights.items() if ".pool." not in name}
        peer.load_state_dict(same)
        peers.append((peer.to(args.device).eval(), len(same) == len(weights)))
    return "", peers


def ours(editor, pixels):
    """(x, round) -> the gradient of one step of the method `latent` at these pixels."""
    objective = latents.latent(editor, pixels, [], generator=torch.Generator())

    def step(x, number):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(objective(x, number)[0], x)[0]

    return step


class Naive:
    """The loop on diffusers' networks: see above."""

    def __init__(self, peers, pixels):
        self.networks = [network for network, _ in peers]
        with torch.no_grad():
            self.originals = self.encode(pixels)

    def encode(self, pixels):
        return [network.encode(2 * pixels - 1).latents for network in self.networks]

    def __call__(self, x, number):
        x = x.detach().requires_grad_()
        loss = -sum(shifts.shift(*pair).log() for pair in zip(self.encode(x), self.originals, strict=True))
        return torch.autograd.grad(loss, x)[0]


def add(commands, shared):
    """The bench's command, among those of tools/bench.py."""
    made = commands.add_parser("latents", parents=[shared],
                               help="one step of --editor latents, beside diffusers' AutoencoderTiny")
    made.set_defaults(run=bench_latents, threads=1, repeat=3)
    made.add_argument("--spaces", type=lambda text: [int(n) for n in text.split(",")], default=[2, 5], metavar="LIST",
                      help="how many spaces (default: 2,5)")
    made.add_argument("--size", type=int, default=512, help="side of the picture (default: 512)")
    made.add_argument("--weights", type=Path, metavar="FOLDER", help="files of tiny autoencoders (default: random weights)")
    made.add_argument("--dtype", choices=("float32",), help="of the loop (default: as the product chooses)")
    made.add_argument("--alone", action="store_true", help="without the peer")
    made.add_argument("--json", metavar="FILE", help="write everything found there")
