"""Compare sampling speed on the CPU: this toolkit, transformers' GPT-2 with a KV cache, and nanoGPT.

    python benchmarks/sampling.py NANOGPT [rounds]

The programs alternate in one process. They sample 512 tokens with the settings of nanoGPT's sample.py (temperature 0.8,
top_k 200) from a GPT-2 124M with random weights. A fourth measurement samples a batch of 16 texts of 128 tokens.
The script prints tokens/s of each round and the medians.
"""

import statistics
import sys
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nanogpt_accel.distributed import cpu
from nanogpt_accel.model import GPT, GPTConfig
from nanogpt_accel.models.generation import generate

TOKENS, START, VOCAB = 512, 50256, 50257


def main(nanogpt, rounds=3):
    sys.path.insert(0, nanogpt)
    import model as nano

    torch.manual_seed(0)
    ours = GPT(GPTConfig(bias=True, activation="gelu_new", vocab_size=VOCAB)).eval()
    cpu.tune_generation(ours)
    stock = GPT2LMHeadModel(GPT2Config()).eval()
    theirs = nano.GPT(nano.GPTConfig(bias=True, vocab_size=VOCAB)).eval()

    def write(n, texts=1):
        generate(
            ours, [[START]] * texts, seeds=range(texts), vocab_size=VOCAB, max_new_tokens=n, temperature=0.8, top_k=200
        )

    def write_stock(n):
        stock.generate(
            torch.tensor([[START]]),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=True,
            temperature=0.8,
            top_k=200,
            pad_token_id=START,
        )

    @torch.no_grad()
    def write_nanogpt(n):
        theirs.generate(torch.tensor([[START]]), n, temperature=0.8, top_k=200)

    programs = {
        "nanogpt_accel": (write, TOKENS, 1),
        "transformers": (write_stock, TOKENS, 1),
        "nanoGPT": (write_nanogpt, TOKENS, 1),
        "nanogpt_accel, batch of 16": (lambda n: write(n, 16), 128, 16),
    }
    speeds = {name: [] for name in programs}
    for function, _, _ in programs.values():
        function(3)
    for _ in range(rounds):
        for name, (function, n, texts) in programs.items():
            start = time.perf_counter()
            function(n)
            speeds[name].append(n * texts / (time.perf_counter() - start))
            print(f"{name}: {speeds[name][-1]:.2f} tokens/s", flush=True)
    print("medians: " + ", ".join(f"{name} {statistics.median(values):.2f}" for name, values in speeds.items()))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
