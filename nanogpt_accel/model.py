"""Full definition of a GPT language model in a single file.

Every checkpoint contains a copy of this file, so it only imports torch, transformers and huggingface_hub. Classes and
parameters have the same names as in nanoGPT's model.py. The interface is that of transformers: GPT is a PreTrainedModel
with a KV cache, `generate` and configurable attention implementations. The default architecture is that of nanoGPT's
GPT-2; other settings of GPTConfig give the architectures of Llama, Qwen3 and nanochat.

References:
1) GPT-2, OpenAI: https://github.com/openai/gpt-2/blob/master/src/model.py
2) nanoGPT, Andrej Karpathy: https://github.com/karpathy/nanoGPT/blob/master/model.py
3) transformers: https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen3/modeling_qwen3.py
4) nanochat, Andrej Karpathy: https://github.com/karpathy/nanochat/blob/master/nanochat/gpt.py

Shapes in comments: B batch, T sequence length, C = n_embd, nh = n_head, nkv = n_kv_head, hs = head_dim, V = vocab_size.
"""

import math
from functools import partial

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

# how GPTConfig computes the sizes that are None by default
DERIVED_SIZES = {
    "n_kv_head": lambda config: config.n_head,
    "head_dim": lambda config: config.n_embd // config.n_head,
    "n_inner": lambda config: 4 * config.n_embd,
}


@strict
class GPTConfig(PreTrainedConfig):
    """The architecture of a GPT. The names and defaults are those of nanoGPT's GPT-2.

    References: RMSNorm (Zhang and Sennrich 2019), rotary positions (Su et al. 2021), QK-norm (Henry et al. 2020,
    Dehghani et al. 2023), grouped KV heads (Ainslie et al. 2023), SwiGLU (Shazeer 2020), squared ReLU (So et al. 2021),
    logit soft-cap (Gemma 2, 2024).
    """

    model_type = "nanogpt_accel"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "block_size",
        "final_logit_softcapping": "logit_softcap",
    }

    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64 for faster kernels
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float | int = 0.0
    bias: bool = False  # True: bias in Linears and LayerNorms, like GPT-2. False: a bit better and faster
    n_kv_head: int | None = None  # key-value heads, each shared by n_head / n_kv_head query heads. None: n_head
    head_dim: int | None = None  # None: n_embd / n_head
    n_inner: int | None = None  # hidden size of the MLP. None: 4 * n_embd
    norm: str = "layernorm"  # or "rmsnorm"
    norm_weight: bool = True  # whether norms have a learned weight
    norm_eps: float = 1e-5
    embd_norm: bool = False  # normalize the embeddings before the first block
    qk_norm: bool = False  # apply RMSNorm to the queries and keys of each head
    position: str = "learned"  # or "rotary"
    rope_theta: float | int = 10000.0  # base of the rotary frequencies
    activation: str = "gelu"  # exact GELU, as in nanoGPT; or "gelu_new" (tanh GELU, as in GPT-2), "relu2", "swiglu"
    logit_softcap: float | int | None = None  # limit the logits to +-logit_softcap with tanh. None: no limit
    tie_word_embeddings: bool = True  # share the weight of the token embedding and the output head
    initializer_range: float = 0.02
    zero_init: bool = False  # initialize the output projections of blocks with zeros
    mup_base_width: int | None = None  # n_embd at which initializer_range was tuned (muP). None: same init at any width
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.__dict__["n_kv_head"] is not None:  # to_dict returns this size under both names; ignore the second
            kwargs.pop("num_key_value_heads", None)
        # list all classes, so that AutoModel can load a saved GPT; save_pretrained adds only the class that it saves
        kwargs.setdefault("auto_map", {auto.__name__: f"model.{ours.__name__}" for auto, ours in AUTO_CLASSES.items()})
        super().__post_init__(**kwargs)

    def __getattribute__(self, key):
        """Return a field. A size that is None is computed from the current n_embd and n_head on every access."""
        value = super().__getattribute__(key)
        if value is None and (derive := DERIVED_SIZES.get(GPTConfig.attribute_map.get(key, key))):
            return derive(self)
        return value

    def to_dict(self):
        """Return the fields as a dict. If KV heads are shared, add num_key_value_heads, the name that PEFT requires."""
        is_shared = self.n_kv_head != self.n_head
        return super().to_dict() | ({"num_key_value_heads": self.n_kv_head} if is_shared else {})

    @property
    def width_multiplier(self):
        """The ratio of n_embd to mup_base_width, or 1 if mup_base_width is None."""
        return self.n_embd / self.mup_base_width if self.mup_base_width else 1.0

    def resolved(self):
        """Return the fields as a dict, with the derived sizes instead of None."""
        return self.to_dict() | {key: getattr(self, key) for key in DERIVED_SIZES}

    def to_diff_dict(self):
        """Return the content of config.json."""
        return {key: value for key, value in super().to_diff_dict().items() if key not in self.attribute_map}

    def validate_architecture(self):
        """Raise a ValueError if the settings are inconsistent. transformers calls this for every new config."""
        for key in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_inner"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if self.n_kv_head < 1 or self.n_head % self.n_kv_head != 0:
            raise ValueError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}")
        if self.__dict__["head_dim"] is None and self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.head_dim < 1:
            raise ValueError(f"head_dim={self.head_dim} must be at least 1")
        if self.position == "rotary" and self.head_dim % 2 != 0:
            raise ValueError(f"head_dim={self.head_dim} is odd, but rotary embeddings require an even head_dim")
        if self.mup_base_width is not None and self.mup_base_width < 1:
            raise ValueError(f"mup_base_width={self.mup_base_width} must be at least 1")
        if self.mup_base_width and self.tie_word_embeddings and not self.norm_weight:
            raise ValueError("mup_base_width with tie_word_embeddings=True requires norm_weight=True")
        for key, choices in {
            "activation": (*ACTIVATIONS, "swiglu"),
            "norm": ("layernorm", "rmsnorm"),
            "position": ("learned", "rotary"),
        }.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}={getattr(self, key)!r} must be one of {', '.join(choices)}")


def relu2(x):
    return F.relu(x).square()


ACTIVATIONS = {"gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh"), "relu2": relu2}


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        if self.weight is None:
            return super().forward(x)
        # under autocast, x is bfloat16 but the weight is float32; the fused kernel requires equal dtypes
        return super().forward(x.to(self.weight.dtype))


def make_norm(config):
    """Return a norm layer for the residual stream."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, eps=config.norm_eps, elementwise_affine=config.norm_weight)
    return nn.LayerNorm(
        config.n_embd,
        eps=config.norm_eps,
        elementwise_affine=config.norm_weight,
        bias=config.bias and config.norm_weight,
    )


def rotary_tables(config, position_ids):
    """Return the cosines and sines of the rotary angles, (B, 1, T, hs / 2) each, in float32.

    Computing them for every batch is cheap and, unlike a precomputed table, does not limit the sequence length.
    """
    pairs = torch.arange(0, config.head_dim, 2, device=position_ids.device).float() / config.head_dim  # (hs / 2,)
    # an elementwise product, because autocast would compute a matmul in bfloat16
    angles = position_ids[:, None, :, None].float() * (1.0 / config.rope_theta**pairs)  # (B, 1, T, hs / 2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotate each pair of dimensions (i, i + hs/2) of every head by its angle, in float32. x: (B, heads, T, hs)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def eager_attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Compute softmax(q k^T / sqrt(hs) + mask) v explicitly. SDPA gives the same result without a (T, T) matrix."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)  # (B, nh, T, hs)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    att = query @ key.transpose(-2, -1) * scaling  # (B, nh, T, T)
    if attention_mask is not None:
        att = att + attention_mask
    att = F.softmax(att, dim=-1, dtype=torch.float32).to(query.dtype)
    att = F.dropout(att, p=dropout, training=module.training)
    return (att @ value).transpose(1, 2), att  # (B, T, nh, hs), (B, nh, T, T)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.split_sizes = [n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
        # query, key and value projections of all heads, concatenated into one matrix
        self.c_attn = nn.Linear(config.n_embd, sum(self.split_sizes), bias=config.bias)
        # output projection
        self.c_proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        self.c_proj.adds_to_residual = True  # see GPT._init_weights
        self.resid_dropout = nn.Dropout(config.dropout)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps, elementwise_affine=config.norm_weight)
            self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps, elementwise_affine=config.norm_weight)
        self.config = config
        self.layer_idx = layer_idx
        # the attention functions of transformers read these attributes
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.num_key_value_groups = config.n_head // config.n_kv_head

    def forward(self, x, attention_mask=None, cache=None, rotary=None, **kwargs):
        B, T, _ = x.shape
        q, k, v = self.c_attn(x).split(self.split_sizes, dim=2)  # (B, T, nh * hs), and (B, T, nkv * hs) for k and v
        q = q.view(B, T, -1, self.config.head_dim).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, -1, self.config.head_dim).transpose(1, 2)  # (B, nkv, T, hs)
        v = v.view(B, T, -1, self.config.head_dim).transpose(1, 2)  # (B, nkv, T, hs)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        q, k = q.to(v.dtype), k.to(v.dtype)  # norms and rotary embeddings return float32
        if cache is not None:
            # the paged cache of continuous batching adds arguments for the attention function to kwargs
            k, v = cache.update(k, v, self.layer_idx, kwargs=kwargs)  # (B, nkv, T_past + T, hs)

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.dropout if self.training else 0.0
        y, weights = attention(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)

        y = y.reshape(B, T, -1)  # (B, T, nh * hs), the outputs of all heads side by side
        return self.resid_dropout(self.c_proj(y)), weights


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        # SwiGLU: the first n_inner rows of c_fc compute the gate, the other rows the values
        self.is_gated = config.activation == "swiglu"
        self.c_fc = nn.Linear(config.n_embd, (2 if self.is_gated else 1) * config.n_inner, bias=config.bias)
        self.act = F.silu if self.is_gated else ACTIVATIONS[config.activation]
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.c_proj.adds_to_residual = True
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, n_inner), or (B, T, 2 * n_inner) with SwiGLU
        if self.is_gated:
            gate, x = x.chunk(2, dim=-1)
            x = self.act(gate) * x
        else:
            x = self.act(x)
        return self.dropout(self.c_proj(x))  # (B, T, C)


class Block(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer_idx)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, attention_mask=None, cache=None, rotary=None, **kwargs):
        x = x + self.attn(self.ln_1(x), attention_mask, cache, rotary, **kwargs)[0]
        x = x + self.mlp(self.ln_2(x))
        return x  # (B, T, C)


def chunk_cross_entropy(x, weight, targets, softcap, needs_grad):
    """Return the summed cross-entropy of a chunk x, (n, C), and its gradient with respect to the logits, (n, V).

    The gradient has the dtype of x. FusedLinearCrossEntropy calls this for every chunk.
    """
    is_counted, targets = targets != -100, targets.clamp(min=0).unsqueeze(1)  # (n,), (n, 1)
    logits = F.linear(x, weight).float()  # (n, V)
    if softcap is not None:
        bounded = torch.tanh(logits / softcap)
        logits = softcap * bounded
    total = logits.logsumexp(1)  # (n,)
    loss = ((total - logits.gather(1, targets).squeeze(1)) * is_counted).sum()
    if not needs_grad:
        return loss, None
    # the gradient is softmax(logits) - one_hot(target), or zero for ignored targets
    total = total.masked_fill(~is_counted, math.inf).unsqueeze(1)  # (n, 1)
    if torch.compiler.is_compiling():  # this compiles to one kernel; scatter_add_ needs three
        is_target = torch.arange(logits.shape[1], device=logits.device) == targets  # (n, V)
        grad = (logits - total).exp() - (is_target & is_counted.unsqueeze(1)).float()
    else:  # in place, to reuse the memory of the logits
        grad = logits.sub_(total).exp_()
        grad.scatter_add_(1, targets, -is_counted.float().unsqueeze(1))
    if softcap is not None:
        grad *= bounded.square_().neg_().add_(1)  # the derivative of tanh: 1 - tanh^2
    return loss, grad.to(x.dtype)


class FusedLinearCrossEntropy(torch.autograd.Function):
    """Compute the summed cross-entropy of the logits x @ weight.T without having all logits in memory at once.

    The rows of x are processed in chunks. The forward pass also computes the gradients of each chunk, so that the
    backward pass does not need the logits. This follows Liger Kernel (Hsu et al. 2024).

    F.linear_cross_entropy in torch is similar, but it does not support autocast or a soft-cap, and it causes a graph
    break in torch.compile.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, softcap, chunk_size, needs_grad):
        """Return the loss in float32. x: (N, C). weight: (V, C), of the same dtype. targets: (N,); -100 is ignored."""
        loss = torch.zeros((), device=x.device)
        if needs_grad:
            grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(x), chunk_size):
            stop = start + chunk_size
            chunk = x[start:stop]
            chunk_loss, grad = chunk_cross_entropy(chunk, weight, targets[start:stop], softcap, needs_grad)
            loss += chunk_loss
            if not needs_grad:
                continue
            grad_x[start:stop] = grad @ weight
            if grad.dtype == torch.float32:
                grad_weight.addmm_(grad.t(), chunk)
            else:
                grad_weight += grad.t() @ chunk  # addmm_ cannot accumulate half-precision products in float32
            del grad  # free the memory before the next chunk
        if needs_grad:
            ctx.save_for_backward(grad_x, grad_weight)
            ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight = ctx.saved_tensors
        # in place, because these tensors are large; therefore, the backward pass can only run once
        return grad_x.mul_(grad_loss), grad_weight.mul_(grad_loss).to(ctx.dtype), None, None, None, None


class GPTPreTrainedModel(PreTrainedModel):
    """The base class of all models in this file: initializes weights and declares supported transformers features."""

    config_class = GPTConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": Block, "attentions": CausalSelfAttention}
    _input_embed_layer = "wte"

    def __init__(self, config):
        config.validate_architecture()  # validate again, because fields may have changed since the config was created
        super().__init__(config)

    def _init_weights(self, module):
        std, m = self.config.initializer_range, self.config.width_multiplier
        if isinstance(module, nn.Linear):
            # muP: the wider the layer's input, the smaller its initial weights; see width_scales in optim.py
            std /= m if hasattr(module, "is_head") else math.sqrt(m)
            # apply a scaled init to the 2 * n_layer projections that add to the residual stream, per GPT-2 paper
            if hasattr(module, "adds_to_residual"):
                std = 0.0 if self.config.zero_init else std / math.sqrt(2 * self.config.n_layer)
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None:
            init.constant_(module.weight, 1 / m if hasattr(module, "scales_logits") else 1.0)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)


class GPTModel(GPTPreTrainedModel):
    """The body of a GPT: embeddings, blocks and final norm. AutoModel can load it."""

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.ln_embd = make_norm(config) if config.embd_norm else None
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])
        self.ln_f = make_norm(config)
        if config.tie_word_embeddings:
            self.ln_f.scales_logits = True  # muP scales this norm instead of the head, which shares wte's weights
        self.post_init()  # initializes the weights with _init_weights

    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        past_key_values=None,
        **kwargs,
    ):
        """Return the final hidden states.

        Args:
            input_ids: (B, T) int64; or inputs_embeds: (B, T, C).
            attention_mask: (B, T_past + T), with 1 for tokens and 0 for padding. None: no padding.
            position_ids: (B, T) or (1, T). None: consecutive positions that start after the tokens in the cache.
            cache: a transformers Cache. past_key_values is its older name, which PEFT uses.
            use_cache: whether to return a KV cache. None: False in train mode, else config.use_cache.
            kwargs: output_hidden_states=True also returns the input of each block and the final hidden states.
                output_attentions=True also returns the attention weights. The rest is passed to the attention function.

        Returns:
            BaseModelOutputWithPast: last_hidden_state (B, T, C), the cache, hidden_states (n_layer + 1 tensors
            (B, T, C)) and attentions (n_layer tensors (B, nh, T, T_past + T)).

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds are given, or the sequence is longer than
                block_size and the model has learned positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is required")
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        tok_emb = self.wte(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        T, length = tok_emb.shape[1], None
        # without padding, position_ids or a cache, SDPA needs no mask: is_causal has the same effect
        is_plain = attention_mask is None and position_ids is None and cache is None
        if not (is_plain and self.config._attn_implementation == "sdpa"):
            attention_mask = create_causal_mask(self.config, tok_emb, attention_mask, cache, position_ids)
        if position_ids is None:
            T_past = cache.get_seq_length() if cache is not None else 0  # a static cache returns a tensor
            length = T_past + T
            position_ids = torch.arange(T, device=tok_emb.device).unsqueeze(0) + T_past  # (1, T)
        elif position_ids.device.type == "cpu" and not torch.compiler.is_compiling():  # item() would wait for a GPU
            length = position_ids.max().item() + 1
        is_learned = self.config.position == "learned"
        if is_learned and isinstance(length, int) and length > self.config.block_size:
            raise ValueError(
                f"a sequence of {length} tokens is longer than block_size={self.config.block_size}; shorten it, or set "
                "max_new_tokens to generate fewer tokens"
            )

        x, rotary = tok_emb, None
        if is_learned:
            x = x + self.wpe(position_ids)  # (B, T, C)
        else:
            rotary = rotary_tables(self.config, position_ids)
        if self.config.embd_norm:
            x = self.ln_embd(x)
        x = self.drop(x)
        for block in self.h[: self.config.n_layer]:  # self-speculative decoding lowers n_layer
            x = block(x, attention_mask, cache, rotary, **kwargs)
        return BaseModelOutputWithPast(self.ln_f(x), cache)


class GPT(GPTPreTrainedModel, GenerationMixin):
    """A decoder-only Transformer language model. AutoModelForCausalLM can load it."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    # with return_logits=False: maximum number of logits in memory; if there are more, the loss is computed in chunks.
    # None: 2**24 on a CPU (64 MB in float32), 2**27 on a GPU, where chunks of about a thousand rows are fastest
    largest_logits = None

    def __init__(self, config):
        super().__init__(config)
        self.transformer = GPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.is_head = True  # see _init_weights
        self.loss_type = "ForCausalLM"  # tells Trainer to count B * (T - 1) labels, because forward shifts the labels
        self.post_init()  # also ties lm_head to wte

    def set_block_size(self, block_size):
        """Set the context length. Learned position embeddings are cropped, as in nanoGPT's crop_block_size."""
        self.config.block_size = block_size
        if self.config.position == "learned":
            wpe = self.transformer.wpe
            assert block_size <= wpe.num_embeddings
            wpe.weight = nn.Parameter(wpe.weight[:block_size])
            wpe.num_embeddings = block_size

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        return_logits=True,
        **kwargs,
    ):
        """Return the next-token logits, and the loss if there are labels.

        Args:
            input_ids, attention_mask, position_ids, cache, inputs_embeds: see GPTModel.forward.
            labels: (B, T), unshifted: the model shifts them, as other transformers models do. -100 is ignored.
            use_cache: whether to return a KV cache. None: False in train mode or with labels, else config.use_cache.
            logits_to_keep: number of last positions to compute logits for (0: all), or a tensor of positions.
            num_items_in_batch: divide the summed loss by this instead of the number of labels. transformers' Trainer
                uses this argument for gradient accumulation.
            return_logits: if False and there are labels, the logits are not returned. If there are more logits than
                GPT.largest_logits, the loss is computed in chunks. Chunks change the loss only by rounding.
            kwargs: shift_labels (B, T) are labels that are already shifted: shift_labels[:, t] follows input_ids[:, t].
                It is not in the signature, because Trainer expects a data column for each parameter whose name contains
                "label". Other keyword arguments: see GPTModel.forward.

        Returns:
            CausalLMOutputWithPast: loss (nats per token, float32 scalar), logits (B, T, V), and the other outputs of
            GPTModel.forward. The logits are None if return_logits=False and there are labels.

        Raises:
            ValueError: the sequence is longer than block_size and the model has learned positions.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)  # (B, T), the last token has no target
        if use_cache is None and shift_labels is not None:
            use_cache = False
        outputs = self.transformer(input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, **kwargs)
        x = outputs.last_hidden_state  # (B, T, C)
        others = outputs.cache, outputs.hidden_states, outputs.attentions

        largest_logits = self.largest_logits or (2**24 if x.device.type == "cpu" else 2**27)
        n_chunks = math.ceil(x.shape[0] * x.shape[1] * self.config.vocab_size / largest_logits)
        if shift_labels is not None and not return_logits and n_chunks > 1:
            loss = self.chunked_loss(x, shift_labels, n_chunks, num_items_in_batch)
            return CausalLMOutputWithPast(loss, None, *others)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, keep])  # (B, T, V)
        if self.config.logit_softcap is not None:
            # with labels, apply the soft-cap in float32, as in chunked_loss
            logits = logits if shift_labels is None else logits.float()
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        if shift_labels is None:
            return CausalLMOutputWithPast(None, logits, *others)
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = F.cross_entropy(logits.float().flatten(0, 1), shift_labels.flatten(), reduction=reduction)
        if num_items_in_batch is not None:
            loss = loss / num_items_in_batch
        return CausalLMOutputWithPast(loss, logits if return_logits else None, *others)

    def chunked_loss(self, x, shift_labels, n_chunks, num_items_in_batch=None):
        """Return the loss without having all logits in memory at once. x: (B, T, C), shift_labels: (B, T)."""
        device, weight = x.device.type, self.lm_head.weight
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        x, targets = x.flatten(0, 1), shift_labels.flatten()  # (B * T, C), (B * T,)
        chunk_size = math.ceil(len(x) / n_chunks)
        if chunk_size > 128:
            chunk_size = math.ceil(chunk_size / 128) * 128  # a multiple of 128 rows, for efficient matmuls
        loss = FusedLinearCrossEntropy.apply(
            x.to(dtype), weight.to(dtype), targets, self.config.logit_softcap, chunk_size, torch.is_grad_enabled()
        )
        return loss / ((shift_labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


class GPTForSequenceClassification(GenericForSequenceClassification, GPTPreTrainedModel):
    """A GPT with a sequence classification head, which reads the hidden state of the last token that is not padding."""

    base_model_prefix = "transformer"


class GPTForTokenClassification(GenericForTokenClassification, GPTPreTrainedModel):
    """A GPT with a token classification head."""

    base_model_prefix = "transformer"


# If this file is imported, the from_pretrained of these classes knows GPT. Otherwise, from_pretrained needs
# trust_remote_code=True and uses the copy of this file that save_pretrained writes next to the weights
AUTO_CLASSES = {
    AutoConfig: GPTConfig,
    AutoModel: GPTModel,
    AutoModelForCausalLM: GPT,
    AutoModelForSequenceClassification: GPTForSequenceClassification,
    AutoModelForTokenClassification: GPTForTokenClassification,
}
if not __name__.startswith("transformers_modules."):  # a checkpoint's copy must not replace the class of another one
    AutoConfig.register(GPTConfig.model_type, GPTConfig, exist_ok=True)
for auto_class, model_class in AUTO_CLASSES.items():
    if auto_class is not AutoConfig:
        auto_class.register(GPTConfig, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)
# Trainer's label smoothing shifts the labels only for classes in this table, and `register` does not add GPT to it
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[GPTConfig.model_type] = GPT.__name__
