"""The chunked loss, which never has all logits in memory: its value and gradients equal those of the plain loss."""

import pytest
import torch
from launching import train_on_ranks
from runs import SMALL, numbers, write_recipe

from nanogpt_accel.model import GPT, GPTConfig

B, T, V = 3, 200, 150
CHUNKED = V * 90  # number of logits per chunk: 600 rows in chunks of 86, the last one of 84
NOT_CHUNKED = float("inf")
FAMILIES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "softcap": {"tie_word_embeddings": False, "logit_softcap": 2, "norm": "rmsnorm", "position": "rotary"},
}


def make(family, **changes):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            **{
                "vocab_size": V,
                "block_size": T,
                "n_layer": 1,
                "n_head": 2,
                "n_embd": 32,
                "initializer_range": 0.2,
                **FAMILIES[family],
                **changes,
            }
        )
    ).train()
    return model, torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model, largest_logits, scale=1.0, **inputs):
    """Return (the loss, {name: gradient}). largest_logits: see GPT.largest_logits."""
    model.largest_logits = largest_logits
    model.zero_grad()
    output = model(**inputs, return_logits=False)
    assert output.logits is None
    (output.loss * scale).backward()
    return output.loss, {name: parameter.grad / scale for name, parameter in model.named_parameters()}


def largest_error(gradients, true):
    """Return the largest relative error of a gradient, in the 2-norm."""
    return max(((gradients[name] - true[name]).norm() / true[name].norm()).item() for name in true)


def inputs_of(ids, how):
    if how == "labels":  # shifted by the model, so the last position has no target
        labels = ids[:, :-1].clone()
        labels[0, 20:90] = -100
        return {"input_ids": ids[:, :-1], "labels": labels}
    inputs = {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:]}
    return inputs | ({"num_items_in_batch": 1234} if how == "num_items" else {})


@pytest.mark.parametrize("compiling", [False, True])  # torch.compile takes another code path
@pytest.mark.parametrize("how", ["shifted", "labels", "num_items"])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_loss_and_gradients_equal_the_plain_ones(monkeypatch, family, how, compiling):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    model, ids = make(family)
    inputs = inputs_of(ids, how)
    model.zero_grad()
    loss = model(**inputs).loss  # if logits are returned, the loss is never chunked
    loss.backward()
    true = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for largest in (CHUNKED, V * 300):  # the latter is rounded up to 384 rows, and 216 are left
        chunked, gradients = loss_and_gradients(model, largest, **inputs)
        assert chunked.dtype == torch.float32 and chunked.item() == pytest.approx(loss.item(), rel=1e-6)
        assert largest_error(gradients, true) < 2e-6
    with torch.no_grad():
        assert model.eval()(**inputs, return_logits=False).loss.item() == chunked.item()


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_gradients_in_bfloat16_are_as_accurate_as_the_plain_ones(family):
    model, ids = make(family)
    inputs = inputs_of(ids, "shifted")
    true_loss, true = loss_and_gradients(model, NOT_CHUNKED, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss, plain = loss_and_gradients(model, NOT_CHUNKED, **inputs)
        chunked, gradients = loss_and_gradients(model, CHUNKED, **inputs)
    assert chunked.dtype == torch.float32
    assert abs(chunked - true_loss) <= 1.1 * abs(loss - true_loss) + 1e-3
    assert 1e-4 < largest_error(gradients, true) < 1.2 * largest_error(plain, true) < 0.05


def test_chunked_gradients_in_float16_do_not_underflow_with_a_grad_scaler():
    """If the gradients were divided by the 600 targets before they are rounded to float16, the smallest ones would
    underflow, whatever the scale of the loss is."""
    model, ids = make("untied")
    inputs = inputs_of(ids, "shifted")
    _, true = loss_and_gradients(model, NOT_CHUNKED, **inputs)
    with torch.autocast("cpu", torch.float16):
        _, plain = loss_and_gradients(model, NOT_CHUNKED, scale=2.0**10, **inputs)
        _, gradients = loss_and_gradients(model, CHUNKED, scale=2.0**10, **inputs)
    assert largest_error(gradients, true) < 1.2 * largest_error(plain, true) < 0.01


def test_chunked_gradients_accumulate_over_micro_batches():
    model, ids = make("tied")
    _, once = loss_and_gradients(model, CHUNKED, **inputs_of(ids, "shifted"))
    once = {name: gradient.clone() for name, gradient in once.items()}
    model.zero_grad()
    for row in ids:
        (model(**inputs_of(row[None], "shifted"), return_logits=False).loss / B).backward()
    assert largest_error({name: p.grad for name, p in model.named_parameters()}, once) < 2e-6


def test_second_backward_of_the_chunked_loss_is_an_error():
    model, ids = make("tied")
    model.largest_logits = CHUNKED
    loss = model(**inputs_of(ids, "shifted"), return_logits=False).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_loss_is_chunked_only_above_largest_logits():
    model, ids = make("tied")
    inputs = inputs_of(ids, "shifted")
    plain = model(**inputs)
    assert plain.logits.shape == (B, T, V)
    without = model(**inputs, return_logits=False)
    assert without.logits is None and without.loss.item() == plain.loss.item()
    model.largest_logits = B * T * V - 1
    assert (
        model(**inputs, return_logits=False).loss.grad_fn.next_functions[0][0].name()
        == "FusedLinearCrossEntropyBackward"
    )
    assert model(input_ids=ids[:, 1:], return_logits=False).logits is not None  # needed without targets


def always_chunk():
    """Compute the loss of every model in chunks. Each rank calls this before it trains."""
    from nanogpt_accel.model import GPT

    GPT.largest_logits = 500  # of 4 * 32 rows of 13 characters


@pytest.mark.slow
def test_chunked_loss_with_ddp_and_fsdp2(tmp_path):
    """FSDP2 gathers the weights of the head for the chunks, and shards their gradients again."""
    settings = SMALL | {"bias": True, "learning_rate": 3e-3}
    recipe = write_recipe(tmp_path, **settings, max_iters=6, eval_interval=3)
    train_on_ranks(tmp_path / "plain", [recipe, f"out_dir={tmp_path}/plain"])
    for config in ("cpu_2proc.yaml", "fsdp2.yaml"):
        run = tmp_path / config
        train_on_ranks(run, [recipe, f"out_dir={run}"], config=config, processes=2, before=always_chunk)
        pairs = list(zip(numbers(tmp_path / "plain"), numbers(run), strict=True))
        assert len(pairs) == 9
        for a, b in pairs:
            assert a == pytest.approx(b, rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_compiled_chunked_loss(half):
    model, ids = make("softcap")
    inputs = inputs_of(ids, "shifted")
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss, true = loss_and_gradients(model, CHUNKED, **inputs)
        true = {name: gradient.clone() for name, gradient in true.items()}
        model.zero_grad()
        found = torch.compile(model, fullgraph=True)(**inputs, return_logits=False).loss
        found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-3 if half else 1e-6)
    error = largest_error({name: p.grad for name, p in model.named_parameters()}, true)
    assert error < (0.02 if half else 1e-5)
