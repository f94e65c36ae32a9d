"""Write GGUF files for llama.cpp, and read their weights back."""

import json

import numpy as np

from .stock import nearest_architecture

# model_type in config.json; llama.cpp uses the same names, and does not support nanochat
FORMS = ("gpt2", "llama", "qwen3")
# our dtype -> names in gguf.GGMLQuantizationType and gguf.LlamaFileType
_TYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}


def gguf_architecture(config, tokenizer):
    """Return (model_type, obstacles): llama.cpp's closest architecture, and the settings that it does not support.

    llama.cpp uses the tanh approximation of GELU and looks it up in a float16 table. Exact GELU is not an obstacle,
    because the error of the approximation is as small as that of the table. In a model trained on Shakespeare, each of
    these two errors changes the logits by 1e-3. For comparison, q8_0 changes the logits by 2.5e-2.
    """
    form, obstacles = nearest_architecture(config, FORMS)
    if form == "gpt2" and config["activation"] == "relu2":
        obstacles.append("activation=relu2")
    if tokenizer.kind == "char":
        # llama.cpp's tokenizer for such a vocabulary never returns if a prompt has an unknown character whose first
        # byte is also the first byte of a known character
        if any(not token.isascii() for token in tokenizer.vocab):
            obstacles.append("a character tokenizer with characters other than ASCII")
    elif not tokenizer.splits_like_gpt2 or tokenizer.eot_id is None:
        obstacles.append("a tokenizer that is neither a character tokenizer nor a byte-level BPE as in GPT-2")
    return form, obstacles


def write_gguf(path, form, config, weights, tokenizer, dtype):
    """Write a GGUF file.

    Args:
        form: one of FORMS. config: the fields of GPTConfig. weights: the weights of the stock model.
        tokenizer: the Tokenizer; the model's vocabulary may be larger.
        dtype: a key of _TYPES, for the matrices. As in llama.cpp's converter, vectors and learned positions are
            float32. With q8_0, a matrix is float16 if the length of its rows is not a multiple of 32.
    """
    import gguf

    types = gguf.GGMLQuantizationType
    kind, file_type = _TYPES[dtype]
    writer = gguf.GGUFWriter(path, form)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    _add_config(writer, form, config)
    _add_tokenizer(writer, gguf.TokenType, tokenizer, config["vocab_size"])
    for name, ours in _tensor_names(form, config, weights).items():
        data = _convert(form, config, ours, weights[ours].float()).numpy()
        is_vector = data.ndim == 1 or name == "position_embd.weight"
        qtype = types.F32 if is_vector else types[kind]
        if qtype == types.Q8_0 and data.shape[1] % 32 != 0:
            qtype = types.F16
        with np.errstate(over="ignore"):  # the comparison of the logits finds an overflow
            data = gguf.quantize(np.ascontiguousarray(data), qtype)
        writer.add_tensor(name, data, raw_dtype=qtype)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_config(writer, form, config):
    writer.add_context_length(config["block_size"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_feed_forward_length(config["n_inner"])
    writer.add_head_count(config["n_head"])
    writer.add_vocab_size(config["vocab_size"])
    if form == "gpt2":
        writer.add_layer_norm_eps(config["norm_eps"])
        return
    writer.add_head_count_kv(config["n_kv_head"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])


def _add_tokenizer(writer, kinds, tokenizer, vocab_size):
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [kinds.UNUSED] * vocab_size
    spec = json.loads(tokenizer.text)
    added = {t["content"]: kinds.CONTROL if t["special"] else kinds.USER_DEFINED for t in spec["added_tokens"]}
    for token, i in tokenizer.vocab.items():
        # the format of RWKV's vocabulary, in which a backslash escapes the next character
        tokens[i] = token.replace("\\", r"\\") if tokenizer.kind == "char" else token
        types[i] = added.get(token, kinds.NORMAL)
    if tokenizer.kind == "char":
        # RWKV's tokenizer selects the longest matching vocabulary entry. Here, each entry is a character, so it splits
        # a text into characters. llama.cpp's other tokenizers require an end-of-text token
        writer.add_tokenizer_model("rwkv")
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        merges = spec["model"]["merges"]
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if tokenizer.eot_id is not None:
        writer.add_bos_token_id(tokenizer.eot_id)
        writer.add_eos_token_id(tokenizer.eot_id)
    writer.add_add_bos_token(False)


def _tensor_names(form, config, weights):
    """Return {name in GGUF: name in the stock model}, from the name table of the gguf package."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[form.upper()], config["n_layer"])
    return {names.get_name(ours, (".weight", ".bias")): ours for ours in weights}


def _convert(form, config, name, tensor, back=False):
    """Convert a tensor of the stock model to llama.cpp's layout, or back."""
    if form == "gpt2":
        # Conv1D stores matrices as (in, out)
        return tensor.t() if tensor.dim() == 2 and (".attn." in name or ".mlp." in name) else tensor
    if form == "llama" and (".q_proj." in name or ".k_proj." in name):
        # llama.cpp rotates the pairs (2i, 2i + 1) of each head, not (i, i + hs/2)
        half = config["head_dim"] // 2
        pairs = tensor.unflatten(0, (-1, half, 2) if back else (-1, 2, half))
        return pairs.transpose(1, 2).flatten(0, 2)
    return tensor


def read_gguf(path, form, config, names):
    """Read a file that `write_gguf` wrote. Return the stock model's weights in float32. names: the names of the
    weights in the stock model."""
    import gguf
    import torch

    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type).copy() for t in gguf.GGUFReader(path).tensors}
    return {
        ours: _convert(form, config, ours, torch.from_numpy(tensors[name]), back=True)
        for name, ours in _tensor_names(form, config, names).items()
    }
