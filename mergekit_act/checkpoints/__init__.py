"""Model references and what they lead to: configs, tensor headers, fingerprints, weights."""

from mergekit_act.checkpoints.checkpoint import Checkpoint, merged_model, open_checkpoint, quantisation
from mergekit_act.checkpoints.headers import TensorHeader, read_headers
from mergekit_act.checkpoints.references import local_folder, model_name, parse_reference, read_config

__all__ = [
    "Checkpoint",
    "TensorHeader",
    "local_folder",
    "merged_model",
    "model_name",
    "open_checkpoint",
    "parse_reference",
    "quantisation",
    "read_config",
    "read_headers",
]
