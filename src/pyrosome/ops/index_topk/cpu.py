"""`index_scores` by the native library."""

from __future__ import annotations

from torch import Tensor

from pyrosome.ops import native


def index_scores(q_THC: Tensor, keys_NC: Tensor, weight_TH: Tensor) -> Tensor:
    """As the definition, for float32 queries."""
    (T, H, C), N = q_THC.shape, keys_NC.shape[0]
    q_THC, keys_NC, weight_TH = q_THC.contiguous(), keys_NC.float().contiguous(), weight_TH.contiguous()
    score_TN = q_THC.new_empty(T, N)
    native.library().pyrosome_index_scores(
        q_THC.data_ptr(), keys_NC.data_ptr(), weight_TH.data_ptr(), score_TN.data_ptr(), T, H, C, N, native.threads()
    )
    return score_TN
