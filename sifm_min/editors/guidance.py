"""Classifier-free guidance: the passes of one denoising step, and the prediction that their results are combined to."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .text import apart, together


class Guidance(NamedTuple):
    """One way to guide a denoising step.

    views: for each pass, (sees the text, sees the picture). combine: a function of the passes' predictions, in that order,
    each (B,C,h,w), to the guided prediction.
    """

    views: tuple
    combine: Callable

    def inputs(self, image_latent, context, empty):
        """The image latents and the contexts of all passes, each as one batch; `empty` is the negative prompt's context."""
        latents = [image_latent if picture else torch.zeros_like(image_latent) for _, picture in self.views]
        return torch.cat(latents), together([context if text else empty for text, _ in self.views])

    def __call__(self, predictions):
        """The guided prediction (B,C,h,w) from the predictions of all passes, as one batch."""
        return self.combine(*predictions.chunk(len(self.views)))


UNGUIDED = Guidance(((True, True),), lambda prediction: prediction)


def over_text(weight):
    """Guidance over the text alone: a pass without it and a pass with it (Ho and Salimans 2022)."""
    return Guidance(((False, True), (True, True)), lambda without, full: without + weight * (full - without))


def over_text_and_picture(weight, image_weight):
    """Guidance over text and picture (Brooks et al. 2023, equation 3): passes with both, with the picture alone, and with
    neither."""
    def combine(full, image_only, neither):
        return neither + weight * (full - image_only) + image_weight * (image_only - neither)

    return Guidance(((True, True), (False, True), (False, False)), combine)


def one_by_one(predict):
    """A `predict` that runs the rows of a batch one after the other, for memory."""
    def run(image_latents, noisy, timestep, contexts):
        rows = zip(image_latents.split(1), noisy.split(1), apart(contexts), strict=True)
        return torch.cat([predict(image_latent, latent, timestep, context) for image_latent, latent, context in rows])

    return run
