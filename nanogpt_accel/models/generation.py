"""Generate text with a model, optionally as a stream."""

import copy

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

# New ids are decoded together with this many previous ids, because many tokenizers drop the leading space of a text
CONTEXT = 8


def text_after(decode, prompt_ids, new_ids, stop=()):
    """Return the text that new_ids add to the text of prompt_ids. The result ends before the first stop string.

    decode: function that converts a list of ids to text.
    """
    text = decode(prompt_ids + new_ids)[len(decode(prompt_ids)) :]
    return text[: _find_first(text, stop)]


def _find_first(text, stop):
    """Return the position of the first stop string in a text, or None if it contains no stop string."""
    return min((text.find(word) for word in stop if word in text), default=None)


class TextStream:
    """Decode ids incrementally. All parts together equal text_after(decode, prompt_ids, new_ids).

    tokenizers' DecodeStream is not used, for two reasons. DecodeStream never returns the end of a text whose last
    character is incomplete. It raises an error if a byte-fallback token starts a character and the next token does not
    continue this character.
    """

    def __init__(self, decode, prompt_ids):
        self.decode, self.context, self.waiting = decode, prompt_ids[-CONTEXT:], []

    def add(self, new_id):
        """Add an id. Return the new text, or "" if its last character may be incomplete."""
        self.waiting.append(new_id)
        text = text_after(self.decode, self.context, self.waiting)
        return "" if text.endswith("\ufffd") else self._complete(text)

    def flush(self):
        """Return the rest of the text, in which an incomplete character is U+FFFD."""
        return self._complete(text_after(self.decode, self.context, self.waiting))

    def _complete(self, text):
        if text:  # ids without text must not become the context: decoding would drop a leading space after them
            self.context, self.waiting = (self.context + self.waiting)[-CONTEXT:], []
        return text


class _Sample:
    """One generated text.

    ids: the new ids without the end-of-text token. is_done: whether the end-of-text token or a stop string was
        generated.
    """

    def __init__(self, prompt_ids, eos_id, stop, decode, on_text):
        self.ids, self.is_done, self.eos_id, self.stop, self.on_text = [], False, eos_id, stop, on_text
        self.stream = TextStream(decode, prompt_ids) if stop or on_text else None
        self.pending = ""  # text that is not shown yet, because it may be the start of a stop string

    def add(self, new_id):
        if new_id == self.eos_id:
            self.is_done = True
            return
        self.ids.append(new_id)
        if self.stream:
            self._show(self.stream.add(new_id))

    def end(self):
        if self.stream:
            self._show(self.stream.flush(), is_last=True)

    def _show(self, text, is_last=False):
        self.pending += text
        end = _find_first(self.pending, self.stop)
        shown = self.pending[:end]
        if end is not None:
            self.is_done, self.stream = True, None
        elif self.stop and not is_last:
            starts = [word[:n] for word in self.stop for n in range(len(word))]
            shown = shown[: len(shown) - max(len(start) for start in starts if shown.endswith(start))]
        self.pending = self.pending[len(shown) :]
        if shown and self.on_text:
            self.on_text(shown)


class _Stop(StoppingCriteria):
    """Collect the new ids of each sample. Stop `generate` as soon as one sample is done."""

    def __init__(self, samples):
        self.samples = samples

    def __call__(self, input_ids, scores):
        for sample, new_id in zip(self.samples, input_ids[:, -1].tolist(), strict=True):
            sample.add(new_id)
        is_done = any(sample.is_done for sample in self.samples)
        return torch.full((len(input_ids),), is_done, device=input_ids.device)


class _Sampler(LogitsProcessor):
    """Sample the next ids, and return scores that force `generate` to choose these ids.

    Each text of the batch has its own random generator, so that no text depends on the other texts. The softmax is
    computed over the top_k candidates only, which makes a step on a CPU about 10 % faster.
    """

    def __init__(self, generators, vocab_size, temperature, top_k, top_p):
        self.generators, self.vocab_size, self.temperature, self.top_p = generators, vocab_size, temperature, top_p
        self.k = min(top_k, vocab_size) if top_k else vocab_size

    def __call__(self, input_ids, scores):
        logits, candidates = scores[:, : self.vocab_size].topk(1 if self.temperature == 0 else self.k)  # (B, k)
        if not logits[:, 0].isfinite().all():  # topk treats NaN as the largest number
            problem = "the logits contain NaN or Inf, because training diverged or the weights are damaged"
            raise FloatingPointError(f"{problem}; use an earlier checkpoint")
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
    eos_id=None,
    stop=(),
    decode=None,
    on_text=None,
):
    """Generate up to max_new_tokens tokens after each prompt, with transformers' `generate` and a KV cache.

    Without eos_id, generation does not stop at an end-of-text token, as in nanoGPT. The model's generation_config is
    ignored.

    Args:
        model: a GPT in eval mode. prompts: lists of ids, none of them empty. seeds: one per prompt.
        vocab_size: vocabulary size of the tokenizer. Other ids of the model are padding and are never sampled.
        temperature: 0 for greedy decoding. top_k: 0 for all tokens. top_p: 1 for all tokens (Holtzman et al. 2020).
        overflow: what to do if a text reaches block_size. "slide": keep only the last half as context; nanoGPT drops
            one token per step, which is much slower. "stop": end the text. "extend": continue beyond the trained
            positions (for rotary positions only).
        eos_id: end a text at this id, which is not returned.
        stop: end a text at one of these strings. The returned ids include the string; text_after removes it.
        on_text: called with each new part of the text, without the stop string; for a single prompt only.
        decode: converts a list of ids to text; required for stop and on_text.

    Returns:
        One list of new ids per prompt. Up to rounding, a text does not depend on the other prompts.

    Raises:
        FloatingPointError: the logits contain NaN or Inf.
    """
    assert overflow != "extend" or model.config.position == "rotary"
    block_size = model.config.block_size
    # transformers fills unset fields, such as eos_token_id, from the model's generation_config. Therefore, use an empty
    # generation_config. Set it in a shallow copy of the model, because a background save may be reading the original
    model = copy.copy(model)
    model.generation_config = GenerationConfig()
    settings = GenerationConfig(use_cache=True, do_sample=False, pad_token_id=0)
    # on the CPU, so that a seed gives the same text on every device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    contexts = [list(prompt) for prompt in prompts]
    samples = [_Sample(list(prompt), eos_id, stop, decode, on_text) for prompt in prompts]
    while True:
        if overflow == "slide":
            contexts = [c if len(c) < block_size else c[-(block_size // 2) :] for c in contexts]
        has_room = [overflow == "extend" or len(context) < block_size for context in contexts]
        active = [i for i, s in enumerate(samples) if has_room[i] and not s.is_done and len(s.ids) < max_new_tokens]
        if not active:
            break
        rows = [torch.tensor(contexts[i]) for i in active]
        ids = pad_sequence(rows, batch_first=True, padding_side="left").to(model.device)  # (B, T)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        # generate until one of the texts is complete or reaches block_size
        settings.max_new_tokens = min(max_new_tokens - len(samples[i].ids) for i in active)
        if overflow != "extend":
            settings.max_new_tokens = min(settings.max_new_tokens, block_size - ids.shape[1])
        sampler = _Sampler([generators[i] for i in active], vocab_size, temperature, top_k, top_p)
        output = model.generate(
            inputs=ids,
            attention_mask=mask.to(model.device),
            generation_config=settings,
            logits_processor=[sampler],
            stopping_criteria=[_Stop([samples[i] for i in active])],
        )
        for i, row in zip(active, output[:, ids.shape[1] :].tolist(), strict=True):
            contexts[i] += row
    for sample in samples:
        sample.end()
    return [sample.ids for sample in samples]
