"""The smallest Stable Diffusion 3 that has every part: random weights, our own networks, written in the published layout.

Like tiny_editor.py it needs neither diffusers nor transformers, and its edits mean nothing.
"""

import math

import tiny_editor
import torch

from sifm_min.models.clip import CLIPText
from sifm_min.models.mmdit import MMDiT
from sifm_min.models.t5 import T5Encoder
from sifm_min.models.vae import AutoencoderKL

CLIP = {"vocab_size": len(tiny_editor.TOKENS), "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 16, "hidden_act": "gelu", "eos_token_id": 2,
        "architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model", "projection_dim": 8}
PIECES = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁", -3.0],
          *([chr(code), -math.log(code)] for code in range(33, 127))]
NETWORKS = {
    "transformer/diffusion_pytorch_model": (MMDiT, {
        "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4, "joint_attention_dim": 16, "in_channels": 4,
        "out_channels": 4, "caption_projection_dim": 8, "pooled_projection_dim": 16, "pos_embed_max_size": 16}),
    "vae/diffusion_pytorch_model": (AutoencoderKL, {
        "block_out_channels": [4, 4], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2, "shift_factor": 0.1}),
    "text_encoder/model": (CLIPText, CLIP),
    "text_encoder_2/model": (CLIPText, CLIP),
    "text_encoder_3/model": (T5Encoder, {
        "vocab_size": len(PIECES), "d_model": 16, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2,
        "architectures": ["T5EncoderModel"], "model_type": "t5", "feed_forward_proj": "gated-gelu"}),
}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
TEXTS = {
    "model_index.json": {
        "_class_name": "StableDiffusion3Pipeline", "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
        "_sifm_min": {"notice": tiny_editor.NOTICE, "defaults": {"steps": 2, "guidance": 3.0, "size": 16, "text_length": 8}}},
    "scheduler/scheduler_config.json": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    "tokenizer/vocab.json": {token: i for i, token in enumerate(tiny_editor.TOKENS)},
    "tokenizer/tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16},
    "tokenizer_2/vocab.json": {token: i for i, token in enumerate(tiny_editor.TOKENS)},
    "tokenizer_2/tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16, "pad_token": "!"},
    "tokenizer_3/tokenizer.json": {
        "normalizer": None, "pre_tokenizer": METASPACE, "added_tokens": [{"id": i, "content": PIECES[i][0]} for i in range(3)],
        "model": {"type": "Unigram", "unk_id": 2, "vocab": PIECES, "byte_fallback": False}},
    "tokenizer_3/tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"},
}


def write(folder, seed=0, instructed=False):
    """Write the editor into a folder, which is returned. instructed: UltraEdit, whose transformer sees the image latent too."""
    networks, name = dict(NETWORKS), "transformer/diffusion_pytorch_model"
    if instructed:
        network, config = networks[name]
        networks[name] = network, config | {"in_channels": 2 * config["out_channels"]}
    return tiny_editor.write_parts(folder, networks, TEXTS, seed, prepare=_draw_positions)


def _draw_positions(network):
    if isinstance(network, MMDiT):
        torch.nn.init.normal_(network.pos_embed.pos_embed)
