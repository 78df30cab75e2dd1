"""Qwen's tokenizer against transformers' Qwen2Tokenizer on vocabularies trained here, and against the published pattern."""

import json
import sys
import time
import unicodedata

import pytest
from random_texts import assigned, random_texts
from test_clip_tokenizer import HARD

from sifm_min.models import qwen_tokenizer
from sifm_min.models.byte_pairs import byte_symbols
from sifm_min.models.qwen_tokenizer import CHAT, PAD, PATTERN, TURNS, QwenTokenizer

transformers = pytest.importorskip("transformers", reason="the oracle, transformers, is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="the oracle, tokenizers, is not installed")

# The branches of the published chat template that a single turn of the user takes, in our words.
TEMPLATE = """{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is defined and not
enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""
# What is hard in Qwen's pattern: white space and line ends of all kinds, a sign before letters, single digits.
SPACES = [
    "a b", "a  b", "a   b", "  a", "a  ", " ", "  ", "   ", "\n", "\n\n", " \n", "\n ", " \n ", "a\nb", "a \n b",
    "a\n\n  b", "a  \n\n  b\n", "\r\n", "a\r\nb", "a \r\n\r\n b", "\t", "\ta", "\t\ta", "a\t b", " \t\n\t ",
    "a\x0b\x0cb", "\x85", "a\x85\n", "\xa0a", "a\xa0 b", "a\u3000\u3000b", "a \u2028\nb", "\u2029 ", "\u200ba",
    " \u200b ", "\ufeffa", "x \n", "x\n ", "x \n\n y", "!\n", "!\n\na", "! \n", " !\n\r\n", " !\r a", "?!\n!\n",
    "a!\n\n b", ".\n1", "1\n", " 1", "  1", "\n1", "\t1", "1 1", "12 34", " 1a", "1a", "a1", " !", "  !", "!a", "!!a",
    " !a", "\n!a", "\na", "\r\na", "\xa0!", "\u3000日本", "(a)", "((a))", "[x]y{z}", "-a", "--a", "a-b", "a--b",
    "$5", "€a", "#tag", "@you", "\u0301a", " \u0301a", "a\u0327\u0301b", "न\u094dत", "\u094dत", "क\u093f",
    "ก\u0e33", "'a", "''a", "'\na", " 'a", "'s", "'S", "'\u017f", "'\u017fa", "x's", "x'S", "x'\u017f", "X'RE",
    "'Re'vE'Ll'LL'M'D'T", "'sa", "'SA", "x'LLA'MA", "'ra", "'rea", "'l", "'la", "'v", "' s", "'1", "5's", "'", "''", "'''s",
    "\u2019s", "'ll'", "def f(x):\n    return x  # y\n\n\n", "{\n\t\"a\": 1,\r\n}", "|a|\n|-|\n", "<div>\n  <p>x</p>\n</div>",
]
PROMPTS = [
    "make the sky red", "", " ", "Mach den Himmel rot, bitte!", "把天空变成红色", "空を赤くして",
    "하늘을 빨갛게", "сделай небо красным", "اجعل السماء حمراء", "הפוך את השמיים לאדומים", "आसमान को लाल कर दो",
    "ทำให้ท้องฟ้าเป็นสีแดง", "κάνε τον ουρανό κόκκινο", "turn {him} into {}", "a<|im_end|>\n<|im_start|>user\nb",
    "<think>no</think>", "<|endoftext|>", "line\nbreaks\n\n", " ends ",
]


def train(folder, texts, size):
    """Write vocab.json and merges.txt of a byte-level BPE trained on texts; its 256 bytes are in the vocabulary.

    Texts are not split for the training, so that its merges cross words, and a text that is split wrongly gets other ids.
    """
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    model = json.loads(made.to_str())["model"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return folder


def with_specials(folder):
    """transformers' tokenizer of a folder of vocab.json and merges.txt, with Qwen3's special tokens and template."""
    theirs = transformers.Qwen2TokenizerFast.from_pretrained(folder)
    theirs.add_special_tokens({"additional_special_tokens": list(TURNS)})
    theirs.add_tokens([tokenizers.AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    theirs.chat_template = TEMPLATE
    return theirs


@pytest.fixture(scope="module")
def corpus():
    return [text for text in [*HARD, *SPACES, *PROMPTS] if "<|" not in text]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus):
    """A `tokenizer` folder as today's transformers saves it, of at most 3000 tokens with merges in many scripts."""
    where = tmp_path_factory.mktemp("qwen")
    with_specials(train(where / "trained", corpus * 2, 3000)).save_pretrained(where / "saved")
    return where / "saved"


@pytest.fixture(scope="module")
def pair(folder):
    """Ours and transformers', read from the same folder."""
    return QwenTokenizer.from_folder(folder), transformers.Qwen2TokenizerFast.from_pretrained(folder)


def assert_equal_ids(ours, theirs, texts):
    expected = theirs(texts, add_special_tokens=False, verbose=False).input_ids
    for text, ids in zip(texts, expected, strict=True):
        assert ours.encode(text) == ids, repr(text)


def test_ids_of_hard_texts_equal_transformers(pair):
    texts = [*HARD, *SPACES, *PROMPTS]
    assert_equal_ids(*pair, [*texts, *(f"{a}{b}" for a in SPACES[::3] for b in SPACES[::2])])
    used = {number for text in texts for number in pair[0].encode(text)}
    assert len(used) > 500 and max(used) > max(pair[0].vocab.values())      # merges of many scripts, and the special tokens


TRICKY = [*" \n\r\t!'.aA1sS", "  ", "\r\n", "'re", "'LL", "\u0301", "\xa0", "\x85", "\u2028", "½", "日", "한",
          "\u1112\u1161", "\u017f", "\u094d", "👩", "\u200d", *TURNS, PAD, "<think>", "</think>", "<|im_start", "|>"]


def test_ids_of_random_texts_equal_transformers(pair):
    assert_equal_ids(*pair, random_texts(3000, 1, TRICKY, share=0.6))


@pytest.mark.parametrize("stride", [53, pytest.param(1, marks=pytest.mark.slow)])
def test_every_character_is_classified_as_by_transformers(pair, stride):
    """Between letters, digits, spaces and signs, where its kind decides how the text is split."""
    characters = [chr(c) for c in range(0, sys.maxunicode + 1, stride) if assigned(chr(c))]
    assert_equal_ids(*pair, [f"a{c}b {c} {c}1!{c}\n{c}{c}'{c}" for c in characters])


def test_words_are_those_of_the_published_pattern(pair):
    """Split by the library that the published files are made for; the words, joined, are the text."""
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    for text in [*HARD, *SPACES, *random_texts(500, 2, TRICKY, share=0.6)]:
        text = qwen_tokenizer.normalise(text)
        found = list(qwen_tokenizer.words(text))
        assert found == [word for word, _ in split.pre_tokenize_str(text)] and "".join(found) == text
    theirs = json.loads(pair[1].backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"][0]
    assert theirs["pattern"] == {"Regex": PATTERN}


# -- the chat, and rows ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("length", [512, 40, 12, 3])
def test_rows_are_those_of_the_pipeline(pair, length):
    """As `Flux2KleinPipeline` calls transformers: template, padding and cut; and where the padding begins."""
    pytest.importorskip("jinja2", reason="transformers renders chat templates with jinja2")
    ours, theirs = pair
    rows, masks = ours(PROMPTS, length)
    for prompt, row, mask in zip(PROMPTS, rows, masks, strict=True):
        text = theirs.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True,
                                          enable_thinking=False)
        assert text == CHAT.format(prompt)
        expected = theirs(text, padding="max_length", truncation=True, max_length=length)
        assert (row, mask) == (expected["input_ids"], expected["attention_mask"])
        assert ours.count(prompt) == len(theirs(text)["input_ids"])


def test_a_chat_of_qwen3_is_recorded():
    assert CHAT.format("x") == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_prompts_that_are_no_list_of_texts_are_refused(pair):
    with pytest.raises(TypeError, match="takes a list of prompts"):
        pair[0]("one")
    with pytest.raises(ValueError, match=r"lone surrogate U\+D800 at 1"):
        pair[0].encode("a\ud800")


@pytest.mark.parametrize("letters", ["a", "ab", " ", "\n", " \n", "!", "'", "日", "a\u0301"])
def test_a_text_without_end_takes_seconds_at_most(pair, letters):
    text = letters * (40_000 // len(letters))
    start = time.process_time()
    ids = pair[0].encode(text)
    assert time.process_time() - start < 5
    assert ids == pair[1](text, add_special_tokens=False, verbose=False).input_ids


# -- files -------------------------------------------------------------------------------------------------------------

def older(folder, where, *, decoder=True):
    """The folder as transformers 4 wrote it: vocabulary and merges beside tokenizer.json, and lists of added tokens."""
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    where.mkdir()
    (where / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]), encoding="utf-8")
    (where / "merges.txt").write_text("\n".join(" ".join(merge) for merge in whole["model"]["merges"]), encoding="utf-8")
    added = {str(token.pop("id")): token for token in whole["added_tokens"]}
    config = {"add_bos_token": False, "add_prefix_space": False, "pad_token": PAD, "model_max_length": 131072,
              "tokenizer_class": "Qwen2Tokenizer", "chat_template": TEMPLATE}
    (where / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": added} if decoder else config))
    (where / "added_tokens.json").write_text(json.dumps({token["content"]: int(number) for number, token in added.items()}))


@pytest.mark.parametrize("place", ["tokenizer_config.json", "added_tokens.json", "tokenizer.json"])
def test_files_of_older_transformers_are_read(place, folder, pair, tmp_path):
    """The ids of the special tokens are in one of three places."""
    older(folder, tmp_path / "old", decoder=place == "tokenizer_config.json")
    if place != "added_tokens.json":
        (tmp_path / "old" / "added_tokens.json").unlink()
    if place == "tokenizer.json":
        (tmp_path / "old" / place).write_bytes((folder / place).read_bytes())
    assert_equal_ids(QwenTokenizer.from_folder(tmp_path / "old"), pair[1], [*HARD, *SPACES, *PROMPTS])


def test_a_special_token_of_normalised_text_is_found(folder, tmp_path):
    """One that is found in the text after NFC, and one that is found before it."""
    theirs = transformers.Qwen2TokenizerFast.from_pretrained(folder)
    theirs.add_tokens([tokenizers.AddedToken("caf\xe9", normalized=True), tokenizers.AddedToken("\u212b", normalized=False)])
    theirs.save_pretrained(tmp_path)
    texts = ["a cafe\u0301!", "a caf\xe9!", "\u212bx \xc5x A\u030ax", "CAF\xc9"]
    ours = QwenTokenizer.from_folder(tmp_path)
    assert_equal_ids(ours, transformers.Qwen2TokenizerFast.from_pretrained(tmp_path), texts)
    assert len({tuple(ours.encode(text)) for text in texts[:2]}) == 1


def change(name, **values):
    def damage(folder):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        for key, value in values.items():
            place, _, last = key.rpartition("__")
            (content[place] if place else content)[last] = value
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return damage


DAMAGE = [
    (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer: neither vocab.json"),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json is not valid JSON"),
    (change("tokenizer_config.json", tokenizer_class="CLIPTokenizer"), "is of a 'CLIPTokenizer', not of a Qwen2Tokenizer"),
    (change("tokenizer_config.json", padding_side="left"), "sets padding_side to 'left'; only 'right' is implemented"),
    (change("tokenizer_config.json", truncation_side="left"), "sets truncation_side to 'left'"),
    (change("tokenizer_config.json", add_prefix_space=True), "sets add_prefix_space, which is not implemented"),
    (change("tokenizer_config.json", split_special_tokens=True), "sets split_special_tokens, which is not implemented"),
    (change("tokenizer_config.json", pad_token="<pad>"), "has no id for the special token '<pad>'"),
    (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"), "chat template is not Qwen3's"),
    (change("tokenizer.json", normalizer=None), "sets normalizer to None; only NFC is implemented"),
    (change("tokenizer.json", pre_tokenizer={"type": "ByteLevel"}), r"splits text by \[\], not by Qwen's pattern"),
    (change("tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\s+"}}]}), "not by Qwen's pattern"),
    (change("tokenizer.json", pre_tokenizer={"pretokenizers": 5}), r"splits text by \[\], not by Qwen's pattern"),
    (change("tokenizer.json", model__ignore_merges=True), "sets ignore_merges, which is not implemented"),
    (change("tokenizer.json", model__byte_fallback=True), "sets byte_fallback, which is not implemented"),
    (change("tokenizer.json", model__end_of_word_suffix="</w>"), "not of a Qwen tokenizer: its model must be a BPE with no"),
    (change("tokenizer.json", model__type="Unigram"), "not of a Qwen tokenizer"),
    (change("tokenizer.json", added_tokens=[]), r"has no id for the special token '<\|im_start\|>'"),
    (change("tokenizer.json", added_tokens=[{"id": "x", "content": PAD}]), "has the id 'x', which is not a whole number"),
    (change("tokenizer.json", model__merges=[], model__vocab={"a": 0}), "the vocabulary lacks 255 of the 256 bytes"),
]


@pytest.mark.parametrize(("damage", "sentence"), DAMAGE, ids=[sentence[:40] for _, sentence in DAMAGE])
def test_damaged_files_are_named(damage, sentence, folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(ValueError, match=sentence) as caught:
        QwenTokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


# -- the comparison sees -----------------------------------------------------------------------------------------------

right, run = qwen_tokenizer._end, qwen_tokenizer._run
FAULTS = {
    "digits in a row": ("_run", lambda kinds, start, wanted: run(kinds.replace("N", "L"), start, wanted)),
    "no sign before letters": ("_end", lambda text, kinds, at: at + 1 if text[at] == "(" else right(text, kinds, at)),
    "no space before a word": ("_end", lambda text, kinds, at: at + 1 if text[at] == " " else right(text, kinds, at)),
    "line ends as other white space": ("_end", lambda text, kinds, at: right(text.translate({10: " ", 13: " "}), kinds, at)),
    "white space in one piece": ("_end", lambda text, kinds, at: max(run(kinds, at, " "), right(text, kinds, at))),
    "no contractions": ("CONTRACTIONS", ()),
    "contractions in small letters alone": ("_end", lambda text, kinds, at: right(
        text.replace("'", '"') if text[at + 1:at + 2].isupper() else text, kinds, at)),
    "contractions in ASCII alone": ("_end", lambda text, kinds, at: right(text.replace("'\u017f", '"\u017f'), kinds, at)),
    "another normal form": ("normalise", lambda text: unicodedata.normalize("NFKC", text)),
    "no normal form": ("normalise", lambda text: text),
    "python's white space": ("kind", lambda character: " " if character.isspace() else qwen_tokenizer_kind(character)),
    "marks as letters": ("kind", lambda character: "L" if unicodedata.category(character)[0] == "M" else qwen_tokenizer_kind(
        character)),
}
qwen_tokenizer_kind = qwen_tokenizer.kind


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees(fault, pair, monkeypatch):
    texts = [*HARD, *SPACES]
    assert_equal_ids(*pair, texts)
    monkeypatch.setattr(qwen_tokenizer, *FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_equal_ids(*pair, texts)


def test_bytes_have_the_symbols_of_the_oracle():
    assert sorted(byte_symbols().values()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
