"""The promise that a model with an unused embedding has a padding token: it works in transformers' batched generation
and fine-tuning, does not change a loss or a text, and is the same in all files of a model folder."""

import json
from pathlib import Path

import pytest
import torch
from runs import write_recipe
from stock_models import LLAMA, ROWS, N, gpt, save_model
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    pipeline,
)

from nanogpt_accel.data.tokenizer import EOT, PAD, Tokenizer
from nanogpt_accel.models.export import export

TEXTS = ["To be, or not to be", "that", "is the question:", "Whether tis nobler"]


@pytest.fixture(scope="module", params=["gpt2 stock", "gpt2 custom", "llama stock", "llama custom"])
def folder(request, tmp_path_factory):
    architecture, form = request.param.split()
    base = tmp_path_factory.mktemp(architecture)
    model = gpt(**(LLAMA if architecture == "llama" else {}))
    (base / "ours").mkdir()
    export(save_model(model, base / "ours"), base / form, form, report=lambda line: None)
    return base / form


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def assert_consistent(folder, vocab_size, pad, pad_id):
    """Check that config.json, generation_config.json and the tokenizer name the same padding token."""
    config, generation = (
        json.loads(Path(folder, name).read_text()) for name in ("config.json", "generation_config.json")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (config["vocab_size"], tokenizer.pad_token) == (vocab_size, pad)
    assert config["pad_token_id"] == generation.get("pad_token_id") == tokenizer.pad_token_id == pad_id
    assert len(tokenizer) <= vocab_size
    n_tokens = Tokenizer.load(folder).vocab_size
    assert (generation.get("suppress_tokens") or []) == list(range(n_tokens, vocab_size))


def test_padding_does_not_change_the_loss_of_fine_tuning(folder, tmp_path):
    """A batch of rows of unequal length has the same loss and gradient as the rows one by one, weighted by their
    tokens."""
    model, tokenizer = load(folder)
    rows = [tokenizer(text + EOT) for text in TEXTS]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collator(rows)
    assert (batch["labels"] == tokenizer.eos_token_id).sum() == len(rows), "the end-of-text token is a target"
    assert (batch["labels"] != -100).sum() == sum(len(row["input_ids"]) for row in rows)
    model(**batch).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss = model(**batch).loss.item()
    model.zero_grad()
    n_targets = [len(row["input_ids"]) - 1 for row in rows]
    alone = 0.0
    for row, n in zip(rows, n_targets, strict=True):
        ids = torch.tensor([row["input_ids"]])
        share = model(ids, labels=ids).loss * n / sum(n_targets)
        share.backward()
        alone += share.item()
    assert loss == pytest.approx(alone, rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6)

    arguments = {"max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 4, "use_cpu": True}
    arguments = TrainingArguments(tmp_path, report_to="none", save_strategy="no", disable_tqdm=True, **arguments)
    model.config.use_cache = False
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator, processing_class=tokenizer)
    if type(model).__name__ == "GPT2LMHeadModel":  # Trainer also counts the first token of each row for this class
        alone *= sum(n_targets) / (sum(n_targets) + len(rows))
    assert trainer.train().training_loss == pytest.approx(alone, rel=1e-5)


def test_a_pipeline_writes_the_same_texts_in_batches_and_one_by_one(folder):
    model, tokenizer = load(folder)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 8, "do_sample": False}
    alone = [generator(text, **options)[0]["generated_text"] for text in TEXTS]
    assert [texts[0]["generated_text"] for texts in generator(TEXTS, batch_size=2, **options)] == alone
    assert all(text.startswith(prompt) and PAD not in text for text, prompt in zip(alone, TEXTS, strict=True))


def test_all_files_of_an_export_have_the_padding_token(folder):
    assert_consistent(folder, ROWS if folder.name == "custom" else N + 1, PAD, N)


def test_a_model_without_an_unused_embedding_has_no_padding_token(tmp_path):
    (tmp_path / "ours").mkdir()
    save_model(gpt(vocab_size=N), tmp_path / "ours")
    for form in ("stock", "custom"):
        export(tmp_path / "ours", tmp_path / form, form, report=lambda line: None)
        assert_consistent(tmp_path / form, N, None, None)


def test_a_stock_model_with_gpt2s_tokenizer_keeps_gpt2s_vocabulary_size(tmp_path, gpt2_files):
    model = gpt(vocab_size=50304, n_embd=8, eos_token_id=50256, bos_token_id=50256)
    (tmp_path / "ours").mkdir()
    save_model(model, tmp_path / "ours", Tokenizer.gpt2())
    for form, vocab_size, pad_id in (("stock", 50257, None), ("custom", 50304, 50257)):
        export(tmp_path / "ours", tmp_path / form, form, report=lambda line: None)
        files = [json.loads((tmp_path / form / f"{name}.json").read_text()) for name in ("config", "tokenizer_config")]
        assert (files[0]["vocab_size"], files[0]["pad_token_id"]) == (vocab_size, pad_id)
        assert files[1].get("pad_token") == (PAD if pad_id else None)


def test_a_model_goes_through_transformers_and_back(call, tmp_path, monkeypatch):
    """Train, add [PAD] and resize as transformers' documentation shows, then use the folder in every command."""
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, max_iters=2, eval_interval=2, pad_vocab_to_multiple_of=32)
    call("train", recipe, "out_dir=run")
    n_tokens = Tokenizer.load("run").vocab_size
    assert_consistent("run", 32, PAD, n_tokens)
    # an older checkpoint has no padding token
    model, tokenizer = AutoModelForCausalLM.from_pretrained("run"), AutoTokenizer.from_pretrained("tokens")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained("touched")
    tokenizer(["one", "to three"], padding=True, truncation=True, max_length=2)
    tokenizer.save_pretrained("touched")

    (tmp_path / "good.txt").write_text("one to\nthree " * 20)
    (tmp_path / "bad.txt").write_text("one, to€")
    assert "bits per byte" in call("evaluate", "touched", "text=good.txt", "device=cpu")
    assert call("sample", "touched", "prompt=one", "num_samples=1", "max_new_tokens=9").startswith("one")
    for words in (("evaluate", "touched", "text=bad.txt"), ("sample", "touched", "prompt=one, to€")):
        (line,) = call(*words, status=2).splitlines()
        assert words[2].split("=")[1] in line and "the tokenizer has no ',' (U+002C), '€' (U+20AC)" in line
    for form in ("stock", "custom"):
        call("export", "touched", "--to", form, f"form={form}")
        assert_consistent(form, n_tokens + 1, "[PAD]", n_tokens)
        call("train", recipe, f"init_from={form}", f"out_dir=more-{form}")
        assert_consistent(f"more-{form}", n_tokens + 1, PAD, n_tokens)
    assert AutoTokenizer.from_pretrained("stock")("one to")["input_ids"] == tokenizer("one to")["input_ids"]


def test_trainer_continues_a_run_and_every_command_takes_its_checkpoint(call, tmp_path, monkeypatch):
    """Trainer uses gradient accumulation, bfloat16 and gradient checkpointing. A resumed training gives the same
    weights."""
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, max_iters=2, eval_interval=2, pad_vocab_to_multiple_of=32)
    call("train", recipe, "out_dir=run")
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options |= {"bf16": True, "gradient_checkpointing": True, "use_cpu": True, "report_to": "none"}
    texts = ["one to three", "to one", "three", "one to"] * 4

    def train(out_dir, resume=None):
        model, tokenizer = AutoModelForCausalLM.from_pretrained("run"), AutoTokenizer.from_pretrained("run")
        trainer = Trainer(
            model,
            TrainingArguments(out_dir, **options),
            train_dataset=[tokenizer(text) for text in texts],
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            processing_class=tokenizer,
        )
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole, resumed = train("whole"), train("resumed", "whole/checkpoint-2")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], p) for name, p in load("run")[0].state_dict().items())

    text = ("one to three " * 2)[:17]  # one sample of block_size + 1 characters
    (tmp_path / "text.txt").write_text(text)
    model, tokenizer = load("whole/checkpoint-4")
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    evaluation = json.loads(
        call("evaluate", "whole/checkpoint-4", "text=text.txt", "device=cpu", "mixed_precision=no", "--json")
    )
    loss = F.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:]).item()
    assert evaluation["text_loss"] == pytest.approx(loss, rel=1e-5)
    call("export", "whole/checkpoint-4", "--to", "stock")
    stock, _ = load("stock")
    vocab_size = stock.config.vocab_size
    assert (stock(ids[:, 1:]).logits - model(ids[:, 1:]).logits[..., :vocab_size]).abs().max() <= 1e-5
    call("train", recipe, "init_from=whole/checkpoint-4", "out_dir=back")
