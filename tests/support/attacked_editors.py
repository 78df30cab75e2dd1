"""Shared by the tests of the methods: a pair of diffusers' pipeline and our editor, its contexts, and draws.

    from attacked_editors import contexts, editor, loaded_pair, seeded     # contexts, editor: fixtures

A file that imports the fixtures has a fixture `pair` and a list PROMPTS.
"""

import pytest
import torch

from sifm_min.editors import load_editor


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def loaded_pair(pipeline, folder, double):
    """(diffusers' pipeline, our editor from the folder that it wrote), both frozen; double: in double precision."""
    editor = load_editor(folder, device="cpu", dtype=torch.float64 if double else None)
    theirs = [network for network in pipeline.components.values() if isinstance(network, torch.nn.Module)]
    for network in theirs:
        network.requires_grad_(False)
    for network in (*theirs, editor.vae) if double else ():
        network.double()
    return pipeline, editor


def small_pair(tmp_path_factory, double=False):
    """The pair of the quickest InstructPix2Pix."""
    import small_editors
    pipeline = small_editors.pipeline("two levels, short prompts",
                                      tokenizer=small_editors.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    folder = tmp_path_factory.mktemp("editor")
    pipeline.save_pretrained(folder)
    return loaded_pair(pipeline, folder, double)


@pytest.fixture(scope="module")
def editor(pair):
    return pair[1]


@pytest.fixture(scope="module")
def contexts(request, editor):
    """The context of each of the file's PROMPTS."""
    with torch.no_grad():
        return [editor.context([prompt]) for prompt in request.module.PROMPTS]
