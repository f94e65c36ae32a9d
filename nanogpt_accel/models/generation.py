"""Text from a model, piece by piece as it comes."""

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation.streamers import BaseStreamer

CONTEXT = 8  # ids before a piece of text that it is decoded with, for what a tokenizer drops at the beginning of a text


def text_after(decode, prompt_ids, new_ids):
    """The text of new_ids where it goes on from a prompt. decode: list of ids -> text."""
    before = prompt_ids[-CONTEXT:]
    return decode(before + new_ids)[len(decode(before)) :]


class _Pieces(BaseStreamer):
    """Hands the text of every new id to `on_text`; holds ids back while they end inside a UTF-8 character."""

    def __init__(self, prompt_ids, decode, on_text):
        self.decode, self.on_text = decode, on_text
        self.shown, self.held, self.is_prompt = list(prompt_ids), [], True

    def put(self, value):
        if self.is_prompt:  # generate hands over the context first
            self.is_prompt = False
            return
        self.held += value.flatten().tolist()
        text = text_after(self.decode, self.shown, self.held)
        if not text.endswith("\ufffd") or len(self.held) > 4:
            self.show(text)

    def show(self, text):
        self.on_text(text)
        self.shown, self.held = (self.shown + self.held)[-CONTEXT:], []

    def end(self):
        self.is_prompt = True  # of the next call of generate, which goes on with the text


class _Draw(LogitsProcessor):
    """Draws the next ids itself, and leaves generate a vocabulary of which only these are possible.

    So each text has its own stream of random numbers and does not depend on the texts beside it; and only the top_k
    candidates are softmaxed and drawn from, not the whole vocabulary, which on a CPU costs a tenth of a step.
    """

    def __init__(self, generators, vocab_size, temperature, top_k, top_p):
        self.generators, self.vocab_size, self.temperature, self.top_p = generators, vocab_size, temperature, top_p
        self.k = min(top_k, vocab_size) if top_k else vocab_size

    def __call__(self, input_ids, scores):
        likely, candidates = scores[:, : self.vocab_size].topk(1 if self.temperature == 0 else self.k)  # (B, k)
        chosen = torch.zeros(len(scores), 1, dtype=torch.long)
        if self.temperature > 0:
            likely = likely.cpu().double()  # from the likeliest on
            probs = F.softmax((likely - likely[:, :1]) / self.temperature, dim=-1)
            # the nucleus: what it takes to make up top_p, the candidate that passes it included
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
    """Write up to max_new_tokens tokens after each prompt, with transformers' generate and its KV cache.

    An end-of-text token is a token like others, as in nanoGPT.

    Args:
        model: a GPT in eval mode. prompts: lists of ids, 1 or more each. seeds: a number for each.
        vocab_size: ids from here on are padding rows of the embedding and are never drawn.
        temperature: 0 takes the likeliest token. top_k: 0 keeps all. top_p: 1 keeps all (Holtzman et al. 2020).
        overflow: what happens where a text reaches block_size. "slide": the last half of the window is its new
            context, far cheaper than nanoGPT's new window for every token; "stop"; or "extend", for rotary positions
            only: go on with positions that were not trained.
        on_text: of a single prompt, called with each new piece of text as it comes. decode: list of ids -> text.

    Returns:
        A list of new ids for each prompt. But for rounding it is the same whatever stands beside it.
    """
    assert overflow != "extend" or model.config.position == "rotary"
    block_size = model.config.block_size
    settings = GenerationConfig(use_cache=True, do_sample=False, pad_token_id=0)
    pieces = _Pieces(prompts[0], decode, on_text) if on_text else None
    # on the CPU, where the same seed gives the same text whatever the model runs on
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    contexts, new_ids = [list(prompt) for prompt in prompts], [[] for _ in prompts]
    # the options above are all that holds here, whatever the model's generation_config says of eos or penalties
    own, model.generation_config = model.generation_config, GenerationConfig()
    while True:
        if overflow == "slide":
            contexts = [c if len(c) < block_size else c[-(block_size // 2) :] for c in contexts]
        active = [
            i
            for i, context in enumerate(contexts)
            if len(new_ids[i]) < max_new_tokens and (overflow == "extend" or len(context) < block_size)
        ]
        if not active:
            break
        # until the first of them is done or full; shorter ones are padded on the left, where the mask hides it
        longest = max(len(contexts[i]) for i in active)
        settings.max_new_tokens = min(max_new_tokens - len(new_ids[i]) for i in active)
        if overflow != "extend":
            settings.max_new_tokens = min(settings.max_new_tokens, block_size - longest)
        padded = [[0] * (longest - len(contexts[i])) + contexts[i] for i in active]
        mask = [[0] * (longest - len(contexts[i])) + [1] * len(contexts[i]) for i in active]
        draw = _Draw([generators[i] for i in active], vocab_size, temperature, top_k, top_p)
        ids = model.generate(
            torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=settings,
            logits_processor=[draw],
            streamer=pieces,
        )
        for i, row in zip(active, ids[:, longest:].tolist(), strict=True):
            contexts[i] += row
            new_ids[i] += row
    model.generation_config = own
    if pieces is not None and pieces.held:
        pieces.show(text_after(decode, pieces.shown, pieces.held))
    return new_ids
