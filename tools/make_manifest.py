"""Make a manifest: a folder of pictures with their categories, prompts and hashes, as experiments/manifest.py reads it.

    python tools/make_manifest.py world -n 100 -o sets/world             photographs that ship, with instructions whose exact
                                                                         results are known; --photos FOLDER takes yours
    python tools/make_manifest.py folder ~/photos --prompts prompts.csv -o sets/mine
    python tools/make_manifest.py dataset --review -o sets/paper         choose rows, write sets/paper/selection.json, stop
    python tools/make_manifest.py dataset -o sets/paper                  go on: fetch the pictures that it lists

`dataset` makes a set of the paper's composition (35 portraits, 35 landscapes, 30 artworks; which pictures the paper took is
not published) from timbrooks/instructpix2pix-clip-filtered, through the rows endpoint of the hub's dataset viewer. Rows are
read in an order that the seed fixes, and put into a category by words of their caption; selection.json lists them with the
word that decided. Read it: you may change a category there, and the category "reject" replaces the row by another in the next
run. After an interruption the same command goes on, and nothing is fetched twice. selection.json has the hash of each picture:
another person gets the same set from that file, or an error. Only the numbers of rows are sent.

`folder` copies your pictures. Their prompts are --prompt, one for all, or a file: JSON {"name.png": "make it night", or
{"prompt", "category", "caption", "unseen_prompts", "unseen_captions"}}, or CSV with a head, image,prompt and optionally
category and caption.

Unseen prompts, which no method reads, come from --unseen: JSON {"id or file name": ["text", or {"prompt", "caption"}]}, or
CSV with a head, id,prompt and optionally caption, one line for each prompt. Or from a model: --gemini gemini-2.5-pro, or
--gemini judge.json with one judge of a panel, SENDS EVERY PICTURE there with its prompt (tools/prompts/unseen-1.txt) and needs
the key of that judge. Answers are kept in unseen.jsonl, and no question is asked twice, except where a call was in flight
at a kill. --max-calls and --max-cost count every call of all runs into the folder.
Exit codes: 0 all done, 1 some pictures failed (the manifest is then not written; --partial writes it), 2 usage, 3 the server
cannot be reached, 130 interrupted.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import random
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import requests

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sifm_min import cli, images  # noqa: E402
from sifm_min.experiments import manifest  # noqa: E402
from sifm_min.files import writing  # noqa: E402
from sifm_min.files.listing import list_pictures  # noqa: E402
from sifm_min.models.checkpoints import Unavailable  # noqa: E402

DATASET, SERVER = "timbrooks/instructpix2pix-clip-filtered", "https://datasets-server.huggingface.co"
COMPOSITION = {"portrait": 35, "landscape": 35, "artwork": 30}
PAGE, PER_PAGE = 100, 3                                      # rows of a request (the server's limit); kept of each category
TRIES, LONGEST, DEADLINE, CAP = 5, 120, 120, 32 * 2**20      # of a request: tries, wait and whole time in s, bytes
LOST = 3                                                     # failed requests in a row that end a run
REJECT = "reject"
# Tried in this order, on whole words of the caption: a portrait in oil is an artwork.
PEOPLE = ["woman", "man", "girl", "boy", "women", "men", "lady", "bride", "couple", "people", "person"]
RULES = {
    "artwork": {"any": ["painting", "paintings", "oil on canvas", "watercolor", "watercolour", "acrylic", "drawing", "sketch",
                        "illustration", "engraving", "etching", "fresco", "mural", "artwork", "digital art", "concept art"],
                "none": ["photo", "photograph", "wall art", "room"]},
    "portrait": {"any": ["portrait", "headshot", "selfie", "face", "actress", "actor", "woman", "man", "girl", "boy", "lady"],
                 "none": ["couple", "people", "crowd", "group", "family", "statue", "silhouette", "landscape", "dog", "cat"]},
    "landscape": {"any": ["landscape", "mountain", "mountains", "lake", "beach", "forest", "valley", "sunset", "sunrise",
                          "waterfall", "river", "hills", "coast", "meadow", "desert", "canyon", "countryside", "seascape"],
                  "none": [*PEOPLE, "portrait", "wedding", "room", "dog", "cat"]},
}
COLUMNS = ("original_prompt", "edit_prompt", "edited_prompt")            # caption before, instruction, caption after
SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp"}


# --------------------------------------------------------------------------------------------------------- world and folder

def world(args):
    from sifm_min import miniature
    from sifm_min.miniature import photographs

    if args.list and not args.photos:
        raise ValueError("--list is of the files in --photos")
    found = photographs.of_folder(args.photos, notes=args.list) if args.photos else photographs.shipped()
    sources = {photograph.name: {key: value for key in ("title", "author", "source", "place", "licence", "sha256")
                                 if (value := getattr(photograph, key))} for photograph in found}
    items = []
    for index, sample in enumerate(miniature.samples(args.n, args.seed, pictures=found, wordings=args.wordings)):
        name = f"{sample.category}-{index:04d}"
        path = args.output / "images" / f"{name}.png"
        place(path, _png(sample.image), args)
        items.append(manifest.Item(
            name, f"images/{path.name}", sample.category, sample.prompt, tuple(sample.unseen_prompts), digest(path), path=path,
            origin={"photograph": {"name": sample.photograph, **sources[sample.photograph]}, "seed": args.seed,
                    "edits": [[one.kind, one.option] for one in (sample, *sample.unseen)]}))
    return finish(items, len(items), args)


def folder(args):
    pictures, left_out = list_pictures([args.pictures])
    if args.prompts:
        told = read_prompts(args.prompts)
        if lost := sorted(told.keys() - {path.name for path in pictures}):
            raise ValueError(f"{args.prompts}: there is no picture {lost[0]} in {args.pictures}")
        if lost := sorted({path.name for path in pictures} - told.keys()):
            raise ValueError(f"{args.prompts} has no prompt for {lost[0]}, nor for {len(lost) - 1} others; "
                             "add them, or take the pictures out of the folder")
    else:
        told = {path.name: {"prompt": args.prompt} for path in pictures}
    names, items = _names(pictures), []

    def one(path):
        images.read(path)                                    # raises here, and not in the middle of an experiment
        own = {"category": args.category, **told[path.name]}
        target = args.output / "images" / f"{names[path]}{path.suffix.lower()}"
        place(target, path.read_bytes(), args)
        given = {"id": names[path], "image": f"images/{target.name}", "unseen_prompts": [], "sha256": digest(target),
                 "origin": {"file": path.name}, **own}
        try:
            items.append(manifest.Item.from_json(given, args.output))
        except ValueError as error:
            raise ValueError(f"{args.prompts or 'the picture'}: {path.name} {error}") from None

    cli.each_file(pictures, one, left_out=left_out, done="taken", quiet=args.quiet, debug=args.debug)
    return finish(items, len(pictures), args)


def read_prompts(path):
    """{file name: {"prompt": ..., ...}} of a JSON or CSV file; raises ValueError."""
    if path.suffix.lower() == ".csv":
        rows, told = _csv(path, ("image", "prompt"), ("category", "caption")), {}
        for number, row in rows:
            name = row.pop("image")
            if name in told:
                raise ValueError(f"{path}, line {number}: {name} stands there twice")
            told[name] = {key: value for key, value in row.items() if value}
        return told
    given = _json(path)
    known = {"prompt", "category", "caption", "unseen_prompts", "unseen_captions"}
    told = {name: {"prompt": value} if isinstance(value, str) else value for name, value in given.items()}
    for name, value in told.items():
        if not isinstance(value, dict) or value.keys() - known or "prompt" not in value:
            raise ValueError(f"{path}: {name} has neither a text nor an object with a prompt and, of the rest, only "
                             f"{', '.join(sorted(known - {'prompt'}))}")
    return told


def _names(pictures):
    """An id for each file: its stem in letters that ids may have, with a number where two would be the same."""
    names, taken = {}, Counter()
    for path in pictures:
        name = re.sub(r"[^\w.-]", "-", path.stem)[:80]
        name = name if re.match(r"\w", name) else f"picture{name}"
        taken[name.lower()] += 1
        while taken[name.lower()] > 1:                       # some disks ignore capitals
            name = f"{name}-{taken[name.lower()]}"
            taken[name.lower()] += 1
        names[path] = name
    return names


# ---------------------------------------------------------------------------------------------------------------- the dataset

def dataset(args):
    path = args.output / "selection.json"
    chosen = Selection.read(path, args) if path.exists() else Selection(path, settings(args))
    server = Server(args.server, chosen.about, cli.say if not args.quiet else lambda text: None)
    choose(chosen, server, args)
    kept = chosen.kept()
    cli.say(f"{path} lists {len(kept)} rows: {', '.join(f'{n} {c}' for c, n in chosen.about['composition'].items())}",
            quiet=args.quiet)
    if args.review:
        cli.say('read it, change categories (or "reject" a row), and run the command again without --review', quiet=args.quiet)
        return cli.OK
    items, pictures = [], args.output / "images"
    names = {chosen.name(row): row for row in kept}

    def one(name):
        row = names[name]
        found = [file for file in pictures.glob(f"{name}.*") if digest(file) == row.get("sha256")]
        file = found[0] if found else fetch(row, name, pictures, server)
        if not found:
            row["sha256"] = digest(file)
            chosen.write()
        items.append(manifest.Item(
            name, f"images/{file.name}", row["category"], row["prompt"], (), row["sha256"], caption=row["result"], path=file,
            origin={key: chosen.about[key] for key in ("dataset", "config", "split")} | {"row": row["row"]}))

    writing.make_folder(pictures)
    cli.each_file(names, one, quiet=args.quiet, debug=args.debug)
    return finish(items, len(kept), args)


class Selection:
    """selection.json: the rows of the set. `about`: how they were chosen. `pages`: the number of pages read."""

    ABOUT = ("dataset", "config", "split", "seed", "composition", "rules")

    def __init__(self, path, about, total=None, pages=0, rows=()):
        self.path, self.about, self.total, self.pages, self.rows = path, about, total, pages, list(rows)

    @classmethod
    def read(cls, path, args):
        """Read a file that a person may have changed. Raises ValueError where options contradict it."""
        given = _json(path)
        if missing := [key for key in (*cls.ABOUT, "total", "pages", "rows") if key not in given]:
            raise ValueError(f"{path} has no {missing[0]}; restore it, or delete it to choose again")
        about = {key: given[key] for key in cls.ABOUT}
        check_composition(about["composition"], path)
        check_rules(about["rules"], path)
        for key in cls.ABOUT:
            if getattr(args, key) is not None and settings(args)[key] != about[key]:
                raise ValueError(f"{path} was made with another --{key}; leave the option out, or choose another folder")
        categories, seen = {*about["composition"], REJECT}, set()
        rows = given["rows"]
        if not isinstance(rows, list) or type(given["pages"]) is not int or not (
                given["total"] is None or type(given["total"]) is int):
            raise ValueError(f"{path}: its rows, pages or total are not what this tool wrote; restore it")
        for row in rows:
            if not (isinstance(row, dict) and type(row.get("row")) is int
                    and all(isinstance(row.get(key), str) and row[key] for key in ("category", "caption", "prompt", "result"))):
                raise ValueError(f"{path}: {json.dumps(row)[:80]} is not a row with row, category, caption, prompt and result")
            if row["category"] not in categories:
                raise ValueError(f"{path}: row {row['row']} has the category {row['category']!r}; "
                                 f"there are {', '.join(sorted(categories))}")
            if row["row"] in seen:
                raise ValueError(f"{path}: row {row['row']} stands there twice")
            seen.add(row["row"])
        return cls(path, about, given["total"], given["pages"], rows)

    def write(self):
        """Write one line for each row, so that people can read the file and programs can compare it."""
        head = {**self.about, "total": self.total, "pages": self.pages}
        lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}," for key, value in head.items()]
        rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in self.rows)
        writing.write(self.path, "{\n" + "\n".join(lines) + '\n "rows": [\n' + rows + "\n ]\n}\n", overwrite=True)

    def missing(self):
        """{category: the number of rows that it still lacks}; full ones are left out."""
        have = Counter(row["category"] for row in self.rows)
        return {name: count - have[name] for name, count in self.about["composition"].items() if have[name] < count}

    def kept(self):
        """The rows of the set: the first ones of each category, up to its number in the composition."""
        left, kept = dict(self.about["composition"]), []
        for row in self.rows:
            if left.get(row["category"]):
                left[row["category"]] -= 1
                kept.append(row)
        return kept

    def name(self, row):
        return f"{re.sub(r'[^A-Za-z0-9]', '-', self.about['split'])}-{row['row']:06d}"


def settings(args):
    """The options that decide the choice of rows, with defaults for those that are not given."""
    rules = RULES
    if args.rules:
        rules = _json(args.rules)
        check_rules(rules, args.rules)
    composition = args.composition or COMPOSITION
    if lost := sorted(composition.keys() - rules.keys()):
        raise ValueError(f"no rule says what a {lost[0]} is; add it to a file for --rules (there are {', '.join(rules)})")
    return {"dataset": args.dataset or DATASET, "config": args.config or "default", "split": args.split or "train",
            "seed": args.seed or 0, "composition": composition, "rules": rules}


def check_rules(rules, path):
    def words(value):
        return isinstance(value, list) and all(isinstance(word, str) and word.strip() for word in value)
    for name, rule in rules.items() if isinstance(rules, dict) else [("", None)]:
        if not isinstance(rule, dict) or rule.keys() - {"any", "none"} or not words(rule.get("any")) or not rule["any"] \
                or not words(rule.get("none", [])) or name == REJECT:
            raise ValueError(f'{path}: the rules are an object like {{"portrait": {{"any": ["woman"], "none": ["statue"]}}}}')


def check_composition(composition, path):
    if not isinstance(composition, dict) or not composition or not all(
            type(count) is int and count > 0 for count in composition.values()) or REJECT in composition:
        raise ValueError(f'{path}: the composition is an object like {{"portrait": 35, "landscape": 35}}')


def category(caption, rules):
    """(category, the word that decided) of a caption by the first rule that fits, or (None, None)."""
    def has(word):
        return re.search(rf"\b{re.escape(word)}\b", caption, re.I)
    for name, rule in rules.items():
        word = next(filter(has, rule["any"]), None)
        if word and not any(map(has, rule.get("none", []))):
            return name, word
    return None, None


def choose(chosen, server, args):
    """Read pages of rows in the seed's order until every category is full; selection.json is written after each page."""
    if not chosen.missing():
        return
    total = server.total()
    if chosen.total not in (None, total):
        raise ValueError(f"{chosen.path} was made when the dataset had {chosen.total} rows, and now it has {total}: their "
                         "numbers may mean other rows; choose another folder")
    chosen.total = total
    order = list(range(0, total, PAGE))
    random.Random(chosen.about["seed"]).shuffle(order)
    wanted = sum(chosen.missing().values())
    with cli.progress(total=wanted, what="choosing", unit="row", quiet=args.quiet) as bar:
        while missing := chosen.missing():
            if chosen.pages >= len(order):
                lacking = ", ".join(f"{count} {name}" for name, count in missing.items())
                raise ValueError(f"all {total} rows were looked at, and {lacking} are lacking; widen the rules or ask for less")
            rows = server.rows(order[chosen.pages], PAGE)
            chosen.rows += pick(rows, chosen, missing)
            chosen.pages += 1
            chosen.write()
            bar.update(sum(missing.values()) - sum(chosen.missing().values()))


def pick(rows, chosen, missing):
    """The rows to take from a page: a few of each category that lacks some, no caption and no prompt twice."""
    captions = {row["caption"].lower() for row in chosen.rows}
    prompts = {row["prompt"].lower() for row in chosen.rows}
    left, found = {name: min(count, PER_PAGE) for name, count in missing.items()}, []
    for number, row in rows:
        texts = [row[column].strip() if isinstance(row[column], str) else "" for column in COLUMNS]
        if not all(texts) or any(re.search("[\0-\x1f\ud800-\udfff]", text) or len(text) > 300 for text in texts):
            continue
        caption, prompt, result = texts
        name, word = category(caption, chosen.about["rules"])
        if not left.get(name) or caption.lower() in captions or prompt.lower() in prompts:
            continue
        left[name] -= 1
        captions.add(caption.lower())
        prompts.add(prompt.lower())
        found.append({"row": number, "category": name, "matched": word, "caption": caption, "prompt": prompt, "result": result})
    return found


def fetch(row, name, pictures, server):
    """Fetch the picture of a row into the folder and return its path; raises ValueError where row or picture has changed."""
    (_, found), = server.rows(row["row"], 1)
    if [str(found[column]).strip() for column in COLUMNS] != [row["caption"], row["prompt"], row["result"]]:
        raise ValueError(f"row {row['row']} now has other texts than when it was chosen; set its category to {REJECT!r}")
    source = found["original_image"].get("src") if isinstance(found["original_image"], dict) else None
    if not isinstance(source, str) or not source.startswith(("http://", "https://")):
        raise ValueError(f"row {row['row']} comes without an address of its picture; try later, or set its category to "
                         f"{REJECT!r}")
    content = server.get(source, f"the picture of row {row['row']}")
    suffix = next((suffix for start, suffix in SUFFIXES.items() if content.startswith(start)), None)
    if suffix is None:
        raise ValueError(f"row {row['row']}: what came is no JPEG, PNG or WebP; try later, or set its category to {REJECT!r}")
    sha256 = hashlib.sha256(content).hexdigest()
    if row.get("sha256", sha256) != sha256:
        raise ValueError(f"row {row['row']}: the picture is not the one of selection.json (its sha256 differs); delete the "
                         "sha256 there to take it, or reject the row")
    path = pictures / f"{name}{suffix}"
    writing.write(path, content, overwrite=True)
    try:
        images.read(path)
    except ValueError:
        path.unlink()
        raise
    return path


class Server:
    """The rows endpoint of the hub's dataset viewer, one request at a time. Only numbers of rows are sent, and no token."""

    def __init__(self, base, about, notify, sleep=time.sleep):
        self.base, self.about, self.notify, self.sleep = base.rstrip("/"), about, notify, sleep
        self.session, self.lost = requests.Session(), 0
        self.session.auth = lambda prepared: prepared        # without this a .netrc entry would be sent
        self.session.headers["Accept-Encoding"] = "identity"

    def total(self):
        return self._page(0, 1)["num_rows_total"]

    def rows(self, offset, length):
        """[(number, {column: cell})] of `length` rows from `offset` on."""
        page, found = self._page(offset, length), []
        for number, row in enumerate(page["rows"], offset):
            cells = row.get("row") if isinstance(row, dict) else None
            if not isinstance(cells, dict) or row.get("row_idx") != number:
                raise ValueError(f"{self.base} answered with other rows than asked for (from {offset} on)")
            if missing := [column for column in (*COLUMNS, "original_image") if column not in cells]:
                raise ValueError(f"{self.about['dataset']} has no column {missing[0]}; this tool reads datasets made like "
                                 f"{DATASET}")
            found.append((number, cells))
        if not found:
            raise ValueError(f"{self.base} gave no rows from {offset} on")
        return found

    def _page(self, offset, length):
        where = {key: self.about[key] for key in ("dataset", "config", "split")}
        content = self.get(f"{self.base}/rows", f"rows from {offset} on", {**where, "offset": offset, "length": length})
        with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError):
            page = json.loads(content)
            if isinstance(page["rows"], list) and type(page["num_rows_total"]) is int and page["num_rows_total"] > 0:
                return page
        raise ValueError(f"{self.base} answered with something else than rows: {_shown(content)}")

    def get(self, url, what, params=None):
        """The bytes at an address. Faults that may pass are retried. Raises ValueError, LostRequest, and Unavailable where the
        server seems to be down."""
        for attempt in range(TRIES):
            wait, why = 2.0 ** attempt, ""
            try:
                with self.session.get(url, params=params, timeout=(10, 60), stream=True) as response:
                    content = _body(response)
                if response.status_code == 200:
                    self.lost = self.lost if params else 0   # rows may arrive while pictures fail
                    return content
                why = f"the server answered {response.status_code}"
                if response.status_code == 429:
                    why = "the server's limit of requests is reached"
                elif response.status_code < 500:
                    raise ValueError(f"{what}: {why} ({_shown(content)})")
                wait = max(wait, _seconds(response.headers.get("Retry-After")))
            except requests.Timeout:
                why = "no answer in time"
            except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError,
                    requests.exceptions.ContentDecodingError):
                why = "the connection failed"
            except requests.RequestException as error:       # not a valid address
                raise ValueError(f"{what}: {type(error).__name__} at {url[:80]}") from None
            if attempt + 1 < TRIES:
                self.notify(f"{what}: {why}; trying again in {min(wait, LONGEST):.0f} s")
                self.sleep(min(wait, LONGEST))
        self.lost += 1
        if self.lost >= LOST or params is not None:          # nothing can be done without rows
            raise Unavailable(f"{what}: {why}, {TRIES} times; run the same command again later, it goes on from here")
        raise LostRequest(f"{what}: {why}, {TRIES} times")


class LostRequest(OSError):
    """One address did not answer; others may."""


def _body(response):
    content, until = bytearray(), time.monotonic() + DEADLINE
    for chunk in response.iter_content(65536):
        content += chunk
        if len(content) > CAP:
            raise ValueError(f"{response.url[:80]}: more than {CAP >> 20} MiB came; that is no picture of this dataset")
        if time.monotonic() > until:
            raise requests.Timeout
    announced = response.headers.get("Content-Length", "")
    plain = "Content-Encoding" not in response.headers
    if plain and announced.isdecimal() and len(content) < int(announced):            # older urllib3 does not raise
        raise requests.ConnectionError
    return bytes(content)


def _seconds(text):
    return float(text) if re.fullmatch(r"\d{1,6}(\.\d+)?", text or "") else 0.0


def _shown(content):
    """The beginning of an answer, for a sentence; for a JSON error its message."""
    text = content[:2000].decode("utf-8", "replace")
    with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError):
        text = json.loads(text)["error"]
    return " ".join("".join(c for c in str(text) if c.isprintable() or c.isspace()).split())[:120] or "nothing"


# ------------------------------------------------------------------------------------------------------------ unseen prompts

def read_unseen(path):
    """{id or file name: ([prompts], [captions])} of a JSON or CSV file; raises ValueError."""
    told = {}
    if path.suffix.lower() == ".csv":
        for _, row in _csv(path, ("id", "prompt"), ("caption",)):
            told.setdefault(row["id"], []).append({key: row[key] for key in ("prompt", "caption") if row.get(key)})
    else:
        told = _json(path)
    found = {}
    for name, values in told.items():
        values = [{"prompt": value} if isinstance(value, str) else value for value in values] \
            if isinstance(values, list) else [None]
        if not all(isinstance(v, dict) and "prompt" in v and not v.keys() - {"prompt", "caption"} for v in values):
            raise ValueError(f'{path}: {name} has no list of texts or of {{"prompt": ..., "caption": ...}}')
        captions = [value["caption"] for value in values if "caption" in value]
        if len(captions) not in (0, len(values)):
            raise ValueError(f"{path}: {name} has captions for some of its prompts; give one for each, or none")
        found[name] = [value["prompt"] for value in values], captions
    return found


def with_unseen(items, path):
    """The items with the unseen prompts of a file."""
    told, used, found = read_unseen(path), set(), []
    for item in items:
        name = next((name for name in (item.id, Path(item.image).name, item.origin.get("file")) if name in told), None)
        if name is not None:
            used.add(name)
            prompts, captions = told[name]
            item = _checked(replace(item, unseen_prompts=tuple(prompts), unseen_captions=tuple(captions)), path)
        found.append(item)
    if lost := sorted(told.keys() - used):
        raise ValueError(f"{path}: the set has no picture {lost[0]}")
    return found


def _checked(item, path):
    try:
        return manifest.Item.from_json(item.to_json(), item.path.parent) and item
    except ValueError as error:
        raise ValueError(f"{path}: {item.id} {error}") from None


PROMPT = Path(__file__).with_name("prompts") / "unseen-1.txt"
COUNT, LARGEST = 5, 1024                                  # prompts for a picture; the long side of a picture that is sent
SCHEMA = {"type": "object", "properties": {
    "caption_0": {"type": "string", "description": "the picture after the given instruction"},
    **{f"{kind}_{i}": {"type": "string", "description": f"{kind} {i}"}
       for i in range(1, COUNT + 1) for kind in ("instruction", "caption")}}}
SCHEMA["required"] = list(SCHEMA["properties"])


def ask_for_unseen(items, args):
    """Ask a model for five unseen prompts for each item; return (items, the sentences of those that got none)."""
    from sifm_min.files.ledger import Ledger
    from sifm_min.gemini import Budget, Client, Request, Spec, ask_many

    spec = Spec.from_json(_json(Path(args.gemini)) if args.gemini.endswith(".json") else
                          {"provider": "gemini", "model": args.gemini})
    budget = Budget(max_cost=args.max_cost, max_calls=args.max_calls)
    client = Client(spec, budget=budget, notify=lambda text: cli.say(text, quiet=args.quiet))
    _, rules, user = re.split(r"^\[\w+\]\n", PROMPT.read_text(encoding="utf-8"), flags=re.M)

    def request(item):
        image = item.picture().image
        image.thumbnail((LARGEST, LARGEST))
        return Request(rules.strip(), [user.strip().replace("<instruction>", item.prompt), image], SCHEMA)

    def key(item):
        shape = {"v": 1, "system": rules, "user": user, "schema": SCHEMA, "prompt": item.prompt, "sha256": item.sha256,
                 "fields": client.fields(Request("", [""], SCHEMA))}
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()

    failures, keys = [], {item.id: key(item) for item in items}
    with Ledger(args.output / "unseen.jsonl") as kept:
        known = {row["key"]: row for row in kept.rows if "key" in row and row["status"] == "ok"}
        budget.journal = kept
        calls, _ = budget.resume([row.get("answer", row) for row in kept.rows])
        if calls:
            cli.say(f"{calls} calls were in flight when the last run ended: they count in the limits, and their questions are "
                    "asked again", quiet=args.quiet)
        open_items = list({keys[item.id]: item for item in items if keys[item.id] not in known}.values())
        cli.say(f"asking {spec.model} for the unseen prompts of {len(open_items)} pictures"
                + (f" (at most {sum(client.estimate(request(item))[1] for item in open_items):.2f} USD if each is asked once)"
                   if spec.price and open_items else ""), quiet=args.quiet)
        with cli.progress(total=len(open_items), what="asking", unit="picture", quiet=args.quiet) as bar:
            for _, index, answer in ask_many([(client, map(request, open_items))], concurrency=4):
                item, record = open_items[index], {"key": keys[open_items[index].id], "id": open_items[index].id}
                prompts = [answer.data[f"instruction_{i}"].strip() for i in range(1, COUNT + 1)] if answer.ok else []
                captions = [answer.data[f"caption_{i}"].strip() for i in range(COUNT + 1)] if answer.ok else []
                status, why = answer.status, answer.message
                if answer.ok and (len({text.lower() for text in (*prompts, item.prompt)}) <= COUNT
                                  or not all((*prompts, *captions))):
                    status, why = "repeated", "the model gave an instruction twice, or none"
                row = {**record, "status": status, "prompts": prompts, "captions": captions, "answer": answer.record()}
                kept.append(row)
                if status == "ok":
                    known[row["key"]] = row
                else:
                    failures.append(f"{item.id}: {why or status}")
                bar.update()
    if client.stopped:
        failures.append(str(client.stopped))
    found = []
    for item in items:
        if row := known.get(keys[item.id]):
            item = _checked(replace(item, unseen_prompts=tuple(row["prompts"]), unseen_captions=tuple(row["captions"][1:]),
                                    caption=item.caption or row["captions"][0]), kept.path)
        found.append(item)
    return found, failures


# ------------------------------------------------------------------------------------------------------------- small helpers

def finish(items, expected, args):
    """Add the unseen prompts and write the manifest; the exit code."""
    failures = []
    if getattr(args, "unseen", None):
        items = with_unseen(items, args.unseen)
    elif getattr(args, "gemini", None):
        items, failures = ask_for_unseen(items, args)
    for line in failures:
        cli.fail(line)
    path = args.output / manifest.FILE_NAME
    whole = len(items) == expected and not failures
    if not items or not (whole or args.partial):
        return cli.fail(f"{path} was not written, because something is lacking; run the same command again, or add --partial")
    if bare := sum(not item.unseen_prompts for item in items):
        cli.say(f"{bare} of {len(items)} pictures have no unseen prompts; --unseen and --gemini add them", quiet=args.quiet)
    if not path.exists() or path.read_bytes().decode("utf-8", "replace") != manifest.text(items, path):
        manifest.write_manifest(path, items, overwrite=args.overwrite)
    cli.out(str(path))
    return cli.OK if whole else cli.SOME_FAILED


def place(path, content, args):
    """Write a file unless it is there already, byte for byte."""
    if not (path.is_file() and path.read_bytes() == content):
        writing.write(path, content, overwrite=args.overwrite)


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _json(path):
    try:
        given = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds no JSON object")
    return given


def _csv(path, required, optional):
    """[(line, {column: text})] of a CSV file with a head."""
    reader, rows = csv.DictReader(io.StringIO(_text(path)), restkey="", strict=True), []
    head = [name.strip() for name in reader.fieldnames or []]
    if lost := [name for name in required if name not in head]:
        raise ValueError(f"{path} has no column {lost[0]}; its first line names the columns: "
                         f"{', '.join((*required, *optional))}")
    if extra := [name for name in head if name not in (*required, *optional)]:
        raise ValueError(f"{path} has a column {extra[0]!r}, which means nothing here")
    reader.fieldnames = head
    try:
        for row in reader:
            row = {key: (value or "").strip() if isinstance(value, str | None) else None for key, value in row.items()}
            if "" in row or any(not row[name] for name in required):
                why = "too many columns" if "" in row else "an empty column"
                raise ValueError(f"{path}, line {reader.line_num}: has {why}; a text with a comma stands in quotes")
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    return rows


def _text(path):
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def composition(text):
    """portrait=35,landscape=35,artwork=30"""
    found = dict(re.findall(r"(?:^|,)\s*([\w-]+)=([1-9]\d{0,4})(?=,|$)", text))
    if not found or len(found) != text.count(",") + 1 or REJECT in found:
        raise argparse.ArgumentTypeError(f"{text!r} is no composition; write it like portrait=35,landscape=35,artwork=30")
    return {name: int(count) for name, count in found.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add = shared.add_argument
    add("-o", "--output", required=True, type=cli.path, metavar="DIR", help="the set's folder (created if absent)")
    add("--partial", action="store_true", help="write the manifest although some pictures or prompts are lacking")
    for name in ("overwrite", "quiet", "debug"):
        add(f"--{name}", **cli.SHARED[name])
    more = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    source = more.add_mutually_exclusive_group()
    source.add_argument("--unseen", type=cli.path, metavar="FILE", help="JSON or CSV with unseen prompts")
    source.add_argument("--gemini", metavar="MODEL-OR-FILE", help="have a model write them: SENDS EVERY PICTURE there")
    more.add_argument("--max-cost", type=cli.positive, metavar="USD",
                      help="of --gemini, over all runs into the folder; needs a price in its file")
    more.add_argument("--max-calls", type=cli.count, help="of --gemini, over all runs into the folder")

    command = commands.add_parser("world", parents=[shared], allow_abbrev=False, help="instructions with exact results")
    command.add_argument("-n", type=cli.count, default=100, help="how many pictures (default: 100)")
    command.add_argument("--seed", type=cli.seed, default=0)
    command.add_argument("--photos", type=cli.path, metavar="FOLDER",
                         help="photographs; LICENSES.jsonl there may say which (default: those that ship)")
    command.add_argument("--list", type=cli.path, metavar="FILE",
                         help="the photographs of --photos to take, such as tools/evaluation.jsonl")
    command.add_argument("--wordings", choices=("held-out", "train"), default="held-out",
                         help="phrases that the miniatures were never trained on, or those that they were")
    command.set_defaults(run=world)

    command = commands.add_parser("folder", parents=[shared, more], allow_abbrev=False, help="your own pictures")
    command.add_argument("pictures", type=cli.path, metavar="FOLDER")
    prompts = command.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", type=cli.prompt, help="the same for all pictures")
    prompts.add_argument("--prompts", type=cli.path, metavar="FILE", help="JSON or CSV with a prompt for each picture")
    command.add_argument("--category", type=cli.prompt, default="picture", help="where the file says none (default: picture)")
    command.set_defaults(run=folder)

    command = commands.add_parser("dataset", parents=[shared, more], allow_abbrev=False, help="a set like the paper's")
    command.add_argument("--review", action="store_true", help="stop when the rows are chosen")
    command.add_argument("--composition", type=composition, metavar="A=N,B=N",
                         help="default: portrait=35,landscape=35,artwork=30")
    command.add_argument("--rules", type=cli.path, metavar="FILE",
                         help="JSON with the words that make a category (default: those that selection.json shows)")
    command.add_argument("--seed", type=cli.seed, help="of the order in which rows are looked at (default: 0)")
    command.add_argument("--dataset", help=f"another dataset with the same columns (default: {DATASET})")
    command.add_argument("--config", help="of the dataset (default: default)")
    command.add_argument("--split", help="of the dataset (default: train)")
    command.add_argument("--server", default=SERVER, metavar="URL", help="of the rows endpoint (default: %(default)s)")
    command.set_defaults(run=dataset)
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:
        return stop.code or cli.OK

    def body():
        writing.make_folder(args.output)
        writing.make_folder(args.output / "images")
        return args.run(args)

    return cli.guard(body, debug=lambda: args.debug)


if __name__ == "__main__":
    sys.exit(main())
