"""Small InstructPix2Pix editors with random weights, in folders that diffusers itself writes.

    pipeline = small_editors.pipeline("as published")       # diffusers' own, the oracle
    small_editors.write(pipeline, folder)                   # its save_pretrained; load_editor(folder) is ours

Random networks do next to nothing: the text hardly matters, pictures come out grey. So the weights are scaled until
prompt, seed and picture are all seen in the output and the output is neither flat nor saturated. Otherwise two editors
that ignored their prompts would agree.
"""

import importlib.util
from pathlib import Path

import diffusers
import torch
import transformers

from sifm_min.miniature import kinds

source = Path(__file__).resolve().parents[2] / "tools" / "train_bpe.py"
spec = importlib.util.spec_from_file_location("train_bpe", source)
train_bpe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_bpe)

DOWN, UP, DOWN_ATTENDS, UP_ATTENDS = "DownBlock2D", "UpBlock2D", "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# name -> what differs: block layout, heads, activation of the text encoder, width of the VAE, length of a prompt.
CONFIGS = {
    "as published": {
        "unet": {"block_out_channels": (16, 32, 32, 32), "down_block_types": (DOWN_ATTENDS,) * 3 + (DOWN,),
                 "up_block_types": (UP,) + (UP_ATTENDS,) * 3, "attention_head_dim": 4, "layers_per_block": 1,
                 "norm_num_groups": 8},
        "vae": {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 2, "norm_num_groups": 4},
        "text": {"hidden_size": 24, "num_attention_heads": 3, "hidden_act": "quick_gelu"}, "length": 77,
    },
    "three levels, linear projections": {
        "unet": {"block_out_channels": (12, 24, 36), "down_block_types": (DOWN, DOWN_ATTENDS, DOWN_ATTENDS),
                 "up_block_types": (UP_ATTENDS, UP_ATTENDS, UP), "attention_head_dim": (2, 3, 6),
                 "layers_per_block": 2, "norm_num_groups": 6, "use_linear_projection": True},
        "vae": {"block_out_channels": (8, 8, 16, 24), "layers_per_block": 1, "norm_num_groups": 8},
        "text": {"hidden_size": 32, "num_attention_heads": 2, "hidden_act": "gelu"}, "length": 77,
    },
    "two levels, short prompts": {
        "unet": {"block_out_channels": (16, 32), "down_block_types": (DOWN_ATTENDS, DOWN_ATTENDS),
                 "up_block_types": (UP_ATTENDS, UP_ATTENDS), "attention_head_dim": 8, "layers_per_block": 1,
                 "norm_num_groups": 8},
        "vae": {"block_out_channels": (4, 8, 12, 12), "layers_per_block": 1, "norm_num_groups": 2,
                "scaling_factor": 0.4},
        "text": {"hidden_size": 16, "num_attention_heads": 4, "hidden_act": "quick_gelu"}, "length": 24,
    },
}
SCHEDULERS = {
    "Euler ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="linspace"),
    "DDIM": lambda: diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "PNDM": lambda: diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
}


def pipeline(name="as published", scheduler="Euler ancestral", *, tokenizer, seed=0):
    """diffusers' pipeline of that config, its weights scaled as the module says. tokenizer: a folder."""
    config = CONFIGS[name]
    torch.manual_seed(seed)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tokenizer, model_max_length=config["length"])
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), intermediate_size=40, num_hidden_layers=2, max_position_embeddings=config["length"],
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, **config["text"]))
    unet = diffusers.UNet2DConditionModel(
        in_channels=8, out_channels=4, cross_attention_dim=config["text"]["hidden_size"], sample_size=8,
        **config["unet"])
    blocks = len(config["vae"]["block_out_channels"])
    vae = diffusers.AutoencoderKL(latent_channels=4, down_block_types=("DownEncoderBlock2D",) * blocks,
                                  up_block_types=("UpDecoderBlock2D",) * blocks, **config["vae"])
    made = diffusers.StableDiffusionInstructPix2PixPipeline(
        vae=vae.eval(), text_encoder=text.eval(), tokenizer=tokenizer, unet=unet.eval(),
        scheduler=SCHEDULERS[scheduler](), safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    _bring_to_life(made)
    return made


@torch.no_grad()
def _bring_to_life(made):
    for network in (made.unet, made.vae, made.text_encoder):
        for parameter in network.parameters():
            if parameter.ndim == 1:                         # no scale is one, no bias zero
                parameter.add_(0.1 * torch.randn_like(parameter))
    made.text_encoder.get_input_embeddings().weight.mul_(10)
    for name, parameter in made.unet.named_parameters():
        if "attn2" in name and ("to_q" in name or "to_k" in name or "to_out" in name or "to_v" in name) and parameter.ndim == 2:
            parameter.mul_(3)                               # else the text hardly changes the prediction
    length = made.tokenizer.model_max_length
    noise = torch.randn(4, 8, 8, 8)
    context = made.text_encoder(torch.randint(0, len(made.tokenizer), (4, length))).last_hidden_state
    _rescale(made.unet.conv_out, made.unet(noise, 500, context).sample, 1.0)
    pixels = torch.rand(4, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3) * 2 - 1
    moments = made.vae.quant_conv(made.vae.encoder(pixels))
    _rescale(made.vae.quant_conv, moments, 1 / made.vae.config.scaling_factor)
    _rescale(made.vae.decoder.conv_out, made.vae.decode(torch.randn(4, 4, 8, 8) * 5).sample, 0.4)


def _rescale(layer, output, std):
    """Scale a last layer so that the network's output has zero mean and this standard deviation."""
    scale = std / output.std()
    layer.weight.mul_(scale)
    layer.bias.mul_(scale).sub_(output.mean() * scale)


def write_tokenizer(folder):
    """A folder with a small byte-level BPE of the miniature's phrases."""
    train_bpe.write(folder, *train_bpe.train_bpe(kinds.corpus(), 620), 77)
    return folder
