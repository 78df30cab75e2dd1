"""The share of each editor in a run: its method, its options, and the words that it is told."""

from dataclasses import dataclass, replace
from pathlib import Path

from .. import methods
from ..instructions.bank import drawn_order
from ..methods import ENCODER_METHODS, METHODS, options_of, settings, takes_any

SUBSTITUTE = "latent"                                        # of encoders alone, beside editors with a denoiser


@dataclass(frozen=True)
class Share:
    """One editor of a run.

    name: of the editor, as reports and progress have it; "" where it is the only one. method, function, options: see
    `methods.settings`. texts: the prompts that it is given, in the words for its kind; contexts: theirs.
    """

    name: str
    editor: object
    method: str
    function: object
    options: dict
    texts: list = ()
    contexts: list = ()

    @property
    def reads_text(self):
        """False where no text changes the gradient."""
        return getattr(self.editor, "needs_prompt", True) and self.method not in ENCODER_METHODS

    @property
    def takes_texts(self):
        """True where the method gets the texts themselves beside their contexts."""
        return "prompts" in methods.parameters_of(self.function)

    @property
    def timesteps(self):
        """The number of the method's timesteps, and how many at once were asked for: its memory depends on them. {} if none."""
        if not {"batch", "timesteps"} <= {*options_of(self.function)}:
            return {}
        timesteps = self.options.get("timesteps", methods.parameters_of(self.function)["timesteps"].default)
        if timesteps is None:
            return {}
        return {"count": timesteps if isinstance(timesteps, int) else len(timesteps), "batch": self.options.get("batch")}

    def told(self, prompts, bank):
        """The same share with its texts and their contexts: of the prompts, and, of a method that reads text, of the bank and
        of the empty prompt, where there is a bank."""
        texts = list(self.texts or prompts)
        if bank and self.reads_text:                         # semantic-attack has no use for a text without words
            texts = list(dict.fromkeys([*texts, *bank.texts(self.editor.kind), *([] if self.takes_texts else [""])]))
        return replace(self, texts=texts, contexts=self.editor.contexts(texts) if texts else [])

    def order(self, steps, seed):
        """The numbers of the texts that so many steps draw from a bank; [] where no text is read."""
        return drawn_order(len(self.texts), steps, seed) if self.reads_text else []

    def in_order(self, objective, order):
        """An objective whose steps take the texts in this order: by convention it takes text number `step` mod their count."""
        if objective is None or not order:
            return objective

        def ordered(x_imu, step):
            return objective(x_imu, step * len(self.texts) + order[step])

        for name in ("passes", "passes_again", "note", "drawn"):
            if hasattr(objective, name):
                setattr(ordered, name, getattr(objective, name))
        return ordered


def group_of(editor):
    """The `Several` of an editor or of a list of them. Raises ValueError for names of editors."""
    from ..editors import Several
    if isinstance(editor, Several):
        return editor
    editors = list(editor) if isinstance(editor, list | tuple) else [editor]
    if name := next((one for one in editors if isinstance(one, str | Path)), None):
        raise ValueError(f"editor {str(name)!r} is a name; load it first: load_editor({str(name)!r})")
    return Several(editors)


def shares_of(group, method, preset, each, arguments):
    """(the method's name, loop, [Share]) of a run; arguments: of loop and method, see `immunize`. Raises ValueError."""
    asked = method or ("sifm" if group.needs_prompt else SUBSTITUTE)
    if len(group.editors) == 1:
        name, function = methods.find_method(asked)
        own = dict((each or [{}])[0] or {})
        _check_own(own, 1)
        loop, options = settings(function, preset, **arguments | {key: own[key] for key in own if key != "prompts"})
        return name, loop, [Share("", group.editors[0], name, function, options)]
    encoders = [getattr(editor, "kind", None) == "encoders" for editor in group.editors]
    words = [(own or {}).get("prompts", ()) for own in each or [{}] * len(encoders)]
    loop, found = shared_settings(asked, encoders, preset, each, **arguments)
    return methods.find_method(asked)[0], loop, [
        Share(label, editor, name, function, options, texts=[texts] if isinstance(texts, str) else list(texts))
        for label, editor, (name, function, options), texts in zip(group.names, group.editors, found, words, strict=True)]


def planned_timesteps(shares):
    """The largest number of timesteps and the least batch of all shares, as memory plans take them; {} without timesteps."""
    found = [share.timesteps for share in shares if share.timesteps]
    batches = [one["batch"] for one in found if one["batch"] is not None]
    return {"count": max(one["count"] for one in found), "batch": min(batches, default=None)} if found else {}


def shared_settings(asked, encoders, preset, each, **arguments):
    """(loop, [(method's name, its function, its options) of each editor]) of a run for several editors.

    asked: the method. Editors with encoders alone take `latent` where it needs a denoiser. encoders: for each editor, True if
    it has encoders alone. each: None, or the options of each editor, a dict each, that win over the others; "prompts" are none.
    arguments: of loop and methods; one that some editors' methods lack goes to the others. Raises ValueError where no method
    has it.
    """
    _, function = methods.find_method(asked)
    each = [{}] * len(encoders) if each is None else [dict(own or {}) for own in each]
    if len(each) != len(encoders):
        raise ValueError(f"each has options for {len(each)} editors, and there are {len(encoders)}; give a dict for each")
    chosen = [methods.find_method(own_method(asked, encoders, place)) for place in range(len(encoders))]
    arguments = {key: value for key, value in arguments.items() if value is not None}
    loop = {key: value for key, value in arguments.items() if key in methods.PROTOCOL}
    options = {key: value for key, value in arguments.items() if key not in methods.PROTOCOL}
    for key in options:
        if not any(key in options_of(own) or takes_any(own) for _, own in chosen):
            settings(function, preset, **{key: options[key]})            # the sentence that says what it has
    found = []
    for number, ((label, own), particular) in enumerate(zip(chosen, each, strict=True), 1):
        _check_own(particular, number)
        particular = {key: value for key, value in particular.items() if key != "prompts"}
        known = {key: value for key, value in options.items() if own is function or key in options_of(own)}
        native = preset if own is function else "protocol"
        found.append((label, own, settings(own, native, **known | particular)[1]))
    return settings(function, preset, **loop, **_needed(chosen, found, function))[0], found


def _check_own(options, number):
    """Raise ValueError where one editor's own options hold one of the run."""
    if wrong := [key for key in options if key in methods.TAKEN]:
        raise ValueError(f"{wrong[0]} is the same for all editors, so it cannot be given for editor {number} alone")


def own_method(asked, encoders, place):
    """The method of one editor: the asked one, or `latent` for encoders alone beside other editors, if it needs a denoiser."""
    name = methods.find_method(asked)[0]
    substituted = encoders[place] and not all(encoders) and name in METHODS.HOMES and name not in ENCODER_METHODS
    return SUBSTITUTE if substituted else asked


def _needed(chosen, found, function):
    """The options of the asked method itself, without which one of your own may be incomplete."""
    return next((options for (_, own), (_, _, options) in zip(chosen, found, strict=True) if own is function), {})


def check_shares(shares):
    """Raise ValueError, which names the editor, where one of them cannot run its method."""
    for share in shares:
        with named(share.name):
            methods.check_fit(share.method, share.options, share.editor)


class named:                                                 # noqa: N801 (a context manager, used like a function)
    """Have every ValueError inside say which editor it is about."""

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is ValueError and self.name not in str(error):
            raise ValueError(f"{self.name}: {error}") from error


def told(shares, prompts, bank, *, forget=False):
    """The shares with their texts. forget: release each editor's text encoders before the next one's are loaded."""
    found = []
    for share in shares:
        found.append(share.told(prompts, bank))
        if forget:
            share.editor.forget_text()
    return found


# -- reports ---------------------------------------------------------------------------------------------------------------

def drawn_text(shares, orders, step):
    """{"prompt": the text of this step} of a run that draws texts, of several editors {their name: text}; {} of others."""
    texts = {share.name: share.texts[orders[share.name][step]] for share in shares if orders[share.name]}
    return {"prompt": texts if len(shares) > 1 else texts[shares[0].name]} if texts else {}


def about_editors(shares, scales):
    """The editor of a run as its report states it; of several a list, each with its method, options and scale."""
    if len(shares) == 1:
        return {"editor": shares[0].editor.provenance()}
    return {"editors": [share.editor.provenance() | {"called": share.name, "method": share.method,
                                                     "options": spelled_out(share), "scale": scales.get(share.name)}
                        for share in shares]}


def about_bank(bank, shares):
    """{"any_prompt": ...} of a run with a bank: its digest, how many texts were drawn from, and who reads none."""
    if bank is None:
        return {}
    readers = [share for share in shares if share.reads_text]
    deaf = [share.name or str(share.editor.name) for share in shares if not share.reads_text]
    return {"any_prompt": bank.record() | {"empty": any("" in share.texts for share in readers),
                                           "texts": max((len(share.texts) for share in readers), default=0),
                                           "ignored_by": deaf}}


def spelled_out(share):
    """The method's options with its defaults filled in, as plain values."""
    parameters = methods.parameters_of(share.function)
    values = {key: parameters[key].default for key in options_of(share.function)} | share.options
    if share.method not in METHODS.HOMES:                    # whose values may be of any kind
        plain = str | int | float | list | tuple | dict | None
        return {key: value if isinstance(value, plain) else str(value) for key, value in values.items()}
    if "taps" in values:
        values["taps"] = list(values["taps"] or share.editor.default_taps)
    if isinstance(values.get("timesteps"), int):
        values["timesteps"] = share.editor.timesteps(values["timesteps"]).tolist()
    return values
