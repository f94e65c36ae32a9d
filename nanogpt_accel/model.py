"""The GPT, whole in this file. It travels with every checkpoint, so it imports torch and transformers only.

Names follow nanoGPT's model.py, the interface follows transformers: GPT is a PreTrainedModel with a KV cache,
`generate`, and interchangeable attention back ends.

References:
1) GPT-2, OpenAI: https://github.com/openai/gpt-2/blob/master/src/model.py
2) nanoGPT, Andrej Karpathy: https://github.com/karpathy/nanoGPT/blob/master/model.py
3) transformers: https://github.com/huggingface/transformers/blob/main/src/transformers/models/gpt2/modeling_gpt2.py

Shapes at line ends: B batch, T positions, C = n_embd, nh = n_head, hs = C / nh, V = vocab_size.
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs


@strict
class GPTConfig(PreTrainedConfig):
    """Shape of a GPT, under nanoGPT's names. Biases, GELU form and the rest default to nanoGPT's GPT-2.

    activation is "gelu" (the exact form, nanoGPT's) or "gelu_new" (the tanh form that OpenAI's weights use).
    """

    model_type = "nanogpt_accel"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "block_size",
    }

    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64 for faster kernels
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float | int = 0.0
    bias: bool = False
    activation: str = "gelu"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def validate_architecture(self):
        """Called by transformers when the config is made.

        Raises:
            ValueError: a shape that no GPT can have.
        """
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}: there are {', '.join(ACTIVATIONS)}")


ACTIVATIONS = {"gelu": lambda: nn.GELU(), "gelu_new": lambda: nn.GELU(approximate="tanh")}


def eager_attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Attention written out: softmax(q k^T / sqrt(hs) + mask) v. SDPA computes the same without storing (T, T)."""
    att = query @ key.transpose(-2, -1) * scaling  # (B, nh, T, T)
    if attention_mask is not None:
        att = att + attention_mask
    att = F.softmax(att, dim=-1, dtype=torch.float32).to(query.dtype)
    att = F.dropout(att, p=dropout, training=module.training)
    return (att @ value).transpose(1, 2), att  # (B, T, nh, hs), (B, nh, T, T)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        # key, query, value projections for all heads, but in a batch
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj.adds_to_residual = True
        self.resid_dropout = nn.Dropout(config.dropout)
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5
        self.is_causal = True  # asked for by transformers' attention functions

    def forward(self, x, attention_mask=None, past_key_values=None, **kwargs):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q = q.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, nh, T, hs)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)  # (B, nh, T_past + T, hs)

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.dropout if self.training else 0.0
        y, weights = attention(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)

        y = y.reshape(B, T, C)  # all heads side by side
        return self.resid_dropout(self.c_proj(y)), weights


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = ACTIVATIONS[config.activation]()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj.adds_to_residual = True
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))  # (B, T, C)


class Block(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, attention_mask=None, past_key_values=None, **kwargs):
        x = x + self.attn(self.ln_1(x), attention_mask, past_key_values, **kwargs)[0]
        x = x + self.mlp(self.ln_2(x))
        return x  # (B, T, C)


class GPT(PreTrainedModel, GenerationMixin):
    """A decoder-only Transformer language model, loadable with AutoModelForCausalLM."""

    config_class = GPTConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": Block, "attentions": CausalSelfAttention}

    def __init__(self, config):
        super().__init__(config)
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config, i) for i in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()  # draws the weights with _init_weights and ties lm_head to wte

    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            # what adds to the residual stream is scaled down, for it is added 2 * n_layer times (GPT-2 paper)
            if hasattr(module, "adds_to_residual"):
                std = std / math.sqrt(2 * self.config.n_layer)
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)

    def crop_block_size(self, block_size):
        """Shorten the context, by model surgery: positions from block_size on are dropped, as nanoGPT does."""
        assert block_size <= self.config.block_size
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size])
        self.transformer.wpe.num_embeddings = block_size

    def get_input_embeddings(self):
        return self.transformer.wte

    def set_input_embeddings(self, value):
        self.transformer.wte = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    @can_return_tuple
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        shift_labels=None,
        use_cache=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        **kwargs,
    ):
        """Next-token logits, and the loss where targets are given.

        Args:
            input_ids: (B, T) int64; or inputs_embeds: (B, T, C).
            attention_mask: (B, T_past + T), 1 where a token may be attended to; None for all.
            position_ids: (B, T) or (1, T); None continues from the cache.
            past_key_values: a transformers Cache.
            labels: (B, T), as everywhere in transformers: the model shifts them; -100 is ignored.
            shift_labels: (B, T), already shifted: shift_labels[:, t] is the token after input_ids[:, t].
            use_cache: return a KV cache; None: as the config says, but never in training or beside a loss.
            logits_to_keep: compute logits for this many last positions only, 0 for all.
            num_items_in_batch: divide the summed loss by this instead of the number of targets (Trainer's
                way of accumulating).

        Returns:
            CausalLMOutputWithPast: loss (nats a token, float32 scalar), logits (B, T, V), past_key_values.

        Raises:
            ValueError: a sequence that is longer than block_size.
        """
        has_targets = labels is not None or shift_labels is not None
        if use_cache is None:
            use_cache = self.config.use_cache and not (self.training or has_targets)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        tok_emb = self.transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        T = tok_emb.shape[1]
        T_past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if T_past + T > self.config.block_size:
            raise ValueError(f"a sequence of {T_past + T} tokens is longer than block_size={self.config.block_size}")
        # a plain training batch needs no mask under SDPA, which is causal by itself
        is_plain = attention_mask is None and position_ids is None and past_key_values is None
        if not (is_plain and self.config._attn_implementation == "sdpa"):
            attention_mask = create_causal_mask(
                config=self.config, inputs_embeds=tok_emb, attention_mask=attention_mask,
                past_key_values=past_key_values, position_ids=position_ids)
        if position_ids is None:
            position_ids = torch.arange(T_past, T_past + T, device=tok_emb.device).unsqueeze(0)  # (1, T)

        x = self.transformer.drop(tok_emb + self.transformer.wpe(position_ids))  # (B, T, C)
        for block in self.transformer.h:
            x = block(x, attention_mask, past_key_values, **kwargs)
        x = self.transformer.ln_f(x)

        logits = self.lm_head(x[:, -logits_to_keep:] if logits_to_keep else x)  # (B, T, V)
        loss = None
        if has_targets:
            if shift_labels is None:
                shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)  # (B, T), nothing follows the last one
            loss = F.cross_entropy(logits.float().flatten(0, 1), shift_labels.flatten(), ignore_index=-100,
                                   reduction="mean" if num_items_in_batch is None else "sum")
            if num_items_in_batch is not None:
                loss = loss / num_items_in_batch
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


# `AutoModelForCausalLM.from_pretrained` knows the class where this file is imported, and finds the copy of this
# file that save_pretrained puts beside the weights where it is not (trust_remote_code=True)
AutoConfig.register(GPTConfig.model_type, GPTConfig, exist_ok=True)
AutoModelForCausalLM.register(GPTConfig, GPT, exist_ok=True)
GPTConfig.register_for_auto_class()
GPT.register_for_auto_class("AutoModelForCausalLM")
