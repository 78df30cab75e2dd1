"""The autoencoder of an editor: the KL autoencoder, or the tiny one that stands in for it."""

from ..models import layout
from ..models.tiny_vae import AutoencoderTiny
from ..models.vae import AutoencoderKL


def load_autoencoder(checkpoint, *, device, dtype):
    """The network in a checkpoint's `vae/`, of the class that its config.json names; the KL autoencoder where it names none.

    Each part is read at its first use. Raises `checkpoints.Unfit` where files and config disagree.
    """
    config = layout.parse(checkpoint.text("vae/config.json"), f"{checkpoint.source}/vae/config.json")
    network = AutoencoderTiny if config.get("_class_name") == AutoencoderTiny.__name__ else AutoencoderKL
    return checkpoint.load(network, "vae", device=device, dtype=dtype, lazily=True)
