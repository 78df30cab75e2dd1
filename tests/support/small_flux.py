"""FLUX pipelines with random weights, in folders that diffusers itself writes.

    made = small_flux.kontext("as published", tokenizers=small_sd3.write_tokenizers(folder))         # the oracle
    made.save_pretrained(folder)                            # load_editor(folder) is ours

As in small_sd3.py, the weights are scaled until prompt, guidance, seed and picture are all seen in the output.
"""

import diffusers
import small_editors
import torch
import transformers

VAE = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4,
       "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
FLUX1 = {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 3, "attention_head_dim": 12,
         "axes_dims_rope": (4, 4, 4), "guidance_embeds": True}
KONTEXT = {                                                 # name -> what differs
    "as published": {"transformer": FLUX1, "vae": VAE, "tiny": False},
    "no guidance embedding, another VAE": {
        "transformer": FLUX1 | {"guidance_embeds": False, "num_single_layers": 1, "axes_dims_rope": (2, 6, 4)},
        "vae": VAE | {"block_out_channels": (8, 8, 8), "scaling_factor": 0.7, "shift_factor": -0.4}, "tiny": False},
    "with a tiny autoencoder": {"transformer": FLUX1 | {"num_layers": 1}, "vae": VAE, "tiny": True},
}
SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
             "max_image_seq_len": 4096}


def autoencoder(config, tiny=False):
    """diffusers' autoencoder, its latents near unit variance and its pictures with contrast."""
    if tiny:
        import test_tiny_editors
        return test_tiny_editors.tiny_vae(config["latent_channels"])
    blocks = len(config["block_out_channels"])
    return diffusers.AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * blocks,
                                   up_block_types=("UpDecoderBlock2D",) * blocks, **config)


def kontext(name="as published", *, tokenizers, seed=0, length=77):
    """diffusers' FluxKontextPipeline of that config; tokenizers: a folder that `small_sd3.write_tokenizers` filled."""
    config = KONTEXT[name]
    torch.manual_seed(seed)
    words = transformers.CLIPTokenizer.from_pretrained(tokenizers / "tokenizer", model_max_length=length)
    clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(words), intermediate_size=20, num_hidden_layers=2, max_position_embeddings=length, bos_token_id=0,
        eos_token_id=2, hidden_size=16, num_attention_heads=2, hidden_act="quick_gelu"))
    t5_words = transformers.T5TokenizerFast.from_pretrained(tokenizers / "tokenizer_3")
    t5 = transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(t5_words), feed_forward_proj="gated-gelu", d_model=20,
                                                           d_kv=8, d_ff=24, num_layers=2, num_heads=2))
    latent = config["vae"]["latent_channels"]
    transformer = diffusers.FluxTransformer2DModel(in_channels=4 * latent, joint_attention_dim=20, pooled_projection_dim=16,
                                                   **config["transformer"])
    vae = autoencoder(config["vae"], config["tiny"])
    for network in (transformer, vae, clip, t5):
        network.eval().requires_grad_(False)
    made = diffusers.FluxKontextPipeline(diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER), vae, clip, words, t5, t5_words,
                                         transformer)
    made.set_progress_bar_config(disable=True)
    text = torch.randn(2, 9, 20), torch.randn(2, 16)

    def velocity(noise, reference):
        tokens = torch.cat([pack(noise), pack(reference)], 1)
        guidance = torch.full((2,), 2.5) if transformer.config.guidance_embeds else None
        return transformer(tokens, *text, torch.tensor([0.8, 0.3]), torch.zeros(tokens.shape[1], 3), torch.zeros(9, 3),
                           guidance).sample

    with torch.no_grad():
        bring_to_life(transformer, (clip, t5), velocity, 4 * latent)
        if not config["tiny"]:
            bring_vae_to_life(vae, 2 ** (len(config["vae"]["block_out_channels"]) - 1), 1 / vae.config.scaling_factor)
    return made


def pack(grid):
    return grid.flatten(2).transpose(1, 2)


def bring_to_life(transformer, texts, velocity, channels):
    """Scale random weights until everything that goes in is seen in what comes out."""
    for network in (transformer, *texts):
        for parameter in network.parameters():
            if parameter.ndim == 1:                          # no scale is one, no bias zero
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    for text in texts:
        text.get_input_embeddings().weight.normal_()
    transformer.context_embedder.weight.mul_(3)              # else the text hardly changes the velocity
    for name, parameter in transformer.named_parameters():
        if "norm_q" in name:                                 # attention far from uniform: most of the 512 tokens are padding
            parameter.mul_(4)
        elif "guidance_embedder.linear_2" in name or "text_embedder.linear_2" in name:
            parameter.mul_(3)
    out = velocity(torch.randn(2, channels, 4, 4), torch.randn(2, channels, 4, 4))
    last, scale = transformer.proj_out, 1 / out.std((0, 1))
    last.weight.mul_(scale[:, None])
    if last.bias is not None:
        last.bias.mul_(scale)


def bring_vae_to_life(vae, factor, spread):
    pixels = torch.rand(4, 3, 8, 8).repeat_interleave(factor, 2).repeat_interleave(factor, 3) * 2 - 1
    last, moments = vae.quant_conv or vae.encoder.conv_out, vae.encoder(pixels)
    small_editors._rescale(last, vae.quant_conv(moments) if vae.quant_conv else moments, spread)
    latent = torch.randn(4, vae.config.latent_channels, 8, 8) * spread
    small_editors._rescale(vae.decoder.conv_out, vae.decode(latent).sample, 0.4)


FLUX2 = {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16,
         "axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": False, "mlp_ratio": 2.0}
VAE2 = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
QWEN = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 28, "num_attention_heads": 3, "num_key_value_heads": 1,
        "head_dim": 6, "rope_theta": 1e6, "max_position_embeddings": 600, "use_sliding_window": False}
KLEIN = {                                                   # name -> what differs
    "as published": {"transformer": FLUX2, "vae": VAE2, "distilled": True},
    "base, another VAE": {"transformer": FLUX2 | {"num_layers": 1, "axes_dims_rope": (2, 6, 6, 2), "rope_theta": 300},
                          "vae": VAE2 | {"block_out_channels": (8, 8, 8), "latent_channels": 6}, "distilled": False},
    "base, another width": {"transformer": FLUX2 | {"num_single_layers": 1, "num_attention_heads": 3, "mlp_ratio": 3.0},
                            "vae": VAE2, "distilled": False},
}


def klein(name="as published", *, tokenizer, seed=0):
    """diffusers' Flux2KleinPipeline of that config; tokenizer: a folder that `write_qwen_tokenizer` filled."""
    config = KLEIN[name]
    torch.manual_seed(seed)
    words = transformers.Qwen2TokenizerFast.from_pretrained(tokenizer)
    qwen = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=len(words), **QWEN))
    channels = 4 * config["vae"]["latent_channels"]
    transformer = diffusers.Flux2Transformer2DModel(in_channels=channels, joint_attention_dim=3 * QWEN["hidden_size"],
                                                    **config["transformer"])
    blocks = len(config["vae"]["block_out_channels"])
    vae = diffusers.AutoencoderKLFlux2(down_block_types=("DownEncoderBlock2D",) * blocks,
                                       up_block_types=("UpDecoderBlock2D",) * blocks, **config["vae"])
    for network in (transformer, vae, qwen):
        network.eval().requires_grad_(False)
    made = diffusers.Flux2KleinPipeline(diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER), vae, qwen, words, transformer,
                                        is_distilled=config["distilled"])
    made.set_progress_bar_config(disable=True)
    text = torch.randn(2, 9, 3 * QWEN["hidden_size"])

    def velocity(noise, reference):
        tokens = torch.cat([pack(noise), pack(reference)], 1)
        return transformer(tokens, text, torch.tensor([0.8, 0.3]), torch.zeros(tokens.shape[1], 4), torch.zeros(9, 4)).sample

    with torch.no_grad():
        bring_to_life(transformer, (qwen,), velocity, channels)
        bring_vae_to_life(vae, 2 ** (blocks - 1), 1.5)
        vae.bn.running_mean.normal_(std=0.3)
        vae.bn.running_var.uniform_(1, 4)
    return made


def write_qwen_tokenizer(folder):
    """A folder with a small tokenizer of the miniature's phrases, with Qwen3's special tokens and chat template."""
    import test_qwen_tokenizer

    from sifm_min.miniature import kinds
    trained = test_qwen_tokenizer.train(folder / "trained", kinds.corpus(), 600)
    test_qwen_tokenizer.with_specials(trained).save_pretrained(folder / "saved")
    return folder / "saved"


def assert_streams(folder, prompt, size):
    """The editor in the folder holds one block at a time if told to, also in the backward pass, and computes the same."""
    from sifm_min.editors import load_editor
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    t, found, most = torch.tensor([700.0]), {}, []

    def blocks(editor):
        return [block for kind in editor.transformer.STREAMED for block in getattr(editor.transformer, kind)]

    def present(editor):
        return sum(any(not weight.is_meta for weight in block.parameters()) for block in blocks(editor))

    for streaming in (False, True):
        editor = load_editor(folder, device="cpu")
        E, context = editor.encode(pixels).detach().requires_grad_(), editor.context([prompt])
        noise = torch.randn(E.shape, generator=torch.Generator().manual_seed(1))
        editor.checkpointing = editor.streaming = streaming
        for block in blocks(editor) if streaming else ():
            block.register_forward_pre_hook(lambda *_, editor=editor: most.append(present(editor)))
        taps = editor.features(E, noise, t, context, taps=[*editor.default_taps, "out"])
        (gradient,) = torch.autograd.grad(sum(x.square().mean() for x in taps.values()), E)
        found[streaming] = [*taps.values(), gradient]
    assert all(torch.equal(*pair) for pair in zip(*found.values(), strict=True))
    assert max(most) == 1 and present(editor) <= 1 and len(most) == 2 * len(blocks(editor))
    editor.checkpointing = editor.streaming = False          # and all of it is read again where it is wanted
    editor.predict(E.detach(), noise, t, context)
    assert present(editor) == len(blocks(editor))
