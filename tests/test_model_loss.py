"""The loss in pieces, which never has all logits in memory: its value and its gradients are those of the plain form."""

import pytest
import torch
from launching import finish, numbers, write_recipe

from nanogpt_accel.model import GPT, GPTConfig

B, T, V = 3, 200, 150
PIECES = V * 90  # logits at once: 600 rows come in pieces of 86, the last one of 84
AT_ONCE = float("inf")
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
    """(the loss, {name: gradient}); see GPT.largest_logits."""
    model.largest_logits = largest_logits
    model.zero_grad()
    output = model(**inputs, return_logits=False)
    assert output.logits is None
    (output.loss * scale).backward()
    return output.loss, {name: parameter.grad / scale for name, parameter in model.named_parameters()}


def largest_error(gradients, true):
    """The largest distance of a gradient from the true one, as a share of that one's norm."""
    return max(((gradients[name] - true[name]).norm() / true[name].norm()).item() for name in true)


def inputs_of(ids, how):
    if how == "labels":  # shifted by the model, which leaves the last place without a target
        labels = ids[:, :-1].clone()
        labels[0, 20:90] = -100
        return {"input_ids": ids[:, :-1], "labels": labels}
    inputs = {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:]}
    return inputs | ({"num_items_in_batch": 1234} if how == "num_items" else {})


@pytest.mark.parametrize("compiling", [False, True])  # what torch.compile is given stands in another form
@pytest.mark.parametrize("how", ["shifted", "labels", "num_items"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_plain_form(monkeypatch, family, how, compiling):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    model, ids = make(family)
    inputs = inputs_of(ids, how)
    model.zero_grad()
    loss = model(**inputs).loss  # with logits it is always the plain form
    loss.backward()
    true = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for largest in (PIECES, V * 300):  # the latter rounded up to whole tiles, 384 rows and the other 216
        in_pieces, gradients = loss_and_gradients(model, largest, **inputs)
        assert in_pieces.dtype == torch.float32 and in_pieces.item() == pytest.approx(loss.item(), rel=1e-6)
        assert largest_error(gradients, true) < 2e-6
    with torch.no_grad():
        assert model.eval()(**inputs, return_logits=False).loss.item() == in_pieces.item()


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_the_gradients_are_as_near_the_truth_as_the_plain_form(family):
    model, ids = make(family)
    inputs = inputs_of(ids, "shifted")
    true_loss, true = loss_and_gradients(model, AT_ONCE, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss, plain = loss_and_gradients(model, AT_ONCE, **inputs)
        in_pieces, gradients = loss_and_gradients(model, PIECES, **inputs)
    assert in_pieces.dtype == torch.float32
    assert abs(in_pieces - true_loss) <= 1.1 * abs(loss - true_loss) + 1e-3
    assert 1e-4 < largest_error(gradients, true) < 1.2 * largest_error(plain, true) < 0.05


def test_in_float16_small_gradients_survive_as_with_a_grad_scaler():
    """Divided by 600 before they are rounded, the smallest ones would be lost, as no scale of the loss brings back."""
    model, ids = make("untied")
    inputs = inputs_of(ids, "shifted")
    _, true = loss_and_gradients(model, AT_ONCE, **inputs)
    with torch.autocast("cpu", torch.float16):
        _, plain = loss_and_gradients(model, AT_ONCE, scale=2.0**10, **inputs)
        _, gradients = loss_and_gradients(model, PIECES, scale=2.0**10, **inputs)
    assert largest_error(gradients, true) < 1.2 * largest_error(plain, true) < 0.01


def test_gradients_add_up_over_micro_batches():
    model, ids = make("tied")
    _, once = loss_and_gradients(model, PIECES, **inputs_of(ids, "shifted"))
    once = {name: gradient.clone() for name, gradient in once.items()}
    model.zero_grad()
    for row in ids:
        (model(**inputs_of(row[None], "shifted"), return_logits=False).loss / B).backward()
    assert largest_error({name: p.grad for name, p in model.named_parameters()}, once) < 2e-6


def test_a_second_backward_pass_is_an_error():
    model, ids = make("tied")
    model.largest_logits = PIECES
    loss = model(**inputs_of(ids, "shifted"), return_logits=False).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_small_logits_take_the_plain_form():
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
    assert model(input_ids=ids[:, 1:], return_logits=False).logits is not None  # without targets they are all there is


def always_in_pieces():
    from nanogpt_accel.model import GPT

    GPT.largest_logits = 500  # of 4 * 32 rows of 13 characters


@pytest.mark.slow
def test_sharded_and_ddp(tmp_path):
    """The head's weights are whole where the pieces are computed, and its gradients find their way back."""
    recipe = write_recipe(tmp_path)
    words = [str(recipe), "max_iters=6", "eval_interval=3"]
    finish(tmp_path / "plain", [*words, f"out_dir={tmp_path}/plain"])
    for config in ("cpu_2proc.yaml", "fsdp2.yaml"):
        run = tmp_path / config
        finish(run, [*words, f"out_dir={run}"], config=config, processes=2, before=always_in_pieces)
        pairs = list(zip(numbers(tmp_path / "plain"), numbers(run), strict=True))
        assert len(pairs) == 9
        for a, b in pairs:
            assert a == pytest.approx(b, rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_compiled(half):
    model, ids = make("softcap")
    inputs = inputs_of(ids, "shifted")
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss, true = loss_and_gradients(model, PIECES, **inputs)
        true = {name: gradient.clone() for name, gradient in true.items()}
        model.zero_grad()
        found = torch.compile(model, fullgraph=True)(**inputs, return_logits=False).loss
        found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-3 if half else 1e-6)
    error = largest_error({name: p.grad for name, p in model.named_parameters()}, true)
    assert error < (0.02 if half else 1e-5)
