"""small.json beside this file: a byte-level BPE of 1,800 tokens whose merges cross all borders between words.

Trained on `lines.py` without any cutting, so that every pre-tokenizer shows in the ids.
"""

from pathlib import Path

from lines import lines
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

tokenizer = Tokenizer(models.BPE())
whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
tokenizer.pre_tokenizer = whole
trainer = trainers.BpeTrainer(
    vocab_size=1800, initial_alphabet=whole.alphabet(), show_progress=False, max_token_length=6
)
tokenizer.train_from_iterator(lines(), trainer)
gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(gpt2), "isolated"), whole])
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in ("<|endoftext|>", "<|im_start|>")])
tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in ("<|im_end|>", "<s>", "</s>")])
Path(__file__).with_name("small.json").write_text(tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")
