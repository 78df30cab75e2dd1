"""Methods: the registry of objectives, their options, and the settings of a run.

A method is a function (editor, x_orig, contexts, *, generator, **options) that returns the objective, a function
(x_imu, step) -> loss or (loss, {term: number}) to minimise. A method from outside the package is the function itself or
"module:name". An objective that has `passes(steps)` counts its forward and backward passes for the report. One that has
`see(x_orig)`, or `see` None, is not built anew where both pictures change with every step: see `purifiers.expectation`. One
that has `texts` and `leaves` can have its text refined: see `objectives.text_refinement`.
"""

import inspect
from collections.abc import Mapping
from fractions import Fraction
from importlib import import_module
from types import ModuleType


class _Methods(Mapping):
    """Name -> method, imported at the first use: listing the names loads no torch. "module:name" is a name as well."""

    HOMES = {"sifm": "sifm"} | dict.fromkeys(
        ("photoguard-encoder", "photoguard-diffusion", "editshield", "semantic-attack", "sds", "mist", "ace", "noise"),
        "baselines") | {
            "danp": "objectives.danp", "diffusionguard": "objectives.diffusionguard", "tdae": "objectives.text_refinement",
            "sifm-output": "objectives.sifm_output", "latent": "editors.latents", "decontext": "objectives.decontext"}

    def __getitem__(self, name):
        if name in self.HOMES:
            return getattr(import_module(f".{self.HOMES[name]}", __package__), name.replace("-", "_"))
        if isinstance(name, str) and ":" in name:
            from .editors.loading import imported
            return imported(name)
        raise KeyError(name)

    def __iter__(self):
        return iter(self.HOMES)

    def __len__(self):
        return len(self.HOMES)


METHODS = _Methods()
# The same for all methods: the paper's 100 iterations, with a step and a start of ours, since it states neither step nor
# schedule. Preset "native" runs a baseline as its original was run.
PROTOCOL = {"steps": 100, "step_size": 1 / 255, "schedule": "constant", "init": "random"}
PRESETS = ("protocol", "native")
ENCODER_METHODS = ("latent", "photoguard-encoder", "editshield", "noise")     # which need no denoiser
GIVEN = ("generator", "prompts")                             # keywords that are passed to a method, and no options of it
TAKEN = (*PROTOCOL, "method", "eps", "budget", "seed", "preset", "mask", "robust", "any_prompt", "each", "flat", "refine_text",
         "blur", "memory", "on_step")                        # of `immunize`
OPTION_TYPES = {"int": int, "float": float, "bool": bool, "str": str}
WORDS = {"true": True, "yes": True, "false": False, "no": False}
# Options that need an image latent beside the noisy latent: (method, option, value) -> the reason.
INSTRUCT_ONLY = {
    ("sifm", "noisy", "deploy"): "it noises the original's latent, so that the perturbation reaches the denoiser through the "
                                 "image latent beside it alone; choose paper",
    ("editshield", "variant", "released"): "it compares the noisy latent and the image latent beside it; choose eot or plain",
}


def find_method(method):
    """(name, function) of a method: a name in METHODS, "module:name", or the function itself. ValueError for any other."""
    if callable(method) and not isinstance(method, ModuleType):
        name, function = _name(method), method
    elif isinstance(method, str) and (method in METHODS.HOMES or ":" in method):
        name, function = method, METHODS[method]
    else:
        raise ValueError(f"method {method!r}: choose one of {', '.join(METHODS)}; your own is a function, or module:name")
    if name in METHODS.HOMES:
        return name, function
    try:
        inspect.signature(function).bind_partial(None, None, None, generator=None)
    except (TypeError, ValueError):
        raise ValueError(f"the method {name} cannot be called as method(editor, x_orig, contexts, generator=..., "
                         "its options=...)") from None
    if clash := [option for option in options_of(function) if option in TAKEN]:
        raise ValueError(f"the method {name} has an option {clash[0]}, which immunize has as well; rename it")
    return name, function


def _name(function):
    inside = {id(METHODS[name]): name for name in METHODS}
    named = getattr(function, "func", function)              # of a functools.partial
    return inside.get(id(function)) or f"{named.__module__}:{getattr(named, '__qualname__', type(named).__name__)}"


def parameters_of(method):
    """{name: parameter} of a method's function."""
    return inspect.signature(METHODS[method] if isinstance(method, str) else method).parameters


def options_of(method):
    """The names of a method's own options, beside those of the loop."""
    return tuple(p.name for p in parameters_of(method).values() if p.kind is p.KEYWORD_ONLY and p.name not in GIVEN)


def takes_any(method):
    """True for a method with **options, which takes options of any name."""
    return any(p.kind is p.VAR_KEYWORD for p in parameters_of(method).values())


def settings(method, preset="protocol", **arguments):
    """The settings of a run as two dicts: the loop's (the keys of PROTOCOL) and the method's.

    Arguments win over the preset; None counts as not given. Raises ValueError for an unknown method, preset or option.
    """
    name, function = find_method(method)
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r}: choose one of {', '.join(PRESETS)}")
    arguments = {key: value for key, value in arguments.items() if value is not None}
    for key in arguments:
        if key not in PROTOCOL:
            _known(name, function, key)
    chosen = PROTOCOL | (native(name).settings if preset == "native" else {}) | arguments
    loop, options = {key: chosen.pop(key) for key in PROTOCOL}, chosen
    parameters = parameters_of(function)
    if lacking := [key for key in options_of(function) if parameters[key].default is inspect.Parameter.empty
                   and key not in options]:
        raise ValueError(f"the method {name} needs the option {lacking[0]}: give it as --option {lacking[0]}=VALUE, or by "
                         "name in a call")
    return loop, options


def parse(method, texts):
    """The options in texts like "name=value", as the method takes them: {name: int, float, bool or str}.

    A parameter's annotation, else its default, says which of these a value is; without either the text itself decides.
    Raises ValueError for a name that the method does not have and for a value that does not fit.
    """
    name, function = find_method(method)
    parameters, options = parameters_of(function), {}
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not (key and equals):
            raise ValueError(f"--option {text}: write it as NAME=VALUE, such as weight=0.5")
        if key in options:
            raise ValueError(f"--option {key} is given twice")
        _known(name, function, key)
        options[key] = _value(key, value, parameters.get(key))
    return options


def _known(name, function, key):
    if key not in options_of(function) and (key in (*GIVEN, *TAKEN) or not takes_any(function)):
        hint = f"--{key.replace('_', '-')} is of the command itself; " if key in TAKEN else ""
        raise ValueError(f"{name} has no option {key}; {hint}its options are "
                         f"{', '.join(options_of(function)) or 'those of the loop'}")


def _value(key, text, parameter):
    annotation, default = (parameter.annotation, parameter.default) if parameter else (None, None)
    kind = OPTION_TYPES.get(getattr(annotation, "__name__", annotation)) or OPTION_TYPES.get(type(default).__name__)
    if kind is bool or kind is None and text.lower() in WORDS:
        if text.lower() not in WORDS:
            raise ValueError(f"--option {key}={text}: give true or false")
        return WORDS[text.lower()]
    for number, convert in ((int, int), (float, lambda text: float(Fraction(text)))):
        if kind is number or kind is None:
            try:
                return convert(text)
            except (ValueError, ArithmeticError):
                if kind is number:
                    raise ValueError(f"--option {key}={text}: not a {'whole ' if kind is int else ''}number") from None
    return text


def check_fit(name, options, editor):
    """Raise ValueError where this method, or an option of it, makes no sense for this kind of editor."""
    if editor.kind == "encoders":
        if name in METHODS.HOMES and name not in ENCODER_METHODS or options.get("variant") == "released":
            asks = f"{name}{' released' if name in ENCODER_METHODS else ''}"
            raise ValueError(f"{asks} needs a denoiser, and {editor.name} has encoders alone: choose "
                             f"{', '.join(ENCODER_METHODS)}, or another editor")
    elif name == "latent":
        raise ValueError("latent is for editors without a denoiser: latents, or for the autoencoder of one editor "
                         "latents:FOLDER-OR-NAME")
    for (method, option, value), reason in INSTRUCT_ONLY.items():
        if (name, options.get(option)) == (method, value) and editor.kind != "instruct":
            raise ValueError(f"{option} {value} of {name} is for instruction editors, and {editor.name} edits by img2img: "
                             f"{reason}")


def native(name):
    """The preset "native" of a method: see `baselines.NATIVE`."""
    from .baselines import NATIVE
    if name not in NATIVE:
        raise ValueError(f"{name} has no preset 'native'; those that have one are {', '.join(NATIVE)}")
    return NATIVE[name]


def checked_loss(objective, name):
    """The objective with its results checked: a loss with a gradient, and terms that are numbers or tensors of one number."""
    import torch

    def single(value):
        return value.numel() == 1 if isinstance(value, torch.Tensor) else isinstance(value, int | float)

    def objective_checked(x_imu, step):
        result = objective(x_imu, step)
        loss, terms = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        if not (isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.requires_grad):
            raise ValueError(f"the objective of {name} must return a loss, one number as a tensor that depends on x_imu, or "
                             "(loss, terms)")
        if not isinstance(terms, dict) or not all(single(value) for value in terms.values()):
            raise ValueError(f"the objective of {name} must return its terms as a dict of numbers, or of tensors of one number")
        return loss.reshape(()), terms

    return objective_checked


def counted_passes(objective, steps):
    """Forward and backward passes of encoder and denoiser for the report; "unknown" if the objective does not count."""
    if hasattr(objective, "passes"):
        return objective.passes(steps)
    if objective:
        return "unknown"
    return dict.fromkeys(("encoder_forward", "encoder_backward", "denoiser_forward", "denoiser_backward"), 0)


def own_sources(*things):
    """The source files of those functions and objects that come from outside the package: a change of them changes results."""
    files = set()
    for thing in things:
        function = getattr(thing, "func", thing)
        home = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
        if not home.__module__.startswith(f"{__package__}."):
            files.add(inspect.getsourcefile(home))
    return sorted(files - {None})
