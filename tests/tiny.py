"""Tiny networks with random weights, saved as folders from the hub look: autoencoders, encoders."""

import pytest
import torch


def save_kl(folder):
    """An autoencoder with a posterior: 4 channels, 2 pixels a position."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.7, shift_factor=0.1, sample_size=32,
    ).save_pretrained(folder)  # fmt: skip


def save_dc(folder, channels=8):
    """An autoencoder without one, 2 pixels a position."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderDC(
        latent_channels=channels, attention_head_dim=4, scaling_factor=0.41407,
        encoder_block_types="ResBlock", encoder_block_out_channels=(4, 8),
        encoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_block_types="ResBlock", decoder_block_out_channels=(4, 8),
        decoder_layers_per_block=(1, 1), decoder_qkv_multiscales=((), ()),
        upsample_block_type="interpolate", downsample_block_type="stride_conv",
    ).save_pretrained(folder)  # fmt: skip


def save_dino(folder):
    """An image encoder of 16 features a patch."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(folder)


def save_gemma(folder):
    """A Gemma 3 of 20 features with a tokenizer of single bytes, which pads on the left."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", *letters])}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    marks = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        "<bos> $A", special_tokens=[("<bos>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, **marks, padding_side="left"
    ).save_pretrained(folder)
    config = transformers.Gemma3TextConfig(
        vocab_size=len(vocabulary), hidden_size=20, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=512,
        sliding_window=16,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Gemma3ForCausalLM(config).save_pretrained(folder)
