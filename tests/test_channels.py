"""Layouts from configs alone, and the command that lists them."""

from __future__ import annotations

import pytest
import transformers
from click.testing import CliRunner
from tiny import tiny_config

from mergekit_act.channels import channel_layout, kind_pattern
from mergekit_act.cli import main


def qwen25(hidden: int, layers: int, key_value_heads: int, intermediate: int, vocabulary: int, *, tied: bool):
    return transformers.Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=key_value_heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


@pytest.mark.parametrize(
    ("config", "channels", "one_percent"),
    [
        (qwen25(3584, 28, 4, 18944, 152064, tied=False), 1_750_528, 17_505),
        (qwen25(1536, 28, 2, 8960, 151936, tied=True), 886_144, 8_861),
        (
            transformers.LlamaConfig(
                hidden_size=5120,
                num_hidden_layers=40,
                num_attention_heads=40,
                intermediate_size=13824,
                vocab_size=32000,
            ),
            2_581_760,
            25_817,
        ),
    ],
    ids=["Qwen2.5-7B", "Qwen2.5-1.5B", "LLaMA-2-13B"],
)
def test_the_papers_models_have_the_papers_counts(config, channels, one_percent):
    count = channel_layout(config).channel_count()
    assert count == channels
    assert count // 100 == one_percent


def test_qwen2_modules_come_in_order_with_their_owners():
    layout = channel_layout(tiny_config("qwen2-tied"))
    assert layout.modules[:2] == ("model.embed_tokens", "model.layers.0.self_attn.q_proj")
    assert layout.modules[-2:] == ("model.norm", "lm_head")
    assert layout.parameters["model.embed_tokens"] == (("model.embed_tokens.weight", 1),)
    assert layout.parameters["model.layers.0.self_attn.q_proj"] == (
        ("model.layers.0.self_attn.q_proj.weight", 0),
        ("model.layers.0.self_attn.q_proj.bias", 0),
    )
    assert layout.parameters["lm_head"] == (("lm_head.weight", 0),)
    assert layout.tied == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert layout.channel_shape("lm_head") == (128,)
    assert layout.channel_shape("model.embed_tokens") == (32,)
    assert layout.parameters_per_channel("model.layers.0.self_attn.q_proj") == 33
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("qwen2-tied"))
    assert layout.parameter_count() == model.num_parameters()


def test_conv1d_channels_are_the_columns_of_its_weight():
    layout = channel_layout(tiny_config("gpt2"))
    assert layout.parameters["transformer.h.0.attn.c_attn"] == (
        ("transformer.h.0.attn.c_attn.weight", 1),
        ("transformer.h.0.attn.c_attn.bias", 0),
    )
    assert layout.channel_shape("transformer.h.0.attn.c_attn") == (96,)
    assert layout.parameters["transformer.wpe"] == (("transformer.wpe.weight", 1),)


def test_fused_experts_have_a_layout_per_projection():
    layout = channel_layout(tiny_config("qwen3_moe"))
    experts = "model.layers.0.mlp.experts"
    assert layout.parameters[f"{experts}.gate_up_proj"] == ((f"{experts}.gate_up_proj", 1),)
    assert layout.channel_shape(f"{experts}.gate_up_proj") == (4, 48)
    assert layout.channel_shape(f"{experts}.down_proj") == (4, 32)
    assert layout.parameters["model.layers.0.mlp.gate"] == (("model.layers.0.mlp.gate.weight", 0),)


def test_transposed_experts_biases_and_parameters_without_channels():
    layout = channel_layout(tiny_config("gpt_oss"))
    experts = "model.layers.1.mlp.experts"
    assert layout.parameters[f"{experts}.down_proj"] == ((f"{experts}.down_proj", 2), (f"{experts}.down_proj_bias", 1))
    assert layout.channel_shape(f"{experts}.gate_up_proj") == (4, 96)
    assert layout.parameters_per_channel(f"{experts}.gate_up_proj") == 33
    assert list(layout.without_channels()) == [f"model.layers.{i}.self_attn.sinks" for i in range(2)]


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2", "gpt_neox", "phi3", "olmo2", "falcon"])
def test_every_parameter_of_a_dense_model_has_channels(name):
    layout = channel_layout(tiny_config(name))
    assert layout.without_channels() == {}
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(name))
    assert layout.parameter_count() == model.num_parameters()


def test_kind_pattern_replaces_indices_only():
    assert kind_pattern("model.layers.11.mlp.up_proj") == "model.layers.*.mlp.up_proj"
    assert kind_pattern("transformer.h.0.ln_1") == "transformer.h.*.ln_1"
    assert kind_pattern("lm_head") == "lm_head"


def test_command_lists_channels_without_weights(tmp_path):
    tiny_config("gpt_oss").save_pretrained(tmp_path)
    result = CliRunner().invoke(main, ["channels", str(tmp_path)])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    assert ["model.layers.*.mlp.experts.gate_up_proj", "2", "768", "49.74", "%", "33"] in lines
    assert ["total", "21", "1,544", "100.00", "%"] in lines
    assert "1 % of the channels: 15" in result.output
    assert "parameters without channels, never transferred: 8 (model.layers.*.self_attn.sinks)" in result.output


def test_command_refuses_a_folder_without_config(tmp_path):
    result = CliRunner().invoke(main, ["channels", str(tmp_path)])
    assert result.exit_code == 1
    assert (
        result.output == f"Error: {tmp_path} has no config.json; expected a model folder as save_pretrained writes it\n"
    )
