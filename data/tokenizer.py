"""Text to token ids and back; and the tokenizer of a small model, trained on its texts."""
import json
from functools import lru_cache
from pathlib import Path

import tokenizers
from tokenizers import pre_tokenizers, trainers

from data import InputError, read_file, read_json
from data.checkpoint import stop_ids
from data.prompts import LONG, SHORT


class Tokenizer:
    """A Hugging Face tokenizer.json. It encodes lists of strings.

    A plain `str` is text. A subclass of `str` is one control token. Text can never encode to a
    control token.
    """

    def __init__(self, folder: Path):
        folder = Path(folder)
        path = folder / "tokenizer.json"
        content = read_file(path)
        try:
            self.full = tokenizers.Tokenizer.from_buffer(content)
            added = self.full.get_added_tokens_decoder().items()
            self.control = {token.content: i for i, token in added}
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{path}: not a tokenizer ({error})") from None
        for token in CONTROL_TOKENS[1:]:  # nothing here writes <|endoftext|>
            if token not in self.control:
                raise InputError(f"{path}: the token {token} is missing; Qwen2.5's tokenizers "
                                 "have it")
        self.end = self.control["<|im_end|>"]
        plain = tokenizers.Tokenizer(self.full.model)  # the same vocabulary without added tokens
        plain.normalizer = self.full.normalizer
        plain.pre_tokenizer = self.full.pre_tokenizer
        self.plain_ids = lru_cache(2000)(lambda text: plain.encode(text).ids)
        self.size = self.full.get_vocab_size()
        self.files = {"tokenizer.json": content}  # saved again byte for byte
        for name in ("tokenizer_config.json", "chat_template.jinja"):
            if (folder / name).exists():
                self.files[name] = read_file(folder / name)
        path = folder / "tokenizer_config.json"
        marked = path.exists() and read_json(path).get("mtr_prompts") == "short"
        self.prompts = SHORT if marked else LONG  # a folder that we did not train has no mark
        # The config of a base checkpoint does not name <|im_end|>.
        self.stop_ids = {self.end, *stop_ids(folder)}

    def encode(self, pieces: list[str]) -> list[int]:
        """Pieces -> ids. Adjacent texts are joined first: BPE may merge across their border."""
        ids = []
        text = ""
        for piece in pieces:
            if type(piece) is str:
                text += piece
            else:
                ids += self._encode_text(text)
                ids.append(self.control[piece])
                text = ""
        return ids + self._encode_text(text)

    def _encode_text(self, text: str) -> list[int]:
        # JSON such as "\ud800" gives half a character. The encoder would raise, so it becomes "?".
        return self.plain_ids(text.encode("utf-8", "replace").decode()) if text else []

    def decode(self, ids: list[int]) -> str:
        """Ids -> text, with control tokens spelled out."""
        return self.full.decode(ids, skip_special_tokens=False)


# -------------------------------------------------------------------------------------- training

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
              "model_max_length": 4096, "mtr_prompts": "short"}
    stops = {"eos_token_id": [bpe.token_to_id("<|im_end|>"), bpe.token_to_id("<|endoftext|>")]}
    for name, content in (("tokenizer_config.json", config), ("generation_config.json", stops)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
