"""Text from a model, piece by piece as it comes."""

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation.streamers import BaseStreamer


class _Pieces(BaseStreamer):
    """Hands every new id to `on_text` as text; holds ids back while they end inside a UTF-8 character."""

    def __init__(self, decode, on_text):
        self.decode, self.on_text = decode, on_text
        self.is_prompt, self.held = True, []

    def put(self, value):
        if self.is_prompt:  # generate hands over the prompt first
            self.is_prompt = False
            return
        self.held += value.flatten().tolist()
        text = self.decode(self.held)
        if not text.endswith("\ufffd") or len(self.held) > 4:
            self.on_text(text)
            self.held = []

    def end(self):
        if self.held:
            self.on_text(self.decode(self.held))


class _Draw(LogitsProcessor):
    """Draws the next ids itself, and leaves generate a vocabulary of which only these are possible.

    So each text has its own stream of random numbers and does not depend on the texts beside it; and only the top_k
    candidates are softmaxed and drawn from, not the whole vocabulary, which on a CPU costs a tenth of a step.
    """

    def __init__(self, seeds, vocab_size, temperature, top_k, top_p):
        self.vocab_size, self.temperature, self.top_p = vocab_size, temperature, top_p
        self.k = min(top_k, vocab_size) if top_k else vocab_size
        # on the CPU, where the same seed gives the same text whatever the model runs on
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids, scores):
        likely, candidates = scores[:, :self.vocab_size].topk(1 if self.temperature == 0 else self.k)  # (B, k)
        chosen = torch.zeros(len(scores), 1, dtype=torch.long)
        if self.temperature > 0:
            probs = F.softmax(likely.float() / self.temperature, dim=-1).cpu()  # from the likeliest on
            # the nucleus: what it takes to make up top_p, the candidate that passes it included
            probs = probs.masked_fill(probs.cumsum(-1) - probs >= self.top_p, 0.0)
            chosen = torch.cat([p.multinomial(1, generator=g) for p, g in zip(probs, self.generators, strict=True)])
        ids = candidates.gather(1, chosen.view(-1, 1).to(candidates.device))  # (B, 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, ids, 0.0)  # (B, V)


def generate(model, prompts, *, seeds, vocab_size, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0,
             overflow="slide", decode=None, on_text=None):
    """Write up to max_new_tokens tokens after each prompt, with transformers' generate and its KV cache.

    An end-of-text token is a token like others, as in nanoGPT.

    Args:
        model: a GPT in eval mode. prompts: lists of ids, 1 to block_size of them each. seeds: a number for each.
        vocab_size: ids from here on are padding rows of the embedding and are never drawn.
        temperature: 0 takes the likeliest token. top_k: 0 keeps all. top_p: 1 keeps all (Holtzman et al. 2020).
        overflow: what happens where the longest text reaches block_size. "slide": the last half of the window is
            the new context, far cheaper than nanoGPT's new window for every token; "stop"; or "extend", for rotary
            positions only: go on with positions that were not trained.
        on_text: of a single prompt, called with each new piece of text as it comes. decode: list of ids -> text.

    Returns:
        A list of new ids for each prompt, all of one length.
    """
    assert overflow != "extend" or model.config.position == "rotary"
    block_size = model.config.block_size
    draw = _Draw(seeds, vocab_size, temperature, top_k, top_p)
    # what the model's generation_config says of the last two must not hold here: no token ends a text (this one is
    # never drawn), and padding rows are left out by _Draw
    settings = GenerationConfig(use_cache=True, do_sample=False, pad_token_id=0, eos_token_id=model.config.vocab_size,
                                suppress_tokens=[])
    contexts, new_ids = [list(prompt) for prompt in prompts], [[] for _ in prompts]
    while (missing := max_new_tokens - len(new_ids[0])) > 0:
        if max(map(len, contexts)) >= block_size and overflow != "extend":
            if overflow == "stop":
                break
            contexts = [context[-(block_size // 2):] for context in contexts]
        longest = max(map(len, contexts))
        settings.max_new_tokens = missing if overflow == "extend" else min(block_size - longest, missing)
        # shorter prompts are padded on the left, where the mask hides it
        padded = [[0] * (longest - len(context)) + context for context in contexts]
        mask = [[0] * (longest - len(context)) + [1] * len(context) for context in contexts]
        ids = model.generate(
            torch.tensor(padded, device=model.device), attention_mask=torch.tensor(mask, device=model.device),
            generation_config=settings, logits_processor=[draw],
            streamer=_Pieces(decode, on_text) if on_text else None)
        for context, new, row in zip(contexts, new_ids, ids[:, longest:].tolist(), strict=True):
            context += row
            new += row
    return new_ids
