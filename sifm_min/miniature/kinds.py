"""The kinds of instruction: the words that ask for an edit, the edit itself, and the pictures where it can be asked for.

A pattern such as "make it (night|dark)" stands for one phrase for each choice. `trained` phrases are for training,
`held` ones for evaluation alone; every word of these occurs in trained phrases. {o} is the option.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

from . import placed_edits as placed
from . import whole_edits as edits
from .soft_maps import halved

VISIBLE = 0.06                                               # a change of a channel, of [0,1], that is seen
LEAST = 0.05                                                 # the share of the picture that an edit must change


def changed(source, target):
    """Which pixels differ visibly at half resolution: (H//2,W//2) bool, for two pictures (H,W,3) in [0,1]."""
    return np.abs(halved(target) - halved(source)).max(2) > VISIBLE


@dataclass(frozen=True)
class Kind:
    """A kind of instruction: a name, an edit, and the phrases that ask for it.

    edit: a function of `whole_edits.py` or `placed_edits.py`. trained, held: patterns of phrases. options: colours or
    places, ("",) where there is no choice. needs: a function of (pixels, option), true where what the edit works on is
    there.
    """

    name: str
    edit: Callable
    trained: tuple
    held: tuple
    options: tuple = ("",)
    needs: Callable | None = None

    def target(self, pixels, option):
        """The exact result of the instruction for a picture (H,W,3) in [0,1]: float32 of the same shape and range."""
        return np.clip(self.edit(pixels, option), 0, 1).astype(np.float32)

    def phrases(self, option):
        """The wordings used in training."""
        return _phrases(self.trained, option)

    def held_out(self, option):
        """The wordings that are never used in training."""
        return _phrases(self.held, option)

    def applies(self, pixels, option):
        """True where what the edit needs is there and at least a twentieth of the picture changes visibly."""
        return ((self.needs is None or bool(self.needs(pixels, option)))
                and bool(changed(pixels, self.target(pixels, option)).mean() >= LEAST))


@cache
def _phrases(patterns, option):
    return tuple(phrase.format(o=option) for pattern in patterns for phrase in _choices(pattern))


def _choices(pattern):
    parts = [part.split("|") for part in re.split(r"[()]", pattern)]
    return ["".join(chosen) for chosen in product(*parts)]


# ------------------------------------------------------------------------------------------------- what a picture must show

def _has_leaves(pixels, option):
    return edits.foliage(pixels).mean() >= LEAST


def _has_colour(pixels, option):
    return edits.named_colour(pixels, option).mean() >= 0.02


def _has_sky(pixels, option):
    sky = placed.sky(pixels)
    if sky.mean() < 0.12:
        return False
    blue = ((pixels[..., 2] - pixels[..., 0]) * sky).sum() / sky.sum() > 0.06
    return blue or placed.face(pixels)[3] < 0.5              # a light wall behind a person is none


def _has_face(pixels, option):
    return placed.face(pixels)[3] >= 0.5


# --------------------------------------------------------------------------------------------------------------- the kinds

_ALL = (
    # light and weather
    Kind("night", edits.night,
         ("make it (night|a night scene|dark as night)", "turn (it|this|the picture) into (night|a night scene)",
          "turn day into night", "change the time to (night|midnight)", "(show|set) it at night", "let it be night",
          "let the night fall", "it should be (night|midnight)"),
         ("change day into night", "set the scene at night", "make it midnight")),
    Kind("sunset", edits.sunset,
         ("make it (sunset|a sunset)", "turn (it|this|the picture) into (sunset|a sunset scene)",
          "change the time to (sunset|evening)", "(show|set) it at sunset", "let the sun go down",
          "add (evening light|the light of a sunset)", "it should be (sunset|evening)"),
         ("set the scene at sunset", "make it a sunset scene", "let it be sunset")),
    Kind("fog", edits.fog,
         ("make it (foggy|misty)", "add (fog|mist|thick fog)", "cover (it|this|the picture) with (fog|mist)",
          "put it in (fog|mist|thick fog)", "fill the air with (fog|mist)", "let it be foggy", "turn it into a foggy day"),
         ("cover it with thick fog", "let it be misty", "make it a foggy day")),
    Kind("snow", edits.snow,
         ("make it (snowy|winter|a winter scene)", "add snow", "cover (it|this|the picture) with snow", "let it be winter",
          "turn (it|this|the picture) into (winter|a winter scene)", "change the season to winter", "let it snow",
          "put snow on it"),
         ("change it to winter", "let it be snowy", "turn it into a snowy scene")),
    Kind("underwater", edits.underwater,
         ("make it underwater", "put (it|this|the picture) (under the sea|under water|underwater)",
          "sink (it|this|the picture) in the sea", "show it (under the sea|under water|underwater)",
          "turn it into an underwater scene", "let it be (under the sea|underwater)", "place it under the sea"),
         ("make it an underwater scene", "place it underwater", "let it sink in the sea")),
    Kind("spotlight", edits.spotlight,
         ("put a spotlight on the (middle|center)", "(add|shine|give it) a spotlight",
          "darken (everything|all) but the (middle|center)", "make (everything|all) dark but the (middle|center)",
          "light only the (middle|center)", "put the (middle|center) in a spotlight"),
         ("shine a spotlight on the middle", "add a spotlight on the center", "put it in a spotlight")),
    # materials
    Kind("pencil sketch", edits.sketch,
         ("turn (it|this|the picture) into a (pencil sketch|pencil drawing|sketch)", "make it a (pencil sketch|pencil drawing)",
          "draw it (in|with a) pencil", "sketch it (in|with a) pencil", "(show|draw) it as a pencil drawing"),
         ("make it a sketch", "show it as a pencil sketch", "sketch this in pencil")),
    Kind("oil painting", edits.oil,
         ("turn (it|this|the picture) into (an oil painting|a painting)", "make it (an oil painting|a painting)",
          "paint it (in|with) oil", "paint it (in|with) oil colors", "(show|paint) it as (an oil painting|a painting)",
          "give it the look of (an oil painting|a painting)"),
         ("paint this in oil", "make this an oil painting", "show this as an oil painting")),
    Kind("mosaic", edits.mosaic,
         ("turn (it|this|the picture) into (a mosaic|big pixels)", "make it (a mosaic|pixelated)",
          "(show|build) it as a mosaic", "make it a mosaic of (squares|tiles)", "show it (in|with) big pixels",
          "build it of (tiles|squares)", "pixelate it"),
         ("pixelate the picture", "make this a mosaic", "show it as a mosaic of tiles")),
    Kind("woodcut", edits.woodcut,
         ("turn (it|this|the picture) into a (woodcut|woodcut print)", "make it a (woodcut|woodcut print)",
          "(show|print|carve) it as a (woodcut|woodcut print)", "cut it in wood", "give it the look of a woodcut",
          "print it from a block of wood"),
         ("make this a woodcut", "print this as a woodcut", "carve it in a block of wood")),
    Kind("neon outlines", edits.neon,
         ("turn (it|this|the picture) into (neon|neon outlines|neon lights)", "make it (neon|neon outlines)",
          "(show|draw) it (as neon outlines|in neon lights)", "draw the outlines in neon", "make the outlines glow"),
         ("draw this in neon lights", "make the neon outlines glow", "show the outlines in neon")),
    Kind("stone", edits.relief,
         ("turn (it|this|the picture) into (stone|a stone carving)", "make it (stone|a stone carving)",
          "carve (it|this|the picture) (in|into) stone", "(show|cut) it as a stone carving", "make it of (stone|grey stone)"),
         ("cut it in stone", "make this a stone carving", "turn it into grey stone")),
    Kind("gold", edits.gold,
         ("turn (it|this|the picture) (into gold|golden)", "make it (gold|golden|of gold|of solid gold)",
          "cover (it|this|the picture) (in|with) gold", "cast it in (gold|solid gold)"),
         ("make this golden", "turn it into solid gold", "cover it in solid gold")),
    # colours
    Kind("black and white", edits.black_and_white,
         ("make it (black and white|grey|colorless)", "turn (it|this|the picture) (black and white|grey)",
          "remove (the color|all color|all colors)", "show it in (black and white|grey)",
          "take (the color|all color) away", "turn it into a black and white photo"),
         ("make this black and white", "take all colors away", "show this in grey")),
    Kind("half black and white", edits.half_grey,
         ("make the {o} (half|side) (black and white|grey)", "turn the {o} (half|side) (black and white|grey)",
          "remove the color (from|of) the {o} (half|side)", "take the color away from the {o} (half|side)",
          "show the {o} (half|side) in (black and white|grey)", "let the {o} half be grey"),
         ("let the {o} side be grey", "let the {o} half be black and white", "take the color of the {o} half away"),
         options=("left", "right")),
    Kind("sepia", edits.sepia,
         ("make it (sepia|a sepia photo|brown and old)", "turn (it|this|the picture) (sepia|into sepia|into an old photo)",
          "(show|print) it (in sepia|as an old photo)", "give it a (sepia|brown|vintage) tone", "make it an old brown photo"),
         ("make this sepia", "give this a sepia tone", "print it as a sepia photo")),
    Kind("blueprint", edits.duotone,
         ("make it (a blueprint|a cyanotype|blue and white)", "turn (it|this|the picture) into a (blueprint|cyanotype)",
          "(show|print) it (as a blueprint|as a cyanotype|in blue and white)", "make everything blue and white"),
         ("make this a blueprint", "print this as a cyanotype", "turn everything blue and white")),
    Kind("negative", edits.negative,
         ("make it a (negative|film negative)", "turn (it|this|the picture) into a (negative|film negative)",
          "invert (it|this|the picture|the colors|all colors)", "(show|print) it as a (negative|film negative)",
          "invert everything"),
         ("make this a negative", "invert all the colors", "show this as a film negative")),
    Kind("thermal", edits.thermal,
         ("make it a (thermal image|heat map)", "turn (it|this|the picture) into a (thermal image|heat map)",
          "(show|see) it (with a thermal camera|as a heat map)", "(show|paint) the heat in it", "make the heat visible",
          "see it as a thermal image"),
         ("make this a heat map", "show it as a thermal image", "see this with a thermal camera")),
    Kind("autumn", edits.autumn,
         ("make it autumn", "make the (leaves|plants|green) (orange|autumn orange)",
          "turn (it|this|the picture) into autumn", "turn the (leaves|plants|green) orange", "change the season to autumn",
          "let it be autumn", "(show|set) it in autumn", "give it autumn leaves"),
         ("change it to autumn", "make this autumn", "let the leaves be orange"), needs=_has_leaves),
    Kind("one colour kept", edits.one_colour,
         ("keep only (the {o}|{o}|the {o} things|what is {o})", "remove (all colors|every color) but {o}",
          "make (all|everything) grey but (the {o}|what is {o})", "make (all|everything) black and white but {o}",
          "let only (the {o}|{o}|the {o} things) keep (its|the) color"),
         ("make everything black and white but the {o}", "keep only the {o} color", "make all grey but the {o} things"),
         options=("red", "green", "blue"), needs=_has_colour),
    Kind("red and blue swapped", edits.swapped,
         ("swap (red and blue|blue and red|the red and the blue)", "exchange (red and blue|blue and red)",
          "turn (red into blue and blue into red|red to blue and blue to red)",
          "make (red things blue and blue things red|the red blue and the blue red)",
          "let (red and blue|blue and red) change places", "change (red to blue and blue to red|blue to red and red to blue)",
          "(show|give) it with red and blue swapped", "swap the colors red and blue"),
         ("exchange the red and the blue", "turn blue into red and red into blue", "exchange the colors red and blue")),
    Kind("sky", placed.sky_colour,
         ("make the sky {o}", "(turn|paint|color) the sky {o}", "change the (sky|color of the sky) to {o}",
          "give it a {o} sky", "(show|put|paint) a {o} sky", "let the sky be {o}", "the sky should be {o}",
          "color the whole sky {o}", "make the whole sky {o}", "put it under a {o} sky", "make a {o} sky"),
         ("turn the whole sky {o}", "let it be under a {o} sky", "the whole sky should be {o}"),
         options=("red", "green", "purple"), needs=_has_sky),
    # additions and focus
    Kind("frame", placed.framed,
         ("put a {o} frame around (it|this|the picture)", "add a {o} frame", "(hang|show|put) it in a {o} frame",
          "give (it|this|the picture) a {o} frame", "frame (it|this|the picture) in {o}", "add a {o} border",
          "put a {o} border around it", "make a {o} frame around it"),
         ("hang the picture in a {o} frame", "add a {o} frame around it", "give it a {o} border"),
         options=("wooden", "white")),
    Kind("moon", placed.moon,
         ("add a (moon|full moon) (on|at) the {o}", "put a (moon|full moon) (on|at) the {o}", "(draw|paint) a moon on the {o}",
          "let a (moon|full moon) shine on the {o}", "place a moon (on|at) the {o}", "let the moon rise on the {o}"),
         ("place a full moon on the {o}", "draw a full moon on the {o}", "let a moon rise on the {o}"),
         options=("left", "right")),
    Kind("sun", placed.sun,
         ("add a (sun|yellow sun) (on|at) the {o}", "put a (sun|yellow sun) (on|at) the {o}", "(draw|paint) a sun on the {o}",
          "let (the|a) sun shine on the {o}", "place a sun (on|at) the {o}", "let the sun stand on the {o}"),
         ("place a yellow sun on the {o}", "draw a yellow sun on the {o}", "let a yellow sun shine on the {o}"),
         options=("left", "right")),
    Kind("rainbow", placed.rainbow,
         ("add a (rainbow|big rainbow)", "put a rainbow (over it|there|in front)", "(draw|paint|show|place) a rainbow",
          "let (a rainbow|there be a rainbow|a rainbow appear)", "give it a (rainbow|big rainbow)",
          "make a rainbow (appear|over it)", "draw a rainbow over it"),
         ("place a rainbow over it", "let a big rainbow appear", "draw a big rainbow")),
    Kind("blurred background", placed.blurred_background,
         ("blur the (background|surroundings)", "make the (background|surroundings) (blurry|soft|out of focus)",
          "put the (background|surroundings) out of focus", "focus on the middle", "blur (all|everything) but the middle",
          "give it a (blurry|soft) background", "let only the middle be in focus"),
         ("make the background blurry and soft", "give it a background out of focus", "let the background be blurry")),
    # content
    Kind("most colourful thing", placed.most_colourful,
         ("make the most colorful (thing|part|object) {o}", "(turn|paint|color) the most colorful (thing|part|object) {o}",
          "change the (color of the most colorful|most colorful) (thing|part|object) to {o}", "make what is most colorful {o}",
          "let the most colorful thing be {o}"),
         ("paint what is most colorful {o}", "let the most colorful part be {o}", "turn what is most colorful {o}"),
         options=("green", "blue", "purple")),
    Kind("middle removed", placed.without_middle,
         ("remove (what is in the middle|the thing in the middle|the middle)",
          "(erase|delete) (what is in the middle|the thing in the middle|the middle)",
          "take (what is in the middle|the thing in the middle) away", "let (what is in the middle|the middle) disappear",
          "wipe out (what is in the middle|the thing in the middle|the middle)", "make the middle (empty|disappear)"),
         ("take the middle away", "make what is in the middle disappear", "let the thing in the middle disappear"),
         needs=lambda pixels, option: changed(pixels, placed.without_middle(pixels, option)).mean() >= 0.08),
    Kind("sunglasses", placed.glasses,
         ("add (sunglasses|dark glasses)", "put (sunglasses|dark glasses|big sunglasses) on (the face|the person)",
          "give the (face|person) (sunglasses|dark glasses)", "make the person wear (sunglasses|dark glasses)",
          "(draw|place) sunglasses on the face", "let the person wear sunglasses"),
         ("let the person wear dark glasses", "add big sunglasses", "draw dark glasses on the face"), needs=_has_face),
    Kind("hat", placed.hat,
         ("add a {o} (hat|top hat)", "put a {o} (hat|top hat) on (the head|the person)",
          "give the (head|person) a {o} (hat|top hat)", "make the person wear a {o} (hat|top hat)",
          "(draw|place) a {o} hat on the head", "let the person wear a {o} hat"),
         ("let the person wear a {o} top hat", "draw a {o} top hat on the head", "place a {o} hat on the person"),
         options=("red", "black"), needs=_has_face),
    Kind("stripes", placed.stripes,
         ("(paint|put|draw|add) {o} stripes on the (light|bright) (parts|surfaces)",
          "cover the (light|bright) parts with {o} stripes", "make the light (parts|surfaces) {o} striped",
          "give the light parts {o} stripes"),
         ("give the bright surfaces {o} stripes", "cover the light surfaces with {o} stripes",
          "make the bright parts {o} striped"),
         options=("red", "blue")),
)
KINDS = {kind.name: kind for kind in _ALL}


def corpus():
    """Every wording used in training, once; a tokenizer is trained on these."""
    return [phrase for kind in KINDS.values() for option in kind.options for phrase in kind.phrases(option)]
