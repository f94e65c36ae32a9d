"""A model is found by a run folder, a checkpoint, another model's folder or a Hub id."""

import json
import os
import shutil
from pathlib import Path

import pytest
from tiny_run import TEXT, TinyRun

from nanogpt_accel.__main__ import main
from nanogpt_accel.checkpoint.layout import list_checkpoints
from nanogpt_accel.model import GPT, GPTConfig, GPTForSequenceClassification
from nanogpt_accel.models.find import find_model

SMALL = GPTConfig(vocab_size=8, n_layer=1, n_head=1, n_embd=8)


@pytest.fixture
def run(tmp_path):
    """A run with the checkpoints 10 and 20; 10 is the best."""
    run = TinyRun(tmp_path / "run")
    run.save(10, best_step=10)
    run.save(20, best_step=10)
    return run


def test_a_run_folder_stands_for_its_best_checkpoint(run):
    ten, twenty = list_checkpoints(run.folder)
    assert find_model(run.folder) == find_model(str(run.folder)) == ten  # the best one
    assert find_model(twenty) == twenty
    run.save(30)  # the best checkpoint is unknown
    assert find_model(run.folder).name == "checkpoint-000030"


def test_the_latest_valid_checkpoint_is_taken_if_the_best_is_corrupted(run):
    ten, twenty = list_checkpoints(run.folder)
    os.truncate(ten / "model.safetensors", 10)
    assert find_model(run.folder) == twenty
    shutil.rmtree(ten)
    assert find_model(run.folder) == twenty


def test_an_exported_folder_is_found(run, tmp_path):
    shutil.copytree(run.folder / "checkpoint-000010", tmp_path / "export")
    shutil.rmtree(tmp_path / "export" / "state")
    assert find_model(tmp_path / "export") == tmp_path / "export"


def test_a_model_next_to_checkpoints_of_trainer_is_found(run, tmp_path):
    """save_model writes the final or the best model into the folder in which Trainer saves its checkpoints."""
    ten, twenty = list_checkpoints(run.folder)
    output = tmp_path / "output"
    shutil.copytree(twenty, output / "checkpoint-20", ignore=shutil.ignore_patterns("state"))
    assert find_model(output) == output / "checkpoint-20"
    shutil.copytree(ten, output, ignore=shutil.ignore_patterns("state"), dirs_exist_ok=True)
    assert find_model(output) == output


@pytest.mark.slow
def test_a_model_goes_through_trainer_and_back(run, tmp_path, call):
    """Train with gradient accumulation, bfloat16 and gradient checkpointing, then resume, evaluate and export."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

    output, rows = tmp_path / "output", torch.randint(5, (64, 8), generator=torch.Generator().manual_seed(1))

    def fine_tune(resume):
        arguments = TrainingArguments(
            output,
            max_steps=6,
            save_steps=3,
            logging_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            bf16=True,
            gradient_checkpointing=True,
            use_cpu=True,
            report_to=[],
        )
        model, data = AutoModelForCausalLM.from_pretrained(run.folder), [{"input_ids": r, "labels": r} for r in rows]
        trainer = Trainer(model, arguments, train_dataset=data, data_collator=default_data_collator)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, [line["loss"] for line in trainer.state.log_history if "loss" in line]

    trainer, losses = fine_tune(resume=False)
    assert fine_tune(resume=str(output / "checkpoint-3"))[1] == losses and len(losses) == 6
    with torch.no_grad():
        trainer.model.transformer.wte.weight[0] += 1  # so that it differs from checkpoint-6
    trainer.save_model()
    shutil.copy(run.folder / "tokenizer.json", output)
    (tmp_path / "text.txt").write_text(TEXT * 20)
    printed = call("evaluate", output, f"text={tmp_path / 'text.txt'}", "device=cpu")
    assert str(output) in printed and "checkpoint-6" not in printed
    call("export", output, f"to={tmp_path / 'stock'}")
    # not trainer.model itself, whose forward pass runs in bfloat16 now
    saved, stock = (AutoModelForCausalLM.from_pretrained(folder) for folder in (output, tmp_path / "stock"))
    assert torch.equal(saved.transformer.wte.weight, trainer.model.transformer.wte.weight)
    with torch.no_grad():
        ours, theirs = saved(rows[:4]).logits, stock(rows[:4]).logits
    assert torch.equal(ours[..., : theirs.shape[-1]], theirs)


@pytest.mark.parametrize(
    ("target", "kind", "words"),
    [
        ("./nowhere", FileNotFoundError, ["./nowhere", "no such folder"]),
        ("a/b/c", FileNotFoundError, ["a/b/c", "no such folder"]),
        ("/no/such/place", FileNotFoundError, ["/no/such/place", "no such folder"]),
        ("runs/no--such", ValueError, ["runs/no--such: no such folder", "not a valid name"]),
        ("runs/..", ValueError, ["runs/..: no such folder"]),
        ("empty", ValueError, ["empty", "neither a run nor a model folder", "config.json is missing"]),
        (
            "nobody/no-such-model",
            ValueError,
            ["nobody/no-such-model: no such folder", "the Hub cannot be reached"],
        ),
        ("no-such-model", ValueError, ["no-such-model: no such folder", "the Hub cannot be reached"]),
    ],
)
def test_a_target_without_a_model_says_what_was_looked_for(refused, tmp_path, monkeypatch, target, kind, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with refused(kind, *words):
        find_model(target)


def test_a_peft_adapter_and_a_classifier_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    GPTForSequenceClassification(SMALL).save_pretrained("classifier")
    for folder, words in (("adapter", "a PEFT adapter"), ("classifier", "Classification is not a language model")):
        assert main(["export", folder, "--to", "x"]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: {folder}: ") and words in line


def test_the_best_checkpoint_of_trainer_is_taken(tmp_path):
    for step in (10, 20):
        folder = tmp_path / f"checkpoint-{step}"
        GPT(SMALL).save_pretrained(folder)
        (folder / "tokenizer.json").write_text("{}")
        (folder / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": "elsewhere/checkpoint-10"}))
    assert find_model(tmp_path).name == "checkpoint-10"
    hostile = ['{"best_model_checkpoint": null}', '{"best_model_checkpoint": 5}', "[]", "{", "[" * 100_000, ""]
    for content in (*hostile, '{"global_step": ' + "9" * 5000 + "}"):
        (tmp_path / "checkpoint-20/trainer_state.json").write_text(content)
        assert find_model(tmp_path).name == "checkpoint-20"
