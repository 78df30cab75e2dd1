"""The smallest FLUX.1 Kontext that has every part: random weights, our own networks, written in the published layout.

Like tiny_editor.py it needs neither diffusers nor transformers, and its edits mean nothing.
"""

import tiny_editor
import tiny_sd3

from sifm_min.models.clip import CLIPText
from sifm_min.models.flux import Flux1

NETWORKS = {
    "transformer/diffusion_pytorch_model": (Flux1, {
        "num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 16,
        "in_channels": 16, "out_channels": None, "guidance_embeds": True, "axes_dims_rope": [4, 2, 2],
        "pooled_projection_dim": 8}),
    "vae/diffusion_pytorch_model": tiny_sd3.NETWORKS["vae/diffusion_pytorch_model"],
    "text_encoder/model": (CLIPText, tiny_editor.NETWORKS["text_encoder/model"][1]),
    "text_encoder_2/model": tiny_sd3.NETWORKS["text_encoder_3/model"],
}
TEXTS = {
    "model_index.json": {"_class_name": "FluxKontextPipeline", "_sifm_min": {
        "notice": tiny_editor.NOTICE, "defaults": {"steps": 2, "guidance": 2.5, "size": 16, "text_length": 16}}},
    "scheduler/scheduler_config.json": {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5,
        "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096},
    "tokenizer/vocab.json": tiny_sd3.TEXTS["tokenizer/vocab.json"],
    "tokenizer/tokenizer_config.json": tiny_sd3.TEXTS["tokenizer/tokenizer_config.json"],
    "tokenizer_2/tokenizer.json": tiny_sd3.TEXTS["tokenizer_3/tokenizer.json"],
    "tokenizer_2/tokenizer_config.json": tiny_sd3.TEXTS["tokenizer_3/tokenizer_config.json"],
}


def write(folder, seed=0):
    """Write the editor into a folder, which is returned."""
    return tiny_editor.write_parts(folder, NETWORKS, TEXTS, seed)
