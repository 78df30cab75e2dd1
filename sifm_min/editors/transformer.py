"""The part that editors with a diffusion transformer share: it is read after the prompts were encoded, and prepared alike."""

from functools import cached_property

import torch

from ..models import schedulers
from ..models.lean import frozen
from .autoencoders import load_autoencoder
from .base import Editor


class TransformerEditor(Editor):
    """An editor from a folder whose denoiser is a transformer, and whose text encoders are loaded in turn.

    PUBLISHER: in errors. NETWORK: the transformer's class. MODULE: its file, with `tap_names` and `default_taps`. DEFAULTS: of
    an edit; KNOWN: the same for the editors known by name. PIPELINES: classes in model_index.json.
    """

    def __init__(self, *, checkpoint, name, device, dtype, vae_dtype=torch.float32, defaults=None, notice=""):
        super().__init__(name=name, vae=load_autoencoder(checkpoint, device=device, dtype=vae_dtype),
                         scheduler=checkpoint.parsed("scheduler/scheduler_config.json", schedulers.load),
                         device=device, dtype=dtype, defaults=defaults or self.DEFAULTS, notice=notice, checkpoint=checkpoint)
        self.config = checkpoint.check(self.NETWORK, "transformer")
        self.text_encoders = self.make_text_encoders()
        if not isinstance(self.scheduler, schedulers.FlowScheduler):
            raise ValueError(f"{name}: scheduler_config.json does not name {schedulers.FLOW}, which {self.PUBLISHER} is "
                             "sampled by")

    @classmethod
    def load(cls, checkpoint, **more):
        return cls(checkpoint=checkpoint, **more)

    @cached_property
    def transformer(self):
        """The transformer, loaded at its first use: the prompts are encoded before, and their encoders released by then."""
        return self.checkpoint.load(self.NETWORK, "transformer", device=self.device, dtype=self.dtype, lazily=True)

    @property
    def tap_names(self):
        return self.MODULE.tap_names(self.config)

    @property
    def default_taps(self):
        return self.MODULE.default_taps(self.config)

    @property
    def probs_names(self):
        return self.transformer.probs_names

    @property
    def denoiser(self):
        return self.transformer

    def context(self, prompts):
        """Prompts -> their context, a tensor (B,L,C) or `text.Text`."""
        return self.text_encoders(prompts)

    @property
    def is_frozen(self):
        """True where no gradient of weights is wanted, so that text and timesteps may be prepared for many calls."""
        return frozen(self.transformer)
