"""Write a checkpoint that numballama reads as a GGUF that llama.cpp reads, so that both run the same weights.

python make_gguf.py MODEL TOKENIZER.model OUT.gguf [f32|f16]        (needs: pip install gguf)
"""

import sys

import gguf
import numpy as np
from sentencepiece import SentencePieceProcessor

from numballama import loader, quant

NAMES = {
    "attn_norm": "attn_norm",
    "wq": "attn_q",
    "wk": "attn_k",
    "wv": "attn_v",
    "wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "w1": "ffn_gate",
    "w2": "ffn_down",
    "w3": "ffn_up",
}
TOP = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}


def main() -> None:
    source, tokenizer, target, dtype = [*sys.argv[1:], "f32"][:4]
    checkpoint = loader.open_checkpoint(source)
    config = checkpoint.config
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    pieces = SentencePieceProcessor(model_file=tokenizer)
    kinds = gguf.TokenType
    ids = range(pieces.vocab_size())
    writer.add_tokenizer_model("llama")
    writer.add_token_list([pieces.id_to_piece(i).encode() for i in ids])
    writer.add_token_scores([pieces.get_score(i) for i in ids])
    writer.add_token_types(
        [
            kinds.UNKNOWN
            if pieces.is_unknown(i)
            else kinds.CONTROL
            if pieces.is_control(i)
            else kinds.BYTE
            if pieces.is_byte(i)
            else kinds.NORMAL
            for i in ids
        ]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, weight in checkpoint.weights.items():
        *layer, short = name.split(".")
        theirs = f"blk.{layer[1]}.{NAMES[short]}" if layer else TOP[short]
        numbers = quant.dequantize(weight)
        wide = dtype == "f32" or numbers.ndim == 1  # llama.cpp keeps norms in float32
        writer.add_tensor(f"{theirs}.weight", np.ascontiguousarray(numbers if wide else numbers.astype(np.float16)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
