"""Train the tokenizer of a small model. Real checkpoints bring their own."""
import json
from pathlib import Path

import tokenizers
from tokenizers import pre_tokenizers, trainers

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
# Qwen2.5's pre-split, with one departure: a space before a capital letter stands alone. So a name
# is the same token in prose and in JSON, and a small model copies it by repeating one token.
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|(?!\s\p{Lu})[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
         r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CHAT_TEMPLATE = Path(__file__).parent / "chat_template.jinja"  # agents.py's protocol, for others


def train_tokenizer(texts: list[str], size: int, folder: Path) -> None:
    """Train a byte-level BPE with Qwen2.5's control tokens, and write it to folder.

    size: the largest number of ids.
    """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer = tokenizers.normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size - len(CONTROL_TOKENS), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainer)
    for token in CONTROL_TOKENS:  # as in Qwen2.5, the tags of a call are added but not special
        special = token.startswith("<|")
        bpe.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)])
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast",
              "chat_template": CHAT_TEMPLATE.read_text(encoding="utf-8"),
              "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_prefix_space": False,
              "model_max_length": 4096}
    stops = {"eos_token_id": [bpe.token_to_id("<|im_end|>"), bpe.token_to_id("<|endoftext|>")]}
    for name, content in (("tokenizer_config.json", config), ("generation_config.json", stops)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
