"""generation.py and `sample`: a text depends on its seed and its prompt only."""

import json
import shutil
import sys
from contextlib import nullcontext

import pytest
import torch
from tokenizer_kinds import tokenizer_json
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from nanogpt_accel.__main__ import main
from nanogpt_accel.data.tokenizer import Tokenizer
from nanogpt_accel.model import GPT, GPTConfig
from nanogpt_accel.models.generation import generate, text_after

V, T_MAX = 40, 16
ROTARY = {"position": "rotary", "norm": "rmsnorm", "n_kv_head": 2}
PROMPTS = [[3, 1, 4], [1] * T_MAX, [5, 9, 2, 6, 5, 3, 5, 8, 9], [7]]


def gpt(**changes):
    torch.manual_seed(0)
    shape = {"vocab_size": V, "block_size": T_MAX, "n_layer": 2, "n_head": 4, "n_embd": 32, "initializer_range": 0.3}
    return GPT(GPTConfig(**shape | changes)).eval()


def write(model, prompts, **options):
    return generate(
        model, prompts, **{"seeds": range(len(prompts)), "vocab_size": V, "max_new_tokens": 30, "top_k": 12} | options
    )


@pytest.mark.parametrize("shape", [{}, ROTARY], ids=["learned", "rotary"])
@pytest.mark.parametrize("overflow", ["slide", "stop", "extend"])
def test_a_text_does_not_depend_on_its_batch(shape, overflow):
    if overflow == "extend" and not shape:
        return
    model = gpt(**shape)
    together = write(model, PROMPTS, overflow=overflow)
    alone = [write(model, [prompt], seeds=[seed], overflow=overflow)[0] for seed, prompt in enumerate(PROMPTS)]
    assert together == alone
    lengths = [30] * 4 if overflow != "stop" else [T_MAX - len(prompt) for prompt in PROMPTS]
    assert [len(ids) for ids in alone] == lengths
    assert together != write(model, PROMPTS, overflow=overflow, seeds=range(7, 11))


def test_slide_keeps_the_last_half_of_the_window():
    """Compare with a loop that generates token by token, and cuts a full window to its last half."""
    model, context, expected = gpt(initializer_range=0.6, tie_word_embeddings=False), PROMPTS[2], []
    with torch.no_grad():
        while len(expected) < 30:
            context = context if len(context) < T_MAX else context[-T_MAX // 2 :]
            expected.append(model(torch.tensor([context])).logits[0, -1].argmax().item())
            context = [*context, expected[-1]]
    assert write(model, [PROMPTS[2]], temperature=0) == [expected] and len(set(expected)) > 3


def test_top_k_top_p_and_temperature_give_the_expected_distribution():
    """Compare the frequencies of 1,000 sampled tokens with the truncated softmax."""
    model = gpt()
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    for options in (
        {"top_k": 3},
        {"top_k": 0, "top_p": 0.6},
        {"top_k": 5, "temperature": 2.0},
        {"top_k": 5, "top_p": 0.5},
    ):
        drawn = write(model, [PROMPTS[0]] * 1000, seeds=range(1000), max_new_tokens=1, **options)
        shares = torch.bincount(torch.tensor(drawn)[:, 0], minlength=V) / 1000
        likely, ids = (logits / options.get("temperature", 1.0)).sort(descending=True)
        probs = likely[: options["top_k"] or V].softmax(0)
        probs = probs[(probs.cumsum(0) - probs) < options.get("top_p", 1.0)]
        expected = torch.zeros(V).scatter(0, ids[: len(probs)], probs / probs.sum())
        assert (shares - expected).abs().max() < 0.06, options
        assert set(shares.nonzero().flatten().tolist()) <= set(expected.nonzero().flatten().tolist())


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-9])
def test_a_tiny_temperature_is_greedy(temperature):
    model = gpt()
    assert write(model, PROMPTS, temperature=temperature) == write(model, PROMPTS, temperature=0)


def test_the_models_generation_config_has_no_effect():
    model, before = gpt(), write(gpt(), PROMPTS, temperature=0)
    model.generation_config.update(repetition_penalty=5.0, num_beams=3, eos_token_id=before[0][2], max_length=3)
    assert write(model, PROMPTS, temperature=0) == before
    assert model.generation_config.num_beams == 3


@pytest.mark.parametrize("fails", [False, True])
def test_the_models_generation_config_is_never_modified(fails):
    """A background save may read it at any time, so it is checked in every forward pass."""
    model, unchanged = gpt(), []
    model.generation_config.update(repetition_penalty=5.0, eos_token_id=3, suppress_tokens=[1, 2])
    own, values = model.generation_config, model.generation_config.to_dict()

    def check(*args):
        unchanged.append(model.generation_config is own and own.to_dict() == values)
        if fails and len(unchanged) == 3:
            raise KeyboardInterrupt

    model.lm_head.register_forward_hook(check)
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
        write(model, PROMPTS[:1], decode=str, on_text=check)
    check()
    assert len(unchanged) == (4 if fails else 61) and all(unchanged)


# ---- text


def metaspace():
    """A tokenizer of Llama 2's kind, which writes spaces as ▁ and drops a leading space."""
    symbols = ["<s>", *"▁abcdefg", "▁ab", "▁cd"]
    backend = Backend(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, [("▁a", "b")][:0], unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend.to_str()


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """A stock Llama with 11 tokens in the folder `llama`."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=11,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            initializer_range=0.5,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).save_pretrained("llama")
    Tokenizer(metaspace()).save("llama")


def test_streamed_batched_and_json_texts_are_equal(llama, capsys):
    options = ["prompt=a b", "num_samples=4", "max_new_tokens=40", "seed=3"]
    assert main(["sample", "llama", *options]) == 0
    streamed = capsys.readouterr().out
    assert main(["sample", "llama", *options, "batch_size=4"]) == 0
    assert capsys.readouterr().out == streamed
    assert " " in streamed.splitlines()[0][3:]
    assert main(["sample", "llama", *options, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["seed"] for line in lines] == [3, 4, 5, 6]
    assert "".join(f"{line['prompt']}{line['text']}\n---------------\n" for line in lines) == streamed


def test_control_characters_are_shown_in_a_terminal_only(llama, capsys, monkeypatch):
    """A file gets the text unchanged."""
    tokenizer = Tokenizer.char(["a\x1b[2J\x07\n"])
    shutil.rmtree("llama")
    gpt(vocab_size=tokenizer.vocab_size).save_pretrained("llama")
    tokenizer.save("llama")
    capsys.readouterr()
    words = ["sample", "llama", "prompt=\x1b[2J", "num_samples=2", "max_new_tokens=40", "temperature=2"]
    for batch_size in ("batch_size=1", "batch_size=2"):
        assert main([*words, batch_size]) == 0
        raw = capsys.readouterr().out
        with monkeypatch.context() as patch:
            patch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
            assert main([*words, batch_size]) == 0
        shown = capsys.readouterr().out
        assert raw.count("\x1b") > 4 and shown == raw.replace("\x1b", r"\x1b").replace("\x07", r"\x07")


def test_text_after_a_prompt_keeps_its_space():
    tokenizer = Tokenizer(metaspace())
    prompt, new = tokenizer.encode_prompt("a b"), tokenizer.encode_prompt("c d")
    assert text_after(tokenizer.decode, prompt, new) == " c d"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("options", [[], ["temperature=0"], ["batch_size=2", "--json"]], ids=["", "greedy", "batch"])
def test_weights_with_nan_or_inf_are_reported(llama, call, value, options):
    model = LlamaForCausalLM.from_pretrained("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = value
    model.save_pretrained("llama")
    (line,) = call("sample", "llama", "prompt=a", "num_samples=2", *options, status=2).splitlines()
    assert line.startswith("error: llama: the logits contain NaN or Inf") and "earlier checkpoint" in line


def test_a_prompt_with_characters_that_the_tokenizer_loses_is_reported(llama, capsys):
    """A BPE without an unknown token silently drops characters that it does not know."""
    spec = json.loads(metaspace())
    spec["model"]["unk_token"] = None
    Tokenizer(json.dumps(spec)).save("llama")
    assert main(["sample", "llama", "prompt=a é", "num_samples=1", "max_new_tokens=2"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: prompt='a é': ") and "1 of 3 characters are lost: 'é' (1)" in line
    assert main(["sample", "llama", "prompt=ab", "num_samples=1", "max_new_tokens=2"]) == 0
    assert capsys.readouterr().err == ""


def test_the_default_prompt_is_the_first_token_that_can_be_encoded(llama, capsys):
    spec = json.loads(metaspace())
    spec["pre_tokenizer"] = {"type": "Whitespace"}  # loses a space, which is the text of the second token
    spec["model"]["vocab"] = {"<s>": 10, "▁": 0, **{c: i + 1 for i, c in enumerate("abcdefg")}, "▁ab": 8, "▁cd": 9}
    spec["model"]["unk_token"] = None
    Tokenizer(json.dumps(spec)).save("llama")
    assert main(["sample", "llama", "num_samples=1", "max_new_tokens=2"]) == 0
    assert capsys.readouterr().out[0] == "a"


def test_prompts_from_a_file(llama, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\n\nb c\n")
    assert main(["sample", "llama", "prompts=prompts.txt", "num_samples=2", "max_new_tokens=5", "batch_size=3"]) == 0
    texts = capsys.readouterr().out.split("\n---------------\n")
    assert [text[0] for text in texts[:-1]] == ["a", "a", "b", "b"]


def test_a_prompt_longer_than_block_size_slides_or_is_refused(llama, capsys):
    long = "a b c d e f g a b c d e"
    for overflow in ("slide", "extend"):
        options = ["num_samples=1", "max_new_tokens=4", f"overflow={overflow}"]
        assert main(["sample", "llama", f"prompt={long}", *options]) == 0
        assert capsys.readouterr().out.startswith(long)
    assert main(["sample", "llama", f"prompt={long}", "overflow=stop"]) == 2
    assert "block_size=16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prompts=nofile.txt"], ["prompts=nofile.txt: No such file"]),
        (["prompts=empty.txt"], ["prompts=empty.txt: contains no prompts"]),
        (["prompts=empty.txt", "prompt=a"], ["cannot be combined with prompt", "contains no prompts"]),
        (["overflow=wrap"], ["overflow=wrap"]),
    ],
)
def test_wrong_options_of_sample_are_reported(llama, capsys, tmp_path, words, said):
    (tmp_path / "empty.txt").touch()
    assert main(["sample", "llama", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(said) and all(word in line for word, line in zip(said, lines, strict=True))


def test_extend_with_learned_positions_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer.char(["abc"])
    gpt(vocab_size=3).save_pretrained("ours")
    tokenizer.save("ours")
    capsys.readouterr()  # the progress bar of save_pretrained
    assert main(["sample", "ours", "prompt=a", "overflow=extend"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "overflow=extend" in line and "no position embeddings beyond block_size=" in line and "slide or stop" in line


# ---- stopping


class Scripted:
    """A model that generates given ids, whatever the sampling settings are."""

    def __init__(self, monkeypatch, ids):
        self.ids = ids
        monkeypatch.setattr("nanogpt_accel.models.generation._Sampler.__call__", self.next_scores)

    def next_scores(self, input_ids, scores):
        n_new = [len(row) - 2 for row in input_ids]  # after prompts of two ids
        rows = range(len(input_ids))
        return torch.full_like(scores, -torch.inf).index_put_(
            (torch.tensor(rows), torch.tensor([self.ids[n] for n in n_new])), torch.tensor(0.0)
        )


def decode_letters(ids):
    return "".join(chr(97 + i) for i in ids)


@pytest.mark.parametrize("eos_id", [0, 3, 6, 30, None])
def test_generation_stops_at_eos(monkeypatch, eos_id):
    Scripted(monkeypatch, [*range(3, 12)])
    (ids,) = write(gpt(), [[1, 2]], max_new_tokens=9, eos_id=eos_id)
    assert ids == [*range(3, eos_id if eos_id in range(3, 12) else 12)]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["g"], "def"),
        (["fg"], "de"),
        (["defghijkl"], ""),
        (["hijklm"], "defghijkl"),
        (["zz"], "defghijkl"),
        ([], "defghijkl"),
        (["zz", "hi", "g"], "def"),
        (["efgh", "fg"], "de"),
        (["fgz", "hijz", "j"], "defghi"),
    ],
)
def test_generation_stops_before_a_text(monkeypatch, stop, text):
    """The streamed parts never contain the start of `stop`. Joined, they are the text."""
    Scripted(monkeypatch, [*range(3, 12)])
    parts = []
    options = {"max_new_tokens": 9, "stop": stop, "decode": decode_letters}
    (ids,) = write(gpt(), [[1, 2]], on_text=parts.append, **options)
    assert "".join(parts) == text == text_after(decode_letters, [1, 2], ids, stop)
    end = min((len(text) + len(word) for word in stop if "defghijkl".startswith(text + word)), default=9)
    assert len(ids) == end
    assert write(gpt(), [[1, 2]] * 3, **options) == [ids] * 3


def test_samples_that_stop_do_not_change_the_others():
    model = gpt()
    alone = [
        write(model, [p], seeds=[seed], eos_id=5, stop=["cc"], decode=decode_letters)[0]
        for seed, p in enumerate(PROMPTS)
    ]
    assert write(model, PROMPTS, eos_id=5, stop=["cc"], decode=decode_letters) == alone
    free = write(model, PROMPTS)
    for ids, longer in zip(alone, free, strict=True):
        assert ids == longer[: len(ids)] and (len(ids) == 30 or longer[len(ids)] == 5 or ids[-2:] == [2, 2])
    assert len({len(ids) for ids in alone}) > 1


@pytest.fixture
def stories(tmp_path, monkeypatch):
    r"""A GPT of characters, with an end-of-text token, that repeats `ab\n\nc<|endoftext|>`, in the folder `stories`."""
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer.char(["abc\n"], add_eot=True)
    text = "ab\n\nc"
    cycle = [*tokenizer.encode(text).tolist(), tokenizer.eot_id]
    gpt(vocab_size=tokenizer.vocab_size).save_pretrained("stories")
    tokenizer.save("stories")
    Scripted(monkeypatch, cycle * 2)


@pytest.mark.parametrize("batch", [[], ["batch_size=2"], ["--json"]])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "ab\n\nc"),
        (["stop_at_eos=true"], "ab\n\nc"),
        (["stop_at_eos=false"], "ab\n\nc<|endoftext|>ab\n\nc<|endoftext|>"),
        ([r"stop=\n\n"], "ab"),
        (["stop=\n\n"], "ab"),
        (["stop=c<|endo", "stop_at_eos=false"], "ab\n\n"),
        (["--stop", "b"], "a"),
        ([r'stop=["zz", "\n\n"]'], "ab"),
        (['stop=["c", "\n\n"]'], "ab"),
        (["stop=[b]"], "ab\n\nc"),
        (["stop="], "ab\n\nc"),
    ],
)
def test_sample_stops_at_the_end_of_text_or_a_given_text(stories, call, options, text, batch):
    out = call("sample", "stories", "prompt=ab", "num_samples=2", "max_new_tokens=12", *options, *batch)
    if batch == ["--json"]:
        assert [json.loads(line)["text"] for line in out.splitlines()] == [text] * 2
    else:
        assert out == f"ab{text}\n---------------\n" * 2


def test_a_list_of_stops_that_is_no_list(stories, call):
    for value in ('["a", b]', '["a"', '["a", 1]', '["a", ""]'):
        assert f"stop={value}: not a JSON list of strings" in call("sample", "stories", f"stop={value}", status=2)


def test_stop_at_eos_without_an_end_of_text_token(llama, call):
    assert "stop_at_eos=true" in call("sample", "llama", "prompt=a", "stop_at_eos=true", status=2)


def test_special_tokens_of_a_prompt(stories, call):
    error = call("sample", "stories", "prompt=a<|endoftext|>", "special_tokens=text", status=2)
    assert "'<' (U+003C)" in error
    assert call("sample", "stories", "prompt=a<|endoftext|>", "num_samples=1", "max_new_tokens=1").startswith("a<|endo")


@pytest.mark.parametrize("kind", ["byte fallback", "byte-level", "unigram", "words"])
def test_sample_streams_the_text_of_any_tokenizer(kind, call, tmp_path, monkeypatch):
    """The streamed text of an untrained model equals the text of a batch and of --json."""
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer(tokenizer_json(kind))
    gpt(vocab_size=tokenizer.vocab_size).save_pretrained("ours")
    tokenizer.save("ours")
    prompt = "go" if kind == "unigram" else "little"
    options = ["sample", "ours", f"prompt={prompt}", "num_samples=3", "max_new_tokens=25", "temperature=3"]
    streamed = call(*options)
    assert call(*options, "batch_size=3") == streamed
    lines = [json.loads(line) for line in call(*options, "--json").splitlines()]
    assert "".join(f"{prompt}{line['text']}\n---------------\n" for line in lines) == streamed
