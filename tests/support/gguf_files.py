"""GGUF files made on the spot with the writer of the package `gguf`, in the form that llama.cpp's converter gives them."""

import json

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants

MODULES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "ln_1": "attn_norm", "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm", "lm_head": "output",
}  # fmt: skip
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,)}  # bytes


def write(path, architecture, metadata, tensors):
    """Write a file.

    Args:
      metadata: by their full keys.
      tensors: (values, type's name) by name; float32 values, or a quantized type's bytes.
    """
    writer = GGUFWriter(path, architecture)
    add = {
        int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool, str: writer.add_string,
        list: writer.add_array,
    }  # fmt: skip
    for key, value in metadata.items():
        add[type(value)](key, value)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values), raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model_metadata(config):
    """Metadata of a config of `transformers`."""
    if config.model_type == "gpt2":
        entries = {
            "embedding_length": config.n_embd, "block_count": config.n_layer, "attention.head_count": config.n_head,
            "feed_forward_length": config.n_inner or 4 * config.n_embd, "context_length": config.n_positions,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }  # fmt: skip
    else:
        entries = {
            "embedding_length": config.hidden_size, "block_count": config.num_hidden_layers,
            "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "context_length": config.max_position_embeddings,
            "feed_forward_length": config.intermediate_size, "rope.freq_base": config.rope_parameters["rope_theta"],
        }  # fmt: skip
        if getattr(config, "head_dim", None):
            entries |= {"attention.key_length": config.head_dim, "rope.dimension_count": config.head_dim}
    return {f"{config.model_type}.{key}": value for key, value in entries.items()}


def model_tensors(config, state, kind="F32"):
    """Tensors of a state dict (NumPy) of `transformers`, matrices of a type; and the state dict that they stand for."""
    family, tensors, kept = config.model_type, {}, {}
    for name, values in state.items():
        module, _, suffix = name.rpartition(".")
        _, layers, layer, *inner = [*module.split("."), "", ""]
        in_layer = layers in ("layers", "h")
        ours = MODULES[".".join(inner[:-2]) if in_layer else module]
        turned = family == "gpt2" and in_layer and values.ndim == 2  # a Conv1D, stored as a Linear
        stored = values.T if turned else values
        permuted = family == "llama" and ours in ("attn_q", "attn_k")
        if permuted:
            heads = config.num_attention_heads if ours == "attn_q" else config.num_key_value_heads
            stored = stored.reshape(heads, 2, -1, stored.shape[1]).swapaxes(1, 2).reshape(stored.shape)
        own = kind if values.ndim == 2 else "F32"
        data, stored = quantized(np.ascontiguousarray(stored), own)
        tensors[f"{f'blk.{layer}.' if in_layer else ''}{ours}.{suffix}"] = data, own
        if permuted:
            stored = stored.reshape(heads, -1, 2, stored.shape[1]).swapaxes(1, 2).reshape(stored.shape)
        kept[name] = np.ascontiguousarray(stored.T if turned else stored)
    return tensors, kept


def quantized(values, kind):
    """Values in a type, and as they are read again; of types that NumPy cannot write, small random values."""
    type_ = GGMLQuantizationType[kind]
    if kind in SCALES:
        block, size = GGML_QUANT_SIZES[type_]
        shape = (len(values), values.shape[1] // block, size)
        data = np.random.default_rng(values.size).integers(0, 256, shape, np.uint8)
        scale = 1e-3
        for _ in range(2):  # values as large as those of a layer's matrix
            for start in SCALES[kind]:
                data[..., start : start + 2] = np.array([scale], np.float16).view(np.uint8)
            scale *= values.std() / quants.dequantize(data.reshape(len(values), -1), type_).std()
        data = data.reshape(len(values), -1)
    else:
        data = quants.quantize(values, type_)
    return data, quants.dequantize(data, type_).reshape(values.shape)


def tokenizer_metadata(tokenizer, name, **more):
    """Metadata of a byte-level tokenizer of `transformers`, of the kind that `name` stands for."""
    core = tokenizer.backend_tokenizer
    added = core.get_added_tokens_decoder()
    entries = {token: entry for entry, token in core.get_vocab().items()}
    merges = json.loads(core.to_str())["model"]["merges"]
    kinds = [(3 if added[token].special else 4) if token in added else 1 for token in sorted(entries)]
    metadata = dict(
        model="gpt2", pre=name, tokens=[entries[token] for token in sorted(entries)], token_type=kinds,
        merges=[" ".join(merge) for merge in merges], eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    if tokenizer.bos_token_id is not None:
        metadata["bos_token_id"] = tokenizer.bos_token_id
    metadata = {f"tokenizer.ggml.{key}": value for key, value in (metadata | more).items()}
    template = tokenizer.chat_template
    return metadata | ({"tokenizer.chat_template": template} if template else {})
