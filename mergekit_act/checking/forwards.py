"""What differs between two models' configs and changes the forward pass."""

from __future__ import annotations

from typing import Any

__all__ = ["forward_differences"]

# Keys of a config that do not enter the forward pass: names, sizes that tensors show themselves, training, generation.
_NO_FORWARD = frozenset(
    {
        *("_name_or_path", "architectures", "auto_map", "dtype", "id2label", "is_decoder", "is_encoder_decoder"),
        *("label2id", "model_type", "num_labels", "problem_type", "task_specific_params", "tokenizer_class"),
        *("torch_dtype", "transformers_version", "unsloth_fixed", "unsloth_version", "vocab_size"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "forced_bos_token_id"),
        *("forced_eos_token_id", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
        *("use_cache", "chunk_size_feed_forward", "attention_dropout", "attn_pdrop", "classifier_dropout"),
        *("embd_pdrop", "embedding_dropout", "feed_forward_dropout", "hidden_dropout", "initializer_range"),
        *("resid_pdrop", "router_aux_loss_coef", "router_jitter_noise", "summary_activation"),
        *("summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
    }
)


def forward_differences(target: Any, ability_model: Any) -> list[tuple[str, Any, Any]]:
    """(key, the target's value, the ability model's) for what two Transformers configs differ in.

    A merge runs with the target's config: rows that were trained with another rotary base, context, norm or
    activation will not do quite the same there.
    """
    ours, theirs = (_flat(config.get_text_config().to_dict()) for config in (target, ability_model))
    keys = [key for key in sorted(ours.keys() | theirs.keys()) if key.split(".")[0] not in _NO_FORWARD]
    pairs = [(key, ours.get(key, "not set"), theirs.get(key, "not set")) for key in keys]
    return [(key, mine, other) for key, mine, other in pairs if mine != other]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
