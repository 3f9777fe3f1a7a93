"""Tiny random models that write text, made with transformers in seconds: T5 as Flan-T5 is, BLIP for captions.

Weights are perturbed so far that what is written changes with every token and input.
"""

from __future__ import annotations

from pathlib import Path

from checkpoints import WORDS, perturb

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MORE_WORDS = "caption image that contains write has to be english most characters long at photograph is".split()


def make_t5_tokenizer(folder: Path):
    """A T5TokenizerFast over a small unigram vocabulary; writes tokenizer.json and its kin into `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS, *"0123456789.,"]
    pieces += [f"▁{word}" for word in dict.fromkeys([*WORDS, *MORE_WORDS]) if f"▁{word}" not in pieces]
    scores = [0.0, 0.0, 0.0, -3.0] + [-1.0 if piece.startswith("▁") else -5.0 for piece in pieces[4:]]
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores)), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=64)
    fast.save_pretrained(str(folder))
    return fast


def make_t5(folder, *, seed: int = 6, flan: bool = True, **saving) -> Path:
    """Write a T5ForConditionalGeneration into `folder`: gated gelu and two tables as Flan-T5, or the first T5's."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_t5_tokenizer(folder)
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(tokenizer) + 5,  # real tables are longer than their vocabulary
        d_model=32,
        d_kv=6,  # heads need not fill the width
        d_ff=48,
        num_layers=3,
        num_decoder_layers=2,  # transformers makes a cache for no more than num_layers
        num_heads=4,
        feed_forward_proj="gated-gelu" if flan else "relu",
        tie_word_embeddings=not flan,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = perturb(T5ForConditionalGeneration(config), seed, 0.2)
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] = 0
    model.save_pretrained(str(folder), safe_serialization=True, **saving)
    return folder


def make_blip(folder, *, seed: int = 12, **saving) -> Path:
    """Write a BlipForConditionalGeneration and its processor into `folder`; pictures of 32 x 32."""
    import torch
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    pieces += [word for word in dict.fromkeys([*WORDS, *MORE_WORDS]) if word not in pieces] + [
        "[DEC]",
        "[ENC]",
    ]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), model_max_length=64)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    torch.manual_seed(seed)
    ids = {piece: number for number, piece in enumerate(pieces)}
    config = BlipConfig(
        text_config=dict(
            vocab_size=len(pieces),
            hidden_size=32,
            intermediate_size=48,
            projection_dim=16,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            bos_token_id=ids["[DEC]"],
            sep_token_id=ids["[SEP]"],
            eos_token_id=ids["[SEP]"],
            pad_token_id=0,
        ),
        vision_config=dict(
            hidden_size=24,
            intermediate_size=40,
            projection_dim=16,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=32,
            patch_size=8,
        ),
    )
    model = BlipForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases as large as the rest would make it write the same words about everything; matrices twice as
            # large multiply rounding errors by thousands.
            scale = 0.5 if parameter.ndim in (2, 4) else 0.05
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(str(folder), safe_serialization=True, **saving)
    size = {"height": 32, "width": 32}
    BlipProcessor(BlipImageProcessor(size=size), tokenizer).save_pretrained(str(folder))
    return folder
