"""The flags of `immunize`, and the settings that they give."""

import argparse
import re

from .. import cli, methods
from ..methods import METHODS, PRESETS, PROTOCOL
from ..metrics.perturbation import BUDGETS
from .shares import own_method

EXAMPLES = """examples:
  %(prog)s photo.png --prompt "make her a witch" -o out
  %(prog)s photo.png --prompt "make her a witch" --editor instruct-pix2pix -o out
  %(prog)s photo.png --editor latents -o out
  %(prog)s photo.png --any-prompt --editor instruct-pix2pix --editor sd3 --memory low -o out
  %(prog)s photos/ --prompt "turn him into a zombie" --prompt "make it night" --steps 200 -o out

writes, per picture: NAME_immunized.png, NAME_preview.png (original, its edit, immunized, its edit, perturbation x10; with
--editor latents the decodings of each latent space in place of edits) and NAME.json (the report). A folder resumes
where it stopped. Exit codes: 0 all done, 1 some pictures failed, 2 usage, 3 weights unavailable, 130 or 143 interrupted."""


def parser():
    """The parser of the command."""
    made = cli.Parser("immunize",
                        "Write a picture again with an invisible perturbation that makes text-guided edits of it fail.",
                        EXAMPLES)
    add = made.add_argument
    add("pictures", nargs="*", type=cli.path, metavar="PICTURE-OR-FOLDER")
    add("--prompt", action="append", type=cli.prompt, help="the edit to defeat; several take turns")
    add("--any-prompt", nargs="?", const=True, type=cli.path, metavar="FILE",
        help="defeat edits in general: each step draws its text from 64 general instructions (or those of a text file, one a "
             "line), the empty one, and --prompt, if given")
    add("-o", "--output", type=cli.path, metavar="DIR", help="where results go (created if absent)")
    made.editor(several="; give it several times for one perturbation against all")
    add("--method", type=_method,
        help=f"{', '.join(METHODS)}, or your own as MODULE:NAME (default: sifm; of --editor latents: latent)")
    add("--option", action="append", default=[], metavar="NAME=VALUE",
        help="an option of the method, above all of your own; 2:NAME=VALUE is of the second of several editors alone")
    add("--eps", type=cli.eps, default=0.03, help="budget, as 0.03 or 8/255 (default: 0.03)")
    add("--budget", choices=BUDGETS, default="uniform",
        help="where --eps holds: everywhere (uniform, default), or with less for smooth areas, where changes show (texture)")
    add("--preset", choices=PRESETS, default="protocol",
        help="what holds unless told otherwise: one protocol for all methods (default), or how the original of a "
             "baseline was run; the budget is --eps in both")
    add("--steps", type=cli.count, help="PGD iterations (protocol: 100)")
    add("--step-size", type=cli.positive, help="of one iteration, on [0,1] (protocol: 1/255)")
    add("--schedule", choices=("constant", "linear"), help="of the step size (protocol: constant)")
    add("--init", choices=("random", "zero"), help="where the perturbation starts (protocol: random)")
    add("--mask", type=cli.path, metavar="PICTURE", help="perturb only where this picture is bright")
    add("--robust", action="store_true",
        help="expect what pictures meet before an edit: each step sees both pictures after a JPEG, a resize, a blur or nothing")
    add("--robust-cleaner", dest="robust", action="store_const", const="cleaner",
        help="the same with AdverseCleaner among them, which takes longer and some 2 kB of memory a pixel")
    around = made.add_argument_group("around any method").add_argument
    around("--flat", action=argparse.BooleanOptionalAction,
           help="TDAE's flat minima: two gradients a step (tdae; default: yes; others: no; not for sds)")
    around("--flat-share", type=cli.positive, metavar="SHARE", help="its radius, of the budget's (default: 0.05)")
    around("--flat-weight", type=cli.positive, metavar="WEIGHT", help="of its penalty (default: 0.3)")
    around("--refine-text", action=argparse.BooleanOptionalAction,
           help="TDAE's text refinement: the instruction moves against the perturbation (tdae; default: yes, but not "
                "with --any-prompt; sifm, sifm-output, semantic-attack; default: no)")
    around("--refine-every", type=cli.count, metavar="STEPS", help="how often it does (default: 10)")
    around("--refine-rounds", type=cli.count, metavar="N", help="gradients by the text each time (default: 5)")
    around("--refine-reach", type=cli.positive, metavar="SHARE", help="how far, of the text's root mean square (default: 0.1)")
    around("--blur", type=cli.positive, metavar="SIGMA",
           help="BlurGuard's blur of the perturbation, a standard deviation in pixels such as 1 (default: none)")
    _add_options(made.add_argument_group("options of single methods, named behind each").add_argument)
    made.memory()
    add("--no-preview", action="store_true", help="skip the preview and its two edits")
    made.shared("device", "dtype", "vae-dtype", "seed", "overwrite")
    return made


def _add_options(own):
    """Add the options of single methods by `own`, the add_argument of a parser or of a group."""
    own("--lam", "--lambda", type=cli.number, help="weight of the distance term (sifm; default: 0.1)")
    own("--timesteps", type=cli.timesteps,
        help="a count, or timesteps as 900,500,100 (sifm, semantic-attack, danp, tdae; default: 10)")
    own("--taps", type=cli.commas(), help="activations to perturb, comma-separated; `list` prints what there is (sifm)")
    own("--reduction", choices=("balanced", "relative", "literal"),
        help="of activations to a number (sifm; danp has balanced and literal; default: balanced)")
    own("--aggregate", choices=("loss-mean", "feature-mean"), help="of the taps (sifm; default: loss-mean)")
    own("--noisy", choices=("paper", "deploy"),
        help="whose latent is noised: the immunized picture's (default), or the original's (sifm)")
    own("--resample", action=argparse.BooleanOptionalAction,
        help="draw new noise at every step (sifm; default: no; photoguard-diffusion; default: yes)")
    own("--batch", type=cli.count, help="timesteps at once (sifm, semantic-attack, danp, tdae; default: all)")
    own("--unroll", type=cli.count, help="denoising steps to look through (photoguard-diffusion; default: 4)")
    own("--repeats", type=cli.count, help="edits per step, each from its own noise (photoguard-diffusion; default: 1)")
    own("--content", type=cli.prompt, metavar="TEXT",
        help="what to protect, as `man` (semantic-attack, tdae; default: the prompts)")
    own("--variant", help="which form of the loss: zero, grey (photoguard-encoder); eot, plain, released (editshield); minus, "
                          "plus (sds); fused, textural, semantic (mist); ace+, ace (ace); the first is the default")
    own("--sizes", type=cli.commas(cli.count), help="long sides at which latents are moved, in turn (latent: 512,1024)")
    own("--spaces-per-step", type=cli.count, metavar="K", help="so many latent spaces take turns (latent; default: all)")
    own("--blocks", type=cli.count, help="single blocks to attack, from the first (decontext; default: the editor's)")
    own("--attention-weight", type=cli.number, help="of the low attention that is raised (danp; default: 1)")
    own("--noise-weight", type=cli.number, help="of the predicted noise (danp; default: 1)")
    own("--bins", type=cli.count, help="of the histogram of attention (danp; default: 128)")
    own("--tokens", choices=("content", "all"), help="whose attention counts: the prompt's own words, or all (danp)")
    own("--low", type=cli.count, help="the least noisy timestep that is drawn (decontext; default: 980)")


def _method(text):
    if text not in METHODS.HOMES and ":" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(METHODS)}; your own is MODULE:NAME")
    return text


OPTIONS = ("lam", "timesteps", "taps", "reduction", "aggregate", "noisy", "resample", "batch", "unroll", "repeats", "content",
           "variant", "sizes", "spaces_per_step", "blocks", "low",
           "attention_weight", "noise_weight", "bins", "tokens")
NO_VALUE = ("resample",)                                     # flags that are there or not
AROUND = {"flat": ("share", "weight"), "refine_text": ("every", "rounds", "reach")}


def given(args):
    """Of loop and method, what the command line set; the rest is the preset's, or the method's own default."""
    found = {name: value for name in (*PROTOCOL, *OPTIONS) if (value := getattr(args, name)) is not None}
    options = methods.parse(args.method, [text for text in args.option if not OF_ONE.match(text)])
    if twice := sorted(found.keys() & options.keys()):
        raise ValueError(f"--option {twice[0]} and --{twice[0].replace('_', '-')} are the same; give one of them")
    return found | options


OF_ONE = re.compile(r"\s*(\d+)\s*:(.*)", re.DOTALL)


def each_of(args, encoders):
    """The options of each editor alone, {name: value} each; --option 2:NAME=VALUE is of the second.

    encoders: for each editor, True if it has encoders alone.
    """
    found = [{} for _ in encoders]
    for number, text in (match.groups() for match in map(OF_ONE.match, args.option) if match):
        if not 1 <= int(number) <= len(encoders):
            raise ValueError(f"--option {number}:{text}: there {'is 1 editor' if len(encoders) == 1 else ''}"
                             f"{f'are {len(encoders)} editors' if len(encoders) > 1 else ''}")
        method = own_method(args.method, encoders, int(number) - 1)
        name, equals, value = (part.strip() for part in text.partition("="))
        if name in OPTIONS and equals and name in methods.options_of(method) and name not in NO_VALUE:
            reader = cli.Parser("immunize", "")
            _add_options(reader.add_argument)
            parsed = {name: getattr(reader.parse_args([f"--{name.replace('_', '-')}={value}"]), name)}
        else:
            parsed = methods.parse(method, [text])
        if twice := parsed.keys() & found[int(number) - 1].keys():
            raise ValueError(f"--option {number}:{min(twice)} is given twice")
        found[int(number) - 1] |= parsed
    return found


def around(args):
    """flat, refine_text and blur as `immunize` takes them. A number of one of the first two switches it on."""
    found = {"blur": args.blur}
    for option, names in AROUND.items():
        values = {name: getattr(args, f"{option.split('_')[0]}_{name}") for name in names}
        numbers = {name: value for name, value in values.items() if value is not None}
        asked = getattr(args, option)
        if numbers and asked is False:
            flag = option.replace("_", "-")
            raise ValueError(f"--no-{flag} and --{flag.split('-')[0]}-{next(iter(numbers))} contradict each other; give one of "
                             "them")
        found[option] = numbers or asked
    return found
