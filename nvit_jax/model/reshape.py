"""Masks -> a smaller dense model. The kept indices are taken; nothing else changes, so the function does not either."""

from nvit_jax.model import groups
from nvit_jax.model.dims import Units, ViTDims
from nvit_jax.model.fitting import check_params
from nvit_jax.model.groups import Params
from nvit_jax.model.masks import check_masks, kept_dims, kept_indices


def reshape(params: Params, masks: Units, dims: ViTDims) -> tuple[ViTDims, Params]:
    """Dims and parameters of the compact model. UserError when masks (see `check_masks`) or parameters do not fit."""
    masks = check_masks(masks, dims)
    check_params(params, dims)
    return kept_dims(masks, dims), groups.take(params, kept_indices(masks, dims))
