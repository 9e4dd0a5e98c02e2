"""The weights that an engine is sent: whole, merged once from float32, under their checkpoint names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from posttrain.errors import UserError
from posttrain.rollouts.fingerprint import WeightsDigest, weights_fingerprint
from posttrain.rollouts.weights import checked, full_weights, saved_shapes, saved_weights


def noisy(model: Any, scale: float = 0.3, only: str = "") -> Any:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only not in name:
                continue
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def lora(model: Any, only: str = "", **changes: Any) -> Any:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return noisy(get_peft_model(model, LoraConfig(**{**settings, **changes})), only=only)


def load(path: str, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def test_a_plain_model_comes_as_it_is_saved(tiny_model: str) -> None:
    sent, saved = dict(full_weights(load(tiny_model))), dict(saved_weights(tiny_model))
    assert list(sent) and set(sent) == set(saved) == set(saved_shapes(tiny_model))
    for name, tensor in saved.items():
        assert torch.equal(sent[name], tensor)
        assert saved_shapes(tiny_model)[name] == tuple(tensor.shape)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        {"target_modules": ["v_proj"], "bias": "all"},
    ],
    ids=["all-linear", "rslora", "modules_to_save", "bias"],
)
def test_lora_is_merged_as_peft_merges_it(tiny_model: str, changes: dict[str, Any]) -> None:
    model = lora(load(tiny_model), **changes)
    sent = {name: tensor.clone() for name, tensor in full_weights(model)}
    expected = dict(model.merge_and_unload().named_parameters())
    base = dict(load(tiny_model).named_parameters())
    assert set(sent) == set(expected) == set(base)
    assert any((tensor - base[name]).abs().max() > 0.1 for name, tensor in sent.items())
    for name, tensor in sent.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_on_a_tied_embedding_is_refused(tiny_model: str) -> None:
    """Merged, it would change the output head too, which the model under training does not."""
    with pytest.raises(UserError, match=r"'model.embed_tokens.weight', which is tied"):
        list(full_weights(lora(load(tiny_model), target_modules=["embed_tokens"])))


def test_an_adapter_on_an_untied_embedding(tiny_model: str) -> None:
    config = AutoConfig.from_pretrained(tiny_model, tie_word_embeddings=False)
    model = lora(AutoModelForCausalLM.from_config(config), target_modules=["embed_tokens", "lm_head"])
    sent = {name: tensor.clone() for name, tensor in full_weights(model)}
    for name, parameter in model.merge_and_unload().named_parameters():
        torch.testing.assert_close(sent[name], parameter, rtol=1e-6, atol=1e-6)


def test_a_layer_that_keeps_its_weight_transposed() -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=16)
    model = lora(GPT2LMHeadModel(config), target_modules=["c_attn"], fan_in_fan_out=True)
    sent = {name: tensor.clone() for name, tensor in full_weights(model)}
    expected = dict(model.merge_and_unload().named_parameters())
    torch.testing.assert_close(
        sent["transformer.h.0.attn.c_attn.weight"], expected["transformer.h.0.attn.c_attn.weight"], rtol=1e-6, atol=1e-6
    )


def test_in_bfloat16_the_merge_rounds_once_and_leaves_the_base_alone(tiny_model: str) -> None:
    """W + s·B·A in float32, rounded: bit for bit. Merging in place and subtracting again would move W."""
    model = lora(load(tiny_model, torch.bfloat16))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(3):
        sent = {name: tensor.clone() for name, tensor in full_weights(model)}
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = (before[f"{stem}.lora_{which}.default.weight"].float() for which in "AB")
    exact = before[f"{stem}.base_layer.weight"].float() + 3.0 * (b @ a)
    assert sent["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    assert torch.equal(sent["model.layers.0.self_attn.q_proj.weight"], exact.to(torch.bfloat16))


def test_an_adapter_that_is_not_plain_lora_is_refused(tiny_model: str) -> None:
    with pytest.raises(UserError, match="not plain LoRA"):
        list(full_weights(lora(load(tiny_model), use_dora=True)))


def test_saved_adapters_come_merged(tiny_model: str, tmp_path: Path) -> None:
    model = lora(load(tiny_model), only="lora_")
    model.save_pretrained(tmp_path)
    saved = {name: tensor.clone() for name, tensor in saved_weights(str(tmp_path))}
    sent = dict(full_weights(model))
    assert set(saved) == set(sent)
    for name, tensor in sent.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-6, atol=1e-6)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no safetensors files and no adapters"):
        list(saved_weights(str(tmp_path)))
    assert saved_shapes(str(tmp_path)) == saved_shapes("some/hub-name") == {}


def test_the_digest_of_what_is_sent_is_the_models_fingerprint(tiny_model: str) -> None:
    digest = WeightsDigest()
    for name, tensor in reversed(list(saved_weights(tiny_model))):
        digest.add(name, tensor)
    assert digest.hexdigest() == weights_fingerprint(load(tiny_model))


def test_what_does_not_fit_is_an_error() -> None:
    shapes = {"a": (2,), "b": (3,)}
    a, b = ("a", torch.zeros(2)), ("b", torch.zeros(3))
    assert [name for name, _ in checked(iter([a, b]), shapes)] == ["a", "b"]
    assert [t.dtype for _, t in checked(iter([a]), {}, torch.float16)] == [torch.float16]
    with pytest.raises(KeyError, match="no parameter 'c'"):
        list(checked(iter([a, ("c", torch.zeros(1))]), shapes))
    with pytest.raises(KeyError, match=r"'b' \(1 in all\).*did not come"):
        list(checked(iter([a]), shapes))
    with pytest.raises(ValueError, match=r"'b' has shape \(1,\).*\(3,\)"):
        list(checked(iter([a, ("b", torch.zeros(1))]), shapes))
