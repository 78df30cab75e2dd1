"""The tokenizer against transformers' CLIPTokenizer on the published vocabulary and on small ones, and against the
recorded ids; and tools/train_bpe.py, which makes small vocabularies."""

import importlib.util
import json
import random
import shutil
import sys
import time
from pathlib import Path

import pytest
from random_texts import assigned, random_texts

from sifm_min.models.byte_pairs import byte_symbols
from sifm_min.models.clip_tokenizer import END, START, CLIPTokenizer

transformers = pytest.importorskip("transformers", reason="the oracle, transformers, is not installed")

source = Path(__file__).resolve().parents[1] / "tools" / "train_bpe.py"
spec = importlib.util.spec_from_file_location("train_bpe", source)
train_bpe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_bpe)

PUBLISHED = {"sd15_tokenizer": "clip_l_77_pad_eos", "sd3_tokenizer": "clip_l_77_pad_eos",
             "sd3_tokenizer_2": "clip_g_sd3_77_pad_0"}

HARD = [
    "", " ", "\n\t \r\n", "a", "A photo of a cat", "turn him into a cyborg, 8k!!!", "!", "!!", "! !", "!a!b!",
    "wow!!!wow",
    # contractions, and what only looks like one
    "it's they're I've I'm we'll she'd don't", "IT'S THEY'RE I'VE I'M WE'LL SHE'D DON'T", "'s 't 're 've 'm 'll 'd",
    "''s", "a''s", "'", "''", "x'", "'sx", "'lls", "'l l", "o'clock 'em 'tis", "!'s", "it’s", "'\u017f", "'S'T'RE",
    "rock 'n' roll", "5's", "'5", "é's", "'\u0301s", "'s\u0301", "1'm2'd",
    # digits and numbers of many scripts: one word each
    "2024", "a1b22c333", "١٢٣", "१२", "½²\u2167\u2460", "\U0001d7d8\U0001d7d9", "1\u0301 2\ufe0f\u20e3",
    "3.14 1,000 1/2 10%", "〇一〡", "௰௱",
    # accents, composed and not; marks are symbols
    "café naïve Ångström ÉCOLE", "cafe\u0301", "e\u0301e\u0301e", "A\u030angstro\u0308m", "\u212b \u2126 \u212a",
    "a\u0301\u0327 a\u0327\u0301", "\u0301", "\u0301\u0301a", "a\u0300\u0301\u0302\u0303b", "q\u0307\u0323", "ẛ\u0323",
    "\u0344",
    "ড\u09bc \u0958", "\ufb1d \ufb4f", "\u2adc", "\u0f73\u0f75",
    # lower-casing
    "İstanbul I\u0307 ı", "ß ẞ STRASSE", "ΣΣ ΑΣ ΑΣΒ Σ", "ᾈ ῼ ᾚ", "\u01c4\u01c5\u01c6 \u01c7",
    "ႠᲐა", "Ꭰꭰᏸ", "𐐀𐐨", "\u216b\u24b6\u24d0", "\u0345ᾼ",
    # scripts
    "日本語のテキスト 東京", "한국어 \u1112\u1161\u11ab \u1112\u1161 \u11ab", "\uff76\uff9e カ\u3099 か\u3099",
    "一。二、\uff01\uff1f",
    "Привет МИР й и\u0306", "\u0645\u0631\u062d\u0628\u0627 \u0628\u0640\u0640\u0628 ١٫٢",
    "\u05e9\u05dc\u05d5\u05dd \u05e9\u05c1\u05b8", "नमस\u094dत\u0947", "ไทย ก\u0e33",
    "வணக\u0bcdகம\u0bcd", "မ\u103cန\u103aမ\u102c", "𠀀𪛟 \uf900豈", "\u2f00⺀",
    # right to left, with its marks and overrides
    "abc \u05d0\u05d1\u05d2 123 \u202etxt.exe\u202c \u200fx\u200e \u2067y\u2069 \u061c",
    # emoji: skin tones, joiners, flags, keycaps, selectors, tags
    "😀👍🏽 ❤\ufe0f ❤ 👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈", "🇩🇪🇫🇷", "#\ufe0f\u20e3 1\ufe0f\u20e3",
    "🏴\U000e0067\U000e0062\U000e007f", "😀a😀1", "☺\ufe0e",
    # ligatures, full width, compatibility characters: NFC keeps them
    "\ufb01ne \ufb00 \ufb03", "\uff21\uff22\uff23\uff41\uff11\uff12\uff1a", "\u2122 \u2103 \u2026 ª º µ \u02b0",
    "\u33a1\u3392 \u3231 \ufdfa", "\U0001d400\U0001d41a\U0001d7ce",
    # white space that is, and characters that only look like it
    "a\xa0b\u3000c\u2009d\u205fe\u1680f\u202fg", "a\x85b\u2028c\u2029d", "a\x0bb\x0cc", "a\x1cb\x1dc\x1ed\x1fe", "\x1c",
    " \x1f ",
    "zero\u200bwidth\u200cnon\u200djoiner\u2060word\ufeffbom", "\ufeffstart", "a\u180eb", "\xa0's", "soft\u00adhyphen",
    # controls, private use, unassigned, noncharacters
    "\x00", "a\x00b", "\x07\x1b[31m\x7f", "\x80\x9f", "\ue000\uf8ff\U000f0000\U0010fffd", "\uffff\ufdd0\U0001fffe",
    "￼�", "\u0378",
    # the special tokens, inside text, in capitals, damaged, doubled
    "<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "<|StartOfText|>", "a<|endoftext|>b", "a <|startoftext|> b",
    "!<|endoftext|>!", "<|ENDOFTEXT|>!", "!<|ENDOFTEXT|>!", "<|ENDOFTEXT|><|endoftext|>", "<|STARTOFTEXT|>?",
    "<|EndOfText|>'s", "<|endoftext|>'s", "<|endoftext|", "<|endoftext |>", "<<|endoftext|>>", "<|endoftext|>\u0301",
    "e<|endoftext|>\u0301", "<|startoftext|><|endoftext|><|endoftext|>", "<|\u212andoftext|>", "<|endoftext\u0301|>",
    "<|\uff45ndoftext|>",
    "</s> <pad> [CLS] </w> a</w>", "Ġ Ċ Ā",
    # markup and programs
    "price: $12.50 & 100% <b>bold</b> &amp; &lt;x&gt; &#39;", "a.b.c:d;e/f\\g|h`i~j^k",
    "under_score __init__ snake_case", "# ## ### ######## #1 #tag ##tag #\ufe0f",
    "https://example.org/?q=a%20b#c", "“smart” ‘single’ — dash –", "```x```", "-----", "....", "a-b--c---d",
    # long words and long prompts
    "x" * 300, "ab" * 200, "!" * 300, "é" * 150, "日" * 120, "1" * 120, " ".join(["very long prompt"] * 60),
    "a " * 74 + "b", "a " * 75 + "b", "a " * 76 + "b", "supercalifragilisticexpialidocious" * 9,
]


def published(folder, name, shared):
    """A `tokenizer` folder as it lies on the Hub: vocabulary and merges beside the small files of one repository."""
    source = shared / "data" / "tokenizers"
    folder.mkdir()
    for file in (source / "clip" / "vocab.json", source / "clip" / "merges.txt", *(source / name).iterdir()):
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, shared):
    """For each published tokenizer: ours and transformers', read from the same folder; and that folder."""
    where = tmp_path_factory.mktemp("published")
    folders = {name: published(where / name, name, shared) for name in PUBLISHED}
    return {name: (CLIPTokenizer.from_folder(folder), transformers.CLIPTokenizer.from_pretrained(folder), folder)
            for name, folder in folders.items()}


@pytest.fixture(params=PUBLISHED)
def pair(request, pairs):
    return pairs[request.param]


@pytest.fixture
def first(pairs):
    """One of them, for what depends on the code and not on the files."""
    return pairs["sd15_tokenizer"]


@pytest.fixture(scope="module")
def corpus():
    """Text to train a small vocabulary on: prompts, and other texts that leave merges in many scripts."""
    things, colours = ("sky", "dress", "old man's hat"), ("red", "blue", "greenish", "a little darker")
    return [*HARD, *(f"{do} the {thing} {colour}" for do in ("make", "turn") for thing in things for colour in colours)]


@pytest.fixture(scope="module")
def small(tmp_path_factory, corpus):
    """A folder with a vocabulary of 700 entries and rows of 24, as the miniature's."""
    folder = tmp_path_factory.mktemp("small") / "tokenizer"
    train_bpe.write(folder, *train_bpe.train_bpe(corpus, 700), 24)
    return folder


TRICKY = [
    START, END, "<|ENDOFTEXT|>", "<|StartOfText|>", *"'!?.<|>-_ aAbs1", "'s", "'LL", "''", "\u0301", "\u0327",
    "\u0663", "½", "Σ", "İ", "ẞ", "ﬁ", "\u200b", "\u200d", "\xa0", "\x1c", "\x85", "\x00", "👩", "\U0001f3fd",
    "\ufe0f", "日", "한", "\u1112", "\u1161", "\u11ab", "\u05d0", "e\u0301", "\u212b",
]


def assert_equal_ids(ours, theirs, texts):
    """The bare ids and the padded rows, for every text; a difference is shown with the text that caused it."""
    bare = theirs(texts, add_special_tokens=False, verbose=False).input_ids
    rows = theirs(texts, padding="max_length", max_length=ours.length, truncation=True).input_ids
    wrong = [(text, ours.encode(text), ids) for text, ids in zip(texts, bare, strict=True) if ours.encode(text) != ids]
    assert not wrong, f"{len(wrong)} of {len(texts)}, first {wrong[0]!r}"
    assert ours(texts) == rows


# ------------------------------------------------------------------------------------------------- the published one


def test_bytes_have_the_symbols_of_the_published_vocabulary(shared):
    vocab = json.loads((shared / "data" / "tokenizers" / "clip" / "vocab.json").read_text(encoding="utf-8"))
    symbols = list(byte_symbols().values())
    assert sorted(byte_symbols()) == list(range(256))
    assert sorted(vocab, key=vocab.get)[:512] == [*symbols, *(symbol + "</w>" for symbol in symbols)]


@pytest.mark.slow
def test_recorded_ids(pair, shared):
    ours, _, folder = pair
    golden = json.loads((shared / "data" / "tokenizers" / "golden.json").read_text(encoding="utf-8"))
    assert ours(golden["prompts"]) == golden[PUBLISHED[folder.name]]


def test_ids_of_hard_texts_equal_transformers(pair):
    ours, theirs, _ = pair
    assert_equal_ids(ours, theirs, HARD)


def test_ids_of_random_texts_equal_transformers(pair):
    ours, theirs, folder = pair
    assert_equal_ids(ours, theirs, random_texts(1200, folder.name, TRICKY))


@pytest.mark.slow
def test_every_character_is_classified_as_by_transformers(first):
    """Each assigned character of the small blocks, and a sample of the large ones, doubled between letters."""
    ours, theirs, _ = first
    points = [*range(0x3400), *range(0xa000, 0xac00), *range(0xf900, 0x20000, 5), *range(0x3400, 0x110000, 61)]
    characters = [c for c in map(chr, points) if assigned(c)]
    assert len(characters) > 15_000
    texts = [" ".join(f"a{c}{c}a" for c in characters[i:i + 32]) for i in range(0, len(characters), 32)]
    expected = theirs(texts, add_special_tokens=False, verbose=False).input_ids
    assert [text for text, ids in zip(texts, expected, strict=True) if ours.encode(text) != ids] == []


@pytest.mark.slow
def test_tokenizer_json_alone(pair, tmp_path):
    """As transformers 5 writes it: no vocab.json and no merges.txt beside it."""
    ours, theirs, _ = pair
    theirs.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    again = CLIPTokenizer.from_folder(tmp_path)
    assert (again.length, again.pad) == (ours.length, ours.pad) == (77, theirs.pad_token_id)
    assert_equal_ids(again, theirs, HARD)


def test_a_row_is_start_text_end_padding(pair):
    ours, _, folder = pair
    pad = 0 if folder.name == "sd3_tokenizer_2" else 49407
    empty, cat, long = ours(["", "a cat", "a " * 500])
    assert empty == [49406, 49407] + [pad] * 75
    assert cat == [49406, 320, 2368, 49407] + [pad] * 73
    assert long == [49406] + [320] * 75 + [49407]
    assert ours([]) == []


def test_bang_is_the_padding_of_tokenizer_2(pair):
    ours, _, folder = pair
    assert ours.encode("detailed!!!")[1:] == ([0, 0, 0] if folder.name == "sd3_tokenizer_2" else [995])


@pytest.mark.slow
@pytest.mark.parametrize("letters", ["x", "!", "\u00e9\u00e8", "abcdefgh"])
def test_a_word_without_end_takes_seconds_at_most(first, letters):
    """The cost grows like n log n: a merge that searches the whole word each time takes minutes here."""
    ours, theirs, _ = first
    word = "".join(random.Random(0).choices(letters, k=100_000))
    began = time.process_time()
    ids = ours.encode(word)
    assert time.process_time() - began < 10
    assert ids == theirs(word, add_special_tokens=False, verbose=False).input_ids


def test_the_second_time_is_the_same(first):
    ours, _, folder = first
    found = [ours.encode(text) for text in HARD]
    for ids in found:
        ids.clear()                                            # what a caller does to its list touches no later answer
    assert ours(HARD) == CLIPTokenizer.from_folder(folder)(HARD)


def test_prompts_that_are_no_list_of_texts_are_refused(first):
    ours, _, _ = first
    for bad in ("a\ud800b", "\udcff", "ok \udfff"):
        with pytest.raises(ValueError, match="lone surrogate U\\+D"):
            ours([bad])
    with pytest.raises(TypeError, match="a list of prompts"):
        ours("a cat")


# ------------------------------------------------------------------------------------------------ small vocabularies


@pytest.mark.parametrize("size", [514, 700, 10**6])
def test_trained_vocabulary_reads_as_in_transformers(size, corpus, tmp_path):
    vocab, merges = train_bpe.train_bpe(corpus, size)
    train_bpe.write(tmp_path / "ours", vocab, merges, 24)
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == [
        "merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"]
    ours = CLIPTokenizer.from_folder(tmp_path / "ours")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "ours")
    assert (ours.length, ours.vocab) == (24, vocab) and len(theirs) == len(vocab)
    assert (ours.start, ours.end, ours.pad) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert_equal_ids(ours, theirs, HARD + random_texts(500, size, TRICKY))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_equal_ids(CLIPTokenizer.from_folder(tmp_path / "theirs"), theirs, HARD)


@pytest.mark.parametrize("todays", [True, False])
def test_merges_in_either_form(todays, small, tmp_path):
    """Today's tokenizer.json writes a merge as a pair; before tokenizers 0.20 it was one string."""
    theirs = transformers.CLIPTokenizer.from_pretrained(small)
    theirs.save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert all(type(merge) is list for merge in whole["model"]["merges"])
    if not todays:
        whole["model"]["merges"] = [" ".join(merge) for merge in whole["model"]["merges"]]
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    assert_equal_ids(CLIPTokenizer.from_folder(tmp_path), theirs, HARD)


def test_training_is_what_it_says(corpus):
    symbols = list(byte_symbols().values())
    vocab, merges = train_bpe.train_bpe(corpus, 700)
    assert list(vocab.values()) == list(range(700))
    assert list(vocab) == [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), START, END]
    assert len(set(merges)) == len(merges) == 700 - 514
    shuffled = random.Random(0).sample(corpus, len(corpus))
    assert train_bpe.train_bpe(iter(shuffled), 700) == (vocab, merges)
    assert train_bpe.train_bpe(["ab ab abc"], 10**6)[1] == [("a", "b</w>"), ("a", "b"), ("ab", "c</w>")]
    with pytest.raises(ValueError, match="514"):
        train_bpe.train_bpe(corpus, 513)


def test_a_full_training_gives_each_word_one_id(corpus, tmp_path):
    train_bpe.write(tmp_path, *train_bpe.train_bpe(corpus, 10**6), 24)
    assert len(CLIPTokenizer.from_folder(tmp_path).encode("make the old man's hat greenish")) == 6 + 1


def test_the_command_writes_a_folder(tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_text("make the sky red\nmake the sea blue\n", encoding="utf-8")
    arguments = [str(tmp_path / "texts.txt"), str(tmp_path / "made"), "--size", "530", "--length", "12"]
    monkeypatch.setattr(sys, "argv", ["train_bpe.py", *arguments])
    train_bpe.main()
    assert len(CLIPTokenizer.from_folder(tmp_path / "made")(["make the sea red"])[0]) == 12


def added(text, **flags):
    return {"content": text, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False} | flags


BOTH = {"512": added(START, special=True), "513": added(END, special=True)}
DECLARATIONS = {                                               # tokenizer_config.json, special_tokens_map.json, others
    "none": ({}, None, {}),
    "strings": ({"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}, None, {}),
    "another pad": ({"pad_token": "!"}, None, {}),
    "the map decides": ({"pad_token": "!"}, {"pad_token": "?"}, {}),
    "dicts": ({"bos_token": added(START, normalized=True, __type="AddedToken"),
               "eos_token": added(END, normalized=True, __type="AddedToken")}, None, {}),
    "dicts in the map": ({}, {"bos_token": added(START, normalized=True), "eos_token": added(END, normalized=True),
                              "unk_token": added(END, normalized=True), "pad_token": END}, {}),
    "folded end": ({}, {"eos_token": added(END, normalized=True), "unk_token": added(END, normalized=True),
                        "pad_token": added(END, normalized=True)}, {}),
    "a list": ({"added_tokens_decoder": BOTH | {"0": added("!", special=True)}, "pad_token": "!"}, None, {}),
    "a list, and a map that it overrules": ({"added_tokens_decoder": BOTH, "pad_token": END}, {"pad_token": "!"}, {}),
    "a list with a new token": ({"added_tokens_decoder": BOTH | {"514": added("<cat>", normalized=True)}}, None, {}),
    "one within another": ({"added_tokens_decoder": BOTH | {"514": added("cat"), "515": added("cats")}}, None, {}),
    "old list of additions": ({}, None, {"added_tokens.json": {"<Cat>": 514, "sky": 515}}),
    "additional": ({}, {"additional_special_tokens": ["?", "~"]}, {}),
    "no capital is special": ({"do_lower_case": True, "errors": "replace", "add_prefix_space": False}, {}, {}),
}


@pytest.mark.parametrize("name", DECLARATIONS)
@pytest.mark.parametrize("resaved", [False, True])
def test_special_tokens_are_found_as_by_transformers(name, resaved, tmp_path, corpus):
    """Many generations of files declare the special tokens in many ways."""
    config, roles, others = DECLARATIONS[name]
    train_bpe.write(tmp_path, *train_bpe.train_bpe(corpus, 514), 24)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 24} | config))
    (tmp_path / "special_tokens_map.json").unlink()
    for file, content in ({"special_tokens_map.json": roles} | others).items():
        if content is not None:
            (tmp_path / file).write_text(json.dumps(content))
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    if resaved:
        theirs.save_pretrained(tmp_path / "again")
    ours = CLIPTokenizer.from_folder(tmp_path / "again" if resaved else tmp_path)
    assert (ours.start, ours.end, ours.pad) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    texts = [text for text in HARD if "<" in text or "!" in text or "?" in text]
    assert_equal_ids(ours, theirs, [*texts, "a <cat>!", "<CAT> <Cat>x", "cats catsup CAT", "the sky, Sky", "a~b?~"])


def test_unknown_symbols_become_the_unknown_token(tmp_path):
    """The vocabularies of published checkpoints hold every byte; those of test fixtures often do not."""
    vocab = {token: i for i, token in enumerate(["l", "o", "w</w>", "lo", "low</w>", "<unk>", START, END])}
    train_bpe.write(tmp_path, vocab, [("l", "o"), ("lo", "w</w>")], 9)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"unk_token": "<unk>"}))
    ours, theirs = CLIPTokenizer.from_folder(tmp_path), transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert_equal_ids(ours, theirs, ["low", "lower newer", "", "l", "lol low", "\u00e9", "<unk> a"])


# ----------------------------------------------------------------------------------------------------- damaged files


def text(content):
    return lambda file: file.write_text(content, encoding="utf-8")


def changed(**changes):
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGE = [
    ("vocab.json", Path.unlink, "vocab.json is missing"),
    ("merges.txt", Path.unlink, "merges.txt is missing"),
    ("vocab.json", text("{"), "vocab.json is not valid JSON"),
    ("vocab.json", text("[1]"), "vocab.json holds no JSON object"),
    ("vocab.json", text('{"a": "1"}'), "vocab.json: the vocabulary must map each token to a whole number"),
    ("vocab.json", lambda file: file.write_bytes(b'{"\xff": 1}'), "vocab.json is not UTF-8"),
    ("vocab.json", changed(**{END: 1.5}), "vocab.json: the vocabulary must"),
    ("merges.txt", text("#version: 0.2\ni n\nq\n"), "merges.txt, line 3: expected two tokens, found 'q'"),
    ("merges.txt", text("i n\nqqq zzz\n"), "the merge 'qqq' 'zzz' needs the token 'qqq', which .*vocab.json lacks"),
    ("merges.txt", text("# q\n"), "needs the token '#q', which .*vocab.json lacks"),
    ("merges.txt", lambda file: file.write_bytes(b"\xff \xfe\n"), "merges.txt is not UTF-8"),
    ("tokenizer_config.json", text("nothing"), "tokenizer_config.json is not valid JSON"),
    ("tokenizer_config.json", changed(tokenizer_class="T5Tokenizer"),
     "tokenizer_config.json is of a 'T5Tokenizer', not of a CLIPTokenizer"),
    ("tokenizer_config.json", changed(model_max_length=10**30), "tokenizer_config.json gives model_max_length"),
    ("tokenizer_config.json", changed(model_max_length="77"), "model_max_length '77'.*max_position_embeddings"),
    ("tokenizer_config.json", changed(padding_side="left"), "padding_side to 'left'"),
    ("tokenizer_config.json", changed(truncation_side="left"), "truncation_side to 'left'"),
    ("tokenizer_config.json", changed(added_tokens_decoder={"x": added("y")}), "_config.json: .* 'y' has the id 'x'"),
    ("tokenizer_config.json", changed(added_tokens_decoder=["y"]), "tokenizer_config.json: added_tokens_decoder must"),
    ("tokenizer_config.json", changed(added_tokens_decoder={"7": "y", "8": {}}), "tokenizer_config.json declares"),
    ("special_tokens_map.json", text("{'a'}"), "special_tokens_map.json is not valid JSON"),
    ("special_tokens_map.json", changed(pad_token="<pad>"), "special_tokens_map.json: .*'<pad>' is not in the"),
    ("special_tokens_map.json", changed(pad_token={"text": "!"}), "special_tokens_map.json declares .* without a text"),
    ("special_tokens_map.json", changed(pad_token=added("!", lstrip=True)), "special_tokens_map.json sets lstrip"),
]


@pytest.mark.parametrize(("file", "damage", "message"), DAMAGE)
def test_damaged_files_are_named(file, damage, message, small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "tokenizer")
    damage(folder / file)
    with pytest.raises(ValueError, match=message):
        CLIPTokenizer.from_folder(folder)


@pytest.mark.parametrize(("change", "message"), [
    (lambda whole: whole.pop("model"), "not of a CLIP tokenizer"),
    (lambda whole: whole["model"].update(type="Unigram"), "not of a CLIP tokenizer"),
    (lambda whole: whole["model"].update(end_of_word_suffix=None), "not of a CLIP tokenizer"),
    (lambda whole: whole["model"].pop("vocab"), "no vocab"),
    (lambda whole: whole["model"].update(merges=[["a", "b", "c"]]), "a merge must be two tokens, found .'a', 'b', 'c'"),
    (lambda whole: whole["model"].update(merges=["ab"]), "a merge must be two tokens"),
    (lambda whole: whole["model"].update(merges=[["a", 1]]), "a merge must be two tokens"),
    (lambda whole: whole["model"].update(merges=[7]), "a merge must be two tokens"),
    (lambda whole: whole["model"].update(merges=[["qq", "zz"]]), "needs the token 'qq', which .*tokenizer.json lacks"),
    (lambda whole: whole.update(added_tokens=[{"content": "x"}]), "tokenizer.json: .* 'x' has the id None"),
    (lambda whole: whole.update(added_tokens=["x"]), "tokenizer.json: added_tokens must"),
    (lambda whole: whole.update(added_tokens=[{"id": 3, "content": ""}]), "tokenizer.json declares"),
])
def test_a_damaged_tokenizer_json_is_named(change, message, small, tmp_path):
    transformers.CLIPTokenizer.from_pretrained(small).save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    change(whole)
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        CLIPTokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_the_folder_of_another_tokenizer_is_refused(shared, tmp_path):
    with pytest.raises(ValueError, match="sd3_tokenizer_3.*T5Tokenizer"):
        CLIPTokenizer.from_folder(shared / "data" / "tokenizers" / "sd3_tokenizer_3")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        CLIPTokenizer.from_folder(tmp_path)


def test_only_the_vocabulary_is_needed(small, tmp_path):
    """Without the two small files, the usual special tokens and CLIP's 77 ids."""
    for file in ("vocab.json", "merges.txt"):
        shutil.copyfile(small / file, tmp_path / file)
    ours = CLIPTokenizer.from_folder(str(tmp_path))
    assert (ours.length, ours.start, ours.end, ours.pad) == (77, 698, 699, 699)
