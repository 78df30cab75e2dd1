"""Immunize pictures against text-guided diffusion editors.

    import sifm_min
    from PIL import Image
    editor = sifm_min.load_editor("miniature")                  # or "instruct-pix2pix", a folder, a hub id
    result = sifm_min.immunize(Image.open("photo.png"), editor, ["make the sky red"])
    result.image.save("photo_immunized.png")                    # result.report is the evidence

Also here: `METHODS` (name -> objective), `metrics`, `miniature` (photographs, exact edits, judges), `gemini` (the client
of vision services, in judging/client.py) and `models` (the networks). Each is loaded when it is first used, so importing
this package, or asking a command for --help, loads no torch.
"""

from importlib import import_module as _import_module
from importlib.machinery import PathFinder as _PathFinder
from pathlib import Path as _Path
from sys import modules as _modules
from types import ModuleType as _ModuleType

__version__ = "0.2.0"
PROGRAM = f"python -m {__name__}"                            # commands as messages name them, also where we are vendored

# models/ lies beside this folder in a checkout, but is installed as sifm_min.models: a top-level package called `models`
# would collide with the models/ of most research code. Where no installer has moved it (a bare checkout, a vendored
# copy), the parent folder is searched for this one import and then given back, so that nothing else beside us can be
# imported as part of sifm_min. A models/ inside this folder comes first. The file looked for tells our folder from
# somebody else's: theirs may well have a unet.py, hardly a clip_tokenizer.py.
_beside = str(_Path(__file__).resolve().parents[1])
if _PathFinder.find_spec("clip_tokenizer", [f"{place}/models" for place in (*__path__, _beside)]) is None:
    raise ImportError(f"{__name__}: its networks are missing; put the folder models/ beside {__name__}/, or inside it")
__path__.append(_beside)
from . import models  # noqa: E402, F401

__path__.remove(_beside)

_PUBLIC = {  # public name -> the file that holds it
    "immunize": "immunize",
    "METHODS": "methods",
    "load_editor": "editors",
    "metrics": "metrics",
    "miniature": "miniature",
    "gemini": "judging.client",
}


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _import_module(f".{_PUBLIC[name]}", __name__)
    if name == "gemini":                                     # a name of the whole file
        return module
    # `immunize` is a file that `python -m` runs and a function that is called; Python binds an imported file to its
    # package, so the name must mean the module in either order of imports: that module is callable.
    return module if name == _PUBLIC[name] else getattr(module, name)


class _Gemini(_ModuleType):
    """The entry for `from sifm_min.gemini import Client`: names are looked up in the client's file at first use."""

    def __getattr__(self, name):
        if name.startswith("__"):                            # asked for by inspecting tools, which should load nothing
            raise AttributeError(name)
        return getattr(_import_module(".judging.client", __name__), name)


_modules[f"{__name__}.gemini"] = _Gemini(f"{__name__}.gemini")


def __dir__():
    return sorted({*globals(), *_PUBLIC})
