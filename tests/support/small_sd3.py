"""Small Stable Diffusion 3 pipelines with random weights, in folders that diffusers itself writes.

    pipeline = small_sd3.pipeline("as published", tokenizers=small_sd3.write_tokenizers(folder))     # the oracle, img2img
    small_sd3.write(pipeline, folder)                       # its save_pretrained; load_editor(folder) is ours

Random networks do next to nothing: the text hardly matters, pictures come out grey. So the weights are scaled until
prompt, negative prompt, seed, picture and strength are all seen in the output and the output is neither flat nor
saturated. Otherwise two editors that ignored their prompts would agree.
"""

import json
import math
from collections import Counter

import diffusers
import small_editors
import torch
import transformers

from sifm_min.miniature import kinds

SD3 = {"patch_size": 2, "pos_embed_max_size": 12, "sample_size": 16, "num_layers": 4, "attention_head_dim": 8,
       "num_attention_heads": 4}
SD3_VAE = {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 16,
           "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False}
CLIP_L = {"hidden_size": 24, "num_attention_heads": 3, "projection_dim": 24, "hidden_act": "quick_gelu"}
CLIP_G = {"hidden_size": 32, "num_attention_heads": 2, "projection_dim": 20, "hidden_act": "gelu"}
# name -> what differs; "length" is of CLIP's prompts, "T5" its encoder, None for a pipeline that was saved without.
CONFIGS = {
    "as published": {                                       # CLIP's channels, 24 + 32, are padded to T5's
        "transformer": SD3, "vae": SD3_VAE, "clips": (CLIP_L, CLIP_G), "length": 77, "shift": 3.0,
        "T5": {"d_model": 64, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4}},
    "without T5": {
        "transformer": SD3 | {"num_layers": 3, "attention_head_dim": 12, "num_attention_heads": 2, "pos_embed_max_size": 9},
        "vae": SD3_VAE | {"layers_per_block": 2}, "clips": (CLIP_L, CLIP_G), "length": 77, "shift": 3.0,
        "T5": None, "width": 60},
    "as SD3.5 medium": {                                    # and CLIP's channels are as many as T5's
        "transformer": SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1), "num_layers": 5},
        "vae": SD3_VAE, "clips": (CLIP_L, CLIP_G), "length": 77, "shift": 3.0,
        "T5": {"d_model": 56, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}},
    "another VAE, short prompts": {                         # half as deep: 4 pixels per latent position, 4 of those per token
        "transformer": SD3 | {"patch_size": 4, "num_layers": 2},
        "vae": {"block_out_channels": (8, 12, 12), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 6,
                "scaling_factor": 0.7, "shift_factor": -0.4},
        "clips": (CLIP_G, CLIP_L | {"projection_dim": 10}), "length": 20, "shift": 1.7,
        "T5": {"d_model": 64, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}},
    "as a tiny test repository": {                          # T5 1.0, and CLIP's channels, 24 + 32, are cropped to its 32
        "transformer": SD3 | {"patch_size": 1, "num_layers": 2, "pos_embed_max_size": 64},
        "vae": {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 1, "latent_channels": 4,
                "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0609, "scaling_factor": 1.5035},
        "clips": (CLIP_L, CLIP_G), "length": 77, "shift": 3.0,
        "T5": {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 3, "num_heads": 4, "feed_forward_proj": "relu"}},
    "as in a single file": {                                # whose shapes do not tell heads and groups: those of the published
        "transformer": SD3 | {"num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 2},
        "vae": SD3_VAE | {"block_out_channels": (32, 64, 96, 96), "layers_per_block": 2, "norm_num_groups": 32},
        "clips": ({"hidden_size": 64, "num_attention_heads": 1, "projection_dim": 64, "hidden_act": "quick_gelu"},
                  {"hidden_size": 64, "num_attention_heads": 1, "projection_dim": 24, "hidden_act": "gelu"}),
        "length": 77, "shift": 3.0, "T5": {"d_model": 128, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4}},
}


def pipeline(name="as published", *, tokenizers, in_channels=None, seed=0):
    """diffusers' img2img pipeline of that config, its weights scaled as the module says.

    tokenizers: a folder that `write_tokenizers` or somebody else filled. in_channels: of the transformer, where they are
    more than the VAE's, as in UltraEdit.
    """
    config = CONFIGS[name]
    torch.manual_seed(seed)
    clips, words = [], []
    for folder, given in zip(("tokenizer", "tokenizer_2"), config["clips"], strict=True):
        words.append(transformers.CLIPTokenizer.from_pretrained(tokenizers / folder, model_max_length=config["length"]))
        clips.append(transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(
            vocab_size=len(words[-1]), intermediate_size=40, num_hidden_layers=3, max_position_embeddings=config["length"],
            bos_token_id=0, eos_token_id=2, **given)))       # 2, which it is not, as in the published files
    t5 = t5_words = None
    if config["T5"]:
        t5_words = transformers.T5TokenizerFast.from_pretrained(tokenizers / "tokenizer_3")
        t5 = transformers.T5EncoderModel(transformers.T5Config(
            **{"vocab_size": len(t5_words), "feed_forward_proj": "gated-gelu"} | config["T5"]))
    latent = config["vae"]["latent_channels"]
    width = config["transformer"]["attention_head_dim"] * config["transformer"]["num_attention_heads"]
    transformer = diffusers.SD3Transformer2DModel(
        in_channels=in_channels or latent, out_channels=latent, caption_projection_dim=width,
        joint_attention_dim=config["T5"]["d_model"] if t5 else config["width"],
        pooled_projection_dim=sum(given["projection_dim"] for given in config["clips"]), **config["transformer"])
    blocks = len(config["vae"]["block_out_channels"])
    vae = diffusers.AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * blocks,
                                  up_block_types=("UpDecoderBlock2D",) * blocks, **config["vae"])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=config["shift"])
    networks = (transformer, vae, *clips, *([t5] if t5 else []))
    for network in networks:
        network.eval().requires_grad_(False)                 # T5 is made with its dropout on
    made = diffusers.StableDiffusion3Img2ImgPipeline(transformer, scheduler, vae, clips[0], words[0], clips[1], words[1],
                                                     t5, t5_words)
    made.set_progress_bar_config(disable=True)
    _bring_to_life(made, networks)
    return made


@torch.no_grad()
def _bring_to_life(made, networks):
    transformer, vae, *texts = networks
    for network in networks:
        for parameter in network.parameters():
            if parameter.ndim == 1:                          # no scale is one, no bias zero
                parameter.add_(0.1 * torch.randn_like(parameter))
    for text in texts:
        text.get_input_embeddings().weight.normal_()
        for parameter in text.parameters():
            if parameter.ndim == 2 and parameter is not text.get_input_embeddings().weight:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    if transformer.config.attention_head_dim == 64:          # CLIP-L's projection, which single files leave out
        torch.nn.init.eye_(texts[0].text_projection.weight)
    for parameter in transformer.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=0.7 * parameter.shape[1] ** -0.5)
    transformer.context_embedder.weight.mul_(3)              # else the text hardly changes the velocity
    noise = torch.randn(4, transformer.config.in_channels, 8, 8)
    context = torch.randn(4, 30, transformer.config.joint_attention_dim)
    pooled = torch.randn(4, transformer.config.pooled_projection_dim)
    velocity = transformer(noise, context, pooled, torch.tensor([800.0, 600.0, 400.0, 200.0])).sample
    small_editors._rescale(transformer.proj_out, velocity, 1.0)
    size = 8 * made.vae_scale_factor
    pixels = torch.rand(4, 3, 8, 8).repeat_interleave(size // 8, 2).repeat_interleave(size // 8, 3) * 2 - 1
    last = vae.quant_conv or vae.encoder.conv_out
    moments = vae.encoder(pixels)
    small_editors._rescale(last, vae.quant_conv(moments) if vae.quant_conv else moments, 1 / vae.config.scaling_factor)
    last.bias[vae.config.latent_channels:].sub_(3)           # a posterior that is seen and does not drown the picture
    latent = torch.randn(4, vae.config.latent_channels, 8, 8) / vae.config.scaling_factor
    small_editors._rescale(vae.decoder.conv_out, vae.decode(latent).sample, 0.4)


def write(made, folder, **options):
    """The pipeline's folder. options: of save_pretrained, such as variant and max_shard_size."""
    made.save_pretrained(folder, **options)
    return folder


def write_tokenizers(folder):
    """A folder with tokenizer, tokenizer_2 and tokenizer_3, small, of the miniature's phrases, none of them published."""
    small_editors.write_tokenizer(folder / "tokenizer")
    second = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer", pad_token="!")
    second.save_pretrained(folder / "tokenizer_2")
    # T5's: whole words by how frequent they are, and characters for the others.
    counts = Counter(f"▁{word}" for text in kinds.corpus() for word in text.split())
    pieces = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁", -3.0]]
    pieces += [[piece, math.log(count / counts.total())] for piece, count in counts.most_common(200)]
    pieces += [[chr(code), -9.0 - code / 100] for code in range(33, 127)]
    special = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    (folder / "tokenizer_3").mkdir()
    (folder / "tokenizer_3" / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "pre_tokenizer": metaspace, "decoder": metaspace,
        "added_tokens": [{"id": i, "content": pieces[i][0], **special} for i in range(3)],
        "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
                           "pair": [{"Sequence": {"id": "A", "type_id": 0}}, end],
                           "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}},
        "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces, "byte_fallback": False}}), encoding="utf-8")
    third = transformers.T5TokenizerFast.from_pretrained(folder / "tokenizer_3", extra_ids=0)
    third.save_pretrained(folder / "tokenizer_3")
    return folder
