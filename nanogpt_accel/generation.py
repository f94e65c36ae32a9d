"""Text from a model, piece by piece as it comes."""

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer


class _Pieces(BaseStreamer):
    """Hands every new id to `on_text` as text; holds ids back while they end inside a UTF-8 character."""

    def __init__(self, decode, on_text):
        self.decode, self.on_text = decode, on_text
        self.is_prompt, self.held, self.ids = True, [], []

    def put(self, value):
        if self.is_prompt:  # generate hands over the prompt first
            self.is_prompt = False
            return
        self.ids += value.flatten().tolist()
        self.held += value.flatten().tolist()
        text = self.decode(self.held)
        if not text.endswith("\ufffd") or len(self.held) > 4:
            self.on_text(text)
            self.held = []

    def end(self):
        if self.held:
            self.on_text(self.decode(self.held))


def generate(model, prompt_ids, decode, on_text, *, vocab_size, max_new_tokens, temperature=1.0, top_k=0,
             top_p=1.0, seed=1337):
    """Write max_new_tokens tokens after a prompt, with transformers' generate and its KV cache.

    Past block_size the text goes on with the last half of the window as its new context: learned positions
    have no place for more, and keeping half is far cheaper than nanoGPT's new window for every token.
    An end-of-text token is a token like others, as in nanoGPT.

    Args:
        model: a GPT in eval mode. prompt_ids: list of ids, 1 to block_size of them.
        decode: list of ids -> text. on_text: called with each new piece of text.
        vocab_size: ids from here on are padding rows of the embedding and are never drawn.
        temperature: 0 takes the likeliest token. top_k: 0 keeps all. top_p: 1 keeps all (Holtzman et al. 2020).
        seed: of the draws.

    Returns:
        The list of new ids.
    """
    block_size = model.config.block_size
    torch.manual_seed(seed)
    settings = GenerationConfig(
        use_cache=True, do_sample=temperature > 0,
        # (what only drawing uses is not handed over where nothing is drawn, or transformers warns)
        **(dict(temperature=temperature, top_k=top_k, top_p=top_p) if temperature > 0 else {}),
        suppress_tokens=list(range(vocab_size, model.config.vocab_size)) or None, pad_token_id=0)
    context, new_ids = list(prompt_ids), []
    while len(new_ids) < max_new_tokens:
        if len(context) >= block_size:
            context = context[-(block_size // 2):]
        settings.max_new_tokens = min(block_size - len(context), max_new_tokens - len(new_ids))
        pieces = _Pieces(decode, on_text)
        input_ids = torch.tensor([context], device=model.device)  # (1, T)
        model.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=settings,
                       streamer=pieces)
        context += pieces.ids
        new_ids += pieces.ids
    return new_ids
