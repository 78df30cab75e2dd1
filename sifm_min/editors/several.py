"""Several editors that one perturbation is made for: each keeps its own working size, options and weights."""

import contextlib

from torch.nn import Parameter


class Several:
    """A list of editors as memory plans see it; `immunize` takes a list, or this.

    names: of each editor, told apart, as reports and progress have them. apart: True while the weights of one editor at a time
    are on the device and those of the others wait in main memory.
    """

    def __init__(self, editors):
        self.editors = list(editors)
        if not self.editors:
            raise ValueError("give at least one editor")
        if len({id(editor) for editor in self.editors}) < len(self.editors):
            raise ValueError("one editor is given twice; it would only count double")
        self.names, self.apart = _told_apart([str(getattr(editor, "name", editor)) for editor in self.editors]), False

    @property
    def device(self):
        """The device that the perturbation is on, the first editor's."""
        return self.editors[0].device

    @property
    def is_small(self):
        return all(editor.is_small for editor in self.editors)

    @property
    def needs_prompt(self):
        return any(getattr(editor, "needs_prompt", True) for editor in self.editors)

    @property
    def checkpointing(self):
        """True where activations are computed again in the backward pass, and one editor at a time is on the device."""
        return self.apart

    @checkpointing.setter
    def checkpointing(self, value):
        self.apart = value
        for editor in self.editors:
            editor.checkpointing = value

    @property
    def streaming(self):
        return all(getattr(editor, "streaming", False) for editor in self.editors)

    @streaming.setter
    def streaming(self, value):
        for editor in self.editors:
            editor.streaming = value

    def forget_text(self):
        """Release the text encoders of all editors until they are needed again."""
        for editor in self.editors:
            editor.forget_text()

    def provenance(self):
        """The list of what reports say of each editor."""
        return [editor.provenance() for editor in self.editors]

    def frame(self, width, height):
        """The largest (height, width) at which one of the editors sees a picture of this size."""
        return max((editor.frame(width, height) for editor in self.editors), key=lambda size: size[0] * size[1])

    @contextlib.contextmanager
    def at_work(self, editor):
        """Have this editor's weights on the device while the block runs; where editors are apart, those of no other."""
        if self.apart:
            for other in self.editors:
                if other is not editor and hasattr(other, "wait"):
                    other.wait()
        if hasattr(editor, "come"):
            editor.come()
        yield


def _told_apart(names):
    """Editors' names without their folders, where that tells them apart; a name that stands twice gets a number."""
    short = [name.rstrip("/").rpartition("/")[2] for name in names]
    names = short if len(set(short)) == len(set(names)) else names
    return [name if names.count(name) == 1 else f"{name} #{names[:place + 1].count(name)}" for place, name in enumerate(names)]


def send_weights(networks, device):
    """Move the weights of networks to a device; those that were not read yet stay as they are.

    What came from main memory keeps its copy there, so that going back copies nothing.
    """
    for module in (module for network in networks for module in network.modules()):
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or tensor.is_meta or tensor.device.type == device.type:
                    continue
                moved = getattr(tensor, "in_main_memory", None) if device.type == "cpu" else None
                if moved is None:
                    moved = tensor.detach().to(device)
                    if isinstance(tensor, Parameter):
                        moved = Parameter(moved, requires_grad=tensor.requires_grad)
                    if device.type != "cpu":
                        moved.in_main_memory = tensor
                held[name] = moved
