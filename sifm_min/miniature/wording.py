"""The instructions of the miniature's world: which attributes each kind changes, and the phrases that ask for it."""

from dataclasses import dataclass, field

from .world import COLOURS, Scene


@dataclass(frozen=True)
class Kind:
    """A kind of instruction. `changes` are attribute values ("*" stands for the colour); `needs` must hold in the scene.

    `phrases` are used in training, `held_out` only in evaluation. {c} is the colour; {p}, {o} and {s} are pronouns (her,
    she, her). A phrase with {s} is used for women only: the shipped editors were not trained on `his`.
    """

    name: str
    category: str | None                                     # None: any category
    changes: dict = field(hash=False)
    phrases: tuple
    held_out: tuple
    needs: dict = field(default_factory=dict, hash=False)    # attribute -> the values it may have

    def applies(self, scene):
        """True if the scene has the category and the attribute values that this kind needs."""
        return self.category in (None, scene.category) and all(scene.values[name] in allowed
                                                               for name, allowed in self.needs.items())

    def colours(self, scene):
        """The colours that this kind can ask for in this scene; [None] if it has no colour, [] if it would change nothing."""
        if "*" not in self.changes.values():
            return [None] if any(scene.values[name] != value for name, value in self.changes.items()) else []
        (name,) = [name for name, value in self.changes.items() if value == "*"]
        touching = {"background": ("clothes", "hair"), "clothes": ("background",), "hair": ("background",),
                    "backdrop": ("table", "vase", "flowers", "shapes"),
                    "table": ("backdrop", "vase"), "vase": ("backdrop", "table"), "flowers": ("backdrop",),
                    "shapes": ("backdrop",)}.get(name, ())
        taken = {scene.values[name]} | {scene.values[other] for other in touching}      # neighbours differ in colour
        return [colour for colour in COLOURS if colour not in taken]

    def target(self, scene, colour):
        """The scene after the instruction."""
        return scene.changed({name: colour if value == "*" else value for name, value in self.changes.items()})


_HUMAN = {"being": ("human",)}
_STILL, _ABSTRACT = {"subject": ("still life",)}, {"subject": ("abstract",)}
INSTRUCTION_KINDS = (
    Kind("background", "portrait", {"background": "*"},
         ("make the background {c}", "change the background to {c}", "turn the background {c}",
          "give it a {c} background", "paint the wall behind {p} {c}"),
         ("turn the wall behind {p} {c}", "set the background to {c}")),
    Kind("clothes", "portrait", {"clothes": "*"},
         ("make the clothes {c}", "change the clothes to {c}", "turn the shirt {c}", "give {p} a {c} shirt",
          "dress {p} in {c}", "make {p} wear a {c} shirt"),
         ("change the shirt to {c}", "give {p} {c} clothes")),
    Kind("hair", "portrait", {"hair": "*"},
         ("make the hair {c}", "change the hair to {c}", "turn the hair {c}", "give {p} {c} hair", "dye {s} hair {c}",
          "paint the hair {c}"),
         ("make {s} hair {c}", "dye the hair {c}"), {"haircut": ("short", "long"), "hat": ("none",)}),
    Kind("bald", "portrait", {"haircut": "bald", "hair": "black", "beard": "no"},
         ("make {p} bald", "shave {s} head", "remove the hair", "turn {p} bald", "take the hair away"),
         ("shave the head", "take away {s} hair"), {"haircut": ("short", "long"), "hat": ("none",)}),
    Kind("top hat", "portrait", {"hat": "top hat"},
         ("add a top hat", "give {p} a top hat", "put a top hat on {p}", "make {p} wear a top hat", "add a black hat",
          "put a black hat on {s} head"),
         ("give {p} a black hat", "put a top hat on {s} head")),
    Kind("crown", "portrait", {"hat": "crown"},
         ("add a crown", "give {p} a crown", "put a crown on {p}", "make {p} wear a crown", "crown {p}",
          "put a gold crown on {s} head"),
         ("add a gold crown", "put a crown on {s} head")),
    Kind("no hat", "portrait", {"hat": "none"},
         ("remove the hat", "take the hat off", "remove what {o} wears on {s} head", "take off the hat",
          "make {p} wear no hat"),
         ("take {s} hat off", "take away the hat"), {"hat": ("top hat", "crown")}),
    Kind("sunglasses", "portrait", {"sunglasses": "yes"},
         ("add sunglasses", "give {p} sunglasses", "put sunglasses on {p}", "make {p} wear sunglasses",
          "add dark glasses"),
         ("give {p} dark glasses", "put dark glasses on {p}")),
    Kind("beard", "portrait", {"beard": "yes"},
         ("add a beard", "give {p} a beard", "make {p} grow a beard", "let {p} have a beard", "put a beard on {p}"),
         ("make {p} have a beard", "add a beard to the face"), {"haircut": ("short", "long"), "person": ("man",)}),
    Kind("alien", "portrait", {"being": "alien", "haircut": "bald", "hair": "black", "beard": "no"},
         ("turn {p} into an alien", "make {p} an alien", "change {p} into an alien", "{o} should be an alien",
          "what if {o} were an alien"),
         ("make {p} into an alien", "{o} is now an alien"), _HUMAN),
    Kind("zombie", "portrait", {"being": "zombie"},
         ("turn {p} into a zombie", "make {p} a zombie", "change {p} into a zombie", "{o} should be a zombie",
          "what if {o} were a zombie"),
         ("make {p} into a zombie", "{o} is now a zombie"), _HUMAN),
    Kind("clown", "portrait", {"being": "clown"},
         ("turn {p} into a clown", "make {p} a clown", "change {p} into a clown", "{o} should be a clown",
          "what if {o} were a clown"),
         ("make {p} into a clown", "{o} is now a clown"), _HUMAN),
    Kind("sky", "landscape", {"sky": "*"},
         ("make the sky {c}", "change the sky to {c}", "turn the sky {c}", "give it a {c} sky", "paint the sky {c}"),
         ("set the sky to {c}", "let the sky be {c}")),
    Kind("night", "landscape", {"time": "night", "sky": "natural", "rainbow": "no"},
         ("make it night", "turn it into night", "change the time to night", "make it a night scene",
          "turn day into night", "add the moon and stars"),
         ("set it at night", "change it to night"), {"time": ("day", "sunset")}),
    Kind("sunset", "landscape", {"time": "sunset", "sky": "natural"},
         ("make it sunset", "turn it into a sunset", "change the time to sunset", "make it a sunset scene",
          "let the sun go down"),
         ("set it at sunset", "change it to a sunset"), {"time": ("day", "night")}),
    Kind("snow", "landscape", {"ground": "snow"},
         ("make it winter", "cover the ground with snow", "add snow", "turn the ground into snow", "let it snow",
          "make it a winter scene"),
         ("change it to winter", "cover it with snow")),
    Kind("desert", "landscape", {"ground": "desert"},
         ("make it a desert", "turn the ground into sand", "turn it into a desert", "cover the ground with sand",
          "change the ground to desert"),
         ("change it to a desert", "make the ground a desert")),
    Kind("autumn", "landscape", {"ground": "autumn"},
         ("make it autumn", "turn it into autumn", "make it an autumn scene", "change the season to autumn",
          "cover the ground with autumn leaves"),
         ("change it to autumn", "set the season to autumn")),
    Kind("mountains", "landscape", {"mountains": "yes"},
         ("add mountains", "put mountains in the background", "add some mountains", "place mountains behind",
          "give it mountains"),
         ("put mountains behind", "add mountains in the background")),
    Kind("no mountains", "landscape", {"mountains": "no"},
         ("remove the mountains", "take the mountains away", "delete the mountains", "make the mountains disappear",
          "get rid of the mountains"),
         ("take away the mountains", "make the mountains go away")),
    Kind("river", "landscape", {"river": "yes"},
         ("add a river", "put a river in the middle", "let a river run through it", "give it a river",
          "place a river there"),
         ("put a river there", "add a river in the middle")),
    Kind("no river", "landscape", {"river": "no"},
         ("remove the river", "take the river away", "delete the river", "make the river disappear",
          "get rid of the river"),
         ("take away the river", "make the river go away")),
    Kind("house", "landscape", {"house": "yes"},
         ("add a house", "put a house there", "build a house", "place a house on the ground", "give it a house"),
         ("place a house there", "put a house on the ground")),
    Kind("rainbow", "landscape", {"rainbow": "yes"},
         ("add a rainbow", "put a rainbow in the sky", "let a rainbow appear", "give it a rainbow",
          "place a rainbow in the sky"),
         ("put a rainbow there", "add a rainbow in the sky"), {"time": ("day", "sunset"), "mountains": ("no",)}),
    Kind("wall", "artwork", {"backdrop": "*"},
         ("make the wall {c}", "change the wall to {c}", "turn the wall {c}", "paint the wall {c}",
          "give it a {c} wall"),
         ("set the wall to {c}", "let the wall be {c}"), _STILL),
    Kind("table", "artwork", {"table": "*"},
         ("make the table {c}", "change the table to {c}", "turn the table {c}", "paint the table {c}",
          "give it a {c} table"),
         ("set the table to {c}", "let the table be {c}"), _STILL),
    Kind("vase", "artwork", {"vase": "*"},
         ("make the vase {c}", "change the vase to {c}", "turn the vase {c}", "paint the vase {c}",
          "give it a {c} vase"),
         ("set the vase to {c}", "let the vase be {c}"), _STILL),
    Kind("flowers", "artwork", {"flowers": "*"},
         ("add {c} flowers", "put {c} flowers in the vase", "give it {c} flowers", "make the flowers {c}",
          "place {c} flowers in the vase"),
         ("let the flowers be {c}", "place {c} flowers there"), _STILL),
    Kind("no flowers", "artwork", {"flowers": "none"},
         ("remove the flowers", "take the flowers away", "delete the flowers", "make the flowers disappear",
          "get rid of the flowers"),
         ("take away the flowers", "make the flowers go away"), {**_STILL, "flowers": tuple(COLOURS)}),
    Kind("canvas", "artwork", {"backdrop": "*"},
         ("make the background {c}", "change the background to {c}", "turn the background {c}",
          "give it a {c} background", "paint the background {c}"),
         ("set the background to {c}", "let the background be {c}"), _ABSTRACT),
    Kind("shapes", "artwork", {"shapes": "*"},
         ("make the shapes {c}", "change the shapes to {c}", "turn the shapes {c}", "paint the shapes {c}",
          "make all shapes {c}"),
         ("set the shapes to {c}", "let the shapes be {c}"), _ABSTRACT),
    Kind("frame", "artwork", {"frame": "yes"},
         ("add a frame", "put it in a frame", "give it a gold frame", "place a frame around it", "frame the picture"),
         ("put a gold frame around it", "add a gold frame")),
    Kind("no frame", "artwork", {"frame": "no"},
         ("remove the frame", "take the frame away", "delete the frame", "make the frame disappear",
          "get rid of the frame"),
         ("take away the frame", "make the frame go away")),
    Kind("black and white", None, {"style": "black and white"},
         ("make it black and white", "turn it into a black and white photo", "remove all colour",
          "convert it to black and white", "change it to grey"),
         ("make it grey", "change it to black and white")),
    Kind("sepia", None, {"style": "sepia"},
         ("make it sepia", "turn it into an old photo", "convert it to sepia", "make it look like an old photo",
          "give it a sepia tone"),
         ("change it to sepia", "make it an old photo")),
    Kind("negative", None, {"style": "negative"},
         ("make it a negative", "invert the colours", "turn it into a negative", "convert it to a negative",
          "swap light and dark"),
         ("change it to a negative", "invert all colours")),
    Kind("mosaic", None, {"style": "mosaic"},
         ("make it a mosaic", "turn it into a mosaic", "convert it to a mosaic", "make it look like a mosaic",
          "turn it into big pixels"),
         ("change it to a mosaic", "make it big pixels")),
)


@dataclass(frozen=True)
class WordedEdit:
    """One instruction for one scene: its prompt, and the scene that it asks for."""

    kind: str
    prompt: str
    scene: Scene
    target: Scene

    @property
    def changed(self):
        """The names of the attributes that the instruction changes."""
        return tuple(name for name, value in self.target.values.items() if value != self.scene.values[name])


def instructions(scene, rng, held_out):
    """Yield one WordedEdit of every kind that applies to the scene, in random order, with random colour and phrase."""
    kinds = [kind for kind in INSTRUCTION_KINDS if kind.applies(scene) and kind.colours(scene)]
    for kind in rng.sample(kinds, len(kinds)):
        colour = rng.choice(kind.colours(scene))
        man = scene.values.get("person") == "man"
        phrases = kind.held_out if held_out else kind.phrases
        phrase = rng.choice([phrase for phrase in phrases if not (man and "{s}" in phrase)])
        him, he = ("him", "he") if man else ("her", "she")
        yield WordedEdit(kind.name, phrase.format(c=colour, p=him, o=he, s="her"), scene, kind.target(scene, colour))


def corpus():
    """Yield every training phrase once; the tokenizer is trained on these."""
    for kind in INSTRUCTION_KINDS:
        for phrase in kind.phrases:
            pronouns = (("him", "he"), ("her", "she")) if "{p}" in phrase or "{o}" in phrase else ((None, None),)
            for colour in COLOURS if "{c}" in phrase else (None,):
                for him, he in pronouns[-1:] if "{s}" in phrase else pronouns:
                    yield phrase.format(c=colour, p=him, o=he, s="her")
