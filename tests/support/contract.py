"""Run the same calls of transformers, PEFT, TRL and exporters on a GPT and its stock export, and compare the results.

    python tests/support/contract.py                        # all checks on all forms, and a table
    python tests/support/contract.py llama qwen3 --only TRL # checks whose name contains a word

Every check is a function of a Subject and an empty folder, and returns {name: value}. There are three subjects: GPT
from the package, GPT from the remote code of a checkpoint, and the stock export. The values of the first two must equal
those of the export. Each subject runs in a separate process. The checks do not import this package, so that the remote
code runs without it.
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import inspect
import math
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # before torch reads them
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from shared import REPOSITORY, WITHOUT_THE_PACKAGE
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    StaticCache,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.configuration_utils import get_head_shapes

MODERN = {"norm": "rmsnorm", "position": "rotary", "rope_theta": 700.0, "n_kv_head": 2, "n_inner": 56}
FORMS = {  # switches of GPTConfig
    "gpt2": {},
    "gpt2_bias": {"bias": True, "activation": "gelu_new"},
    "llama": {**MODERN, "activation": "swiglu"},
    "qwen3": {**MODERN, "activation": "swiglu", "qk_norm": True, "head_dim": 12},
    "nanochat": {
        **MODERN,
        "activation": "relu2",
        "norm_weight": False,
        "embd_norm": True,
        "qk_norm": True,
        "logit_softcap": 15.0,
        "tie_word_embeddings": False,
    },
}
LENGTH = 32  # block_size
TEXTS = ["the first one, and", "One", "a longer line: what is it?", "Then the third"]


def draw(*shape, seed, high=60):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


IDS = draw(3, 24, seed=3)
ROWS = [{"input_ids": row, "labels": row} for row in draw(16, 20, seed=4)]


class Subject(NamedTuple):
    """A model folder, and whether to load it with its remote code."""

    folder: str
    remote: bool = False

    def load(self, auto=AutoModelForCausalLM, **options):
        model = auto.from_pretrained(self.folder, trust_remote_code=self.remote, **options).eval()
        if model.config.model_type == "gpt2" and auto is AutoModelForCausalLM:
            # without this, Trainer divides the losses of GPT2LMHeadModel by T instead of T - 1
            model.loss_type = "ForCausalLM"
        return model

    def to_train(self, auto=AutoModelForCausalLM, **options):
        """Load the model for training. If the biases of a stock export are zero, the GPT has no biases, so those of the
        export are not trained."""
        model = self.load(auto, **options).train()
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.requires_grad = bool(parameter.any())
        return model

    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.remote)


@torch.no_grad()
def logits_of(model, ids=IDS, **inputs):
    return model(ids, **inputs).logits


def seeded(parameters, std=0.1):
    """Fill new parameters with the same numbers in all subjects. The order of the layers must be the same."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


# ---- Trainer


def make_trainer(model, folder, **options):
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    data = {"train_dataset": ROWS[:12], "eval_dataset": ROWS[12:], "data_collator": None, "processing_class": None}
    data = {key: options.pop(key, default) for key, default in data.items()}
    return Trainer(model, TrainingArguments(**arguments | options), **data)


def losses_of(trainer, key="loss"):
    return torch.tensor([entry[key] for entry in trainer.state.log_history if key in entry], dtype=torch.float64)


def trainer_loss(subject, folder):
    """Trainer counts the labels itself. The loss of its first step must be that of the model."""
    trainer = make_trainer(subject.to_train(), folder, train_dataset=ROWS[:2], max_steps=1)
    ids = torch.stack([row["input_ids"] for row in ROWS[:2]])
    plain = subject.load()(ids, labels=ids).loss.item()
    trainer.train()
    assert abs(losses_of(trainer).item() - plain) < 1e-6, f"Trainer's loss is {losses_of(trainer).item()}, not {plain}"
    return {"loss": losses_of(trainer)}


def trainer_train(subject, folder):
    """Train, save, and load the saved model."""
    trainer = make_trainer(subject.to_train(), folder, save_strategy="steps", save_steps=4)
    trainer.train()
    saved = Subject(f"{folder}/checkpoint-4", subject.remote).load()
    return {"losses": losses_of(trainer), "logits": logits_of(trainer.model.eval()), "saved logits": logits_of(saved)}


def trainer_evaluate(subject, folder):
    return {"loss": make_trainer(subject.load(), folder).evaluate()["eval_loss"]}


def trainer_predict(subject, folder):
    out = make_trainer(subject.load(), folder).predict(ROWS[12:])
    logits, labels = torch.from_numpy(out.predictions), torch.from_numpy(out.label_ids)
    return {"logits": logits, "labels": labels, "loss": out.metrics["test_loss"]}


def trainer_label_smoothing(subject, folder):
    """Smooth by 0, almost 0 and 0.1. The first two losses must be equal."""
    losses = [
        make_trainer(subject.load(), folder, label_smoothing_factor=smoothing).evaluate()["eval_loss"]
        for smoothing in (0.0, 1e-9, 0.1)
    ]
    assert abs(losses[0] - losses[1]) < 1e-6, f"smoothing by 1e-9 changes the loss from {losses[0]} to {losses[1]}"
    return {"losses": torch.tensor(losses)}


def trainer_load_best(subject, folder):
    """Load the best model, which is not the last one, because the highest loss counts as the best."""
    trainer = make_trainer(
        subject.to_train(),
        folder,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        greater_is_better=True,
        eval_dataset=ROWS[:12],
    )
    trainer.train()
    losses = losses_of(trainer, "eval_loss")
    best = Path(trainer.state.best_model_checkpoint).name
    assert best == "checkpoint-2" and losses[0] > losses[-1], (best, losses)
    return {"eval losses": losses, "logits": logits_of(trainer.model.eval())}


def trainer_resume(subject, folder):
    straight = make_trainer(subject.to_train(), folder, save_strategy="steps", save_steps=2)
    straight.train()
    resumed = make_trainer(subject.to_train(), folder)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    torch.testing.assert_close(losses_of(resumed), losses_of(straight), rtol=0, atol=1e-6)
    return {"losses": losses_of(resumed), "logits": logits_of(resumed.model.eval())}


def trainer_accumulation(subject, folder):
    """Train on micro-batches of rows of unequal length, which the collator pads."""
    rows = [{"input_ids": row["input_ids"][: 4 + 3 * (i % 5)]} for i, row in enumerate(ROWS)]
    tokenizer = subject.tokenizer()
    trainer = make_trainer(
        subject.to_train(),
        folder,
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        gradient_accumulation_steps=3,
    )
    trainer.train()
    return {"losses": losses_of(trainer), "logits": logits_of(trainer.model.eval())}


def trainer_gradient_checkpointing(subject, folder):
    trainer = make_trainer(subject.to_train(), folder, gradient_checkpointing=True)
    trainer.train()
    return {"losses": losses_of(trainer)}


def trainer_bf16(subject, folder):
    trainer = make_trainer(subject.to_train(), folder, bf16=True)
    trainer.train()
    return {"bf16 losses": losses_of(trainer)}


# ---- PEFT


def peft_lora(subject, folder):
    """Train adapters of the layers that exist in both: the output projections. Save, load and merge them."""
    import peft

    names = {"gpt2": ["attn.c_proj", "mlp.c_proj"], "nanochat": ["o_proj", "fc2"], "nanogpt_accel": ["c_proj"]}
    model = subject.load()
    targets = names.get(model.config.model_type, ["o_proj", "down_proj"])
    lora = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets))
    start = logits_of(lora)  # equals the logits of the base model
    seeded(p for p in lora.parameters() if p.requires_grad)
    trainer = make_trainer(lora, folder)
    trainer.train()
    lora = trainer.model.eval()
    lora.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(subject.load(), folder)
    return {
        "losses": losses_of(trainer),
        "logits at the start": start,
        "logits": logits_of(lora),
        "loaded logits": logits_of(loaded),
        "merged logits": logits_of(loaded.merge_and_unload()),
    }


def peft_lora_all_linear(subject, folder):
    """Train adapters of all layers. Only the logits before training are compared: fused layers have other adapters."""
    import peft

    lora = peft.get_peft_model(subject.load(), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    start = logits_of(lora)
    trainer = make_trainer(lora, folder, learning_rate=1e-2)
    trainer.train()
    trained = logits_of(trainer.model.eval())
    assert (trained - start).abs().max() > 1e-3, "training changed nothing"
    torch.testing.assert_close(logits_of(trainer.model.merge_and_unload()), trained, rtol=0, atol=1e-4)
    return {"logits at the start": start}


def peft_prefix_tuning(subject, folder):
    import peft

    model = subject.load()
    tuned = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    weight = tuned.prompt_encoder["default"].embedding.weight
    seeded([weight], std=0.3)
    if model.config.model_type == "nanochat":  # the second half of the keys has the opposite sign in the export
        n_heads, size = get_head_shapes(model.config)
        with torch.no_grad():
            weight.view(4, -1, 2, n_heads, size)[:, :, 0, :, size // 2 :].neg_()
    return {"logits": logits_of(tuned.eval()), "loss": tuned(IDS, labels=IDS).loss}


# ---- TRL


def trl_options(folder):
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_length": LENGTH,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def trl_sft(subject, folder):
    import datasets
    import trl

    data = datasets.Dataset.from_dict({"text": TEXTS})
    trainer = trl.SFTTrainer(
        subject.to_train(),
        trl.SFTConfig(**trl_options(folder)),
        train_dataset=data,
        processing_class=subject.tokenizer(),
    )
    trainer.train()
    return {"losses": losses_of(trainer), "logits": logits_of(trainer.model.eval())}


def trl_dpo(subject, folder):
    import datasets
    import trl

    rows = [{"prompt": text, "chosen": " yes", "rejected": " no, no"} for text in TEXTS]
    trainer = trl.DPOTrainer(
        subject.to_train(),
        args=trl.DPOConfig(**trl_options(folder), trust_remote_code=True),  # to load the reference model
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=subject.tokenizer(),
    )
    trainer.train()
    return {"losses": losses_of(trainer), "logits": logits_of(trainer.model.eval())}


# ---- generate


def generate(subject, ids=IDS[:, :8], **options):
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "do_sample": False} | options
    return {"ids": subject.load().generate(ids, **options)}


def generate_greedy(subject, folder):
    return generate(subject)


def generate_sampled(subject, folder):
    torch.manual_seed(1)
    return generate(subject, do_sample=True, top_k=10)


def generate_beams(subject, folder):
    return generate(subject, num_beams=3, num_return_sequences=2)


def generate_assisted(subject, folder):
    return generate(subject, IDS[:1, :8], assistant_model=subject.load())


def generate_prompt_lookup(subject, folder):
    return generate(subject, IDS[:1, :4].repeat(1, 3), prompt_lookup_num_tokens=3)


def generate_static_cache(subject, folder):
    return generate(subject, cache_implementation="static")


def generate_compiled(subject, folder):
    from transformers import CompileConfig

    torch._dynamo.reset()
    compile_config = CompileConfig(fullgraph=True, mode="default")
    compile_config._compile_all_devices = True  # by default, generate does not compile on a CPU
    return generate(subject, cache_implementation="static", compile_config=compile_config)


def generate_left_padded(subject, folder):
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[0, :3], mask[2, :5] = 0, 0
    ids = IDS[:, :8] * mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = logits_of(subject.load(), ids, attention_mask=mask, position_ids=positions)
    return generate(subject, ids, attention_mask=mask) | {"logits": logits * mask[:, :, None]}


def generate_from_embeddings(subject, folder):
    model = subject.load()
    embeddings = model.get_input_embeddings()(IDS[:, :8])
    mask = torch.ones_like(IDS[:, :8])
    out = model.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=16, do_sample=False)
    return {"ids": out, "logits": logits_of(model, None, inputs_embeds=embeddings)}


def generate_continuous_batching(subject, folder):
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1)
    # by default, the cache takes most of the free memory
    limits = ContinuousBatchingConfig(num_blocks=8, page_size=16, max_batch_tokens=64)
    prompts = [row[: 5 + 4 * i].tolist() for i, row in enumerate(IDS)]
    out = subject.load().generate_batch(prompts, generation_config=config, continuous_batching_config=limits)
    texts = sorted((len(answer.prompt_ids), answer.generated_tokens) for answer in out.values())
    assert [len(tokens) for _, tokens in texts] == [12] * 3, f"wrong numbers of tokens: {texts}"
    return {"ids": torch.tensor([tokens for _, tokens in texts])}


def pipeline_batched(subject, folder):
    generator = pipeline("text-generation", model=subject.load(), tokenizer=subject.tokenizer())
    out = generator(TEXTS[:3], batch_size=2, max_new_tokens=6, do_sample=False)
    return {"texts": [row[0]["generated_text"] for row in out]}


# ---- compile and export


def static_cache(model, batch_size=3):
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    cache.early_initialization(batch_size, *get_head_shapes(model.config), model.dtype, model.device)
    # called past_key_values before transformers 5.24
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


@torch.no_grad()
def in_chunks(function, model):
    """Return the logits of a prompt of 8 tokens and of the next tokens, one at a time, with a static cache."""
    cache = static_cache(model)
    return torch.cat([function(ids, use_cache=True, **cache).logits for ids in IDS.split([8] + [1] * 16, dim=1)], dim=1)


def compiled_with_static_cache(subject, folder):
    """Capture the whole forward as one graph. generate with a compiled cache tests inductor's kernels."""
    torch._dynamo.reset()
    model = subject.load()
    logits = in_chunks(torch.compile(model.forward, fullgraph=True, backend="aot_eager"), model)
    return {"logits": logits, "eager logits": in_chunks(model, model)}


# batch size and length; the exported program is called with other values of both
DYNAMIC = {"input_ids": dict.fromkeys((0, 1), torch.export.Dim.AUTO)}


def torch_export(subject, folder):
    model = subject.load(use_cache=False)
    example = {"input_ids": IDS[:2, :12]}
    program = torch.export.export(model, (), example, dynamic_shapes=DYNAMIC, strict=False)
    return {"logits": program.module()(input_ids=IDS[:, :20]).logits}


def onnx_export(subject, folder):
    import onnxruntime

    model = subject.load(use_cache=False)
    example = {"input_ids": IDS[:2, :12]}
    program = torch.onnx.export(model, (), kwargs=example, dynamic_shapes=DYNAMIC, dynamo=True, verbose=False)
    program.save(f"{folder}/model.onnx")
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
    logits = torch.from_numpy(session.run(None, {"input_ids": IDS.numpy()})[0])
    torch.testing.assert_close(logits, logits_of(model), rtol=0, atol=1e-5)
    return {"logits": logits}


def executorch_export(subject, folder):
    """Export a decoder of one token with a static cache, and run the exported and the lowered program."""
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime
    from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

    model = subject.load()
    model.generation_config.update(use_cache=True, cache_implementation="static")
    wrapped = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=LENGTH)
    program = wrapped.export(input_ids=IDS[:1, :1], cache_position=torch.tensor([0]))
    steps = [(ids, torch.tensor([i])) for i, ids in enumerate(IDS[:1].split(1, dim=1))]
    module = program.module()
    with torch.no_grad():
        exported = torch.cat([module(input_ids=ids, cache_position=position) for ids, position in steps], dim=1)
    lowered = to_edge_transform_and_lower(program).to_executorch()
    method = Runtime.get().load_program(lowered.buffer).load_method("forward")
    written = torch.cat([method.execute(step)[0].clone() for step in steps], dim=1)
    return {"logits": exported, "logits of the runtime": written}


# ---- configs, weights and other heads


def resize_embeddings(subject, folder):
    """Add four tokens, and set their rows to zeros, because transformers initializes them randomly."""
    model = subject.load()
    before = model.config.vocab_size
    model.resize_token_embeddings(before + 4, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight[before:] = 0
    assert model.config.vocab_size == before + 4 and logits_of(model).shape[-1] == before + 4
    model.save_pretrained(folder)
    saved = Subject(folder, subject.remote).load()
    return {"logits": logits_of(saved), "loss": saved(IDS, labels=IDS).loss}


def from_config(subject, folder):
    config = AutoConfig.from_pretrained(subject.folder, trust_remote_code=subject.remote)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=subject.remote).eval()
    model.load_state_dict(subject.load().state_dict())
    return {"logits": logits_of(model)}


def config_overrides(subject, folder):
    """Set fields of a config by their names in transformers, in three ways. The matrices must have the new shapes."""
    options = {"trust_remote_code": subject.remote}
    config = AutoConfig.from_pretrained(subject.folder, **options)
    # not num_hidden_layers, because Qwen3Config stores a list of one entry per layer
    changes = {"hidden_size": 64, "num_attention_heads": 8, "max_position_embeddings": 16}
    if config.model_type == "gpt2" or getattr(config, "position", None) == "learned":
        changes["n_inner"] = 96  # GPT2Config does not have the name intermediate_size
    else:
        changes |= {"intermediate_size": 96, "num_key_value_heads": 4, "head_dim": 10}
    assigned, updated = copy.deepcopy(config), copy.deepcopy(config)
    for key, value in changes.items():
        setattr(assigned, key, value)
    updated.update_from_string(",".join(f"{key}={value}" for key, value in changes.items()))
    loaded = AutoConfig.from_pretrained(subject.folder, **changes, **options)
    counts = []
    for changed in (assigned, updated, loaded):
        model = AutoModelForCausalLM.from_config(changed, **options)
        counts.append(sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1))
    return {"numbers of weights": counts}


def copies(subject, folder):
    model = subject.load()
    unpickled = pickle.loads(pickle.dumps(model))
    return {"deepcopy logits": logits_of(copy.deepcopy(model)), "pickle logits": logits_of(unpickled)}


def half_precision(subject, folder):
    return {f"{dtype} logits": logits_of(subject.load(dtype=dtype)) for dtype in ("bfloat16", "float16")}


def device_map(subject, folder):
    return {f"logits with {place}": logits_of(subject.load(device_map=place)) for place in ("cpu", "auto")}


def disk_offload(subject, folder):
    """Limit the memory to two thirds of the model, so that accelerate offloads the rest to the disk."""
    n_bytes = 4 * subject.load().num_parameters()
    model = subject.load(device_map="auto", max_memory={"cpu": n_bytes * 2 // 3}, offload_folder=f"{folder}/offload")
    assert {"cpu", "disk"} == {str(device) for device in model.hf_device_map.values()}, model.hf_device_map
    return {"logits": logits_of(model)}


def features(subject, folder):
    with torch.no_grad():
        return {"features": subject.load(AutoModel)(IDS).last_hidden_state}


def sentence_embeddings(subject, folder):
    """Embed texts in padded batches. The pooling is given, because its default depends on the name of the class."""
    from sentence_transformers import SentenceTransformer, models

    code = {"trust_remote_code": subject.remote}
    body = models.Transformer(subject.folder, model_args=code, tokenizer_args=code, config_args=code)
    model = SentenceTransformer(modules=[body, models.Pooling(32, "mean")], device="cpu")
    return {"embeddings": torch.from_numpy(model.encode(TEXTS))}


def sequence_classification(subject, folder):
    """Classify padded rows, and train. transformers has no classifier for nanochat, so compute the logits of nanochat
    from the features of its last tokens."""
    rows = [{"input_ids": row, "labels": i % 3} for i, row in enumerate(draw(12, 12, seed=8))]
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, 20:], mask[0, 20:] = 79, 0  # 79 is padding
    if AutoConfig.from_pretrained(subject.folder, trust_remote_code=subject.remote).model_type == "nanochat":
        body = subject.load(AutoModel)
        score = torch.nn.Linear(32, 3, bias=False)
        seeded([score.weight])
        with torch.no_grad():
            hidden = body(ids, attention_mask=mask).last_hidden_state
            logits = score(hidden[torch.arange(3), mask.sum(1) - 1])
        return {"logits": logits, "loss": F.cross_entropy(logits, torch.tensor([0, 1, 2])).item()}
    model = subject.to_train(AutoModelForSequenceClassification, num_labels=3, pad_token_id=79)
    seeded([model.score.weight])
    with torch.no_grad():
        out = model.eval()(ids, attention_mask=mask, labels=torch.tensor([0, 1, 2]))
    trainer = make_trainer(model, folder, train_dataset=rows)
    trainer.train()
    return {"logits": out.logits, "loss": out.loss, "losses of Trainer": losses_of(trainer)}


# name -> function, package that it tests
CHECKS = {
    "Trainer: loss of the first step": (trainer_loss, "transformers"),
    "Trainer: train, save and load": (trainer_train, "transformers"),
    "Trainer: evaluate": (trainer_evaluate, "transformers"),
    "Trainer: predict": (trainer_predict, "transformers"),
    "Trainer: label smoothing": (trainer_label_smoothing, "transformers"),
    "Trainer: load best": (trainer_load_best, "transformers"),
    "Trainer: resume": (trainer_resume, "transformers"),
    "Trainer: accumulation, padded": (trainer_accumulation, "transformers"),
    "Trainer: gradient checkpointing": (trainer_gradient_checkpointing, "transformers"),
    "Trainer: bf16": (trainer_bf16, "transformers"),
    "PEFT: LoRA train, save, load, merge": (peft_lora, "peft"),
    "PEFT: LoRA on all-linear": (peft_lora_all_linear, "peft"),
    "PEFT: prefix tuning": (peft_prefix_tuning, "peft"),
    "TRL: SFTTrainer": (trl_sft, "trl"),
    "TRL: DPOTrainer": (trl_dpo, "trl"),
    "generate: greedy": (generate_greedy, "transformers"),
    "generate: sampled": (generate_sampled, "transformers"),
    "generate: beams": (generate_beams, "transformers"),
    "generate: assisted": (generate_assisted, "transformers"),
    "generate: prompt lookup": (generate_prompt_lookup, "transformers"),
    "generate: static cache": (generate_static_cache, "transformers"),
    "generate: static cache, compiled": (generate_compiled, "transformers"),
    "generate: left padding": (generate_left_padded, "transformers"),
    "generate: inputs_embeds": (generate_from_embeddings, "transformers"),
    "generate_batch (continuous batching)": (generate_continuous_batching, "transformers"),
    "pipeline: batched": (pipeline_batched, "transformers"),
    "torch.compile: fullgraph, static cache": (compiled_with_static_cache, "torch"),
    "torch.export: dynamic shapes": (torch_export, "torch"),
    "torch.onnx: onnxruntime": (onnx_export, "onnxruntime"),
    "ExecuTorch: static cache": (executorch_export, "executorch"),
    "resize_token_embeddings": (resize_embeddings, "transformers"),
    "from_config": (from_config, "transformers"),
    "config overrides": (config_overrides, "transformers"),
    "deepcopy, pickle": (copies, "transformers"),
    "bfloat16, float16": (half_precision, "transformers"),
    "device_map": (device_map, "accelerate"),
    "disk offload": (disk_offload, "accelerate"),
    "AutoModel: features": (features, "transformers"),
    "SentenceTransformer: encode": (sentence_embeddings, "sentence_transformers"),
    "AutoModelForSequenceClassification": (sequence_classification, "transformers"),
}


# ---- comparison


# a part of a value's name -> largest allowed difference. In half precision, rounding errors are larger
TOLERANCES = {"bfloat16": 0.2, "float16": 0.02, "bf16 losses": 0.01, "loss": 1e-6, "": 1e-5}


def difference(name, ours, theirs):
    """Return the largest absolute difference of two values of a check, or Inf if they cannot be compared."""
    if not isinstance(theirs, (torch.Tensor, float)):
        return 0.0 if ours == theirs else math.inf
    ours, theirs = torch.as_tensor(ours).detach().double(), torch.as_tensor(theirs).detach().double()
    if ours.shape != theirs.shape or not ours.isfinite().all():
        return math.inf
    return (ours - theirs).abs().max().item()


def compare(ours, theirs):
    """Return ({name: difference}, [names above the tolerance]). The export may have fewer values."""
    assert ours.keys() >= theirs.keys()
    differences = {name: difference(name, ours[name], theirs[name]) for name in theirs}
    allowed = {name: next(TOLERANCES[word] for word in TOLERANCES if word in name) for name in theirs}
    return differences, [name for name, value in differences.items() if value > allowed[name]]


# ---- processes


def write_models(form, folder):
    """Write a random GPT to folder/gpt, and its stock export to folder/export. Return their Subjects."""
    from stock_models import CHARS, gpt

    from nanogpt_accel.data.tokenizer import Tokenizer
    from nanogpt_accel.models.export import write_model
    from nanogpt_accel.models.load import fit_to_tokenizer
    from nanogpt_accel.models.stock import nearest_architecture

    model, tokenizer = gpt(**FORMS[form]), Tokenizer.char([CHARS], add_eot=True)
    with torch.no_grad():  # scale the weights, so that the logits are about 1
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.dim() > 1 else 1.0)
    fit_to_tokenizer(model, tokenizer)
    stock, obstacles = nearest_architecture(model.config.resolved())
    assert not obstacles
    subjects = Subject(f"{folder}/gpt"), Subject(f"{folder}/export")
    for subject, kind in zip(subjects, ("custom", stock), strict=True):
        write_model(model, subject.folder, kind, tokenizer=tokenizer, card="", report=lambda line: None)
    return subjects


def run_checks(subject, names, out):
    """Run checks in this process, and write {name: values, or the text of the exception} to a file."""
    results = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                results[name] = CHECKS[name][0](subject, folder)
            except Exception as error:
                traceback.print_exc()
                results[name] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        torch.save(results, out)


def run_in_process(subject, names, folder, start):
    """Run checks in a new process that starts with some lines of Python, and return their results."""
    out, log = Path(folder) / "results.pt", Path(folder) / "log.txt"
    out.unlink(missing_ok=True)
    call = f"run_checks(Subject(*{tuple(subject)}), {names}, {str(out)!r})"
    code = f"{start}\nfrom contract import Subject, run_checks\n{call}"
    path = f"{REPOSITORY / 'tests' / 'support'}{os.pathsep}{REPOSITORY}"
    environment = os.environ | {"PYTHONPATH": path, "HF_MODULES_CACHE": f"{folder}/remote_code"}
    with log.open("a") as file:
        done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=file, stderr=file)
    results = torch.load(out) if out.exists() else {}
    return {name: results.get(name, f"the process ended with status {done.returncode}, see {log}") for name in names}


def run_form(form, names, folder):
    """Run checks on the three subjects of a form. Return [(name, package, remote, export, difference)]."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    ours, export = write_models(form, folder)
    theirs = run_in_process(export, names, folder, "")
    package = run_in_process(ours, names, folder, "import nanogpt_accel.model")
    remote = run_in_process(ours._replace(remote=True), names, folder, WITHOUT_THE_PACKAGE)
    rows = []
    for name in names:
        cells, largest = [], 0.0
        for values in (package[name], remote[name]):
            if isinstance(values, str) or isinstance(theirs[name], str):
                cells.append(values if isinstance(values, str) else "ran")
                largest = math.inf
                continue
            differences, failed = compare(values, theirs[name])
            largest = max(largest, *differences.values())
            cells.append(", ".join(f"{key} differ by {differences[key]:.1e}" for key in failed) or "ok")
        rows.append((name, *cells, theirs[name] if isinstance(theirs[name], str) else "ok", largest))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forms", nargs="*", help=f"of {', '.join(FORMS)}; by default all")
    parser.add_argument("--only", default="", help="a word of the names of the checks")
    parser.add_argument("--folder", help="where to write models and logs")
    options = parser.parse_args()
    folder = options.folder or tempfile.mkdtemp(prefix="contract-")
    names = [name for name in CHECKS if options.only in name and importlib.util.find_spec(CHECKS[name][1])]
    n_failed = 0
    print("| check | client | form | package | remote code | export | largest difference |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for form in options.forms or FORMS:
        for name, *cells, largest in run_form(form, names, Path(folder) / form):
            client = CHECKS[name][1]
            client = f"{client} {importlib.metadata.version(client)}"
            print(f"| {' | '.join([name, client, form, *cells])} | {largest:.1e} |", flush=True)
            n_failed += cells != ["ok"] * 3
    print(f"\n{n_failed} rows with a difference or an error; models and logs are in {folder}")
    return int(n_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
