"""The smallest editor of each kind, for the tests of this folder."""

import pytest
import tiny_flux
import tiny_sd3


@pytest.fixture(scope="session")
def tiny_folders(tiny_folder, tmp_path_factory):
    """{kind: the folder of an editor with random weights}: see tests/support/tiny_editor.py."""
    return {"InstructPix2Pix": tiny_folder, "SD3": tiny_sd3.write(tmp_path_factory.mktemp("sd3")),
            "UltraEdit": tiny_sd3.write(tmp_path_factory.mktemp("ultraedit"), instructed=True),
            "FLUX.1 Kontext": tiny_flux.write(tmp_path_factory.mktemp("kontext"))}
