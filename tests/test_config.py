"""models/config.py: six networks' config.json read by one rule. Each key or value that could change the numbers is refused in
a sentence that names file, key and value; each key that changes nothing is taken."""

import json

import diffusers
import pytest
from diffusers.training_utils import EMAModel

from sifm_min.models import config
from sifm_min.models.clip import CLIPTextConfig
from sifm_min.models.mmdit import MMDiTConfig
from sifm_min.models.t5 import T5Config
from sifm_min.models.tiny_vae import TinyVAEConfig
from sifm_min.models.unet import UNetConfig
from sifm_min.models.vae import VAEConfig

DOWN, UP, CROSS_DOWN, CROSS_UP = "DownBlock2D", "UpBlock2D", "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
# The smallest file of each network; a key in NEEDED cannot be left out.
BASES = {
    UNetConfig: {"block_out_channels": [8, 16], "down_block_types": [CROSS_DOWN, DOWN], "up_block_types": [UP, CROSS_UP],
                 "cross_attention_dim": 8, "attention_head_dim": 2, "norm_num_groups": 4, "layers_per_block": 1},
    VAEConfig: {"block_out_channels": [8, 16], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4,
                "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2},
    TinyVAEConfig: {"encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8], "num_encoder_blocks": [1, 2],
                    "num_decoder_blocks": [2, 1], "latent_channels": 4},
    MMDiTConfig: {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 8,
                  "caption_projection_dim": 16, "pooled_projection_dim": 8, "pos_embed_max_size": 4},
    CLIPTextConfig: {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
                     "num_attention_heads": 3, "max_position_embeddings": 20, "hidden_act": "quick_gelu",
                     "architectures": ["CLIPTextModel"], "model_type": "clip_text_model"},
    T5Config: {"vocab_size": 60, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_heads": 3,
               "architectures": ["T5EncoderModel"], "model_type": "t5", "feed_forward_proj": "gated-gelu"},
}
NEEDED = {
    UNetConfig: ("block_out_channels", "down_block_types", "up_block_types", "cross_attention_dim"),
    VAEConfig: ("block_out_channels", "layers_per_block", "latent_channels"),
    MMDiTConfig: tuple(BASES[MMDiTConfig]),
    CLIPTextConfig: tuple(BASES[CLIPTextConfig])[:7],
    T5Config: ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"),
}
# A change of the smallest file -> words of the refusal. Its first key is named there, with "sets", unless the words say more.
REFUSED = [
    (UNetConfig, {"down_block_types": [CROSS_DOWN, "AttnDownBlock2D"]}, "AttnDownBlock2D"),
    (UNetConfig, {"up_block_types": ["SimpleCrossAttnUpBlock2D", UP]}, "SimpleCrossAttnUpBlock2D"),
    (UNetConfig, {"up_block_types": [UP, [CROSS_UP]]}, "up_block_types"),
    (UNetConfig, {"down_block_types": [DOWN]}, "sets down_block_types to"),
    (UNetConfig, {"up_block_types": None}, "sets up_block_types to None"),
    (UNetConfig, {"block_out_channels": 64}, "sets block_out_channels to 64"),
    (UNetConfig, {"block_out_channels": [], "down_block_types": [], "up_block_types": []}, "block_out_channels"),
    (UNetConfig, {"block_out_channels": [8, "16"]}, "block_out_channels"),
    (UNetConfig, {"block_out_channels": [8, 18]}, "18.* norm_num_groups 4"),
    (UNetConfig, {"block_out_channels": [3, 6], "norm_num_groups": 3, "attention_head_dim": 3}, "sines and cosines"),
    (UNetConfig, {"freq_shift": 4}, "freq_shift 4"),
    (UNetConfig, {"freq_shift": "none"}, "sets freq_shift to 'none'"),
    (UNetConfig, {"attention_head_dim": 3}, "8 .* 3 heads"),
    (UNetConfig, {"attention_head_dim": [2, 0]}, "attention_head_dim"),
    (UNetConfig, {"attention_head_dim": [2, 2, 2]}, "attention_head_dim .*each of the 2"),
    (UNetConfig, {"attention_head_dim": None}, "attention_head_dim"),
    (UNetConfig, {"transformer_layers_per_block": [[1], [2]]}, "transformer_layers_per_block"),
    (UNetConfig, {"cross_attention_dim": [8, 16]}, r"sets cross_attention_dim to \[8, 16\], not to a whole number"),
    (UNetConfig, {"cross_attention_dim": [8, 8, 8]}, "cross_attention_dim"),       # a value for a resolution that is missing
    (UNetConfig, {"cross_attention_dim": []}, "cross_attention_dim"),
    (UNetConfig, {"only_cross_attention": [False, True]}, "sets only_cross_attention to .*; only False is implemented"),
    (UNetConfig, {"layers_per_block": [1, 2]}, "layers_per_block"),
    (UNetConfig, {"layers_per_block": 0}, "layers_per_block to 0, not to a whole number from 1"),
    (UNetConfig, {"layers_per_block": 10**6}, "layers_per_block to 1000000, not to a whole number from 1 to 1000"),
    (UNetConfig, {"in_channels": True}, "in_channels to True"),
    (UNetConfig, {"in_channels": 10**30}, "in_channels"),
    (UNetConfig, {"norm_num_groups": None}, "norm_num_groups to None"),
    (UNetConfig, {"norm_eps": None}, "norm_eps"),
    (UNetConfig, {"norm_eps": float("nan")}, "norm_eps to nan"),
    (UNetConfig, {"flip_sin_to_cos": "yes"}, "flip_sin_to_cos to 'yes', not to true or false"),
    (UNetConfig, {"use_linear_projection": None}, "use_linear_projection"),
    (UNetConfig, {"qk_norm": "rms_norm"}, "sets qk_norm, which the U-Net here does not implement"),
    (UNetConfig, {"quantization_config": {"bits": 4}}, "quantization_config"),
    (VAEConfig, {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "AttnDownEncoderBlock2D"),
    (VAEConfig, {"up_block_types": ["UpDecoderBlock2D", "SpatialUp"]}, "SpatialUp"),
    (VAEConfig, {"down_block_types": ["DownEncoderBlock2D"]}, "each of its 2"),
    (VAEConfig, {"up_block_types": 3}, "up_block_types"),
    (VAEConfig, {"up_block_types": None}, "up_block_types"),
    (VAEConfig, {"block_out_channels": 64}, "block_out_channels"),
    (VAEConfig, {"act_fn": "gelu"}, "sets act_fn to 'gelu'; only 'silu' is implemented"),
    (VAEConfig, {"latents_mean": [0.0] * 4}, "latents_mean"),
    (VAEConfig, {"latents_std": [1.0] * 4}, "latents_std"),
    (VAEConfig, {"num_attention_heads": 8}, "num_attention_heads"),
    (VAEConfig, {"norm_num_groups": 3}, "norm_num_groups"),
    (VAEConfig, {"block_out_channels": [], "down_block_types": [], "up_block_types": []}, "block_out_channels"),
    (VAEConfig, {"layers_per_block": None}, "layers_per_block"),
    (VAEConfig, {"scaling_factor": "0.18"}, "sets scaling_factor to '0.18', not to a number"),
    (VAEConfig, {"scaling_factor": 0}, "scaling_factor"),
    (VAEConfig, {"use_quant_conv": 1}, "use_quant_conv to 1, not to true or false"),
    *((MMDiTConfig, {key: wrong}, f"sets {key} to ") for key in BASES[MMDiTConfig] for wrong in (0, "8")),
    *((MMDiTConfig, {"num_layers": wrong}, "sets num_layers to ") for wrong in (-1, 2.0, True, None, [2])),
    *((MMDiTConfig, {"dual_attention_layers": wrong}, "sets dual_attention_layers to ")
      for wrong in (1, None, "01", [2], [-1], [0.0], [True], ["0"], {"0": 1})),
    *((MMDiTConfig, {"qk_norm": wrong}, "sets qk_norm to ") for wrong in ("layer_norm", "", False, ["rms_norm"])),
    (MMDiTConfig, {"caption_projection_dim": 24}, "sets caption_projection_dim to 24"),
    (MMDiTConfig, {"num_attention_heads": 3}, "sets caption_projection_dim to 16"),
    (MMDiTConfig, {"cross_attention_dim": 8}, "sets cross_attention_dim, which"),
    (MMDiTConfig, {"guidance_embeds": 8}, "sets guidance_embeds, which"),
    (CLIPTextConfig, {"rope_theta": 1e4}, "rope_theta"),
    (CLIPTextConfig, {"quantization_config": {"bits": 4}}, "quantization_config"),
    (CLIPTextConfig, {"architectures": ["CLIPModel"]}, "CLIPModel"),
    (CLIPTextConfig, {"architectures": 3}, "architectures"),
    (CLIPTextConfig, {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": None}, "projection_dim"),
    (CLIPTextConfig, {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": "8"}, "projection_dim"),
    (CLIPTextConfig, {"model_type": "clip"}, "model_type"),
    (CLIPTextConfig, {"is_decoder": True}, "is_decoder"),
    (CLIPTextConfig, {"hidden_act": "relu"}, "'relu'.*quick_gelu and gelu"),
    (CLIPTextConfig, {"hidden_act": ["gelu"]}, "hidden_act"),
    (CLIPTextConfig, {"num_attention_heads": 5}, "24.*5"),
    (CLIPTextConfig, {"eos_token_id": [2, 3]}, "eos_token_id"),
    (CLIPTextConfig, {"eos_token_id": None}, "eos_token_id"),
    (CLIPTextConfig, {"num_hidden_layers": 0}, "num_hidden_layers"),
    (CLIPTextConfig, {"hidden_size": "24"}, "hidden_size to '24'"),
    (T5Config, {"rope_theta": 1e4}, "rope_theta"),
    (T5Config, {"quantization_config": {"bits": 4}}, "quantization_config"),
    (T5Config, {"architectures": ["UMT5EncoderModel"]}, "UMT5EncoderModel.*T5EncoderModel"),
    (T5Config, {"model_type": "umt5"}, "model_type to 'umt5'"),
    (T5Config, {"is_decoder": True}, "is_decoder"),
    (T5Config, {"feed_forward_proj": "gated-silu"}, "feed_forward_proj to 'gated-silu'; implemented are gated-gelu and relu"),
    (TinyVAEConfig, {"encoder_block_out_channels": [8, 16]}, r"encoder_block_out_channels to \[8, 16\]; implemented is one"),
    (TinyVAEConfig, {"decoder_block_out_channels": []}, r"decoder_block_out_channels to \[\]; implemented is one width"),
    (TinyVAEConfig, {"num_decoder_blocks": [1, 1, 1]}, "2 values in decoder_block_out_channels and 3 in num_decoder_blocks"),
    (TinyVAEConfig, {"num_encoder_blocks": [1], "encoder_block_out_channels": [8]}, "1 resolutions in the encoder and 2"),
    (TinyVAEConfig, {"num_encoder_blocks": [1, -1]}, "sets num_encoder_blocks to"),
    (TinyVAEConfig, {"scaling_factor": 0}, "scaling_factor to 0"),
    (TinyVAEConfig, {"use_midblock_gn": "yes"}, "use_midblock_gn to 'yes'"),
    (TinyVAEConfig, {"norm_num_groups": 4}, "sets norm_num_groups, which the tiny VAE here does not implement"),
    (T5Config, {"feed_forward_proj": ["relu"]}, "feed_forward_proj"),
    (T5Config, {"dense_act_fn": "gelu"}, "dense_act_fn to 'gelu'"),
    (T5Config, {"feed_forward_proj": "relu", "is_gated_act": True}, "is_gated_act to True"),
    (T5Config, {"is_gated_act": False}, "is_gated_act"),
    (T5Config, {"num_heads": 0}, "num_heads to 0"),
    (T5Config, {"d_kv": "8"}, "d_kv to '8'"),
    (T5Config, {"num_layers": True}, "num_layers to True"),
    (T5Config, {"layer_norm_epsilon": None}, "layer_norm_epsilon to None"),
    (T5Config, {"layer_norm_epsilon": -1}, "layer_norm_epsilon to -1"),
    (T5Config, {"relative_attention_num_buckets": 3}, "relative_attention_num_buckets to 3"),
    (T5Config, {"relative_attention_num_buckets": 33}, "relative_attention_num_buckets to 33"),
    (T5Config, {"relative_attention_max_distance": 8}, "relative_attention_max_distance to 8, which must exceed the 8"),
    *((kind, {key: "another"}, f"sets {key} to 'another'; only .* is implemented$")
      for kind in BASES for key in kind.IMPLEMENTED),
]
# Additions that change nothing.
HARMLESS = [
    (UNetConfig, {"sample_size": 64, "dropout": 0.1, "upcast_attention": None, "num_class_embeds": None, "act_fn": "silu",
                  "mid_block_scale_factor": 1.0, "only_cross_attention": False, "_class_name": "any", "_manifest": {}}),
    (UNetConfig, {"only_cross_attention": [False, False], "cross_attention_dim": [8, 8], "layers_per_block": [1, 1],
                  "upcast_attention": [None, None], "norm_num_groups": [4, 4]}),
    (VAEConfig, {"sample_size": [512, 256], "force_upcast": False, "_class_name": "AutoencoderKL", "_manifest": {},
                 "shift_factor": None, "latents_mean": None, "act_fn": "silu"}),
    (TinyVAEConfig, {"block_out_channels": [8, 8], "force_upcast": False, "latent_magnitude": 3, "latent_shift": 0.5,
                     "act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2, "shift_factor": None,
                     "_class_name": "AutoencoderTiny"}),
    (MMDiTConfig, {"sample_size": 128, "qk_norm": None, "dual_attention_layers": [], "_class_name": "any", "_manifest": {}}),
    (CLIPTextConfig, {"projection_dim": 8, "dropout": 0.5, "torch_dtype": "float16", "top_k": 50, "num_beams": 1,
                      "transformers_version": "4.0", "attn_implementation": "sdpa"}),
    (T5Config, {"is_encoder_decoder": True, "num_decoder_layers": 2, "n_positions": 512, "dense_act_fn": "gelu_new",
                "task_specific_params": {"a": 1}, "architectures": None, "typical_p": 1.0}),
    *((kind, dict.fromkeys(config.EMA, 0.5)) for kind in (UNetConfig, VAEConfig, MMDiTConfig)),
]


def named(value):
    return value.__name__ if isinstance(value, type) else None


@pytest.mark.parametrize(("kind", "change", "words"), REFUSED, ids=named)
def test_config_of_another_network_is_refused(kind, change, words):
    kind.from_json(json.dumps(BASES[kind]))
    with pytest.raises(ValueError, match=words) as caught:
        kind.from_json(json.dumps(BASES[kind] | change))
    assert str(caught.value).startswith(kind.FILE) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(("kind", "missing"), [(kind, key) for kind, keys in NEEDED.items() for key in keys], ids=named)
def test_config_without_a_needed_key_is_refused(kind, missing):
    with pytest.raises(ValueError, match=f"does not set {missing}, which"):
        kind.from_json(json.dumps({key: value for key, value in BASES[kind].items() if key != missing}))


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", "[" * 100_000])
@pytest.mark.parametrize("kind", BASES, ids=named)
def test_config_that_is_no_object_is_refused(kind, text):
    with pytest.raises(ValueError, match=f"^{kind.FILE} is not a JSON object"):
        kind.from_json(text)


@pytest.mark.parametrize(("kind", "extra"), HARMLESS, ids=named)
def test_keys_that_change_nothing_are_taken(kind, extra):
    assert kind.from_json(json.dumps(BASES[kind] | extra)) == kind.from_json(json.dumps(BASES[kind]))


def test_every_harmless_key_has_a_reason():
    for kind in BASES:
        assert all(isinstance(reason, str) and len(reason) > 5 for reason in kind.HARMLESS.values())
        assert not kind.HARMLESS.keys() & (kind.IMPLEMENTED.keys() | {*kind.__dataclass_fields__})


def test_averaged_network_of_a_training_script_is_read(tmp_path):
    """The keys are those that today's diffusers writes, not a list of ours."""
    given = BASES[UNetConfig] | {"in_channels": 8}
    network = diffusers.UNet2DConditionModel(**given)
    EMAModel(network.parameters(), model_cls=diffusers.UNet2DConditionModel, model_config=network.config).save_pretrained(
        tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "optimization_step" in text and UNetConfig.from_json(text) == UNetConfig.from_json(json.dumps(given))


def test_t5_without_feed_forward_proj_is_version_1_0():
    given = {key: value for key, value in BASES[T5Config].items() if key != "feed_forward_proj"}
    made = T5Config.from_json(json.dumps(given))
    assert (made.feed_forward_proj, made.dense_act_fn, made.is_gated_act) == ("relu", "relu", False)


def test_output_channels_null_are_the_input_channels():
    same = MMDiTConfig.from_json(json.dumps(BASES[MMDiTConfig] | {"in_channels": 32, "out_channels": None}))
    assert (same.in_channels, same.out_channels) == (32, 32)                # as their class reads it


def test_vae_without_factors_has_the_published_ones():
    plain = VAEConfig.from_json(json.dumps(BASES[VAEConfig]))
    assert (plain.scaling_factor, plain.shift_factor) == (0.18215, 0.0)


def test_heads_need_divide_only_where_there_is_attention():
    UNetConfig.from_json(json.dumps(BASES[UNetConfig] | {
        "down_block_types": [DOWN, DOWN], "up_block_types": [CROSS_UP, UP], "attention_head_dim": 16}))
