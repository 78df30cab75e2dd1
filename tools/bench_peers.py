"""The two sides that tools/bench_editors.py compares: editors with random weights at full size, our step, and the naive step.

`weights` gives the folder of the editor that is measured, which both sides read; `Ours` and `Naive` are one step of SIFM,
by this project and by Algorithm 1 of the paper as one would write it on diffusers' networks.
"""

import contextlib
import json
import math
import os
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sifm_min.editors import load_editor  # noqa: E402
from sifm_min.models.byte_pairs import byte_symbols  # noqa: E402
from sifm_min.models.clip import CLIPText  # noqa: E402
from sifm_min.models.clip_tokenizer import END, START  # noqa: E402
from sifm_min.models.mmdit import MMDiT  # noqa: E402
from sifm_min.models.unet import UNet  # noqa: E402
from sifm_min.models.vae import AutoencoderKL  # noqa: E402
from sifm_min.sifm import sifm  # noqa: E402

LAM, EPS = 0.1, 0.03
PROMPTS = ("make her a witch", "turn him into a zombie", "make it night", "as a marble statue", "in the snow",
           "as an oil painting")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# --------------------------------------------------------------------------------------- editors with random weights

CLIP_L = {"architectures": ["CLIPTextModel"], "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072,
          "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
          "projection_dim": 768, "eos_token_id": 2, "model_type": "clip_text_model"}
# Of Stable Diffusion 3's text encoders only the widths matter: they are released before the first step.
SHALLOW = {"architectures": ["CLIPTextModelWithProjection"], "num_hidden_layers": 2}
CLIP_G = CLIP_L | {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "hidden_act": "gelu",
                   "projection_dim": 1280}
VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
       "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
CROSS = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
# name -> {component: (network, its class in diffusers or transformers, its config.json)}, as published.
FULL = {
    "instruct-pix2pix": {
        "unet": (UNet, "UNet2DConditionModel", {
            "in_channels": 8, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
            "attention_head_dim": 8, "cross_attention_dim": 768, "down_block_types": [*CROSS[:1] * 3, "DownBlock2D"],
            "up_block_types": ["UpBlock2D", *CROSS[1:] * 3]}),
        "vae": (AutoencoderKL, "AutoencoderKL", VAE),
        "text_encoder": (CLIPText, "CLIPTextModel", CLIP_L),
    },
    "sd3": {
        "transformer": (MMDiT, "SD3Transformer2DModel", {
            "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048, "pos_embed_max_size": 192, "caption_projection_dim": 1536}),
        "vae": (AutoencoderKL, "AutoencoderKL", VAE | {
            "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
            "use_post_quant_conv": False}),
        "text_encoder": (CLIPText, "CLIPTextModelWithProjection", CLIP_L | SHALLOW),
        "text_encoder_2": (CLIPText, "CLIPTextModelWithProjection", CLIP_G | SHALLOW),
    },
}
SCHEDULERS = {
    "instruct-pix2pix": {"_class_name": "EulerAncestralDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012,
                         "beta_schedule": "scaled_linear", "timestep_spacing": "linspace", "steps_offset": 1},
    "sd3": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
}
PIPELINES = {"instruct-pix2pix": "StableDiffusionInstructPix2PixPipeline", "sd3": "StableDiffusion3Pipeline"}
TOKENS = [mark + end for end in ("", "</w>") for mark in byte_symbols().values()] + [START, END]


def write_editor(folder, kind, dtype=torch.float32, networks=None):
    """An editor of that kind with random weights, in the published layout, which diffusers reads as well."""
    networks = networks or FULL[kind]
    index = {"_class_name": PIPELINES[kind], "scheduler": ["diffusers", SCHEDULERS[kind]["_class_name"]]}
    absent = {"instruct-pix2pix": ("safety_checker", "feature_extractor", "image_encoder"),
              "sd3": ("text_encoder_3", "tokenizer_3", "feature_extractor", "image_encoder")}[kind]
    index |= {"requires_safety_checker": False} if "safety_checker" in absent else {}
    index |= {component: [None, None] for component in absent}
    files = {"scheduler/scheduler_config.json": SCHEDULERS[kind]}
    generator = torch.Generator().manual_seed(0)
    for component, (network, theirs, config) in networks.items():
        text = component.startswith("text_encoder")
        index[component] = ["transformers" if text else "diffusers", theirs]
        files[f"{component}/config.json"] = config if text else {"_class_name": theirs, **config}
        if text:
            tokenizer = component.replace("text_encoder", "tokenizer")
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
            files[f"{tokenizer}/vocab.json"] = {token: i for i, token in enumerate(TOKENS)}
            files[f"{tokenizer}/tokenizer_config.json"] = {"tokenizer_class": "CLIPTokenizer",
                                                           "model_max_length": config["max_position_embeddings"]}
            (folder / tokenizer).mkdir(parents=True)
            (folder / tokenizer / "merges.txt").write_text("#version: 0.2\n")
        (folder / component).mkdir(parents=True)
        with torch.device("meta"):
            made = network(network.Config.from_json(json.dumps(config)))
        write_weights(folder / component / f"{'model' if text else 'diffusion_pytorch_model'}.safetensors",
                      made.state_dict(), dtype, generator)
    for name, content in {**files, "model_index.json": index}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def write_weights(path, tensors, dtype, generator):
    """A file of random weights for tensors on the meta device; written one by one, since together they fill the memory."""
    spelled = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": spelled, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            values = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim in (2, 4):
                values = values * tensor[0].numel() ** -0.5
            else:                                            # norms and biases; and the table of positions
                values = 0.1 * values + (tensor.ndim == 1 and name.endswith("weight"))
            file.write(values.to(dtype).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())                              # only pages that are on the disk can be dropped from memory


@contextlib.contextmanager
def weights(args):
    """(folder of the measured editor, a description of it)."""
    if args.editor not in FULL:
        miniature = args.editor == "miniature"
        yield load_editor("miniature", device="cpu").checkpoint.folder if miniature else Path(args.editor), args.editor
        return
    dtypes = {args.dtype, getattr(args, "peer_dtype", args.dtype)}
    dtype = DTYPES[args.dtype if len(dtypes) == 1 else "float32"]
    with tempfile.TemporaryDirectory() if args.folder is None else contextlib.nullcontext(args.folder) as folder:
        folder = Path(folder)
        if not (folder / "model_index.json").exists():
            write_editor(folder, args.editor, dtype)
        yield folder, f"{args.editor} at full size, random weights"


def picture(size):
    """A picture of soft shapes, (1,3,size,size) in [0,1], and the same somewhere in the budget around it."""
    generator = torch.Generator().manual_seed(0)
    pixels = F.interpolate(torch.rand(1, 3, 5, 5, generator=generator), (size, size), mode="bicubic").clamp(0, 1)
    return pixels, (pixels + EPS * (2 * torch.rand(pixels.shape, generator=generator) - 1)).clamp(0, 1)


# ------------------------------------------------------------------------------------------------------- the two sides

class Ours:
    """One SIFM step of this project, as in `pgd`: the objective and the gradient to the pixels."""

    def __init__(self, editor, original, contexts, timesteps, taps, plan, **options):
        self.editor, self.plan = editor, plan
        options = {"reduction": "relative", **options}       # what `Naive` does
        self.objective = sifm(editor, original, contexts, generator=torch.Generator().manual_seed(1), lam=LAM,
                              timesteps=timesteps, taps=taps, batch=plan.batch, **options)

    def __call__(self, x, step):
        self.editor.checkpointing = self.plan.checkpointing
        x = x.detach().requires_grad_(True)
        loss, _ = self.objective(x, step)
        return torch.autograd.grad(loss, x)[0]


class Naive:
    """Algorithm 1 as one writes it from the paper: for every timestep the whole way from the pixels through diffusers'
    networks, hooks on the tapped modules, and the gradient back. Networks are as from_pretrained leaves them."""

    def __init__(self, vae, denoiser, alphas_cumprod=None):
        self.vae, self.denoiser, self.alphas_cumprod = vae, denoiser, alphas_cumprod        # None: rectified flow

    def prepare(self, original, contexts, timesteps, taps):
        """Set up the values that all steps share: timesteps, noise (from the seed of `Ours`), the original's activations."""
        place = self.vae.device, self.vae.dtype
        self.contexts = [context.to(*place) if isinstance(context, torch.Tensor) else
                         [part.to(*place) for part in context] for context in contexts]
        self.timesteps, self.taps = timesteps.tolist(), taps
        with torch.no_grad():
            mean = self.encode(original)
            self.noise = torch.randn((len(timesteps), *mean.shape[1:]), generator=torch.Generator().manual_seed(1)).to(mean)
            self.original = [[self.activations(mean, i, context) for i in range(len(timesteps))]
                             for context in self.contexts]
        return self

    def encode(self, pixels):
        return self.vae.encode(2 * pixels.to(self.vae.device, self.vae.dtype) - 1).latent_dist.mean

    def activations(self, mean, i, context):
        t, noise, config = self.timesteps[i], self.noise[i:i + 1], self.vae.config
        timestep = torch.tensor([t], device=mean.device)
        found = {}
        with contextlib.ExitStack() as hooks:
            for name in self.taps:
                path = name.removesuffix(".context").removesuffix("out")
                hooks.callback(self.denoiser.get_submodule(path).register_forward_hook(partial(keep, found, name)).remove)
            if self.alphas_cumprod is None:
                latent = (mean - (config.shift_factor or 0)) * config.scaling_factor
                noisy = (1 - t / 1000) * latent + t / 1000 * noise
                self.denoiser(noisy, context[0], context[1], timestep)
            else:
                kept = self.alphas_cumprod[t].item()
                noisy = math.sqrt(kept) * config.scaling_factor * mean + math.sqrt(1 - kept) * noise
                self.denoiser(torch.cat([noisy, mean], 1), timestep, context)
        return [found[name].float() for name in self.taps]

    def __call__(self, x, step):
        n, total = step % len(self.contexts), 0
        for i in range(len(self.timesteps)):
            pixels = x.detach().requires_grad_(True)
            loss = 0
            for a, b in zip(self.activations(self.encode(pixels), i, self.contexts[n]), self.original[n][i], strict=True):
                loss = loss + a.abs().sum() / b.abs().sum() - LAM * (a - b).square().sum() / b.square().sum()
            total = total + torch.autograd.grad(loss / len(self.taps), pixels)[0] / len(self.timesteps)
        return total


def keep(found, name, module, given, output):
    """A forward hook. Blocks of SD3 give text and picture, in this order; others a tuple of one, or the tensor."""
    if hasattr(output, "sample"):
        output = output.sample
    found[name] = output if isinstance(output, torch.Tensor) else output[0 if name.endswith(".context") else -1]


def read_networks(folder, dtype, device):
    """(VAE, denoiser, alphas_cumprod) of a folder: what `Naive` takes."""
    import diffusers
    component = "unet" if (folder / "unet").exists() else "transformer"
    kind = {"unet": "UNet2DConditionModel", "transformer": "SD3Transformer2DModel"}[component]
    denoiser = getattr(diffusers, kind).from_pretrained(folder / component, torch_dtype=dtype).to(device)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype).to(device)
    return vae, denoiser, alphas_cumprod(folder)


def alphas_cumprod(folder):
    """The alphas_cumprod of a U-Net's training; None for a transformer, which was trained with rectified flow."""
    from diffusers import DDPMScheduler
    if not (folder / "unet").exists():
        return None
    given = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    trained = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "rescale_betas_zero_snr")
    return DDPMScheduler.from_config({key: given[key] for key in trained if key in given}).alphas_cumprod


def pipeline_class(folder, name=None):
    """diffusers' class of that name (default: the one that the folder is of), imported, and quiet."""
    import diffusers
    quiet()
    return getattr(diffusers, name or _index(folder)["_class_name"])


def read_pipeline(pipeline, folder, dtype, device):
    """The whole pipeline in a folder. diffusers needs None for components that were not saved, such as T5."""
    absent = {name: None for name, entry in _index(folder).items() if entry == [None, None]}
    return pipeline.from_pretrained(folder, torch_dtype=dtype, **absent).to(device)


def _index(folder):
    return json.loads((folder / "model_index.json").read_text())


def pipeline_networks(pipeline, folder):
    """The parts of a pipeline that `Naive` takes."""
    return pipeline.vae, pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer, alphas_cumprod(folder)


@torch.no_grad()
def pipeline_contexts(pipeline, prompt):
    """A prompt's text context by a pipeline's own encoders, as a list of one."""
    if hasattr(pipeline, "transformer"):
        states, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
        return [(states, pooled)]
    ids = pipeline.tokenizer(prompt, padding="max_length", max_length=pipeline.tokenizer.model_max_length, truncation=True,
                             return_tensors="pt").input_ids
    return [pipeline.text_encoder(ids.to(pipeline.device))[0]]


def quiet():
    """Silence the progress bars and remarks of diffusers and transformers. Raises ImportError without diffusers."""
    from diffusers.utils import logging
    from transformers.utils import logging as others
    for each in (logging, others):
        each.set_verbosity_error()
        each.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*torch_dtype")           # `dtype` is its name in newer releases alone


def peer_lacks(editor):
    """The reason why diffusers cannot be compared with, or ''."""
    try:
        quiet()
    except ImportError as error:
        return f"diffusers is not compared with: {error}"
    latent = editor.vae.config.latent_channels
    channels = editor.unet.config.in_channels // 2 if hasattr(editor, "unet") else editor.config.in_channels
    if channels != latent or (editor.checkpoint and not (editor.checkpoint.folder / "model_index.json").exists()):
        return "the naive peer is written for the folders of InstructPix2Pix and Stable Diffusion 3"
    return ""
