"""Models that are loaded as a whole: to be evaluated, swept or trained."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GenerationMixin

from mergekit_act.abilities import AbilitySamples
from mergekit_act.checkpoints import Checkpoint
from mergekit_act.wording import enumerate_some, one_line

__all__ = ["broken_weight", "check_samples_fit", "load_model", "model_class"]


def load_model(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load a causal language model, as its config's class.

    Args:
        checkpoint: what ``open_checkpoint`` has opened.
        dtype: in which its weights are.
        device: where it runs; ``auto`` spreads it over all accelerators, and host memory if they are too small; None
            leaves that to the caller.
        trust_remote_code: allow the model's own code from the Hub.

    Raises:
        ValueError: a weight is missing, which Transformers would fill with random numbers; or it can't be loaded.
    """
    placed = {} if device in (None, "cpu") else {"device_map": "auto" if device == "auto" else {"": device}}
    try:
        model, report = model_class(checkpoint.config).from_pretrained(
            str(checkpoint.folder),
            config=copy.deepcopy(checkpoint.config),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **placed,
        )
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{checkpoint.reference} does not fit the memory of {device}; try --device auto") from error
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        reason = one_line(error, 300)
        raise ValueError(f"{checkpoint.reference} cannot be loaded by Transformers: {reason}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{checkpoint.reference} lacks {enumerate_some(missing, most=3)}")
    return model.eval()


def broken_weight(model: Any) -> str | None:
    """The name of a weight that has values which are NaN or infinite; None if there is none."""
    return next((name for name, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())), None)


def model_class(config: Any) -> Any:
    """The class that a checkpoint names if it can generate, else the auto class.

    A vision-language model is no "causal LM" to the auto class; a model without a head names a class that is none.
    """
    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    return named if isinstance(named, type) and issubclass(named, GenerationMixin) else AutoModelForCausalLM


def check_samples_fit(checkpoint: Checkpoint, ability: AbilitySamples, tokenizer: Tokenizer | None = None) -> None:
    """See that samples are made for a model's vocabulary and length.

    Args:
        checkpoint: of the model.
        ability: the samples.
        tokenizer: that made them; None if the model is known to have the same.

    Raises:
        ValueError: the model has no such token ids, other tokens for them, or fewer positions.
    """
    where = f'ability "{ability.name}"'
    config = checkpoint.config.get_text_config()
    used = sorted(set().union(*(sample.input_ids.tolist() for sample in ability.samples)))
    outside = next((token for token in (used[0], used[-1]) if not 0 <= token < config.vocab_size), None)
    if outside is not None:
        raise ValueError(f"{where} has token id {outside}; {checkpoint.reference} has 0 to {config.vocab_size - 1}")
    own = checkpoint.folder / "tokenizer.json"
    if tokenizer is not None and own.is_file():
        theirs = Tokenizer.from_file(str(own))
        for token in used:
            ours, other = tokenizer.id_to_token(token), theirs.id_to_token(token)
            if ours != other:
                raise ValueError(
                    f"{where}: token {token} is {ours!r} for the tokenizer that made the samples and {other!r} for "
                    f"{checkpoint.reference}; expected a model of the abilities file's backbone"
                )
    longest = max(len(sample.input_ids) for sample in ability.samples)
    room = getattr(config, "max_position_embeddings", None)
    if room is not None and longest > room:
        raise ValueError(
            f"{where} has a sample of {longest} tokens; {checkpoint.reference} has {room} positions. Set max_length to "
            f"{room} or less"
        )
