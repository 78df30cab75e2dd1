"""T5's tokenizer against the Hugging Face tokenizer on the published files, on small vocabularies and on files that
transformers writes, and against the recorded ids.

tokenizer.json and spiece.model of SD3 hold the same pieces, scores and charsmap: the tests say so and then hold both to
one oracle. The one text that transformers 5 reads in another way than tokenizer.json asks for is U+0085: it is white
space to the pipeline that transformers 5 builds, and an unknown character to that of the file. Ours follows the file."""

import base64
import json
import random
import shutil
import struct
import time

import pytest
from random_texts import assigned, random_texts

from sifm_min.models.t5_tokenizer import SPACE, Charsmap, T5Tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="the oracle, tokenizers (with transformers), is not installed")

SENTINELS = ["<extra_id_0>", "<extra_id_7>", "<extra_id_99>"]
HARD = [
    "", " ", "   ", "\n\t \r\n", "a", " a", "  a", "a ", "a  ", "a b", "a  b", "a \t\n b", "turn him into a cyborg, 8k!!!",
    "A photo of a cat", "make the sky\nred\r\nand the sea\rblue", "  leading and   multiple \t spaces  ",
    # the character that stands for a space, in the prompt
    SPACE, SPACE * 2, f"a{SPACE}b", f"a {SPACE} b", f"{SPACE}a", f"a{SPACE}", f" {SPACE}a{SPACE} {SPACE}b",
    # accents, composed, not composed, doubled, in odd order; marks that bear no letter
    "café naïve Ångström ÉCOLE", "cafe\u0301", "e\u0301e\u0301e", "A\u030angstro\u0308m", "a\u0302\u0301", "a\u0301\u0302",
    "a\u0323\u0302", "a\u0302\u0323", "a\u0302\u0301\u0323", "\u1ea5 \u1ead \xe2\u0301 \xe2\u0323", "Vie\u0323\u0302t",
    "\u0301", "\u0301\u0301a", " \u0301", "a \u0301b", "a\u0300\u0301\u0302\u0303b", "q\u0307\u0323", "\u1e9b\u0323", "\u0344",
    "\xa8 \xb4 \xb8\u0301", "\u212b \u2126 \u212a", "o\u031b\u0309 \u1edf", "i\u0307\u0301", "\u01d5 U\u0308\u0304",
    # full width, ligatures, compatibility characters, with and without accents on them
    "\uff21\uff22\uff23\uff41\uff11\uff12\uff1a\uff01", "\ufb01ne \ufb00 \ufb03", "\ufb01\u0301x", "\xaa\u0301b \xaa\u20dd",
    "\u2122 \u2103 \u2026 \xaa \xba \xb5 \u02b0 \xbd \u2460 \u216b", "\u2122\u0301 \u2139\u0308 \u203c\ufe0f", "\ufdfa \ufe49",
    "\u33a1\u3392 \u3231 \U0001d400\U0001d41a\U0001d7ce \U0001f130", "\u0149 \u0132 \u01c4", "\uff1c/s\uff1e \uff1cunk\uff1e x",
    "\uff76\uff9e \uff8a\uff9f \u30ab\u3099 \u304b\u3099 \u309b", "\uff1cextra_id_0\uff1e",
    # scripts
    "日本語のテキスト 東京", "한국어 \u1112\u1161\u11ab \u1112\u1161 \u11ab \u1100\u0301", "Привет МИР й и\u0306 \u0419",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0640\u0640\u0628 \u064b\u0651\u064b \ufef7\u064b \u0622 \u0627\u0653",
    "\u05e9\u05dc\u05d5\u05dd \u05e9\u05c1\u05b8 \ufb2a \ufb1d", "नमस\u094dत\u0947 \u0958 \u0915\u093c \u0958\u0301",
    "ไทย ก\u0e33 \u0e4d\u0e32", "\u0eb3\u0e33\u0301", "မ\u103cန\u103aမ\u102c \u1038\u0301", "\u0f73\u0f75 \u0f43", "ড\u09bc",
    "𠀀𪛟 \uf900豈 \u2f00⺀", "\U0002f800", "ψυχή ᾳ\u0345 \u1fbd\u1fee",
    "abc \u05d0\u05d1\u05d2 123 \u202etxt.exe\u202c \u200fx\u200e \u2067y\u2069 \u061c",
    # characters that the next one joins
    "\u0600a \u0600\ufb01\u0301 \u06dd\xaa\u0301", "\u0600\u200b\u0301", "\u0600\r\n",
    # emoji: skin tones, joiners, flags, keycaps, selectors, tags
    "😀👍🏽 ❤\ufe0f ❤ 👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈", "🇩🇪🇫🇷", "#\ufe0f\u20e3 1\ufe0f\u20e3 e\u0301\ufe0f",
    "🏴\U000e0067\U000e0062\U000e007f", "😀a😀1", "☺\ufe0e a\U0001f3fd e\u0301\U0001f3fd", "a\u200d\u0301 \u200d\u0301",
    # zero width, controls, private use, unassigned, noncharacters
    "zero\u200bwidth\u200cnon\u200djoiner\u2060word\ufeffbom", "\ufeffstart", "soft\u00adhyphen", "a\u180eb", "\u200b\u0301",
    "\x00", "a\x00b", "a\x00\u0301", "\x01", "a\x01\u0301b", "\x07\x1b[31m\x7f", "\x80\x8f\x9f", "a\x1cb\x1fc", "a\x0bb\x0cc",
    "\r\u0301\n\u0301 \r\n\u0301", "\ue000\uf8ff\U000f0000\U0010fffd", "\uffff\ufdd0\U0001fffe", "￼\ufffd", "\u0378",
    # white space of all kinds
    "a\xa0b\u3000c\u2009d\u205fe\u1680f\u202fg", "a\u2028b\u2029c", "\u3000a\u3000", "a\xa0\xa0 b", "\xa0\u0301 \u2028\u0301",
    # special tokens, in a text, damaged, doubled, with white space that they strip
    "</s>", "a</s>b", "a </s> b", "</s></s>", "<pad>", "a<pad> b", "<unk>", "x<unk>y <unk><unk>", "< /s> </ s> </S>", "<s>",
    *SENTINELS, "a<extra_id_0>b", "a <extra_id_0> b", "<extra_id_0> <extra_id_1>", "a\u3000<extra_id_9>\t\nb", "<extra_id_100>",
    "<extra_id_1", "<extra_id_0>\u0301 e</s>\u0301", f"</s>{SPACE}a", "<unk>\u65e5 \u65e5<unk>",
    # unknown characters, which fuse within a word
    "\u65e5", "\u65e5\u65e5", "\u65e5 \u65e5", "a\u65e5b\u65e5\u65e5c", "\u65e5a", "\u4e00\u0301",
    # markup, programs, long words and long prompts
    "price: $12.50 & 100% <b>bold</b> &amp; {x} ~ ^ \\ | `", "“smart” ‘single’ — dash –", "https://example.org/?q=a%20b#c",
    "x" * 300, "ab" * 200, "!" * 300, "é" * 150, "\u65e5" * 120, "1" * 120, "e\u0301" * 100, "a" + "\u0301" * 100,
    " ".join(["very long prompt"] * 90), "a " * 126 + "b", "a " * 127 + "b", "a " * 128 + "b", "internationalization" * 9,
]


@pytest.fixture(scope="module")
def published(shared):
    return shared / "data" / "tokenizers" / "sd3_tokenizer_3"


@pytest.fixture(scope="module")
def sentencepiece(published, tmp_path_factory):
    """A folder with spiece.model and nothing else."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    shutil.copyfile(published / "spiece.model", folder / "spiece.model")
    return folder


@pytest.fixture(scope="module")
def ours(published, sentencepiece):
    """From the whole folder, where tokenizer.json is read, and from spiece.model alone."""
    return {"tokenizer.json": T5Tokenizer.from_folder(published), "spiece.model": T5Tokenizer.from_folder(sentencepiece)}


@pytest.fixture(params=["tokenizer.json", "spiece.model"])
def our(request, ours):
    return ours[request.param]


@pytest.fixture(scope="module")
def theirs(published):
    """The published file, run as it is."""
    return tokenizers.Tokenizer.from_file(str(published / "tokenizer.json"))


@pytest.fixture(scope="module")
def fast(published):
    """The tokenizer that today's transformers loads from the folder; StableDiffusion3Pipeline calls it."""
    transformers = pytest.importorskip("transformers", reason="the oracle, transformers, is not installed")
    try:
        return transformers.T5TokenizerFast.from_pretrained(published)
    except (ImportError, ValueError) as error:                 # transformers 4 converts spiece.model, with sentencepiece
        pytest.skip(f"this transformers needs another package for T5's tokenizer: {error}")


TRICKY = [
    *SENTINELS, "</s>", "<pad>", "<unk>", *"<>/saeiouA1.,!'", " ", "  ", SPACE, "\t", "\r", "\n", "\u3000",
    "\u200b", "\u200c", "\u200d", "\ufeff", "\ufffd", "\x01", "\x00", "\u0301", "\u0302", "\u0323", "\u0308",
    "\u0327", "\u20dd", "\u0600", "\u06dd", "\xaa", "\xb4", "\xe2", "\ufb01", "\u2122", "\u1ea5", "\u212b",
    "\u0344", "\u0958", "\u094d", "\u093c", "\u0915", "\u3042", "\u3099", "\uff76", "\uff9e", "\u1112", "\u1161",
    "\u11ab", "\u064b", "\ufef7", "\u05d0", "\u0e33", "\u1038", "\U0001f469", "\U0001f3fd", "\ufe0f", "\U0001d15e",
    "\U0001d16d", "\u65e5",
]


def assert_equal_ids(our, theirs, texts):
    """A difference is shown with the text that caused it."""
    expected = [found.ids for found in theirs.encode_batch(texts)]
    wrong = [(ascii(text), our.encode(text), ids) for text, ids in zip(texts, expected, strict=True)
             if [*our.encode(text), our.end] != ids]
    assert not wrong, f"{len(wrong)} of {len(texts)}, first {wrong[0]}"


# ------------------------------------------------------------------------------------------------- the published ones


@pytest.mark.slow
def test_recorded_ids(our, shared):
    golden = json.loads((shared / "data" / "tokenizers" / "golden.json").read_text(encoding="utf-8"))
    assert [[*our.encode(prompt), 1] for prompt in golden["prompts"]] == golden["t5_with_eos_unpadded"]
    assert [our.count(prompt) for prompt in golden["prompts"]] == list(map(len, golden["t5_with_eos_unpadded"]))


def test_the_two_files_say_the_same(ours, published):
    """So one oracle serves for both. Of the pieces of spiece.model, transformers adds the last hundred."""
    single, proto = ours["tokenizer.json"], ours["spiece.model"]
    assert (single._pieces, single._added) == (proto._pieces, proto._added)
    assert (single.vocab["</s>"], single.end, single.pad, single.unknown) == (1, 1, 0, 2)
    assert (proto.end, proto.pad, proto.unknown) == (1, 0, 2) and len(proto.vocab) == 32100
    step = json.loads((published / "tokenizer.json").read_text(encoding="utf-8"))["normalizer"]["normalizers"][0]
    assert base64.b64decode(step["precompiled_charsmap"]) in (published / "spiece.model").read_bytes()


def test_ids_of_hard_texts_equal_the_oracle(our, theirs):
    assert_equal_ids(our, theirs, [*HARD, "a\x85b", "\x85", "a \x85 b", "a\x85", "<extra_id_0>\x85b", "a\x85\u0301"])


@pytest.mark.slow
def test_ids_of_random_texts_equal_the_oracle(our, theirs):
    assert_equal_ids(our, theirs, random_texts(3000, 0, [*TRICKY, "\x85"], leave_out="\x85"))


def test_rows_equal_those_of_the_pipeline(our, fast):
    """The call of StableDiffusion3Pipeline."""
    texts = HARD + random_texts(500, 1, TRICKY, leave_out="\x85")
    call = {"padding": "max_length", "truncation": True, "add_special_tokens": True}
    assert our(texts) == fast(texts, max_length=256, **call).input_ids
    assert our(texts, length=77) == fast(texts, max_length=77, **call).input_ids


@pytest.mark.slow
def test_every_character_is_treated_as_by_the_oracle(ours, theirs):
    """Each assigned character of the small blocks, and a sample of the large ones: behind an accent, before one, alone."""
    points = [*range(0x3400), *range(0xa000, 0xac00), *range(0xf900, 0x20000, 5), *range(0x3400, 0x110000, 127),
              *range(0xe0020, 0xe0080)]
    characters = [c for c in map(chr, points) if assigned(c)]
    assert len(characters) > 15_000
    texts = [" ".join(f"e\u0301{c}e {c}\u0301 \xaa{c}" for c in characters[i:i + 32])
             for i in range(0, len(characters), 32)]
    assert_equal_ids(ours["tokenizer.json"], theirs, texts)


def test_files_that_transformers_saves(fast, tmp_path):
    """It writes another pipeline than the published file's, in which U+0085 is white space."""
    fast.save_pretrained(tmp_path)
    assert not (tmp_path / "spiece.model").exists()
    ours, theirs = T5Tokenizer.from_folder(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.no_padding()                                        # the file keeps what the last call asked for
    theirs.no_truncation()
    assert_equal_ids(ours, theirs, [*HARD, "a\x85b", "\x85", *random_texts(500, 2, [*TRICKY, "\x85"], leave_out="\x85")])


def test_a_row_is_text_end_padding(our):
    empty, cat, long = our(["", "a photo of a cat", "a " * 500])
    assert empty == [1] + [0] * 255
    assert cat == [3, 9, 1202, 13, 3, 9, 1712, 1] + [0] * 248
    assert long == [3, 9] * 127 + [3, 1]
    assert our([]) == [] and our(["a cat"], length=1) == [[1]]
    assert our.count("") == 1 and our.count("a " * 500) == 1001


def test_prompts_that_are_no_list_of_texts_are_refused(our):
    for bad in ("a\ud800b", "\udcff", "ok \udfff"):
        with pytest.raises(ValueError, match="lone surrogate U\\+D"):
            our([bad])
    with pytest.raises(TypeError, match="a list of prompts"):
        our("a cat")
    with pytest.raises(ValueError, match="a row of 0 ids has no room"):
        our(["a cat"], length=0)


@pytest.mark.parametrize("text", ["x" * 10_000, "internationalization" * 500, "e\u0301" * 5_000, "a" + "\u0301" * 10_000,
                                  "a photo of a cat, " * 600, "</s> " * 2_000, "\u65e5" * 10_000,
                                  "".join(random_texts(1_100, 3, TRICKY, leave_out="\x85"))])
def test_ten_thousand_characters_take_well_under_a_second(ours, theirs, text):
    our = ours["tokenizer.json"]
    assert len(text) >= 10_000
    began = time.process_time()
    ids = our.encode(text)
    assert time.process_time() - began < 1
    assert [*ids, 1] == theirs.encode(text).ids


def test_the_second_time_is_the_same(our, published):
    found = [our.encode(text) for text in HARD]
    for ids in found:
        ids.clear()                                            # what a caller does to its list touches no later answer
    assert our(HARD) == T5Tokenizer.from_folder(published)(HARD)


# ------------------------------------------------------------------------------------------------ small vocabularies

PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, -2.0), ("a", -3.0), ("b", -3.0), ("ab", -6.0), ("ba", -6.0),
          ("aba", -8.5), (SPACE + "a", -5.0), (SPACE + "b", -4.0), ("é", -7.0), ("bé", -9.0), ("ca", -4.0), ("abab", -11.5)]


def pipeline(pieces=PIECES, *, splits=True, charsmap=None, steps=()):
    """A T5-like tokenizer of the tokenizers package."""
    parts = tokenizers.pre_tokenizers, tokenizers.normalizers, tokenizers.processors
    before, normal, after = parts
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2, byte_fallback=False))
    metaspace = before.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    made.pre_tokenizer = before.Sequence([before.WhitespaceSplit(), metaspace]) if splits else metaspace
    steps = [*([normal.Precompiled(charsmap)] if charsmap else []), *steps]
    if steps:
        made.normalizer = steps[0] if len(steps) == 1 else normal.Sequence(steps)
    made.post_processor = after.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return made


def small_texts(seed):
    rng = random.Random(seed)
    return ["", *("".join(rng.choices("aaabbbcéx\u65e5\x85\u2003 " + SPACE, k=rng.randint(1, 30))) for _ in range(400))]


NORMALISERS = {
    "none": (),
    "as SD3's": (("Strip", {"left": False, "right": True}), ("Replace", (" {2,}", SPACE))),
    "as older ones": (("Replace", (" {2,}", " ")),),
}


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("name", NORMALISERS)
def test_ties_unknowns_and_spaces(name, splits, tmp_path):
    """Scores with many ties, words of unknown characters, and runs of what is and is not white space to the pipeline."""
    made = {"Strip": lambda options: tokenizers.normalizers.Strip(**options),
            "Replace": lambda options: tokenizers.normalizers.Replace(tokenizers.Regex(options[0]), options[1])}
    theirs = pipeline(splits=splits, steps=[made[kind](options) for kind, options in NORMALISERS[name]])
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert_equal_ids(T5Tokenizer.from_folder(tmp_path), theirs, small_texts(seed=name))


def field(number, value):
    """A field of a protobuf message: a number, a float, or bytes."""
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value):
    return (bytes([value & 127 | 128]) + varint(value >> 7)) if value > 127 else bytes([value])


def model(pieces=PIECES, kinds=(3, 3, 2), trained=b"", normalised=b""):
    """A spiece.model; as SentencePiece does, a piece of the usual kind says nothing about it."""
    kinds = [*kinds, *[None] * (len(pieces) - len(kinds))]
    return b"".join([field(1, field(1, piece.encode()) + field(2, score) + (field(3, kind) if kind else b""))
                     for (piece, score), kind in zip(pieces, kinds, strict=True)]
                    + [field(2, trained), field(3, normalised), field(4, b"a self test, which is skipped")])


@pytest.mark.parametrize("extra_ids", [0, 3])
def test_a_small_sentencepiece_model(extra_ids, tmp_path):
    (tmp_path / "spiece.model").write_bytes(model(trained=field(3, 1) + field(4, 300), normalised=field(1, b"identity")))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": extra_ids}))
    sentinels = [f"<extra_id_{n}>" for n in reversed(range(extra_ids))]
    normal = tokenizers.normalizers
    theirs = pipeline([*PIECES, *((text, 0.0) for text in sentinels)], splits=False, steps=[
        normal.Strip(left=False, right=True), normal.Replace(tokenizers.Regex(" {2,}"), SPACE)])
    theirs.add_special_tokens(sentinels)
    ours = T5Tokenizer.from_folder(tmp_path)
    assert list(ours.vocab) == [piece for piece, _ in PIECES] + sentinels
    assert_equal_ids(ours, theirs, [*small_texts(seed=extra_ids), "a<extra_id_0>b <extra_id_2> a<extra_id_3>"])


def test_declared_tokens_decide(tmp_path):
    """tokenizer_config.json's list before tokenizer.json's; other roles; a token that strips what stands beside it."""
    pipeline().save(str(tmp_path / "tokenizer.json"))
    listed = {"0": {"content": "<pad>"}, "1": {"content": "</s>"}, "4": {"content": "a", "lstrip": True, "rstrip": True}}
    config = {"added_tokens_decoder": listed, "pad_token": {"content": "b"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = T5Tokenizer.from_folder(tmp_path)
    assert (ours.end, ours.pad, ours.unknown) == (1, 5, 2)
    assert ours(["é\x85a\x85\u65e5"], length=7) == [[3, 11, 4, 3, 2, 1, 5]]
    config["additional_special_tokens"] = ["ca"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert T5Tokenizer.from_folder(tmp_path).encode("éca") == [3, 11, 13]


# --------------------------------------------------------------------------------------------------- files that are bad


@pytest.mark.parametrize(("data", "message"), [
    (b"", "it has no pieces"),
    (b"\xff" * 40, "or damaged"),
    (b"<!doctype html>", "or damaged"),
    (model()[:-5], "ends early"),
    (model() + b"\x0b", "wire type 3"),
    (model() + b"\x80", "ends early"),
    (model() + field(1, field(2, 1.0)), "or damaged"),
    (model() + field(1, 7), "or damaged"),
    (model() + field(1, field(1, b"\xff") + field(2, 1.0)), "or damaged"),
    (model() + field(1, field(1, b"x") + field(2, float("nan"))), "a piece must be a text and its score"),
    (model() + field(1, field(1, b"x") + field(2, 1)), "or damaged"),
    (model(kinds=(3, 3, 3)), "none for the unknown"),
    (model(kinds=(3, 3, 2, 4)), "a piece of kind 4"),
    (model(trained=field(3, 2)), "must be a unigram"),
    (model(trained=field(24, 1)), "must be a unigram"),
    (model(normalised=field(3, 0)), "treats spaces in another way"),
    (model(normalised=field(4, 0)), "treats spaces in another way"),
    (model(normalised=field(2, b"\x08\0\0\0abc")), "precompiled_charsmap is damaged"),
    (model(normalised=field(2, 9)), "or damaged|precompiled_charsmap is damaged"),
    (model([("</s>", 0.0), ("a", 0.0), ("<unk>", 0.0)]), "'<pad>' is not in the vocabulary"),
])
def test_a_damaged_sentencepiece_model_is_named(data, message, tmp_path):
    (tmp_path / "spiece.model").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        T5Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_any_cut_of_the_published_model_is_told(published, tmp_path):
    whole = (published / "spiece.model").read_bytes()
    for size in random.Random(0).sample(range(len(whole) // 2), 3):
        (tmp_path / "spiece.model").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="spiece.model is not a SentencePiece model, or damaged"):
            T5Tokenizer.from_folder(tmp_path)


def deep(whole, *path, **changes):
    for key in path:
        whole = whole[key]
    whole.update(changes)


@pytest.mark.parametrize(("change", "message"), [
    (lambda whole: whole.pop("model"), "not of a T5 tokenizer"),
    (lambda whole: deep(whole, "model", type="BPE"), "not of a T5 tokenizer"),
    (lambda whole: deep(whole, "model", vocab={"a": 1}), "no vocab"),
    (lambda whole: deep(whole, "model", vocab=[["a", 0.0], ["b"]]), "a piece must be .* found .'b'"),
    (lambda whole: deep(whole, "model", vocab=[["a", "0"]]), "a piece must be"),
    (lambda whole: deep(whole, "model", vocab=[]), "unk_id 2 is not the id of a piece"),
    (lambda whole: deep(whole, "model", unk_id=None), "unk_id None"),
    (lambda whole: deep(whole, "model", unk_id=99), "unk_id 99"),
    (lambda whole: deep(whole, "model", byte_fallback=True), "byte_fallback"),
    (lambda whole: whole.update(pre_tokenizer=None), "another pre_tokenizer"),
    (lambda whole: whole.update(pre_tokenizer={"type": "ByteLevel"}), "another pre_tokenizer"),
    (lambda whole: deep(whole, "pre_tokenizer", pretokenizers=[]), "another pre_tokenizer"),
    (lambda whole: whole["pre_tokenizer"]["pretokenizers"].reverse(), "another pre_tokenizer"),
    (lambda whole: deep(whole, "pre_tokenizer", "pretokenizers", 1, prepend_scheme="first"), "prepend_scheme to 'first'"),
    (lambda whole: deep(whole, "pre_tokenizer", "pretokenizers", 1, split=False), "split to False"),
    (lambda whole: deep(whole, "pre_tokenizer", "pretokenizers", 1, add_prefix_space=False), "add_prefix_space to False"),
    (lambda whole: whole.update(normalizer={"type": "NFKC"}), "a normalizer of type 'NFKC'"),
    (lambda whole: whole.update(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}), "type 'Strip'"),
    (lambda whole: whole.update(normalizer={"type": "Precompiled"}), "precompiled_charsmap is damaged"),
    (lambda whole: whole.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "%%"}), "charsmap is damaged"),
    (lambda whole: whole.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "CAAA"}), "charsmap is damaged"),
    (lambda whole: whole.update(added_tokens=["x"]), "added_tokens must"),
    (lambda whole: whole.update(added_tokens=[{"id": 3, "content": ""}]), "declares a token without a text"),
    (lambda whole: whole.update(added_tokens=[{"content": "x"}]), "'x' has the id None"),
    (lambda whole: deep(whole, "added_tokens", 0, single_word=True), "sets single_word on the token '<pad>'"),
    (lambda whole: deep(whole, "added_tokens", 0, normalized=True), "sets normalized on the token '<pad>'"),
])
def test_a_damaged_tokenizer_json_is_named(change, message, tmp_path):
    pipeline().save(str(tmp_path / "tokenizer.json"))
    whole = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    change(whole)
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        T5Tokenizer.from_folder(tmp_path)
    assert "tokenizer.json" in str(error.value)


@pytest.mark.parametrize(("config", "message"), [
    ({"tokenizer_class": "CLIPTokenizer"}, "tokenizer_config.json is of a 'CLIPTokenizer', not of a T5Tokenizer"),
    ({"padding_side": "left"}, "padding_side to 'left'"),
    ({"truncation_side": "left"}, "truncation_side to 'left'"),
    ({"added_tokens_decoder": ["x"]}, "added_tokens_decoder must map"),
    ({"added_tokens_decoder": {"x": {"content": "a"}}}, "'a' has the id 'x'"),
    ({"eos_token": "<end>"}, "'<end>' is not in the vocabulary"),
    ({"pad_token": 7}, "declares a token without a text: 7"),
    ({"additional_special_tokens": ["<new>"]}, "'<new>' is not in the vocabulary"),
    ({"extra_ids": -1}, "extra_ids -1"),
    ({"extra_ids": "100"}, "extra_ids '100'"),
])
def test_a_config_that_does_not_fit_is_refused(config, message, tmp_path):
    (tmp_path / "spiece.model").write_bytes(model())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        T5Tokenizer.from_folder(tmp_path)


def test_folders_without_a_tokenizer_and_of_another_one(shared, tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer: neither tokenizer.json nor spiece.model"):
        T5Tokenizer.from_folder(str(tmp_path))
    with pytest.raises(ValueError, match="is of a 'CLIPTokenizer'"):
        T5Tokenizer.from_folder(shared / "data" / "tokenizers" / "sd3_tokenizer")
    (tmp_path / "tokenizer.json").write_text("{'a'}")
    with pytest.raises(ValueError, match="tokenizer.json is not valid JSON"):
        T5Tokenizer.from_folder(tmp_path)


def test_a_charsmap_with_wild_offsets_ends_in_a_sentence():
    """A key whose replacement lies nowhere, or is no text; and a step that leaves the trie, which is no match."""
    def charsmap(units, replacements):
        return Charsmap(struct.pack(f"<{len(units) + 1}I", 4 * len(units), *units) + replacements, "x.model")

    units = [0] * 98
    units[0], units[97] = 0, 97 | 256 | (97 ^ 5) << 10         # "a" is a key; unit 5 holds its replacement
    assert charsmap(units, b"A\0B\0")("abca") == "AbcA"
    units[5] = 2
    assert charsmap(units, b"A\0B")("a") == "B"
    units[5] = 1
    with pytest.raises(ValueError, match="x.model: its precompiled_charsmap is damaged"):
        charsmap(units, b"A\xff\0")("a")
    units[97] = 97 | 256 | 5000 << 10
    with pytest.raises(ValueError, match="x.model: its precompiled_charsmap is damaged"):
        charsmap(units, b"A\0")("a")
    assert charsmap(units, b"A\0")("\xff\u65e5b") == "\xff\u65e5b"
