"""Text contexts: the text encoders of Stable Diffusion 3 and FLUX, and contexts joined into batches and split again.

A *context* is the text as a denoiser takes it: a tensor (B,L,C) of one vector for each token, or `Text`, which has one
pooled vector beside it. Methods pass contexts on and never look inside.
"""

import warnings
from abc import abstractmethod
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import memory
from ..models.clip import CLIPText
from ..models.clip_tokenizer import CLIPTokenizer
from ..models.qwen3 import READ, Qwen3Text
from ..models.qwen_tokenizer import CHAT, QwenTokenizer
from ..models.t5 import T5Encoder
from ..models.t5_tokenizer import T5Tokenizer


class Text(NamedTuple):
    """States (B,L,C) and pooled (B,P): of Stable Diffusion 3, CLIP's tokens and then T5's; of FLUX.1, T5's alone."""

    states: torch.Tensor
    pooled: torch.Tensor


def together(contexts):
    """Several contexts, tensors or `Text`, as one batch."""
    if isinstance(contexts[0], torch.Tensor):
        return torch.cat(contexts)
    return Text(*(torch.cat(parts) for parts in zip(*contexts, strict=True)))


def apart(context):
    """A batch of contexts as a list of single ones."""
    if isinstance(context, torch.Tensor):
        return list(context.split(1))
    return [Text(*parts) for parts in zip(*(part.split(1) for part in context), strict=True)]


def warn_if_cut(prompt, tokens, limit, encoder):
    """Warn where a prompt has more tokens than its encoder reads."""
    if tokens > limit:
        start = prompt if len(prompt) <= 40 else prompt[:40] + "..."
        warnings.warn(f"the prompt {start!r} is {tokens} tokens long, and {encoder} reads {limit}: the rest is cut off, as in "
                      "the published pipeline", stacklevel=2)


class EncodersInTurn:
    """Text encoders that are loaded one after the other when new prompts come, and released again.

    Together they are larger than the transformer, or as large. The contexts of the last `KEPT` prompts are kept. The usual
    negative prompt, "", is always encoded along, so that an edit that follows, with the transformer in memory, need not load
    the encoders again.
    """

    KEPT = 32

    def __init__(self, checkpoint, *, device, dtype):
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self._known = OrderedDict()

    def __call__(self, prompts):
        """The context of the prompts, as one batch."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            if "" not in (*new, *self._known):
                new.append("")
            self._known.update(zip(new, apart(self._encode(new)), strict=True))
        texts = [self._known[prompt] for prompt in prompts]
        for prompt in prompts:
            self._known.move_to_end(prompt)
        while len(self._known) > self.KEPT:
            self._known.popitem(last=False)
        return together(texts)

    @abstractmethod
    def _encode(self, prompts):
        """The context of prompts, as one batch."""

    @torch.no_grad()
    def _run(self, network_class, component, *inputs):
        """The outputs of a network, loaded for this call; inputs: lists of equally long rows of numbers."""
        def run(device):                                     # bfloat16: a CPU computes slowly in float16
            dtype = torch.bfloat16 if device.type == "cpu" and self.dtype == torch.float16 else self.dtype
            network = self.checkpoint.load(network_class, component, device=device, dtype=dtype)
            outputs = network(*(torch.tensor(rows, device=device) for rows in inputs))
            if device == self.device:
                return outputs
            if isinstance(outputs, torch.Tensor):
                return outputs.to(self.device, self.dtype)
            return type(outputs)(*(output.to(self.device, self.dtype) for output in outputs))

        return memory.or_on_cpu(run, self.device, component)


class TextEncoders(EncodersInTurn):
    """The text encoders of Stable Diffusion 3 as one: prompts -> `Text` (Esser et al. 2024, figure 2)."""

    def __init__(self, checkpoint, *, width, length, device, dtype):
        super().__init__(checkpoint, device=device, dtype=dtype)
        self.width, self.length = width, length
        self.clips = ("text_encoder", "text_encoder_2")
        configs = [checkpoint.check(CLIPText, component) for component in self.clips]
        self.tokenizers = [CLIPTokenizer.from_folder(checkpoint.path(name)) for name in ("tokenizer", "tokenizer_2")]
        lengths, places = [t.length for t in self.tokenizers], [config.max_position_embeddings for config in configs]
        if len(set(lengths)) > 1 or lengths[0] > min(places):
            raise ValueError(f"{checkpoint.source}: the tokenizers make {lengths[0]} and {lengths[1]} tokens of a prompt, "
                             f"the two CLIP have places for {places[0]} and {places[1]}")
        self.t5_tokenizer = None
        if "text_encoder_3" in checkpoint.components:
            t5 = checkpoint.check(T5Encoder, "text_encoder_3")
            self.t5_tokenizer = T5Tokenizer.from_folder(checkpoint.path("tokenizer_3"))
            if t5.d_model != width:
                raise ValueError(f"{checkpoint.source}: the transformer takes {width} channels of text, T5 has {t5.d_model}")
        self.pooled_width = sum(config.projection_dim or config.hidden_size for config in configs)
        if (clip := sum(config.hidden_size for config in configs)) > width:
            warnings.warn(f"{checkpoint.source}: the two CLIP have {clip} channels of text and the transformer takes {width}: "
                          "the rest is cut off, as in the published pipeline", stacklevel=2)

    def _encode(self, prompts):
        outputs = []
        for prompt in prompts:                               # both CLIP read the same words
            warn_if_cut(prompt, len(self.tokenizers[0].encode(prompt)) + 2, self.tokenizers[0].length, "CLIP")
        for component, tokenizer in zip(self.clips, self.tokenizers, strict=True):
            outputs.append(self._run(CLIPText, component, tokenizer(prompts)))
        states = torch.cat([output.penultimate for output in outputs], -1)      # without the final norm
        states = F.pad(states, (0, self.width - states.shape[-1]))              # a negative number crops
        if self.t5_tokenizer is None:                        # zeros in its place, as many as it would have had tokens
            t5_states = states.new_zeros(len(prompts), self.length, self.width)
        else:
            for prompt in prompts:
                warn_if_cut(prompt, self.t5_tokenizer.count(prompt), self.length, "T5")
            t5_states = self._run(T5Encoder, "text_encoder_3", self.t5_tokenizer(prompts, self.length))
        return Text(torch.cat([states, t5_states.to(states.dtype)], 1), torch.cat([output.pooled for output in outputs], -1))


class KontextTexts(EncodersInTurn):
    """The text encoders of FLUX.1: prompts -> `Text`, T5's states without a mask, and CLIP's state at the end of the text."""

    def __init__(self, checkpoint, *, config, length, device, dtype):
        super().__init__(checkpoint, device=device, dtype=dtype)
        self.length = length
        clip, t5 = checkpoint.check(CLIPText, "text_encoder"), checkpoint.check(T5Encoder, "text_encoder_2")
        self.clip_tokenizer = CLIPTokenizer.from_folder(checkpoint.path("tokenizer"))
        self.t5_tokenizer = T5Tokenizer.from_folder(checkpoint.path("tokenizer_2"))
        if self.clip_tokenizer.length > clip.max_position_embeddings:
            raise ValueError(f"{checkpoint.source}: the tokenizer makes {self.clip_tokenizer.length} tokens of a prompt, CLIP "
                             f"has places for {clip.max_position_embeddings}")
        pooled = clip.projection_dim or clip.hidden_size
        if (pooled, t5.d_model) != (config.pooled_projection_dim, config.joint_attention_dim):
            raise ValueError(f"{checkpoint.source}: the transformer takes {config.pooled_projection_dim} channels of pooled "
                             f"text and {config.joint_attention_dim} of text, CLIP has {pooled} and T5 has {t5.d_model}")

    def _encode(self, prompts):
        for prompt in prompts:
            warn_if_cut(prompt, len(self.clip_tokenizer.encode(prompt)) + 2, self.clip_tokenizer.length, "CLIP")
            warn_if_cut(prompt, self.t5_tokenizer.count(prompt), self.length, "T5")
        pooled = self._run(CLIPText, "text_encoder", self.clip_tokenizer(prompts)).pooled
        return Text(self._run(T5Encoder, "text_encoder_2", self.t5_tokenizer(prompts, self.length)), pooled)

    def word_positions(self, text):
        """The positions of the text's own tokens among T5's, which have no start."""
        return [*range(min(self.t5_tokenizer.count(text), self.length) - 1)]


class KleinTexts(EncodersInTurn):
    """The text encoder of FLUX.2 klein: prompts -> (B,L,C), states of three layers of Qwen3 side by side."""

    def __init__(self, checkpoint, *, config, length, device, dtype):
        super().__init__(checkpoint, device=device, dtype=dtype)
        self.length = length
        width = len(READ) * checkpoint.check(Qwen3Text, "text_encoder").hidden_size
        self.tokenizer = QwenTokenizer.from_folder(checkpoint.path("tokenizer"))
        if width != config.joint_attention_dim:
            raise ValueError(f"{checkpoint.source}: the transformer takes {config.joint_attention_dim} channels of text, Qwen3 "
                             f"has {width}, {len(READ)} layers side by side")

    def _encode(self, prompts):
        for prompt in prompts:
            warn_if_cut(prompt, self.tokenizer.count(prompt), self.length, "Qwen3")
        return self._run(Qwen3Text, "text_encoder", *self.tokenizer(prompts, self.length))

    def word_positions(self, text):
        """The positions of the text's own tokens, between those of the chat around it."""
        before = len(self.tokenizer.encode(CHAT.partition("{}")[0]))
        own = self.tokenizer.count(text) - self.tokenizer.count("")
        return [*range(before, min(before + own, self.length))]
