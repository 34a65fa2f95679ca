"""Which families of models work, tried end to end on tiny random pairs: the table of docs/models.md.

    python benchmarks/families.py [FAMILY ...]

For each: profile by samples, mask, check, merge with mergekit, then the output loaded by Transformers. It has to equal
the formula parameter by parameter (computed here with boolean masks over whole tensors), lack nothing that the target
has, and generate a text. Attributions have to equal gradients of a whole model's weights to 1e-4 of a module's largest.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

import click
import torch
import transformers
import yaml
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from mergekit.scripts.run_yaml import main as mergekit_yaml
from oracle import plain_attribution, plain_merge
from samples import as_ability, random_samples
from tiny import SIZES, make_tokenizer

from mergekit_act.artifacts import load_mask
from mergekit_act.channels import kind_pattern
from mergekit_act.cli import main as mergekit_act
from mergekit_act.profiling import ProfilingSettings, open_pair, profile_pair

HEADS = {"head_dim": 8}
FOUR = SIZES | {"num_hidden_layers": 4}
ALL_HEADS = FOUR | {"num_key_value_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {"num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DENSE_FIRST = {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
LINEAR = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"linear_conv_kernel_dim": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 14}
QWEN_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
NO_GROUPS = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
PROJECTED = ("model.vision_tower.*", "model.multi_modal_projector.*")

t = transformers
FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: t.Qwen2Config(**SIZES),
    "qwen3": lambda: t.Qwen3Config(**SIZES, **HEADS),
    "qwen3-moe": lambda: t.Qwen3MoeConfig(**SIZES, **HEADS, **EXPERTS, decoder_sparse_step=1),
    "qwen3-next": lambda: t.Qwen3NextConfig(
        **FOUR, **HEADS, **EXPERTS, **LINEAR, decoder_sparse_step=1, shared_expert_intermediate_size=24
    ),
    "qwen3.5": lambda: t.Qwen3_5TextConfig(**FOUR, **HEADS, **LINEAR),
    "qwen2.5-vl": lambda: t.Qwen2_5_VLConfig(
        text_config=SIZES | {"rope_scaling": {"type": "default", "mrope_section": [2, 1, 1]}},
        vision_config=QWEN_TOWER | {"fullatt_block_indexes": [1]},
    ),
    "qwen3-vl": lambda: t.Qwen3VLConfig(
        text_config=SIZES | HEADS | {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        vision_config=QWEN_TOWER | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "llama": lambda: t.LlamaConfig(**SIZES),
    "llama, attention bias": lambda: t.LlamaConfig(**SIZES, attention_bias=True),
    "llama4 (text)": lambda: t.Llama4TextConfig(
        **FOUR,
        **HEADS,
        num_local_experts=4,
        num_experts_per_tok=1,
        intermediate_size_mlp=48,
        interleave_moe_layer_step=2,
    ),
    "mistral": lambda: t.MistralConfig(**SIZES),
    "mistral3": lambda: t.Mistral3Config(
        text_config=SIZES | {"model_type": "mistral"},
        vision_config=TOWER | HEADS | {"model_type": "pixtral", "image_size": 28},
    ),
    "mixtral": lambda: t.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "gemma2": lambda: t.Gemma2Config(**SIZES, **HEADS, sliding_window=8),
    "gemma3 (text)": lambda: t.Gemma3TextConfig(**SIZES, **HEADS, sliding_window=8),
    "gemma3 (multimodal)": lambda: t.Gemma3Config(
        text_config=SIZES | HEADS | {"sliding_window": 8},
        vision_config=TOWER | {"image_size": 28},
        mm_tokens_per_image=4,
    ),
    "phi3, phi4": lambda: t.Phi3Config(**SIZES),
    "gpt-oss": lambda: t.GptOssConfig(**SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": lambda: t.GPT2Config(
        vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=None, eos_token_id=2
    ),
    "gpt-neox": lambda: t.GPTNeoXConfig(**NO_GROUPS),
    "smollm3": lambda: t.SmolLM3Config(**SIZES),
    "olmo2": lambda: t.Olmo2Config(**SIZES),
    "olmo3": lambda: t.Olmo3Config(**FOUR),
    "granite": lambda: t.GraniteConfig(**SIZES),
    "granite-moe-hybrid": lambda: t.GraniteMoeHybridConfig(
        **FOUR,
        **MAMBA,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=24,
        layer_types=["mamba", "attention"] * 2,
        position_embedding_type="rope",
    ),
    "deepseek-v2": lambda: t.DeepseekV2Config(**ALL_HEADS, **LATENT, **ROUTED, **DENSE_FIRST),
    "deepseek-v3": lambda: t.DeepseekV3Config(**ALL_HEADS, **LATENT, **ROUTED, **DENSE_FIRST),
    "glm4": lambda: t.Glm4Config(**SIZES, **HEADS),
    "glm4-moe": lambda: t.Glm4MoeConfig(**FOUR, **HEADS, **ROUTED, **DENSE_FIRST),
    "glm4-moe-lite": lambda: t.Glm4MoeLiteConfig(**ALL_HEADS, **LATENT, **ROUTED, **DENSE_FIRST),
    "ernie4.5-moe": lambda: t.Ernie4_5_MoeConfig(
        **FOUR, moe_num_experts=4, moe_k=2, moe_intermediate_size=24, moe_num_shared_experts=1, moe_layer_start_index=1
    ),
    "dots1": lambda: t.Dots1Config(**FOUR, **ROUTED, **DENSE_FIRST, layer_types=["full_attention"] * 4),
    "lfm2-moe": lambda: t.Lfm2MoeConfig(
        **FOUR, **EXPERTS, num_dense_layers=1, layer_types=["conv", "full_attention"] * 2
    ),
    "starcoder2": lambda: t.Starcoder2Config(**SIZES),
    "stablelm": lambda: t.StableLmConfig(**SIZES),
    "cohere2": lambda: t.Cohere2Config(**SIZES),
    "falcon": lambda: t.FalconConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, eos_token_id=2
    ),
    "opt": lambda: t.OPTConfig(
        **{"vocab_size": 128, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"word_embed_proj_dim": 32, "max_position_embeddings": 128, "eos_token_id": 2, "pad_token_id": 0},
    ),
    "mamba": lambda: t.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=8),
    "jamba": lambda: t.JambaConfig(
        **FOUR, num_experts=4, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False
    ),
}
CLASSES = {
    "qwen2.5-vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3-vl": "Qwen3VLForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "gemma3 (multimodal)": "Gemma3ForConditionalGeneration",
}
EXCLUDED = {
    "qwen2.5-vl": ("model.visual.*",),
    "qwen3-vl": ("model.visual.*",),
    "mistral3": PROJECTED,
    "gemma3 (multimodal)": PROJECTED,
    "llama4 (text)": ("model.layers.*.feed_forward.experts.*",),
    "mamba": ("backbone.layers.*.mixer.dt_proj",),
    "jamba": ("model.layers.*.mamba.dt_proj",),
}


class RefusalError(Exception):
    """A command said no, in a sentence."""


def run(command: Any, *arguments: str) -> str:
    """A command's output.

    Raises:
        RefusalError: it failed; what it said, or the traceback's last line, marked as such.
    """
    result = CliRunner().invoke(command, arguments)
    if result.exit_code:
        broken = result.exception is not None and not isinstance(result.exception, SystemExit)
        said = f"TRACEBACK {result.exception!r}" if broken else result.output.strip().splitlines()[-1]
        raise RefusalError(said.removeprefix("Error: "))
    return result.output


def make_pair(family: str, folder: Path) -> Any:
    """Save a pair of random models.

    Returns:
        Their class.
    """
    for seed, name in enumerate(("target", "ability")):
        torch.manual_seed(seed)
        config = FAMILIES[family]()
        chosen = CLASSES.get(family)
        maker = getattr(transformers, chosen) if chosen else transformers.AutoModelForCausalLM.from_config
        model = maker(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return type(model)


def state(model_class: Any, folder: Path) -> dict[str, torch.Tensor]:
    model, report = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys"):
        if report[kind]:
            raise RefusalError(f"WRONG: {kind} {sorted(report[kind])[:3]}")
    return dict(model.state_dict())


def profile(family: str, folder: Path) -> str:
    rows = [json.dumps({"q": f"{a}+{b}", "a": str(a + b)}) for a in range(8) for b in range(3)]
    (folder / "sums.jsonl").write_text("\n".join(rows))
    ability = {"dataset": str(folder / "sums.jsonl"), "prompt": "q", "answer": "a", "samples": 12}
    pair = {"target": str(folder / "target"), "ability_model": str(folder / "ability")}
    (folder / "abilities.yml").write_text(yaml.safe_dump(pair | {"abilities": {"sums": ability}}))
    exclude = [option for glob in EXCLUDED.get(family, ()) for option in ("--exclude", glob)]
    common = ["--dtype", "float32", "--device", "cpu", "--quiet", *exclude]
    run(mergekit_act, "profile", str(folder / "abilities.yml"), str(folder / "profiles"), *common)
    given = " ".join(f"`--exclude '{glob}'`" for glob in EXCLUDED.get(family, ()))
    return f"yes, with {given}" if given else "yes"


def attribute(family: str, folder: Path, model_class: Any) -> str:
    """Attributions against gradients of a whole model's weights."""
    pair = open_pair(str(folder / "target"), str(folder / "ability"), exclude=EXCLUDED.get(family, ()))
    samples = [([token % 60 + 3 for token in ids], answers) for ids, answers in random_samples()]
    settings = ProfilingSettings(criterion="attribution", device="cpu", dtype="float32", quiet=True)
    (made,) = profile_pair(pair, [as_ability(samples)], settings)
    expected, _ = plain_attribution(
        folder / "target", folder / "ability", samples, pair.layout, model_class=model_class
    )
    for module, values in expected.items():
        worst = float((made.scores[module] - values).abs().max() / values.abs().max())
        if worst > 1e-4:
            raise RefusalError(f"WRONG: {module} by {worst:.1e}")
    return "yes"


def merge(family: str, folder: Path, model_class: Any) -> str:
    """Merge by a mask of the profile, and compare."""
    source, mask = folder / "profiles/sums.safetensors", folder / "mask.safetensors"
    if not source.exists():  # by random channels instead
        arguments = ["profile", str(folder / "abilities.yml"), str(folder / "profiles"), "--criterion", "random"]
        run(mergekit_act, *arguments, "--quiet")
        source = folder / "profiles/random.safetensors"
    run(mergekit_act, "mask", str(source), "-o", str(mask), "--density", "0.3")
    parameters = {"weight": 0.5, "mask": str(mask)}
    models = [{"model": str(folder / "ability"), "parameters": parameters}]
    config = {"merge_method": "act", "base_model": str(folder / "target"), "models": models}
    (folder / "act.yml").write_text(yaml.safe_dump(config))
    run(mergekit_act, "check", str(folder / "act.yml"))
    run(mergekit_yaml, str(folder / "act.yml"), str(folder / "out"), "--quiet")
    out, target, ability = (state(model_class, folder / name) for name in ("out", "target", "ability"))
    chosen = load_mask(mask)
    expected = plain_merge(target, [(ability, 0.5, chosen)], tied=bool(chosen.layout.tied))
    wrong = [name for name, tensor in expected.items() if not torch.allclose(out[name], tensor, atol=1e-6)]
    if wrong:
        raise RefusalError(f"WRONG: {wrong[:3]}")
    same = [name for name, tensor in target.items() if torch.equal(tensor, out[name])]
    untouched = [name for name in same if not torch.equal(target[name], ability[name])]
    bare = [name for name in untouched if name in chosen.layout.without_channels()]
    told = sorted({kind_pattern(name) for name in bare if not any(fnmatch(name, g) for g in EXCLUDED.get(family, ()))})
    return "yes" + (f"; copied, without channels: {', '.join(f'`{name}`' for name in told)}" if told else "")


def generate(folder: Path, model_class: Any) -> str:
    model = model_class.from_pretrained(folder / "out", dtype=torch.float32).eval()
    ids = torch.arange(5, 11)[None]
    with torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    return "yes" if made.shape[1] > 6 else "nothing"


def tried(step: Callable[[], str]) -> str:
    try:
        return step()
    except RefusalError as refusal:
        return f"no: {str(refusal)[:300]}"


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with contextlib.redirect_stderr(io.StringIO()):
        yield


@click.command()
@click.argument("families", nargs=-1)
def main(families: tuple[str, ...]) -> None:
    transformers.logging.set_verbosity_error()
    click.echo("| family | profile | attribution | merge | the merged model generates |\n|---|---|---|---|---|")
    for family in families or FAMILIES:
        with tempfile.TemporaryDirectory() as name, silence():
            folder = Path(name)
            model_class = make_pair(family, folder)
            profiled = tried(lambda: profile(family, folder))  # noqa: B023
            attributed = tried(lambda: attribute(family, folder, model_class))  # noqa: B023
            merged = tried(lambda: merge(family, folder, model_class))  # noqa: B023
            made = tried(lambda: generate(folder, model_class)) if merged.startswith("yes") else ""  # noqa: B023
        row = " | ".join((family, profiled, attributed, merged, made)).replace(name, "")
        click.echo(f"| {row} |")


if __name__ == "__main__":
    main()
