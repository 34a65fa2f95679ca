"""Masked merging: the method ``act``, the family ``act_<method>``, and the mask files that both take."""

from mergekit_act import autoload
from mergekit_act.merging.fit import FitSetting, TensorFit, fitted_selection, load_fit_file
from mergekit_act.merging.kernel import TensorSelection, channels_along, transfer
from mergekit_act.merging.masks import MaskFiles, find_mask_files, load_mask_files
from mergekit_act.merging.methods import is_ours, refuse_to_run, register_methods

__all__ = [
    "FitSetting",
    "MaskFiles",
    "TensorFit",
    "TensorSelection",
    "channels_along",
    "find_mask_files",
    "fitted_selection",
    "is_ours",
    "load_fit_file",
    "load_mask_files",
    "refuse_to_run",
    "register_methods",
    "transfer",
]

register_methods()
autoload.install()  # no merge without the planners' checks, however this package came to be imported
