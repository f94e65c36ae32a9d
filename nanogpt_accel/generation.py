"""Text from a model, piece by piece as it comes."""

import torch
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


class _NoPadding(LogitsProcessor):
    """Rows of the embedding that only round it up are never drawn."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def __call__(self, input_ids, scores):
        scores[:, self.vocab_size:] = -torch.inf  # (B, V)
        return scores


def generate(model, prompts, *, vocab_size, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=1337,
             overflow="slide", decode=None, on_text=None):
    """Write up to max_new_tokens tokens after each prompt, with transformers' generate and its KV cache.

    An end-of-text token is a token like others, as in nanoGPT.

    Args:
        model: a GPT in eval mode. prompts: lists of ids, 1 to block_size of them each.
        vocab_size: ids from here on are padding rows of the embedding and are never drawn.
        temperature: 0 takes the likeliest token. top_k: 0 keeps all. top_p: 1 keeps all (Holtzman et al. 2020).
        seed: of the draws; a text depends on it and on the prompts beside it.
        overflow: what happens where the longest text reaches block_size. "slide": the last half of the window is
            the new context, far cheaper than nanoGPT's new window for every token; "stop"; or "extend", for rotary
            positions only: go on with positions that were not trained.
        on_text: of a single prompt, called with each new piece of text as it comes. decode: list of ids -> text.

    Returns:
        A list of new ids for each prompt, all of one length.
    """
    assert overflow != "extend" or model.config.position == "rotary"
    block_size = model.config.block_size
    torch.manual_seed(seed)
    settings = GenerationConfig(
        use_cache=True, do_sample=temperature > 0,
        # (what only drawing uses is not handed over where nothing is drawn, or transformers warns)
        **(dict(temperature=temperature, top_k=top_k, top_p=top_p) if temperature > 0 else {}),
        # what the model's generation_config says of these two must not hold here: no token ends a text (this one is
        # never drawn), and padding rows are left out by faster means
        eos_token_id=model.config.vocab_size, suppress_tokens=[], pad_token_id=0)
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
            generation_config=settings, logits_processor=[_NoPadding(vocab_size)],
            streamer=_Pieces(decode, on_text) if on_text else None)
        for context, new, row in zip(contexts, new_ids, ids[:, longest:].tolist(), strict=True):
            context += row
            new += row
    return new_ids
