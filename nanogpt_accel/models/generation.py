"""Generate text with a model, optionally as a stream."""

import copy

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation.streamers import BaseStreamer

# New ids are decoded together with this many previous ids, because some tokenizers drop a leading space
CONTEXT = 8


def text_after(decode, prompt_ids, new_ids):
    """Return the text of new_ids when they follow prompt_ids. decode: function that converts a list of ids to text."""
    context = prompt_ids[-CONTEXT:]
    return decode(context + new_ids)[len(decode(context)) :]


class _Streamer(BaseStreamer):
    """Pass new text to on_text as soon as the new ids form complete UTF-8 characters."""

    def __init__(self, prompt_ids, decode, on_text):
        self.decode, self.on_text = decode, on_text
        self.shown_ids, self.waiting_ids, self.is_prompt = list(prompt_ids), [], True

    def put(self, value):
        if self.is_prompt:  # `generate` passes the prompt first
            self.is_prompt = False
            return
        self.waiting_ids += value.flatten().tolist()
        if not self._text().endswith("\ufffd") or len(self.waiting_ids) > 4:
            self.flush()

    def end(self):
        self.is_prompt = True  # the next call of `generate` passes its prompt first again

    def flush(self):
        if self.waiting_ids:
            self.on_text(self._text())
            self.shown_ids, self.waiting_ids = (self.shown_ids + self.waiting_ids)[-CONTEXT:], []

    def _text(self):
        return text_after(self.decode, self.shown_ids, self.waiting_ids)


class _Sampler(LogitsProcessor):
    """Sample the next ids, and return scores that force `generate` to choose these ids.

    Each text has its own random generator, so that it does not depend on the other texts in the batch. The softmax is
    computed over the top_k candidates only, which makes a step on a CPU about 10 % faster.
    """

    def __init__(self, generators, vocab_size, temperature, top_k, top_p):
        self.generators, self.vocab_size, self.temperature, self.top_p = generators, vocab_size, temperature, top_p
        self.k = min(top_k, vocab_size) if top_k else vocab_size

    def __call__(self, input_ids, scores):
        logits, candidates = scores[:, : self.vocab_size].topk(1 if self.temperature == 0 else self.k)  # (B, k)
        chosen = torch.zeros(len(scores), 1, dtype=torch.long)
        if self.temperature > 0:
            logits = logits.cpu().double()  # topk returns them in descending order
            probs = F.softmax((logits - logits[:, :1]) / self.temperature, dim=-1)
            # keep the nucleus: the most likely candidates until their total probability reaches top_p
            probs = probs.masked_fill(probs.cumsum(-1) - probs >= self.top_p, 0.0)
            chosen = torch.cat([p.multinomial(1, generator=g) for p, g in zip(probs, self.generators, strict=True)])
        ids = candidates.gather(1, chosen.view(-1, 1).to(candidates.device))  # (B, 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, ids, 0.0)  # (B, V)


def generate(
    model,
    prompts,
    *,
    seeds,
    vocab_size,
    max_new_tokens,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    overflow="slide",
    decode=None,
    on_text=None,
):
    """Generate up to max_new_tokens tokens after each prompt, with transformers' `generate` and a KV cache.

    As in nanoGPT, generation does not stop at an end-of-text token. The model's generation_config is ignored.

    Args:
        model: a GPT in eval mode. prompts: lists of ids, none of them empty. seeds: one per prompt.
        vocab_size: vocabulary size of the tokenizer. Other ids of the model are padding and are never sampled.
        temperature: 0 for greedy decoding. top_k: 0 for all tokens. top_p: 1 for all tokens (Holtzman et al. 2020).
        overflow: what to do if a text reaches block_size. "slide": keep only the last half as context; nanoGPT drops
            one token per step, which is much slower. "stop": end the text. "extend": continue beyond the trained
            positions (for rotary positions only).
        on_text: called with each new part of the text, for a single prompt. decode: converts a list of ids to text.

    Returns:
        One list of new ids per prompt. Up to rounding, a text does not depend on the other prompts.
    """
    assert overflow != "extend" or model.config.position == "rotary"
    block_size = model.config.block_size
    # transformers fills unset fields, such as eos_token_id, from the model's generation_config. Therefore, use an empty
    # generation_config, in a shallow copy of the model, because a background save may be reading the original
    model = copy.copy(model)
    model.generation_config = GenerationConfig()
    settings = GenerationConfig(use_cache=True, do_sample=False, pad_token_id=0)
    streamer = _Streamer(prompts[0], decode, on_text) if on_text else None
    # on the CPU, so that a seed gives the same text on every device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    contexts, new_ids = [list(prompt) for prompt in prompts], [[] for _ in prompts]
    while True:
        if overflow == "slide":
            contexts = [c if len(c) < block_size else c[-(block_size // 2) :] for c in contexts]
        has_room = [overflow == "extend" or len(context) < block_size for context in contexts]
        active = [i for i, ids in enumerate(new_ids) if has_room[i] and len(ids) < max_new_tokens]
        if not active:
            break
        rows = [torch.tensor(contexts[i]) for i in active]
        ids = pad_sequence(rows, batch_first=True, padding_side="left").to(model.device)  # (B, T)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        # generate until one of the texts is complete or reaches block_size
        settings.max_new_tokens = min(max_new_tokens - len(new_ids[i]) for i in active)
        if overflow != "extend":
            settings.max_new_tokens = min(settings.max_new_tokens, block_size - ids.shape[1])
        sampler = _Sampler([generators[i] for i in active], vocab_size, temperature, top_k, top_p)
        inputs = {"inputs": ids, "attention_mask": mask.to(model.device), "streamer": streamer}
        output = model.generate(**inputs, generation_config=settings, logits_processor=[sampler])
        for i, row in zip(active, output[:, ids.shape[1] :].tolist(), strict=True):
            contexts[i] += row
            new_ids[i] += row
    if streamer is not None:
        streamer.flush()
    return new_ids
