"""A tiny Llama as a GGUF file, as llama.cpp's own converter writes one."""

from __future__ import annotations

from functools import reduce
from pathlib import Path

import gguf
from tiny_models import SPECIAL, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tiny_gguf(path: Path, base: PreTrainedModel) -> Path:
    """Write a `tiny_base("llama", vocab_size=VOCAB + 1)` and its tokenizer, with the one merge that it must have."""
    writer, config, tokenizer = gguf.GGUFWriter(path, "llama"), base.config, tiny_tokenizer()
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = [*sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__), "ab"]
    kinds = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[token not in SPECIAL] for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    rotated = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for ours, tensor in base.state_dict().items():
        name = reduce(lambda name, pair: name.replace(*pair), _NAMES.items(), ours)
        heads = next((heads for part, heads in rotated.items() if f".{part}." in name), None)
        written = tensor if heads is None else _interleaved(tensor, heads)
        writer.add_tensor(name, written.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleaved(weights: Tensor, heads: int) -> Tensor:
    """Order the rows of each head as llama.cpp rotates them: dimension 2i together with 2i + 1."""
    return weights.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
